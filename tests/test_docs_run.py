"""What the documentation shows runs as it stands: its Python on the digits, its commands on a folder of photos."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm

from lightning_unfreeze import DigitsData, TransferClassifier
from lightning_unfreeze.cli import main, rank
from tests.study.test_runner import fake_study
from tests.test_cli import photos
from tests.test_docs import PAGES, REPO

ELSEWHERE = {"clusters": "needs a cluster", "study": "takes minutes; notebooks/03 runs one"}
WITHOUT_WEIGHTS = ["--model.backbone=test_resnet", "--model.pretrained=false"]
TINY = [*WITHOUT_WEIGHTS, "--data.image_size_px=32", "--data.num_workers=0", "--trainer.enable_progress_bar=false"]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands() -> list[str]:
    """Lines that call the command, each once; what stands behind it in a comment, or `&`, is taken off."""
    text = "\n".join(block for page in PAGES for block in blocks(page, "bash")).replace("\\\n", " ")
    lines = (shlex.join(shlex.split(line.rstrip(" &"), comments=True)) for line in text.splitlines())
    return sorted({line for line in lines if line.startswith("lightning-unfreeze ")})


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a fit on photos has been, with the files that the pages name."""
    folder = tmp_path_factory.mktemp("workplace")
    photos(folder / "photos")
    (folder / "more_photos").mkdir()
    for name in ("photo.jpg", "more_photos/another.jpg"):
        shutil.copy(folder / "photos" / "val" / "ants" / "0.jpg", folder / name)
    before = Path.cwd()
    os.chdir(folder)
    try:
        fit = ["fit", "--config", "configs/fine_tune.yaml", "--data.root=photos", "--model.num_classes=2"]
        main([*fit, *TINY, "--stage.full.cycle_len", "1", "--stage.full.lr", "1e-3"])
    finally:
        os.chdir(before)
    version = folder / "runs" / "fine_tune" / "version_0"
    runs = "runs/nine_steps/version_0/checkpoints"
    for name in ("last.ckpt", f"{runs}/last.ckpt", f"{runs}/best.ckpt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(version / "checkpoints" / "last.ckpt", folder / name)
    for name in ("own.yaml", "runs/nine_steps/version_0/config.yaml"):
        shutil.copy(version / "config.yaml", folder / name)
    return folder


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks(page, "python") and page.stem not in ELSEWHERE],
    ids=lambda page: page.stem,
)
def test_python__runs_as_it_stands(page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page one after the other, in short epochs; what a page calls yours is there."""
    monkeypatch.chdir(workplace)
    for split in ("TRAIN", "VAL", "TEST", "PREDICT"):  # Lightning's defaults, for a Trainer that is not told otherwise
        monkeypatch.setenv(f"PL_TRAINER_LIMIT_{split}_BATCHES", "2")
    pl.seed_everything(0)
    names: dict[str, Any] = {
        "__name__": "__main__",
        "your_module": TransferClassifier("digits_resnet", num_classes=5),
        "your_datamodule": DigitsData(train_per_class=20, batch_size=10),
    }
    for text in blocks(page, "python"):
        exec(compile(text, str(page), "exec"), names)


@pytest.mark.parametrize("line", [line for line in commands() if not re.search(r"unfreeze (study|rank) ", line)])
def test_command__is_taken(
    line: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands that read a checkpoint run; of the others the options are read, and the config is printed."""
    monkeypatch.chdir(workplace)
    command, *options = shlex.split(line)[1:]
    if command == "explain" or command == "export" or (command == "predict" and "--config" not in options):
        main([command, *options])
        return
    if ".help" in line:
        with pytest.raises(SystemExit) as stop:
            main([command, *options])
    else:
        with pytest.raises(SystemExit) as stop:  # `plan` and `lr-find` take what `fit` takes
            main(["fit" if command in ("plan", "lr-find") else command, *options, "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err
    assert capsys.readouterr().out.strip()


@pytest.fixture
def studies(workplace: Path) -> Path:
    """The config that the page of the study shows, finished studies, and one of them in two parts."""
    (workplace / "study.yaml").write_text(blocks(REPO / "docs" / "study.md", "yaml")[0])
    if (workplace / "runs" / "study").exists():
        return workplace
    for name in ("pets", "cars", "study"):
        fake_study(workplace / "runs" / name, name, {"skip34@flops": [0.1, -0.1, 0.2, -0.2, 0.0, 0.1]})
    lines = (workplace / "runs" / "study" / "runs.jsonl").read_text().splitlines(keepends=True)
    for place in (0, 1):
        shard = shutil.copytree(workplace / "runs" / "study", workplace / f"shard-{place + 1}")
        (shard / "runs.jsonl").write_text("".join(lines[place::2]))
    return workplace


@pytest.mark.parametrize("line", [line for line in commands() if " study " in line])
def test_study_command__is_taken(
    line: str, studies: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`report` and `merge` run, `plan` of the page's own config too; of the others the options are read."""
    monkeypatch.chdir(studies)
    command, *options = shlex.split(line)[2:]
    if command in ("report", "merge"):
        # what the shell makes of `shard-*/`
        paths = [path for word in options for path in (sorted(map(str, Path().glob(word))) or [word])]
        main(["study", command, *paths])  # and exits with 0: equal within the margin
        said = capsys.readouterr().out
        assert ("2 data sets" if "cars" in line else "Verdict: ") in said
        return
    if [command, *options] == ["plan", "--config", "study.yaml"]:
        main(["study", "plan", *options])
        assert "skip34@flops (primary)" in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as stop:
        main(["study", command, *options, "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err
    assert "seeds: " in capsys.readouterr().out


@pytest.mark.parametrize("line", [line for line in commands() if " rank " in line])
def test_rank_command__is_taken(
    line: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but the backbones themselves, whose weights would have to be downloaded."""

    def small(backbone: str, num_classes: int, pretrained: bool | str) -> TransferClassifier:
        assert timm.is_model(backbone) and pretrained
        return TransferClassifier("test_resnet", num_classes, pretrained=False)

    monkeypatch.chdir(workplace)
    monkeypatch.setattr(rank, "TransferClassifier", small)
    main(["rank", *shlex.split(line)[2:], "--image_size_px=32"])
    assert "resnet18" in capsys.readouterr().out


def test_commands__are_found() -> None:
    assert {line.split()[1] for line in commands()} >= {"fit", "plan", "predict", "explain", "export", "rank", "study"}
