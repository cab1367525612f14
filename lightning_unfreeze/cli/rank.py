"""`rank`: which backbone suits the images, before anything is trained."""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import timm
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_unfreeze.data.modules import ImageFolderData
from lightning_unfreeze.module import TransferClassifier
from lightning_unfreeze.recipe.rank import Ranked, plot_ranking, rank_backbone
from lightning_unfreeze.reporting import show, table_of, write_csv, write_whole

_PATTERN = re.compile(r"[*?\[]")


def main(arguments: Sequence[str]) -> None:
    """Writes `rank.csv`, `rank.png` and one JSON file a backbone, and prints the table; goes on where it was."""
    options = _options(arguments[1:])
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # a broken photo is no reason not to compare; it is named, and `fit` will ask what to do about it
    photos = ImageFolderData(
        str(options.data), options.batch_size, options.image_size_px, num_workers=options.workers, corrupt="skip"
    )
    photos.setup("fit")
    ranked = []
    for backbone, weights in _asked_for(options.backbones):
        size = options.image_size_px
        settings = {"data": str(options.data.resolve()), "found": photos.found, "image_size_px": size}
        file = options.out / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', backbone)}.json"
        kept = json.loads(file.read_text()) if file.is_file() else {}
        if kept.get("settings") != settings:
            module = TransferClassifier(backbone, photos.num_classes, pretrained=weights)
            row = rank_backbone(backbone, module, photos.prepared_for(module.data_config), device)
            kept = {"settings": settings, "row": asdict(row)}
            write_whole(file, json.dumps(kept))
        ranked.append(Ranked(**kept["row"]))
    ranked.sort(key=lambda row: -row.accuracy)
    write_csv(options.out / "rank.csv", [asdict(row) for row in ranked])
    plot_ranking(ranked).savefig(options.out / "rank.png", dpi=120)
    held_out = ranked[0].held_out
    show(table_of([_shown(row) for row in ranked], title=f"a solved head on each backbone, {held_out} held-out images"))
    show(f"rank.csv and rank.png: {options.out}; nothing was fine-tuned, and intervals that overlap are no order")


def _asked_for(words: Sequence[str]) -> list[tuple[str, bool | str]]:
    """Each backbone with its weights: names, patterns of timm's pretrained names, files, and NAME=FILE."""
    found: dict[str, bool | str] = {}
    for word in words:
        name, _, file = word.partition("=")
        if file:
            found[name] = file
        elif Path(word).is_file():
            found[_name_of(Path(word))] = word
        elif _PATTERN.search(word):
            names = fnmatch.filter(timm.list_models(pretrained=True), word) or timm.list_models(word, pretrained=True)
            if not names:
                raise MisconfigurationException(f"--backbones {word}: timm has no pretrained model of such a name")
            found |= dict.fromkeys(names, True)
        else:
            found[word] = True
    return list(found.items())


def _name_of(file: Path) -> str:
    """The model that a file of weights is called after: `resnet18.a1_in1k.safetensors` is a `resnet18`."""
    architecture, *tag = file.name.split(".")
    tagged = ".".join([architecture, *tag[:1]])
    if timm.is_model(architecture):
        return tagged if tagged in timm.list_models(f"{architecture}.*", pretrained=True) else architecture
    raise MisconfigurationException(
        f"--backbones {file}: no model of timm is called {architecture!r}; write NAME={file} with the model's name"
    )


def _shown(row: Ranked) -> dict[str, object]:
    return {
        "backbone": row.backbone,
        "accuracy": round(row.accuracy, 4),
        "95 %": f"{row.low:.3f} to {row.high:.3f}",
        "images/s": round(row.images_per_second),
        "parameters": f"{row.parameters / 1e6:.1f} M",
        "seconds": round(row.seconds, 1),
        "ridge": f"{row.ridge:.0e}",
    }


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lightning-unfreeze rank", description=__doc__)
    parser.add_argument(
        "--backbones", nargs="+", required=True, help="names, patterns ('mobilenetv4*'), files of weights, NAME=FILE"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of images, as for ImageFolderData")
    parser.add_argument("--out", type=Path, default=Path("runs/rank"), help="what is there already is not done again")
    parser.add_argument("--image_size_px", type=int, default=None, help="that of each backbone where left out")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--device", default=None)
    return parser.parse_args(arguments)
