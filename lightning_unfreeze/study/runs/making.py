"""Making the runs that a log lacks, together with other processes that share the folder."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from lightning_unfreeze.study.runs.bench import Bench, Task
from lightning_unfreeze.study.runs.claims import Claims
from lightning_unfreeze.study.runs.costs import Costs
from lightning_unfreeze.study.runs.records import RunLog, RunRecord
from lightning_unfreeze.study.runs.workers import Workers, without_deaths

OTHERS_SECONDS = 2.0


def missing_runs(
    tasks: Sequence[Task], log: RunLog, workers: Workers, bench: Bench, costs: Costs
) -> Iterator[RunRecord]:
    """Make what the log lacks, write it down and yield it, until the log holds every task.

    A run is claimed before it is made. What another process has claimed is waited for; if that process dies, the claim
    ends with it, and the run is made here. So is the run of a worker process that died.

    Args:
        tasks: Runs that there must be in the end.
        log: Of finished runs.
        workers: What makes them.
        bench: What all runs share.
        costs: Of the kinds of stages.
    """
    claims, deaths = Claims(log.path.with_suffix(".claims")), [0]
    try:
        while todo := [task for task in tasks if task.key not in log.by_key()]:
            made = 0
            results = workers.results(_claimed(todo, log, claims), bench, costs)
            for record in without_deaths(results, deaths):
                log.append(record)
                claims.give_back(record.key)
                made += 1
                yield record
            if not made and not deaths[0]:
                time.sleep(OTHERS_SECONDS)
    finally:
        claims.close()


def _claimed(tasks: Sequence[Task], log: RunLog, claims: Claims) -> Iterator[Task]:
    """Yield tasks that no other process makes or has made by now."""
    for task in tasks:
        if claims.take(task.key):
            if task.key in log.by_key():
                claims.give_back(task.key)
            else:
                yield task
