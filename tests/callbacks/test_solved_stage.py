"""A solved head: against scikit-learn on features of a plain forward; in plans, resumed, on two ranks."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_unfreeze.callbacks.precompute import PrecomputeFeatures
from lightning_unfreeze.callbacks.restarts import CosineRestarts
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.stages.plan import Stage
from tests.processes import needs_fork
from tests.zoo import Does, Images, Stream, UserModule, loader, quiet_trainer, same_weights, weights_of

SOLVED = Stage("head", train="head", precompute=True, solve=True)


def photos(num: int = 48, seed: int = 0) -> TensorDataset:
    """Three classes of noise that differ in colour, enough to learn and not to separate."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(num) % 3
    images = torch.randn(num, 3, 12, 12, generator=generator)
    images += 1.5 * F.one_hot(targets, 3)[:, :, None, None] + 0.7 * torch.randn(num, 3, 1, 1, generator=generator)
    return TensorDataset(images, targets)


class Weighted(UserModule):
    """Class weights, label smoothing, dropout before the head; a metric of validation."""

    weights = torch.tensor([1.0, 2.0, 0.5])
    smoothing = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y, weight=self.weights, label_smoothing=self.smoothing)


def fit(
    folder: Path, module: pl.LightningModule, plan: list[Stage], *others: Callback, val: Any = None, **options: Any
) -> pl.Trainer:
    store = PrecomputeFeatures(folder / "store", **options.pop("store", {}))
    trainer = quiet_trainer([GradualUnfreeze(plan), store, *others], **options.pop("trainer", {}))
    torch.manual_seed(7)
    val = loader(photos(60, seed=1)) if val is None else val
    trainer.fit(module, loader(photos(), shuffle=True), val or None, **options)
    return trainer


def features_of(module: UserModule, data: TensorDataset) -> Tensor:
    backbone = module.net.backbone.eval()
    with torch.no_grad():
        return backbone(data.tensors[0]).flatten(1).double()


def test_solved_stage__is_scikit_learns_head_at_the_ridge_that_it_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    module = Weighted()
    before = weights_of(module)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        trainer = fit(tmp_path, module, [SOLVED])
    told = next(re.finditer(r"stage 'head': solved, ridge (\S+), val_acc (\S+), \d+\.\d s \(48 rows\)", caplog.text))
    after = weights_of(module)
    assert {name.rpartition(".")[0] for name in same_weights(before, after)} == {"net.head.2", "head.2"}

    train, val = photos(), photos(60, seed=1)
    features = features_of(module, train)
    ridge = float(10 ** (round(2 * torch.tensor(float(told[1])).log10().item()) / 2))
    scale = float(features.var(0, correction=0).mean())
    rows = float(Weighted.weights[train.tensors[1]].sum())
    expected = LogisticRegression(
        C=1 / (ridge * scale * rows),
        tol=1e-10,
        max_iter=10_000,
        class_weight=dict(enumerate(Weighted.weights.tolist())),
    ).fit(features.numpy(), train.tensors[1].numpy())
    head = module.net.head[2]
    assert isinstance(head, nn.Linear)
    difference = torch.tensor(expected.coef_) - head.weight.detach()
    assert difference.abs().max() < 2e-3 * float(head.weight.detach().abs().max())
    accuracy = expected.score(features_of(module, val).numpy(), val.tensors[1].numpy())
    assert accuracy > 0.5
    assert float(told[2]) == pytest.approx(accuracy, abs=1e-3)
    assert float(trainer.callback_metrics["val_acc"]) == pytest.approx(accuracy, abs=1e-3)
    assert trainer.current_epoch == 1 and trainer.optimizers[0].state == {}


# --- solved where that can be done -----------------------------------------------------------------------------------

AUTO = Stage("head", train="head", epochs=2, precompute=True, lr=1e-2, solve="auto")


class TwoLayers(Weighted):
    def __init__(self) -> None:
        super().__init__()
        width = self.net.head[2].in_features  # type: ignore[index, union-attr]
        self.net.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5), nn.Linear(5, 3))
        self.head = self.net.head


