from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
import torchvision
from lightning.fabric.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, TensorDataset

from lightning_unfreeze.data.digits import DigitsData
from lightning_unfreeze.data.modules import ImageFolderData
from lightning_unfreeze.module import TransferClassifier
from lightning_unfreeze.module.digits_resnet import WEIGHTS
from lightning_unfreeze.module.tasks import MultiLabel, SingleLabel

MOBILENET = Path(__file__).parents[2] / "../shared/data/weights/mobilenetv2_035.keras_in1k.safetensors"


class Logits(torch.nn.Module):
    """A network that gives its input back as logits."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images * self.scale


class Labelled(pl.LightningDataModule):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.class_names, self.num_classes = names, len(names)
        images, labels = torch.randn(8, 1, 32, 32), torch.arange(8) % len(names)
        self.loader = DataLoader(TensorDataset(images, labels), batch_size=4)

    def train_dataloader(self) -> Any:
        return self.loader

    def val_dataloader(self) -> Any:
        return self.loader


def trainer(**kwargs: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return pl.Trainer(accelerator="cpu", enable_checkpointing=False, **quiet, **kwargs)


def digits(num_classes: int = 5, **kwargs: Any) -> TransferClassifier:
    return TransferClassifier("digits_resnet", num_classes, **kwargs)


@pytest.mark.parametrize(
    ("backbone", "shown"),
    [
        ("resnet81", "resnet18"),
        ("resnet18.a1_in2k", "resnet18.a1_in1k"),
        ("torchvision/resnet81", "torchvision/resnet18"),
        ("zzzzzzzzzz", "timm.list_models()"),
    ],
)
def test_backbone__unknown_name_is_refused_with_near_ones(backbone: str, shown: str) -> None:
    with pytest.raises(ValueError, match=f"'{backbone}' is unknown") as error:
        TransferClassifier(backbone, 3, pretrained=False)
    assert shown in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_classes": 1}, "num_classes=1"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"top_k": 1}, "top_k=1"),
        ({"pretrained": "no/such.pth"}, "no such file"),
    ],
)
def test_arguments__impossible_values_are_refused_by_name(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransferClassifier(**{"backbone": "digits_resnet", "num_classes": 5, **kwargs})


def test_pretrained__true_without_published_weights_is_refused() -> None:
    bare = next(name for name in timm.list_models("resnet*") if not timm.models.is_model_pretrained(name))
    with pytest.raises(ValueError, match=f"'{bare}': timm has no weights"):
        TransferClassifier(bare, 3)


def test_digits_resnet__pretrained_loads_the_packages_file_and_draws_the_head() -> None:
    torch.manual_seed(0)
    state = digits().model.state_dict()
    stored = load_file(WEIGHTS)
    assert set(state) - set(stored) == {"fc.weight", "fc.bias"}
    assert all(torch.equal(state[key], value) for key, value in stored.items())
    assert WEIGHTS.stat().st_size < 1_000_000
    assert not torch.equal(state["fc.weight"], digits().model.state_dict()["fc.weight"])


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("num_classes", [7, 1000])  # 1000 as timm expects of this network's own weights
def test_pretrained__file_is_loaded_all_but_the_head(
    num_classes: int, with_head: bool, suffix: str, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    source = timm.create_model("test_resnet", num_classes=num_classes).state_dict()
    stored = {key: value for key, value in source.items() if with_head or not key.startswith("fc.")}
    path = tmp_path / f"weights{suffix}"
    save_file(stored, path) if suffix == ".safetensors" else torch.save(stored, path)
    torch.manual_seed(2)
    loaded = TransferClassifier("test_resnet", num_classes, pretrained=str(path)).model.state_dict()
    for key, value in source.items():
        assert torch.equal(loaded[key], value) is not key.startswith("fc."), key


@pytest.mark.parametrize("backbone", ["test_vit", "torchvision/squeezenet1_1"])
def test_pretrained__file_that_lacks_the_networks_weights_is_refused(backbone: str) -> None:
    with pytest.raises(ValueError, match=rf"lacks \d+ weights of backbone='{backbone}'"):
        TransferClassifier(backbone, 3, pretrained=str(WEIGHTS))


@pytest.mark.parametrize("backbone", ["test_resnet", "torchvision/resnet18"])
def test_pretrained__file_of_other_shapes_is_refused_in_one_line(backbone: str) -> None:
    with pytest.raises(ValueError, match=f"does not fit backbone='{backbone}'") as error:
        TransferClassifier(backbone, 3, pretrained=str(WEIGHTS))
    assert "\n" not in str(error.value)


def test_torchvision__file_is_loaded_all_but_the_head_and_gives_the_presets_input(tmp_path: Path) -> None:
    source = torchvision.models.squeezenet1_1(num_classes=1000).state_dict()
    torch.save(source, tmp_path / "weights.pth")
    module = TransferClassifier("torchvision/squeezenet1_1", 3, pretrained=str(tmp_path / "weights.pth"))
    loaded = module.model.state_dict()
    assert {key for key, value in source.items() if not torch.equal(loaded[key], value)} == {
        "classifier.1.weight",
        "classifier.1.bias",
    }
    config = module.data_config
    assert config["input_size"] == (3, 224, 224)
    assert config["mean"] == (0.485, 0.456, 0.406)
    assert config["crop_pct"] == pytest.approx(224 / 256)


@pytest.mark.skipif(not MOBILENET.exists(), reason="needs shared/data/weights beside the repository")
def test_pretrained__real_headless_file_with_model_arguments_computes_as_timm_by_hand() -> None:
    arguments = {"pad_type": "same", "bn_eps": 1e-3}
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    module = TransferClassifier(
        "mobilenetv2_035", 10, pretrained=str(MOBILENET), model_kwargs=arguments, data_config=half
    )
    assert module.data_config["mean"] == module.data_config["std"] == [0.5] * 3
    assert module.data_config["input_size"] == (3, 224, 224)
    by_hand = timm.create_model("mobilenetv2_035", num_classes=0, **arguments)
    by_hand.load_state_dict(load_file(MOBILENET))
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        features = module.eval().model.forward_head(module.model.forward_features(images), pre_logits=True)
        assert torch.equal(features, by_hand.eval()(images))


def test_steps__log_loss_accuracy_topk_and_f1_of_the_whole_split() -> None:
    logits = torch.tensor([[5.0, 1, 0], [4, 3, 0], [0, 1, 5], [0, 3, 2], [2, 0, 1]])
    labels = torch.tensor([0, 1, 2, 2, 1])
    module = digits(num_classes=3, pretrained=False, top_k=2)
    module.model = Logits()
    loader = DataLoader(TensorDataset(logits, labels), batch_size=2)  # the last batch is smaller
    losses = [
        math.log(sum(map(math.exp, row))) - row[label] for row, label in zip(logits.tolist(), labels, strict=True)
    ]
    # predicted 0 0 2 1 0: class 0: 1 of 3 right, all found; class 1: none; class 2: 1 of 1, 1 of 2 found
    f1 = (2 * (1 / 3) * 1 / (1 / 3 + 1) + 0 + 2 * 1 * 0.5 / 1.5) / 3
    expected = {"loss": sum(losses) / 5, "acc": 2 / 5, "acc_top2": 4 / 5, "f1": f1}
    for split, result in (("val", trainer().validate(module, loader)), ("test", trainer().test(module, loader))):
        assert result[0] == pytest.approx({f"{split}_{name}": value for name, value in expected.items()}, abs=1e-5)


def test_metrics__no_topk_where_it_is_always_one() -> None:
    assert set(digits(5, pretrained=False).val_metrics.keys()) == {"val_acc", "val_f1"}
    assert set(digits(6, pretrained=False).val_metrics.keys()) == {"val_acc", "val_f1", "val_acc_top5"}


def test_training_step__smooths_the_labels() -> None:
    module = digits(num_classes=3, pretrained=False, label_smoothing=0.3)
    module.model = Logits()
    row = [2.0, 0.0, -1.0]
    log_probs = [x - math.log(sum(map(math.exp, row))) for x in row]
    expected = -(0.8 * log_probs[0] + 0.1 * log_probs[1] + 0.1 * log_probs[2])
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
    loss = module.training_step((torch.tensor([row]), torch.tensor([0])), 0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_predict_step__gives_probabilities_of_images_alone_or_with_paths() -> None:
    module = digits(num_classes=3, pretrained=False)
    module.model = Logits()
    logits = torch.tensor([[0.0, math.log(3.0), math.log(4.0)]])
    for batch in (logits, [logits, ["a.jpg"]]):
        assert torch.allclose(module.predict_step(batch, 0), torch.tensor([[1 / 8, 3 / 8, 4 / 8]]))


def test_optimizer__gets_all_parameters() -> None:
    module = digits(pretrained=False, optimizer=lambda params: torch.optim.SGD(params, lr=0.5))
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in module.model.parameters())


def test_setup__another_number_of_classes_in_the_data_is_refused_with_both_numbers() -> None:
    with pytest.raises(MisconfigurationException, match=r"num_classes=5, the data has 3"):
        trainer(max_epochs=1).fit(digits(), datamodule=Labelled(["a", "b", "c"]))


def test_checkpoint__rebuilds_without_the_weights_file_and_knows_the_class_names(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(load_file(WEIGHTS), path)
    module = digits(3, pretrained=str(path), data_config={"mean": [0.25]})
    runner = trainer(max_epochs=1, num_sanity_val_steps=0)
    runner.fit(module, datamodule=Labelled(["ant", "bee", "cat"]))
    runner.save_checkpoint(tmp_path / "model.ckpt")
    assert module.hparams["pretrained"] == str(path)
    path.unlink()
    assert torch.load(tmp_path / "model.ckpt", weights_only=True)["hyper_parameters"]["pretrained"] is False
    loaded = TransferClassifier.load_from_checkpoint(tmp_path / "model.ckpt")
    assert loaded.class_names == ["ant", "bee", "cat"]
    assert loaded.data_config["mean"] == [0.25]
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(loaded.eval()(images), module.eval()(images))


@pytest.mark.parametrize("name", ["mobilenetv2_035", "torchvision/mobilenet_v3_small", "digits_resnet", "test_vit"])
def test_head__starts_small_on_pretrained_features_only(name: str, tmp_path: Path) -> None:
    scratch = TransferClassifier(name, num_classes=7, pretrained=False)
    weights = tmp_path / "weights.pth"
    torch.save(scratch.model.state_dict(), weights)
    tuned = TransferClassifier(name, num_classes=7, pretrained=str(weights))
    for key, value in tuned.model.state_dict().items():
        if value.shape[:1] == (7,) and value.ndim == 2:
            assert 0.003 < float(value.std()) < 0.011
            assert float(value.abs().max()) <= 0.02
        elif value.shape == (7,):
            assert not value.any()
        else:
            assert torch.equal(value, scratch.model.state_dict()[key])


# --- several labels, weights, mixing ---------------------------------------------------------------------------------


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def average_precision(scores: list[float], truths: list[int]) -> float:
    """Mean of the precision at each positive, from the highest score down; no ties."""
    found, precisions = 0, []
    for place, (_, truth) in enumerate(sorted(zip(scores, truths, strict=True), reverse=True), start=1):
        found += truth
        if truth:
            precisions.append(found / place)
    return sum(precisions) / len(precisions)


def test_labels__loss_map_f1_and_accuracy_are_those_of_arithmetic() -> None:
    logits = [[2.0, -1.0, 0.2], [0.4, 1.0, -3.0], [-2.0, 0.8, 0.1], [1.0, -0.6, -0.4], [-0.5, 0.3, 0.9]]
    truths = [[1, 0, 0], [0, 1, 0], [1, 1, 1], [1, 0, 1], [0, 0, 1]]
    threshold = 0.6
    module = digits(num_classes=None, num_labels=3, pretrained=False, threshold=threshold)  # type: ignore[arg-type]
    module.model = Logits()
    loader = DataLoader(TensorDataset(torch.tensor(logits), torch.tensor(truths)), batch_size=2)
    (result,) = trainer().test(module, loader)
    cells = [(z, t) for row, truth in zip(logits, truths, strict=True) for z, t in zip(row, truth, strict=True)]
    loss = -sum(math.log(sigmoid(z) if t else 1 - sigmoid(z)) for z, t in cells) / 15
    right = sum((sigmoid(z) > threshold) == bool(t) for z, t in cells) / 15
    columns = [([row[k] for row in logits], [truth[k] for truth in truths]) for k in range(3)]
    f1 = []
    for scores, truth in columns:
        guess = [sigmoid(z) > threshold for z in scores]
        hits = sum(g and bool(t) for g, t in zip(guess, truth, strict=True))
        f1.append(2 * hits / (sum(guess) + sum(truth)))
    expected = {
        "test_loss": loss,
        "test_acc": right,
        "test_f1": sum(f1) / 3,
        "test_map": sum(average_precision(*column) for column in columns) / 3,
    }
    assert result == pytest.approx(expected, abs=1e-5)


def test_labels__task_says_the_same_as_num_labels() -> None:
    for module in (digits(4, task="multilabel"), TransferClassifier("digits_resnet", num_labels=4)):
        assert module.task == MultiLabel(4)
        assert module(torch.zeros(2, 1, 32, 32)).shape == (2, 4)
    assert digits(4, task="multiclass").task == SingleLabel(4)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"num_classes": 3, "num_labels": 3}, "give one of them"),
        ({"num_classes": None}, "give one of them"),
        ({"num_classes": None, "num_labels": 3, "task": "multiclass"}, "give num_classes"),
        ({"num_classes": None, "num_labels": 0}, "num_labels=0: give 1"),
        ({"task": "regression"}, "'multiclass' or 'multilabel'"),
        ({"threshold": 0.0}, "threshold=0.0"),
        ({"class_weights": [1.0]}, "has 1 numbers: give 5"),
        ({"mixup_alpha": -1.0}, "mixup_alpha=-1.0"),
    ],
)
def test_arguments__of_labels_weights_and_mixing_are_checked(kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TransferClassifier(**{"backbone": "digits_resnet", "num_classes": 5, **kwargs})


def log_probs(row: list[float]) -> list[float]:
    total = math.log(sum(map(math.exp, row)))
    return [value - total for value in row]


def test_class_weights__enter_the_training_loss_alone() -> None:
    rows, labels, weights = [[1.0, 0.0, -1.0], [0.5, 2.0, 0.0]], [0, 2], [1.0, 5.0, 3.0]
    module = digits(3, pretrained=False, class_weights=weights)
    module.model = Logits()
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
    batch = (torch.tensor(rows), torch.tensor(labels))
    losses = [-log_probs(row)[label] for row, label in zip(rows, labels, strict=True)]
    weighted = sum(weights[label] * loss for loss, label in zip(losses, labels, strict=True)) / (1.0 + 3.0)
    assert module.training_step(batch, 0).item() == pytest.approx(weighted, rel=1e-6)
    assert module.task.loss(*batch).item() == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert "loss_weights" not in module.state_dict()  # a checkpoint of other weights can be loaded


def test_class_weights__of_labels_weigh_what_has_them() -> None:
    module = TransferClassifier("digits_resnet", num_labels=2, pretrained=False, class_weights=[4.0, 1.0])
    module.model = Logits()
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
    loss = module.training_step((torch.tensor([[0.3, -0.2]]), torch.tensor([[1, 0]])), 0).item()
    assert loss == pytest.approx((-4 * math.log(sigmoid(0.3)) - math.log(1 - sigmoid(-0.2))) / 2, rel=1e-6)


def test_balanced__weights_are_in_inverse_proportion_to_the_counts() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    labels = [0] * 6 + [1] * 3 + [2]
    expected = compute_class_weight("balanced", classes=torch.arange(3).numpy(), y=labels)
    assert SingleLabel(3).balanced_weights([6, 3, 1], 10).tolist() == pytest.approx(expected.tolist())
    assert MultiLabel(2).balanced_weights([4, 1], 10).tolist() == pytest.approx([6 / 4, 9.0])


def test_balanced__takes_the_counts_of_the_data_and_asks_for_them_where_there_are_none() -> None:
    data = Labelled(["a", "b", "c"])
    with pytest.raises(MisconfigurationException, match=r"needs Labelled.class_counts"):
        trainer(max_epochs=1).fit(digits(3, class_weights="balanced"), datamodule=data)
    data.class_counts = [3, 3, 2]  # type: ignore[attr-defined]
    module = digits(3, class_weights="balanced")
    trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0).fit(module, datamodule=data)
    assert module.loss_weights.tolist() == pytest.approx([8 / 9, 8 / 9, 8 / 6])


@pytest.mark.parametrize(
    ("several", "says"), [(True, r"several labels.*num_labels=3"), (False, r"one class.*num_classes=3")]
)
def test_setup__data_of_the_other_kind_is_refused_at_the_start(several: bool, says: str) -> None:
    data = Labelled(["a", "b", "c"])
    data.multi_label = several  # type: ignore[attr-defined]
    module = TransferClassifier("digits_resnet", **{"num_classes" if several else "num_labels": 3})
    with pytest.raises(MisconfigurationException, match=says):
        trainer(max_epochs=1).fit(module, datamodule=data)


def test_label_smoothing__of_labels_moves_both_ends() -> None:
    task = MultiLabel(1, label_smoothing=0.2)
    loss = task.training_loss(torch.tensor([[0.7]]), torch.tensor([[1]]), None).item()
    assert loss == pytest.approx(-0.9 * math.log(sigmoid(0.7)) - 0.1 * math.log(1 - sigmoid(0.7)), rel=1e-6)


@pytest.mark.parametrize("labels", [False, True])
def test_mixup__trains_on_the_same_mixture_of_images_and_targets(labels: bool) -> None:
    size = {"num_labels": 3} if labels else {"num_classes": 3}
    module = TransferClassifier("digits_resnet", pretrained=False, mixup_alpha=1.0, **size)  # type: ignore[arg-type]
    seen = []

    class Watched(Logits):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images)
            return images.flatten(1)[:, :3] * self.scale

    module.model = Watched()
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
    images = torch.eye(4).reshape(4, 1, 2, 2)  # image i has its one at place i
    rows = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 1, 0]])
    targets = rows if labels else torch.tensor([0, 1, 2, 0])
    loss = module.training_step((images, targets), 0)
    (mixed,) = seen
    shares = mixed.flatten(1)  # the share of each of the four images in each mixed one
    assert torch.allclose(shares.sum(1), torch.ones(4))
    assert (shares > 0).sum(1).tolist() == [2] * 4
    hot = rows.float() if labels else torch.nn.functional.one_hot(targets, 3).float()
    logits, soft = shares[:, :3], shares @ hot
    if labels:
        probs = logits.sigmoid()
        expected = -(soft * probs.log() + (1 - soft) * (1 - probs).log()).mean()
    else:
        expected = -(soft * (logits - logits.exp().sum(1, keepdim=True).log())).sum(1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_cutmix__pastes_and_stays_off_stored_features() -> None:
    module = digits(3, pretrained=False, cutmix_alpha=1.0)
    images = torch.arange(4.0)[:, None, None, None].expand(4, 1, 8, 8).clone()
    mixed, targets = module._mix(images, torch.tensor([0, 1, 2, 0]))
    assert {float(value) for value in mixed.unique()} <= {0.0, 1.0, 2.0, 3.0}  # pasted, not blended
    assert targets.shape == (4, 3) and torch.allclose(targets.sum(1), torch.ones(4))
    for features in (torch.randn(4, 64), torch.randn(4, 64, 2, 2), torch.randn(4, 5, 64)):
        same, labels = module._mix(features, torch.tensor([0, 1, 2, 0]))
        assert same is features and labels.tolist() == [0, 1, 2, 0]


# --- wrong targets ---------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[Any, str]] = {
    "floats": (torch.tensor([0.0, 0.3, 1.0, 2.0]), r"float32.*class indices.*regression"),
    "too large": (torch.tensor([0, 1, 4, 2]), r"hold 4.*0 to 2.*num_classes to 5"),
    "negative": (torch.tensor([0, -1, 1, 2]), r"hold -1"),
    "multi-hot": (torch.tensor([[1, 0, 1]] * 4), r"\(4, 3\) int64.*num_labels=3"),
    "multi-hot floats": (torch.rand(4, 3), r"\(4, 3\) float32.*num_labels=3"),
    "a column": (torch.zeros(4, 1, dtype=torch.long), r"\(4, 1\)"),
    "names": (("ant", "bee", "ant", "cat"), r"names \('ant', 'bee', 'ant'\)"),
    "a dict": ({"boxes": torch.zeros(4)}, r"a dict of 'boxes'"),
    "true and false": (torch.tensor([True, False, True, True]), r"bool"),
}


@pytest.mark.parametrize("kind", sorted(WRONG))
@pytest.mark.parametrize("split", ["training", "validation", "test"])
def test_targets__wrong_ones_are_refused_on_the_first_batch_in_one_line(kind: str, split: str) -> None:
    targets, says = WRONG[kind]
    module = digits(3, pretrained=False)
    with pytest.raises(MisconfigurationException, match=says) as error:
        getattr(module, f"{split}_step")((torch.randn(4, 1, 32, 32), targets), 0)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (torch.tensor([0, 1, 2, 0]), r"\(4,\).*give num_classes"),
        (torch.zeros(4, 5), r"\(4, 5\).*set num_labels to 5"),
        (torch.full((4, 3), 0.5), r"hold 0.5"),
        (torch.full((4, 3), 2), r"hold 2"),
        (torch.full((4, 3), float("nan")), r"hold nan"),
    ],
)
def test_targets__wrong_labels_are_refused_too(targets: torch.Tensor, says: str) -> None:
    module = TransferClassifier("digits_resnet", num_labels=3, pretrained=False)
    with pytest.raises(MisconfigurationException, match=says):
        module.training_step((torch.randn(4, 1, 32, 32), targets), 0)


@pytest.mark.parametrize("batch", [{"pixel_values": 1, "labels": 2}, [torch.zeros(4, 1, 32, 32)], torch.zeros(2)])
def test_batches__of_another_form_are_refused(batch: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"takes batches \(images, targets\)"):
        digits(3, pretrained=False).training_step(batch, 0)


# --- what a checkpoint knows -----------------------------------------------------------------------------------------


class Ordered(Labelled):
    """Labels that follow the names, so that an order can be told from another."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(names)
        self.given = list(names)

    def order_classes(self, names: Any) -> None:
        self.asked = list(names)


