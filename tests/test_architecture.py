"""The import arrows of the package, and what no module does."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lightning_unfreeze

PACKAGE = Path(__file__).parents[1] / "lightning_unfreeze"
FILES = sorted(PACKAGE.rglob("*.py"))
OURS = "lightning_unfreeze"


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join([OURS, *(part for part in parts if part != "__init__")])


DOORS = {OURS, f"{OURS}.study"}  # they export what others define
MODULES = {name_of(path): path for path in FILES}


def imports_of(path: Path) -> set[str]:
    """Full names of what a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = name_of(path).split(".")
                keep = len(parents) - node.level + (path.name == "__init__.py")
                base = ".".join([*parents[:keep], *([base] if base else [])])
            found.add(base)
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def ours_in(path: Path) -> set[str]:
    """Our modules that a file imports (a name inside a module counts as the module)."""
    return {name for name in imports_of(path) if name in MODULES and name not in DOORS}


def outer(path: Path) -> set[str]:
    """Top-level packages that a file imports, but for ours and the standard library."""
    tops = {name.split(".")[0] for name in imports_of(path)}
    return tops - set(sys.stdlib_module_names) - {OURS}


def at(name: str) -> Path:
    return MODULES[f"{OURS}.{name}"]


def test_imports__are_read_as_written(tmp_path: Path) -> None:
    assert imports_of(at("callbacks.unfreeze")) >= {"torch", "lightning.pytorch", f"{OURS}.stages.plan.Stage"}
    assert f"{OURS}.callbacks.base" in ours_in(at("callbacks.unfreeze"))


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("stages.cycles", set()),
        ("stages.plan", set()),
        ("stages.schedules", {"numpy"}),
        ("study.judge.statistics", {"numpy", "scipy", "statsmodels", "pandas"}),
        ("seeding", {"numpy", "torch"}),
    ],
)
def test_pure_modules__import_nothing_of_ours_and_little_else(name: str, allowed: set[str]) -> None:
    assert ours_in(at(name)) <= {f"{OURS}.stages.cycles"}
    assert outer(at(name)) <= allowed


# what a room may import of the others; the way is downhill only, as CONTRIBUTING draws it
ALLOWED = {
    "__main__": {"cli"},
    "cli": {"study", "recipe", "module", "callbacks", "stages", "data", "reporting"},
    "study": {
        "recipe",
        "callbacks",
        "tta",
        "inside_lightning",
        "features",
        "module",
        "stages",
        "data",
        "layers",
        "reporting",
        "seeding",
    },
    "recipe": {"callbacks", "inside_lightning", "features", "stages", "layers", "reporting"},
    "callbacks": {"tta", "inside_lightning", "features", "stages", "data", "layers", "reporting", "seeding"},
    "tta": {"inside_lightning", "data", "seeding"},
    "inside_lightning": {"features", "layers", "reporting", "seeding"},
    "module": {"data", "layers", "seeding"},
    "features": {"data", "layers", "seeding"},
    "stages": {"layers", "reporting"},
    "data": {"seeding"},
    "layers": set(),
    "reporting": set(),
    "seeding": set(),
}


def room_of(name: str) -> str:
    return name.split(".")[1]


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_rooms__import_what_the_table_says_and_nothing_else(room: str) -> None:
    arrows = {
        room_of(other)
        for name, path in MODULES.items()
        if name != OURS and room_of(name) == room
        for other in ours_in(path)
        if other != OURS
    }
    assert arrows - {room} == ALLOWED[room]


def test_rooms__are_all_in_the_table() -> None:
    assert {room_of(name) for name in MODULES if name != OURS} == set(ALLOWED)


def test_contributing__draws_every_room_above_what_it_may_import() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    floors = text.split("```text\n")[1].split("```")[0].splitlines()
    floor_of = {
        word: number for number, floor in enumerate(floors) for word in re.split(r" {4,}", floor)[0].split()
    } | {"__main__": -1}
    assert set(floor_of) == set(ALLOWED)
    upward = {f"{room} -> {other}" for room in ALLOWED for other in ALLOWED[room] if floor_of[other] <= floor_of[room]}
    assert upward == set()


