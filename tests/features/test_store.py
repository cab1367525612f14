from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import random
import signal
import subprocess
import time
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_unfreeze.features import layout as feature_layout
from lightning_unfreeze.features import store as feature_store
from lightning_unfreeze.features import writer as feature_writer
from lightning_unfreeze.features.layout import StoreError, StoreLayout, TensorSpec
from lightning_unfreeze.features.store import FeatureStore, prune, store_lock
from lightning_unfreeze.features.writer import FeatureWriter
from tests.processes import HANGS_SECONDS, fork, needs_fork, until

N, D = 100, 6


def features(rows, view=0, dtype=torch.float32):
    """The oracle: what row and view hold, from arithmetic. Exact in every dtype up to 256."""
    rows = torch.as_tensor(rows)[:, None]
    return ((rows + 7 * view + torch.arange(D)) % 256).to(dtype)


def layout_of(dtype=torch.float32, num_views=1, num_rows=N, fingerprint="key"):
    return StoreLayout(fingerprint, num_rows, {"features": TensorSpec((D,), dtype)}, num_views)


def write_store(directory, layout=None):
    layout = layout or layout_of()
    with FeatureWriter(directory, layout) as writer:
        for view in range(layout.num_views):
            for rows in torch.arange(layout.num_rows).split(16):
                writer.write(rows, {"features": features(rows, view)}, view)
    return writer.finalize()


@pytest.fixture
def read_only(tmp_path):
    """A folder, and a function that makes it read-only; root needs a mount for that."""
    folder = tmp_path / "folder"
    folder.mkdir()
    if os.getuid() != 0:
        yield folder, lambda: folder.chmod(0o555)
        folder.chmod(0o755)
        return
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("root may write everywhere, and mounting a file system is not permitted here")
    yield folder, lambda: subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small_disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


# -------------------- write and read


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "positional"])
def test_store__reads_what_was_written_in_every_dtype_and_order(tmp_path, monkeypatch, dtype, mapped):
    if not mapped:
        monkeypatch.setattr(feature_store, "_MAX_MAPPED_BYTES", 0)
    with FeatureWriter(tmp_path / "store", layout_of(dtype, num_views=2)) as writer:
        for view in range(2):
            for rows in torch.randperm(N).split(7):
                writer.write(rows, {"features": features(rows, view)}, view)
    store = writer.finalize()
    rows = torch.tensor([99, 0, 0, 41, 7])
    for view in range(2):
        batch = store.read(rows, view)["features"]
        assert batch.dtype == dtype
        assert torch.equal(batch, features(rows, view, dtype))
    assert store.read(torch.empty(0, dtype=torch.int64))["features"].shape == (0, D)


def test_store__is_view_major_raw_bytes_on_disk(tmp_path):
    write_store(tmp_path / "store", layout_of(torch.bfloat16, num_views=2))
    raw = torch.from_file(str(tmp_path / "store" / "tensor_000.bin"), size=2 * N * D, dtype=torch.bfloat16)
    expected = torch.stack([features(torch.arange(N), view, torch.bfloat16) for view in range(2)])
    assert torch.equal(raw.view(2, N, D), expected)
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["manifest.json", "tensor_000.bin"]


def test_store__bfloat16_rounds_as_torch_does(tmp_path):
    values = torch.randn(64, D, generator=torch.Generator().manual_seed(0))
    with FeatureWriter(tmp_path / "store", layout_of(torch.bfloat16, num_rows=64)) as writer:
        writer.write(torch.arange(64), {"features": values})
    assert torch.equal(writer.finalize().read(torch.arange(64))["features"], values.bfloat16())


