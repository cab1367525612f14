"""The report on one set: CSV, PNG, and one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_unfreeze.reporting.judged import Judged, expected_calibration_error, wilson
from lightning_unfreeze.reporting.tables import write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

_SHOWN_CLASSES = 40
_STYLE = """
:root{color-scheme:light dark;--line:#8884;--bad:#c8553d}
body{font:16px/1.45 system-ui,sans-serif;margin:0 auto;max-width:1100px;padding:1rem}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.15rem;margin:2rem 0 .5rem}
.headline{font-size:1.25rem}.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child,td.text,th.text{text-align:left}
.bar{display:inline-block;width:5rem;height:.6rem;background:var(--line);vertical-align:middle}
.bar i{display:block;height:100%;background:#1b7f79}
.photos{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:.8rem}
figure{margin:0;font-size:.8rem;overflow-wrap:anywhere}figure img{width:100%;aspect-ratio:1;object-fit:contain;
background:#8882}figure b{color:var(--bad)}img.plot{max-width:100%;height:auto;background:#fff}
""".strip()


def write_report(judged: Judged, pictures: Mapping[int, Image], folder: Path, title: str) -> Path:
    """Writes `index.html` and the tables and pictures behind it; returns the page."""
    bins, class_rows, sample_rows = judged.calibration(), judged.class_rows(), judged.sample_rows()
    write_csv(folder / "per_class.csv", class_rows)
    write_csv(folder / "samples.csv", sample_rows)
    write_csv(folder / "calibration.csv", bins)
    figures = {"calibration": _plot_calibration(judged, bins)}
    if not judged.several:
        matrix = judged.confusion()
        columns = [str(name) for name in judged.class_names]
        rows = [
            {"truth": name, **dict(zip(columns, map(int, line), strict=True))}
            for name, line in zip(columns, matrix, strict=True)
        ]
        write_csv(folder / "confusion.csv", rows)
        figures["confusion"] = _plot_confusion(judged)
    sheet = sorted(pictures, key=lambda row: -judged.losses[row])
    if sheet:
        figures["worst"] = _plot_sheet(judged, sheet, pictures)
    encoded = {name: _save(figure, folder / f"{name}.png") for name, figure in figures.items()}
    page = folder / "index.html"
    page.write_text(_page(judged, pictures, sheet, encoded, title), encoding="utf-8")
    return page


def worst_rows(judged: Judged, num: int) -> list[int]:
    """The rows of the largest losses."""
    found: list[int] = np.argsort(-judged.losses, kind="stable")[:num].tolist()
    return found


def _page(
    judged: Judged, pictures: Mapping[int, Image], sheet: Sequence[int], plots: Mapping[str, str], title: str
) -> str:
    num, right = len(judged.names), int(judged.right.sum())
    low, high = wilson(right, num)
    what = "all labels right" if judged.several else "right"
    parts = [
        f"<p class=headline><strong>{right / num:.1%}</strong> {what}: {right} of {num} images "
        f"(95&nbsp;% interval {low:.1%} to {high:.1%})</p>"
    ]
    changes = judged.tta_changes()
    if changes is not None:
        parts.append(
            f"<p>Test-time augmentation: {changes['with']} right in place of {changes['without']}; it corrected "
            f"{changes['fixed']} images and spoiled {changes['broken']}.</p>"
        )
    parts.append(f"<h2>{'Labels' if judged.several else 'Classes'}</h2>{_class_table(judged)}")
    if "confusion" in plots:
        parts.append(f"<h2>What is taken for what</h2>{_plot(plots['confusion'], 'confusion matrix')}")
    if sheet:
        cells = "".join(_cell(judged, row, pictures[row]) for row in sheet)
        parts.append(f"<h2>Worst photos</h2><p>The largest losses first.</p><div class=photos>{cells}</div>")
    ece = expected_calibration_error(judged.calibration())
    parts.append(
        f"<h2>Calibration</h2><p>Expected calibration error {ece:.3f}: how far confidence and accuracy lie apart, "
        f"0 at best.</p>{_plot(plots['calibration'], 'reliability plot')}"
    )
    tables = ("per_class", "samples", *(["confusion"] if "confusion" in plots else []), "calibration")
    files = ", ".join(f"<code>{name}.csv</code>" for name in tables)
    parts.append(
        f"<p>All numbers: {files} in this folder; <code>samples.csv</code> lists every image, worst first.</p>"
    )
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>"
    )


def _class_table(judged: Judged) -> str:
    rows = judged.class_rows()
    last = "best threshold" if judged.several else "most often taken for"
    shares = ("accuracy", "precision", "f1")
    first = "recall" if judged.several else "accuracy"
    head = f"<tr><th>class<th>images<th>{first}<th class=text>95 % interval<th>precision<th>F1<th class=text>{last}"
    lines = []
    for row in sorted(rows, key=lambda row: (row["accuracy"] != row["accuracy"], row["accuracy"])):
        accuracy, precision, f1 = (f"{row[name]:.1%}" if row[name] == row[name] else "–" for name in shares)
        width = 0 if row["accuracy"] != row["accuracy"] else 100 * row["accuracy"]
        end = f"{row['best_threshold']:.2f}" if judged.several else html.escape(row["taken_for"])
        lines.append(
            f"<tr><td>{html.escape(str(row['class']))}<td>{row['images']}"
            f"<td><span class=bar><i style='width:{width:.0f}%'></i></span> {accuracy}"
            f"<td class=text>{row['low']:.0%} – {row['high']:.0%}<td>{precision}<td>{f1}<td class=text>{end}"
        )
    return f"<div class=wide><table>{head}{''.join(lines)}</table></div>"


def _cell(judged: Judged, row: int, picture: Image) -> str:
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, "JPEG", quality=80)
    uri = base64.b64encode(stream.getvalue()).decode()
    texts = (judged.text_of(part[row]).replace(";", ", ") or "none" for part in (judged.target, judged.guess))
    truth, guess = (html.escape(text) for text in texts)
    name = html.escape(str(judged.names[row]))
    said = guess if judged.right[row] else f"<b>{guess}</b>"
    return (
        f"<figure><img src='data:image/jpeg;base64,{uri}' alt='{name}'><figcaption>is {truth}, said {said} "
        f"({judged.confidence[row]:.0%})<br>loss {judged.losses[row]:.2f}<br><small>{name}</small></figcaption>"
        "</figure>"
    )


def _plot(encoded: str, alt: str) -> str:
    return f"<img class=plot src='data:image/png;base64,{encoded}' alt='{alt}'>"


def _save(figure: Figure, path: Path) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120, bbox_inches="tight")
    path.write_bytes(stream.getvalue())
    return base64.b64encode(stream.getvalue()).decode()


def _plot_confusion(judged: Judged) -> Figure:
    from matplotlib.figure import Figure

    matrix = judged.confusion()
    # of many classes those with the most errors
    errors = matrix.sum(0) + matrix.sum(1) - 2 * matrix.diagonal()
    shown = np.sort(np.argsort(-errors, kind="stable")[:_SHOWN_CLASSES])
    part = matrix[np.ix_(shown, shown)]
    shares = part / np.maximum(matrix[shown].sum(1, keepdims=True), 1)
    names = [str(judged.class_names[index])[:24] for index in shown]
    side = max(3.5, 0.42 * len(shown) + 1.5)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(part):
        if count:
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.annotate(str(count), (column, row), ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(shown)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    more = f", {len(shown)} of {len(matrix)} classes" if len(shown) < len(matrix) else ""
    axes.set(xlabel="predicted" + more, ylabel="true")
    return figure


def _plot_calibration(judged: Judged, bins: Sequence[Mapping[str, Any]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 4.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    filled = [row for row in bins if row["count"]]
    top.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--")
    top.plot([row["confidence"] for row in filled], [row["accuracy"] for row in filled], marker="o", color="#1b7f79")
    top.set(xlim=(0, 1), ylim=(0, 1), ylabel="how often it is so" if judged.several else "accuracy")
    width = 1 / len(bins)
    bottom.bar([row["from"] for row in bins], [row["count"] for row in bins], width, align="edge", color="0.7")
    bottom.set(xlabel="probability" if judged.several else "confidence", ylabel="count")
    return figure


def _plot_sheet(judged: Judged, sheet: Sequence[int], pictures: Mapping[int, Image]) -> Figure:
    from matplotlib.figure import Figure

    columns = min(4, len(sheet))
    lines = -(-len(sheet) // columns)
    figure = Figure(figsize=(2.6 * columns, 3.2 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for panel in grid.flat:
        panel.axis("off")
    for panel, row in zip(grid.flat, sheet, strict=False):
        panel.imshow(np.asarray(pictures[row].convert("RGB")))
        truth, guess = (judged.text_of(part[row]) or "none" for part in (judged.target, judged.guess))
        name = str(judged.names[row])
        text = f"is {truth}, said {guess}\nloss {judged.losses[row]:.2f}\n{'…' if len(name) > 32 else ''}{name[-32:]}"
        panel.set_title(text.replace("$", r"\$"), fontsize=7, loc="left")
    return figure
