"""Runs that cost nothing, for worker processes: this module imports next to nothing, so that they start quickly."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class MadeUp:
    """A task, and the record that comes of it: `line` is what a log holds of it then."""

    key: str
    seed: int
    line: str

    def to_line(self) -> str:
        return self.line

    def told(self, **environment: str) -> MadeUp:
        return replace(self, line=json.dumps({**json.loads(self.line), "environment": environment}) + "\n")


def made_in(seconds: float) -> Callable[..., MadeUp]:
    """Runs that take a while and say which process made them."""

    def sleeping(task: MadeUp, *_: Any) -> MadeUp:
        time.sleep(seconds)
        return task.told(pid=str(os.getpid()))

    return sleeping


def dies_once(task: MadeUp, *_: Any) -> MadeUp:
    """Ends its process the first time that seed 2 comes."""
    mark = Path(os.environ["STUDY_TEST_MARK"])
    if task.seed == 2 and not mark.exists():
        mark.touch()
        os._exit(9)
    return task


def dies(*_: Any) -> MadeUp:
    os._exit(9)
