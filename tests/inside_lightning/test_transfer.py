"""Guards of what `inside_lightning.transfer` takes for granted of Lightning."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_unfreeze.inside_lightning.transfer import pass_transfer_hooks, transfer_hooks, use_transfer_hooks
from tests.zoo import UserModule, loader, quiet_trainer


@dataclass(frozen=True)
class Ready:
    value: Any
    moved: bool = False

    def to(self, device: torch.device) -> Ready:
        assert device == torch.device("cpu")
        return replace(self, moved=True)

    def opened(self) -> Any:
        assert self.moved
        return self.value


class Doubles(UserModule):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return 2 * batch[0], batch[1]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return 2 * batch[0], batch[1]


def test_pass_transfer_hooks__others_go_through() -> None:
    seen: list[Any] = []

    class Looks(Doubles):
        def on_train_start(self) -> None:
            move = self.trainer.strategy.batch_to_device
            for batch in ((torch.ones(2), 1), Ready((torch.ones(2), 1))):
                seen.append(move(self._on_before_batch_transfer(batch, dataloader_idx=0), dataloader_idx=0)[0].tolist())

    module = Looks()
    pass_transfer_hooks(module, Ready)
    trainer = quiet_trainer([], max_epochs=1, limit_train_batches=1)
    trainer.fit(module, loader(), loader())
    assert seen == [[4, 4], [1, 1]]
    assert [hook.__name__ for hook in transfer_hooks(trainer)] == [
        "on_before_batch_transfer",
        "on_after_batch_transfer",
    ]
    use_transfer_hooks(module)
    assert "_call_batch_hook" not in vars(module)
