"""Other processes for a test: forked from it, so that they import nothing again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="forks its processes")
HANGS_SECONDS = 600.0  # longer than anything takes, also on a machine that is busy with other things


@dataclass
class Forked:
    """A child process."""

    pid: int

    def wait(self, timeout_seconds: float = HANGS_SECONDS) -> int:
        """How it ended: its exit status, or minus the signal that killed it. One that hangs is killed: -14."""
        end = time.monotonic() + timeout_seconds
        while time.monotonic() < end:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        self.kill()
        os.waitpid(self.pid, 0)
        return -signal.SIGALRM

    def is_running(self) -> bool:
        """Asked of a child that nobody has waited for."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def fork(action: Callable[[], object]) -> Forked:
    """Runs `action` in a child process, which then ends: with status 0, that of a `SystemExit`, or 1 for an error."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)  # from Python 3.12 on
        pid = os.fork()
    if pid:
        return Forked(pid)
    status = 1
    try:
        action()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def until(condition: Callable[[], Any]) -> Any:
    """Waits for what another process does; its value."""
    end = time.monotonic() + HANGS_SECONDS
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.01)
    raise TimeoutError("the other process never did it")
