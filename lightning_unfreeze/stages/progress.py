"""Where a run stands in its plan: one frozen value, and the only ways from one to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, Literal

from lightning_unfreeze.stages.plan import Stage

Phase = Literal["idle", "entered", "announced", "ended"]


@dataclass(frozen=True)
class Progress:
    """The life of the stages of one fit; the conductor alone keeps one and replaces it.

    | phase | means | goes on by | to |
    |---|---|---|---|
    | idle | the stage waits for its first batch | `enter` | entered |
    | entered | what trains is set; nobody was told yet | `announce` | announced |
    | announced | the players were told, batches train | `end` | ended |
    | ended | the players were told of the end | `next` | idle, of the stage after it |
    | ended | of the last stage, before its time | `finish` | ended, and over |
    | any | another fit begins, or this one goes on in another process | `restart` | idle, same stage |

    `enter` in any phase but idle changes nothing: whoever needs the module of the coming stage may ask for it.

    Attributes:
        index: Place of the stage in the plan, from 0.
        start_epoch: The Trainer's `current_epoch` at the stage's first batch.
        start_step: The Trainer's `global_step` (optimizer steps) at the stage's first batch.
        over: Whether the last stage was ended before its time, so that nothing is left to do.
        restaged: Whether another plan starts the stage anew, from a checkpoint that was written inside it.
        seed: Of everything that is drawn in the run; None before it is known.
        phase: See the table. Not kept in checkpoints: who goes on from one enters the stage again.

    Example:
        >>> first = Progress(seed=0).enter().announce().end()
        >>> first.next(epoch=2, step=6)
        Progress(index=1, start_epoch=2, start_step=6, over=False, restaged=False, seed=0, phase='idle')
    """

    index: int = 0
    start_epoch: int = 0
    start_step: int = 0
    over: bool = False
    restaged: bool = False
    seed: int | None = None
    phase: Phase = "idle"

    def enter(self) -> Progress:
        """What trains is set."""
        return replace(self, phase="entered") if self.phase == "idle" else self

    def announce(self) -> Progress:
        """The players are told of the start."""
        return self._go("entered", "announced")

    def end(self) -> Progress:
        """The players are told of the end."""
        return self._go("announced", "ended")

    def next(self, epoch: int, step: int) -> Progress:
        """The stage after this one, which starts at `epoch` and `step`."""
        self._go("ended", "idle")
        return Progress(self.index + 1, epoch, step, seed=self.seed)

    def finish(self) -> Progress:
        """The last stage was ended before its time."""
        return replace(self._go("ended", "ended"), over=True)

    def restart(self) -> Progress:
        """The same stage, for another fit or another process."""
        return replace(self, phase="idle")

    def resumed(self, epoch: int, step: int) -> bool:
        """Whether the stage started before `epoch` and `step`, and goes on (it does not where it is started anew)."""
        return (step > self.start_step or epoch > self.start_epoch) and not self.restaged

    def in_other_plan(self, before: Sequence[Mapping[str, Any]], stages: Sequence[Stage]) -> Progress:
        """The stage of the same name in another plan; it starts anew where it stands if it was itself changed.

        Raises:
            ValueError: Where the new plan has no such stage.
        """
        at, names = before[self.index], [stage.name for stage in stages]
        if at["name"] not in names:
            raise ValueError(f"cannot restage: the checkpoint stands in stage {at['name']!r}, the new plan has {names}")
        index = names.index(at["name"])
        return replace(self, index=index, restaged=bool(plan_difference([at], [stages[index]])), over=False)

    def kept_or_restaged(
        self, before: Sequence[Mapping[str, Any]], stages: Sequence[Stage], *, may_restage: bool
    ) -> tuple[Progress, str]:
        """Where the run of a checkpoint stands in `stages`, and how these differ from its own plan.

        Raises:
            ValueError: For another plan, where that may not be, or it has no such stage.
        """
        difference = plan_difference(before, stages)
        if not difference:
            return self, ""
        if not may_restage:
            raise ValueError(
                f"the checkpoint was written by another plan: {difference}; resume with the same plan, or allow "
                "the change by GradualUnfreeze(on_plan_change='restage')"
            )
        return self.in_other_plan(before, stages), difference

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps. A stage that was started anew goes on as any other from the next one."""
        kept = ("index", "start_epoch", "start_step", "over", "seed")
        return {name: getattr(self, name) for name in kept}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Progress:
        """What `to_dict` gave; other keys are left alone."""
        return cls(**{name: state[name] for name in ("index", "start_epoch", "start_step", "over", "seed")})

    def _go(self, before: Phase, after: Phase) -> Progress:
        if self.phase != before:
            raise RuntimeError(f"a stage that is {self.phase} cannot become {after}, only one that is {before}")
        return replace(self, phase=after)


def settled_as(before: Sequence[Mapping[str, Any]], stages: Sequence[Stage]) -> list[Stage]:
    """The stages, those with `solve="auto"` as the plan of a checkpoint says that they came out."""
    settled = list(stages)
    for index, (stage, row) in enumerate(zip(stages, before, strict=False)):
        if stage.solve == "auto":
            became = [stage.settled(solved=solved) for solved in (True, False)]
            settled[index] = next((one for one in became if asdict(one) == row), stage)
    return settled


def plan_difference(old: Sequence[Mapping[str, Any]], new: Sequence[Stage]) -> str:
    """How a plan differs from that of a checkpoint, `""` where it does not."""
    if [row["name"] for row in old] != [stage.name for stage in new]:
        return f"stages {[row['name'] for row in old]} -> {[stage.name for stage in new]}"
    # an option that the writer's version did not have was at its default
    defaults = {field.name: field.default for field in fields(Stage) if field.default is not MISSING}
    changes = [
        f"{stage.name}.{key}: {before!r} -> {after!r}"
        for row, stage in zip(old, new, strict=True)
        for key, after in asdict(stage).items()
        if (before := row.get(key, defaults.get(key))) != after
    ]
    return ", ".join(changes)
