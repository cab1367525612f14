"""What a user asks of a study, read and checked: seeds, looks, shards; and a stage in a few characters."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lightning_unfreeze.stages.plan import Stage

FIRST_TUNING_SEED = 1_000_000
"""Tuning seeds count from here, so that no study seed is one of them."""
PILOT_SEEDS = tuple(range(2_000_000, 2_000_005))
"""Seeds of the pilot that `seeds="auto"` runs; they are in no comparison."""


def parse_seeds(seeds: int | str | Sequence[int]) -> tuple[int, ...]:
    """Return the seeds that a number or a list stands for.

    Raises:
        ValueError: For fewer than two, one twice, or one that tuning or the pilot has.
    """
    if isinstance(seeds, str):
        raise ValueError(f"seeds={seeds!r}: give a number, a list of seeds, or auto.")
    given = tuple(range(seeds)) if isinstance(seeds, int) else tuple(int(seed) for seed in seeds)
    if len(given) < 2 or len(set(given)) < len(given) or max(given) >= FIRST_TUNING_SEED or min(given) < 0:
        raise ValueError(f"seeds={seeds!r}: give 2 or more different ones from 0 to {FIRST_TUNING_SEED - 1}.")
    return given


def parse_looks(looks: Sequence[int] | None, num_seeds: int, auto: bool) -> tuple[int, ...]:
    """Return the planned looks, none for a single one at the end.

    Raises:
        ValueError: For looks that do not ascend to the number of seeds.
    """
    given = tuple(looks or ())
    if given and (auto or list(given) != sorted(set(given)) or given[0] < 2 or given[-1] != num_seeds):
        raise ValueError(
            f"looks={list(given)}: give ascending numbers of seeds, from 2 to the {num_seeds} that are planned"
            f"{'; seeds=auto plans one look' if auto else ''}."
        )
    return given


def parse_shard(shard: str) -> tuple[int, int]:
    """Return place and number of shards of a text such as `3/16`.

    Raises:
        ValueError: For anything else.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", shard.strip())
    place, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= place <= count:
        raise ValueError(f"shard={shard!r}: give PLACE/COUNT with a place from 1 to the count, such as 3/16.")
    return place, count


def stage_words(stage: Stage) -> str:
    """Return a stage in a few characters: C2, F1+1+1, U1+2+4; S where the head is solved."""
    if stage.solve is True:
        return "S"
    letter = "C" if stage.precompute else "F" if stage.train == "head" else "U" if stage.train == "all" else "G"
    if stage.cycle_len is None:
        return f"{letter}{stage.num_epochs}"
    lengths = [f"{float(length):g}" for length in stage.cycle_epochs]
    return letter + ("+".join(lengths) if len(lengths) <= 4 else f"{len(lengths)}x{lengths[0]}")
