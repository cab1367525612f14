"""The blocks of code and the names in the documentation are those of the package; `mkdocs build` does the rest."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import lightning_unfreeze
from lightning_unfreeze.cli import main
from lightning_unfreeze.study.runner import Study

REPO = Path(__file__).parents[1]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))]
PUBLIC = {name: getattr(lightning_unfreeze, name) for name in lightning_unfreeze.__all__}
SOURCE = "\n".join(
    node.value
    for path in sorted((REPO / "lightning_unfreeze").rglob("*.py"))
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
)


def blocks(language: str) -> list[Any]:
    return [
        pytest.param(text, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, text in enumerate(re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S))
    ]


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S))


def names_of(tree: ast.AST) -> dict[str, Any]:
    """What a block imports from the package, looked up: an error for a name that is not there."""
    return {
        alias.name: getattr(importlib.import_module(node.module), alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lightning_unfreeze")
        for alias in node.names
    }


def unknown_arguments(tree: ast.AST, names: dict[str, Any]) -> list[str]:
    """Arguments in calls of `names` that those do not take."""
    return [
        f"{node.func.id}({keyword.arg}=...)"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
        for keyword in node.keywords
        if keyword.arg not in inspect.signature(names[node.func.id]).parameters
    ]


@pytest.mark.parametrize("text", blocks("python"))
def test_python__imports_what_there_is_and_passes_what_is_taken(text: str) -> None:
    tree = ast.parse(text)
    assert unknown_arguments(tree, names_of(tree)) == []


def test_python__the_check_can_fail() -> None:
    tree = ast.parse("from lightning_unfreeze import Stage\nStage('a', epocs=1)")
    assert unknown_arguments(tree, names_of(tree)) == ["Stage(epocs=...)"]
    with pytest.raises(AttributeError):
        names_of(ast.parse("from lightning_unfreeze import Phase"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_inline_code__calls_take_these_arguments(page: Path) -> None:
    for code in inline_code(page):
        try:
            tree = ast.parse(code)
        except SyntaxError:
            continue
        assert unknown_arguments(tree, PUBLIC) == [], code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_refusals__are_quoted_as_they_are_raised(page: Path) -> None:
    """In tables with a column "message" or "reason", what is in code stands in the source, "..." for a value."""
    for table in re.findall(
        r"^ *\|[^\n]*\| (?:message|reason in the warning) \|\n *\|[-|]+\|\n((?: *\|.*\n)+)", page.read_text(), re.M
    ):
        for row in table.splitlines():
            for message in re.findall(r"`([^`]+)`", row.rsplit(" | ", 1)[-1]):
                for part in message.split("..."):
                    assert part.strip(" ,:;'[]") in SOURCE, message


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml__is_a_config_that_the_command_line_takes(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load(text)
    if "trainer" not in config:
        assert config.keys() - {"model", "data"} <= inspect.signature(Study).parameters.keys()
        return
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(path), "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err
    printed = yaml.safe_load(capsys.readouterr().out)
    assert len(printed["trainer"]["callbacks"]) == len(config["trainer"]["callbacks"])
