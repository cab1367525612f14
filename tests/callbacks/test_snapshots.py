"""`BestWeights`: each row of its table against weights averaged and validated by hand."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from lightning_unfreeze.callbacks.restarts import CosineRestarts
from lightning_unfreeze.callbacks.snapshots import BestWeights
from lightning_unfreeze.callbacks.tta import TTAEval
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.stages.plan import Stage
from lightning_unfreeze.stages.soups import greedy_soup, mix
from tests.zoo import (
    Does,
    KeepsWeights,
    SmallNet,
    UserModule,
    loader,
    quiet_trainer,
    random_images,
    same_weights,
    weights_of,
)

PLAN = [
    Stage("head", train="head", lr=0.05, epochs=1),
    Stage("full", lr=0.05, cycle_len=1, num_cycles=3),
]
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory")


def loss_of(weights: dict[str, Tensor]) -> float:
    module = UserModule(SmallNet())
    module.load_state_dict(weights)
    data = loader(random_images(seed=5), batch_size=24)
    (logged,) = quiet_trainer([]).validate(module, data, verbose=False)
    return logged["val_loss"]


def average(points: list[dict[str, Tensor]], shares: list[float]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for point, share in zip(points, shares, strict=True):
        for name, value in point.items():
            total[name] = total.get(name, 0) + share * value if value.is_floating_point() else value
    return total


def test_best_weights__rows_are_those_of_weights_averaged_by_hand(tmp_path: Path) -> None:
    torch.manual_seed(0)
    (tmp_path / "best.ckpt").write_text("of the user's")
    module, every, best = UserModule(SmallNet()), KeepsWeights("on_validation_end"), BestWeights()
    saver = ModelCheckpoint(tmp_path, filename="epoch")
    callbacks = [GradualUnfreeze(PLAN), CosineRestarts(), every, best, saver]
    trainer = quiet_trainer(callbacks, enable_checkpointing=True)
    trainer.fit(module, loader(shuffle=True), loader(random_images(seed=5), batch_size=24))

    start, *ends = every.weights
    expected = {
        "as the fit left them": ends[2],
        "start": start,
        "cycle 1": ends[0],
        "cycle 2": ends[1],
        "cycle 3": ends[2],
        "mean of the cycle ends": average(ends, [1 / 3] * 3),
        **{f"{share:.0%} of the way": average([start, ends[2]], [1 - share, share]) for share in (0.25, 0.5, 0.75)},
    }
    for name, weights in expected.items():
        assert best.scores[name] == pytest.approx(loss_of(weights), rel=1e-5), name
    with (tmp_path / "weights.csv").open() as file:
        rows = {row["weights"]: float(row["val_loss"]) for row in csv.DictReader(file)}
    assert rows == pytest.approx(best.scores)
    assert (tmp_path / "best.ckpt").read_text() == "of the user's"
    assert best.best_path == tmp_path / "best-v1.ckpt"
    file = torch.load(best.best_path, weights_only=True)
    assert [stage["name"] for stage in file["stages"]] == [stage.name for stage in PLAN], "for the model card"
    kept = file["state_dict"]
    assert loss_of(kept) == pytest.approx(min(best.scores.values()), rel=1e-5)
    assert loss_of(kept) <= loss_of(ends[2]) * (1 + 1e-6)
    assert same_weights(weights_of(module), ends[2]) == [], "the module is what the fit left"
    assert {path.name for path in tmp_path.iterdir()} >= {"epoch.ckpt", "weights.csv", "best-v1.ckpt"}
    assert not (tmp_path / "path").exists()


def test_best_weights__a_resumed_run_has_the_same_table(tmp_path: Path) -> None:
    def save(trainer: pl.Trainer, _: pl.LightningModule) -> None:
        if trainer.current_epoch == 2:
            trainer.save_checkpoint(tmp_path / "at.ckpt")
            raise KeyboardInterrupt

    def run(ckpt_path: Path | None, *more: Callback, folder: str) -> BestWeights:
        torch.manual_seed(0)
        best = BestWeights()
        callbacks = [GradualUnfreeze(PLAN), CosineRestarts(), best, ModelCheckpoint(tmp_path / folder), *more]
        trainer = quiet_trainer(callbacks, enable_checkpointing=True)
        data: Any = loader(), loader(random_images(seed=5), batch_size=24)
        trainer.fit(UserModule(SmallNet()), *data, ckpt_path=ckpt_path)
        return best

    whole = run(None, folder="whole")
    with pytest.raises(SystemExit):
        run(None, Does(on_train_epoch_end=save), folder="cut")
    assert run(tmp_path / "at.ckpt", folder="cut").scores == whole.scores


def test_best_weights__that_are_gone_are_missed_by_a_fit_that_goes_on_alone(tmp_path: Path) -> None:
    """A finished run leaves a checkpoint of its last stage, and no weights along the path: a test needs none."""
    torch.manual_seed(0)
    module, saver = UserModule(SmallNet()), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    data = loader(random_images(seed=5), batch_size=24)

    def trainer() -> pl.Trainer:
        callbacks = [GradualUnfreeze(PLAN), CosineRestarts(), BestWeights(), saver]
        return quiet_trainer(callbacks, enable_checkpointing=True)

    first = trainer()
    first.fit(module, loader(), data)
    (scores,) = first.validate(module, data, ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False)  # warnings are errors
    kept = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)["state_dict"]
    assert scores["val_loss"] == pytest.approx(loss_of(kept), rel=1e-5)
    with pytest.warns(UserWarning, match=r"BestWeights goes on without .*start.pt, .*cycle1.pt"):
        trainer().fit(module, loader(), data, ckpt_path=tmp_path / "epoch=2.ckpt")


def test_soups__mix_by_hand_and_take_what_helps() -> None:
    points = [{"w": torch.tensor([float(value)]), "n": torch.tensor(value)} for value in (4, 10, 0)]
    assert mix(points, [0.5, 0.25, 0.25])["w"].tolist() == [4.5]
    assert mix(points)["n"].item() == 0
    # to come near 3: 4 alone is 1 off, with 10 it would be 4 off, with 0 it is 1 off: no worse
    assert greedy_soup(points, lambda mixed: -abs(float(mixed["w"]) - 3)) == [0, 2]


class Moves(Callback):
    """Spoils the last cycle, so that the best along the path is not the end."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 3:
            with torch.no_grad():
                pl_module.net.head[2].weight.mul_(-30)  # type: ignore[union-attr, index, operator]


