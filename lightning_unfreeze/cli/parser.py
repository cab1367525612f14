"""LightningCLI as this package uses it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

import lightning_unfreeze
from lightning_unfreeze.callbacks.error_report import ErrorReport
from lightning_unfreeze.callbacks.predictions import PredictionsCSV
from lightning_unfreeze.callbacks.tta import TTAEval
from lightning_unfreeze.cli.errors import cause
from lightning_unfreeze.cli.options import StageOptions, change_stages, take_stage_options
from lightning_unfreeze.module import TransferClassifier

for _name in lightning_unfreeze.__all__:  # the parser knows a short class name once its class is loaded
    getattr(lightning_unfreeze, _name)


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line, without the usage of some 300 options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the program with the line that says what is wrong."""
        sys.stderr.write(f"error: {cause(message)} (options: lightning-unfreeze --help)\n")
        sys.exit(2)


class StagedCLI(LightningCLI):
    """LightningCLI for a script of your own, with `--stage.NAME.OPTION VALUE` for the stages of its `GradualUnfreeze`.

    Its arguments are those of LightningCLI: `StagedCLI(MyModule, MyDataModule)` is the whole script, and
    `python script.py fit --config config.yaml --stage.full.lr 1e-4` changes the stage `full` of the config alone.
    """

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Takes the options of stages out of the command line; LightningCLI parses the rest."""
        self._stage_options: StageOptions = {}
        if isinstance(args, dict | Namespace):  # a config, which has the stages themselves
            super().parse_arguments(parser, args)
            return
        line = list(sys.argv[1:] if args is None else args)
        self._stage_options = take_stage_options(line)
        # LightningCLI would warn of a line beside that of the process, by which DDP starts the other ranks
        self.config = parser.parse_args(line)

    def before_instantiate_classes(self) -> None:
        """Changes single stages, as the command line says."""
        if self._stage_options:
            change_stages(self._value(self.config, "trainer").callbacks, self._stage_options)

    def _value(self, config: Any, key: str) -> Any:
        return config.get(str(self.subcommand), config).get(key)


class SavesWhenItRuns(SaveConfigCallback):
    """Writes `config.yaml` when all is checked: written in `setup`, it would stay of a start that fails after that."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Too early; nothing is checked yet."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the config of a fit."""
        super().setup(trainer, pl_module, "fit")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes that of `validate`; the validations of a fit come before it trains, or after."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            super().setup(trainer, pl_module, "validate")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes that of `test`."""
        super().setup(trainer, pl_module, "test")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes that of `predict`."""
        super().setup(trainer, pl_module, "predict")


def add_report(callbacks: list[Any]) -> None:
    """Adds what shows where a model is wrong, as far as it is not there."""
    callbacks += [kind() for kind in (TTAEval, ErrorReport) if kind not in map(type, callbacks)]


class UnfreezeCLI(StagedCLI):
    """StagedCLI for any LightningModule and LightningDataModule; the plan sets the number of epochs."""

    def __init__(
        self,
        args: Sequence[str],
        run: bool = True,
        all_probabilities: bool = False,
        explains: bool = False,
    ) -> None:
        self._explains, self._all_probabilities = explains, all_probabilities
        try:
            super().__init__(
                pl.LightningModule,
                pl.LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                # what explains leaves no run of its own behind: its files lie beside the checkpoint
                save_config_callback=None if explains else SavesWhenItRuns,
                save_config_kwargs={"overwrite": True},
                seed_everything_default=0,
                # -1 instead of Lightning's None: GradualUnfreeze sets the number, and None makes Lightning warn of 1000
                trainer_defaults={"max_epochs": -1},
                parser_class=OneLineParser,
                # the module's own `configure_optimizers` decides; a scheduler beside the stages would fight them
                auto_configure_optimizers=False,
                args=list(args),
                run=run,
            )
        except BaseException:
            self._remove_empty_folders()
            raise

    def _remove_empty_folders(self) -> None:
        """Lightning makes the folder of a run before any check; of one that failed at the start nothing is in it."""
        trainer = getattr(self, "trainer", None)
        for logger in trainer.loggers if trainer is not None else ():
            folder = Path(logger.log_dir or "")
            if folder.name == f"version_{logger.version}":
                with suppress(OSError):  # not empty, or not there
                    folder.rmdir()

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The Trainer of the config.

        Raises:
            MisconfigurationException: For options that go together badly, e.g. a callback that is listed twice.
        """
        if self._explains:
            kwargs["logger"] = False
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (RuntimeError, TypeError) as error:  # no user's code has run yet, so it is the config's fault
            raise MisconfigurationException(str(error)) from error
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        kinds = {type(each) for each in callbacks}
        if self.subcommand == "predict" and PredictionsCSV not in kinds:
            callbacks.append(PredictionsCSV(all_probabilities=self._all_probabilities))
        if self._explains or (self.subcommand == "test" and TTAEval in kinds):
            add_report(callbacks)
        for callback in trainer.checkpoint_callbacks if self._explains else ():
            if isinstance(callback, ModelCheckpoint):
                callback.dirpath = str(Path(self._value(self.config_init, "ckpt_path")).parent)
        return trainer

    def before_validate(self) -> None:
        """Refuses a head that was never trained."""
        if self._value(self.config_init, "ckpt_path") is not None:
            return
        if isinstance(self.model, TransferClassifier) and self.model.has_drawn_head:
            raise MisconfigurationException(
                f"{self.subcommand} without --ckpt_path FILE: the head of the model is drawn at random, its answers "
                "would mean nothing. Give the checkpoint of a fit (runs/.../checkpoints/*.ckpt)."
            )
        rank_zero_warn(
            f"{self.subcommand} without --ckpt_path: the weights are those that {type(self.model).__name__} starts "
            "with, no fit's."
        )

    before_test = before_predict = before_validate
