"""Rows in memory equal rows on disk, wherever they lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_unfreeze.features import resident as module
from lightning_unfreeze.features.layout import StoreLayout, TensorSpec
from lightning_unfreeze.features.resident import ResidentStore, choose_place, resident
from lightning_unfreeze.features.store import FeatureStore
from lightning_unfreeze.features.writer import FeatureWriter

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ROWS, VIEWS = 11, 2


@pytest.fixture
def written(tmp_path: Path) -> tuple[FeatureStore, dict[str, torch.Tensor]]:
    """A store of two views, and what was written into it, `(V, N, *row)`."""
    generator = torch.Generator().manual_seed(0)
    values = {
        "features": torch.randn(VIEWS, ROWS, 3, 2, generator=generator).to(torch.bfloat16),
        "label": torch.randint(9, (VIEWS, ROWS), generator=generator),
        "text": torch.randint(255, (VIEWS, ROWS, 4), generator=generator, dtype=torch.uint8),
    }
    tensors = {name: TensorSpec(tuple(value.shape[2:]), value.dtype) for name, value in values.items()}
    with FeatureWriter(tmp_path / "store", StoreLayout("key", ROWS, tensors, VIEWS)) as writer:
        for view in range(VIEWS):
            writer.write(torch.arange(ROWS), {name: value[view] for name, value in values.items()}, view)
    return writer.finalize(), values


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("place", ["device", "pinned"])
@pytest.mark.parametrize("chunk_bytes", [1, 10**6])
def test_resident__reads_what_was_written(written, device, place, chunk_bytes, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_BYTES", chunk_bytes)
    store, values = written
    held = ResidentStore(store, torch.device(device), place, on_host=["text"])
    rows = torch.tensor([10, 0, 3, 3])
    for view in range(VIEWS):
        read = held.read(rows.to(device), view)
        assert read.keys() == values.keys()
        for name, value in values.items():
            assert read[name].device.type == ("cpu" if name == "text" else device)
            assert torch.equal(read[name].cpu(), value[view][rows]), (name, view)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("place", ["device", "pinned"])
@pytest.mark.parametrize("num_parts", [0, 1, 4])
def test_resident__reads_ahead_in_order(written, device, place, num_parts):
    store, values = written
    held = ResidentStore(store, torch.device(device), place)
    parts = [torch.tensor([part, 2 * part]) for part in range(num_parts)]
    read = list(held.read_ahead(iter(parts), view=1))
    assert len(read) == num_parts
    for part, batch in zip(parts, read, strict=True):
        assert torch.equal(batch["features"].cpu(), values["features"][1][part])


def test_resident__what_is_read_is_the_callers_own(written):
    store, values = written
    held = ResidentStore(store, torch.device("cpu"))
    held.read(torch.tensor([1]))["features"].zero_()
    assert torch.equal(held.read(torch.tensor([1]))["features"], values["features"][0][[1]])


FREE = {"cuda": 1000, "host": 400}


@pytest.mark.parametrize(
    ("device", "num_bytes", "share", "place"),
    [
        ("cuda", 500, 0.5, "device"),
        ("cuda", 501, 0.5, "disk"),  # half of the host's 400 is less, too
        ("cuda", 501, 0.6, "device"),
        ("cuda", 150, 0.1, "disk"),
        ("cuda", 150, 0.14, "disk"),
        ("cpu", 200, 0.5, "device"),
        ("cpu", 201, 0.5, "disk"),
    ],
)
def test_choose_place__is_the_first_in_which_the_share_suffices(device, num_bytes, share, place, monkeypatch):
    monkeypatch.setattr(module, "_free_on", lambda _: FREE["cuda"])
    monkeypatch.setattr(module, "free_memory", lambda: FREE["host"])
    assert choose_place(num_bytes, torch.device(device), share) == place


def test_choose_place__is_pinned_memory_where_the_card_is_full(monkeypatch):
    monkeypatch.setattr(module, "_free_on", lambda _: 100)
    monkeypatch.setattr(module, "free_memory", lambda: 10_000)
    assert choose_place(300, torch.device("cuda"), 0.5) == "pinned"


def test_choose_place__leaves_a_large_store_to_the_page_cache_of_a_cpu(monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda: 2**40)
    assert choose_place(256 * 2**20, torch.device("cpu")) == "device"
    assert choose_place(256 * 2**20 + 1, torch.device("cpu")) == "disk"


def test_resident__falls_back_to_the_next_place_in_one_line(written, monkeypatch):
    store, _ = written

    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert resident(store, torch.device("cpu"), "disk") == (store, "")
    monkeypatch.setattr(module, "ResidentStore", no_room)
    found, said = resident(store, torch.device("cpu"), "device")
    assert found is store
    assert "no room" in said and str(store.directory) in said
