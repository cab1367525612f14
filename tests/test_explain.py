"""`explain` and `export`: from a checkpoint to a report, and to a file that runs without this package."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch.utils.data import DataLoader

from lightning_unfreeze import TransferClassifier, TTAEval
from lightning_unfreeze.callbacks.error_report import ErrorReport
from lightning_unfreeze.cli import main
from tests.zoo import Evaluated, quiet_trainer, random_images

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*tensorboardX.*",
    "ignore:Checkpoint directory .* exists",
    "ignore:.*smaller than the logging interval",
)
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    for split in ("train", "val"):
        for label, name in enumerate(("ants", "bees")):
            (folder / "photos" / split / name).mkdir(parents=True)
            for i in range(6 if split == "train" else 3):
                Image.new("RGB", (40, 36), (60 + 90 * label, 20 * i, 100)).save(
                    folder / "photos" / split / name / f"{i}.png"
                )
    # one bee among the ants
    Image.new("RGB", (40, 36), (150, 10, 100)).save(folder / "photos" / "val" / "ants" / "a bee.png")
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(folder), "name": None}}
    stages = [{"name": "full", "epochs": 8, "lr": 0.003}]
    config = {
        "trainer": {
            "default_root_dir": str(folder),
            "logger": logger,
            "callbacks": [{"class_path": "GradualUnfreeze", "init_args": {"stages": stages}}],
        },
        "model": {
            "class_path": "TransferClassifier",
            "init_args": {"backbone": "test_resnet", "num_classes": 2, "pretrained": False},
        },
        "data": {
            "class_path": "ImageFolderData",
            "init_args": {"root": str(folder / "photos"), "batch_size": 4, "image_size_px": 32, "augmentation": "none"},
        },
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(folder / "own.yaml"), *QUIET])
    (path,) = folder.rglob("*.ckpt")
    return path


def test_explain__needs_the_checkpoint_alone_and_lists_what_predict_image_gets_wrong(checkpoint: Path) -> None:
    main(["explain", "--ckpt_path", str(checkpoint), *QUIET])
    runs = {path.name for path in checkpoint.parents[2].iterdir() if path.is_dir()}
    assert runs == {"photos", checkpoint.parents[1].name}  # no run of its own
    assert (checkpoint.parent / "tta.png").is_file()
    folder = checkpoint.parent / "explain_val"
    classifier = TransferClassifier.load_from_checkpoint(checkpoint)
    photos = sorted((checkpoint.parents[2] / "photos" / "val").rglob("*.png"))
    expected = {photo.as_posix(): (photo.parent.name, next(iter(classifier.predict_image(photo)))) for photo in photos}
    with (folder / "samples.csv").open(newline="") as file:
        samples = list(csv.DictReader(file))
    assert {row["file"]: (row["truth"], row["guess"]) for row in samples} == expected
    wrong = {name for name, (truth, guess) in expected.items() if truth != guess}
    assert {row["file"] for row in samples if row["right"] == "False"} == wrong
    losses = [float(row["loss"]) for row in samples]
    assert losses == sorted(losses, reverse=True) and len(samples) == 7
    with (folder / "confusion.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for guess in ("ants", "bees"):
                assert int(row[guess]) == list(expected.values()).count((row["truth"], guess))
    page = (folder / "index.html").read_text()
    assert f"{7 - len(wrong)} of 7 images" in page and page.count("data:image/jpeg;base64,") == 7
    card = (checkpoint.parent / "model_card.md").read_text()
    assert "ants, bees" in card and "| full | all | 8 | 0.003 |" in card and "[3, 32, 32]" in card


@pytest.mark.parametrize("split", [[], ["--split=val"]])
def test_explain__of_a_checkpoint_without_a_config_needs_the_photos_alone(
    split: list[str], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a script leaves it: nothing lies beside it. Its size and its classes travel in it."""
    alone = Path(shutil.copy(checkpoint, tmp_path / "alone.ckpt"))
    root = checkpoint.parents[2] / "photos"
    main(["explain", "--ckpt_path", str(alone), f"--data.root={root}", "--data.batch_size", "4", *split, *QUIET])
    assert "%|" not in capsys.readouterr().err  # no bar: the Trainer is as the line says
    with (tmp_path / "explain_val" / "samples.csv").open(newline="") as file:
        samples = {row["file"]: (row["truth"], row["guess"]) for row in csv.DictReader(file)}
    classifier = TransferClassifier.load_from_checkpoint(checkpoint)
    photos = sorted((root / "val").rglob("*.png"))
    expected = {photo.as_posix(): (photo.parent.name, next(iter(classifier.predict_image(photo)))) for photo in photos}
    assert samples == expected and (tmp_path / "model_card.md").is_file()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["explain", "--ckpt_path", str(alone), f"--data.root={root}", "--split=test"])
    assert "There is no test data" in capsys.readouterr().err


