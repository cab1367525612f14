from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import timm
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from sklearn.datasets import load_digits

from lightning_unfreeze.data.digits import DigitsData
from lightning_unfreeze.data.modules import ImageFolderData
from lightning_unfreeze.data.transforms import make_transform
from lightning_unfreeze.module import TransferClassifier

CONFIG = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "crop_pct": 0.8}
CONFIG |= {"interpolation": "bicubic", "crop_mode": "center"}


def photo(seed: int, size: tuple[int, int] = (60, 50)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def folder(root: Path, counts: dict[str, int]) -> Path:
    """Small photos, as many per sub-folder as `counts` says."""
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            photo(100 * number + index).save(root / name / f"{index:02d}.png")
    return root


def ready(root: Path, stage: str = "fit", **kwargs: Any) -> ImageFolderData:
    data = ImageFolderData(str(root), data_config=CONFIG, **kwargs)
    data.setup(stage)
    return data


def names(data: Any, split: str) -> list[str]:
    return [f"{file.parent.name}/{file.name}" for file in data.dataset(split).images]


@pytest.mark.parametrize("size", [(60, 50), (50, 60), (200, 90)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_transform__none_is_timms_evaluation_transform(size: tuple[int, int], interpolation: str) -> None:
    config = CONFIG | {"interpolation": interpolation}
    expected = timm.data.create_transform(**config, is_training=False)(photo(0, size))
    torch.testing.assert_close(make_transform(config)(photo(0, size)), expected)


@pytest.mark.parametrize(("augmentation", "orientations"), [("none", 1), ("shift", 1), ("side_on", 2), ("top_down", 8)])
def test_transform__presets_show_the_orientations_they_promise(augmentation: Any, orientations: int) -> None:
    quadrants = np.array([[0, 1], [2, 3]]).repeat(32, 0).repeat(32, 1) * 60
    image = Image.fromarray(quadrants.astype(np.uint8))
    config = {"input_size": (1, 32, 32), "mean": [0.0], "std": [60 / 255], "crop_pct": 1.0, "interpolation": "nearest"}
    transform = make_transform(config, augmentation)
    torch.manual_seed(0)
    seen: Counter[tuple[int, ...]] = Counter()
    for _ in range(400):
        out = transform(image)
        assert out.shape == (1, 32, 32)
        corners = out[0][[5, 5, -6, -6], [5, -6, 5, -6]]
        seen[tuple(corners.round().int().tolist())] += 1
    assert len(seen) == orientations
    assert (0, 1, 2, 3) in seen
    assert min(seen.values()) > 400 / orientations / 2  # every one about as often


def test_transform__augmentations_move_the_image() -> None:
    for augmentation in ("shift", "side_on", "top_down", "randaugment"):
        transform = make_transform(CONFIG, augmentation)  # type: ignore[arg-type]
        torch.manual_seed(0)
        views = torch.stack([transform(photo(0)) for _ in range(4)])
        assert views.shape == (4, 3, 32, 32)
        assert not torch.equal(views[0], views[1])


def test_folder__train_val_and_test_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    counts = {"train/b": 3, "train/a": 2, "val/a": 1, "val/b": 2, "test/b": 1}
    data = ready(folder(tmp_path, counts))
    assert (data.class_names, data.num_classes) == (["a", "b"], 2)
    assert {split: data.dataset(split).targets for split in ("train", "val", "test")} == {
        "train": [0, 0, 1, 1, 1],
        "val": [0, 1, 1],
        "test": [1],
    }
    image, label = data.dataset("test")[0]
    torch.testing.assert_close(image, timm.data.create_transform(**CONFIG)(photo(400)))  # the fifth folder's first
    assert label == 1


@pytest.mark.parametrize("train", ["", "train/"])
def test_folder__without_val_is_split_by_seed_class_by_class(tmp_path: Path, train: str) -> None:
    root = folder(tmp_path, {f"{train}a": 10, f"{train}b": 5, f"{train}c": 2})
    data = ready(root, val_fraction=0.2)
    assert set(data.dataset("val").targets) == set(data.dataset("train").targets) == {0, 1, 2}
    every = sorted([*names(data, "train"), *names(data, "val")])
    assert every == sorted(f"{file.parent.name}/{file.name}" for file in root.rglob("*.png"))
    assert names(ready(root, val_fraction=0.2), "val") == names(data, "val")
    others = [names(ready(root, val_fraction=0.2, seed=seed), "val") for seed in range(1, 6)]
    assert any(other != names(data, "val") for other in others)


@pytest.mark.parametrize(
    ("counts", "kwargs", "message"),
    [
        ({"a": 3}, {}, r"holds 1 class \(a\)"),
        ({}, {}, r"holds 0 class \(no sub-folders\)"),
        ({"train/a": 2, "train/b": 2, "val/a": 1, "val/x": 1}, {}, r"val/ .* classes that train/ lacks \(x\)"),
        ({"a": 3, "b": 3, "c": 0}, {}, r"class folders without images \(c: nothing\)"),
        ({"a": 3, "b": 1}, {}, r"Class 'b' .* a single image"),
        ({"a": 3, "b": 3}, {"stage": "predict"}, "set predict_dir"),
    ],
)
def test_folder__what_nothing_can_be_learned_from_is_refused_in_one_line(
    counts: dict[str, int], kwargs: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(MisconfigurationException, match=message) as error:
        ready(folder(tmp_path, counts), **kwargs)
    assert "\n" not in str(error.value)


def test_folder__missing_or_empty_ones_are_refused_by_argument(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"root='no/such/folder': no such folder"):
        ready(Path("no/such/folder"))
    for predict_dir, message in (("no/such", "no such folder"), (str(tmp_path), "holds no images")):
        with pytest.raises(MisconfigurationException, match=f"predict_dir='{predict_dir}'.*{message}"):
            ready(tmp_path, "predict", predict_dir=predict_dir)


def test_folder__missing_test_data_and_early_questions_say_what_to_do(tmp_path: Path) -> None:
    data = ImageFolderData(str(folder(tmp_path, {"a": 2, "b": 2})))
    with pytest.raises(RuntimeError, match="setup"):
        _ = data.num_classes
    with pytest.raises(MisconfigurationException, match="setup"):
        data.train_dataloader()
    data.setup("fit")
    with pytest.raises(MisconfigurationException, match=r"no test data: put class folders in .*test"):
        data.test_dataloader()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"batch_size": 0},
        {"image_size_px": 0},
        {"num_workers": -1},
        {"val_fraction": 0.0},
        {"val_fraction": 1.0},
        {"augmentation": "mirror"},
        {"corrupt": "ignore"},
    ],
)
def test_arguments__impossible_values_are_refused_by_name(kwargs: dict[str, Any]) -> None:
    (name, value), *_ = kwargs.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}: give"):
        ImageFolderData("root", **kwargs)


