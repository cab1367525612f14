"""The command line: every config runs, every mistake is one line that says what to do."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import timm
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image

from lightning_unfreeze import cli
from lightning_unfreeze.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*smaller than the logging interval", "ignore:.*tensorboardX.*", "ignore:Checkpoint directory .* exists"
)


def photos(folder: Path, classes: tuple[str, ...] = ("ants", "bees"), num: int = 6) -> Path:
    """A folder of small JPEGs: `train/` and `val/`, one shade per class."""
    for split in ("train", "val"):
        for label, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for i in range(num if split == "train" else 2):
                shade = (60 + 90 * label, 20 * i, 100)
                Image.new("RGB", (40, 36), shade).save(folder / split / name / f"{i}.jpg")
    return folder


def own_photos_arguments(folder: Path) -> list[str]:
    return [
        f"--data.root={folder}",
        "--data.batch_size=4",
        "--data.num_workers=0",
        "--data.image_size_px=32",
        "--model.num_classes=2",
        "--model.backbone=test_resnet",
        "--model.pretrained=false",
    ]


TINY = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs__name_backbones_that_have_weights(path: Path) -> None:
    options = (yaml.safe_load(path.read_text()).get("model") or {}).get("init_args", {})
    if options.get("pretrained", True) is True and "backbone" in options:
        assert options["backbone"] == "digits_resnet" or timm.models.is_model_pretrained(options["backbone"])


# all configs but those of the quickstart and the study; one of them draws its pictures
ALL_CONFIGS = [
    pytest.param(path.stem, marks=pytest.mark.pictures if path.stem == "nine_steps" else [])
    for path in sorted(CONFIGS.glob("*.yaml"))
    if not path.stem.startswith(("quickstart", "study"))
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*no signal:UserWarning", "ignore:.*without stored features:UserWarning")
@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_config__is_complete_and_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "--config", str(CONFIGS / f"{name}.yaml"), *own_photos_arguments(photos(tmp_path / "photos"))]
    if name == "ddp":  # processes are `test_distributed`'s matter
        arguments += ["--trainer.devices=1", "--trainer.strategy=auto"]
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    callbacks = config["trainer"]["callbacks"]
    stages = callbacks[0]["init_args"]["stages"]
    for stage in stages:
        if "cycle_len" in stage:
            stage["num_cycles"], stage["cycle_len"] = (2, 1) if "until" in stage else (1, 1)
        elif not stage.get("solve"):
            stage["epochs"] = 1
    for callback in callbacks:
        if callback["class_path"] == "LRFinderPerStage":
            callback["init_args"] = {"num_steps": 20}
    config["seed_everything"] = 0
    shorter = tmp_path / "shorter.yaml"
    shorter.write_text(yaml.safe_dump(config))
    arguments[2] = str(shorter)
    main([*arguments, *TINY])
    (table,) = Path("runs").rglob("stages.csv")
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["stage"] for row in rows] == [stage["name"] for stage in stages]
    assert (table.parent / "stages.png").stat().st_size > (5000 if name == "nine_steps" else 0)
    # the last one, also where no epoch after the first was better
    last = torch.load(table.parent / "last.ckpt", weights_only=False)
    assert last["epoch"] + 1 == sum(int(row["epochs"]) for row in rows)


@pytest.mark.parametrize("option", [["--config", "configs/quickstart.yaml"], ["--config=configs/quickstart.yaml"]])
def test_configs__of_the_package_are_found_from_any_folder(
    option: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["fit", *option, "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["default_root_dir"] == "runs/quickstart"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text("trainer: {default_root_dir: mine}")
    with pytest.raises(SystemExit):
        main(["fit", *option, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["default_root_dir"] == "mine"


QUICK = ["--config", str(CONFIGS / "quickstart.yaml"), "--trainer.logger=false", "--trainer.enable_checkpointing=false"]


def stages_argument(*stages: dict[str, object]) -> list[str]:
    return [f"--trainer.callbacks.init_args.stages={yaml.safe_dump(list(stages), default_flow_style=True, width=9999)}"]


def plan_config(folder: Path, *stages: dict[str, object], callbacks: list[object] | None = None) -> list[str]:
    """A config with this plan alone, on the digits."""
    config = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    config["trainer"]["callbacks"] = [
        {"class_path": "GradualUnfreeze", "init_args": {"stages": list(stages)}},
        *(callbacks or []),
    ]
    config["trainer"] |= {"logger": False, "enable_checkpointing": False}
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["--config", str(path)]


HEAD = {"name": "head", "train": "head", "epochs": 1}
BAD_PLANS: dict[str, tuple[list[dict[str, object]], str]] = {
    "unknown layer group": ([{**HEAD, "train": ["layer9"]}], r"layer9.*layer4.*The layer groups"),
    "more groups than there are": ([{**HEAD, "train": 9}], r"train=9 layer groups, there are 6"),
    "unknown word": ([{**HEAD, "train": "top"}], r"top"),
    "lr_mult 0": ([{**HEAD, "lr_mult": 0}], r"lr_mult=0.* \(0, 1\]"),
    "lr_mult of another length": ([{**HEAD, "lr_mult": [0.1, 1]}], r"lr_mult has 2 factors, and there are 6"),
    "negative rate": ([{**HEAD, "lr": -1}], r"lr=-1.*above 0"),
    "epochs against cycles": (
        [{**HEAD, "epochs": 4, "cycle_len": 1, "num_cycles": 3}],
        r"epochs=4, but 3 cycles.* 3 ep",
    ),
    "no length": ([{"name": "head", "train": "head"}], r"no length.*epochs"),
    "a name twice": ([HEAD, HEAD], r"names have to differ.*head"),
    "typo in an option": ([{**HEAD, "epocs": 1}], r"epocs"),
    "no plan": ([], r"at least one Stage"),
    "finder without the callback": ([{**HEAD, "lr": "find"}], r"lr='find'.*LRFinderPerStage"),
    "cycles without the callback": ([{"name": "full", "cycle_len": 1}], r"cycle_len=1.*CosineRestarts"),
    "features without the callback": ([{**HEAD, "precompute": True}], r"precompute=True.*PrecomputeFeatures"),
    "features of everything": ([{"name": "full", "epochs": 1, "precompute": True}], r"freezes nothing"),
    "overfit without cycles": ([{**HEAD, "until": "overfit"}], r"cycle ends.*cycle_len"),
}


@pytest.mark.parametrize("mistake", sorted(BAD_PLANS))
def test_error__of_a_plan_is_one_line(mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages, says = BAD_PLANS[mistake]
    assert_one_line(["fit", *plan_config(tmp_path, *stages)], says, capsys)


BAD_ARGUMENTS: dict[str, tuple[list[str], str]] = {
    "max_epochs": (["--trainer.max_epochs=3"], r"max_epochs=3.*stages last 20 epochs"),
    "unknown backbone": (["--model.backbone=resnet81"], r"resnet81.*near it are.*resnet"),
    "classes": (["--model.num_classes=7"], r"num_classes=7, the data has 5"),
    "weights": (["--model.pretrained=nowhere.safetensors"], r"nowhere.safetensors.*no such file"),
    "scheduler": (["--lr_scheduler=StepLR"], r"lr_scheduler"),
    "augmentation": (["--data.augmentation=upside_down"], r"upside_down"),
    "unknown option": (["--trainer.epochs=3"], r"epochs"),
}


@pytest.mark.parametrize("mistake", sorted(BAD_ARGUMENTS))
def test_error__of_an_argument_is_one_line(mistake: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, says = BAD_ARGUMENTS[mistake]
    assert_one_line(["fit", *QUICK, *arguments], says, capsys)


def remove_class(folder: Path) -> None:
    for split in ("train", "val"):
        for file in (folder / split / "bees").iterdir():
            file.unlink()
        (folder / split / "bees").rmdir()


def empty_class(folder: Path) -> None:
    for file in (folder / "train" / "bees").iterdir():
        file.unlink()


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "not there": (lambda folder: folder.rename(folder.with_name("elsewhere")), r"no such folder"),
    "one class": (remove_class, r"holds 1 class"),
    "empty class": (empty_class, r"bees.*without images|without images.*bees"),
    "corrupt image": (
        lambda folder: (folder / "train" / "ants" / "0.jpg").write_bytes(b"no image"),
        r"0\.jpg.*corrupt",
    ),
    "class in val only": (lambda folder: (folder / "val" / "bees").rename(folder / "val" / "wasps"), r"wasps"),
}


@pytest.mark.parametrize("mistake", sorted(BAD_FOLDERS))
def test_error__of_a_folder_is_one_line(mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, says = BAD_FOLDERS[mistake]
    spoil(photos(tmp_path / "photos"))
    quiet = [
        "--trainer.logger=false",
        "--trainer.enable_checkpointing=false",
        "--trainer.default_root_dir",
        str(tmp_path),
    ]
    config = yaml.safe_load((CONFIGS / "full_finetune.yaml").read_text())
    config["trainer"]["callbacks"] = config["trainer"]["callbacks"][:-2]  # no checkpoints, so no ModelCheckpoint
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    arguments = ["fit", "--config", str(tmp_path / "config.yaml"), *own_photos_arguments(tmp_path / "photos"), *quiet]
    assert_one_line(arguments, says, capsys)


def assert_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*arguments, *TINY])
    assert stop.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert re.search(says, errors[0]), errors[0]
    assert len(errors[0]) < 600


@pytest.mark.parametrize(
    ("text", "passes"), [("`isinstance(treespec, LeafSpec)` is deprecated, use", True), ("it is deprecated", False)]
)
def test_main__is_silent_on_what_no_user_can_mend(text: str, passes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli._COMMANDS, "warn", "warn")
    command = SimpleNamespace(main=lambda _: warnings.warn(text, FutureWarning, stacklevel=2))
    monkeypatch.setitem(sys.modules, "lightning_unfreeze.cli.warn", command)
    with warnings.catch_warnings(), nullcontext() if passes else pytest.raises(FutureWarning):
        warnings.simplefilter("error")
        main(["warn"])


def test_plan__shows_each_stage_and_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["plan", "--config", str(CONFIGS / "quickstart.yaml")])
    shown = capsys.readouterr().out
    for stage in ("head_on_features", "head_augmented", "full"):
        assert stage in shown
    assert "325" in shown  # 64 features x 5 classes + 5
    assert "together 20 epochs" in shown and "range tests of at most" in shown
    assert not list(tmp_path.rglob("*"))


def test_plan__counts_flops_and_parameters_as_arithmetic_does(tmp_path: Path) -> None:
    from lightning_unfreeze import DigitsData, GradualUnfreeze, LRFinderPerStage, Stage, TransferClassifier
    from lightning_unfreeze.recipe.costs import plan_costs
    from tests.zoo import quiet_trainer

    stages = [Stage("head", train="head", epochs=2), Stage("full", epochs=3)]
    module = TransferClassifier("digits_resnet", num_classes=5, pretrained=False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    head, full = plan_costs(quiet_trainer([GradualUnfreeze(stages)]), module, DigitsData(batch_size=10))
    assert (head.range_test_seconds, full.range_test_seconds) == (0, 0)
    found = [Stage("head", train="head", epochs=2), Stage("full", epochs=3, lr="find")]
    callbacks = [GradualUnfreeze(found), LRFinderPerStage(num_steps=40)]
    _, tested = plan_costs(quiet_trainer(callbacks), module, DigitsData(batch_size=10))
    # an epoch has 5 batches of 10 images, the test as many steps as 8 epochs
    assert tested.range_test_seconds == pytest.approx(8 * tested.epoch_seconds)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert (head.parameters, full.parameters) == (325, sum(p.numel() for p in module.parameters()))
    assert (head.images, full.images) == (100, 150)
    # a full step is a forward and twice that backward, less the gradient of the first layer's input
    forward_flops = head.flops / 2
    assert 2.5 < full.flops / 3 / forward_flops < 3.0


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_plan__counts_frozen_modules_that_a_container_only_holds(tmp_path: Path) -> None:
    """A ModuleList is never called: its FLOPs are those of its modules, once for a stored stage."""
    from lightning_unfreeze import GradualUnfreeze, PrecomputeFeatures, Stage
    from lightning_unfreeze.recipe.costs import plan_costs
    from tests.zoo import quiet_trainer

    class Listed(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = torch.nn.ModuleList([torch.nn.Linear(16, 16), torch.nn.Linear(16, 32)])
            self.head = torch.nn.Linear(32, 4)

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            x = batch[0]
            for block in self.backbone:
                x = block(x)
            return torch.nn.functional.cross_entropy(self.head(x), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> object:
            images = torch.utils.data.TensorDataset(torch.randn(20, 16), torch.arange(20) % 4)
            return torch.utils.data.DataLoader(images, batch_size=10)

    stage = Stage("head", train="head", epochs=3, precompute=True)
    with pytest.warns(UserWarning, match=r"'head' will read its images as usual.*no floating point or uint8"):
        (row,) = plan_costs(quiet_trainer([GradualUnfreeze([stage]), PrecomputeFeatures()]), Listed(), Data())
    backbone, head = 2 * 20 * (16 * 16 + 16 * 32), 2 * 20 * 32 * 4
    assert row.flops == pytest.approx(backbone + 3 * 2 * head)  # the head: forward, and its weight's gradient


def test_plan__costs_what_the_limit_on_batches_lets_through(tmp_path: Path) -> None:
    from lightning_unfreeze import DigitsData, GradualUnfreeze, Stage, TransferClassifier
    from lightning_unfreeze.recipe.costs import plan_costs
    from tests.zoo import quiet_trainer

    module = TransferClassifier("digits_resnet", num_classes=5, pretrained=False)

    def gflops(**limit: float) -> float:
        trainer = quiet_trainer([GradualUnfreeze([Stage("head", train="head", epochs=1)])], **limit)
        return float(plan_costs(trainer, module, DigitsData(batch_size=10))[0].flops)

    assert gflops(limit_train_batches=1) == pytest.approx(gflops() / 5)
    assert gflops(limit_train_batches=1.0) == gflops() > 0


def test_plan__warns_of_rates_too_low_and_says_what_freezing_saves() -> None:
    from lightning_unfreeze import DigitsData, GradualUnfreeze, Stage, TransferClassifier
    from lightning_unfreeze.recipe.costs import plan_costs
    from tests.zoo import quiet_trainer

    module = TransferClassifier("digits_resnet", num_classes=5, pretrained=False)
    # six layer groups: 1/1024, 1/256, 1/64, 1/16, 1/4, 1 of the rate; and 1/32, 1/16, 1/8, 1/4, 1/2, 1
    stages = [
        Stage("steep", epochs=1, lr=0.1, lr_span=4.0**-5),
        Stage("even", epochs=1, lr=0.1, lr_span=2.0**-5),
        Stage("head", train="head", epochs=1),
    ]
    steep, even, head = plan_costs(quiet_trainer([GradualUnfreeze(stages)]), module, DigitsData(batch_size=10))
    assert steep.rates["stem"] == pytest.approx(0.1 / 1024)
    assert list(steep.savings) == [0.01, 0.02, 0.1, 0.5]  # 2, 3, 4 and 5 groups frozen
    assert list(even.savings) == [0.05, 0.1, 0.2, 0.5]  # 1, 2, 3 and 4; the half of a rate is not below a half
    assert all(0 <= share < 1 for share in steep.savings.values())
    assert "stem, layer1 get less than 0.01" in steep.advice()[0]
    assert len(even.advice()) == 1 and "freeze_below=0.05" in even.advice()[0]
    assert head.advice() == []


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_plan__of_data_without_a_length_is_refused() -> None:
    from lightning_unfreeze import GradualUnfreeze, Stage
    from lightning_unfreeze.recipe.costs import plan_costs
    from tests.zoo import UserModule, quiet_trainer

    class Endless(torch.utils.data.IterableDataset[object]):
        def __iter__(self) -> object:  # type: ignore[override]
            while True:
                yield torch.zeros(3, 12, 12), 0

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> object:
            return torch.utils.data.DataLoader(Endless(), batch_size=2)

    trainer = quiet_trainer([GradualUnfreeze([Stage("full", epochs=1)])])
    with pytest.raises(MisconfigurationException, match=r"no length.*limit_train_batches"):
        plan_costs(trainer, UserModule(), Data())


def test_help__names_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    shown = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "plan", "lr-find", "study", "--model.help"):
        assert command in shown
    with pytest.raises(SystemExit) as exit_info:
        main(["plann"])
    assert exit_info.value.code == 2
    assert "'plann' is no command" in (said := capsys.readouterr().err) and "lr-find" in said and said.count("\n") == 1


def test_error__of_a_worker_is_its_own_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "Caught OSError in DataLoader worker process 1.\nOriginal Traceback (...):\n  File x\nOSError: a.jpg"

    def fail(arguments: list[str]) -> None:
        raise OSError(text)

    monkeypatch.setattr("lightning_unfreeze.cli.plan.main", fail)
    with pytest.raises(SystemExit):
        main(["plan"])
    said = capsys.readouterr().err
    assert said.startswith("error: a.jpg (OSError at ") and said.count("\n") == 1


def test_error__of_a_missing_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lightning_unfreeze.study.cli", None)
    with pytest.raises(SystemExit):
        main(["study", "plan"])
    assert "lightning-unfreeze[study]" in capsys.readouterr().err


def test_error__at_the_start_leaves_no_run_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos")
    line = ["fit", "--config", str(CONFIGS / "fine_tune.yaml"), *own_photos_arguments(tmp_path / "photos"), *TINY]
    assert_one_line([*line, "--data.root=nowhere"], r"root='nowhere': no such folder", capsys)
    assert list((tmp_path / "runs" / "fine_tune").iterdir()) == []
    (tmp_path / "runs" / "fine_tune" / "version_0").mkdir()  # of an earlier run: not ours to take away
    assert_one_line([*line, "--ckpt_path=nowhere.ckpt"], r"nowhere.ckpt", capsys)  # after all callbacks' `setup`
    assert [folder.name for folder in (tmp_path / "runs" / "fine_tune").iterdir()] == ["version_0"]


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_error__at_the_start_leaves_the_files_of_an_earlier_run(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    earlier = tmp_path / "runs" / "quickstart" / "mine" / "config.yaml"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("of an earlier run")
    line = ["--config", str(CONFIGS / "quickstart.yaml"), "--trainer.logger.init_args.version=mine"]
    assert_one_line([command, *line, "--ckpt_path=nowhere.ckpt"], "nowhere.ckpt", capsys)
    assert [path.name for path in earlier.parent.iterdir()] == ["config.yaml"]
    assert earlier.read_text() == "of an earlier run"


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_error__of_a_head_that_was_never_trained_asks_for_the_checkpoint(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_one_line([command, *QUICK], rf"{command} without --ckpt_path FILE.*at random", capsys)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (["--stage.heads.lr", "0.1"], r"--stage.heads: .*no such stage.*head_on_features, head_augmented, full"),
        (["--stage.full.rate=0.1"], r"--stage.full.rate: .*OPTION one of train, epochs, lr"),
        (["--stage.full.lr=-1"], r"--stage.full.lr: .*lr=-1.*above 0"),
        (["--stage.full.until", "overfitting"], r"--stage.full.until: .*until='overfitting' is not 'overfit'"),
        (["--stage.full.num_cycles=a"], r"--stage.full.num_cycles: .*num_cycles='a'"),
        (
            ["--stage.full.epochs=3", "--stage.full.cycle_len=2"],
            r"--stage.full.epochs, --stage.full.cycle_len: .*leave",
        ),
        (["--stage.full.lr"], r"--stage.full.lr: give a value"),
        (["--stage.full.train=[head"], r"--stage.full.train: '\[head' is no value: brackets"),
        (["--stage.head_on_features.precompute=no way"], r"--stage.head_on_features.precompute: .*precompute='no way'"),
    ],
)
def test_error__of_a_stage_option_is_one_line(option: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_one_line(["fit", *QUICK, *option], says, capsys)


def test_stage_option__changes_one_stage_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def epochs_of(*options: str) -> dict[str, str]:
        main(["plan", *QUICK, *options])
        cells = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines() if "│" in line]
        numbers = {row[0]: [cell for cell in row if cell.isdigit()] for row in cells}
        return {name: found[1] for name, found in numbers.items() if len(found) > 1}  # after the parameters

    before, after = epochs_of(), epochs_of("--stage.head_augmented.num_cycles", "7", "--stage.full.lr=2e-3")
    assert {name for name in before if before[name] != after[name]} == {"head_augmented"}
    assert after["head_augmented"] == "7"


OWN_SCRIPT = """
import lightning.pytorch as pl
from lightning_unfreeze import DigitsData, TransferClassifier
from lightning_unfreeze.cli.parser import StagedCLI

