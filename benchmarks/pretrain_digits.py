"""Pretrain the demo's backbone on the digits 0-4 and store it without its head.

    python benchmarks/pretrain_digits.py            # a minute or two on one core; writes the package's weights
    python benchmarks/pretrain_digits.py --compare  # what these weights are worth on 5-9: pretrained beside random

The digits 5-9 are never seen here, so that fine-tuning on them is transfer to new classes.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings

import lightning.pytorch as pl
import torch
from safetensors.torch import save_file

from lightning_unfreeze.data.digits import DigitsData
from lightning_unfreeze.module import TransferClassifier
from lightning_unfreeze.module.digits_resnet import WEIGHTS


def fit(data: DigitsData, module: TransferClassifier, max_epochs: int) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=max_epochs,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, data)
    return trainer


class OneCycle(TransferClassifier):
    """The classifier under a one-cycle schedule, for the pretraining."""

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=5e-3, weight_decay=0.05)
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def pretrain(max_epochs: int) -> None:
    pl.seed_everything(0)
    data = DigitsData(classes=(0, 1, 2, 3, 4), train_per_class=None, batch_size=32, seed=0)
    module = OneCycle("digits_resnet", num_classes=5, pretrained=False, label_smoothing=0.1)
    trainer = fit(data, module, max_epochs)
    state = {key: value.contiguous() for key, value in module.model.state_dict().items() if not key.startswith("fc.")}
    WEIGHTS.parent.mkdir(exist_ok=True)
    save_file(state, WEIGHTS, metadata={"classes": "scikit-learn digits 0-4", "architecture": "digits_resnet"})
    accuracy = trainer.callback_metrics["val_acc"].item()
    print(f"{WEIGHTS.name}: {WEIGHTS.stat().st_size / 1e3:.0f} kB, accuracy on held-out 0-4: {accuracy:.3f}")


def compare(train_per_class: int, max_epochs: int, num_seeds: int) -> None:
    for pretrained in (True, False):
        for lr in (1e-3, 3e-3, 1e-2):
            accuracies = []
            for seed in range(num_seeds):
                pl.seed_everything(seed)
                data = DigitsData(train_per_class=train_per_class, seed=seed)
                module = TransferClassifier(
                    "digits_resnet", 5, pretrained, optimizer=lambda params, lr=lr: torch.optim.AdamW(params, lr=lr)
                )
                trainer = fit(data, module, max_epochs)
                accuracies.append(trainer.test(module, data, verbose=False)[0]["test_acc"])
            values = " ".join(f"{value:.3f}" for value in accuracies)
            print(
                f"pretrained={pretrained!s:5} lr={lr:.0e}: mean {statistics.mean(accuracies):.3f} ({values})",
                flush=True,
            )


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60, help="of the pretraining")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--train_per_class", type=int, default=10)
    parser.add_argument("--compare_epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    if args.compare:
        compare(args.train_per_class, args.compare_epochs, args.seeds)
    else:
        pretrain(args.epochs)
