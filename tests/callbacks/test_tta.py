"""`TTAEval` on modules as users write them; each number against a loop in plain PyTorch or arithmetic written here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision.transforms import v2

from lightning_unfreeze.callbacks import tta as tta_module
from lightning_unfreeze.callbacks.base import Conductor, StageCallback, StageRun
from lightning_unfreeze.callbacks.restarts import CosineRestarts
from lightning_unfreeze.callbacks.tta import TTAEval, merge_views
from lightning_unfreeze.seeding import keyed_rng
from lightning_unfreeze.stages.plan import Stage
from tests.processes import needs_fork
from tests.zoo import StopsAfter

CLASSES = 3

# Lightning 2.6 asks torch for a class that newer torch renames
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")


def small_net(num_outputs: int = CLASSES) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(36, num_outputs),
    )


def restless(net: nn.Sequential) -> nn.Sequential:
    """Without a constant part in the answer: predictions of random images vary, and flip with the image."""
    with torch.no_grad():
        net.eval()
        net[6].bias -= net(images_and_targets(500)[0]).mean(0)
    return net.train()


class Module(pl.LightningModule):
    """A user's module: own steps, own metrics; `call` says how its steps reach the network."""

    def __init__(self, net: nn.Module | None = None, call: str = "net", loss: Callable[..., Any] = F.cross_entropy):
        super().__init__()
        torch.manual_seed(0)
        self.net = small_net() if net is None else net
        for part in self.net.modules():
            if isinstance(part, nn.BatchNorm2d):  # statistics that train mode would not reproduce
                part.running_mean.uniform_(-0.3, 0.3)
                part.running_var.uniform_(0.5, 1.5)
        if type(self.net) is nn.Sequential and len(self.net) == 7:
            restless(self.net)
        self.call, self.loss = call, loss
        if loss is F.cross_entropy:
            self.val_acc = torchmetrics.Accuracy("multiclass", num_classes=CLASSES, average="micro")
        self.train_acc = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images)

    def logits(self, batch: Any) -> torch.Tensor:
        images = batch["image"] if isinstance(batch, dict) else batch[0]
        if self.call == "self":
            return self(images)
        if self.call == "normalised":
            return self.net(2 * images - 1)
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(self.logits(batch), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        target = batch["label"] if isinstance(batch, dict) else batch[1]
        logits = self.logits(batch)
        if self.loss is F.cross_entropy:
            self.val_acc(logits, target)
            self.log("val_acc", self.val_acc)

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.logits(batch).argmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def images_and_targets(num: int = 21, size_px: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(num, 3, size_px, size_px, generator=rng), torch.randint(CLASSES, (num,), generator=rng)


def load(*tensors: torch.Tensor, batch_size: int = 8, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*tensors), batch_size=batch_size, **options)


def trainer_with(*callbacks: Any, **options: Any) -> pl.Trainer:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **options})


def view_probs(net: nn.Module, views: list[torch.Tensor]) -> torch.Tensor:
    """The oracle: each view alone through the network in eval mode."""
    was, _ = net.training, net.eval()
    with torch.no_grad():
        probs = torch.stack([net(view).softmax(-1) for view in views])
    net.train(was)
    return probs


@pytest.mark.parametrize("call", ["net", "self", "normalised"])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_tta__numbers_are_those_of_a_plain_loop(call: str, chunk_size: int | None) -> None:
    module, (images, target) = Module(call=call), images_and_targets(60)
    tta = TTAEval(["hflip", "vflip", "hflip+vflip"], chunk_size=chunk_size, figure=False)
    (logged,) = trainer_with(tta).test(module, load(images, target), verbose=False)

    inputs = 2 * images - 1 if call == "normalised" else images
    probs = view_probs(module.net, [inputs, inputs.flip(-1), inputs.flip(-2), inputs.flip(-1, -2)])
    rows = torch.arange(60)
    plain, merged = probs[0], probs.mean(0)
    right, right_tta = plain.argmax(1) == target, merged.argmax(1) == target
    expected = {
        "test_acc_plain": right.float().mean(),
        "test_acc_tta": right_tta.float().mean(),
        "test_nll_plain": -plain[rows, target].log().mean(),
        "test_nll_tta": -merged[rows, target].log().mean(),
        "test_tta_fixed": (right_tta & ~right).sum(),
        "test_tta_broken": (right & ~right_tta).sum(),
        "test_tta_gain": right_tta.float().mean() - right.float().mean(),
        "test_tta_agreement": (probs.argmax(-1) == merged.argmax(-1)).float().mean(),
        "test_tta_entropy": -(merged * merged.log()).sum(1).mean(),
    }
    assert expected["test_tta_fixed"] + expected["test_tta_broken"] > 0, "the case shows nothing"
    for name, value in expected.items():
        assert logged[name] == pytest.approx(float(value), abs=1e-5), name
    # 15 bins of confidence, as Guo et al. (2017) define it
    confidence, bins = merged.amax(1), (merged.amax(1) * 15).ceil()
    ece = sum(
        abs((right_tta[bins == b].float() - confidence[bins == b]).sum().item()) / 60 for b in bins.unique().tolist()
    )
    assert logged["test_ece_tta"] == pytest.approx(ece, abs=1e-5)


