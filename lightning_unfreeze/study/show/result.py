"""The runs of a study that are on disk, and what they say."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from lightning_unfreeze.study.judge.analysis import Analysis, StudyInfo
from lightning_unfreeze.study.judge.verdict import StudyVerdict, judge
from lightning_unfreeze.study.runs.folder import stored_study
from lightning_unfreeze.study.runs.records import RunLog, RunRecord
from lightning_unfreeze.study.show.plots import PLOTS
from lightning_unfreeze.study.show.report import write_report
from lightning_unfreeze.study.show.tables import comparison_table


@dataclass(frozen=True)
class StudyResult:
    """The runs of a study, and what they say.

    Attributes:
        records: Finished runs.
        info: What the study was.
    """

    records: tuple[RunRecord, ...]
    info: StudyInfo

    @cached_property
    def analysis(self) -> Analysis:
        """The comparisons."""
        return Analysis(self.records, self.info)

    def table(self) -> pd.DataFrame:
        """Return every arm against the reference."""
        return comparison_table(self.analysis).data

    def verdict(self) -> StudyVerdict:
        """Return the verdict, with what would change it."""
        return judge(self.analysis)

    def plot(self, name: str = "forest") -> Figure:
        """Return one picture of the report.

        Args:
            name: Its name, as in the report.

        Raises:
            ValueError: For a picture that there is not, or that these runs do not allow.
        """
        found = next((spec.draw(self.analysis) for spec in PLOTS if spec.name == name), None)
        if found is None:
            raise ValueError(f"no picture {name!r} from these runs; there may be {', '.join(s.name for s in PLOTS)}.")
        return found[0]

    def write(self, folder: str | os.PathLike[str]) -> StudyVerdict:
        """Write the report and return the verdict."""
        return write_report(self.analysis, folder)


def load_study(folder: str | os.PathLike[str]) -> StudyResult:
    """Return the study of a folder, as far as it is finished.

    Raises:
        ValueError: If there is none.
    """
    root = Path(folder)
    stored = stored_study(root)
    if stored is None:
        raise ValueError(f"{root} holds no study: there is no study.json; give the folder that `study run` wrote to.")
    records = RunLog(root / "runs.jsonl").read()
    if not records:
        raise ValueError(f"{root} holds no finished run yet.")
    return StudyResult(tuple(records), stored.info)