@pytest.mark.parametrize("path", sorted((PACKAGE / "callbacks").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_callbacks__import_no_sibling(path: Path) -> None:
    siblings = {name for name in ours_in(path) if name.startswith(f"{OURS}.callbacks.")}
    assert siblings <= {f"{OURS}.callbacks.base"}


def test_imports__have_no_cycle() -> None:
    arrows = {name: ours_in(path) - {name} for name, path in MODULES.items()}
    done: set[str] = set()
    while len(done) < len(arrows):
        free = {name for name, to in arrows.items() if name not in done and to <= done | {name}}
        assert free, f"a cycle among {sorted(set(arrows) - done)}"
        done |= free


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_package__never_prints_nor_validates_by_assert(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Assert), where
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", where


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined_in(tree: ast.AST) -> set[str]:
    """Names of functions and classes, and of what is set on `self` or in a module."""
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return names | {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }


def lightnings_private_names() -> set[str]:
    """Of its attributes, methods, classes; without those that torch or we have, too."""
    (folder,) = importlib.util.find_spec("lightning.pytorch").submodule_search_locations
    fabric = Path(folder).parent / "fabric"
    theirs = set().union(
        *(defined_in(ast.parse(path.read_text())) for root in (Path(folder), fabric) for path in root.rglob("*.py"))
    )
    ours = set().union(
        *(defined_in(ast.parse(path.read_text())) for path in FILES if "inside_lightning" not in path.parts)
    )
    torchs = {*dir(torch.Tensor), *vars(torch.nn.Module()), *dir(torch.utils.data.DataLoader)}
    return {name for name in theirs if private(name)} - ours - torchs


def touched_in(path: Path) -> Iterator[tuple[int, str]]:
    """Names that are imported or looked up: `thing.name`, `getattr(thing, "name")`, `vars(thing)["name"]`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("lightning.", "pytorch_lightning")):
            yield from ((node.lineno, name) for alias in node.names for name in [*node.module.split("."), alias.name])
        elif isinstance(node, ast.Call | ast.Subscript):
            inside = node.args[1:2] if isinstance(node, ast.Call) else [node.slice]
            yield from ((node.lineno, str(each.value)) for each in inside if isinstance(each, ast.Constant))


def test_package__touches_lightnings_private_names_in_one_room_alone() -> None:
    theirs = lightnings_private_names()
    assert {"_data_source", "_combined_loader", "_DataLoaderSource", "_trainer", "_batch_sampler"} <= theirs
    touches = {path: sorted(set(touched_in(path))) for path in FILES}
    found = {
        f"{path.relative_to(PACKAGE)}:{line} {name}"
        for path, names in touches.items()
        for line, name in names
        if name in theirs and "inside_lightning" not in path.parts
    }
    assert found == set()
    room = {name for path, names in touches.items() if "inside_lightning" in path.parts for _, name in names}
    assert room & theirs >= {"_data_source", "_combined_loader", "_DataLoaderSource", "_batch_sampler"}


def test_package__has_no_drawer_for_odds_and_ends() -> None:
    assert {path.stem for path in FILES} & {"utils", "helpers", "common", "misc"} == set()


def test_package__uses_no_global_state_of_matplotlib() -> None:
    for path in FILES:
        assert "matplotlib.pyplot" not in imports_of(path), path


def loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_door__loads_nothing_heavy_until_a_name_is_used() -> None:
    loaded = loaded_after("import lightning_unfreeze")
    assert loaded & {"lightning", "torch", "timm", "sklearn", "scipy", "pandas", "matplotlib"} == set()
    assert {"sklearn", "pandas"} & loaded_after("from lightning_unfreeze import *") == set()


def test_door__has_every_name_and_says_which_there_are() -> None:
    assert {getattr(lightning_unfreeze, name).__name__ for name in lightning_unfreeze.__all__} == set(
        lightning_unfreeze.__all__
    )
    assert set(lightning_unfreeze.__all__) <= set(dir(lightning_unfreeze))
    with pytest.raises(AttributeError, match="no attribute 'GradualUnfreez'; it has BestWeights"):
        _ = lightning_unfreeze.GradualUnfreez


def test_features__load_no_lightning() -> None:
    """The feature store serves people with a plain PyTorch loop or another trainer, too."""
    loaded = loaded_after("import lightning_unfreeze.features, lightning_unfreeze.features.fill")
    assert "torch" in loaded
    assert loaded & {"lightning", "torchmetrics", "pytorch_lightning", "matplotlib", "sklearn"} == set()


def test_features__import_torch_and_little_else() -> None:
    found = set().union(
        *(outer(path) for name, path in MODULES.items() if name != OURS and room_of(name) == "features")
    )
    assert found == {"filelock", "numpy", "torch"}


def test_version__has_one_owner_in_the_package_that_says_what_the_project_says() -> None:
    project = (PACKAGE.parent / "pyproject.toml").read_text()
    assert f'\nversion = "{lightning_unfreeze.__version__}"\n' in project
    assert not [
        path for path in FILES if 'version("lightning-unfreeze")' in path.read_text()
    ]  # it may not be installed
