"""What a stage's epochs take with stored features and without, measured on a few images before anything is stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_unfreeze.features.fill import FeaturePass, StoredData, together
from lightning_unfreeze.features.serve import ViewBatches
from lightning_unfreeze.features.shortcut import seconds, step_seconds
from lightning_unfreeze.features.viewed import PROBE_IMAGES, pass_size


@dataclass(frozen=True)
class Estimate:
    """Of one stage.

    Attributes:
        num_images: Read by all its epochs.
        pass_seconds: Of the pass that fills the store.
        stored_seconds: Of the pass and the epochs on features.
        plain_seconds: Of the epochs on images.
        store_bytes: Size of the store.
    """

    num_images: float
    pass_seconds: float
    stored_seconds: float
    plain_seconds: float
    store_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.num_images:.0f} images are estimated at {self.stored_seconds:.3g} s with stored features (the pass "
            f"{self.pass_seconds:.3g} s, {self.store_bytes / 2**20:.1f} MiB) and {self.plain_seconds:.3g} s without"
        )


def estimate(work: FeaturePass, earlier: StoredData | None, num_epochs: int, limit: float) -> Estimate:
    """Measures the step both ways, the reading of images, and the pass that would read `earlier`. A collective call.

    `limit` is of the batches of an epoch: their number, or their share as a float.
    """
    layout, loader, host = work.layout, work.data.loader, work.host
    images = ViewBatches(loader, work.data.views, work.data.seed)
    with host.aside(), torch.enable_grad():
        plain_step, stored_step = together(host, lambda: step_seconds(host, work.prefix, work.data))
    probed = min(PROBE_IMAGES, layout.num_rows)
    reading = seconds(lambda: images[list(range(probed))], host.device) / probed
    # worker processes read while the device computes; without them one waits for the other
    waiting = max(reading / loader.num_workers - plain_step, 0.0) if loader.num_workers else reading
    num_read = limit * layout.num_rows if isinstance(limit, float) else limit * pass_size(loader)
    num_read = num_epochs * min(num_read, layout.num_rows)
    passed = together(host, lambda: work.seconds_per_image(earlier)) * layout.num_rows * layout.num_views
    with_store, without = passed + num_read * stored_step, num_read * (waiting + plain_step)
    return Estimate(num_read, passed, with_store, without, layout.num_bytes)