def test_store__keeps_several_tensors_and_their_shapes(tmp_path):
    batch = {
        "map": torch.randn(5, 8, 3, 2).to(memory_format=torch.channels_last),
        "tokens": torch.randn(5, 4, 9).transpose(1, 2),
        "a/b.c": torch.randn(5, 3),
        "label": torch.arange(5) * 2**40,
        "mask": torch.arange(5) % 2 == 0,
    }
    specs = {name: TensorSpec.like(tensor, "float32") for name, tensor in batch.items()}
    with FeatureWriter(tmp_path / "store", StoreLayout("key", 5, specs)) as writer:
        writer.write(torch.arange(5), batch)
    rows = torch.tensor([4, 1, 1])
    read = writer.finalize().read(rows)
    assert read.keys() == batch.keys()
    for name, tensor in batch.items():
        assert torch.equal(read[name], tensor[rows]), name
        assert read[name].dtype == tensor.dtype, name


@pytest.mark.parametrize(
    ("policy", "stored", "expected"),
    [
        ("auto", torch.bfloat16, torch.bfloat16),
        ("float32", torch.bfloat16, torch.float32),
        ("bfloat16", torch.float32, torch.bfloat16),
        ("float16", torch.float32, torch.float16),
        ("float16", torch.int64, torch.int64),
    ],
)
def test_tensor_spec__dtype_policy(policy, stored, expected):
    assert TensorSpec.like(torch.zeros(2, 3, dtype=stored), policy).dtype == expected


def test_store__refuses_what_does_not_fit_the_layout(tmp_path):
    writer = FeatureWriter(tmp_path / "store", layout_of(num_views=2))
    good = {"features": features(torch.arange(4))}
    for rows, tensors, error, message in [
        (torch.arange(4), {"other": good["features"]}, ValueError, "other"),
        (torch.arange(4), {"features": torch.zeros(4, D + 1)}, ValueError, "shape"),
        (torch.arange(4), {"features": torch.zeros(4, D, dtype=torch.int64)}, ValueError, "int64"),
        (torch.arange(3), good, ValueError, "3 rows but 4"),
        (torch.arange(4).float(), good, ValueError, "int64"),
        (torch.arange(N - 2, N + 2), good, IndexError, "outside"),
        (torch.arange(4) - 1, good, IndexError, "outside"),
    ]:
        with pytest.raises(error, match=message):
            writer.write(rows, tensors)
    with pytest.raises(IndexError, match="view"):
        writer.write(torch.arange(4), good, view=2)
    writer.discard()
    store = write_store(tmp_path / "store", layout_of(num_views=2))
    # row N of view 0 would be row 0 of view 1
    with pytest.raises(IndexError, match="outside"):
        store.read(torch.tensor([N]))
    with pytest.raises(ValueError, match="verify"):
        FeatureStore.open(tmp_path / "store", fingerprint="key", verify="none")
    with pytest.raises(ValueError, match="dtype"):
        TensorSpec.like(torch.zeros(1, 1), "int8")
    with pytest.raises(ValueError, match="element"):
        TensorSpec((3, 0), torch.float32)
    with pytest.raises(ValueError, match="num_rows=0"):
        layout_of(num_rows=0)


def test_store__refuses_features_that_overflow_float16(tmp_path):
    with (
        pytest.raises(StoreError, match="7e\\+04 do not fit float16"),
        FeatureWriter(tmp_path / "store", layout_of(torch.float16, num_rows=1)) as writer,
    ):
        writer.write(torch.tensor([0]), {"features": torch.full((1, D), 7e4)})
    assert not (tmp_path / "store").exists()


def test_store__what_is_read_is_the_readers_own(tmp_path):
    store = write_store(tmp_path / "store")
    store.read(torch.arange(N))["features"].zero_()
    assert torch.equal(store.read(torch.arange(N))["features"], features(torch.arange(N)))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda store: pickle.loads(pickle.dumps(store))])
def test_store__copies_open_the_same_files(tmp_path, clone):
    other = clone(write_store(tmp_path / "store"))
    assert torch.equal(other.read(torch.tensor([3]))["features"], features([3]))


def test_store__random_numbers_of_the_run_are_left_alone(tmp_path):
    random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
    expected = (random.random(), np.random.rand(), torch.rand(1).item())  # noqa: NPY002
    random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
    write_store(tmp_path / "store")
    open_store(tmp_path / "store")
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected  # noqa: NPY002


