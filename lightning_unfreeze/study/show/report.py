"""The report of a study on disk: Markdown, one self-contained HTML file, PNG and CSV per picture, CSV per table."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from lightning_unfreeze.study.judge.analysis import Analysis
from lightning_unfreeze.study.judge.statistics import Outcome
from lightning_unfreeze.study.judge.verdict import StudyVerdict, exit_code, judge
from lightning_unfreeze.study.show.plots import PLOTS
from lightning_unfreeze.study.show.tables import tables_of

DPI = 130
_COLOURS: dict[Outcome, str] = {
    "equal": "#00734F",
    "better": "#B34700",
    "worse": "#B34700",
    "not zero": "#7A5200",
    "undecided": "#555555",
}


@dataclass(frozen=True)
class Picture:
    """One picture of the report."""

    name: str
    caption: str
    png: bytes
    data: pd.DataFrame

    @property
    def base64(self) -> str:
        """The PNG as text, for an image within the HTML."""
        return base64.b64encode(self.png).decode()


def write_report(analysis: Analysis, folder: str | os.PathLike[str]) -> StudyVerdict:
    """Write the report of a study and return its verdict.

    Writes ``report.md``, ``report.html`` (nothing outside it is needed to read it), ``verdict.txt``,
    ``plots/NAME.png`` with ``plots/NAME.csv``, and ``tables/NAME.csv``. Missing arms and measurements are left out,
    and said to be.

    Args:
        analysis: Its finished runs.
        folder: Where to write; made where it is missing.
    """
    verdict = judge(analysis)
    tables = tables_of(analysis)
    pictures, absent = _pictures(analysis)
    root = Path(folder)
    for part in ("plots", "tables"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        (root / "plots" / f"{picture.name}.png").write_bytes(picture.png)
        picture.data.to_csv(root / "plots" / f"{picture.name}.csv", index=False)
    for table in tables:
        table.data.to_csv(root / "tables" / f"{table.name}.csv", index=False)
    context = {
        "info": analysis.info,
        "verdict": verdict,
        "outcome": verdict.outcome,
        "colour": _COLOURS[verdict.outcome],
        **dict(zip(("said", "size", "context"), verdict.headline, strict=True)),
        "code": exit_code(verdict),
        "tables": tables,
        "pictures": pictures,
        "absent": absent,
        "facts": facts_of(analysis),
        "runs": sum(len(runs) for runs in analysis.runs.values()),
    }
    (root / "report.md").write_text(_render("report.md.jinja", context), encoding="utf-8")
    (root / "report.html").write_text(_render("report.html.jinja", context), encoding="utf-8")
    (root / "verdict.txt").write_text(verdict.text + "\n", encoding="utf-8")
    return verdict


def facts_of(analysis: Analysis) -> dict[str, str]:
    """Return what ran, by name: what the study was started with, and what its runs say they ran on."""
    info = analysis.info
    found = {
        "data": f"{info.dataset}: {info.n_train} training and {info.n_test} test images",
        "network": f"{info.architecture}, pretrained on {info.pretrained_on}",
        **info.facts,
    }
    runs = [run for arm in analysis.arms for run in analysis.runs[arm].values()]
    for name in dict.fromkeys(name for run in runs for name in run.environment):
        values = dict.fromkeys(run.environment[name] for run in runs if run.environment.get(name))
        found[name] = "; ".join(values)
    found["code"] = "; ".join(dict.fromkeys(run.code_version for run in runs)) or "not said"
    tuned = sum(next(iter(runs.values())).tuning_seconds for runs in analysis.runs.values())
    found["time"] = f"{sum(run.seconds for run in runs):.0f} s of runs, {tuned:.0f} s of tuning"
    return found


def _pictures(analysis: Analysis) -> tuple[list[Picture], list[str]]:
    """Draw every picture that the runs allow, and name the others."""
    drawn, absent = [], []
    for spec in PLOTS:
        plot = spec.draw(analysis)
        if plot is None:
            absent.append(spec.name)
        else:
            drawn.append(Picture(spec.name, spec.caption, _png(plot[0]), plot[1]))
    return drawn, absent


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _render(template: str, context: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lightning_unfreeze.study", "templates"),
        autoescape=template.endswith(".html.jinja"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|")
    return environment.get_template(template).render(**context)
