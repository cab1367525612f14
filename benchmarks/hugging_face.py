"""Hugging Face's image classifiers: their layer groups, stored features at every boundary, and LoRA; writes the docs.

For each family a published size is built without memory (the layer groups), and a tiny one with random weights is
trained: at every freeze boundary with and without stored features, which have to give bitwise equal losses and weights;
and with LoRA, whose saved adapter has to give bitwise equal logits.

    python -m benchmarks.hugging_face [FAMILY ...]   # writes these rows of the table in docs/, all in some ten minutes
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_unfreeze import GradualUnfreeze, PrecomputeFeatures, Stage, layer_groups
from tests.hugging_face import FAMILIES, HuggingFaceModule, build, photo_loader
from tests.zoo import quiet_trainer, same_weights, weights_of

PAGE = Path(__file__).parents[1] / "docs" / "hugging_face_and_peft.md"
HEADER = "| family | layer groups of the default size | stored at, bitwise | LoRA, saved and loaded |"
START, END = "<!-- table: python -m benchmarks.hugging_face -->\n", "<!-- end of the table -->"


def published(family: str) -> list[str]:
    """Layer groups of the default config, which is that of a published size."""
    import transformers

    with torch.device("meta"):
        config = getattr(transformers, f"{family}Config")(num_labels=10)
        return list(layer_groups(getattr(transformers, f"{family}ForImageClassification")(config)))


def fit(network: nn.Module, size_px: int, stage: Stage, folder: str) -> HuggingFaceModule:
    torch.manual_seed(0)
    module = HuggingFaceModule(network)
    callbacks: list[Any] = [GradualUnfreeze([stage])]
    if stage.precompute:
        callbacks.append(PrecomputeFeatures(store_dir=folder, policy="always"))
    quiet_trainer(callbacks).fit(module, photo_loader(size_px), photo_loader(size_px))
    return module


def stored_boundaries(family: str, folder: str) -> tuple[int, int]:
    """Boundaries at which stored features gave the weights of training on images, and boundaries there are."""
    num_groups, size_px, equal = len(layer_groups(build(family))), FAMILIES[family][1], 0
    for train in range(1, num_groups):
        plain = fit(build(family), size_px, Stage("plain", train=train, epochs=1), folder)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "stage ")  # what could not be stored
            try:
                stored = fit(build(family), size_px, Stage("stored", train=train, epochs=1, precompute=True), folder)
            except UserWarning as warning:
                print(f"{family}, {train} groups: {warning}")
                continue
        equal += plain.losses == stored.losses and same_weights(weights_of(plain), weights_of(stored)) == []
    return equal, num_groups - 1


def adapters_come_back(family: str, folder: str) -> str:
    """LoRA on every linear layer and convolution of the blocks, all trained, saved and loaded."""
    import peft

    network = build(family)
    heads = layer_groups(network)["head"].parameter_names
    save = sorted({name.rpartition(".")[0] for name in heads})
    inside = {f"{name}.weight" for name, part in network.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)}
    targets = [name.removesuffix(".weight") for name in sorted(inside - set(heads))]
    targets = [name for name in targets if getattr(network.get_submodule(name), "groups", 1) == 1]
    config = peft.LoraConfig(target_modules=targets, modules_to_save=save, r=2)
    adapted, size_px = peft.get_peft_model(network, config), FAMILIES[family][1]
    try:
        fit(adapted, size_px, Stage("adapters", train="all", epochs=1), folder)
    except AttributeError as error:
        return f"not by PEFT: {error}"
    adapted.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(build(family), folder).eval()
    images = torch.randn(4, 3, size_px, size_px)
    with torch.no_grad():
        difference = loaded(pixel_values=images).logits - adapted.eval()(pixel_values=images).logits
    return "bitwise" if not difference.any() else f"within {difference.abs().max():.1g}"


def row(family: str) -> str:
    names = published(family)
    shown = names if len(names) <= 5 else [*names[:2], "...", *names[-2:]]
    with tempfile.TemporaryDirectory() as folder:
        equal, count = stored_boundaries(family, folder)
        adapters = adapters_come_back(family, folder)
    groups = f"{len(names)}: {', '.join(name if name == '...' else f'`{name}`' for name in shown)}"
    return f"| {family} | {groups} | {equal} of {count} | {adapters} |"


def main() -> None:
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    before, _, rest = PAGE.read_text().partition(START)
    table, _, after = rest.partition(END)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines()[2:]}
    for family in sys.argv[1:] or FAMILIES:
        rows[family] = row(family)
        print(rows[family], flush=True)
        lines = [HEADER, "|---|---|---|---|", *(rows[name] for name in FAMILIES if name in rows), END]
        PAGE.write_text(before + START + "\n".join(lines) + after)


if __name__ == "__main__":
    main()