# -------------------- damage


def open_store(directory, verify="sampled", fingerprint="key"):
    return FeatureStore.open(directory, fingerprint=fingerprint, verify=verify)


def test_open__absent_store_is_an_error(tmp_path):
    with pytest.raises(StoreError, match="No finished feature store"):
        open_store(tmp_path / "none")


def test_open__truncated_or_extended_file_is_always_found(tmp_path):
    write_store(tmp_path / "store")
    path = tmp_path / "store" / "tensor_000.bin"
    for size in (N * D * 4 - 1, 0, N * D * 4 + 1):
        os.truncate(path, size)
        with pytest.raises(StoreError, match=f"{size} bytes where {N * D * 4} were written"):
            open_store(tmp_path / "store")
    path.unlink()
    with pytest.raises(StoreError, match="cannot be read"):
        open_store(tmp_path / "store")


def flip_bit(path, bit):
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_open__full_verification_finds_every_flipped_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "_CHUNK_BYTES", 64)
    write_store(tmp_path / "store")
    path = tmp_path / "store" / "tensor_000.bin"
    num_bits = N * D * 4 * 8
    for bit in (0, 511, 512, num_bits - 1, *random.Random(0).sample(range(num_bits), 40)):
        flip_bit(path, bit)
        with pytest.raises(StoreError, match=f"checksum of chunk {bit // 512} "):
            open_store(tmp_path / "store", "full")
        flip_bit(path, bit)
    open_store(tmp_path / "store", "full")


def test_open__sampled_verification_reads_the_last_and_four_random_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "_CHUNK_BYTES", 64)
    write_store(tmp_path / "store")  # 38 chunks
    path = tmp_path / "store" / "tensor_000.bin"
    flip_bit(path, 8 * (N * D * 4 - 1))
    for _ in range(5):  # by chance it would be among the four once in ten times
        with pytest.raises(StoreError, match="chunk 37 "):
            open_store(tmp_path / "store")
    flip_bit(path, 8 * (N * D * 4 - 1))
    flip_bit(path, 0)
    found = 0
    for _ in range(200):
        try:
            open_store(tmp_path / "store")
        except StoreError:
            found += 1
    # binomial with p = 4 / 38: 21 expected, standard deviation 4.3
    assert 2 < found < 48


