"""The console script `lightning-unfreeze`: LightningCLI's commands, `plan` and `lr-find`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import lightning_unfreeze
from lightning_unfreeze.reporting import show, table_of, write_csv

for _name in lightning_unfreeze.__all__:  # the parser knows a short class name once its class is loaded
    getattr(lightning_unfreeze, _name)

_HELP = """\
usage: lightning-unfreeze COMMAND --config FILE.yaml [--OPTION VALUE ...]

  fit       run all stages of the plan
  validate  score a checkpoint on the validation images, with TTAEval augmented
  test      the same on the test images
  predict   write predictions.csv for a folder of images
  plan      show what each stage trains, at which rates and at what cost; trains nothing
  lr-find   make the range tests alone, with tables and curves; trains nothing
  study     plan|run|report|merge: which steps of the recipe pay on your data

options: lightning-unfreeze fit --help, and of a module or data module
  lightning-unfreeze fit --model.help TransferClassifier
  lightning-unfreeze fit --data.help ImageFolderData"""
_SHOWN_CHARACTERS = 80  # of a value in an error
_EXPECTED_ERRORS = (MisconfigurationException, ValueError, NotImplementedError, OSError)


class _Parser(LightningArgumentParser):
    """A parser whose errors are one line, without the usage of some 300 options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        sys.stderr.write(f"error: {_cause(message)} (options: lightning-unfreeze --help)\n")
        sys.exit(2)


def _cause(message: str) -> str:
    r"""The line of a parser's message that says what is wrong.

    For a value that may be of several types the parser lists one error per type and the whole value; the first is that
    of the type that was meant.
    """
    if message.startswith("Caught ") and "Original Traceback" in message:  # of a DataLoader's worker
        message = message.strip().rpartition("\n")[2].partition(": ")[2]
    flat = " ".join(message.split())
    above, found, errors = flat.rpartition("Errors: - ")
    if not found:
        return flat
    _, named, key = above.rpartition('Parser key "')
    key = key.partition('"')[0] if named else ""
    value = errors.partition(" Given value: ")[2]
    if errors.startswith("Expected a <class") and len(value) < _SHOWN_CHARACTERS:
        types = above.rpartition("Subtypes: [")[2].strip().removesuffix("]").replace(", ", " or ")
        for noise in ("<class '", "'>", "typing.", "lightning.pytorch."):
            types = types.replace(noise, "")
        return f"{key}: expected {types.replace('NoneType', 'None')}, got {value}"
    for end in (" - Not a valid subclass", " - Expected a ", " Given value type:"):
        errors = errors.partition(end)[0]
    return errors if key in errors else f"{key}: {errors}"


