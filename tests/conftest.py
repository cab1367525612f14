"""Fixtures of all tests, and what makes them quick; the modules, the data and the Trainer are in `tests/zoo.py`."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities import registry
from matplotlib.figure import Figure

torch.set_num_threads(1)
# Lightning keeps its log to itself where the root logger had no handler when it was imported: `caplog` sees none of it
logging.getLogger("lightning.pytorch").propagate = True
# Each Trainer reads the metadata of every installed package, to find callbacks that packages register; once will do
registry.entry_points = functools.cache(registry.entry_points)  # type: ignore[attr-defined]
# `torch.manual_seed` writes the whole stack down for each accelerator that is not there, in every training step
for accelerator in (torch.cuda, torch.xpu, torch.mtia):
    if not accelerator.is_available():
        accelerator.manual_seed_all = lambda seed: None  # type: ignore[assignment]

SHARED = Path(__file__).parents[1].resolve().parent / "shared"


@pytest.fixture
def shared_data() -> Path:
    """Real photos and real weights; absent on most machines."""
    folder = Path(os.environ.get("LIGHTNING_UNFREEZE_DATA", SHARED / "data"))
    if not folder.is_dir():
        pytest.skip(f"the real photos and weights are not at {folder}")
    return folder


def save_no_picture(figure: Figure, file: Any, **options: Any) -> None:
    if hasattr(file, "write"):
        file.write(b"picture")
    else:
        Path(file).write_bytes(b"picture")


# A fit that saves its figures spends most of its time with them: they are drawn where a test looks at one
draws_picture, Figure.savefig = Figure.savefig, save_no_picture  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def pictures_are_drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("pictures") is not None:
        monkeypatch.setattr(Figure, "savefig", draws_picture)


@pytest.fixture(autouse=True)
def nothing_of_ddp_stays() -> Iterator[None]:
    """A Trainer with one DDP process in this one leaves its process group, and `LOCAL_RANK` in the environment.

    A script that a later test starts would take itself for a rank that others started, and wait for them.
    """
    environment = dict(os.environ)
    yield
    if os.environ != environment:
        os.environ.clear()
        os.environ.update(environment)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
