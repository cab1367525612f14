"""The oracle is the plain run: the same module, the same plan, the same seed, and no store."""

from __future__ import annotations

import copy
import errno
import pickle
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)
from torchvision.transforms import v2

from lightning_unfreeze.callbacks import precompute
from lightning_unfreeze.callbacks.base import StageCallback
from lightning_unfreeze.callbacks.lr_finder import LRFinderPerStage
from lightning_unfreeze.callbacks.precompute import PrecomputeFeatures
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.data.loaders import EpochSampler, KeyedDataset, ResumableLoader
from lightning_unfreeze.features import resident as resident_module
from lightning_unfreeze.features import store as feature_store
from lightning_unfreeze.features.fill import FeaturePass
from lightning_unfreeze.features.resident import ResidentStore
from lightning_unfreeze.features.store import FeatureStore
from lightning_unfreeze.layers.groups import layer_groups
from lightning_unfreeze.recipe.costs import plan_costs
from lightning_unfreeze.stages.plan import Stage
from tests.zoo import (
    Images,
    Raises,
    Saves,
    SmallNet,
    Stream,
    TrainData,
    UserModule,
    checkpoint_at,
    loader,
    quiet_trainer,
    random_images,
    same_weights,
    weights_of,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
]


def ordered(dataset: Any = None, batch_size: int = 8, seed: int = 3) -> ResumableLoader:
    data = KeyedDataset(random_images() if dataset is None else dataset, seed=0)
    return ResumableLoader(data, batch_size=batch_size, sampler=EpochSampler(data, seed=seed))


def head_stage(precompute: bool, epochs: int = 3) -> list[Stage]:
    return [Stage("head", train="head", epochs=epochs, precompute=precompute)]


def fit(
    store: Path | None,
    module: pl.LightningModule | None = None,
    train: Any = None,
    val: Any = None,
    stages: list[Stage] | None = None,
    callbacks: list[Callback] | None = None,
    options: dict[str, Any] | None = None,
    ckpt_path: Any = None,
    **trainer_options: Any,
) -> tuple[pl.LightningModule, pl.Trainer]:
    """A fit with stored features in `store`, or the plain one with None."""
    if module is None:
        torch.manual_seed(0)
        module = UserModule()
    torch.manual_seed(7)
    stages = head_stage(store is not None) if stages is None else stages
    callback = PrecomputeFeatures(**{"store_dir": store, "policy": "always", **(options or {})})
    trainer = quiet_trainer([GradualUnfreeze(stages), callback, *(callbacks or [])], **trainer_options)
    trainer.fit(module, ordered() if train is None else train, val, ckpt_path=ckpt_path)
    return module, trainer


def stores(folder: Path, name: str = "train") -> list[Path]:
    return sorted(folder.glob(f"*-{name}/manifest.json")) if folder.exists() else []


class FirstLayerInputs(Callback):
    """Counts the images that really go through the first convolution."""

    def __init__(self) -> None:
        self.images = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        first = next(part for part in pl_module.modules() if isinstance(part, nn.Conv2d))
        self.images = 0
        first.register_forward_hook(lambda _, inputs, __: setattr(self, "images", self.images + len(inputs[0])))


# --- equality --------------------------------------------------------------------------------------------------------

