"""`explain`: where a trained model is wrong."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_unfreeze.cli.checkpoints import config_beside
from lightning_unfreeze.cli.parser import UnfreezeCLI
from lightning_unfreeze.reporting import show


def main(arguments: Sequence[str]) -> None:
    """Runs `test` (or `validate`) with an `ErrorReport`; the config is the one that the fit left, if none is given.

    Raises:
        ValueError: Without a checkpoint, or without a config.
    """
    parser = argparse.ArgumentParser(
        "lightning-unfreeze explain",
        description="Shows where a checkpoint is wrong; other options are those of `lightning-unfreeze test`.",
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
    if not configs:
        raise ValueError(f"there is no config.yaml beside {options.ckpt_path}: give --config FILE, as for the fit.")
    line = [*(part for config in configs for part in ("--config", config)), "--ckpt_path", options.ckpt_path, *rest]
    if options.split != "val":
        try:
            UnfreezeCLI(["test", *line], explains=True)
            return
        except MisconfigurationException as error:
            no_test = "There is no test data" in str(error) or "`test_dataloader`" in str(error)
            if options.split == "test" or not no_test:
                raise
        show("there is no test data: the validation data is explained")
    UnfreezeCLI(["validate", *line], explains=True)
