"""The classifier for whoever has no module of their own: network, task, what it knows of its data, ways out."""

from lightning_unfreeze.module.classifier import TransferClassifier

__all__ = ["TransferClassifier"]
