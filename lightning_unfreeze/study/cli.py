"""`lightning-unfreeze study plan|run|report|merge`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import ArgumentParser

from lightning_unfreeze.data.digits import DigitsData
from lightning_unfreeze.data.modules import ImageFolderData
from lightning_unfreeze.module import TransferClassifier
from lightning_unfreeze.reporting import show, table_of
from lightning_unfreeze.study.judge.verdict import exit_code
from lightning_unfreeze.study.runner import Study
from lightning_unfreeze.study.show.merge import merge_studies
from lightning_unfreeze.study.show.result import load_study

COMMANDS = ("plan", "run", "report", "merge")
NAMED = (TransferClassifier, ImageFolderData, DigitsData)
"""Classes that a config may name without their module: jsonargparse knows those that are imported."""


@dataclass(frozen=True)
class FromConfig:
    """Makes the object of a config; it can be sent to another process, and says what it makes.

    Args:
        base: `model` or `data`.
        spec: `class_path` and `init_args`.
    """

    base: str
    spec: dict[str, Any]

    def __call__(self, **changes: Any) -> Any:
        """Return a new object, with some of the arguments replaced."""
        parser = ArgumentParser(exit_on_error=False)
        kinds = {"model": pl.LightningModule, "data": pl.LightningDataModule}
        parser.add_subclass_arguments(kinds[self.base], "part", required=True)
        spec = {**self.spec, "init_args": {**self.spec.get("init_args", {}), **changes}}
        return parser.instantiate_classes(parser.parse_object({"part": spec})).part


def run_command(arguments: list[str]) -> None:
    """Run a command of the study; `run` and `report` exit with the verdict, see `judge.verdict.EXIT_CODES`.

    Args:
        arguments: What stands behind `lightning-unfreeze study`.

    Raises:
        ValueError: For arguments that are not understood.
    """
    if not arguments or arguments[0] not in COMMANDS:
        if {"-h", "--help"} & set(arguments[:1]):
            show(f"usage: lightning-unfreeze study {'|'.join(COMMANDS)} ...; each has its own --help")
            return
        raise ValueError(f"study {' '.join(arguments[:1]) or 'needs a command'}: give one of {', '.join(COMMANDS)}.")
    command, rest = arguments[0], arguments[1:]
    try:
        if command in ("report", "merge"):
            _read(command, rest)
        else:
            _study(command, rest)
    except argparse.ArgumentError as error:
        raise ValueError(" ".join(str(error).split())[:500]) from error


def _study(command: str, arguments: list[str]) -> None:
    parser = ArgumentParser(prog=f"lightning-unfreeze study {command}", exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with the arguments below")
    parser.add_class_arguments(Study, skip={"model_fn", "datamodule_fn"})
    parser.add_subclass_arguments(pl.LightningModule, "model", required=True)
    parser.add_subclass_arguments(pl.LightningDataModule, "data", required=True)
    config = parser.parse_args(arguments)
    # as text and back: plain types, which can be hashed and sent
    plain = json.loads(parser.dump(config, format="json", skip_none=False))
    given = parser.instantiate_classes(config)
    options = {name: given[name] for name in plain if name not in ("config", "model", "data")}
    study = Study(FromConfig("model", plain["model"]), FromConfig("data", plain["data"]), **options)
    plan = study.plan()
    show(table_of(plan.rows, title="arms"))
    show(table_of(plan.power_rows(), title="what can be found (points; 80 % power)"))
    for sentence in plan.sentences():
        show(sentence)
    if command == "run":
        verdict = study.run().verdict()
        if study.shard is not None:
            # a part that is made is no failure of its job, whatever the runs so far say
            show(f"shard {given.shard} is made; {verdict.note or verdict.headline[0]}")
            return
        _tell(verdict, study.out / "report")


def _read(command: str, arguments: list[str]) -> None:
    parser = ArgumentParser(prog=f"lightning-unfreeze study {command}", exit_on_error=False)
    if command == "report":
        parser.add_argument("folder", type=str, help="what `study run` wrote to")
        parser.add_argument("--charge_tuning", type=bool, default=False, help="count tuning among each arm's costs")
        given = parser.parse_args(arguments)
        folder = Path(given.folder)
        study = load_study(folder)
        if given.charge_tuning:
            study = replace(study, info=replace(study.info, charge_tuning=True))
        _tell(study.write(folder / "report"), folder / "report")
        return
    parser.add_argument("folders", type=str, nargs="+", help="parts of one study, or studies of several data sets")
    parser.add_argument("--out", type=str, default="runs/merged", help="where to write")
    given = parser.parse_args(arguments)
    merged = merge_studies(given.folders, given.out)
    if merged.joined is not None:
        _tell(merged.joined.verdict(), Path(given.out) / "report")
        return
    show(merged.text)
    show(f"report: {Path(given.out) / 'merged.md'}")


def _tell(verdict: Any, folder: Path) -> None:
    show(verdict.text)
    show(f"report: {folder / 'report.html'}")
    code = exit_code(verdict)
    if code:
        sys.exit(code)