class SquaredError(Weighted):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), F.one_hot(batch[1], 3).float())


def test_auto__solves_what_can_be_solved(tmp_path: Path) -> None:
    heads = []
    for stage in (AUTO, SOLVED):
        torch.manual_seed(0)
        module = Weighted()
        trainer = fit(tmp_path, module, [stage, Stage("full", epochs=1, lr=1e-3)])
        assert trainer.current_epoch == 2  # the solved stage has one epoch, whatever it would have as a trained one
        heads.append(weights_of(module))
    assert same_weights(*heads) == []


@pytest.mark.filterwarnings("ignore:stage 'head' reads:UserWarning")
@pytest.mark.parametrize(
    ("kind", "streamed", "why"),
    [
        (TwoLayers, False, "is one linear layer"),
        (SquaredError, False, "the step has to take one cross entropy"),
        (Weighted, True, "its features are not stored"),
    ],
)
def test_auto__trains_what_cannot_be_solved_and_says_why(
    kind: type[Weighted], streamed: bool, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = []
    for stage in (AUTO, AUTO.settled(solved=False)):
        torch.manual_seed(0)
        module = kind()
        torch.manual_seed(7)
        callbacks = [GradualUnfreeze([stage]), PrecomputeFeatures(tmp_path / "store", policy="always")]
        trainer = quiet_trainer(callbacks, limit_train_batches=6)
        with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
            train = DataLoader(Stream(photos()), 8) if streamed else loader(photos(), shuffle=True)
            trainer.fit(module, train, loader(photos(60, seed=1)))
        assert trainer.current_epoch == 2
        weights.append(weights_of(module))
    assert same_weights(*weights) == []
    assert re.search(rf"stage 'head': the head is trained, not solved: .*{why}", caplog.text)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@pytest.mark.parametrize(
    ("kind", "num_files", "pays"), [(Weighted, 3, True), (TwoLayers, 4, True), (TwoLayers, 4, False)]
)
def test_auto__goes_on_from_a_checkpoint_as_it_was_decided(
    kind: type[Weighted], num_files: int, pays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PrecomputeFeatures, "_pays", lambda *_: pays)
    plan = [AUTO, Stage("full", epochs=2, lr=1e-3)]
    torch.manual_seed(0)
    module = kind()
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(tmp_path, module, plan, saver, trainer={"enable_checkpointing": True})
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == num_files
    for file in files[:-1]:
        torch.manual_seed(0)
        again = kind()
        fit(tmp_path, again, plan, ckpt_path=file)
        assert same_weights(weights_of(module), weights_of(again)) == [], file


def test_solved_stage__smoothed_labels_are_solved_as_the_step_smooths_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Weighted()
    module.weights, module.smoothing = None, 0.3  # type: ignore[assignment]
    fit(tmp_path, module, [SOLVED])
    features, targets = features_of(module, photos()).float(), photos().tensors[1]
    head: Any = module.net.head[2]
    logits = head(features).detach().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(logits, targets, label_smoothing=0.3), logits)
    # the bias has no ridge: its gradient of the step's own loss is zero
    assert slope.sum(0).abs().max() < 1e-4