class UnfreezeCLI(LightningCLI):
    """LightningCLI for any LightningModule and LightningDataModule; the plan sets the number of epochs."""

    def __init__(self, args: Sequence[str] | None = None, run: bool = True) -> None:
        super().__init__(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            # -1 instead of Lightning's None: GradualUnfreeze sets the number, and None makes Lightning warn of 1000
            trainer_defaults={"max_epochs": -1},
            parser_class=_Parser,
            # the module's own `configure_optimizers` decides; a scheduler beside the stages would fight them
            auto_configure_optimizers=False,
            args=None if args is None else list(args),
            run=run,
        )

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The Trainer of the config.

        Raises:
            MisconfigurationException: For options that go together badly, e.g. a callback that is listed twice.
        """
        try:
            return super().instantiate_trainer(**kwargs)
        except (RuntimeError, TypeError) as error:  # no user's code has run yet, so it is the config's fault
            raise MisconfigurationException(str(error)) from error


def main(args: Sequence[str] | None = None) -> None:
    """Runs `lightning-unfreeze COMMAND ...`; errors that a user can mend are one line, exit status 2.

    Set `LIGHTNING_UNFREEZE_TRACEBACK=1` for the traceback of such an error.

    Args:
        args: Command line; None takes the process's own.
    """
    arguments = [*(sys.argv[1:] if args is None else args)]
    arguments = _with_packaged_configs(arguments)
    commands = {"plan": _plan, "lr-find": _lr_find, "study": _study}
    process_argv, sys.argv = sys.argv, sys.argv[:1]  # LightningCLI warns of arguments that the process has besides
    try:
        command = commands.get(arguments[0]) if arguments else None
        if command is not None:
            command(arguments[1:])
        elif not arguments or arguments[0] in ("-h", "--help"):
            show(_HELP)
        elif not arguments[0].startswith("-") and arguments[0] not in UnfreezeCLI.subcommands():
            known = ", ".join([*UnfreezeCLI.subcommands(), *commands])
            raise ValueError(f"{arguments[0]!r} is no command; give one of {known}")
        else:
            cli = UnfreezeCLI(arguments)
            if cli.subcommand == "predict":
                _write_predictions(cli)
    except _EXPECTED_ERRORS as error:
        if os.environ.get("LIGHTNING_UNFREEZE_TRACEBACK"):
            raise
        sys.stderr.write(f"error: {_cause(str(error)) or type(error).__name__}\n")
        sys.exit(2)
    finally:
        sys.argv = process_argv


def _with_packaged_configs(arguments: list[str]) -> list[str]:
    """`configs/NAME.yaml` means the packaged file where the current folder has none."""
    found = []
    for argument in arguments:
        head, equals, tail = argument.rpartition("=")
        packaged = Path(__file__).parent / "configs" / Path(tail).name
        if Path(tail).parts[:1] == ("configs",) and not Path(tail).exists() and packaged.is_file():
            tail = str(packaged)
        found.append(head + equals + tail)
    return found


def _plan(arguments: list[str]) -> None:
    from lightning_unfreeze.preview.costs import plan_rows

    cli = UnfreezeCLI(arguments, run=False)
    rows = plan_rows(cli.trainer, cli.model, cli.datamodule)
    show(table_of(rows, title="plan (nothing was trained)"))
    epochs, minutes = (sum(row[name] for row in rows) for name in ("epochs", "minutes"))
    show(f"together {epochs} epochs, {minutes:.2g} minutes; range tests and validation are not counted")


def _lr_find(arguments: list[str]) -> None:
    from lightning_unfreeze.preview.range_tests import range_tests

    cli = UnfreezeCLI(arguments, run=False)
    results = range_tests(cli.trainer, cli.model, cli.datamodule)
    folder = Path(cli.trainer.default_root_dir) / "lr_find"
    for name, result in results.items():
        write_csv(folder / f"{name}.csv", result.rows())
        result.plot().savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
    rows = [
        {"stage": name, **{rule: rate or "no signal" for rule, rate in result.suggestions().items()}}
        for name, result in results.items()
    ]
    show(table_of(rows, title="learning rates by each rule (nothing was trained)"))
    show(f"curves: {folder}; each stage was tested on the weights as given, earlier stages had not trained them")


def _study(arguments: list[str]) -> None:
    try:
        from lightning_unfreeze.study.cli import run_command
    except ModuleNotFoundError as error:
        raise MisconfigurationException(
            f"the study needs {error.name}: python -m pip install 'lightning-unfreeze[study]' (in a clone: '.[study]')"
        ) from error
    run_command(arguments)


def _write_predictions(cli: UnfreezeCLI) -> None:
    """Writes `predictions.csv`: file, class, probability, for each image of the folder."""
    batches, dataset = (
        cli.trainer.predict_loop.predictions,
        getattr(cli.datamodule.predict_dataloader(), "dataset", None),
    )
    files = getattr(dataset, "targets", None)
    if not files or not batches:
        return
    if cli.trainer.world_size > 1:
        raise MisconfigurationException(
            f"each of {cli.trainer.world_size} processes predicted a share of the images, and predictions.csv takes "
            "all in their order; predict with --trainer.devices 1"
        )
    probs = torch.cat([batch["probs"] if isinstance(batch, dict) else batch for batch in batches])
    names = getattr(cli.model, "class_names", None) or [str(index) for index in range(probs.shape[1])]
    best, classes = probs.max(dim=1)
    rows = [
        {"file": str(file), "class": names[label], "probability": round(prob, 6)}
        # the first ones, under `limit_predict_batches`
        for file, label, prob in zip(files[: len(probs)], classes.tolist(), best.tolist(), strict=True)
    ]
    path = Path(cli.trainer.log_dir or cli.trainer.default_root_dir) / "predictions.csv"
    write_csv(path, rows)
    show(f"{len(rows)} predictions: {path}")
