"""Where runs are made: in this process, in others of this machine, on a Dask cluster, or on Ray.

Every way yields records as they come, from tasks that are taken one by one, and no record is lost by what happens to
the next one. A worker that dies has its run made again elsewhere; when no worker is left there is an error.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import joblib
from lightning.pytorch.utilities import rank_zero_warn

from lightning_unfreeze.study.runs.bench import Bench, Task
from lightning_unfreeze.study.runs.claims import take_gpu
from lightning_unfreeze.study.runs.costs import Costs
from lightning_unfreeze.study.runs.records import RunRecord
from lightning_unfreeze.study.runs.run import execute

Backend = Literal["loky", "dask", "ray"]
DEATHS = 3
NO_WORKER_SECONDS = 45.0
CONNECT_SECONDS = 30
_LOOK_SECONDS = 5.0
_PARENT_SECONDS = 1.0
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Workers:
    """What makes the runs.

    Args:
        n_jobs: Processes of this machine; -1 takes one per core.
        backend: `loky` (processes of this machine), `dask`, or `ray`.
        scheduler: For `dask`: address (`tcp://...`) or scheduler file; None takes the client that is there.
        runs_per_gpu: Runs at a time on one GPU of a machine that has several.

    Raises:
        ValueError: For a number or a backend that there is not.
    """

    n_jobs: int = 1
    backend: Backend = "loky"
    scheduler: str | None = None
    runs_per_gpu: int = 1

    def __post_init__(self) -> None:
        for name, value in (("n_jobs", self.n_jobs), ("runs_per_gpu", self.runs_per_gpu)):
            if value < 1 and not (name == "n_jobs" and value == -1):
                raise ValueError(f"{name}={value}: give 1 or more.")
        if self.backend not in ("loky", "dask", "ray"):
            raise ValueError(f"backend={self.backend!r} is none of 'loky', 'dask', 'ray'.")
        if self.scheduler is not None and self.backend != "dask":
            raise ValueError(f"scheduler={self.scheduler!r} belongs to backend='dask', not to {self.backend!r}.")

    @property
    def count(self) -> int:
        """Runs at a time, as far as that is known before they start."""
        return max(1, joblib.effective_n_jobs(self.n_jobs)) if self.backend == "loky" else 1

    def results(self, tasks: Iterable[Task], bench: Bench, costs: Costs) -> Iterator[RunRecord]:
        """Yield records as they come.

        Raises:
            RuntimeError: When no worker is left.
            BrokenProcessPool: When a process of this machine died; what it was making is not among the records.
        """
        if self.backend == "dask":
            yield from self._on_dask(list(tasks), bench, costs)
        elif self.n_jobs == 1 and self.backend == "loky":
            yield from (execute(task, bench, costs) for task in tasks)
        else:
            yield from self._by_joblib(tasks, bench, costs)

    def _by_joblib(self, tasks: Iterable[Task], bench: Bench, costs: Costs) -> Iterator[RunRecord]:
        if self.backend == "ray":
            from ray.util.joblib import register_ray

            register_ray()
        with joblib.parallel_config(backend=self.backend, n_jobs=self.n_jobs):
            streams = joblib.parallel.get_active_backend()[0].supports_return_generator
            make: Callable[..., RunRecord] = execute_on_worker
            if self.backend == "loky":  # Ray's workers have another parent
                make = functools.partial(made_for, os.getpid(), execute_on_worker)
            call = joblib.delayed(make)
            if streams:
                with joblib.Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch="n_jobs") as parallel:
                    yield from parallel(call(task, bench, costs, self.runs_per_gpu) for task in tasks)
                return
            # a backend that returns all at once gets a few at a time, so that a kill loses but a few
            todo, size = list(tasks), joblib.effective_n_jobs(self.n_jobs)
            with joblib.Parallel(batch_size=1) as parallel:
                for first in range(0, len(todo), size):
                    yield from parallel(call(t, bench, costs, self.runs_per_gpu) for t in todo[first : first + size])

    def _on_dask(self, tasks: list[Task], bench: Bench, costs: Costs) -> Iterator[RunRecord]:
        distributed: Any = importlib.import_module("distributed")

        if not tasks:
            return
        own = self.scheduler is not None
        is_file = own and Path(str(self.scheduler)).is_file()
        try:
            client = (
                distributed.get_client()
                if not own
                else distributed.Client(
                    **{"scheduler_file" if is_file else "address": self.scheduler}, timeout=CONNECT_SECONDS
                )
            )
        except (OSError, ValueError, TimeoutError) as error:
            where = f"scheduler={self.scheduler!r}" if own else "no scheduler is given and there is no client"
            raise RuntimeError(
                f"{where}: no Dask scheduler answers ({error}). Start one (`dask scheduler`, `dask worker ADDRESS`), "
                "and give --scheduler tcp://HOST:8786 or its --scheduler-file."
            ) from error
        pending = {
            client.submit(execute_on_worker, task, bench, costs, self.runs_per_gpu, key=task.key, pure=False)
            for task in tasks
        }
        alone_since: float | None = None
        try:
            while pending:
                try:
                    done = distributed.wait(pending, timeout=_LOOK_SECONDS, return_when="FIRST_COMPLETED").done
                except (TimeoutError, distributed.TimeoutError):
                    done = set()
                fetched = set()
                for future in done:
                    try:
                        record = None if future.status == "cancelled" else future.result(timeout=_LOOK_SECONDS)
                    except (TimeoutError, distributed.TimeoutError):
                        if future.status == "error":  # the run's own
                            raise
                        record = None  # its worker died with it
                    if record is not None:
                        fetched.add(future)
                        yield record
                lost = client.status != "running" or any(future.status == "cancelled" for future in done)
                pending -= fetched
                alone = lost or (not fetched and not client.scheduler_info()["workers"])
                alone_since = (alone_since or time.monotonic()) if alone else None
                if lost or (alone_since is not None and time.monotonic() - alone_since > NO_WORKER_SECONDS):
                    raise RuntimeError(
                        f"{'the scheduler is gone' if lost else f'no Dask worker for {NO_WORKER_SECONDS:.0f} s'}: "
                        f"{len(pending)} runs are not made. What is finished is on disk; start workers, and the same "
                        "command goes on."
                    )
        finally:
            client.cancel(list(pending), force=True) if client.status == "running" else None
            if own:
                client.close(timeout=5)


def execute_on_worker(task: Task, bench: Bench, costs: Costs, runs_per_gpu: int) -> RunRecord:
    """Make a run in a worker process, on a GPU of its own where there are several.

    One at a time: a worker with several threads has one random state for all of them.
    """
    with _one_at_a_time:
        take_gpu(runs_per_gpu)
        return execute(task, bench, costs)


def made_for(process: int, make: Callable[..., RunRecord], *arguments: Any) -> RunRecord:
    """Make a run in a process that another one started, and that ends when that one is gone."""
    _end_with(process)
    return make(*arguments)


@functools.cache
def _end_with(process: int) -> None:
    """End this process with the one that started it: loky's workers outlive a killed one, with memory and GPU."""

    def watch() -> None:
        while os.getppid() == process:
            time.sleep(_PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def without_deaths(made: Iterator[RunRecord], deaths: list[int]) -> Iterator[RunRecord]:
    """Yield records until a process dies; say so, and leave it to the caller to ask again for what is missing.

    Args:
        made: From `Workers.results`.
        deaths: Deaths in a row so far, in its one item; it is counted up here, and set back by every record.

    Raises:
        RuntimeError: When processes die again and again without a run between.
    """
    try:
        for record in made:
            deaths[0] = 0
            yield record
    except BrokenProcessPool as error:
        deaths[0] += 1
        if deaths[0] >= DEATHS:
            raise RuntimeError(
                f"{deaths[0]} worker processes died in a row and no run was made between (out of memory?): give fewer "
                "n_jobs, a smaller batch, or look at the system's log. What is finished is on disk."
            ) from error
        rank_zero_warn("a worker process died; its run is made again.")
