"""Options that are no options of LightningCLI: taken out of the command line before it is parsed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_unfreeze.stages.plan import Stage

STAGE = "--stage."

StageOptions = dict[str, dict[str, Any]]


def take_flag(arguments: list[str], flag: str) -> bool:
    """Whether a flag is there; it is taken out."""
    given = flag in arguments
    while flag in arguments:
        arguments.remove(flag)
    return given


def take_photos(arguments: list[str]) -> list[Path]:
    """The files and folders at the end of the line that are no option's value; they are taken out."""
    photos: list[Path] = []
    while len(arguments) > 1 and not arguments[-1].startswith("-"):
        before = arguments[-2]
        if before.startswith("--") and "=" not in before:
            break
        photos.insert(0, Path(arguments.pop()))
    return photos


def take_stage_options(arguments: list[str]) -> StageOptions:
    """Stage name -> option -> value of all `--stage.NAME.OPTION VALUE`; they are taken out.

    Raises:
        ValueError: For an option that a stage does not have, or one without a value that YAML knows.

    >>> line = ["fit", "--stage.full.lr_mult", "[1e-3, 1]", "--config=a.yaml", "--stage.full.until=none"]
    >>> take_stage_options(line), line
    ({'full': {'lr_mult': [0.001, 1], 'until': None}}, ['fit', '--config=a.yaml'])
    """
    found: StageOptions = {}
    place = 0
    while place < len(arguments):
        if not arguments[place].startswith(STAGE):
            place += 1
            continue
        given = arguments.pop(place)
        option, equals, value = given.partition("=")
        if not equals:
            if place >= len(arguments) or arguments[place].startswith("--"):
                raise ValueError(f"{option}: give a value.")
            value = arguments.pop(place)
        name, _, field = option.removeprefix(STAGE).rpartition(".")
        known = [key for key in get_type_hints(Stage) if key != "name"]
        if not name or field not in known:
            raise ValueError(f"{option}: give {STAGE}NAME.OPTION VALUE, OPTION one of {', '.join(known)}.")
        try:
            found.setdefault(name, {})[field] = _value(value)
        except yaml.YAMLError:
            raise ValueError(f"{option}: {value!r} is no value: brackets and quotes in it have to close.") from None
    return found


def change_stages(callbacks: Any, options: StageOptions) -> None:
    """Puts the options into the stages of a parsed config.

    Raises:
        MisconfigurationException: For a stage that is not in the plan, and for values that make no `Stage`.
    """
    listed = callbacks if isinstance(callbacks, Sequence) else [callbacks]
    stages: list[Any] = [
        stage
        for callback in listed
        if isinstance(callback, Namespace) and callback.get("class_path", "").endswith("GradualUnfreeze")
        for stage in callback.init_args.stages
    ]
    names = [stage["name"] for stage in stages]
    for name, changes in options.items():
        if name not in names:
            raise MisconfigurationException(
                f"{STAGE}{name}: the plan has no such stage, it has {', '.join(names) or 'no stages'}."
            )
        stage = stages[names.index(name)]
        for field, value in changes.items():
            stage[field] = value
        try:
            Stage(**dict(stage.items()))
        except ValueError as error:
            given = ", ".join(f"{STAGE}{name}.{field}" for field in changes)
            raise MisconfigurationException(f"{given}: {error}") from None


def _value(text: str) -> Any:
    return None if text.lower() == "none" else _with_numbers(yaml.safe_load(text))  # Python's word for YAML's null


def _with_numbers(value: Any) -> Any:
    """YAML 1.1 takes 1e-3, without a dot, for a text."""
    if isinstance(value, list):
        return [_with_numbers(each) for each in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
