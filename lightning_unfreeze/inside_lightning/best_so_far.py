"""What validation found of the weights in force, the best of a stage, and the way back to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import lightning.pytorch as pl

from lightning_unfreeze.inside_lightning.distributed import broadcast_buffers
from lightning_unfreeze.inside_lightning.metrics import logged_scalars, mean_over_ranks, pin_callback_metrics
from lightning_unfreeze.inside_lightning.weights import (
    KeptWeights,
    keep_weights,
    put_weights_back,
    renew_last_checkpoints,
    save_what_is_left,
)


@dataclass
class BestSoFar:
    """The best weights of a stage beside those in force. Of what it writes it is the only writer.

    Attributes:
        value: What the weights of `value_step` scored in validation; None where nothing was logged.
        value_step: The optimizer step that they were validated after.
        scores: All that was logged with it.
        kept: The best weights; None without any.
        went_back: To the weights of which optimizer step, and when.
    """

    value: float | None = None
    value_step: int = -1
    scores: dict[str, float] = field(default_factory=dict)
    kept: KeptWeights | None = None
    went_back: tuple[int, int] | None = None

    def validated(self, trainer: pl.Trainer, monitor: str | None) -> float | None:
        """Notes what the weights in force score: `monitor`, one value on all ranks, also where the module logs several.

        A collective call.
        """
        logged = trainer.callback_metrics.get(monitor or "")
        self.scores, self.value_step = logged_scalars(trainer), trainer.global_step
        self.value = None if logged is None else mean_over_ranks(trainer, logged)
        return self.value

    def value_now(self, trainer: pl.Trainer) -> float | None:
        """What the weights in force scored; None where they were not validated."""
        return self.value if self.value_step == trainer.global_step else None

    def keep(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The weights in force are the best. A collective call."""
        broadcast_buffers(trainer)
        self.kept = keep_weights(trainer, pl_module)
        self.note_scores(trainer)

    def note_scores(self, trainer: pl.Trainer) -> None:
        """What is known of the best weights; all of it is not before the end of their epoch."""
        if self.kept is not None and self.kept.step == trainer.global_step:
            # a process that goes on at a stage's start has logged nothing yet: the one before it had
            self.scores = logged_scalars(trainer) or self.scores
            self.kept.scores = dict(self.scores)

    def put_back(self, trainer: pl.Trainer, pl_module: pl.LightningModule, value: float) -> bool:
        """Puts the best in force, and its metrics where callbacks read; whether it was not in force already."""
        if self.kept is None or self.kept.step == trainer.global_step:
            return False
        save_what_is_left(trainer, pl_module)
        put_weights_back(trainer, pl_module, self.kept)
        pin_callback_metrics(trainer, self.kept.scores)
        self.value, self.value_step = value, trainer.global_step
        self.went_back = self.kept.step, trainer.global_step
        return True

    def renew_checkpoints(self, trainer: pl.Trainer) -> None:
        """At the end of a fit that went back with its last step: the last checkpoint is of the weights that it leaves.

        A collective call.
        """
        if self.went_back is not None and self.went_back[1] == trainer.global_step:
            renew_last_checkpoints(trainer, of_step=self.went_back[0])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        kept = None if self.kept is None else asdict(self.kept)
        return {"best": kept, "_value": self.value, "_value_step": self.value_step, "_scores": self.scores}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> BestSoFar:
        """What `state_dict` gave; other keys are left alone."""
        kept = None if state["best"] is None else KeptWeights(**state["best"])
        return cls(state["_value"], state["_value_step"], state["_scores"], kept)
