"""The recipe is written three times, for Python, for the command line and in the README: it is one."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.callbacks import Callback

import lightning_unfreeze
from lightning_unfreeze import GradualUnfreeze, Stage, fine_tune, nine_steps

REPO = Path(__file__).parents[1]


def described(callbacks: list[Callback]) -> dict[str, Any]:
    """Class -> what it was made with; the stages rounded to what a YAML file writes."""
    return {type(callback).__name__: options_of(callback) for callback in callbacks}


def options_of(callback: Callback) -> dict[str, Any]:
    if isinstance(callback, GradualUnfreeze):
        options = {name: getattr(callback, name) for name in inspect.signature(GradualUnfreeze).parameters}
        return {**options, "stages": [rounded(stage) for stage in callback.stages]}
    fresh = type(callback)()  # the others are made without arguments
    return {
        name: getattr(callback, name) for name in inspect.signature(type(callback)).parameters if hasattr(fresh, name)
    }


def rounded(stage: Stage) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in vars(stage).items()}


def from_yaml(text: str) -> list[Callback]:
    made = []
    for row in yaml.safe_load(text)["trainer"]["callbacks"]:
        name, options = row["class_path"].rpartition(".")[2], row.get("init_args", {})
        if hasattr(lightning_unfreeze, name):  # not the checkpoints
            if "stages" in options:
                options = {**options, "stages": [Stage(**stage) for stage in options["stages"]]}
            made.append(getattr(lightning_unfreeze, name)(**options))
    return made


def readme_block(language: str) -> str:
    """The one block of code that lists the recipe."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", (REPO / "README.md").read_text(), re.M | re.S)
    (block,) = [text for text in blocks if "GradualUnfreeze" in text and "head_augmented" in text]
    return str(block)


@pytest.mark.parametrize(
    ("config", "recipe"),
    [("nine_steps.yaml", nine_steps()), ("fine_tune.yaml", fine_tune(5))],
    ids=lambda value: str(value)[:10],
)
def test_configs__are_the_recipes(config: str, recipe: list[Callback]) -> None:
    assert described(from_yaml((REPO / "configs" / config).read_text())) == described(recipe)


def test_readme__lists_the_recipe_in_python_and_yaml() -> None:
    expected = described(nine_steps())
    assert described(from_yaml(readme_block("yaml"))) == expected
    tree = ast.parse(readme_block("python"))
    (listed,) = [node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "callbacks"]
    callbacks = eval(compile(ast.Expression(listed), "README.md", "eval"), vars(lightning_unfreeze) | names())
    assert described(callbacks) == expected


def names() -> dict[str, Any]:
    return {name: getattr(lightning_unfreeze, name) for name in lightning_unfreeze.__all__}


def test_nine_steps__take_their_numbers() -> None:
    (conductor, *_) = nine_steps("model", lr_span=1 / 100, max_cycles=1, train_bn=True)
    assert isinstance(conductor, GradualUnfreeze)
    assert (conductor.network, conductor.train_bn) == ("model", True)
    full = conductor.stages[-1]
    assert (full.lr_span, full.num_epochs, full.until) == (1 / 100, 1, None)
    assert [stage.num_epochs for stage in nine_steps(max_cycles=4)[0].stages] == [2, 3, 1 + 2 + 4 + 8]  # type: ignore[attr-defined]


def test_fine_tune__solves_or_trains_the_head_and_has_one_cycle() -> None:
    solved, trained = fine_tune(7)[0], fine_tune(7, head_epochs=3, lr=1e-3)[0]
    assert isinstance(solved, GradualUnfreeze) and isinstance(trained, GradualUnfreeze)
    assert [(stage.train, stage.num_epochs) for stage in solved.stages] == [("head", 1), ("all", 7)]
    assert [(stage.solve, stage.precompute, stage.lr) for stage in solved.stages] == [
        (True, True, None),
        (False, False, "find"),
    ]
    assert [(stage.solve, stage.num_epochs, stage.lr) for stage in trained.stages] == [
        (False, 3, "find"),
        (False, 7, 1e-3),
    ]
    with pytest.raises(ValueError, match="cycle_len=0"):
        fine_tune(0)


def test_recipes__serve_all_that_their_stages_need() -> None:
    for recipe in (nine_steps(), fine_tune(5), fine_tune(5, head_epochs=2)):
        (conductor, *_) = recipe
        assert isinstance(conductor, GradualUnfreeze)
        needed = {callback for stage in conductor.stages for callback in stage.needs.values()}
        assert needed <= {type(callback).__name__ for callback in recipe}
