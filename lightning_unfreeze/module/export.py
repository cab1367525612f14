"""A trained classifier as one file that runs without this package: ONNX, or torch.export's `pt2`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

Format = Literal["onnx", "pt2"]

TOLERANCE = 1e-5


class Deployed(nn.Module):
    """From images in [0, 1], not normalised, to probabilities: what is exported.

    Args:
        network: From normalised images to logits.
        mean: Per channel, of the normalisation.
        std: Per channel.
        several: Whether an image may have several labels: a sigmoid in place of the softmax.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float], several: bool) -> None:
        super().__init__()
        self.network, self.several = network, several
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities `(N, C)` of images `(N, channels, H, W)` in [0, 1]."""
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits.sigmoid() if self.several else logits.softmax(-1)


def export(
    deployed: Deployed, path: Path, file_format: Format, input_size: Sequence[int], facts: Mapping[str, Any]
) -> float:
    """Writes the file, runs it, and compares it with the network; returns the largest difference of a probability.

    The batch size is free. The facts (class names and so on) travel in the file: ONNX's metadata, or the extra file
    `facts.json`.

    Raises:
        MisconfigurationException: If a package is missing, or the file computes something else than the network.
    """
    deployed.eval()
    images = torch.rand(3, *input_size, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch", min=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        expected = deployed(images)
        if file_format == "pt2":
            program = torch.export.export(deployed, (images,), dynamic_shapes={"images": {0: batch}})
            torch.export.save(program, path, extra_files={"facts.json": json.dumps(dict(facts))})
            found = torch.export.load(path).module()(images)
        else:
            found = torch.from_numpy(_export_onnx(deployed, path, images, batch, facts))
    difference = float((found - expected).abs().max())
    if not difference <= TOLERANCE:
        path.unlink()
        raise MisconfigurationException(
            f"The {file_format} file gives probabilities that differ by {difference:.1e} from the network's, more than "
            f"{TOLERANCE:.0e}; it was removed. Try the other format."
        )
    return difference


def _export_onnx(deployed: Deployed, path: Path, images: Tensor, batch: Any, facts: Mapping[str, Any]) -> Any:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter is built on it)
    except ModuleNotFoundError as error:
        raise MisconfigurationException(
            f"ONNX needs {error.name}: python -m pip install 'lightning-unfreeze[export]', or give --format pt2."
        ) from error
    program = torch.onnx.export(
        deployed,
        (images,),
        dynamo=True,
        input_names=["images"],
        output_names=["probabilities"],
        dynamic_shapes={"images": {0: batch}},
        verbose=False,
    )
    if program is None:
        raise MisconfigurationException("torch gave no ONNX program; try --format pt2.")
    program.save(path)
    model = onnx.load(path)
    for key, value in facts.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, json.dumps(value)
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    return found
