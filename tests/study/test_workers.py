"""Runs in other processes: on a Dask cluster, by joblib, in several processes that share a folder; each may die."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_unfreeze.study.runs import claims, workers
from lightning_unfreeze.study.runs.making import missing_runs
from lightning_unfreeze.study.runs.records import RunLog, RunRecord, pack_correct
from lightning_unfreeze.study.runs.workers import Workers
from tests.processes import HANGS_SECONDS, Forked, fork, needs_fork, until
from tests.study.made_up import MadeUp, dies, dies_once, made_in
from tests.study.test_runner import study

ROOT = Path(__file__).parents[2]


def made_up_tasks(count: int) -> list[Any]:
    made = []
    for seed in range(count):
        key = f"{seed:015x}{0:09x}"
        record = RunRecord(key, "full9", seed, "digits", 0.5, 2, pack_correct([1, 0]), 1, 1.0, 1.0)
        made.append(MadeUp(key, seed, record.to_line()))
    return made


def runs_of(tasks: list[Any], log: RunLog, there: Workers) -> Iterator[RunRecord]:
    return missing_runs(tasks, log, there, None, None)  # type: ignore[arg-type]


# --- Dask ------------------------------------------------------------------------------------------------------------


@dataclass
class Cluster:
    """A Dask scheduler and its workers, each a process of its own."""

    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def file(self) -> Path:
        return self.folder / "scheduler.json"

    @property
    def address(self) -> str:
        return str(json.loads(self.file.read_text())["address"])

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", *arguments, "--no-dashboard"]
        self.processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))
        return self.processes[-1]

    def start_worker(self) -> None:
        options = ("--nthreads", "1", "--no-nanny", "--local-directory", str(self.folder))
        self.workers.append(self.start("distributed.cli.dask_worker", self.address, *options))

    def with_workers(self, count: int) -> Cluster:
        """So many workers are there."""
        from distributed import Client

        self.workers = [worker for worker in self.workers if worker.poll() is None]
        while len(self.workers) < count:
            self.start_worker()
        with Client(self.address) as client:
            client.wait_for_workers(count, timeout=HANGS_SECONDS)
        return self


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    pytest.importorskip("distributed")
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        made.start("distributed.cli.dask_scheduler", "--port", "0", "--scheduler-file", str(made.file))
        until(lambda: made.file.exists() and made.file.read_text().strip())
        yield made
    finally:
        for process in made.processes:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_dask__finds_the_same_as_this_process(cluster: Cluster, tmp_path: Path) -> None:
    here = study(tmp_path)
    there = study(tmp_path, backend="dask", scheduler=cluster.with_workers(1).address)
    task = here._task(here.arms[0], 1, {"full9": {"tuned_lr": 1e-2}})
    (record,) = here.workers.results([task], here.bench, here.costs)
    (twin,) = there.workers.results([task], there.bench, here.costs)
    assert (twin.correct, twin.flops, twin.lr_trace) == (record.correct, record.flops, record.lr_trace)
    assert [p.val_acc for p in twin.curve] == [p.val_acc for p in record.curve]


@pytest.mark.slow
def test_dask__a_killed_workers_runs_are_made_again_and_none_is_lost(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "execute_on_worker", made_in(0.3))
    log, tasks = RunLog(tmp_path / "runs.jsonl"), made_up_tasks(14)
    there, killed = Workers(backend="dask", scheduler=cluster.with_workers(2).address), False
    for _ in runs_of(tasks, log, there):
        if not killed and len({r.environment["pid"] for r in log.read()}) == 2:
            cluster.workers[0].kill()
            killed = True
    assert killed and sorted(record.seed for record in log.read()) == list(range(14))


@pytest.mark.slow
def test_dask__without_workers_ends_with_an_error_and_goes_on_later(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "execute_on_worker", made_in(0.2))
    monkeypatch.setattr(workers, "NO_WORKER_SECONDS", 1.0)
    monkeypatch.setattr(workers, "_LOOK_SECONDS", 0.5)
    log, tasks = RunLog(tmp_path / "runs.jsonl"), made_up_tasks(30)
    there = Workers(backend="dask", scheduler=str(cluster.with_workers(2).file))
    made = runs_of(tasks, log, there)
    next(made)
    for worker in cluster.workers:
        worker.kill()
    with pytest.raises(RuntimeError, match=r"no Dask worker for 1 s.*What is finished is on disk"):
        list(made)
    done = len(log.read())
    assert 1 <= done < 30
    monkeypatch.setattr(workers, "NO_WORKER_SECONDS", HANGS_SECONDS)  # a new one takes a while to start
    cluster.start_worker()
    assert len(list(runs_of(tasks, log, there))) == 30 - done


def test_dask__no_scheduler_is_an_error_that_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CONNECT_SECONDS", 1)
    pytest.importorskip("distributed")
    with pytest.raises(RuntimeError, match=r"tcp://127.0.0.1:9.*no Dask scheduler answers.*dask worker"):
        list(Workers(backend="dask", scheduler="tcp://127.0.0.1:9").results(made_up_tasks(1), None, None))  # type: ignore[arg-type]


# --- processes of this machine ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_processes__a_killed_ones_run_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDY_TEST_MARK", str(tmp_path / "mark"))
    monkeypatch.setattr(workers, "execute_on_worker", dies_once)
    log = RunLog(tmp_path / "runs.jsonl")
    with pytest.warns(UserWarning, match="its run is made again"):
        list(runs_of(made_up_tasks(6), log, Workers(n_jobs=2)))
    assert sorted(record.seed for record in log.read()) == list(range(6))
    monkeypatch.setattr(workers, "execute_on_worker", dies)
    with pytest.warns(UserWarning, match="made again"), pytest.raises(RuntimeError, match="3 worker processes died"):
        list(runs_of(made_up_tasks(8), log, Workers(n_jobs=2)))


@needs_fork
def test_processes__end_with_the_one_that_started_them(tmp_path: Path) -> None:
    told = tmp_path / "pid"

    def worker() -> None:
        parent = os.getppid()
        assert workers.made_for(parent, lambda run: run, "made") == "made"  # type: ignore[arg-type, return-value]
        told.write_text(str(os.getpid()))
        time.sleep(HANGS_SECONDS)

    def start() -> None:
        fork(worker)
        time.sleep(HANGS_SECONDS)

    starting = fork(start)
    pid = int(until(lambda: told.exists() and told.read_text()))
    time.sleep(1.5 * workers._PARENT_SECONDS)
    os.kill(pid, 0)  # it lives as long as its parent
    starting.kill()
    starting.wait()
    until(lambda: not is_alive(pid))


def is_alive(pid: int) -> bool:
    """Whether there is such a process that is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- several processes in one folder ---------------------------------------------------------------------------------


