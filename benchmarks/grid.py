"""The runs of a grid, several at a time: a line of JSON each, and what is there is not run again."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

Row = dict[str, Any]
Run = Callable[[Row], Row]


def read(out: Path) -> list[Row]:
    """What was run so far, errors too."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def run_all(
    jobs: Sequence[Row], out: Path, names: Sequence[str], start: Callable[[], Run], processes: int, seconds: float
) -> list[Row]:
    """All rows, those of `out` first.

    Args:
        jobs: Settings of the runs, in their order.
        out: Each run appends a line as it ends; one that raised has an `error`, and is tried again the next time.
        names: The settings that tell runs apart.
        start: Called once in each process; gives what turns a job into its row. Has to be picklable.
        processes: At a time; each has one thread.
        seconds: No run begins after that.
    """

    def key(row: Row) -> str:
        return json.dumps([row[name] for name in names])

    rows = read(out)
    done = {key(row) for row in rows if "error" not in row}
    spawn = multiprocessing.get_context("spawn")
    tasks, results = spawn.Queue(), spawn.Queue()
    for job in jobs:
        if key(job) not in done:
            tasks.put(job)
    arguments = (tasks, results, start, time.time() + seconds)
    workers = [spawn.Process(target=_work, args=arguments, daemon=True) for _ in range(processes)]
    for worker in workers:
        worker.start()
    running = len(workers)
    with out.open("a") as file:
        while running:
            row = results.get()
            if row is None:
                running -= 1
                continue
            file.write(json.dumps(row) + "\n")
            file.flush()
            rows.append(row)
            print(row, flush=True)
    return rows


def _work(tasks: Any, results: Any, start: Callable[[], Run], deadline: float) -> None:
    torch.set_num_threads(1)
    run, parent = start(), multiprocessing.parent_process()
    while time.time() < deadline and parent.is_alive():  # of one that was killed nobody takes the results
        try:
            job = tasks.get(timeout=1)
        except queue.Empty:
            break
        try:
            results.put(run(job))
        except Exception as error:
            results.put({**job, "error": f"{type(error).__name__}: {str(error)[-300:]}"})
    results.put(None)
