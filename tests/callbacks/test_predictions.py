"""`predictions.csv` for any module and any data."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from lightning_unfreeze import TTAEval
from lightning_unfreeze.callbacks.predictions import PredictionsCSV
from lightning_unfreeze.data.sample_names import are_names, sample_names
from tests.zoo import Stream, quiet_trainer

ODD = ["a, b.jpg", 'quo"te.jpg', "new\nline.jpg", "ünï/日本.png", "no_ending", "e.jpg"]


class Echo(pl.LightningModule):
    """Answers with logits in which the image's own number wins: sample i is of class i % 3."""

    def __init__(self, answer: str = "probs") -> None:
        super().__init__()
        self.answer, self.net = answer, nn.Flatten()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images)[:, :3]

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        images = batch["image"] if isinstance(batch, dict) else batch if isinstance(batch, torch.Tensor) else batch[0]
        logits = self(images)
        return {
            "probs": logits.softmax(1),
            "logits": logits,
            "classes": logits.argmax(1),
            "text": "nothing",
        }[self.answer]


class Numbered(Dataset[Any]):
    """Sample i has 5.0 at place i % 3."""

    def __init__(self, form: str, num: int = 6, **kept: Any) -> None:
        self.form, self.num = form, num
        vars(self).update(kept)

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> Any:
        image = torch.zeros(1, 2, 2)
        image.view(-1)[index % 3] = 5.0
        if self.form == "image":
            return image
        if self.form == "label":
            return image, index % 3
        if self.form == "class name":
            return image, "abc"[index % 3]
        return (image, ODD[index]) if self.form == "path" else {"image": image, "path": ODD[index]}


def rows_of(loader: Any, folder: Path, module: pl.LightningModule | None = None, *more: Any, **options: Any) -> Any:
    writer = PredictionsCSV(path=str(folder / "predictions.csv"), **options)
    quiet_trainer([writer, *more]).predict(module or Echo(), loader)
    assert writer.written == folder / "predictions.csv"
    with writer.written.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("form", ["path", "dict"])
def test_predictions__odd_names_that_come_with_the_batch_survive(form: str, tmp_path: Path) -> None:
    rows = rows_of(DataLoader(Numbered(form), batch_size=4), tmp_path)
    assert [row["file"] for row in rows] == ODD
    assert [row["class"] for row in rows] == ["0", "1", "2", "0", "1", "2"]
    assert float(rows[0]["probability"]) == pytest.approx(float(torch.tensor([5.0, 0, 0]).softmax(0)[0]), abs=1e-6)


@pytest.mark.parametrize("form", ["image", "label", "class name"])
@pytest.mark.parametrize("kept", ["paths", "samples", "index", "table"])
def test_predictions__paths_are_the_datasets_else_the_index_and_never_labels(
    form: str, kept: str, tmp_path: Path
) -> None:
    names = [f"photos/{i}.jpg" for i in range(6)]
    attributes: dict[str, Any] = {
        "paths": {"anything": [Path(name) for name in names], "targets": [0, 1, 2] * 2},
        "samples": {"samples": [(name, i % 3) for i, name in enumerate(names)], "targets": list("abcabc")},
        "index": {"targets": list("abcabc"), "classes": ["a", "b", "c"] * 2},
        "table": {"frame": {"file": names, "label": [0] * 6}},
    }[kept]
    rows = rows_of(DataLoader(Numbered(form, **attributes), batch_size=4), tmp_path)
    assert [row["file"] for row in rows] == ([str(i) for i in range(6)] if kept == "index" else names)


@pytest.mark.filterwarnings("ignore:Your `predict_dataloader`'s sampler has shuffling")
def test_predictions__follow_a_shuffled_loader(tmp_path: Path) -> None:
    names = [f"{i}.jpg" for i in range(6)]
    torch.manual_seed(1)
    rows = rows_of(DataLoader(Numbered("image", paths=names), batch_size=4, shuffle=True), tmp_path)
    assert sorted(row["file"] for row in rows) == names
    assert [row["file"] for row in rows] != names
    assert all(int(row["file"][0]) % 3 == int(row["class"]) for row in rows)


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")
def test_predictions__of_an_iterable_are_numbered(tmp_path: Path) -> None:
    rows = rows_of(DataLoader(Stream([Numbered("image")[i] for i in range(5)]), batch_size=2), tmp_path)
    assert [(row["file"], row["class"]) for row in rows] == [(str(i), str(i % 3)) for i in range(5)]