def test_tta__runs_each_view_of_each_image_once() -> None:
    """V views cost V forwards, the plain one included, and the user's own step sees what it sees without TTA."""
    module, (images, target) = Module(), images_and_targets()
    rows: list[int] = []
    module.net[0].register_forward_hook(lambda part, args, output: rows.append(len(args[0])))
    tta = TTAEval("d4", chunk_size=7, figure=False)
    (logged,) = trainer_with(tta).validate(module, load(images, target), verbose=False)
    assert sum(rows) == 8 * 21
    assert rows == [8, 56, 8, 56, 5, 35]

    without = Module()
    (plain,) = trainer_with().validate(without, load(images, target), verbose=False)
    assert logged["val_acc"] == plain["val_acc"] == pytest.approx(logged["val_acc_plain"])
    rows.clear()
    trainer_with(TTAEval("d4", chunk_size=3, figure=False)).validate(module, load(images, target), verbose=False)
    assert rows[:4] == [8, 24, 24, 8]


def test_tta__merged_predictions_feed_the_modules_own_metrics() -> None:
    module, (images, target) = Module(), images_and_targets(60)
    module.metrics = torchmetrics.MetricCollection(
        {"f1": torchmetrics.F1Score("multiclass", num_classes=CLASSES, average="macro")}, prefix="val_"
    )
    (logged,) = trainer_with(TTAEval(figure=False)).validate(module, load(images, target), verbose=False)
    merged = view_probs(module.net, [images, images.flip(-1)]).mean(0).argmax(1)
    f1 = []
    for label in range(CLASSES):
        hits = ((merged == label) & (target == label)).sum().item()
        f1.append(2 * hits / max(1, (merged == label).sum().item() + (target == label).sum().item()))
    assert logged["val_f1_tta"] == pytest.approx(sum(f1) / CLASSES, abs=1e-6)
    assert not [name for name in logged if "train" in name]
    assert module.metrics["f1"].update_count == 0


@pytest.mark.parametrize(("beta", "weight"), [("v2", 0.25), ("v07", 2 / 9), (0.6, 0.6)])
def test_tta__beta_weighs_the_plain_view(beta: Any, weight: float) -> None:
    module, (images, target) = Module(), images_and_targets()
    tta = TTAEval("d4", beta=beta, figure=False)
    trainer_with(tta).test(module, load(images, target), verbose=False)
    views = [torch.rot90(part, turns, (-2, -1)) for part in (images, images.flip(-1)) for turns in range(4)]
    probs = view_probs(module.net, views)
    expected = weight * probs[0] + (1 - weight) * probs[1:].mean(0)
    torch.testing.assert_close(tta.results["test"].merged.exp(), expected)


def test_tta__multi_label_counts_each_label() -> None:
    module, (images, _) = Module(loss=F.binary_cross_entropy_with_logits), images_and_targets(60)
    target = torch.rand(60, CLASSES, generator=torch.Generator().manual_seed(3)).round()
    tta = TTAEval(figure=False)
    (logged,) = trainer_with(tta).validate(module, load(images, target), verbose=False)
    with torch.no_grad():
        net = module.net.eval()
        plain, merged = net(images).sigmoid(), (net(images).sigmoid() + net(images.flip(-1)).sigmoid()) / 2
    before, after = (plain > 0.5) == target, (merged > 0.5) == target
    assert logged["val_acc_tta"] == pytest.approx(after.float().mean().item())
    assert logged["val_tta_fixed"] == (after & ~before).sum()
    assert logged["val_tta_broken"] == (before & ~after).sum()
    assert logged["val_nll_tta"] == pytest.approx(F.binary_cross_entropy(merged, target).item(), rel=1e-5)
    torch.testing.assert_close(tta.results["val"].merged.exp(), merged)


def test_tta__binary_takes_a_single_logit() -> None:
    net = small_net(1)
    module, (images, target) = Module(net, loss=F.mse_loss), images_and_targets(40)
    target = target.clamp(max=1)
    module.f1 = torchmetrics.F1Score("binary")
    (logged,) = trainer_with(TTAEval(figure=False)).validate(module, load(images, target), verbose=False)
    with torch.no_grad():
        merged = (net.eval()(images).sigmoid() + net(images.flip(-1)).sigmoid())[:, 0] / 2
    guess = (merged > 0.5).long()
    assert logged["val_acc_tta"] == pytest.approx((guess == target).float().mean().item())
    hits = (guess * target).sum().item()
    assert logged["val_f1_tta"] == pytest.approx(2 * hits / max(1, (guess.sum() + target.sum()).item()))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed"])
def test_tta__half_precision_is_merged_in_float32(precision: Any) -> None:
    module, (images, target) = Module(), images_and_targets()
    tta = TTAEval("ten_crop", figure=False)
    trainer_with(tta, precision=precision).test(module, load(images, target), verbose=False)
    merged = tta.results["test"].merged
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged.exp().sum(1), torch.ones(21))
    exact = TTAEval("ten_crop", figure=False)
    trainer_with(exact).test(Module(), load(images, target), verbose=False)
    torch.testing.assert_close(merged, exact.results["test"].merged, rtol=0, atol=0.03)