FAMILIES: dict[str, dict[str, Any]] = {
    "test_resnet": {},
    "test_convnext": {},
    "test_vit": {"img_size": 32},
    "test_efficientnet": {},
    "mobilenetv2_035": {},
    "mobilenetv3_small_050": {},
    "swin_tiny_patch4_window7_224": {
        "img_size": 32,
        "embed_dim": 16,
        "depths": (1, 1, 1),
        "num_heads": (1, 2, 2),
        "window_size": 4,
    },
    "densenet121": {"growth_rate": 4, "block_config": (2, 2)},
    "regnetx_002": {},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_precompute__three_stages_give_the_weights_of_the_plain_run(name, tmp_path):
    def network() -> UserModule:
        torch.manual_seed(1)
        return UserModule(timm.create_model(name, num_classes=3, **FAMILIES[name]), optimizer="sgd")

    groups = list(layer_groups(network()))
    train: list[Any] = ["head", max(2, len(groups) // 2), len(groups) - 1]
    assert train[1] < train[2]

    def plan(precompute: bool) -> list[Stage]:
        return [Stage(f"s{i}", train=which, epochs=1, precompute=precompute) for i, which in enumerate(train)]

    data = random_images(num=12, size_px=32)
    plain, _ = fit(None, network(), ordered(data, 4), stages=plan(False))
    stored, _ = fit(tmp_path, network(), ordered(data, 4), stages=plan(True))
    assert len(stores(tmp_path)) == 3
    assert same_weights(weights_of(plain), weights_of(network())) != []
    assert same_weights(weights_of(plain), weights_of(stored)) == []


class HeadOfBackbone(UserModule):
    def training_step(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.backbone(x)), y)


class TimmHalves(UserModule):
    def __init__(self) -> None:
        super().__init__(timm.create_model("test_resnet", num_classes=3))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net.forward_head(self.net.forward_features(x)), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self.net.forward_head(self.net.forward_features(x))
        self.log("val_loss", nn.functional.cross_entropy(logits, y))


@pytest.mark.parametrize("style", [HeadOfBackbone, TimmHalves, UserModule])
def test_precompute__steps_in_three_styles_run_unmodified(style, tmp_path):
    def run(store: Path | None) -> tuple[dict[str, torch.Tensor], dict[str, float], int]:
        torch.manual_seed(1)
        counter = FirstLayerInputs()
        data = random_images(size_px=32)
        module, trainer = fit(store, style(), ordered(data), loader(data), callbacks=[counter])
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        return weights_of(module), metrics, counter.images

    (plain, plain_metrics, plain_images), (stored, metrics, images) = run(None), run(tmp_path)
    assert same_weights(plain, stored) == []
    assert metrics == plain_metrics
    # 3 epochs of 24 training images and 24 validation images; with stores the pass over the latter is all that is left,
    # with the search for the shortcut before it
    assert plain_images == 3 * 48
    assert images < plain_images / 2


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
        {"limit_train_batches": 2},
        {"limit_val_batches": 1},
        {"val_check_interval": 0.34},
        {"reload_dataloaders_every_n_epochs": 1},
        {"num_sanity_val_steps": 1},
        {"gradient_clip_val": 0.1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_precompute__trainer_options_change_nothing(options, tmp_path):
    # a plain loader draws a number from the global generator whenever it is iterated over, a stored one does not
    plain, _ = fit(None, val=loader(generator=torch.Generator()), **options)
    stored, _ = fit(tmp_path, val=loader(generator=torch.Generator()), **options)
    assert len(stores(tmp_path)) == 1
    assert same_weights(weights_of(plain), weights_of(stored)) == []


def test_precompute__fast_dev_run_writes_no_store(tmp_path):
    plain, _ = fit(None, fast_dev_run=True)
    stored, _ = fit(tmp_path, fast_dev_run=True)
    assert same_weights(weights_of(plain), weights_of(stored)) == []
    assert list(tmp_path.iterdir()) == []


def test_precompute__channels_last_gives_the_weights_of_the_plain_run(tmp_path):
    def module() -> UserModule:
        torch.manual_seed(0)
        return UserModule().to(memory_format=torch.channels_last)

    plan = [Stage("top", train=2, epochs=2)]
    plain, _ = fit(None, module(), stages=plan)
    stored, _ = fit(tmp_path, module(), stages=[Stage("top", train=2, epochs=2, precompute=True)])
    assert len(stores(tmp_path)) == 1
    assert same_weights(weights_of(plain), weights_of(stored)) == []


@pytest.mark.parametrize(("dtype", "digits"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_precompute__a_lower_precision_rounds_the_features_and_no_more(dtype, digits, tmp_path):
    plain, _ = fit(None, stages=head_stage(False, epochs=1))
    stored, _ = fit(tmp_path, stages=head_stage(True, epochs=1), options={"dtype": dtype})
    manifest = stores(tmp_path)[0].read_text()
    assert f'"dtype": "{dtype}"' in manifest
    differing = same_weights(weights_of(plain), weights_of(stored))
    assert differing
    assert {name.split(".")[0] for name in differing} <= {"net", "head"}
    weight, other = plain.head[2].weight, stored.head[2].weight
    assert float((weight - other).detach().abs().max()) < 20 * digits * float(weight.detach().abs().max())


def test_precompute__alone_the_whole_fit_is_one_stage(tmp_path):
    def run(callbacks: list[Callback]) -> pl.LightningModule:
        torch.manual_seed(0)
        module = UserModule()
        module.backbone.requires_grad_(False).eval()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found .* module.* in eval mode")
            quiet_trainer(callbacks, max_epochs=3).fit(module, ordered())
        return module

    counter = FirstLayerInputs()
    plain, stored = run([]), run([PrecomputeFeatures(tmp_path, policy="always"), counter])
    assert len(stores(tmp_path)) == 1
    assert counter.images == 0 or counter.images < 144
    assert same_weights(weights_of(plain), weights_of(stored)) == []


# --- loaders ---------------------------------------------------------------------------------------------------------


class SeenLoaders(Callback):
    def __init__(self) -> None:
        self.batches: list[tuple[int, tuple[int, ...]]] = []
        self.datasets: list[str] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append((trainer.current_epoch, tuple(batch[0].shape)))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.datasets.append(type(trainer.train_dataloader.dataset).__name__)


@pytest.mark.filterwarnings("ignore:.*without stored features:UserWarning")
def test_precompute__alone_a_fit_after_an_error_announces_its_stage_again(tmp_path):
    class Counts(StageCallback):
        started = 0

        def on_stage_start(self, *_: Any) -> None:
            self.started += 1

    leads, counts = PrecomputeFeatures(store_dir=tmp_path), Counts()
    with pytest.raises(RuntimeError, match="on purpose"):
        quiet_trainer([leads, counts, Raises(1, RuntimeError("on purpose"))], max_epochs=1).fit(UserModule(), loader())
    quiet_trainer([leads, counts], max_epochs=1).fit(UserModule(), loader())
    assert counts.started == 2


def test_precompute__lightning_asks_for_the_loaders_of_each_stage(tmp_path):
    seen = SeenLoaders()
    plan = [
        Stage("images", train="head", epochs=1),
        Stage("head", train="head", epochs=1, precompute=True),
        Stage("top", train=2, epochs=1, precompute=True),
        Stage("all", epochs=1),
    ]
    _, trainer = fit(tmp_path, val=loader(), stages=plan, callbacks=[seen])
    assert seen.datasets == ["KeyedDataset", "FeatureDataset", "FeatureDataset", "KeyedDataset"]
    image, pooled, middle = (8, 3, 12, 12), (8, 6, 1, 1), (8, 4, 5, 5)
    assert [shape for _, shape in seen.batches] == [image] * 3 + [pooled] * 3 + [middle] * 3 + [image] * 3
    assert type(trainer.fit_loop._data_source).__name__ == "_DataLoaderSource"
    assert type(trainer.fit_loop.epoch_loop.val_loop._data_source).__name__ == "_DataLoaderSource"


def test_precompute__loaders_asked_for_by_configure_optimizers_do_not_stay(tmp_path):
    class Asks(UserModule):
        def configure_optimizers(self) -> Any:
            assert self.trainer.estimated_stepping_batches == 9
            return super().configure_optimizers()

    seen = SeenLoaders()
    fit(tmp_path, Asks(), callbacks=[seen])
    assert set(seen.datasets) == {"FeatureDataset"}


def test_precompute__cached_batch_size_is_that_of_stored_stages(tmp_path):
    seen = SeenLoaders()
    plan = [Stage("head", train="head", epochs=1, precompute=True), Stage("all", epochs=1)]
    fit(tmp_path, stages=plan, callbacks=[seen], options={"cached_batch_size": 20})
    assert [shape[0] for _, shape in seen.batches] == [20, 4, 8, 8, 8]


def test_precompute__cached_batch_size_is_refused_beside_a_scheduler_that_counts_steps(tmp_path):
    class ByStep(UserModule):
        interval = "step"

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, int(self.trainer.estimated_stepping_batches))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}

    with pytest.raises(MisconfigurationException, match=r"cached_batch_size=4 .* StepLR that counts steps"):
        fit(tmp_path, ByStep(), options={"cached_batch_size": 4})
    module = ByStep()
    module.interval = "epoch"
    _, trainer = fit(tmp_path, module, stages=head_stage(True), options={"cached_batch_size": 4})
    assert trainer.global_step > 0


def test_precompute__evaluation_outside_of_fit_reads_images(tmp_path):
    class Shapes(UserModule):
        def test_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.shapes.append(tuple(batch[0].shape[1:]))
            return batch[1].float().mean()

        predict_step = test_step

    module, trainer = fit(tmp_path, Shapes(), val=loader())
    module.shapes = []
    trainer.validate(module, loader(), verbose=False)
    trainer.test(module, loader(), verbose=False)
    trainer.predict(module, loader())
    assert module.shapes == [(3, 12, 12)] * 6
    assert float(trainer.callback_metrics.get("val_loss", 1.0)) >= 0


def test_precompute__a_users_sampler_goes_on_choosing_the_rows(tmp_path):
    def weighted() -> DataLoader[Any]:
        weights = torch.arange(24) % 3 == 0  # rows of one third alone are drawn
        generator = torch.Generator().manual_seed(5)
        return loader(sampler=WeightedRandomSampler(weights.double(), 32, generator=generator))

    plain, _ = fit(None, train=weighted())
    stored, _ = fit(tmp_path, train=weighted())
    assert len(stores(tmp_path)) == 1
    assert same_weights(weights_of(plain), weights_of(stored)) == []


class DictStep(UserModule):
    """Batches are dicts with paths and extra tensors."""

    seen: tuple[Any, ...] = ()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        assert isinstance(batch["path"], list)
        self.seen = (*self.seen, *batch["path"])
        losses = nn.functional.cross_entropy(self.net(batch["image"]), batch["label"], reduction="none")
        return (losses * batch["meta"][1]).mean()


def test_precompute__dict_batches_with_paths_and_extra_tensors_keep_their_form(tmp_path):
    images, labels = random_images().tensors
    samples = [
        {"label": labels[i], "image": images[i], "meta": (i, torch.tensor(0.5 + i / 24)), "path": f"größe/{i}.jpg"}
        for i in range(24)
    ]
    plain, _ = fit(None, seeded(DictStep), train=ordered(samples))
    stored, _ = fit(tmp_path, seeded(DictStep), train=ordered(samples))
    assert len(stores(tmp_path)) == 1
    assert stored.seen == plain.seen and set(plain.seen) == {f"größe/{i}.jpg" for i in range(24)}
    assert same_weights(weights_of(plain), weights_of(stored)) == []


# --- refusals: training as usual, with the reason --------------------------------------------------------------------


class Blocks(BatchSampler):
    def __iter__(self) -> Any:
        yield from ([i, i + 1] for i in range(0, 24, 2))

    def __len__(self) -> int:
        return 12


def blocks() -> DataLoader[Any]:
    return DataLoader(random_images(), batch_sampler=Blocks([], 2, False))


def rows_in_blocks() -> DataLoader[Any]:
    return DataLoader(random_images(), batch_size=None, sampler=BatchSampler(range(23, -1, -1), 5, drop_last=True))


def mixup(samples: list[Any]) -> Any:
    return v2.MixUp(num_classes=3)(*torch.utils.data.default_collate(samples))


class NormalisesOnDevice(UserModule):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return (batch[0] - 0.5) / 0.25, batch[1]


class NormalisesChannels(UserModule):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] - torch.tensor([0.1, 0.2, 0.3])[:, None, None], batch[1]


class ToFloatInTheStep(UserModule):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step((batch[0].float() / 255, batch[1]), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step((batch[0].float() / 255, batch[1]), batch_idx)


class ToFloatOnTheDevice(UserModule):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0].float() / 255, batch[1]


class ToFloatInTheModel(UserModule):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x.float() / 255)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))