def trained(names: list[str], folder: Path) -> Path:
    runner = trainer(max_epochs=1, num_sanity_val_steps=0)
    runner.fit(digits(len(names)), datamodule=Labelled(names))
    runner.save_checkpoint(folder / "model.ckpt")
    return folder / "model.ckpt"


def test_checkpoint__data_of_other_classes_is_refused_by_name(tmp_path: Path) -> None:
    path = trained(["cat", "dog"], tmp_path)
    for use in (
        lambda: trainer().validate(digits(2), datamodule=Labelled(["wolf", "zebra"]), ckpt_path=path),
        lambda: trainer().validate(TransferClassifier.load_from_checkpoint(path), Labelled(["Dog", "cat"])),
        lambda: trainer(max_epochs=2).fit(digits(2), Labelled(["wolf", "zebra"]), ckpt_path=path),
    ):
        with pytest.raises(MisconfigurationException, match=r"(wolf, zebra|Dog).*it knows cat, dog"):
            use()


def test_checkpoint__another_order_of_the_classes_is_mapped(tmp_path: Path) -> None:
    path = trained(["cat", "dog"], tmp_path)
    for module, ckpt_path in ((digits(2), path), (TransferClassifier.load_from_checkpoint(path), None)):
        data = Ordered(["dog", "cat"])
        trainer().validate(module, datamodule=data, ckpt_path=ckpt_path)
        assert data.asked == ["cat", "dog"]
        assert module.class_names == ["cat", "dog"]
        with pytest.raises(MisconfigurationException, match=r"order_classes\(names\)"):
            trainer().validate(module, datamodule=Labelled(["dog", "cat"]), ckpt_path=ckpt_path)


