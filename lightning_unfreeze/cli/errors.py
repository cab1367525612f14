"""A user's mistake in one line: what is wrong, and where, if it was the user's own code that said so."""

from __future__ import annotations

import linecache
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

_SHOWN_CHARACTERS = 80  # of a value in an error
_EXPECTED = (MisconfigurationException, ValueError, NotImplementedError, OSError)
_OUR_FOLDER = Path(__file__).parents[1]
_LIBRARIES = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib")})
_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>\S+)', re.M)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Around a command line of one's own: errors that a user can mend are printed in one line, exit status 2.

    All others pass, and with `LIGHTNING_UNFREEZE_TRACEBACK=1` in the environment these too.

    >>> with one_line_errors():  # LightningCLI(MyModule, MyData, parser_class=OneLineParser)
    ...     print("fit")
    fit
    """
    try:
        yield
    except _EXPECTED as error:
        if os.environ.get("LIGHTNING_UNFREEZE_TRACEBACK"):
            raise
        said = cause(str(error)) or type(error).__name__
        place = _users_place(error)
        sys.stderr.write(f"error: {said}{f' ({type(error).__name__} at {place})' if place else ''}\n")
        sys.exit(2)


def cause(message: str) -> str:
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


def _users_place(error: BaseException) -> str:
    """`FILE:LINE, in FUNCTION: CODE` of the last of the user's own lines that the error came through; "" for none."""
    frames = [(frame.filename, frame.lineno or 0, frame.name) for frame in traceback.extract_tb(error.__traceback__)]
    # of a DataLoader's worker the frames are in the text
    frames += [(found["file"], int(found["line"]), found["name"]) for found in _FRAME.finditer(str(error))]
    users = [frame for frame in frames if _is_users(frame[0])]
    if not users:
        return ""
    file, line, name = users[-1]
    code = linecache.getline(file, line).strip()
    return f"{file}:{line}, in {name}" + (f": {code}" if code else "")


def _is_users(file: str) -> bool:
    """Whether a file is neither Python's, nor installed, nor ours."""
    path = Path(file)
    if not path.is_file() or {"site-packages", "dist-packages"} & set(path.parts):
        return False
    return _OUR_FOLDER not in path.parents and not file.startswith(_LIBRARIES)