class ChannelsLast(UserModule):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step((batch[0].to(memory_format=torch.channels_last), batch[1]), batch_idx)


def bytes_of(images: TensorDataset) -> TensorDataset:
    return TensorDataset((images.tensors[0] * 60 + 128).clamp(0, 255).to(torch.uint8), images.tensors[1])


FED: dict[str, tuple[Any, Any]] = {
    "bytes, float in the step": (ToFloatInTheStep, lambda: ordered(bytes_of(random_images()))),
    "bytes, float on the device": (ToFloatOnTheDevice, lambda: ordered(bytes_of(random_images()))),
    "bytes, float in the model": (ToFloatInTheModel, lambda: ordered(bytes_of(random_images()))),
    "transfer hook": (NormalisesOnDevice, ordered),
    "transfer hook by channel": (NormalisesChannels, ordered),
    "channels_last in the step": (ChannelsLast, ordered),
    "batch sampler": (UserModule, blocks),
    "batches at once": (UserModule, rows_in_blocks),
}


@pytest.mark.parametrize("train", ["head", 2])
@pytest.mark.parametrize("case", FED)
def test_precompute__however_images_are_fed_the_weights_are_those_of_the_plain_run(case, train, tmp_path):
    kind, make = FED[case]

    def run(store: Path | None) -> pl.LightningModule:
        plan = [Stage("top", train=train, epochs=2, precompute=store is not None)]
        val = None if "batch" in case else loader(make().dataset.dataset)
        return fit(store, seeded(kind), train=make(), val=val, stages=plan)[0]

    plain, stored = run(None), run(tmp_path)
    assert len(stores(tmp_path)) == 1
    assert same_weights(weights_of(plain), weights_of(stored)) == []


