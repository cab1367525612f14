"""The stores that one fit has open: of the present stage, and of stages before it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning_unfreeze.features.fill import FeaturePass, StoredData


class OpenStores(dict[str, StoredData]):
    """The stores of the present stage, by `"train"` and `"val"`; at most one shortcut is on the network at a time.

    Attributes:
        earlier: Of stages before, the newest first: a boundary that lies behind one of theirs starts from its features.
    """

    def __init__(self) -> None:
        super().__init__()
        self.earlier: list[StoredData] = []

    def open_for(self, split: str, batch: Any) -> None:
        """Has the network take the features of this batch, until `close`; harmless where there is no store."""
        stored = self.get(split)
        if stored is not None:
            stored.prefix.remove()  # a batch that another callback skipped had no end
            stored.prefix.install(stored.data.form.images(batch))

    def close(self, split: str) -> None:
        """Has the network take images again; harmless where it does."""
        if split in self:
            self[split].prefix.remove()

    def stale(self) -> str:
        """Why the features of the present stage are those of another network; empty where they are not."""
        if "train" not in self or self["train"].is_current():
            return ""
        return (
            "weights or buffers of the frozen part were changed (by a hook of the module, or another callback?) after "
            "its features were stored, so the stage trains on features of another network; change them before `fit`, "
            "or set precompute=False"
        )

    def set_aside(self) -> ExitStack:
        """A context without the shortcuts: a validation loader may be asked for while that of training is open."""
        with ExitStack() as stack:
            for stored in self.values():
                stack.enter_context(stored.prefix.set_aside())
            return stack.pop_all()

    def end_stage(self) -> None:
        """The present ones are earlier ones from here on."""
        for split in self:
            self.close(split)
        self.earlier = [*self.values(), *self.earlier]
        self.clear()

    def before(self, work: FeaturePass) -> StoredData | None:
        """The newest earlier store that a pass can start from. A collective call."""
        return next((one for one in self.earlier if work.follows(one)), None)

    def directories(self) -> list[Path]:
        """Of all of them: what is in use is not to be pruned."""
        return [one.store.directory for one in [*self.values(), *self.earlier]]