def share(log: Path, counted: Path, hangs_at: int | None = None) -> Forked:
    """A process that makes what the log lacks, and writes down how many runs those were."""

    def execute(task: Any, *_: Any) -> Any:
        if task.seed == hangs_at:
            counted.touch()
            time.sleep(HANGS_SECONDS)
        time.sleep(0.05)
        return task

    def make() -> None:
        workers.execute = execute  # type: ignore[assignment]
        counted.write_text(str(len(list(runs_of(made_up_tasks(12), RunLog(log), Workers())))))

    return fork(make)


@needs_fork
def test_processes__share_a_folder_and_take_over_what_a_killed_one_had_claimed(tmp_path: Path) -> None:
    log = tmp_path / "runs.jsonl"
    hanging = share(log, tmp_path / "hangs", hangs_at=3)
    until((tmp_path / "hangs").exists)
    other = share(log, tmp_path / "made")
    until(lambda: len(RunLog(log).read()) == 11)
    assert 3 not in {record.seed for record in RunLog(log).read()}  # all but the one that hangs, whoever made them
    assert other.is_running()  # it waits for the run that is claimed
    hanging.kill()
    hanging.wait()
    assert other.wait() == 0
    lines = log.read_text().splitlines()
    assert len(lines) == 12 and sorted(r.seed for r in RunLog(log).read()) == list(range(12))
    assert int((tmp_path / "made").read_text()) == 12 - 3  # the first three were the other's, who then hung


@needs_fork
def test_gpus__are_handed_out_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(claims, "_gpu_file", None)
    held: list[Forked] = []

    def worker() -> str:
        told = tmp_path / f"{len(held)}.txt"

        def take() -> None:
            claims.take_gpu(2, tmp_path)
            told.write_text(os.environ["CUDA_VISIBLE_DEVICES"])
            time.sleep(HANGS_SECONDS)

        held.append(fork(take))
        return str(until(lambda: told.exists() and told.read_text()))

    try:
        assert [worker() for _ in range(4)] == ["0", "1", "0", "1"]
        held[1].kill()
        held[1].wait()
        assert worker() == "1"  # what the killed one had
    finally:
        for process in (held[0], *held[2:]):
            process.kill()
            process.wait()
