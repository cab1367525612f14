"""Features of a frozen network, computed once and stored. Torch only: `cached` serves any training loop."""

from lightning_unfreeze.features.plain_loop import CachedBatches, cached

__all__ = ["CachedBatches", "cached"]
