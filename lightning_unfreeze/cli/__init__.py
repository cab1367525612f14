"""The console script `lightning-unfreeze`: this module finds the command, each command has a module of its own."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

_HELP = """\
usage: lightning-unfreeze COMMAND --config FILE.yaml [--OPTION VALUE ...]

  fit       run all stages of the plan
  validate  score a checkpoint on the validation images, with TTAEval augmented
  test      the same on the test images
  predict   write predictions.csv for a folder of images; or --ckpt_path FILE PHOTO... alone
  explain   show where a checkpoint is wrong: a page with the worst photos, tables, a model card
  export    write a checkpoint as ONNX or torch.export file, with the normalisation inside
  plan      show what each stage trains, at which rates and at what cost; trains nothing
  lr-find   make the range tests alone, with tables and curves; trains nothing
  rank      which backbone suits your images: one pass and a solved head each, a table and a picture
  study     plan|run|report|merge: which steps of the recipe pay on your data

options: lightning-unfreeze fit --help, and of a module or data module
  lightning-unfreeze fit --model.help TransferClassifier
  lightning-unfreeze fit --data.help ImageFolderData
"""
_OF_THE_TRAINER = ("fit", "validate", "test", "predict")
_COMMANDS = {
    **dict.fromkeys(_OF_THE_TRAINER, "run"),
    "explain": "explain",
    "export": "export",
    "plan": "plan",
    "lr-find": "lr_find",
    "rank": "rank",
    "study": "study",
}
_PACKAGE = Path(__file__).parents[1]


def main(args: Sequence[str] | None = None) -> None:
    """Runs `lightning-unfreeze COMMAND ...`; errors that a user can mend are one line, exit status 2.

    Set `LIGHTNING_UNFREEZE_TRACEBACK=1` for the traceback of such an error.

    Args:
        args: Command line; None takes the process's own.
    """
    arguments = _with_packaged_configs([*(sys.argv[1:] if args is None else args)])
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_HELP)  # before Lightning is imported, which takes seconds
        return
    from lightning_unfreeze.cli.errors import one_line_errors

    # Lightning 2.6 on torch 2.14: nothing that a user of the command line could mend
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    with one_line_errors():
        command = arguments[0]
        if command.startswith("-"):  # LightningCLI's own, e.g. `--config FILE fit`
            command = "fit"
        elif command not in _COMMANDS:
            raise ValueError(f"{command!r} is no command; give one of {', '.join(_COMMANDS)}")
        import_module(f"lightning_unfreeze.cli.{_COMMANDS[command]}").main(arguments)


def _with_packaged_configs(arguments: list[str]) -> list[str]:
    """`configs/NAME.yaml` means the package's own file where the current folder has none."""
    found = []
    for argument in arguments:
        head, equals, tail = argument.rpartition("=")
        if Path(tail).parts[:1] == ("configs",) and not Path(tail).exists():
            homes = (_PACKAGE / "configs", _PACKAGE.parent / "configs")  # of a wheel; of a checkout, installed with -e
            packaged = [home / Path(tail).name for home in homes if (home / Path(tail).name).is_file()]
            tail = str(packaged[0]) if packaged else tail
        found.append(head + equals + tail)
    return found