def broken(root: Path) -> Path:
    """Ten images of which one is text, and one of noise ends early."""
    folder(root, {"a": 5, "b": 5})
    (root / "a" / "01.png").write_text("no image")
    whole = (root / "b" / "03.png").read_bytes()
    (root / "b" / "03.png").write_bytes(whole[: len(whole) // 2])
    return root


def test_corrupt__error_names_all_files_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"2 of 10 files .*a/01\.png \(.*b/03\.png \("):
        ready(broken(tmp_path))


def test_corrupt__skip_leaves_them_out_with_a_count(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Skipped 2 of 10 files"):
        data = ready(broken(tmp_path), corrupt="skip")
    kept = {*names(data, "train"), *names(data, "val")}
    assert len(kept) == 8
    assert not kept & {"a/01.png", "b/03.png"}


def test_predict__gives_each_image_of_the_folder_with_its_path(tmp_path: Path) -> None:
    root = folder(tmp_path, {"new": 2, "new/sub": 1})
    data = ready(Path("not/needed/here"), "predict", predict_dir=str(root), batch_size=2)
    batches = list(data.predict_dataloader())
    expected = [root / "new/00.png", root / "new/01.png", root / "new/sub/00.png"]
    assert [path for _, paths in batches for path in paths] == [str(file) for file in expected]
    assert torch.cat([images for images, _ in batches]).shape == (3, 3, 32, 32)


@pytest.mark.parametrize(("images", "batches"), [(9, 2), (8, 2), (10, 3), (1, 1)])
def test_train_loader__drops_a_last_batch_of_one_image(images: int, batches: int, tmp_path: Path) -> None:
    root = folder(tmp_path, {"train/a": images, "train/b": 1, "val/a": 1})
    data = ready(root, batch_size=4)
    data._samples["train"] = tuple(values[:images] for values in data._samples["train"])  # type: ignore[assignment]
    assert len(list(data.train_dataloader())) == batches


def test_train_loader__is_the_same_for_any_number_of_workers_and_new_in_each_epoch(tmp_path: Path) -> None:
    root = folder(tmp_path, {"a": 6, "b": 6})
    epochs = []
    for workers in (0, 2):
        loader = ready(root, batch_size=3, num_workers=workers, augmentation="randaugment").train_dataloader()
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            epochs.append(torch.cat([images for images, _ in loader]))
    assert torch.equal(epochs[0], epochs[2])
    assert torch.equal(epochs[1], epochs[3])
    assert not torch.equal(epochs[0].sum((1, 2, 3)).sort()[0], epochs[1].sum((1, 2, 3)).sort()[0])


def test_digits__splits_are_disjoint_stratified_and_true_to_the_scans() -> None:
    data = DigitsData(classes=(9, 5), train_per_class=7, seed=3)
    data.setup("fit")
    scans = load_digits()
    chosen: set[bytes] = set()
    for split, per_class in (("train", {0: 7, 1: 7}), ("val", {0: 45, 1: 45}), ("test", {0: 45, 1: 45})):
        dataset = data.dataset(split)  # type: ignore[arg-type]
        assert Counter(dataset.targets) == per_class  # 180 nines and 182 fives
        for image, label in zip(dataset.images, dataset.targets, strict=True):
            pixels = np.asarray(image)
            match = (np.abs(scans.images * 255 / 16 - pixels).max((1, 2)) < 1).nonzero()[0]
            assert {9: 0, 5: 1}[scans.target[match[0]]] == label
            chosen.add(pixels.tobytes())
    assert len(chosen) == 2 * (7 + 45 + 45)
    data.setup("test")
    assert data.class_names == ["9", "5"]


@pytest.mark.parametrize(
    "kwargs", [{"classes": [5]}, {"classes": [5, 5]}, {"classes": [9, 10]}, {"train_per_class": 0}, {"batch_size": 0}]
)
def test_digits__impossible_arguments_are_refused_by_name(kwargs: dict[str, Any]) -> None:
    (name, _), *_ = kwargs.items()
    with pytest.raises(ValueError, match=f"{name}=.*: give"):
        DigitsData(**kwargs)


class Own(pl.LightningModule):
    """A user's module that says nothing of its input but holds a timm model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = timm.create_model("test_vit", num_classes=2, pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.3)})


def test_data_config__comes_from_the_module_unless_given() -> None:
    data = DigitsData()
    assert data.data_config["mean"] == (0.485, 0.456, 0.406)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    data.trainer = trainer
    trainer.strategy.connect(TransferClassifier("digits_resnet", 5))
    assert data.data_config["input_size"] == (1, 32, 32)
    assert data.data_config["mean"] == (0.3,)
    trainer.strategy.connect(Own())
    assert data.data_config["input_size"] == (3, 160, 160)
    assert data.data_config["mean"] == (0.1, 0.2, 0.3)
    data = DigitsData(image_size_px=24, data_config={"std": (0.5,) * 3})
    data.trainer = trainer
    assert data.data_config["input_size"] == (3, 24, 24)
    assert data.data_config["mean"] == (0.1, 0.2, 0.3)
    assert data.data_config["std"] == (0.5, 0.5, 0.5)


def test_digits__pretrained_features_tell_the_new_classes_apart_better_than_random_ones() -> None:
    torch.manual_seed(0)
    module = TransferClassifier("digits_resnet", 5)
    data = DigitsData(data_config=module.data_config)
    data.setup("fit")
    accuracies = []
    for backbone in (module, TransferClassifier("digits_resnet", 5, pretrained=False)):
        with torch.no_grad():
            sets = {}
            for split in ("train", "test"):
                images, labels = zip(*data.dataset(split), strict=True)  # type: ignore[arg-type]
                sets[split] = (
                    backbone.eval().model.forward_head(
                        backbone.model.forward_features(torch.stack(images)), pre_logits=True
                    ),
                    torch.tensor(labels),
                )
        (train, train_labels), (test, test_labels) = sets["train"], sets["test"]
        means = torch.stack([train[train_labels == label].mean(0) for label in range(5)])
        accuracies.append((torch.cdist(test, means).argmin(1) == test_labels).float().mean().item())
    assert accuracies[0] > accuracies[1] + 0.1


def test_quickstart__fits_validates_tests_and_predicts() -> None:
    torch.manual_seed(0)
    module, data = TransferClassifier("digits_resnet", 5), DigitsData()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, enable_checkpointing=False, **quiet)
    trainer.fit(module, data)
    assert {"train_loss", "val_loss", "val_acc", "val_f1"} <= trainer.callback_metrics.keys()
    assert module.class_names == ["5", "6", "7", "8", "9"]
    (tested,) = trainer.test(module, data, verbose=False)
    probs = torch.cat(trainer.predict(module, data))  # type: ignore[arg-type]
    assert probs.shape == (len(data.dataset("test")), 5)
    accuracy = (probs.argmax(1) == torch.tensor(data.dataset("test").targets)).float().mean()
    assert tested["test_acc"] == pytest.approx(accuracy.item())


# --- what the network takes, and what a classifier asks ---------------------------------------------------------------


@pytest.mark.parametrize(("channels", "mean"), [(1, [0.449]), (4, [0.485, 0.456, 0.406, 0.485])])
def test_data_config__has_the_channels_of_the_network(channels: int, mean: list[float], tmp_path: Path) -> None:
    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = timm.create_model("test_resnet", num_classes=2, in_chans=channels)
            vars(self)["data_config"] = {"input_size": (3, 16, 16), "mean": (0.485, 0.456, 0.406), "std": (0.2,) * 3}

    data = ImageFolderData(str(folder(tmp_path, {"a": 3, "b": 3})))
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    data.trainer = trainer
    trainer.strategy.connect(Net())
    data.setup("fit")
    assert data.in_chans == channels
    assert data.data_config["mean"] == pytest.approx(mean)
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape[1:] == (channels, 16, 16)
    assert Net().net(images).shape == (len(images), 2)


def test_image_size__is_that_of_the_loaders_asked_for_afterwards(tmp_path: Path) -> None:
    data = ready(folder(tmp_path, {"a": 6, "b": 6}), batch_size=4, image_size_px=24)

    def shape() -> list[int]:
        return list(next(iter(data.train_dataloader()))[0].shape)

    assert shape() == [4, 3, 24, 24]
    data.set_image_size(16, batch_size=8)
    assert shape() == [8, 3, 16, 16]
    assert next(iter(data.val_dataloader()))[0].shape[-1] == 16
    data.set_image_size(None)
    assert shape() == [4, 3, 24, 24]
    for wrong in ({"px": 0}, {"px": 8, "batch_size": 0}):
        with pytest.raises(ValueError, match=r"(image_size_px|batch_size)=0: give 1 or more"):
            data.set_image_size(**wrong)


def test_sampler__balanced_shows_every_class_as_often(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train/a": 90, "train/b": 8, "train/c": 2, "val/a": 1})
    data = ready(root, batch_size=50, image_size_px=8, sampler="balanced")
    assert (data.class_counts, data.num_train_images) == ([90, 8, 2], 100)
    loader, seen = data.train_dataloader(), []
    for epoch in range(6):
        loader.sampler.set_epoch(epoch)
        seen += [label for _, labels in loader for label in labels.tolist()]
    assert len(seen) == 600
    for label in range(3):
        assert abs(seen.count(label) / 600 - 1 / 3) < 4 * (2 / 9 / 600) ** 0.5  # four standard errors


def test_predict__a_broken_file_is_left_out_and_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"Skipped 2 of 10 files .*a/01\.png \(no image that Pillow knows\)"):
        data = ready(Path("not/needed"), "predict", predict_dir=str(broken(tmp_path)))
    assert len(data.paths("predict")) == 8
    assert {path.name for path in data.broken} == {"01.png", "03.png"}


@pytest.mark.parametrize(
    "kwargs",
    [
        {"max_pixels": 0},
        {"value_range": (5, 5)},
        {"classes": ["a"]},
        {"classes": ["a", "a"]},
        {"sampler": "x"},
        {"cache": "x"},
    ],
)
def test_arguments__of_finding_and_reading_are_refused_by_name(kwargs: dict[str, Any]) -> None:
    (name, _), *_ = kwargs.items()
    with pytest.raises(ValueError, match=f"{name}=.*: give"):
        ImageFolderData("root", **kwargs)
    with pytest.raises(ValueError, match="no colour"):
        ImageFolderData("root", background="no colour")


SETS = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.parametrize(
    ("name", "start", "end"),
    [
        ("ants_bees", "2 classes (ants, bees); photos: 244 train, 153 val, no test", "no exact copies across splits"),
        ("monkeys10", "10 classes (n0, n1, n2, n3, n4 and 5 more); photos: 979 train, 268 val, no test", "splits"),
        (
            "flowers5",
            "5 classes (daisy, dandelion, rose, sunflower, tulip); photos: 1000 train, 431 val, 1298 test",
            ")",
        ),
        (
            "rsscn7",
            "7 classes (field, forest, grass, industry, parking and 2 more); photos: 1120 train, 280 val",
            "splits",
        ),
        (
            "dtd10",
            "10 classes (banded, blotchy, braided, bubbly, bumpy and 5 more); photos: 600 train, 200 val",
            "splits",
        ),
    ],
)
def test_found__says_what_the_real_sets_hold(name: str, start: str, end: str) -> None:
    if not (SETS / name).is_dir():
        pytest.skip(f"no {name} beside the project")
    data = ImageFolderData(str(SETS / name))
    data.setup("fit")
    assert data.found is not None
    assert data.found.startswith(f"root={str(SETS / name)!r}: {start}")
    assert data.found.endswith(end)
    assert ("2 exact copies across splits" in data.found) == (name == "flowers5")


def test_broken__is_named_once_and_not_in_each_run_of_a_study(tmp_path: Path) -> None:
    from lightning_unfreeze.study.runs.run import _quiet

    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(6):
            Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / label / f"{i}.png")
    (tmp_path / "a" / "page.png").write_bytes(b"<html>")
    with _quiet():  # a warning would be an error
        ImageFolderData(str(tmp_path), corrupt="skip").setup("fit")
    with pytest.warns(UserWarning, match=r"Skipped 1 of 13 files"):
        ImageFolderData(str(tmp_path), corrupt="skip").setup("fit")
