"""What makes two runs the same: the code that made them, and the functions that made their parts."""

from __future__ import annotations

import functools
import hashlib
import inspect
from pathlib import Path
from typing import Any

import lightning_unfreeze

_READERS = ("study/judge/", "study/show/", "study/cli.py")
"""What only reads finished runs."""


def code_version(package: Path = Path(lightning_unfreeze.__file__).parent) -> str:
    """Return the version with a digest of all source that a run's result may depend on.

    A version number alone stays the same while a checkout changes, and a study that goes on after an edit would pair
    runs of two programs. What only reads finished runs does not count.

    Args:
        package: Folder of the package.
    """
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if not name.startswith(_READERS):
            digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{lightning_unfreeze.__version__}+{digest.hexdigest()[:12]}"


def describe(function: Any) -> Any:
    """Return what makes two functions the same ones for a study: their own word, or name and source text.

    >>> describe(functools.partial(int, base=2))[1:]
    [[], {'base': '2'}]
    """
    if hasattr(function, "spec"):
        return function.spec
    if isinstance(function, functools.partial):
        given = {name: repr(value) for name, value in function.keywords.items()}
        return [describe(function.func), [repr(value) for value in function.args], given]
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        source = ""
    return [getattr(function, "__module__", ""), getattr(function, "__qualname__", type(function).__name__), source]