def test_best_weights__restored_are_what_module_metrics_and_views_speak_of(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, best, views = UserModule(SmallNet()), BestWeights(restore=True), TTAEval()
    callbacks = [GradualUnfreeze(PLAN), CosineRestarts(), Moves(), best, views, ModelCheckpoint(tmp_path)]
    trainer = quiet_trainer(callbacks, enable_checkpointing=True)
    data: Any = loader(shuffle=True), loader(random_images(seed=5), batch_size=24)
    trainer.fit(module, *data)

    lowest = min(best.scores.values())
    assert lowest < best.scores["as the fit left them"], "the case is none"
    assert loss_of(weights_of(module)) == pytest.approx(lowest, rel=1e-5)
    assert same_weights(weights_of(module), torch.load(best.best_path, weights_only=True)["state_dict"]) == []
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(lowest, rel=1e-5)
    (row,) = best.closing_rows(trainer, module)
    assert row["file"] == f"in memory, {best.best_path}"
    found = views.results["val"]
    (logged,) = quiet_trainer([TTAEval()]).validate(module, data[1], verbose=False)
    assert found.metrics["val_nll_plain"] == pytest.approx(lowest, rel=1e-4)
    assert found.metrics["val_nll_tta"] == pytest.approx(logged["val_nll_tta"], rel=1e-5)
    assert float(trainer.callback_metrics["val_nll_tta"]) == pytest.approx(logged["val_nll_tta"], rel=1e-5)
    (again,) = trainer.validate(module, data[1], verbose=False)
    assert float(trainer.callback_metrics["val_loss"]) == again["val_loss"], "no metric stays pinned after the fit"


def test_best_weights__a_stage_that_gave_back_its_start_is_walked_to_its_last_cycle_end(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plan = [PLAN[0], Stage("full", lr=30.0, cycle_len=1, num_cycles=2, until="overfit")]
    module, best, every, views = (
        UserModule(SmallNet()),
        BestWeights(restore=True),
        KeepsWeights("on_validation_end"),
        TTAEval(),
    )
    callbacks = [GradualUnfreeze(plan), CosineRestarts(), every, best, views, ModelCheckpoint(tmp_path)]
    data = loader(shuffle=True), loader(random_images(seed=5), batch_size=24)
    quiet_trainer(callbacks, enable_checkpointing=True).fit(module, *data)

    start, *ends = every.weights
    assert best.scores["as the fit left them"] == best.scores["start"] < min(map(loss_of, ends))
    for share in (0.25, 0.5, 0.75):
        by_hand = loss_of(average([start, ends[-1]], [1 - share, share]))
        assert best.scores[f"{share:.0%} of the way"] == pytest.approx(by_hand, rel=1e-5)
    assert views.results["val"].metrics["val_nll_plain"] == pytest.approx(min(best.scores.values()), rel=1e-4)
