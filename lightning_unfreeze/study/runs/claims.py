"""Who makes a run, where several processes share a study's folder, and which GPU a process uses.

Both are locks of the operating system on one byte of a file: they end with the process that holds them, however it
ends, so that nothing that was killed stays claimed. Over a network file system they need its lock service (NFS 4 and
Lustre with `flock` have one).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO

import torch

try:
    import fcntl
except ImportError:  # Windows: one process per folder and GPU
    fcntl = None  # type: ignore[assignment]


class Claims:
    """Runs that this process makes; another process that shares the file cannot claim the same ones.

    Args:
        path: File of the locks; made where it is missing.

    >>> claims = Claims(Path(tempfile.mkdtemp()) / "claims")
    >>> claims.take("0123456789abcdef"), claims.take("0123456789abcdef")
    (True, True)
    >>> claims.close()
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # kept open: closing it would end all of its locks
        self._file: IO[bytes] = open(path, "a+b")  # noqa: SIM115

    def take(self, key: str) -> bool:
        """Claim a run, named by hexadecimal digits; False where another process has it."""
        return _lock_byte(self._file, _place_of(key))

    def give_back(self, key: str) -> None:
        """End a claim."""
        if fcntl is not None:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _place_of(key))

    def close(self) -> None:
        """End all claims."""
        self._file.close()


def _place_of(key: str) -> int:
    return int(key[:15], 16)


def _lock_byte(file: IO[bytes], place: int) -> bool:
    """Lock one byte, which need not exist; False where another process holds it."""
    if fcntl is None:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except OSError:
        return False
    return True


_gpu_file: IO[bytes] | None = None


def take_gpu(runs_per_gpu: int, folder: Path | None = None) -> None:
    """Give this worker process a GPU of its own, round-robin, by `CUDA_VISIBLE_DEVICES`; once, before CUDA starts.

    The first process takes the first GPU, the next one the second, and so on; when each has a process, they get a
    second one, up to `runs_per_gpu`. A GPU is free again when its process ends. Processes beyond that share.

    Args:
        runs_per_gpu: Processes on one GPU.
        folder: Of the locks; None takes the machine's folder for temporary files.
    """
    global _gpu_file
    if _gpu_file is not None or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = given.split(",") if given else [str(index) for index in range(torch.cuda.device_count())]
    if len(gpus) < 2:
        return
    root = folder or Path(tempfile.gettempdir())
    _gpu_file = open(root / f"lightning_unfreeze-gpus-{os.getuid() if fcntl else 0}", "a+b")  # noqa: SIM115
    # a place of its own for each GPU by its name, whichever of them this process may see
    slots = [(gpu, place) for place in range(runs_per_gpu) for gpu in gpus]
    free = (gpu for gpu, place in slots if _lock_byte(_gpu_file, 64 * (hash_of(gpu) % 2**40) + place))
    os.environ["CUDA_VISIBLE_DEVICES"] = next(free, gpus[os.getpid() % len(gpus)])


def hash_of(name: str) -> int:
    """Return a number that is the same in every process (`hash` is not).

    >>> hash_of("3")
    51
    """
    return int.from_bytes(name.encode()[-6:], "big")