def test_tta__probabilities_are_not_activated_twice() -> None:
    net = small_net()
    images, target = images_and_targets()
    plain, softmaxed = TTAEval(figure=False), TTAEval(figure=False)
    trainer_with(plain).test(Module(net), load(images, target), verbose=False)
    trainer_with(softmaxed).test(Module(nn.Sequential(net, nn.Softmax(1))), load(images, target), verbose=False)
    # the first module drew new BatchNorm statistics from seed 0, and so did the second
    torch.testing.assert_close(softmaxed.results["test"].merged, plain.results["test"].merged)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"views": "flips"}, "'flips'.*'flip'"),
        ({"views": ["hflop"]}, "hflop"),
        ({"views": [3]}, "function"),
        ({"merge": "median"}, "median"),
        ({"beta": 1.5}, r"1\.5"),
        ({"beta": "v3"}, "v3"),
        ({"beta": 0.3, "merge": "max"}, "beta=0.3"),
        ({"num_random": 0}, "num_random=0"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"every": 0}, "every=0"),
        ({"every": "epoch"}, "epoch"),
        ({"on": ["fit"]}, "fit"),
        ({"activation": "tanh"}, "tanh"),
        ({"augmentation": abs}, "views='random'"),
    ],
)
def test_tta__refuses_impossible_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TTAEval(**kwargs)


class NoCall(Module):
    def logits(self, batch: Any) -> torch.Tensor:
        features = self.net[:5](batch[0])
        return self.net[6](features)


class TwoCalls(Module):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = small_net()

    def logits(self, batch: Any) -> torch.Tensor:
        return self.net(batch[0]) + self.teacher(batch[0])


class SplitCalls(Module):
    """Backbone and head called one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(3, CLASSES)

    def logits(self, batch: Any) -> torch.Tensor:
        return self.head(self.backbone(batch[0]))


class FeaturesByHand(SplitCalls):
    """What the head reads was made in the step: nobody could make it of another view."""

    def logits(self, batch: Any) -> torch.Tensor:
        return self.head(self.backbone(batch[0]).relu())


@pytest.mark.parametrize(
    ("module", "options", "size_px", "message"),
    [
        (NoCall, {}, (8, 8), "saw none"),
        (FeaturesByHand, {}, (8, 8), "backbone.*gives features"),
        (TwoCalls, {}, (8, 8), r"saw 2.*\['net', 'teacher'\].*forward="),
        (Module, {"forward": "model"}, (8, 8), "'model' is no submodule.*net"),
        (Module, {"views": "d4"}, (8, 6), "square"),
        (Module, {"views": "five_crop", "crop_px": 9}, (8, 8), "9 px is larger"),
        (
            lambda: Module(nn.Sequential(nn.Flatten(), nn.Linear(192, 3))),
            {"views": "multiscale"},
            (8, 8),
            "6x6 px.*8x8",
        ),
        (Module, {"target": 2}, (8, 8), "no target"),
        (Module, {"views": "random"}, (8, 8), "augmentation="),
    ],
)
def test_tta__refuses_what_the_module_or_the_data_do_not_have(
    module: Callable[[], Module], options: dict[str, Any], size_px: tuple[int, int], message: str
) -> None:
    made = module()
    batch = (torch.rand(8, 3, *size_px), torch.zeros(8, dtype=torch.long), torch.zeros(5, 8).T[:, :0])
    if options.get("target") == 2:
        batch = (*batch[:2], torch.zeros(8))
        loader: Any = DataLoader(
            TensorDataset(*batch), batch_size=8, collate_fn=lambda rows: [*_stack(rows)[:2], "meta"]
        )
    else:
        loader = load(*batch[:2])
    with pytest.raises(MisconfigurationException, match=message):
        trainer_with(TTAEval(figure=False, **options)).test(made, loader, verbose=False)
    assert not any(part._forward_hooks for part in made.modules()), "an error leaves no hook behind"


def _stack(rows: list[Any]) -> list[torch.Tensor]:
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def test_tta__named_network_is_the_one_that_is_watched() -> None:
    module, (images, target) = TwoCalls(), images_and_targets()
    tta = TTAEval(forward="teacher", figure=False)
    trainer_with(tta).test(module, load(images, target), verbose=False)
    expected = view_probs(module.teacher, [images, images.flip(-1)]).mean(0)
    torch.testing.assert_close(tta.results["test"].merged.exp(), expected)


class NoisyEvaluation(Module):
    def on_test_model_eval(self) -> None:
        self.eval()
        self.net[5].train()


def test_tta__refuses_dropout_in_training_mode() -> None:
    with pytest.raises(MisconfigurationException, match=r"'net\.5'.*training mode"):
        trainer_with(TTAEval(figure=False)).test(NoisyEvaluation(), load(*images_and_targets()), verbose=False)


def test_tta__batches_may_be_dicts() -> None:
    images, target = images_and_targets()
    rows = [{"image": image, "label": label} for image, label in zip(images, target, strict=True)]
    as_dict, as_tuple = TTAEval(figure=False), TTAEval(figure=False)
    trainer_with(as_dict).test(Module(), DataLoader(rows, batch_size=8), verbose=False)  # type: ignore[arg-type]
    trainer_with(as_tuple).test(Module(), load(images, target), verbose=False)
    assert as_dict.results["test"].metrics == as_tuple.results["test"].metrics


# --- predict ---------------------------------------------------------------------------------------------------------


def test_tta__predict_returns_merged_probabilities_spread_and_indices() -> None:
    module, (images, target) = Module(), images_and_targets()
    batches: Any = trainer_with(TTAEval("flip")).predict(module, load(images, target))
    probs = view_probs(module.net, [images, images.flip(-1)])
    torch.testing.assert_close(torch.cat([batch["probs"] for batch in batches]), probs.mean(0))
    torch.testing.assert_close(torch.cat([batch["spread"] for batch in batches]), (probs[0] - probs[1]).abs() / 2)
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(21))
    assert torch.equal(torch.cat([batch["output"] for batch in batches]), probs[0].argmax(1))
    assert "predict_step" not in vars(module)
    left_alone: Any = trainer_with(TTAEval(on=["test"])).predict(module, load(images, target))
    assert torch.equal(torch.cat(left_alone), probs[0].argmax(1))


# --- random views ----------------------------------------------------------------------------------------------------


class Photos(Dataset[Any]):
    """A dataset as torchvision's: `transform` on what is decoded; each decoding adds a byte to a file per image."""

    def __init__(self, num: int, transform: Any, log: Path | None = None) -> None:
        self.images, self.targets = images_and_targets(num)
        self.transform, self.log = transform, log

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        if self.log is not None:  # a file: worker processes have no memory in common
            with (self.log / str(index)).open("ab") as file:
                file.write(b".")
        return self.transform(self.images[index]), self.targets[index]