def test_explain__without_a_config_says_how_validation_photos_were_drawn(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = Path(shutil.copy(checkpoint, tmp_path / "alone.ckpt"))
    root = checkpoint.parents[2] / "photos"
    line = ["explain", "--ckpt_path", str(alone), "--data.seed=3"]
    main([*line, f"--data.root={root / 'train'}"])
    assert "drawn with val_fraction=0.2, seed=3: a fit that drew others" in capsys.readouterr().out
    main([*line, f"--data.root={root}"])  # which has a folder of them
    assert "were drawn" not in capsys.readouterr().out


def test_explain__without_a_checkpoint_or_a_config_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({}, tmp_path / "alone.ckpt")
    for arguments, says in (
        ([], "--ckpt_path FILE"),
        (["--ckpt_path", str(tmp_path / "alone.ckpt")], "no config.yaml"),
        (["--ckpt_path", str(tmp_path / "alone.ckpt"), "--data.root", "x", "--data.siz=3"], "data.siz"),
        (["--ckpt_path", str(tmp_path / "alone.ckpt"), "--data.root=photos"], "one of a TransferClassifier"),
        (["--ckpt_path", str(tmp_path / "alone.ckpt"), "--data.root=x", "--trainer.accelerator=gpux"], "gpux"),
    ):
        with pytest.raises(SystemExit):
            main(["explain", *arguments])
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "options"),
    [("explain", ["--ckpt_path FILE", "--split {test,val}"]), ("export", ["--ckpt_path FILE", "--format {onnx,pt2}"])],
)
def test_help__names_the_options_of_the_command(
    command: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and all(option in text for option in options), text


def test_error_report__serves_any_module_and_needs_tta(tmp_path: Path) -> None:
    loader = DataLoader(random_images(), batch_size=8)
    with pytest.raises(MisconfigurationException, match=r"add TTAEval\(\)"):
        quiet_trainer([ErrorReport()]).test(Evaluated(), loader)
    report, module = ErrorReport(num_photos=4), Evaluated()
    runner = quiet_trainer([TTAEval(figure=False), report], logger=True, default_root_dir=str(tmp_path))
    runner.test(module, loader)
    (page,) = report.pages
    assert page.read_text().count("data:image/jpeg;base64,") == 4
    module.eval()
    images, labels = random_images()[:]
    with torch.no_grad():
        guess = module.net(images).argmax(1)
    with (page.parent / "samples.csv").open(newline="") as file:
        found = {int(row["file"]): row for row in csv.DictReader(file)}
    assert [found[i]["guess"] for i in range(24)] == [str(int(g)) for g in guess]
    assert [found[i]["truth"] for i in range(24)] == [str(int(label)) for label in labels]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("file_format", ["onnx", "pt2"])
def test_export__gives_the_probabilities_of_the_checkpoint_from_unnormalised_images(
    file_format: str, several: bool, tmp_path: Path
) -> None:
    size = {"num_labels" if several else "num_classes": 5}
    module = TransferClassifier("digits_resnet", **size)
    module.class_names = ["five", "six", "seven", "eight", "nine"]
    runner = quiet_trainer([], max_epochs=1)
    runner.strategy.connect(module)
    runner.save_checkpoint(tmp_path / "model.ckpt")
    main(["export", "--ckpt_path", str(tmp_path / "model.ckpt"), "--format", file_format])
    images = torch.rand(4, 1, 32, 32)
    with torch.no_grad():
        logits = module.eval()((images - 0.3) / 0.35)  # the backbone's own mean and std
    expected = logits.sigmoid() if several else logits.softmax(1)
    path = tmp_path / f"model.{file_format}"
    if file_format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        (found,) = session.run(["probabilities"], {"images": images.numpy()})
        facts = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
        assert facts["class_names"] == module.class_names
    else:
        extra = {"facts.json": ""}
        found = torch.export.load(path, extra_files=extra).module()(images).detach().numpy()
        assert json.loads(extra["facts.json"])["class_names"] == module.class_names
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-5)


@pytest.mark.parametrize("arguments", [[], ["--ckpt_path", "x.ckpt", "--format", "tflite"], ["--ckpt", "x"]])
def test_export__says_what_it_takes(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", *arguments])
    assert "give --ckpt_path FILE" in capsys.readouterr().err
