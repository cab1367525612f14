"""A model card (Mitchell et al. 2019) from what a checkpoint knows and what a run found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_unfreeze.reporting.judged import Judged, expected_calibration_error, wilson

_OF_THE_PLAN = (
    "name",
    "train",
    "epochs",
    "lr",
    "lr_mult",
    "lr_span",
    "precompute",
    "solve",
    "cycle_len",
    "num_cycles",
    "until",
)


def model_card(checkpoint: Mapping[str, Any], judged: Judged, split: str, name: str) -> str:
    """Markdown: what the model is, what it was trained on and how, what it scores per class, and its limits."""
    options = checkpoint.get("hyper_parameters", {})
    config = options.get("data_config") or {}
    num, right = len(judged.names), int(judged.right.sum())
    low, high = wilson(right, num)
    lines = [
        f"# {options.get('backbone', name)}, {len(judged.class_names)} {'labels' if judged.several else 'classes'}",
        "",
        f"Checkpoint `{name}`, epoch {checkpoint.get('epoch', '?')}, step {checkpoint.get('global_step', '?')}.",
        "",
        "## Classes",
        "",
        ", ".join(str(each) for each in judged.class_names),
        "",
        "## Input",
        "",
        *_table([("option", "value"), *((key, str(value)) for key, value in config.items())]),
        "",
        "## Training",
        "",
        *_plan_of(checkpoint),
        "",
        *_table([("package", "version"), *(checkpoint.get("versions") or {}).items()]),
        "",
        f"## Scores on the {split} data",
        "",
        f"{right} of {num} images {'with all labels ' if judged.several else ''}right, {right / num:.1%} "
        f"(95 % interval {low:.1%} to {high:.1%}); expected "
        f"calibration error {expected_calibration_error(judged.calibration()):.3f}.",
        "",
        *_table(
            [
                ("class", "images", "recall" if judged.several else "accuracy", "95 % interval", "precision"),
                *(
                    (
                        str(row["class"]),
                        str(row["images"]),
                        f"{row['accuracy']:.1%}",
                        f"{row['low']:.0%} to {row['high']:.0%}",
                        f"{row['precision']:.1%}",
                    )
                    for row in judged.class_rows()
                ),
            ]
        ),
        "",
        "## Limits",
        "",
        *_limits(judged, split),
        "",
    ]
    return "\n".join(lines)


def _plan_of(checkpoint: Mapping[str, Any]) -> list[str]:
    states = checkpoint.get("callbacks")
    plan = checkpoint.get("stages")  # of a file of weights alone
    if plan is None and states is None:
        return ["Not known: the file holds weights alone."]
    plan = plan or next(
        (state["plan"] for state in (states or {}).values() if isinstance(state, dict) and "plan" in state), None
    )
    if not plan:
        return ["Without stages."]
    keys = [key for key in _OF_THE_PLAN if any(stage.get(key) not in (None, False) for stage in plan)]
    return _table(
        [tuple(keys), *(tuple("" if stage.get(key) is None else str(stage[key]) for key in keys) for stage in plan)]
    )


def _limits(judged: Judged, split: str) -> list[str]:
    rows = judged.class_rows()
    few = [str(row["class"]) for row in rows if row["images"] < 30]
    kind = "any number of these labels" if judged.several else "exactly one of these classes"
    lines = [
        f"- It answers with {kind}, whatever the picture shows: it has no answer for anything else.",
        f"- The scores hold for pictures like those of the {split} data; of others nothing is known.",
    ]
    if few:
        shown = ", ".join(few[:8]) + (f" and {len(few) - 8} more" if len(few) > 8 else "")
        lines.append(f"- Fewer than 30 {split} images have {shown}: see how wide the intervals are.")
    worst = min(rows, key=lambda row: row["accuracy"] if row["images"] else 2.0)
    if worst["images"]:
        lines.append(f"- Least found is {worst['class']}: {worst['accuracy']:.1%} of its {worst['images']} images.")
    return lines


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    if len(rows) < 2:
        return ["Not known."]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    head, *body = ["| " + " | ".join(row) + " |" for row in cells]
    return [head, "|" + "---|" * len(rows[0]), *body]