class Mine(TransferClassifier):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__("digits_resnet", num_classes)

if __name__ == "__main__":
    cli = StagedCLI(Mine, DigitsData, run=False)
    print([(stage.name, stage.num_epochs, stage.lr) for stage in cli.trainer.callbacks[0].stages])
"""


def test_stage_option__changes_a_stage_of_a_cli_of_ones_own(tmp_path: Path) -> None:
    """In a process of its own: the line is that of the process, and no warning is allowed."""
    (tmp_path / "own.py").write_text(OWN_SCRIPT)
    stages = [{"name": "head", "train": "head", "epochs": 2, "lr": 0.01}, {"name": "full", "epochs": 3, "lr": 0.003}]
    plan = {"class_path": "lightning_unfreeze.GradualUnfreeze", "init_args": {"stages": stages}}
    options = {"logger": False, "accelerator": "cpu", "max_epochs": -1, "callbacks": [plan]}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"model": {"num_classes": 10}, "trainer": options}))
    line = ["own.py", "--config", "own.yaml", "--stage.full.lr", "1e-4", "--stage.head.epochs=5"]
    ran = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:lightning.pytorch.cli", *line],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CONFIGS.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.strip().splitlines()[-1] == "[('head', 5, 0.01), ('full', 3, 0.0001)]"
    assert "args parameter" not in ran.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a fit on two shades, and the photos it learnt from."""
    folder = tmp_path_factory.mktemp("trained")
    photos(folder / "photos")
    stages = [{"name": "full", "epochs": 6, "lr": 0.003}]
    config = {
        "trainer": {
            "default_root_dir": str(folder),
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(folder), "name": None},
            },
            "callbacks": [{"class_path": "GradualUnfreeze", "init_args": {"stages": stages}}],
        },
        "model": {"class_path": "TransferClassifier"},
        "data": {"class_path": "ImageFolderData"},
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(folder / "own.yaml"), *own_photos_arguments(folder / "photos"), *TINY])
    (path,) = folder.rglob("*.ckpt")
    return path


