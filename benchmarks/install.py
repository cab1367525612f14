"""What the package adds to an environment, and how long its names take to import.

    python benchmarks/install.py [--runs 5] > benchmarks/results/install.md

Sizes are of installed files: the package's own, and those of all distributions that it requires, found by their
metadata. An import is timed in a new process, in seconds of its processor, which other work
on the machine disturbs less than it does the clock's; the median of the runs, after one that warms the disk's cache.
"""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import tomllib
from packaging.requirements import Requirement

REPO = Path(__file__).parents[1]
STATEMENTS = (
    "import torch",
    "import lightning.pytorch",
    "import timm",
    "import lightning_unfreeze",
    "from lightning_unfreeze.features import cached",
    "from lightning_unfreeze import Stage",
    "from lightning_unfreeze import layer_groups",
    "from lightning_unfreeze import GradualUnfreeze",
)


def required(requirements: list[str]) -> set[str]:
    """Names of the distributions that these requirements bring, without extras of others."""
    found: set[str] = set()
    left = [Requirement(one) for one in requirements]
    while left:
        one = left.pop()
        name = one.name.lower().replace("_", "-")
        if name in found or (one.marker is not None and not one.marker.evaluate({"extra": ""})):
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        left += [Requirement(text) for text in distribution.requires or ()]
    return found


def megabytes(name: str) -> float:
    files = [Path(str(file.locate())) for file in metadata.distribution(name).files or ()]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def own_megabytes() -> float:
    """Of what a wheel holds: the package without compiled files, and the configs."""
    folders = (REPO / "lightning_unfreeze", REPO / "configs")
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc"]
    return sum(file.stat().st_size for file in files) / 1e6


def seconds(statement: str, runs: int) -> list[float]:
    code = f"import time; s = time.process_time(); exec({statement!r}); print(time.process_time() - s)"
    took = []
    for _ in range(runs + 1):
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
        took.append(float(done.stdout))
    return took[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    with (REPO / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    sizes = {name: megabytes(name) for name in required(project["dependencies"])}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:6]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "lightning", "timm"))
    print("# What an installation takes\n")
    print(
        f"`python benchmarks/install.py --runs {args.runs}`: Python {platform.python_version()}, {versions}, ", end=""
    )
    print(f"{platform.machine()}, {platform.system()}.\n")
    print("| installed | MB |\n|---|---|")
    print(f"| the package itself, with its configs and the demo's weights | {own_megabytes():.1f} |")
    print(f"| what it requires, and what that requires: {len(sizes)} distributions | {sum(sizes.values()):,.0f} |")
    for name in largest:
        print(f"| of these {name} | {sizes[name]:,.0f} |")
    print("\n| statement, in a new process | processor seconds, median | fastest, slowest |\n|---|---|---|")
    for statement in STATEMENTS:
        took = seconds(statement, args.runs)
        print(f"| `{statement}` | {statistics.median(took):.2f} | {min(took):.2f}, {max(took):.2f} |")


if __name__ == "__main__":
    main()
