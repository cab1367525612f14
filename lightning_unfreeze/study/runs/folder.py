"""`study.json`: what a study's folder was started with, and that nothing else goes on in it."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_warn

from lightning_unfreeze.reporting import write_whole
from lightning_unfreeze.study.judge.analysis import StudyInfo

NAME = "study.json"


@dataclass(frozen=True)
class Stored:
    """What a folder says of its study.

    Attributes:
        settings: All that decides a run's result.
        info: What the report says of the study; its planned seeds are those of the first start.
    """

    settings: Mapping[str, Any]
    info: StudyInfo

    def write(self, folder: Path) -> None:
        """Write it down, whole or not at all."""
        write_whole(folder / NAME, json.dumps({"settings": self.settings, "info": asdict(self.info)}, indent=1))


def stored_study(folder: Path) -> Stored | None:
    """Return what the folder says, None where no study was started in it."""
    path = folder / NAME
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return Stored(found["settings"], StudyInfo.from_json(found["info"]))


def refuse_other_settings(folder: Path, before: Stored, asked: Stored) -> None:
    """Refuse to go on in a folder with anything that would give other runs, or other looks at them.

    Raises:
        ValueError: Naming what differs, with both values.
    """
    changed = differences(before, asked)
    if changed:
        raise ValueError(
            f"out={str(folder)!r} holds a study with another {changed}: give another folder, or the settings that it "
            "was started with."
        )


def differences(one: Stored, other: Stored) -> str:
    """Return what would give other runs, or other looks at them: names, then both values of each; empty for nothing.

    >>> info = StudyInfo("pets", 8, 8, "resnet18", "ImageNet", margin=1.0, match="flops")
    >>> differences(Stored({"recipe": {"cycle_len": 1}}, info), Stored({"recipe": {"cycle_len": 2}}, info))
    'recipe.cycle_len (recipe.cycle_len: 1 there, 2 here)'
    """
    before, asked = ({**stored.settings, "looks": list(stored.info.looks)} for stored in (one, other))
    found = dict(_differences(before, asked))
    return f"{', '.join(found)} ({'; '.join(f'{name}: {words}' for name, words in found.items())})" if found else ""


def _differences(one: Mapping[str, Any], other: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for name in sorted({*one, *other}):
        there, here = one.get(name), other.get(name)
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            yield from _differences(there, here, f"{above}{name}.")
        elif there != here:
            yield above + name, f"{reprlib.repr(there)} there, {reprlib.repr(here)} here"


def claim_folder(folder: Path, asked: Stored, keep_plan: bool) -> Stored:
    """Write down what the study is, and return it with the seeds that its first start planned.

    Args:
        folder: Of the study.
        asked: What is to be run; its planned seeds are those of this start.
        keep_plan: Take arms and seeds of the first start, whatever is asked for now.

    Raises:
        ValueError: If the folder holds a study with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{NAME}.lock"):
        before = stored_study(folder)
        info = asked.info
        if before is not None:
            refuse_other_settings(folder, before, asked)
            more = set(info.planned_seeds) - set(before.info.planned_seeds)
            if more and before.info.planned_seeds and not keep_plan:
                rank_zero_warn(
                    f"{folder} was planned with {len(before.info.planned_seeds)} seeds, and is asked for {len(more)} "
                    "more: its report will say that it was extended after a look. looks=[...] plans that "
                    "from the start."
                )
            info = replace(info, planned_seeds=before.info.planned_seeds or info.planned_seeds)
            info = replace(info, arms=before.info.arms) if keep_plan else info
        claimed = Stored(asked.settings, info)
        claimed.write(folder)
    return claimed