def test_predict__of_photos_needs_the_checkpoint_alone(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint.parents[2] / "photos" / "val"
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    main(["predict", "--ckpt_path", str(checkpoint), str(folder / "ants" / "0.jpg"), str(folder), str(tmp_path)])
    captured = capsys.readouterr()
    assert captured.out.count("ants ") == 5  # one by itself, four in the folder
    assert "bad.jpg" in captured.err and "5 photos, 1 not readable" in captured.out
    assert "corrupt" not in captured.err, "an option that is of no use here"
    rows = [line for line in captured.out.splitlines() if ".jpg" in line]
    assert [re.search(r"(\w+) [0-9.]+%", line).group(1) == line.split("/")[-2] for line in rows] == [True] * 5  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["photo.jpg"], r"need --ckpt_path FILE"),
        (["--ckpt_path", "nowhere.ckpt", "photo.jpg"], r"no such file"),
        (["--ckpt_path", "nowhere.ckpt", "--data.root=x", "photo.jpg"], r"--data.root=x: .*--ckpt_path alone"),
    ],
)
def test_error__of_photos_on_the_command_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["predict", *arguments])
    assert re.search(says, capsys.readouterr().err)


USERS_CODE = {
    "step": "first, second = [1, 2, 3]",
    "inside a library": "torch.tensor([1]).mean() if batch is None else np.zeros((2, 3)).reshape(4)",
    "loop": "next(iter([])) if batch is None else int('four')",
}