class Augments(UserModule):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x + 0.1 * torch.randn_like(x)), y)


class NoLoss(UserModule):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor | None:
        return None if batch_idx == 0 else super().training_step(batch, batch_idx)


class FirstOfSeveral(UserModule):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch[0], batch_idx)


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "iterable": (UserModule, lambda: DataLoader(Stream(random_images()), batch_size=8), "iterable dataset"),
    "several": (FirstOfSeveral, lambda: [loader(), loader()], "not a single DataLoader"),
    "mixup": (UserModule, lambda: loader(collate_fn=mixup), "mixes the samples"),
    "random images": (
        UserModule,
        lambda: loader(Images(v2.RandomCrop(10))),
        "validation data has none to take",
    ),
    "augmenting step": (Augments, ordered, "something changes them on their way"),
    "no loss": (NoLoss, ordered, "returned no loss"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_precompute__what_cannot_be_stored_trains_as_usual_and_says_why(case, tmp_path):
    kind, make, reason = REFUSED[case]
    plain, _ = fit(None, seeded(kind), train=make(), stages=head_stage(False, 2))
    with pytest.warns(UserWarning, match=f"(?s)'head' reads its train images as usual.*{reason}"):
        stored, _ = fit(tmp_path, seeded(kind), train=make(), stages=head_stage(True, 2))
    assert list(tmp_path.iterdir()) == []
    if case not in ("mixup", "random images"):  # which draw from the global generator
        assert same_weights(weights_of(plain), weights_of(stored)) == []


class EpochsAtWarnings(Callback):
    """The epoch in which each line of `rank_zero_warn` of the callback was said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[tuple[int, str]] = []
        monkeypatch.setattr(
            precompute, "rank_zero_warn", lambda line: self.said.append((self.trainer.current_epoch, line))
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.trainer = trainer


def later_stages() -> list[Stage]:
    """The first reads images, the second asks for a store."""
    return [
        Stage("first", train="all", epochs=1),
        Stage("second", train="head", epochs=1, precompute=True),
    ]


@pytest.mark.parametrize("case", ["iterable", "several", "random images"])
def test_precompute__that_a_later_stage_cannot_be_stored_is_said_before_anything_trains(case, tmp_path, monkeypatch):
    kind, make, reason = REFUSED[case]
    watch = EpochsAtWarnings(monkeypatch)
    fit(tmp_path, seeded(kind), train=make(), stages=later_stages(), callbacks=[watch])
    (epoch, line), (late, _) = watch.said
    assert (epoch, late) == (0, 1)
    assert line.startswith("stage 'second' will read its images as usual, without stored features") and reason in line


def test_precompute__of_later_stages_that_can_be_stored_nothing_is_said(tmp_path, monkeypatch):
    watch = EpochsAtWarnings(monkeypatch)
    fit(tmp_path, train=loader(), stages=later_stages(), callbacks=[watch])
    assert watch.said == [] and len(stores(tmp_path)) == 1


class OwnNoise(Callback):
    """Changes the batch of every step, as a MixUp callback does."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        batch[0].add_(torch.randn_like(batch[0]))


@pytest.mark.parametrize("case", [*REFUSED, "own callback"])
@pytest.mark.parametrize("look", ["fast_dev_run", "plan"])
def test_precompute__that_a_stage_will_fall_back_is_said_without_a_fit(look, case, tmp_path, monkeypatch):
    """`fast_dev_run` and `plan` store nothing, and say of each stage what a fit says when it comes to it."""
    own = (UserModule, ordered, "OwnNoise.on_train_batch_start changes the batch")
    kind, make, reason = {**REFUSED, "own callback": own}[case]
    watch = EpochsAtWarnings(monkeypatch)
    callbacks = [watch, OwnNoise()] if case == "own callback" else [watch]
    if look == "fast_dev_run":
        fit(tmp_path, seeded(kind), train=make(), stages=later_stages(), callbacks=callbacks, fast_dev_run=True)
    else:
        player = PrecomputeFeatures(tmp_path, policy="always")
        trainer = quiet_trainer([GradualUnfreeze(later_stages()), player, *callbacks], limit_train_batches=2)
        watch.trainer = trainer
        plan_costs(trainer, seeded(kind), TrainData(make()))
    ((_, line),) = watch.said
    assert line.startswith("stage 'second' will read its images as usual, without stored features") and reason in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("look", ["fast_dev_run", "plan"])
def test_precompute__without_a_fit_nothing_is_said_of_stages_that_can_be_stored(look, tmp_path, monkeypatch):
    watch, module = EpochsAtWarnings(monkeypatch), seeded(UserModule)
    if look == "fast_dev_run":
        plain, _ = fit(None, seeded(UserModule), stages=head_stage(False), fast_dev_run=True)
        fit(tmp_path, module, stages=[*head_stage(True), *later_stages()], callbacks=[watch], fast_dev_run=True)
        assert same_weights(weights_of(plain), weights_of(module)) == []
    else:
        before = weights_of(module)
        trainer = quiet_trainer([GradualUnfreeze(later_stages()), PrecomputeFeatures(tmp_path), watch])
        watch.trainer = trainer
        plan_costs(trainer, module, TrainData(ordered()))
        assert same_weights(before, weights_of(module)) == []
    assert watch.said == [] and list(tmp_path.iterdir()) == []


def test_precompute__a_later_head_that_cannot_be_solved_is_refused_before_anything_trains(tmp_path):
    module, solved = UserModule(), Stage("second", train="head", precompute=True, solve=True)
    before = weights_of(module)
    with pytest.raises(MisconfigurationException, match=r"stage 'second': solve=True needs stored.*iterable dataset"):
        fit(tmp_path, module, train=REFUSED["iterable"][1](), stages=[*later_stages()[:1], solved])
    assert same_weights(before, weights_of(module)) == []


def seeded(kind: Any) -> Any:
    torch.manual_seed(0)
    return kind()


class ScaledValidation(UserModule):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step((2 * batch[0], batch[1]), batch_idx)


class OtherNetworkInValidation(UserModule):
    def __init__(self) -> None:
        super().__init__()
        self.other = [copy.deepcopy(self.net).requires_grad_(False)]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.other[0].eval()(batch[0]), batch[1]))


