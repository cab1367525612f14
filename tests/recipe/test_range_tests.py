"""Range tests without a fit: the curves of `fit`, and nothing else."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from matplotlib.image import imread

from lightning_unfreeze.callbacks.lr_finder import LRFinderPerStage
from lightning_unfreeze.callbacks.restarts import CosineRestarts
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.cli import main
from lightning_unfreeze.recipe.range_tests import range_tests
from lightning_unfreeze.stages.plan import Stage
from tests.zoo import TrainData, UserModule, loader, quiet_trainer, same_weights, weights_of

CONFIGS = Path(__file__).parents[2] / "configs"
PLAN = [
    Stage("head", train="head", cycle_len=1, lr="find"),
    Stage("middle", train=2, epochs=1),
    Stage("full", cycle_len=1, lr="find", lr_mult=1 / 3),
]
DATA = TrainData(loader(shuffle=True))


def finder() -> LRFinderPerStage:
    return LRFinderPerStage(1e-4, 1.0, num_steps=20, apply=False)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but", "ignore:stage .* no signal")
# the first stage of the second plan has BatchNorm layers that train, and the option that keeps their statistics
@pytest.mark.parametrize(("plan", "train_bn"), [(PLAN, True), (PLAN[::-1], False)])
def test_range_tests__are_those_of_fit_and_train_nothing(plan: list[Stage], train_bn: bool) -> None:
    torch.manual_seed(0)
    module = UserModule()
    before = weights_of(module)
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    warm = CosineRestarts(warmup=0.5)
    searching = quiet_trainer([GradualUnfreeze(plan, train_bn=train_bn), finder(), warm], **options)
    torch.manual_seed(1)
    results = range_tests(searching, module, DATA)
    first, last = plan[0].name, plan[-1].name
    assert list(results) == [first, last]
    assert same_weights(before, weights_of(module)) == []

    fitting = finder()
    trainer = quiet_trainer([GradualUnfreeze(plan, train_bn=train_bn), fitting, CosineRestarts(warmup=0.5)], **options)
    torch.manual_seed(1)
    trainer.fit(module, datamodule=DATA)
    assert results[first] == fitting.results[first] and results[first].warmup_steps > 0
    assert results[last] != fitting.results[last]  # there, the earlier stages have trained


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but")
def test_range_tests__of_all_stages_where_none_asks() -> None:
    plan = [Stage("a", train="head", epochs=1, lr=0.1), Stage("b", epochs=1)]
    assert list(range_tests(quiet_trainer([GradualUnfreeze(plan), finder()]), UserModule(), DATA)) == ["a", "b"]
    with pytest.raises(MisconfigurationException, match="add GradualUnfreeze"):
        range_tests(quiet_trainer([finder()]), UserModule(), DATA)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but")
def test_range_tests__tell_of_no_weights(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = quiet_trainer([GradualUnfreeze([Stage("a", epochs=1)]), finder()], enable_progress_bar=True)
    range_tests(trainer, UserModule(), DATA)
    said = capsys.readouterr()
    assert "range test of stage 'a'" in said.err and "as trained" not in said.out


@pytest.mark.pictures
@pytest.mark.slow
def test_cli__lr_find_prints_the_rates_and_keeps_the_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    text = (CONFIGS / "quickstart.yaml").read_text()
    short = "class_path: LRFinderPerStage\n      init_args: {num_steps: 20, min_lr: 1.0e-4}"
    config.write_text(text.replace("class_path: LRFinderPerStage", short))
    options = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    main(["lr-find", f"--config={config}", f"--trainer.default_root_dir={tmp_path}", *options])
    shown = capsys.readouterr().out
    assert "nothing was trained" in shown
    files = {path.name for path in (tmp_path / "lr_find").iterdir()}
    assert files == {f"{stage}.{kind}" for stage in ("head_on_features", "full") for kind in ("csv", "png")}
    with (tmp_path / "lr_find" / "full.csv").open() as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    assert rates[0] == pytest.approx(1e-4) and len(rates) <= 20
    assert imread(tmp_path / "lr_find" / "full.png").std() > 0.05