@pytest.mark.parametrize("mistake", sorted(USERS_CODE))
def test_error__of_the_users_own_code_names_his_line(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"mine_{sorted(USERS_CODE).index(mistake)}"
    (tmp_path / f"{name}.py").write_text(
        "import numpy as np\nimport torch\nfrom lightning_unfreeze import TransferClassifier\n\n"
        "class Mine(TransferClassifier):\n    def training_step(self, batch, batch_idx):\n"
        f"        {USERS_CODE[mistake]}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ["--model", f"{name}.Mine", "--model.backbone=digits_resnet", "--model.num_classes=5"]
    plain = ["--trainer.callbacks=[]", "--trainer.max_epochs=1"]
    assert_one_line(
        ["fit", *QUICK, *arguments, *plain],
        rf"ValueError at .*{name}\.py:7, in training_step: {re.escape(USERS_CODE[mistake])}\)$",
        capsys,
    )


def test_error__of_the_packages_own_checks_names_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert_one_line(["fit", *QUICK, "--model.num_classes=7"], r"num_classes to 5\.$", capsys)


def test_one_line_errors__serve_a_command_line_of_ones_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning.pytorch.cli import LightningCLI

    from lightning_unfreeze import DigitsData, TransferClassifier
    from lightning_unfreeze.cli.errors import one_line_errors
    from lightning_unfreeze.cli.parser import OneLineParser

    def own_main(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["own.py", "fit", *arguments])
        with one_line_errors():
            LightningCLI(TransferClassifier, DigitsData, parser_class=OneLineParser, seed_everything_default=0)

    for arguments, says in (
        (("--model.backbone=digits_resnet", "--model.num_classes=1"), r"num_classes=1: give 2"),
        (("--model.backbone=digits_resnet", "--model.classes=5"), r"classes"),
    ):
        with pytest.raises(SystemExit) as stop:
            own_main(*arguments)
        said = capsys.readouterr().err
        assert stop.value.code == 2
        assert said.count("\n") == 1 and re.search(says, said), said


def test_command__keeps_the_line_of_the_process_by_which_ddp_starts_the_other_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["lightning-unfreeze", "fit", *QUICK, "--trainer.devices=2", "--trainer.strategy=ddp", *TINY]
    monkeypatch.setattr("sys.argv", line)
    started: list[list[str]] = []

    def start(command: list[str], **options: object) -> None:
        started.append([*command])
        raise OSError("this is enough")

    monkeypatch.setattr("subprocess.Popen", start)
    with pytest.raises(SystemExit):
        main()
    assert "this is enough" in capsys.readouterr().err
    assert [command[-len(line) + 1 :] for command in started] == [line[1:]]


def test_help__imports_neither_torch_nor_lightning() -> None:
    check = (
        "import sys; from lightning_unfreeze.cli import main; main(['--help']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'lightning', 'matplotlib')))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "lr-find" in done.stdout


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_quickstart__fits_then_tests_and_predicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(CONFIGS / "quickstart.yaml"), "--stage.full.num_cycles=3", *TINY])
    (checkpoint,) = Path("runs").rglob("*.ckpt")
    main(["test", "--config", str(CONFIGS / "quickstart.yaml"), f"--ckpt_path={checkpoint}", *TINY])
    accuracy = float(re.search(r"test_acc\W+([0-9.]+)", capsys.readouterr().out).group(1))  # type: ignore[union-attr]
    assert accuracy > 0.85
    main(["predict", "--config", str(CONFIGS / "quickstart.yaml"), f"--ckpt_path={checkpoint}", *TINY])
    (predictions,) = Path("runs").rglob("predictions.csv")
    rows = list(csv.DictReader(predictions.read_text().splitlines()))
    right = sum(row["file"].startswith(f"digit {row['class']},") for row in rows)
    assert right / len(rows) == pytest.approx(accuracy, abs=0.03)
    predictions.unlink()
    one_batch = ["--trainer.limit_predict_batches=1", *TINY]
    main(["predict", "--config", str(CONFIGS / "quickstart.yaml"), f"--ckpt_path={checkpoint}", *one_batch])
    (predictions,) = Path("runs").rglob("predictions.csv")
    first = list(csv.DictReader(predictions.read_text().splitlines()))
    assert [row["file"] for row in first] == [row["file"] for row in rows[: len(first)]]
    assert 0 < len(first) < len(rows)
    main(["validate", "--config", str(CONFIGS / "quickstart.yaml"), f"--ckpt_path={checkpoint}", *TINY])
    configs = [yaml.safe_load(path.read_text()) for path in sorted(Path("runs").rglob("config.yaml"))]
    assert [config["ckpt_path"] for config in configs] == [None, *[str(checkpoint)] * 4]  # each run's own