@pytest.mark.parametrize("kind", [ScaledValidation, OtherNetworkInValidation])
def test_precompute__a_validation_step_of_another_kind_reads_images(kind, tmp_path):
    plain, reference = fit(None, seeded(kind), val=loader())
    with pytest.warns(UserWarning, match=r"(?s)reads its val images as usual.*validation_step"):
        stored, trainer = fit(tmp_path, seeded(kind), val=loader())
    assert len(stores(tmp_path)) == 1 and stores(tmp_path, "val") == []
    assert same_weights(weights_of(plain), weights_of(stored)) == []
    assert trainer.callback_metrics["val_loss"] == reference.callback_metrics["val_loss"]


def test_precompute__several_validation_loaders_read_images(tmp_path):
    class Several(UserModule):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="reads its val images as usual.*a list, not a single DataLoader"):
        _, trainer = fit(tmp_path, seeded(Several), val=[loader(), loader()])
    assert len(stores(tmp_path)) == 1
    assert {"val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"} <= set(trainer.callback_metrics)


def test_precompute__overfit_batches_reads_images(tmp_path):
    with pytest.warns(UserWarning, match="overfit_batches"):
        fit(tmp_path, train=loader(), overfit_batches=1)
    assert list(tmp_path.iterdir()) == []


def test_precompute__a_step_that_augments_now_and_then_is_an_error_not_wrong_numbers(tmp_path):
    class FlipsThird(UserModule):
        calls = 0

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x, y = batch
            if self.trainer.current_epoch == 1:
                x = x.flip(1)
            return nn.functional.cross_entropy(self.net(x), y)

    module = seeded(FlipsThird)
    with pytest.raises(RuntimeError, match="changes the stored features on their way"):
        fit(tmp_path, module)
    assert all("forward" not in vars(part) for part in module.modules())


