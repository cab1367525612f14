"""The log of a study: one JSON line per finished run, written so that a killed study goes on where it was.

A run is named by `run_key`, a hash of everything that decides its result. A line counts from the moment its newline
is on disk: what a kill leaves behind it is dropped on reading and cut off before the next append. Several processes
may write, one after the other by a lock; any number may read.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class CurvePoint:
    """One evaluation on the validation images during a run; costs are counted from the start of the run.

    Attributes:
        epoch: Epochs done.
        images: Training images drawn, also those whose features came from the store.
        flops: Floating-point operations of training.
        seconds: Wall-clock time of training.
        val_acc: Validation accuracy in [0, 1].
        stage: Name of the stage.
        cycle_end: Whether a learning-rate cycle ended here; only there is the accuracy comparable between arms.
    """

    epoch: float
    images: int
    flops: float
    seconds: float
    val_acc: float
    stage: str
    cycle_end: bool


@dataclass(frozen=True)
class RunRecord:
    """What one run of one arm with one seed gave. Accuracies are shares in [0, 1], on test images scored once.

    Attributes:
        key: Name of the run, from `run_key`.
        arm: Name of the arm.
        seed: Seed of subset, head initialisation, data order and augmentation.
        dataset: Name of the data set.
        code_version: Version of the code that ran it.
        acc: Test accuracy.
        acc_tta: Test accuracy with test-time augmentation.
        tta_fixed: Test images that test-time augmentation turned from wrong to right.
        tta_broken: Test images that it turned from right to wrong.
        nll: Mean negative log-likelihood, None where it is not finite.
        ece: Expected calibration error, None where it is not finite.
        n_test: Number of test images.
        correct: Whether each test image was classified correctly, packed by `pack_correct`.
        curve: Evaluations during the run, in order.
        lr_trace: Learning rate of each layer group, as (epoch, rate) pairs.
        images: Training images drawn in all.
        flops: Floating-point operations of training, the rate finder's included, tuning excluded.
        seconds: Wall-clock time of the run.
        train_seconds: Of these, training.
        eval_seconds: Of these, evaluation.
        lr_find_seconds: Of these, the learning-rate finder.
        distortion: How far the features or weights moved from the pretrained ones, by measure.
        peak_memory_bytes: Peak memory, where the device reports it.
        probe_images_per_second: Throughput of a fixed probe just before the run: how busy the machine was.
        tuned_lr: Peak learning rate that tuning chose, None for an arm that is not tuned.
        lr_at_grid_edge: Whether that was the lowest or highest rate tried, so that a better one may lie outside.
        tuning_curve: (rate, mean validation accuracy) pairs of the arm's grid.
        tuning_images: Images spent on tuning this arm.
        tuning_flops: Floating-point operations spent on tuning this arm.
        tuning_seconds: Wall-clock time spent on tuning this arm.
        acc_ood: Accuracy on shifted test images, where there are any.
        correct_shifted: Whether each test image was classified correctly under each shift, packed likewise, by shift.
        environment: What it ran on and with: device, versions, optimizer.
        schema: Version of this layout.
    """

    key: str
    arm: str
    seed: int
    dataset: str
    acc: float
    n_test: int
    correct: str
    images: int
    flops: float
    seconds: float
    curve: tuple[CurvePoint, ...] = ()
    acc_tta: float | None = None
    tta_fixed: int | None = None
    tta_broken: int | None = None
    nll: float | None = None
    ece: float | None = None
    lr_trace: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    train_seconds: float | None = None
    eval_seconds: float | None = None
    lr_find_seconds: float | None = None
    distortion: Mapping[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    probe_images_per_second: float | None = None
    tuned_lr: float | None = None
    lr_at_grid_edge: bool = False
    tuning_curve: tuple[tuple[float, float], ...] = ()
    tuning_images: int = 0
    tuning_flops: float = 0.0
    tuning_seconds: float = 0.0
    acc_ood: float | None = None
    correct_shifted: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    code_version: str = ""
    schema: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        """Refuse a record that contradicts itself: the bits must give the accuracy."""
        share = float(self.correct_bits().mean()) if self.n_test else math.nan
        if not abs(share - self.acc) < 1e-6:
            raise ValueError(
                f"got acc={self.acc} for {self.arm}, seed {self.seed}, but its {self.n_test} correctness bits "
                f"give {share}; pass `acc` as the mean of what went into `pack_correct`."
            )

    def correct_bits(self) -> npt.NDArray[np.bool_]:
        """Return whether each test image was classified correctly, `(N,)`."""
        return unpack_correct(self.correct, self.n_test)

    def shifted_shares(self) -> npt.NDArray[np.float64]:
        """Return the share of shifts under which each test image was classified correctly, `(N,)`."""
        bits = [unpack_correct(packed, self.n_test) for packed in self.correct_shifted.values()]
        return np.asarray(np.mean(bits, axis=0), dtype=np.float64)

    def to_line(self) -> str:
        """Return the record as one line of strict JSON; numbers that are not finite become null."""
        return json.dumps(_without_nan(asdict(self)), allow_nan=False, separators=(",", ":")) + "\n"

    @classmethod
    def from_line(cls, line: str) -> RunRecord:
        """Return the record of one line.

        Raises:
            ValueError: The line is no record, or of a later layout than this version knows.
        """
        row = json.loads(line)
        if not isinstance(row, dict) or row.get("schema") != SCHEMA_VERSION:
            found = row.get("schema") if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"got a record of schema {found}; this version reads schema {SCHEMA_VERSION}.")
        unknown = row.keys() - {item.name for item in fields(cls)}
        if unknown:
            raise ValueError(f"got a record with unknown fields {sorted(unknown)}.")
        row["curve"] = tuple(CurvePoint(**point) for point in row["curve"])
        row["lr_trace"] = {group: _pairs(trace) for group, trace in row["lr_trace"].items()}
        row["tuning_curve"] = _pairs(row["tuning_curve"])
        row["distortion"] = {name: math.nan if value is None else value for name, value in row["distortion"].items()}
        return cls(**row)


class RunLog:
    """The file of a study's runs. Any number of processes may read it and append to it.

    >>> import tempfile
    >>> log = RunLog(Path(tempfile.mkdtemp()) / "runs.jsonl")
    >>> log.append(RunRecord("k0", "full9", 0, "pets", 0.5, 2, pack_correct([1, 0]), images=8, flops=1e9, seconds=1.0))
    >>> [record.arm for record in log.read()]
    ['full9']
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._records: dict[str, RunRecord] = {}
        self._lines = self._read_bytes = 0
        self._reading = threading.Lock()

    def read(self) -> list[RunRecord]:
        """Return the finished runs in the order they were written, the first one of each key.

        What was read before is not read again.

        Raises:
            ValueError: A complete line is not a record of this version; says which line.
        """
        with self._reading:
            if not self.path.exists():
                return []
            with open(self.path, "rb") as file:
                file.seek(self._read_bytes)
                new = file.read()
            # The piece behind the last newline is empty, or a line that a kill tore.
            for line in new.split(b"\n")[:-1]:
                try:
                    record = RunRecord.from_line(line.decode())
                except (ValueError, TypeError, KeyError) as error:
                    where = f"{self.path}, line {self._lines + 1}"
                    raise ValueError(f"{where} is not a run of this version: {error}") from error
                self._records.setdefault(record.key, record)
                self._lines, self._read_bytes = self._lines + 1, self._read_bytes + len(line) + 1
            return list(self._records.values())

    def by_key(self) -> dict[str, RunRecord]:
        """Return the finished runs by key."""
        return {record.key: record for record in self.read()}

    def append(self, record: RunRecord) -> None:
        """Write one record and return when it is on disk; one process at a time."""
        line = record.to_line().encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            created = not self.path.exists()
            with open(self.path, "a+b") as file:
                _cut_torn_line(file)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        if created and os.name == "posix":
            # A new file's name is durable only once its directory is.
            directory = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)