def test_predictions__hold_all_probabilities_on_request_and_class_names(tmp_path: Path) -> None:
    module = Echo("logits")
    module.class_names = ["ant", "bee", "cat"]  # type: ignore[assignment]
    rows = rows_of(DataLoader(Numbered("image"), batch_size=4), tmp_path, module, all_probabilities=True)
    assert [row["class"] for row in rows[:3]] == ["ant", "bee", "cat"]
    expected = torch.tensor([0.0, 5.0, 0.0]).softmax(0).tolist()
    assert [float(rows[1][f"prob_{name}"]) for name in module.class_names] == pytest.approx(expected, abs=1e-6)  # type: ignore[union-attr]
    rows = rows_of(DataLoader(Numbered("image"), batch_size=4), tmp_path, Echo("classes"))
    assert [row["class"] for row in rows] == ["0", "1", "2", "0", "1", "2"]


def test_predictions__beside_data_that_knows_no_classes_are_numbers(tmp_path: Path) -> None:
    class Unlabelled(pl.LightningDataModule):
        """As `ImageFolderData` with a `predict_dir`: its classes are known after a setup for training."""

        @property
        def class_names(self) -> list[str]:
            raise RuntimeError("call setup('fit') first")

        def predict_dataloader(self) -> Any:
            return DataLoader(Numbered("image"), batch_size=4)

    writer = PredictionsCSV(path=str(tmp_path / "predictions.csv"))
    quiet_trainer([writer]).predict(Echo("logits"), datamodule=Unlabelled())
    assert writer.written is not None
    assert [line.split(",")[1] for line in writer.written.read_text().splitlines()[1:4]] == ["0", "1", "2"]


def test_predictions__of_several_labels_list_all_from_the_threshold_on(tmp_path: Path) -> None:
    class Labels(Echo):
        class_names = ("sky", "sea", "sun")
        task = type("Task", (), {"threshold": 0.3})

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return torch.tensor([[0.9, 0.31, 0.1], [0.2, 0.2, 0.1]])

    rows = rows_of(DataLoader(Numbered("image", num=2), batch_size=2), tmp_path, Labels())
    assert [row["class"] for row in rows] == ["sky;sea", ""]
    assert [float(rows[0][f"prob_{name}"]) for name in Labels.class_names] == [0.9, 0.31, 0.1]


def test_predictions__are_tta_s_where_it_merges(tmp_path: Path) -> None:
    rows = rows_of(DataLoader(Numbered("image"), batch_size=4), tmp_path, Echo("logits"), TTAEval(figure=False))
    # the image mirrored has its 5 at another place: two views that disagree, half each
    both = (torch.tensor([5.0, 0, 0]).softmax(0) + torch.tensor([0.0, 5, 0]).softmax(0)) / 2
    assert float(rows[0]["probability"]) == pytest.approx(float(both.max()), abs=1e-5)
    assert float(rows[0]["spread"]) > 0.4


def test_predictions__that_are_no_rows_are_said_to_be_missing(tmp_path: Path) -> None:
    writer = PredictionsCSV(path=str(tmp_path / "predictions.csv"))
    with pytest.warns(UserWarning, match=r"No predictions.csv: predict_step gives str"):
        quiet_trainer([writer]).predict(Echo("text"), DataLoader(Numbered("image"), batch_size=4))
    assert writer.written is None and not list(tmp_path.iterdir())


def test_sample_names__go_through_subsets_concatenations_and_wrappers() -> None:
    one, other = (
        Numbered("image", paths=[f"{i}.jpg" for i in range(6)]),
        Numbered("image", num=2, files=["x.png", "y.png"]),
    )

    class Wrapper(Dataset[Any]):
        dataset = one

        def __len__(self) -> int:
            return 6

    assert sample_names(Subset(Wrapper(), [5, 0])) == ["5.jpg", "0.jpg"]
    assert sample_names(ConcatDataset([Subset(one, [1]), other])) == ["1.jpg", "x.png", "y.png"]
    assert sample_names(ConcatDataset([Numbered("image"), other])) is None


def test_are_names__tells_samples_from_classes() -> None:
    assert are_names(["a.jpg", "a.jpg", "a.jpg"])
    assert are_names(["digit 5, image 0", "digit 5, image 1"])
    assert not are_names(["cat", "dog", "cat", "dog"])