def test_solved_stage__labels_one_by_one(tmp_path: Path) -> None:
    class Several(UserModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return F.binary_cross_entropy_with_logits(self.net(x), F.one_hot(y, 3).float())

        validation_step = training_step  # type: ignore[assignment]

    torch.manual_seed(0)
    module = Several()
    fit(tmp_path, module, [SOLVED])
    head: Any = module.net.head[2]
    logits = head(features_of(module, photos()).float())
    shares = logits.sigmoid().mean(0)
    assert shares.tolist() == pytest.approx([1 / 3] * 3, abs=1e-3)  # what a bias without ridge makes of each label


def test_solved_stage__several_views_are_more_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def noisy(image: Tensor) -> Tensor:
        return image + torch.randn(1)

    def plain(image: Tensor) -> Tensor:
        return image * 1.0

    train, val = Images(noisy, photos(60)), Images(plain, photos(60, seed=1))
    torch.manual_seed(0)
    store = PrecomputeFeatures(tmp_path, num_views=3)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        quiet_trainer([GradualUnfreeze([SOLVED]), store]).fit(UserModule(), loader(train), loader(val))
    assert "(180 rows)" in caplog.text


def test_solved_stage__without_validation_a_part_is_held_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    with (
        caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"),
        pytest.warns(UserWarning, match="validation_step"),
    ):
        fit(tmp_path, UserModule(), [SOLVED], val=[])
    assert "held-out_acc" in caplog.text


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_solved_stage__goes_on_in_a_plan_and_after_a_stop(tmp_path: Path) -> None:
    plan = [SOLVED, Stage("full", epochs=2, cycle_len=2, lr=0.01, lr_span=1 / 9)]

    def run(ckpt_path: Any = None) -> tuple[dict[str, Tensor], list[float], list[Any]]:
        torch.manual_seed(0)
        module, rates = UserModule(), []

        def look(trainer: pl.Trainer, *_: Any) -> None:
            rates.append(max(group["lr"] for group in trainer.optimizers[0].param_groups))

        saving = ModelCheckpoint(tmp_path / "checkpoints", filename="{epoch}", save_top_k=-1)
        others = [CosineRestarts(), Does(on_train_batch_end=look), saving]
        trainer = fit(tmp_path, module, plan, *others, ckpt_path=ckpt_path, trainer={"enable_checkpointing": True})
        conductor: Any = trainer.callbacks[0]  # type: ignore[attr-defined]
        return weights_of(module), rates, conductor.journal.state_dict()["rows"]

    whole, rates, rows = run()
    assert rates[:6] == [0.0] * 6 and rates[6] == pytest.approx(0.01, rel=0.05)
    assert [row["epochs"] for row in rows] == [1, 2]
    assert rows[0]["best"] > 0.5
    for epoch in (0, 1):
        resumed, _, _ = run(tmp_path / "checkpoints" / f"epoch={epoch}.ckpt")
        assert same_weights(whole, resumed) == []


def test_solved_stage__refuses_what_it_cannot_solve(tmp_path: Path) -> None:
    deep = UserModule()
    deep.net.head = deep.head = nn.Sequential(nn.Flatten(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(MisconfigurationException, match=r"stage 'head', solve=True: .* one linear layer, .*head\.1"):
        fit(tmp_path, deep, [SOLVED])

    class Scaled(UserModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(2 * self.net(batch[0]), batch[1])

    with pytest.raises(MisconfigurationException, match="not of the head's own logits"):
        fit(tmp_path, Scaled(), [SOLVED])

    class Squared(UserModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (self.net(batch[0]) - F.one_hot(batch[1], 3)).square().mean()

    with pytest.raises(MisconfigurationException, match="one cross entropy"):
        fit(tmp_path, Squared(), [SOLVED])
    with pytest.raises(MisconfigurationException, match=r"precompute=True, which PrecomputeFeatures serves"):
        quiet_trainer([GradualUnfreeze([SOLVED])]).fit(UserModule(), loader(), loader())


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore")  # Lightning, about processes and loaders
@needs_fork
def test_solved_stage__two_ranks_solve_the_head_of_one(tmp_path: Path) -> None:
    def report(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        torch.save(weights_of(module), tmp_path / f"{trainer.global_rank}.pt")

    torch.manual_seed(0)
    ranks = {"devices": 2, "strategy": "ddp_fork"}
    fit(tmp_path, Weighted(), [SOLVED], Does(on_train_end=report), trainer=ranks)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert same_weights(first, second) == []
    torch.manual_seed(0)
    alone = Weighted()
    fit(tmp_path / "alone", alone, [SOLVED])
    head: Any = alone.net.head[2]
    assert (first["net.head.2.weight"] - head.weight.detach()).abs().max() < 1e-5