def test_order_classes__moves_the_labels_with_the_names() -> None:
    data = DigitsData(classes=[5, 6, 7])
    data.setup("fit")
    digit_of = [data.class_names[label] for label in data.dataset("val").targets]
    data.order_classes(["7", "8", "5", "6"])
    assert data.class_names == ["7", "8", "5", "6"]
    assert [data.class_names[label] for label in data.dataset("val").targets] == digit_of
    assert len(set(digit_of)) == 3


def test_fit__of_a_trained_model_on_other_classes_says_that_its_outputs_change(tmp_path: Path) -> None:
    module = TransferClassifier.load_from_checkpoint(trained(["cat", "dog"], tmp_path))
    with pytest.warns(UserWarning, match=r"trained on the classes cat, dog.*wolf, zebra"):
        trainer(max_epochs=1).fit(module, datamodule=Labelled(["wolf", "zebra"]))
    assert module.class_names == ["wolf", "zebra"]


@pytest.mark.parametrize(
    ("of_model", "of_data", "said"),
    [
        ({}, None, "mean [0.3] and std [0.35], known for 'digits_resnet'. "),
        ({}, {"mean": [0.5], "std": [0.5]}, "mean [0.5] and std [0.5], of the data module. "),
        ({"data_config": {"mean": [0.5], "std": [0.5]}}, None, ""),  # the user's word
        ({"pretrained": True}, None, ""),  # published weights come with theirs
    ],
)
def test_fit__from_a_file_of_weights_says_by_which_normalisation(
    of_model: dict[str, Any], of_data: dict[str, Any] | None, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    trainer(fast_dev_run=True).fit(
        digits(**{"pretrained": str(WEIGHTS), **of_model}), datamodule=DigitsData(data_config=of_data)
    )
    lines = [line for line in caplog.messages if "normalised" in line]
    assert len(lines) == bool(said)
    assert all(str(WEIGHTS) in line and said in line and "--model.data_config" in line for line in lines)


def test_checkpoint__knows_the_input_that_the_data_module_gave(tmp_path: Path) -> None:
    options: dict[str, Any] = {"image_size_px": 16, "data_config": {"mean": [0.1], "std": [0.7], "crop_pct": 0.9}}
    runner = trainer(max_epochs=1, num_sanity_val_steps=0, limit_train_batches=1, limit_val_batches=1)
    runner.fit(digits(5), datamodule=DigitsData(**options))
    runner.save_checkpoint(tmp_path / "model.ckpt")

    def pixels(data: DigitsData, module: TransferClassifier, ckpt_path: Path | None) -> torch.Tensor:
        seen = []
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        trainer(limit_predict_batches=1).predict(module, datamodule=data, ckpt_path=ckpt_path)
        return seen[0]

    told = pixels(DigitsData(**options), digits(5), tmp_path / "model.ckpt")
    assert told.shape[1:] == (1, 16, 16)
    loaded = TransferClassifier.load_from_checkpoint(tmp_path / "model.ckpt")
    assert loaded.data_config["input_size"] == [1, 16, 16]
    assert torch.equal(pixels(DigitsData(), digits(5), tmp_path / "model.ckpt"), told)
    assert torch.equal(pixels(DigitsData(), loaded, None), told)
    with pytest.warns(UserWarning, match=r"input_size \(1, 32, 32\) instead of \(1, 16, 16\)"):
        pixels(DigitsData(image_size_px=32), loaded, None)


@pytest.mark.parametrize("how", ["validate", "test", "predict"])
def test_untrained__head_is_shouted_about(how: str) -> None:
    data = DigitsData()
    with pytest.warns(UserWarning, match=rf"at random.*--ckpt_path FILE, or trainer.{how}"):
        getattr(trainer(**{f"limit_{how.removeprefix('vali').replace('date', 'val')}_batches": 1}), how)(
            digits(5), data
        )


def test_untrained__head_that_was_loaded_by_hand_is_trusted() -> None:
    module = digits(5)
    torch.manual_seed(3)
    with torch.no_grad():
        module.model.fc.weight += 0.1
    other = digits(5)
    other.load_state_dict(module.state_dict())
    trainer(limit_predict_batches=1).predict(other, datamodule=DigitsData())


def test_predict_image__is_prepared_as_the_data_module_prepares_it(tmp_path: Path) -> None:
    from PIL import Image

    photos = tmp_path / "photos"
    photos.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(3):
        pixels = torch.randint(256, (50, 40), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(photos / f"{i}.png")
    module = digits(3, pretrained=False)
    with torch.no_grad():
        module.model.fc.weight.normal_()
    module.class_names = ["a", "b", "c"]
    module.train()
    data = ImageFolderData(root=str(tmp_path), predict_dir=str(photos), image_size_px=32)
    (expected,) = trainer().predict(module, datamodule=data)  # type: ignore[misc]
    for i in range(3):
        answer = module.predict_image(photos / f"{i}.png")
        assert list(answer.values()) == sorted(answer.values(), reverse=True)
        assert [answer[name] for name in "abc"] == pytest.approx(expected[i].tolist(), abs=1e-6)
    assert module.predict_image(Image.open(photos / "0.png")) == module.predict_image(str(photos / "0.png"))
    assert module.model.training


# --- weights out of reach --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["resnet18.a1_in1k", "torchvision/resnet18"])
def test_pretrained__out_of_reach_is_said_before_any_retry(
    backbone: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr("lightning_unfreeze.module.backbones._answers", lambda url: False)
    with pytest.raises(ValueError, match=r"not on this machine.*does not answer.*--model.pretrained FILE") as error:
        TransferClassifier(backbone, 3)
    assert "\n" not in str(error.value)


def test_answers__tells_a_host_from_none() -> None:
    import http.server
    import threading

    from lightning_unfreeze.module.backbones import _answers

    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(403)

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    try:
        assert _answers(url)
    finally:
        server.shutdown()
        server.server_close()
    assert not _answers(url)