def test_open__wrong_or_damaged_manifest_is_an_error(tmp_path):
    write_store(tmp_path / "store")
    write_store(tmp_path / "other", layout_of(fingerprint="other"))
    manifest = tmp_path / "store" / "manifest.json"
    good = manifest.read_bytes()
    with pytest.raises(StoreError, match="something else"):
        open_store(tmp_path / "store", fingerprint="new weights")
    sealed = json.loads(good)
    sealed["content"]["num_rows"] = N - 1
    for content, message in [
        ((tmp_path / "other" / "manifest.json").read_bytes(), "something else"),
        (good[: len(good) // 2], "cannot be read"),
        (b"", "cannot be read"),
        (b"[]", "cannot be read"),
        (json.dumps(sealed).encode(), "checksum does not match"),
    ]:
        manifest.write_bytes(content)
        with pytest.raises(StoreError, match=message):
            open_store(tmp_path / "store")
    manifest.write_bytes(good)
    assert torch.equal(open_store(tmp_path / "store").read(torch.arange(N))["features"], features(torch.arange(N)))


def test_open__every_flipped_bit_of_the_manifest_is_found_or_harmless(tmp_path):
    write_store(tmp_path / "store")
    manifest = tmp_path / "store" / "manifest.json"
    content = json.loads(manifest.read_bytes())["content"]
    harmless = 0
    for bit in range(0, 8 * manifest.stat().st_size, 13):
        flip_bit(manifest, bit)
        try:
            open_store(tmp_path / "store")
        except StoreError:
            pass
        else:  # white space
            harmless += 1
            assert json.loads(manifest.read_bytes())["content"] == content
        flip_bit(manifest, bit)
    assert harmless < bit // 13 // 2


def test_open__other_format_version_is_an_error(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        for module in (feature_layout, feature_store):
            patch.setattr(module, "FORMAT_VERSION", 3)
        write_store(tmp_path / "store")
    with pytest.raises(StoreError, match="another format"):
        open_store(tmp_path / "store")


def test_writer__replaces_a_damaged_store_while_it_is_being_read(tmp_path):
    reader = write_store(tmp_path / "store")
    write_store(tmp_path / "store", layout_of(torch.float16, fingerprint="new"))
    assert torch.equal(reader.read(torch.arange(N))["features"], features(torch.arange(N)))
    new = open_store(tmp_path / "store", fingerprint="new")
    assert new.read(torch.arange(N))["features"].dtype == torch.float16


# -------------------- failures


def test_writer__an_error_removes_the_store(tmp_path):
    with suppress(ZeroDivisionError), FeatureWriter(tmp_path / "store", layout_of()) as writer:
        writer.write(torch.arange(4), {"features": features(torch.arange(4))})
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_writer__leaves_files_of_others_alone(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "notes.txt").write_text("mine")
    write_store(tmp_path / "store")
    FeatureWriter(tmp_path / "store", layout_of()).discard()
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["notes.txt"]


def test_writer__unfinished_store_is_not_read(tmp_path):
    with FeatureWriter(tmp_path / "store", layout_of()) as writer:
        writer.write(torch.arange(N - 1), {"features": features(torch.arange(N - 1))})
    with pytest.raises(StoreError, match=f"1 of {N} rows were not written"):
        writer.finalize()
    with pytest.raises(StoreError, match="No finished feature store"):
        open_store(tmp_path / "store")


def killed_writer(directory):
    feature_writer._SYNC_BYTES = 24 * 16  # journal every 16 rows
    writer = FeatureWriter(directory, layout_of())
    for rows in torch.arange(60).split(8):
        writer.write(rows, {"features": features(rows)})
    os.write(writer._journal.fileno(), b"\n00000000 [[60,1")  # a line cut short
    os.kill(os.getpid(), signal.SIGKILL)


@needs_fork
def test_writer__a_killed_one_is_resumed_at_what_was_safely_written(tmp_path):
    assert fork(lambda: killed_writer(tmp_path / "store")).wait() == -signal.SIGKILL
    with pytest.raises(StoreError, match="No finished feature store"):
        open_store(tmp_path / "store")
    with FeatureWriter(tmp_path / "store", layout_of()) as writer:
        missing = writer.missing_rows()
        # batches of 8 end at 8, 16, ... 56, 60, and every second one brings the journal up to date: last at 48
        assert torch.equal(missing, torch.arange(48, N))
        writer.write(missing, {"features": features(missing)})
    store = writer.finalize()
    assert torch.equal(store.read(torch.arange(N))["features"], features(torch.arange(N)))


def interrupted(directory, rows=60):
    """A store whose writing was interrupted after `rows` rows."""
    with suppress(KeyboardInterrupt), FeatureWriter(directory, layout_of()) as writer:
        writer.write(torch.arange(rows), {"features": features(torch.arange(rows))})
        raise KeyboardInterrupt


def test_writer__an_interrupted_one_is_resumed(tmp_path):
    interrupted(tmp_path / "store")
    with FeatureWriter(tmp_path / "store", layout_of()) as writer:
        assert torch.equal(writer.missing_rows(), torch.arange(60, N))


@pytest.mark.parametrize("other", ["fingerprint", "dtype", "rows", "truncated", "draft", "journal"])
def test_writer__an_unfinished_store_of_something_else_is_thrown_away(tmp_path, other):
    interrupted(tmp_path / "store")
    layout = layout_of()
    if other == "fingerprint":
        layout = layout_of(fingerprint="other")
    elif other == "dtype":
        layout = layout_of(torch.float16)
    elif other == "rows":
        layout = layout_of(num_rows=N - 1)
    elif other == "truncated":  # made longer again it would read as zeros
        os.truncate(tmp_path / "store" / "tensor_000.bin", 100)
    elif other == "draft":
        flip_bit(tmp_path / "store" / "draft.json", 8 * 60)
    elif other == "journal":
        flip_bit(tmp_path / "store" / "journal_0000.txt", 8 * 12)
    with FeatureWriter(tmp_path / "store", layout) as writer:
        assert torch.equal(writer.missing_rows(), torch.arange(layout.num_rows))


def test_writer__read_only_folder_is_an_error(read_only):
    folder, lock_folder = read_only
    write_store(folder / "store")
    lock_folder()
    for attempt in (
        lambda: FeatureWriter(folder / "new", layout_of()),
        lambda: FeatureWriter(folder / "store", layout_of(fingerprint="new")),
        lambda: store_lock(folder / "new").__enter__(),
    ):
        with pytest.raises(StoreError, match="cannot be written to"):
            attempt()
    # a finished store is still read there
    assert torch.equal(open_store(folder / "store").read(torch.arange(N))["features"], features(torch.arange(N)))


def test_writer__checks_the_free_disk_first_and_says_the_estimate(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(feature_writer.shutil, "disk_usage", lambda _: usage(2**40, 2**40, 2**30 // 2))
    layout = StoreLayout("key", 2**20, {"features": TensorSpec((512,), torch.float16)}, num_views=3)
    assert layout.num_bytes == 3 * 2**30
    with pytest.raises(StoreError, match=r"needs 3\.00 GiB .* has 0\.50 GiB free"):
        FeatureWriter(tmp_path / "store", layout)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("checked", [True, False])
def test_writer__full_disk_is_an_error_and_leaves_nothing(small_disk, monkeypatch, checked):
    """Seen before writing, or where the estimate did not help (another process took the space), while writing."""
    if not checked:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(feature_writer.shutil, "disk_usage", lambda _: usage(0, 0, 2**40))
    layout = StoreLayout("key", 1000, {"features": TensorSpec((512,), torch.float32)})  # 2 MB

    def write():
        with FeatureWriter(small_disk / "store", layout) as writer:
            for rows in torch.arange(1000).split(100):
                writer.write(rows, {"features": torch.ones(len(rows), 512)})

    with pytest.raises(StoreError, match="GiB free" if checked else "is full"):
        write()
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("failing", ["data", "journal", "manifest"])
def test_writer__disk_full_at_the_flush_is_an_error_and_leaves_nothing(tmp_path, monkeypatch, failing):
    """File systems that allocate late report a full disk at fsync; calls: data, journal, manifest, folder."""
    calls = []
    fsync = os.fsync
    writer = FeatureWriter(tmp_path / "store", layout_of())

    def late(descriptor):
        calls.append(descriptor)
        if len(calls) == {"data": 1, "journal": 2, "manifest": 3}[failing]:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", late)
    writer.write(torch.arange(N), {"features": features(torch.arange(N))})
    with pytest.raises(StoreError, match="is full"):
        writer.finalize()
    assert list(tmp_path.iterdir()) == []


# -------------------- several processes


def second_rank(directory):
    with FeatureWriter(directory, layout_of(num_views=2), rank=1) as writer:
        for view in range(2):
            rows = writer.missing_rows(view)
            rows = rows[rows % 2 == 1]
            writer.write(rows, {"features": features(rows, view)}, view)


@needs_fork
def test_writer__ranks_fill_disjoint_rows_of_one_store(tmp_path):
    with FeatureWriter(tmp_path / "store", layout_of(num_views=2)) as first:
        second = fork(lambda: second_rank(tmp_path / "store"))
        for view in range(2):
            rows = torch.arange(0, N, 2)
            first.write(rows, {"features": features(rows, view)}, view)
        assert second.wait() == 0
    store = first.finalize()
    for view in range(2):
        assert torch.equal(store.read(torch.arange(N), view)["features"], features(torch.arange(N), view))
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["manifest.json", "tensor_000.bin"]


def test_writer__a_rank_that_fails_leaves_no_store(tmp_path):
    with FeatureWriter(tmp_path / "store", layout_of()) as first:
        with suppress(ZeroDivisionError), FeatureWriter(tmp_path / "store", layout_of(), rank=1):
            raise ZeroDivisionError
        first.write(torch.arange(N), {"features": features(torch.arange(N))})
    with pytest.raises(StoreError, match="were not written"):
        first.finalize()
    assert list(tmp_path.iterdir()) == []


def test_writer__other_ranks_need_the_first(tmp_path):
    with pytest.raises(StoreError, match="Rank 0 has prepared no store"):
        FeatureWriter(tmp_path / "store", layout_of(), rank=1)


def read_or_write(directory):
    """As in the docstring of the module."""
    try:
        return FeatureStore.open(directory, fingerprint="key")
    except StoreError:
        with store_lock(directory, timeout_seconds=300):
            try:
                return FeatureStore.open(directory, fingerprint="key")
            except StoreError:
                Path(f"{directory}.writer.{os.getpid()}").touch()
                until(Path(f"{directory}.waits").exists)
                return write_store(directory)


@needs_fork
def test_store_lock__of_two_runs_one_writes_and_both_read(tmp_path):
    directory, writing = tmp_path / "store", tmp_path / f"store.writer.{os.getpid()}"

    def other_run():
        until(writing.exists)
        with pytest.raises(StoreError, match="Another process"), store_lock(directory, timeout_seconds=0):
            pass
        (tmp_path / "store.waits").touch()
        store = read_or_write(directory)
        assert torch.equal(store.read(torch.arange(N))["features"], features(torch.arange(N)))

    other = fork(other_run)
    store = read_or_write(directory)
    assert torch.equal(store.read(torch.arange(N))["features"], features(torch.arange(N)))
    assert other.wait() == 0
    assert list(tmp_path.glob("store.writer.*")) == [writing]


@needs_fork
def test_store_lock__of_a_killed_process_is_free(tmp_path):
    def hold():
        with store_lock(tmp_path / "store"):
            (tmp_path / "held").touch()
            time.sleep(HANGS_SECONDS)

    holder = fork(hold)
    until((tmp_path / "held").exists)
    with pytest.raises(StoreError, match="Another process"), store_lock(tmp_path / "store", timeout_seconds=0.1):
        pass
    holder.kill()
    holder.wait()
    with store_lock(tmp_path / "store", timeout_seconds=60):
        pass


# -------------------- prune


def test_prune__removes_what_was_not_used_for_longest(tmp_path):
    for age, name in enumerate("abcd"):
        write_store(tmp_path / name, layout_of(num_rows=1000))
        os.utime(tmp_path / name / "manifest.json", (1000 - age, 1000 - age))  # d is the oldest
    interrupted(tmp_path / "half")
    os.utime(tmp_path / "half" / "draft.json", (1, 1))
    (tmp_path / "not_a_store").mkdir()
    (tmp_path / "not_a_store" / "manifest.json").write_text("{}")
    open_store(tmp_path / "d")  # now the newest
    num_bytes = 1000 * D * 4
    assert prune(tmp_path, 10 * num_bytes) == []
    assert [path.name for path in prune(tmp_path, 3 * num_bytes + num_bytes // 2)] == ["half", "c"]
    assert [path.name for path in prune(tmp_path, 0, keep=[tmp_path / "a"])] == ["b", "d"]
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"a", "not_a_store"}
    assert prune(tmp_path / "absent", 0) == []


def test_prune__leaves_a_store_that_is_being_written(tmp_path):
    with store_lock(tmp_path / "store"), FeatureWriter(tmp_path / "store", layout_of()) as writer:
        assert prune(tmp_path, 0) == []
        writer.write(torch.arange(N), {"features": features(torch.arange(N))})
        writer.finalize()
    assert prune(tmp_path, 0) == [tmp_path / "store"]
