"""`explain`: where a trained model is wrong."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_unfreeze.cli.checkpoints import config_beside, load_classifier
from lightning_unfreeze.cli.parser import OneLineParser, UnfreezeCLI, add_report
from lightning_unfreeze.data.modules import ImageFolderData
from lightning_unfreeze.reporting import show


def main(arguments: Sequence[str]) -> None:
    """Runs `test` (or `validate`) with an `ErrorReport`; the config is the one that the fit left, if none is given.

    A fit of a script leaves no config: then a checkpoint of a `TransferClassifier` needs the photos alone.

    Raises:
        ValueError: Without a checkpoint, or without a config and photos.
    """
    parser = argparse.ArgumentParser(
        "lightning-unfreeze explain",
        description="Shows where a checkpoint is wrong; other options are those of `lightning-unfreeze test` (of "
        "photos without a config: --data.* of ImageFolderData, and --trainer.*).",
        allow_abbrev=False,
    )
    parser.add_argument("--ckpt_path", metavar="FILE", help="a checkpoint of a fit; the report comes beside it")
    parser.add_argument("--config", "-c", metavar="FILE", action="append", help="if not the one that the fit left")
    parser.add_argument("--split", choices=("test", "val"), help="default: test where there is test data, else val")
    options, rest = parser.parse_known_args(list(arguments[1:]))
    if options.ckpt_path is None:
        raise ValueError("explain needs --ckpt_path FILE, a checkpoint of a fit.")
    beside = config_beside(options.ckpt_path)
    configs = options.config or ([str(beside)] if beside else [])
    if configs:
        line = [*(part for config in configs for part in ("--config", config)), "--ckpt_path", options.ckpt_path, *rest]
        _on_split(options.split, lambda command: UnfreezeCLI([command, *line], explains=True))
    elif any(argument.startswith("--data.root") for argument in rest):
        _explain_photos(options.ckpt_path, options.split, rest)
    else:
        raise ValueError(
            f"there is no config.yaml beside {options.ckpt_path}: give --config FILE, as for the fit, or after a fit "
            "in Python --data.root PHOTOS."
        )


def _on_split(split: str | None, judge: Callable[[str], object]) -> None:
    """Judges the test data, or the validation data where there is none, or what was asked for."""
    if split != "val":
        try:
            judge("test")
            return
        except MisconfigurationException as error:
            no_test = "There is no test data" in str(error) or "`test_dataloader`" in str(error)
            if split == "test" or not no_test:
                raise
        show("there is no test data: the validation data is explained")
    judge("validate")


def _explain_photos(ckpt_path: str, split: str | None, arguments: Sequence[str]) -> None:
    """Without a config: what the checkpoint knows, on photos and a Trainer that the command line names."""
    parser = OneLineParser()
    parser.add_class_arguments(ImageFolderData, "data")
    parser.add_lightning_class_args(pl.Trainer, "trainer")
    given = parser.instantiate_classes(parser.parse_args(list(arguments)))
    data, callbacks = given.data, list(given.trainer.callbacks or [])
    add_report(callbacks)
    alone = {"logger": False, "enable_checkpointing": False, "callbacks": callbacks}  # no run of its own
    trainer = pl.Trainer(**{**given.trainer, **alone})
    classifier = load_classifier(ckpt_path)
    judges = {"test": trainer.test, "validate": trainer.validate}

    def judge(command: str) -> None:
        judges[command](classifier, datamodule=data, ckpt_path=ckpt_path)
        if command == "validate" and data.draws_validation:
            show(
                f"validation photos were drawn with val_fraction={data.val_fraction:g}, seed={data.seed}: a fit "
                "that drew others trained on many of these; give its --data.val_fraction and --data.seed"
            )

    with warnings.catch_warnings():  # judging needs none of them
        warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint need to be provided")
        _on_split(split, judge)
