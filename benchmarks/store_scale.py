"""Resident memory and speed of the feature store at the size of ImageNet-1k.

Writes N x D float16 synthetic features batch by batch, then reads one shuffled epoch from the store, and the same
batches from a tensor in RAM. Each part runs in a process of its own, whose resident memory is read after each batch.

    python benchmarks/store_scale.py --rows 1280000 --dim 512
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from lightning_unfreeze.features.layout import StoreLayout, TensorSpec
from lightning_unfreeze.features.store import FeatureStore
from lightning_unfreeze.features.writer import FeatureWriter

KEY = "scale"


def resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


class Growth:
    def __init__(self) -> None:
        self.start = resident_bytes()
        self.most = 0

    def look(self) -> None:
        self.most = max(self.most, resident_bytes() - self.start)


def values(rows: torch.Tensor, dim: int) -> torch.Tensor:
    """Features that say which row they are of, exact in float16."""
    return ((rows[:, None] * 31 + torch.arange(dim)) % 2039).to(torch.float16)


def write(directory: Path, num_rows: int, dim: int, batch_size: int) -> dict[str, float]:
    growth = Growth()
    start = time.perf_counter()
    layout = StoreLayout(KEY, num_rows, {"features": TensorSpec((dim,), torch.float16)})
    with FeatureWriter(directory, layout) as writer:
        for rows in torch.arange(num_rows).split(batch_size):
            writer.write(rows, {"features": values(rows, dim)})
            growth.look()
    written = time.perf_counter()
    writer.finalize()
    growth.look()
    return {
        "GB": layout.num_bytes / 1e9,
        "rss_growth_MiB": growth.most / 2**20,
        "write_seconds": written - start,
        "finalize_seconds": time.perf_counter() - written,
    }


def read(directory: Path, num_rows: int, dim: int, batch_size: int, verify: str) -> dict[str, float]:
    growth = Growth()
    start = time.perf_counter()
    store = FeatureStore.open(directory, fingerprint=KEY, verify=verify)  # type: ignore[arg-type]
    opened = time.perf_counter()
    growth.look()
    batches = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0)).split(batch_size)
    seconds = 0.0
    for i, rows in enumerate(batches):
        begin = time.perf_counter()
        batch = store.read(rows)["features"]
        seconds += time.perf_counter() - begin
        growth.look()
        if i % 50 == 0 and not torch.equal(batch, values(rows, dim)):
            raise SystemExit(f"Batch {i} is not what was written.")
    return {
        "rss_growth_MiB": growth.most / 2**20,
        f"open_{verify}_seconds": opened - start,
        "read_ms_per_batch": 1e3 * seconds / len(batches),
        "epoch_seconds": seconds,
    }


def ram(directory: Path, num_rows: int, dim: int, batch_size: int) -> dict[str, float]:
    """The same gathers from a tensor in RAM."""
    tensor = torch.empty(num_rows, dim, dtype=torch.float16)
    for rows in torch.arange(num_rows).split(4096):
        tensor[rows] = values(rows, dim)
    batches = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0)).split(batch_size)
    start = time.perf_counter()
    for rows in batches:
        tensor.index_select(0, rows)
    seconds = time.perf_counter() - start
    return {"read_ms_per_batch": 1e3 * seconds / len(batches), "epoch_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_280_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--directory", type=Path, help="where the store is put for the time of the run")
    parser.add_argument("--part", choices=["write", "read", "read_full", "ram"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = (args.rows, args.dim, args.batch_size)
    if args.part:
        parts = {
            "write": lambda: write(args.directory, *size),
            "read": lambda: read(args.directory, *size, "sampled"),
            "read_full": lambda: read(args.directory, *size, "full"),
            "ram": lambda: ram(args.directory, *size),
        }
        print(json.dumps({"part": args.part} | {name: round(x, 3) for name, x in parts[args.part]().items()}))
        return
    folder = Path(tempfile.mkdtemp(dir=args.directory))
    options = [f"--rows={args.rows}", f"--dim={args.dim}", f"--batch-size={args.batch_size}"]
    try:
        for part in ("write", "read", "read_full", "ram"):
            command = [sys.executable, __file__, *options, f"--directory={folder / 'store'}", f"--part={part}"]
            subprocess.run(command, check=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
