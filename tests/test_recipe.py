"""The recipe is written three times, for Python, for the command line and in the README: it is one."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader

import lightning_unfreeze
from lightning_unfreeze import DigitsData, GradualUnfreeze, Stage, TransferClassifier, fine_tune, nine_steps
from tests.hugging_face import HuggingFaceModule, Photos, build, photo_loader
from tests.zoo import quiet_trainer

REPO = Path(__file__).parents[1]


def described(callbacks: list[Callback]) -> dict[str, Any]:
    """Class -> what it was made with; the stages rounded to what a YAML file writes."""
    return {type(callback).__name__: options_of(callback) for callback in callbacks}


def options_of(callback: Callback) -> dict[str, Any]:
    if isinstance(callback, GradualUnfreeze):
        options = {name: getattr(callback, name) for name in inspect.signature(GradualUnfreeze).parameters}
        return {**options, "stages": [rounded(stage) for stage in callback.stages]}
    fresh = type(callback)()
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
    assert (full.lr_span, full.num_epochs, full.until) == (1 / 100, 3, None)
    assert [stage.num_epochs for stage in nine_steps(max_cycles=4)[0].stages] == [2, 2, 3 + 6 + 12 + 24]  # type: ignore[attr-defined]
    head = nine_steps(head_epochs=2)[0].stages[0]  # type: ignore[attr-defined]
    assert (head.solve, head.precompute, head.num_epochs, head.lr) == (False, True, 2, "find")


@pytest.mark.parametrize("recipe", [nine_steps, functools.partial(fine_tune, 5)])
def test_recipes__take_away_a_scheduler_and_let_early_stopping_end_a_stage(recipe: Callable[..., list[Any]]) -> None:
    before, after = recipe()[0], recipe(scheduler="replace", early_stopping="stage")[0]
    assert (before.scheduler, before.early_stopping) == ("error", "fit")
    assert (after.scheduler, after.early_stopping) == ("replace", "stage")
    with pytest.raises(ValueError, match="scheduler='keep'"):
        recipe(scheduler="keep")


def test_fine_tune__solves_or_trains_the_head_and_has_one_cycle() -> None:
    solved, trained = fine_tune(7)[0], fine_tune(7, head_epochs=3, lr=1e-3)[0]
    assert isinstance(solved, GradualUnfreeze) and isinstance(trained, GradualUnfreeze)
    assert [(stage.train, stage.num_epochs) for stage in solved.stages] == [("head", 2), ("all", 7)]
    assert [(stage.solve, stage.precompute, stage.lr) for stage in solved.stages] == [
        ("auto", True, "find"),
        (False, False, "find"),
    ]
    assert [(stage.solve, stage.num_epochs, stage.lr) for stage in trained.stages] == [
        (False, 3, "find"),
        (False, 7, 1e-3),
    ]
    with pytest.raises(ValueError, match="cycle_len=0"):
        fine_tune(0)


@pytest.mark.parametrize("make", [lambda: fine_tune(5, 2e-3), lambda: nine_steps(5)], ids=["fine_tune", "nine_steps"])  # type: ignore[arg-type]
def test_recipes__take_no_rate_and_no_length_for_the_name_of_the_network(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"network=(0\.002|5) .*lr=2e-3.*max_cycles=4"):
        make()


def test_recipes__serve_all_that_their_stages_need() -> None:
    for recipe in (nine_steps(), nine_steps(head_epochs=2), fine_tune(5), fine_tune(5, head_epochs=2)):
        (conductor, *_) = recipe
        assert isinstance(conductor, GradualUnfreeze)
        needed = {callback for stage in conductor.stages for callback in stage.needs.values()}
        assert needed <= {type(callback).__name__ for callback in recipe}


# --- on modules as people have them ----------------------------------------------------------------------------------


class ScenesTask(pl.LightningModule):
    """As torchgeo's tasks: batches that are dicts, `monitor` and `mode`, a scheduler of its own."""

    monitor, mode = "val_loss", "min"

    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model("test_resnet", num_classes=3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch["image"]), batch["label"])

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch["image"]), batch["label"]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": self.monitor}}


class Scenes(Photos):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"image": self.images[index], "label": self.labels[index]}


@pytest.mark.filterwarnings("ignore:stage ")  # no signal in noise
def test_nine_steps__run_on_a_task_with_a_scheduler_of_its_own_that_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    conductor, *others = nine_steps(max_cycles=1)
    assert isinstance(conductor, GradualUnfreeze)
    with pytest.raises(MisconfigurationException, match=r"ReduceLROnPlateau.*scheduler="):
        quiet_trainer([conductor, *others]).fit(ScenesTask(), DataLoader(Scenes(), 4), DataLoader(Scenes(), 4))
    conductor, *others = nine_steps(max_cycles=1)
    conductor = GradualUnfreeze(conductor.stages, train_bn=False, scheduler="replace")  # type: ignore[attr-defined]
    trainer = quiet_trainer([conductor, *others])
    trainer.fit(ScenesTask(), DataLoader(Scenes(), 4), DataLoader(Scenes(), 4))
    assert trainer.current_epoch >= 1 + 2 + 3
    assert "val_acc_tta" in trainer.callback_metrics


@pytest.mark.filterwarnings("ignore:stage ")
def test_nine_steps__run_on_a_hugging_face_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    trainer = quiet_trainer(nine_steps(max_cycles=1))
    trainer.fit(HuggingFaceModule(build("ViT")), photo_loader(), photo_loader())
    # plain is what the module logged itself: the logits were found in `outputs.logits`
    assert trainer.callback_metrics["val_acc_plain"] == trainer.callback_metrics["val_acc"]
    assert "val_acc_tta" in trainer.callback_metrics


def test_fine_tune__solves_the_head_and_trains_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = TransferClassifier("digits_resnet", num_classes=5, pretrained=True)
    trainer = quiet_trainer(fine_tune(2, lr=1e-3))
    trainer.fit(module, datamodule=DigitsData(batch_size=10, train_per_class=20))
    assert trainer.current_epoch == 1 + 2
    assert trainer.callback_metrics["val_acc"] > 0.75  # by chance 0.2
