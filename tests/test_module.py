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

from lightning_unfreeze.digits_resnet import WEIGHTS
from lightning_unfreeze.module import TransferClassifier

MOBILENET = Path(__file__).parents[1] / "../shared/data/weights/mobilenetv2_035.keras_in1k.safetensors"


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
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in module.model.parameters()}


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