def run_key(config: Mapping[str, Any], arm: str, seed: int, code_version: str) -> str:
    """Return the name of a run: a hash of all that decides its result.

    Args:
        config: The study's settings, of plain JSON types, the margin among them.
        arm: Name of the arm.
        seed: Seed of the run.
        code_version: Version of the code.

    Raises:
        TypeError: A setting is not of a JSON type, so that it has no stable text.
    """
    text = json.dumps([config, arm, seed, code_version], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def pack_correct(correct: npt.ArrayLike) -> str:
    """Return correctness `(N,)` as base64 text, eight images a byte.

    >>> pack_correct([True, False, False, False, False, False, False, True, True])
    'gYA='
    """
    return base64.b64encode(np.packbits(np.asarray(correct, dtype=np.bool_)).tobytes()).decode()


def unpack_correct(packed: str, n_test: int) -> npt.NDArray[np.bool_]:
    """Return the correctness `(N,)` that `pack_correct` packed.

    Raises:
        ValueError: The text does not hold `n_test` bits.
    """
    data = np.frombuffer(base64.b64decode(packed, validate=True), dtype=np.uint8)
    if len(data) != -(-n_test // 8):
        raise ValueError(
            f"got {len(data)} bytes of correctness bits for n_test={n_test}; {-(-n_test // 8)} are needed."
        )
    return np.unpackbits(data, count=n_test).astype(np.bool_)


def _cut_torn_line(file: Any) -> None:
    """Truncate the open file behind its last newline."""
    end = file.seek(0, os.SEEK_END)
    size = end
    while size:
        start = max(0, size - 4096)
        file.seek(start)
        newline = file.read(size - start).rfind(b"\n")
        size = start if newline < 0 else start + newline + 1
        if newline >= 0:
            break
    if size < end:
        file.truncate(size)


def _pairs(rows: Sequence[Sequence[float]]) -> tuple[tuple[float, float], ...]:
    """Return JSON's lists of two numbers as tuples."""
    return tuple((first, second) for first, second in rows)


def _without_nan(value: Any) -> Any:
    """Return the value with every number that is not finite replaced by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value