@pytest.mark.parametrize("num_views", [1, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_precompute__what_the_clock_says_changes_no_weight(num_views, shuffle, tmp_path, monkeypatch):
    def run(pays: bool) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(PrecomputeFeatures, "_pays", lambda *_: pays)
        train = loader(Images(v2.RandomCrop(10)), shuffle=shuffle)
        options = {"policy": "auto", "num_views": num_views}
        val = loader(Images(v2.CenterCrop(10)))
        module, _ = fit(tmp_path / str(pays), train=train, val=val, stages=head_stage(True, 4), options=options)
        return weights_of(module)

    assert same_weights(run(True), run(False)) == []
    assert len(stores(tmp_path / "True")) == 1 and stores(tmp_path / "False") == []


class Augmenting(UserModule):
    """Flips images on the device, in training alone."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x = batch[0] / 2
        return (x.flip(-1) if self.trainer.training and torch.rand(1) < 0.5 else x), batch[1]


def test_precompute__augmentation_on_the_device_is_in_the_views(tmp_path):
    seen, options = SeenFeatures(), {"num_views": 2}
    module, _ = fit(tmp_path, seeded(Augmenting), loader(), None, head_stage(True, 4), [seen], options)
    images, network = random_images().tensors[0] / 2, module.backbone.eval()
    plain, flipped = network(images).flatten(1), network(images.flip(-1)).flatten(1)
    epochs = [seen.epoch(number).flatten(1) for number in range(4)]
    torch.testing.assert_close(epochs[0], plain)
    assert torch.equal(epochs[2], epochs[0]) and torch.equal(epochs[3], epochs[1])
    is_flipped = [bool(torch.allclose(row, other, atol=1e-6)) for row, other in zip(epochs[1], flipped, strict=True)]
    is_plain = [bool(torch.allclose(row, other, atol=1e-6)) for row, other in zip(epochs[1], plain, strict=True)]
    assert all(one or other for one, other in zip(is_flipped, is_plain, strict=True))
    assert 4 <= sum(is_flipped) <= 20  # of 24, each by a coin of its own


class Mixes(Callback):
    def __init__(self, how: str, first_epoch: int = 0) -> None:
        self.how, self.first_epoch, self.calls = how, first_epoch, 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.calls += 1
        if trainer.current_epoch < self.first_epoch:
            return
        if self.how == "mix":
            batch[0] = 0.5 * batch[0] + 0.5 * batch[0].flip(0)
        else:
            batch[0][:, :, 2:6] = 0


@pytest.mark.parametrize("how", ["mix", "erase"])
def test_precompute__a_callback_that_changes_batches_gets_images(how, tmp_path):
    mixes = Mixes(how)
    plain, _ = fit(None, train=loader(), callbacks=[Mixes(how)])
    with pytest.warns(UserWarning, match="as usual.*Mixes.on_train_batch_start changes the batch"):
        stored, _ = fit(tmp_path, train=loader(), callbacks=[mixes])
    assert mixes.calls == 9  # what was tried at the start was taken back
    assert same_weights(weights_of(plain), weights_of(stored)) == []


@pytest.mark.parametrize("how", ["mix", "erase"])
def test_precompute__a_callback_that_changes_batches_later_is_an_error_that_names_it(how, tmp_path):
    with pytest.raises(RuntimeError, match="or on_train_batch_start of Mixes changes the stored features"):
        fit(tmp_path, train=loader(), callbacks=[Mixes(how, first_epoch=1)])


# --- stale keys ------------------------------------------------------------------------------------------------------


def shifted(image: torch.Tensor) -> torch.Tensor:
    return image + SHIFT


SHIFT = 0.25


def test_precompute__what_the_features_depend_on_is_in_the_key(tmp_path, monkeypatch):
    def run(change: str = "") -> None:
        torch.manual_seed(0)
        module = UserModule()
        with torch.no_grad():
            if change == "weights":
                module.backbone[0][0].weight[0, 0, 0, 0] += 1e-6
            if change == "running statistics":
                module.backbone[1][1].running_mean[0] += 1e-6
            if change == "head":
                module.head[2].weight += 1
        images, labels = random_images().tensors
        if change == "content":
            images = images.clone()
            images[23, 2, 11, 11] += 1e-6
        if change == "labels":
            labels = labels.flip(0)
        transform = {"transform": v2.Identity(), "function": shifted}.get(change, v2.Normalize([0.0], [1.0]))
        data: Any = Images(transform, TensorDataset(images, labels))
        if change in ("split", "other split"):
            data = Subset(data, list(range(16)) if change == "split" else list(range(8, 24)))
        fit(tmp_path, module, train=ordered(data), val=loader(Images(transform)), stages=plan)

    plan = head_stage(True, epochs=1)
    run()
    assert len(stores(tmp_path)) == 1
    run()
    run("head")
    assert len(stores(tmp_path)) == 1
    changes = ["weights", "running statistics", "content", "labels", "transform", "function", "split", "other split"]
    for number, change in enumerate(changes):
        run(change)
        assert len(stores(tmp_path)) == 2 + number, change
    monkeypatch.setitem(globals(), "SHIFT", 0.5)
    run("function")
    assert len(stores(tmp_path)) == 2 + len(changes)


def test_precompute__a_frozen_part_changed_by_a_hook_is_an_error(tmp_path):
    class Loads(UserModule):
        def on_train_start(self) -> None:
            with torch.no_grad():
                self.backbone[0][1].running_var.mul_(1.001)

    with pytest.raises(MisconfigurationException, match="frozen part were changed"):
        fit(tmp_path, seeded(Loads))


# --- damage ----------------------------------------------------------------------------------------------------------


def damage(folder: Path, how: str) -> None:
    directory = stores(folder)[0].parent
    tensor = max(directory.glob("tensor_*.bin"), key=lambda path: path.stat().st_size)
    data = bytearray(tensor.read_bytes())
    if how == "truncated":
        tensor.write_bytes(data[:-1])
    elif how == "bit":
        data[len(data) // 2] ^= 4
        tensor.write_bytes(data)
    elif how == "manifest":
        path = directory / "manifest.json"
        path.write_text(path.read_text().replace('"num_rows": 24', '"num_rows": 12'))
    elif how == "missing":
        tensor.unlink()


@pytest.mark.parametrize("how", ["truncated", "bit", "manifest", "missing"])
def test_precompute__a_damaged_store_is_computed_anew(how, tmp_path):
    first, _ = fit(tmp_path)
    damage(tmp_path, how)
    with pytest.warns(UserWarning, match="computed anew"):
        second, _ = fit(tmp_path)
    assert same_weights(weights_of(first), weights_of(second)) == []
    third, _ = fit(tmp_path)  # without a warning
    assert same_weights(weights_of(first), weights_of(third)) == []


def test_precompute__features_that_are_not_what_the_network_gives_are_computed_anew(tmp_path, monkeypatch):
    """As with a bug in a key: the file is whole and fits, and holds other numbers."""
    first, _ = fit(tmp_path)
    tensor = max(stores(tmp_path)[0].parent.glob("tensor_*.bin"), key=lambda path: path.stat().st_size)
    tensor.write_bytes(bytes(len(tensor.read_bytes())))
    monkeypatch.setattr(feature_store, "_verify", lambda *_: None)
    with pytest.warns(UserWarning, match="not what the network gives now"):
        second, _ = fit(tmp_path)
    assert same_weights(weights_of(first), weights_of(second)) == []


@pytest.mark.parametrize("failure", [errno.ENOSPC, errno.EROFS])
def test_precompute__without_a_place_to_write_it_trains_as_usual(failure, tmp_path, monkeypatch):
    def fails(*_: Any) -> Any:
        raise OSError(failure, "no")

    plain, _ = fit(None)
    monkeypatch.setattr(feature_store.os, "fsync", fails)
    with pytest.warns(UserWarning, match="as usual, without stored features: .*(is full|cannot be written)"):
        stored, _ = fit(tmp_path)
    assert same_weights(weights_of(plain), weights_of(stored)) == []
    assert list(tmp_path.glob("*-train")) == []


def test_precompute__a_finished_store_is_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    first, _ = fit(tmp_path)

    def refused(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(feature_store.filelock.FileLock, "acquire", refused)
    monkeypatch.setattr(feature_store.os, "utime", refused)
    second, _ = fit(tmp_path)
    assert same_weights(weights_of(first), weights_of(second)) == []


def test_precompute__an_image_that_cannot_be_read_leaves_no_half_store(tmp_path):
    class Broken(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            if index == 20:
                raise KeyError("a broken file")
            return super().__getitem__(index)

    with (
        pytest.warns(UserWarning, match="as usual, without stored features: KeyError: 'a broken file'"),
        pytest.raises(KeyError, match="a broken file"),
    ):
        fit(tmp_path, train=ordered(Broken(*random_images().tensors)), options={"data_fingerprint": "mine"})
    assert list(tmp_path.glob("*-train")) == []


def test_precompute__an_exception_leaves_nothing_on_the_network(tmp_path):
    class Fails(UserModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            if self.trainer.global_step == 4:
                raise RuntimeError("out of memory")
            return loss

    module = seeded(Fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(tmp_path, module)
    trainer, module._trainer = module.trainer, None
    assert all("forward" not in vars(part) for part in module.modules())
    assert type(trainer.fit_loop._data_source).__name__ == "_DataLoaderSource"
    images = random_images().tensors[0]
    copies = [copy.deepcopy(module.net), pickle.loads(pickle.dumps(module.net))]
    expected = module.net.eval()(images)
    assert all(torch.equal(other.eval()(images), expected) for other in copies)


# --- resume ----------------------------------------------------------------------------------------------------------


POINTS = [("batch_end", 0, 1), ("batch_end", 1, 1), ("epoch_end", 1, None), ("batch_end", 2, 0), ("batch_end", 3, 0)]


def resumable_fit(folder: Path, *callbacks: Callback, **options: Any) -> dict[str, torch.Tensor]:
    plan = [
        Stage("head", train="head", epochs=2, precompute=True),
        Stage("top", train=2, epochs=2, precompute=True),
        Stage("all", epochs=1),
    ]
    train = ordered(Images(v2.RandomHorizontalFlip()))
    val = loader(Images(v2.Identity()))
    module, _ = fit(
        folder / "store", None, train, val, plan, list(callbacks), {"num_views": 2}, options.get("ckpt_path")
    )
    return weights_of(module)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folder of a run with its stores and its checkpoints, and the weights at its end."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    weights = resumable_fit(folder)
    assert same_weights(weights, resumable_fit(folder, Saves(folder, *POINTS))) == []
    return folder, weights


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_precompute__a_resumed_run_ends_as_the_uninterrupted_one(point, uninterrupted):
    folder, weights = uninterrupted
    resumed = resumable_fit(folder, ckpt_path=checkpoint_at(folder, *point))
    assert same_weights(weights, resumed) == []


# --- views -----------------------------------------------------------------------------------------------------------


class SeenFeatures(Callback):
    def __init__(self) -> None:
        self.features: dict[int, list[torch.Tensor]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.features.setdefault(trainer.current_epoch, []).append(batch[0].clone())

    def epoch(self, number: int) -> torch.Tensor:
        return torch.cat(self.features[number])


def test_precompute__epoch_e_reads_view_e_modulo_the_number_of_views(tmp_path):
    def run(folder: str, seed: int = 0) -> SeenFeatures:
        seen = SeenFeatures()
        train = loader(Images(v2.RandomCrop(10)))  # in order, so that rows can be compared
        val = loader(Images(v2.CenterCrop(10)))
        options = {"num_views": 4, "seed": seed}
        fit(tmp_path / folder, train=train, val=val, stages=head_stage(True, 6), callbacks=[seen], options=options)
        return seen

    seen, again, other = run("a"), run("b"), run("c", seed=1)
    torch.manual_seed(0)
    backbone = UserModule().backbone.eval()
    center = v2.CenterCrop(10)(random_images().tensors[0])
    assert torch.allclose(seen.epoch(0), backbone(center), atol=1e-6)
    for one in range(4):
        assert torch.equal(seen.epoch(one), again.epoch(one))
        assert torch.equal(seen.epoch(one), other.epoch(one)) == (one == 0)
        for two in range(one):
            assert not torch.equal(seen.epoch(one), seen.epoch(two))
    assert torch.equal(seen.epoch(4), seen.epoch(0)) and torch.equal(seen.epoch(5), seen.epoch(1))


def test_precompute__views_that_no_epoch_reads_are_not_computed(tmp_path):
    data = Images(v2.RandomCrop(10))
    val = loader(Images(v2.CenterCrop(10)))
    fit(tmp_path, train=loader(data), val=val, stages=head_stage(True, 2), options={"num_views": 9})
    assert '"num_views": 2' in stores(tmp_path)[0].read_text()


def test_precompute__data_that_is_random_without_a_transform_is_refused(tmp_path):
    class Noisy(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            image, label = super().__getitem__(index)
            return image + 0.1 * torch.randn(3, 12, 12), label

    with pytest.warns(UserWarning, match="drawn at random even under the evaluation transform"):
        fit(tmp_path, train=ordered(Noisy(*random_images().tensors)))
    with pytest.warns(UserWarning, match="has no `transform` for eval_transform"):
        fit(tmp_path, options={"eval_transform": v2.Identity()})
    assert list(tmp_path.iterdir()) == []


# --- does it pay -----------------------------------------------------------------------------------------------------


class Slow(Images):
    """Reading takes 5 ms an image, far more than the small network."""

    def __getitem__(self, index: int) -> Any:
        time.sleep(0.005)
        return super().__getitem__(index)


@pytest.mark.parametrize(
    # seconds with a store: 24 * 0.006 for the pass, 0.0005 for each image of each epoch; without: 0.005 + 0.001 each
    ("epochs", "limit", "num_views", "pays"),
    [
        (20, 1.0, 1, True),
        (1, 1.0, 1, False),
        (2, 1.0, 1, True),
        (2, 1, 1, False),
        (2, 0.5, 1, False),
        (2, 1.0, 2, False),
    ],
)
def test_precompute__stores_only_if_that_is_quicker(epochs, limit, num_views, pays, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_unfreeze.features.estimate.step_seconds", lambda *_: (0.001, 0.0005))
    monkeypatch.setattr("lightning_unfreeze.features.estimate.seconds", lambda *_: 8 * 0.005)
    monkeypatch.setattr(FeaturePass, "seconds_per_image", lambda *_: 0.006)
    options = {"policy": "auto", "num_views": num_views}
    fit(tmp_path, stages=head_stage(True, epochs), options=options, limit_train_batches=limit)
    assert len(stores(tmp_path)) == int(pays)


def test_precompute__measures_what_the_pass_takes(tmp_path):
    """A store that saves the reading of twenty epochs pays on any machine."""
    fit(tmp_path, train=ordered(Slow()), stages=head_stage(True, 20), options={"policy": "auto"})
    assert len(stores(tmp_path)) == 1


def test_precompute__an_existing_store_always_pays(tmp_path):
    data, plan, seen = Slow(), head_stage(True, 1), SeenLoaders()
    fit(tmp_path, train=ordered(data), stages=plan)
    fit(tmp_path, train=ordered(data), stages=plan, options={"policy": "auto"}, callbacks=[seen])
    assert seen.datasets == ["FeatureDataset"]


# --- with the others -------------------------------------------------------------------------------------------------


def test_precompute__a_later_boundary_is_reached_from_the_store_of_an_earlier_one(tmp_path, monkeypatch):
    def plan(precompute: bool) -> list[Stage]:
        return [
            Stage("top", train=["1", "head"], epochs=1, precompute=precompute),
            Stage("head", train="head", epochs=2, precompute=precompute),
        ]

    sources = []
    original = FeaturePass._batches

    def batches(self: FeaturePass, view: int, rows: torch.Tensor, earlier: Any) -> Any:
        sources.append((self.prefix.boundary, earlier is not None))
        return original(self, view, rows, earlier)

    monkeypatch.setattr(FeaturePass, "_batches", batches)
    plain, _ = fit(None, stages=plan(False))
    stored, _ = fit(tmp_path, stages=plan(True))
    assert sources == [("net.backbone.0", False), ("net.backbone", True)]
    assert same_weights(weights_of(plain), weights_of(stored)) == []


def test_precompute__the_range_test_runs_on_stored_features(tmp_path):
    def run(store: Path | None) -> tuple[Any, pl.LightningModule]:
        finder = LRFinderPerStage(num_steps=20)
        plan = [Stage("head", train="head", epochs=1, precompute=store is not None, lr="find")]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*no signal.*")
            module, _ = fit(store, stages=plan, callbacks=[finder])
        return finder.results["head"], module

    (plain, plain_module), (stored, stored_module) = run(None), run(tmp_path)
    assert len(stores(tmp_path)) == 1
    assert plain.losses == stored.losses
    assert same_weights(weights_of(plain_module), weights_of(stored_module)) == []


@pytest.mark.parametrize(
    "options", [{"num_views": 0}, {"dtype": "int8"}, {"policy": "never"}, {"verify": "no"}, {"cached_batch_size": -1}]
)
def test_precompute__impossible_arguments_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        PrecomputeFeatures(**options)


class Held(Callback):
    """What the batches of a stage are read from."""

    store: Any = None

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.store = trainer.train_dataloader.dataset.store


@pytest.mark.parametrize("place", ["auto", "device", "disk"])
def test_precompute__trains_the_same_weights_wherever_the_rows_lie(tmp_path, place):
    plain, _ = fit(None)
    stored, _ = fit(tmp_path, options={"place": place}, callbacks=[held := Held()])
    assert same_weights(weights_of(plain), weights_of(stored)) == []
    assert isinstance(held.store, FeatureStore if place == "disk" else ResidentStore)


def test_precompute__more_than_its_share_of_the_memory_stays_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(resident_module, "free_memory", lambda: 24 * 6 * 4)
    fit(tmp_path, options={"memory_share": 0.1}, callbacks=[held := Held()])
    assert isinstance(held.store, FeatureStore)


@pytest.mark.parametrize("options", [{"place": "gpu"}, {"memory_share": 0.0}, {"memory_share": 1.5}])
def test_precompute__impossible_places_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        PrecomputeFeatures(**options)


# --- several processes -----------------------------------------------------------------------------------------------


def two_runs_child(folder: str, result: str) -> None:
    data = Slow()
    module, _ = fit(Path(folder), train=ordered(data))
    torch.save(weights_of(module), result)


def test_precompute__of_two_runs_at_once_one_writes_and_both_read(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    runs = [
        context.Process(target=two_runs_child, args=(str(tmp_path / "store"), str(tmp_path / f"{i}.pt")))
        for i in range(2)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join(120)
        assert run.exitcode == 0
    results = [torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in range(2)]
    assert same_weights(*results) == []
    assert len(stores(tmp_path / "store")) == 1


class FailsOnRank1(Images):
    def __getitem__(self, index: int) -> Any:
        if index >= 16 and torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            raise OSError("the disk of this rank is gone")
        return super().__getitem__(index)


@pytest.mark.ddp
def test_precompute__two_ranks_equal_one_process_on_the_same_global_batches(tmp_path):
    def run(folder: str, batch_size: int, **options: Any) -> pl.LightningModule:
        torch.manual_seed(0)
        module = UserModule(exact_net(), optimizer="sgd")
        plan = [
            Stage("head", train="head", epochs=2, precompute=True),
            Stage("top", train=2, epochs=2, precompute=True),
        ]
        train = ordered(Images(v2.RandomHorizontalFlip()), batch_size)
        val = loader(Images(v2.Identity()))
        fit(tmp_path / folder, module, train, val, plan, options={"num_views": 2}, **options)
        return module

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*use_distributed_sampler|.*sync_dist|.*fork")
        two = run("two", 4, strategy="ddp_fork", devices=2)
    one = run("one", 8)
    ours, theirs = stores(tmp_path / "one"), stores(tmp_path / "two")
    assert [path.parent.name for path in ours] == [path.parent.name for path in theirs]
    for pair in zip(ours, theirs, strict=True):
        for name in [path.name for path in pair[0].parent.glob("tensor_*.bin")]:
            # the views are the same on any number of ranks
            both = [bytearray((store.parent / name).read_bytes()) for store in pair]
            numbers = [torch.frombuffer(data, dtype=torch.float32) for data in both]
            torch.testing.assert_close(*numbers, rtol=0, atol=1e-6, equal_nan=True)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, rtol=0, atol=1e-5, msg=name)


def exact_net() -> SmallNet:
    """Without what depends on the rank: draws, and statistics of a batch."""
    net = SmallNet()
    net.backbone[0][1], net.backbone[1][1] = nn.GroupNorm(2, 4), nn.GroupNorm(2, 6)
    net.backbone[1][3].p = net.head[1].p = 0.0
    return net


@pytest.mark.ddp
def test_precompute__a_rank_that_fails_leaves_no_half_store_and_no_hang(tmp_path):
    with (
        warnings.catch_warnings(),
        suppress(Exception),  # the image is as broken in training
    ):
        warnings.simplefilter("ignore")
        train = ordered(FailsOnRank1(), 4)
        fit(tmp_path, train=train, strategy="ddp_fork", devices=2, limit_train_batches=1)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