def decoded(log: Path) -> dict[int, int]:
    """How often each image has been decoded since the last call."""
    counts = {int(file.name): file.stat().st_size for file in log.iterdir()}
    for file in log.iterdir():
        file.unlink()
    return counts


AUGMENT = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(8, padding=2)])


class CountedAugmentation:
    """Each draw adds a byte to a file."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        with self.log.open("ab") as file:
            file.write(b".")
        return AUGMENT(image)


class PhotoData(pl.LightningDataModule):
    def __init__(self, log: Path | None = None, **options: Any) -> None:
        super().__init__()
        self.train, self.eval, self.options = Photos(6, AUGMENT), Photos(30, v2.Identity(), log), options

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Subset(self.train, [0, 1, 2, 3]), batch_size=2, shuffle=True)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Subset(self.eval, list(range(29, 8, -1))), batch_size=8, **self.options)

    val_dataloader = predict_dataloader = test_dataloader


def test_tta__random_views_are_the_training_augmentation_keyed_by_seed_view_and_index(tmp_path: Path) -> None:
    module, data = Module(), PhotoData(tmp_path)
    tta = TTAEval("random", num_random=3, seed=5, figure=False)
    trainer = trainer_with(tta)
    trainer.test(module, datamodule=data, verbose=False)
    assert decoded(tmp_path) == dict.fromkeys(range(9, 30), 1), "once for the plain view and all draws"
    assert "process_dataloader" not in vars(trainer.strategy)

    def draw(view: int, index: int) -> torch.Tensor:
        with keyed_rng("tta", 5, view, index):  # the key is the index in the loader's own dataset
            return AUGMENT(data.eval.images[29 - index])

    plain = torch.stack([data.eval.images[29 - index] for index in range(21)])
    views = [plain, *(torch.stack([draw(view, index) for index in range(21)]) for view in range(3))]
    torch.testing.assert_close(tta.results["test"].merged.exp(), view_probs(module.net, views).mean(0))
    again = TTAEval("random", num_random=3, seed=6, augmentation=AUGMENT, figure=False)
    trainer_with(again).test(module, datamodule=data, verbose=False)
    assert not torch.equal(again.results["test"].merged, tta.results["test"].merged)
    batches: Any = trainer_with(TTAEval("random", num_random=3, seed=5)).predict(module, datamodule=data)
    torch.testing.assert_close(torch.cat([batch["probs"] for batch in batches]), view_probs(module.net, views).mean(0))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_tta__random_views_are_drawn_in_the_workers_and_only_where_they_are_due(tmp_path: Path) -> None:
    weights, found, counts, draws = [], [], [], []
    photos, draw_log = tmp_path / "photos", tmp_path / "draws"
    photos.mkdir()
    draw_log.touch()
    augmentation = CountedAugmentation(draw_log)

    class Counts(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            counts.append(decoded(photos))
            draws.append(draw_log.stat().st_size)

    for workers, callbacks in (
        (0, []),
        (0, [TTAEval("random", every=2, augmentation=augmentation, figure=False)]),
        (2, [TTAEval("random", every=2, augmentation=augmentation, figure=False)]),
    ):
        options = {"num_workers": workers, "persistent_workers": True} if workers else {}
        pl.seed_everything(0, verbose=False)
        module, data = Module(), PhotoData(photos, **options)
        trainer = trainer_with(*callbacks, Counts(), max_epochs=3)
        trainer.fit(module, datamodule=data)
        weights.append(torch.cat([value.flatten().float() for value in module.state_dict().values()]))
        assert isinstance(data.eval.transform, v2.Identity), "the user's dataset stays as it is"
        found += [part.results["val"] for part in callbacks]
    assert counts == [dict.fromkeys(range(9, 30), 1)] * 9
    # 4 draws of 21 images, in the second of three epochs
    assert draws == [0, 0, 0, 0, 84, 84, 84, 168, 168]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
    assert torch.equal(found[0].merged, found[1].merged)


class Deaf(Photos):
    """Has a `transform` and does not use it."""

    def __getitem__(self, index: int) -> Any:
        return self.images[index], self.targets[index]


class Shifted(Module):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + 1, batch[1]


@pytest.mark.parametrize(
    ("module", "dataset", "options", "message"),
    [
        (lambda: Module(call="normalised"), Photos, {}, "between the loader and the network"),
        (Shifted, Photos, {}, "between the loader and the network"),
        (Module, Deaf, {}, "Deaf has a `transform` and does not call it"),
        (Module, lambda *_: TensorDataset(*images_and_targets()), {}, "TensorDataset has none"),
        (Module, Photos, {"shuffle": True}, "without shuffling"),
    ],
)
@pytest.mark.filterwarnings("ignore:Your `test_dataloader`'s sampler has shuffling")
def test_tta__random_views_are_refused_where_they_would_be_wrong(
    module: Callable[[], Module], dataset: Any, options: dict[str, Any], message: str
) -> None:
    trainer = trainer_with(TTAEval("random", augmentation=AUGMENT, figure=False))
    with pytest.raises(MisconfigurationException, match=message):
        trainer.test(module(), DataLoader(dataset(9, v2.Identity()), batch_size=4, **options), verbose=False)
    assert "process_dataloader" not in vars(trainer.strategy)


# --- during fit ------------------------------------------------------------------------------------------------------


class Recorder(pl.Callback):
    """The result of each validation that had TTA metrics, by its epoch."""

    def __init__(self, tta: TTAEval) -> None:
        self.tta, self.results = tta, {}  # type: ignore[var-annotated]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        result = self.tta.results.get("val")
        if result is not None and all(result is not earlier for earlier in self.results.values()):
            self.results[trainer.current_epoch] = result


class PlanWithoutFreezing(Conductor):
    """Stands in for the owner of a plan: announces the stages at their first epochs."""

    def __init__(self, stages: list[Stage]) -> None:
        super().__init__()
        self.stages = stages

    def current_run(self, trainer: pl.Trainer) -> StageRun:
        start = 0
        for index, stage in enumerate(self.stages):
            if trainer.current_epoch < start + stage.num_epochs:
                return StageRun(index, stage, start, 0)
            start += stage.num_epochs
        raise AssertionError("past the plan")

    def finish_stage(self, trainer: pl.Trainer, pl_module: Any, *, asked_to: bool, next_epoch: int) -> None:
        super().finish_stage(trainer, pl_module, asked_to=asked_to, next_epoch=next_epoch)
        self.progress = self.progress.next(next_epoch, trainer.global_step)


@pytest.mark.parametrize(
    ("every", "stages", "expected"),
    [
        ("stage_end", None, [5]),
        (2, None, [1, 3, 5]),
        ("stage_end", [Stage("a", epochs=2), Stage("b", epochs=4)], [1, 5]),
        ("stage_end", [Stage("a", train="head", epochs=2, precompute=True), Stage("b", epochs=4)], [5]),
        (1, [Stage("a", train="head", epochs=2, precompute=True), Stage("b", epochs=4)], [2, 3, 4, 5]),
        # cycles of 1 and 2 epochs, then one of 3: the stage may end after each of the first two
        (
            "stage_end",
            [Stage("a", cycle_len=1, cycle_mult=2, num_cycles=2, until="overfit"), Stage("b", epochs=3)],
            [0, 2, 5],
        ),
    ],
)
def test_tta__during_fit_runs_where_it_was_asked_to(every: Any, stages: Any, expected: list[int]) -> None:
    tta = TTAEval(every=every, figure=False)
    recorder = Recorder(tta)
    callbacks = [tta, recorder, *([] if stages is None else [PlanWithoutFreezing(stages)])]
    loader = load(*images_and_targets(8))
    trainer_with(*callbacks, max_epochs=6, num_sanity_val_steps=1).fit(Module(), loader, loader)
    assert list(recorder.results) == expected


def test_tta__leaves_training_as_it_is() -> None:
    weights = []
    for callbacks in ([], [TTAEval("d4", every=1, figure=False)]):
        pl.seed_everything(0, verbose=False)
        module, loader = Module(), load(*images_and_targets(), shuffle=True)
        trainer_with(*callbacks, max_epochs=2).fit(module, loader, load(*images_and_targets()))
        weights.append(torch.cat([value.flatten().float() for value in module.state_dict().values()]))
    assert torch.equal(*weights)


class Snapshots(StageCallback):
    def __init__(self, snapshots: list[Path]) -> None:
        self.snapshots = snapshots


def test_tta__snapshots_answer_all_views(tmp_path: Path) -> None:
    module, (images, target) = Module(), images_and_targets()
    other = Module()
    with torch.no_grad():
        other.net[6].weight.neg_()
    paths = []
    for name, member in (("other", other), ("same", module)):
        paths.append(tmp_path / f"{name}.ckpt")
        torch.save({"state_dict": member.state_dict()}, paths[-1])
    tta = TTAEval("flip", beta=0.5, figure=False)
    trainer_with(tta, Snapshots(paths)).test(module, load(images, target), verbose=False)
    # the snapshot that equals the current weights is not counted twice
    members = [view_probs(member.net, [images, images.flip(-1)]).mean(0) for member in (module, other)]
    torch.testing.assert_close(tta.results["test"].merged.exp(), torch.stack(members).mean(0))
    torch.save({"state_dict": {"net.0.weight": torch.zeros(1)}}, paths[0])
    with pytest.raises(MisconfigurationException, match=r"other\.ckpt"):
        trainer_with(TTAEval(figure=False), Snapshots(paths)).test(module, load(images, target), verbose=False)


class CallsItself(Module):
    """Its steps call `self(images)`, as `CosineRestarts(ensemble=True)` needs."""

    def __init__(self) -> None:
        super().__init__(call="self")


@pytest.mark.parametrize("ensemble", [False, True])
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
def test_tta__snapshots_of_cosine_restarts_times_views(tmp_path: Path, ensemble: bool) -> None:
    module, (images, target) = CallsItself(), images_and_targets(40)
    restarts = CosineRestarts(cycle_len=1, snapshots=True, ensemble=ensemble)
    tta = TTAEval(["hflip", "vflip"], on=["test"], figure=False)
    options = {"enable_checkpointing": True, "default_root_dir": tmp_path, "max_epochs": 3}
    trainer = trainer_with(restarts, tta, ModelCheckpoint(tmp_path), **options)
    trainer.fit(module, load(images, target), load(images, target))
    assert len(restarts.snapshots) == 3
    with torch.no_grad():  # none of the snapshots is the module as it is
        module.net[6].weight.add_(0.3)
    trainer.test(module, load(images, target), verbose=False)

    views = [images, images.flip(-1), images.flip(-2)]
    own = view_probs(module.net, views)
    members = []
    for path in restarts.snapshots:
        member = CallsItself()
        member.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        members.append(view_probs(member.net, views))
    shots = torch.stack(members)
    plain = shots[:, 0].mean(0) if ensemble else own[0]
    merged = (shots if ensemble else torch.stack([own, *members])).mean((0, 1))
    assert (shots[0] - shots[1]).abs().max() > 1e-3, "the case shows nothing"
    torch.testing.assert_close(tta.results["test"].plain.exp(), plain)
    torch.testing.assert_close(tta.results["test"].merged.exp(), merged)
    assert "forward" not in vars(module)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


# --- the picture -----------------------------------------------------------------------------------------------------


class Named(pl.LightningDataModule):
    class_names = ("ants", "bees", "wasps")

    def test_dataloader(self) -> DataLoader[Any]:
        return load(*images_and_targets(60))


def test_tta__picture_has_the_class_names_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(tta_module, "plot_flips", lambda result, images, classes, title: found.append(classes))
    monkeypatch.setattr(tta_module, "save_figure", lambda *_: None)
    trainer_with(TTAEval()).test(Module(), datamodule=Named(), verbose=False)
    dataset = TensorDataset(*images_and_targets(60))
    dataset.classes = ["a", "b", "c"]  # type: ignore[attr-defined]
    trainer_with(TTAEval()).test(Module(), DataLoader(Subset(dataset, range(9)), batch_size=8), verbose=False)
    assert found == [["ants", "bees", "wasps"], ["a", "b", "c"]]


@pytest.mark.pictures
def test_tta__writes_its_picture_beside_the_checkpoints(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    from PIL import Image

    checkpoint = ModelCheckpoint(dirpath=tmp_path / "checkpoints")
    trainer = trainer_with(TTAEval(), checkpoint, enable_checkpointing=True)
    trainer.test(Module(), load(*images_and_targets(60)), verbose=False)
    with Image.open(tmp_path / "checkpoints" / "tta.png") as picture:
        assert picture.width > 800


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ([Stage("a", epochs=2), Stage("b", train="head", precompute=True, epochs=1), Stage("c", epochs=9)], [1, 4]),
        (None, [4]),
    ],
    ids=["stages", "no stages"],
)
def test_tta__draws_once_in_a_stage_a_validation_and_a_test(
    stages: Any, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(tta_module, "plot_flips", lambda result, *_: drawn.append(result))
    monkeypatch.setattr(tta_module, "save_figure", lambda *_: None)
    tta, loader = TTAEval(every=1), load(*images_and_targets())
    recorder = Recorder(tta)
    callbacks = [tta, recorder, StopsAfter(4), *([] if stages is None else [PlanWithoutFreezing(stages)])]
    trainer = trainer_with(*callbacks, max_epochs=12)
    trainer.fit(Module(), loader, loader)
    assert list(recorder.results) == ([0, 1, 3, 4] if stages else [0, 1, 2, 3, 4])
    assert [epoch for result in drawn for epoch, at in recorder.results.items() if at is result] == expected
    trainer.validate(Module(), loader, verbose=False)
    trainer.test(Module(), loader, verbose=False)
    assert len(drawn) == len(expected) + 2
    assert drawn[-2] is tta.results["val"]
    assert drawn[-1] is tta.results["test"]


# --- several processes -----------------------------------------------------------------------------------------------


class Still(Module):
    """Trains nothing, so that each rank has the same module in each run."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.logits(batch)

    test_step = validation_step


