"""The life of a stage against a table of its own, and against random walks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lightning_unfreeze.stages.progress import Progress

STAGE = Progress(index=2, start_epoch=5, start_step=40, seed=7)
# phase before -> move -> phase after; everything else is refused
TABLE: dict[str, dict[str, str]] = {
    "idle": {"enter": "entered", "restart": "idle"},
    "entered": {"enter": "entered", "announce": "announced", "restart": "idle"},
    "announced": {"enter": "announced", "end": "ended", "restart": "idle"},
    "ended": {"enter": "ended", "next": "idle", "finish": "ended", "restart": "idle"},
}
MOVES = ("enter", "announce", "end", "next", "finish", "restart")


@pytest.mark.parametrize("phase", TABLE)
@pytest.mark.parametrize("move", MOVES)
def test_progress__goes_only_where_the_table_says(phase: Any, move: str) -> None:
    before = replace(STAGE, phase=phase)
    arguments = {"epoch": 9, "step": 72} if move == "next" else {}
    if move not in TABLE[phase]:
        with pytest.raises(RuntimeError, match=f"that is {phase} cannot"):
            getattr(before, move)(**arguments)
        return
    after = getattr(before, move)(**arguments)
    assert after.phase == TABLE[phase][move]
    place = (3, 9, 72) if move == "next" else (2, 5, 40)
    assert (after.index, after.start_epoch, after.start_step) == place
    assert (after.over, after.seed) == (move == "finish", 7)
    assert before == replace(STAGE, phase=phase)  # nothing is changed in place


@pytest.mark.parametrize(
    ("epoch", "step", "restaged", "expected"),
    [
        (5, 40, False, False),  # at its first batch
        (5, 41, False, True),  # inside its first epoch
        (6, 40, False, True),  # an epoch without a step: all batches were skipped
        (6, 48, True, False),  # inside, but another plan starts it anew
    ],
)
def test_progress__resumed_is_a_stage_whose_start_lies_behind(
    epoch: int, step: int, restaged: bool, expected: bool
) -> None:
    assert replace(STAGE, restaged=restaged).resumed(epoch, step) is expected


def test_progress__next_forgets_that_the_stage_before_was_started_anew() -> None:
    assert not replace(STAGE, phase="ended", restaged=True).next(6, 50).restaged


def test_progress__a_checkpoint_keeps_where_the_run_stands_and_not_the_phase() -> None:
    state = replace(STAGE, phase="announced", restaged=True, over=True).to_dict()
    assert state == {"index": 2, "start_epoch": 5, "start_step": 40, "over": True, "seed": 7}
    assert Progress.from_dict({**state, "plan": "another owner's"}) == replace(STAGE, over=True)


class Walk(RuleBasedStateMachine):
    """Any sequence of moves beside a model of its own: a place, a phase, and the events that the players saw."""

    def __init__(self) -> None:
        super().__init__()
        self.progress = Progress(seed=3)
        self.starts, self.ends, self.epoch, self.step = 0, 0, 0, 0

    @rule(epochs=st.integers(0, 3), steps=st.integers(0, 9))
    def train(self, epochs: int, steps: int) -> None:
        self.epoch, self.step = self.epoch + epochs, self.step + steps

    @rule()
    def enter(self) -> None:
        self.progress = self.progress.enter()

    @precondition(lambda self: self.progress.phase == "entered")
    @rule()
    def announce(self) -> None:
        self.progress, self.starts = self.progress.announce(), self.starts + 1

    @precondition(lambda self: self.progress.phase == "announced")
    @rule()
    def end(self) -> None:
        self.progress, self.ends = self.progress.end(), self.ends + 1

    @precondition(lambda self: self.progress.phase == "ended" and not self.progress.over)
    @rule()
    def go_to_next(self) -> None:
        self.progress = self.progress.next(self.epoch, self.step)
        assert not self.progress.resumed(self.epoch, self.step)

    @invariant()
    def every_end_follows_a_start(self) -> None:
        assert self.starts - self.ends == (self.progress.phase == "announced")

    @invariant()
    def stages_follow_one_another(self) -> None:
        # one stage is left behind by each end, but for one that has ended and waits
        assert self.progress.index == self.ends - (self.progress.phase == "ended")

    @invariant()
    def a_checkpoint_goes_on_in_the_same_stage(self) -> None:
        assert Progress.from_dict(self.progress.to_dict()) == self.progress.restart()


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=50, stateful_step_count=30, deadline=None, derandomize=True)
