"""What a trained classifier knows of its classes and its input, held against the data that it is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_unfreeze import __version__
from lightning_unfreeze.data.folders import some

_OF_THE_INPUT = ("input_size", "mean", "std", "interpolation", "crop_pct")
_MADE_WITH = ("lightning", "torch", "torchvision", "timm")


def check_known(names: Sequence[str], known: Sequence[str]) -> None:
    """Refuses data with classes that the classifier does not know.

    Raises:
        MisconfigurationException: With the names on both sides.
    """
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise MisconfigurationException(
            f"The data has classes that the model was not trained on ({some(unknown)}), it knows {some(known)}: give "
            "data of those classes, rename the folders, or train a model for the new classes (without --ckpt_path)."
        )


def input_differences(trained: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """How images are prepared otherwise than in training, one entry per option.

    >>> input_differences({"input_size": (3, 64, 64), "crop_pct": 0.9}, {"input_size": [3, 96, 96], "crop_pct": 0.9})
    ['input_size (3, 96, 96) instead of (3, 64, 64)']
    """
    both = [name for name in _OF_THE_INPUT if name in given and name in trained]
    pairs = [(name, _plain(given[name]), _plain(trained[name])) for name in both]
    return [f"{name} {here} instead of {there}" for name, here, there in pairs if here != there]


def normalisation_of_file(file: str, backbone: str, expected: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """What is said of weights from a file, which does not tell the input that they were trained on.

    Args:
        file: Of weights.
        backbone: Their network.
        expected: The data config that the network's name stands for.
        given: That of the data module.
    """
    values = {name: [round(float(each), 4) for each in given[name]] for name in ("mean", "std")}
    by_name = all(_plain(given[name]) == _plain(expected[name]) for name in values)
    source = f"known for {backbone!r}" if by_name else "of the data module"
    return (
        f"{file} does not tell how images were normalised for it; here they are with mean {values['mean']} and std "
        f"{values['std']}, {source}. If those were others, give them: data_config={{'mean': ..., 'std': ...}} "
        "(--model.data_config)."
    )


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a data config that says how images are prepared, in primitives."""
    known = {name: config[name] for name in (*_OF_THE_INPUT, "crop_mode") if name in config}
    # lists: LightningCLI reads the checkpoint's hyperparameters, and its parser gives no tuple back as it was
    return {name: list(value) if isinstance(value, list | tuple) else value for name, value in known.items()}


def versions() -> dict[str, str]:
    """The packages that a network depends on, for the checkpoint."""
    return {"lightning-unfreeze": __version__, **{name: version(name) for name in _MADE_WITH}}


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value