class TellsEachRank(StageCallback):
    order = 99

    def __init__(self, tta: TTAEval, folder: Path) -> None:
        self.tta, self.folder = tta, folder

    def tell(self, trainer: pl.Trainer, name: str) -> None:
        result = self.tta.results[name]
        told = {
            "index": result.index.tolist(),
            "merged": result.merged.double().tolist(),
            "metrics": result.metrics,
            "logged": {key: value.item() for key, value in trainer.callback_metrics.items() if "tta" in key},
            "fixed": result.index[result.correct & ~result.correct_plain].tolist(),
            "broken": result.index[~result.correct & result.correct_plain].tolist(),
        }
        (self.folder / f"{name}-{trainer.world_size}-{trainer.global_rank}.json").write_text(json.dumps(told))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.tell(trainer, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.tell(trainer, "test")


@pytest.mark.ddp
@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
def test_tta__is_the_same_on_one_two_and_three_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """103 samples: two ranks take 52 each, three take 35 each, so one or two samples are repeated."""
    size, stem = 103, {"name": "none"}

    def names_of_pictures(result: Any, images: Any, *_: Any) -> Figure:
        (tmp_path / f"{stem['name']}-sheet.json").write_text(json.dumps(sorted(images)))
        return Figure()

    monkeypatch.setattr(tta_module, "plot_flips", names_of_pictures)
    net = small_net()
    net[1] = nn.Identity()  # training moves BatchNorm's statistics
    module = Still(net)
    evaluation = Photos(size, v2.Identity())
    for ranks in (1, 2, 3):
        stem["name"] = str(ranks)
        options = {"devices": ranks, "strategy": "ddp_fork" if ranks > 1 else "auto", "max_epochs": 1}
        tta = TTAEval("d4")
        training, loader = load(*images_and_targets(6)), DataLoader(evaluation, batch_size=8)
        trainer_with(tta, TellsEachRank(tta, tmp_path), **options).fit(module, training, loader)
        random = TTAEval("random", num_random=2, augmentation=AUGMENT, figure=False)
        trainer_with(random, TellsEachRank(random, tmp_path), **options).test(module, loader, verbose=False)
    one = {kind: json.loads((tmp_path / f"{kind}-1-0.json").read_text()) for kind in ("val", "test")}
    flips = one["val"]["fixed"], one["val"]["broken"]
    assert max(map(len, flips)) > 6, "the sheet would hold them all"
    for ranks in (1, 2, 3):
        sheet = json.loads((tmp_path / f"{ranks}-sheet.json").read_text())
        assert set(sheet) >= {*flips[0][:6], *flips[1][:6]}, "the first of the set, as with one rank"
        assert len(sheet) <= 12 * ranks
    for kind, first in one.items():
        assert first["index"] == list(range(size))
        assert f"{kind}_tta_fixed" in first["logged"]
        for ranks, rank in ((2, 0), (2, 1), (3, 0), (3, 1), (3, 2)):
            other = json.loads((tmp_path / f"{kind}-{ranks}-{rank}.json").read_text())
            assert other["index"] == first["index"]
            torch.testing.assert_close(torch.tensor(other["merged"]), torch.tensor(first["merged"]))
            assert other["metrics"] == pytest.approx(first["metrics"], rel=1e-6, abs=1e-6)
            assert other["logged"] == pytest.approx(first["logged"], rel=1e-6, abs=1e-6)


def test_merge_views__is_public_here() -> None:
    assert merge_views(torch.zeros(2, 1, 2)).exp().tolist() == [[0.5, 0.5]]


# --- what outputs and targets mean -----------------------------------------------------------------------------------


class Ended(pl.LightningModule):
    """Ends in `end`; logs its own accuracy, by its own reading of its outputs."""

    def __init__(self, end: nn.Module, num_outputs: int, right: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.right = nn.Sequential(nn.Flatten(), nn.Linear(192, num_outputs), end), right

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", self.right(self(batch[0]), batch[1]).float().mean())

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch[0])


@pytest.mark.parametrize("num_outputs", [1, 4])
def test_tta__probabilities_of_a_sigmoid_are_merged_as_they_are(num_outputs: int) -> None:
    images = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    module = Ended(nn.Sigmoid(), num_outputs, lambda probs, target: (probs > 0.5).long() == target)
    with torch.no_grad():
        probs, flipped = module(images), module(images.flip(-1))
        target = ((probs + 0.3 * torch.randn(probs.shape)) > 0.5).long()
    tta = TTAEval("flip", figure=False)
    (logged,) = trainer_with(tta).validate(module, load(images, target, batch_size=16), verbose=False)
    merged = (probs + flipped) / 2
    assert logged["val_acc_plain"] == pytest.approx(logged["val_acc"]) != 1
    assert logged["val_acc_tta"] == pytest.approx(((merged > 0.5) == target).float().mean().item())
    torch.testing.assert_close(tta.results["val"].merged.exp(), merged, rtol=1e-5, atol=1e-6)
    assert logged["val_nll_tta"] == pytest.approx(F.binary_cross_entropy(merged, target.float()).item(), rel=1e-4)
    batches: Any = trainer_with(tta).predict(module, load(images, target, batch_size=16))
    torch.testing.assert_close(torch.cat([batch["probs"] for batch in batches]), merged, rtol=1e-5, atol=1e-6)


def test_tta__one_hot_targets_are_classes() -> None:
    module, (images, target) = Module(), images_and_targets(40)
    one_hot, numbers = TTAEval(figure=False), TTAEval(figure=False)
    module.val_acc = None  # type: ignore[assignment]
    module.loss = None
    trainer_with(one_hot).test(module, load(images, torch.eye(CLASSES)[target]), verbose=False)
    trainer_with(numbers).test(module, load(images, target), verbose=False)
    assert one_hot.results["test"].metrics == numbers.results["test"].metrics
    assert one_hot.results["test"].activation == "softmax"


def test_tta__warns_where_the_module_counts_otherwise() -> None:
    images, target = images_and_targets(40)
    # the module's classes are the smallest outputs: nothing in them says so
    module = Ended(nn.Identity(), CLASSES, lambda outputs, labels: outputs.argmin(1) == labels)
    with torch.no_grad():
        target = module(images).argmin(1)
    with pytest.warns(UserWarning, match=r"0\.000 without augmentation, and the module logs val_acc=1\.000"):
        trainer_with(TTAEval(figure=False)).validate(module, load(images, target), verbose=False)


# --- early, and never fatal late -------------------------------------------------------------------------------------


class Refused(Module):
    """Called in a way that nobody can watch, from an epoch on."""

    def __init__(self, from_epoch: int = 0) -> None:
        super().__init__()
        self.from_epoch, self.teacher = from_epoch, small_net()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.trainer.current_epoch >= self.from_epoch:
            self.teacher(batch[0])


def test_tta__what_cannot_work_is_said_before_training() -> None:
    loader, module = load(*images_and_targets()), Refused()
    trainer = trainer_with(TTAEval(figure=False), max_epochs=3, num_sanity_val_steps=1)
    with pytest.raises(MisconfigurationException, match="saw 2 of them"):
        trainer.fit(module, loader, loader)
    assert trainer.global_step == 0
    for refused, options, message in (
        (Module(), {"views": "d4"}, "square"),
        (Module(), {"target": "species"}, "no target"),
        (Module(), {"views": ["hflip", lambda images: images[:, :1]]}, "channels"),
    ):
        rectangles = load(torch.rand(8, 3, 8, 6), torch.zeros(8, dtype=torch.long))
        trainer = trainer_with(TTAEval(figure=False, **options), max_epochs=3, num_sanity_val_steps=1)
        with pytest.raises((MisconfigurationException, RuntimeError), match=message):
            trainer.fit(refused, rectangles, rectangles)
        assert trainer.global_step == 0
    assert not any(part._forward_hooks for part in module.modules())


@pytest.mark.parametrize(("from_epoch", "num_sanity_val_steps"), [(2, 1), (0, 0)])
def test_tta__what_fails_in_a_fit_is_a_warning(from_epoch: int, num_sanity_val_steps: int) -> None:
    loader, module, tta = load(*images_and_targets()), Refused(from_epoch), TTAEval(figure=False)
    trainer = trainer_with(tta, max_epochs=3, num_sanity_val_steps=num_sanity_val_steps)
    with pytest.warns(UserWarning, match=r"augments no more in this fit, which goes on: Misconf.*saw 2 of them"):
        trainer.fit(module, loader, loader)
    assert trainer.current_epoch == 3
    assert tta.results == {}
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


@pytest.mark.parametrize(("every_epochs", "max_epochs", "expected"), [(2, 5, [3]), (3, 9, [8]), (2, 6, [5])])
def test_tta__augments_the_last_validation_that_there_is(
    every_epochs: int, max_epochs: int, expected: list[int]
) -> None:
    tta, loader = TTAEval(figure=False), load(*images_and_targets(8))
    recorder = Recorder(tta)
    trainer = trainer_with(tta, recorder, max_epochs=max_epochs, check_val_every_n_epoch=every_epochs)
    trainer.fit(Module(), loader, loader)
    assert list(recorder.results) == expected


# --- two of them -----------------------------------------------------------------------------------------------------


def test_tta__two_of_them_have_names_of_their_own(tmp_path: Path) -> None:
    module, (images, target) = Module(), images_and_targets(30)
    flips, turns = TTAEval("flip"), TTAEval("d4")
    checkpoint = ModelCheckpoint(dirpath=tmp_path)
    trainer = trainer_with(flips, turns, checkpoint, enable_checkpointing=True, max_epochs=1)
    trainer.fit(module, load(images, target), load(images, target))
    assert {path.name for path in tmp_path.glob("*.png")} == {"tta.png", "tta_2.png"}
    (logged,) = trainer.validate(module, load(images, target), verbose=False)
    views = [torch.rot90(part, turns, (-2, -1)) for part in (images, images.flip(-1)) for turns in range(4)]
    probs = view_probs(module.net, views)
    for word, merged in (("tta", (probs[0] + probs[4]) / 2), ("tta_2", probs.mean(0))):
        right = (merged.argmax(1) == target).float().mean().item()
        assert logged[f"val_acc_{word}"] == pytest.approx(right)
        assert logged[f"val_{word}_gain"] == pytest.approx(right - logged["val_acc_plain"], abs=1e-6)
    batches: Any = trainer.predict(module, load(images, target))
    torch.testing.assert_close(torch.cat([batch["output"]["probs"] for batch in batches]), (probs[0] + probs[4]) / 2)
    torch.testing.assert_close(torch.cat([batch["probs"] for batch in batches]), probs.mean(0))
