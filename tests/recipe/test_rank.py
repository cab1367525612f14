"""Backbones ranked: against a plain forward and scikit-learn, from the command line, and going on where it was."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from matplotlib.image import imread
from PIL import Image
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression

from lightning_unfreeze.cli import main
from lightning_unfreeze.data.modules import ImageFolderData
from lightning_unfreeze.module import TransferClassifier
from lightning_unfreeze.recipe.rank import rank_backbone


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes of coloured noise; training, validation and test images."""
    generator = torch.Generator().manual_seed(0)
    for split, num in (("train", 12), ("val", 8), ("test", 10)):
        for label, colour in enumerate(("red", "green", "blue")):
            folder = tmp_path / "photos" / split / colour
            folder.mkdir(parents=True)
            for index in range(num):
                pixels = torch.randint(0, 160, (3, 40, 40), generator=generator)
                pixels[label] += int(torch.randint(0, 90, (), generator=generator))
                Image.fromarray(pixels.permute(1, 2, 0).byte().numpy()).save(folder / f"{index}.png")
    return tmp_path / "photos"


@pytest.fixture
def weights(tmp_path: Path) -> list[str]:
    """Two small networks as files, one called after its model."""
    files = []
    for seed, name in enumerate(("test_resnet.own.safetensors", "other.safetensors")):
        torch.manual_seed(seed)
        model = timm.create_model("test_resnet" if seed == 0 else "test_vit", num_classes=0)
        save_file(model.state_dict(), tmp_path / name)
        files.append(str(tmp_path / name))
    return [files[0], f"test_vit={files[1]}"]


def test_rank_backbone__is_logistic_regression_on_a_plain_forward(photos: Path, weights: list[str]) -> None:
    module = TransferClassifier("test_resnet", 3, pretrained=weights[0])
    data = ImageFolderData(str(photos), batch_size=16, image_size_px=32, data_config=module.data_config)
    data.setup("fit")
    ranked = rank_backbone("mine", module, data, torch.device("cpu"))

    model: Any = module.model.eval()
    rows = {}
    for split in ("train", "test"):
        samples = [data.dataset(split)[index] for index in range(len(data.dataset(split)))]  # type: ignore[arg-type]
        with torch.no_grad():
            images = torch.stack([image for image, _ in samples])
            features = model.forward_head(model.forward_features(images), pre_logits=True).double()
        rows[split] = features, torch.tensor([label for _, label in samples])
    features, targets = rows["train"]
    ridge = ranked.ridge * float(features.var(0, correction=0).mean())
    head = LogisticRegression(C=1 / (ridge * len(features)), tol=1e-9, max_iter=20_000)
    head.fit(features.numpy(), targets.numpy())
    expected = head.score(rows["test"][0].numpy(), rows["test"][1].numpy())
    assert ranked.held_out == 30 and ranked.accuracy == pytest.approx(expected)
    assert expected > 0.5
    assert ranked.parameters == sum(parameter.numel() for parameter in module.parameters())
    assert ranked.images_per_second > 0 and ranked.low < expected < ranked.high


@pytest.mark.pictures
def test_cli__rank_takes_files_and_goes_on_where_it_was(
    photos: Path, weights: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rank"
    options = [f"--data={photos}", f"--out={out}", "--image_size_px=32", "--device=cpu"]
    main(["rank", "--backbones", weights[0], *options])
    kept = json.loads((out / "test_resnet.json").read_text())
    kept["row"]["seconds"] = 1234.5
    (out / "test_resnet.json").write_text(json.dumps(kept))
    main(["rank", "--backbones", *weights, *options])
    with (out / "rank.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["backbone"] for row in rows} == {"test_resnet", "test_vit"}
    assert [float(row["accuracy"]) for row in rows] == sorted((float(row["accuracy"]) for row in rows), reverse=True)
    assert "1234.5" in {row["seconds"] for row in rows}  # the first was not done again
    assert imread(out / "rank.png").std() > 0.02
    shown = capsys.readouterr().out
    assert "test_vit" in shown and "30 held-out images" in shown
    main(["rank", "--backbones", weights[0], *options[:2], "--image_size_px=48", "--device=cpu"])
    assert json.loads((out / "test_resnet.json").read_text())["row"]["seconds"] < 1000  # other images: done again


def test_cli__rank_leaves_broken_photos_out_and_looks_again_at_other_photos(
    photos: Path, weights: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (photos / "train" / "red" / "cut.png").write_bytes((photos / "train" / "red" / "0.png").read_bytes()[:90])
    options = [f"--data={photos}", f"--out={tmp_path / 'rank'}", "--image_size_px=32", "--device=cpu"]
    with pytest.warns(UserWarning, match=r"Skipped 1 of 91 files that are no images: .*cut\.png"):
        main(["rank", "--backbones", *weights, *options])
    assert sum("photos: 36 train" in line for line in caplog.messages) == 1, "said once, not for each backbone"
    kept = tmp_path / "rank" / "test_resnet.json"
    first = json.loads(kept.read_text())
    (photos / "train" / "red" / "cut.png").unlink()
    (photos / "test" / "red" / "0.png").unlink()
    main(["rank", "--backbones", weights[0], *options])
    assert (first["row"]["held_out"], json.loads(kept.read_text())["row"]["held_out"]) == (30, 29)


@pytest.mark.parametrize(
    ("word", "says"), [("no_such_*", "timm has no pretrained model"), ("test_resne", "test_resne"), ("FILE", "NAME=")]
)
def test_cli__rank_says_what_it_does_not_know(
    word: str, says: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if word == "FILE":
        word = str(tmp_path / "weights.pth")
        Path(word).touch()
    with pytest.raises(SystemExit) as ended:
        main(["rank", "--backbones", word, f"--data={photos}", f"--out={tmp_path / 'rank'}"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert says in told and "Traceback" not in told
