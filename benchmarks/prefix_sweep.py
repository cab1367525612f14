"""How many timm families can be cut at their first, middle and last freeze boundary.

One model per family: the smallest found with at most 30 M parameters, random weights, the smallest input it takes. At
each boundary `find_prefix` has to find a prefix, and, checked here by other means, a training step from the features
has to give the output and the gradients of the plain step, bitwise, with a batch size that the search has not seen.

    python benchmarks/prefix_sweep.py
    python benchmarks/prefix_sweep.py resnet hrnet vision_transformer
    python benchmarks/prefix_sweep.py --shard 0/2 --out sweep.csv

With `--out` each family is written as soon as it is done, and families that the file has are not run again: an
interrupted sweep goes on. `--again` runs those anew that gave an error or ran out of time. The summary is of the file.
"""

from __future__ import annotations

import argparse
import csv
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn

from lightning_unfreeze.features.prefix import FrozenPrefix
from lightning_unfreeze.features.search import find_prefix

BOUNDARIES = ("first", "middle", "last")
MAX_PARAMETERS = 30e6
FIELDS = [
    "family",
    "model",
    "parameters",
    "px",
    "boundary",
    "works",
    "walked_back",
    "module",
    "tensors",
    "bytes_per_image",
    "search_seconds",
    "reason",
]
SMALL_WORDS = (
    "zepto atto femto pico nano xxt xxs xxsmall xtiny mini tiny xs t0 050 035 025 s0 b0 lite small t 8 10 14 18 s n"
)


class TookTooLong(BaseException):
    """Not an Exception: `find_prefix` would take it for a reason to try an earlier boundary."""


def candidates(family: str) -> list[str]:
    """Names of the family's models, those that sound small first."""

    def rank(name: str) -> tuple[int, int, str]:
        words = name.replace("-", "_").split("_")
        digits = name.rstrip("d").rsplit("_", 1)[0][-2:]
        ranks = [i for i, word in enumerate(SMALL_WORDS.split()) if word in {*words, digits}]
        return (min(ranks, default=99), len(name), name)

    return sorted((m for m in timm.list_models(module=family) if not m.startswith("test_")), key=rank)


def parameter_count(name: str) -> float:
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(name, num_classes=5).parameters())
    except (RuntimeError, NotImplementedError):  # inits that read values
        return sum(p.numel() for p in timm.create_model(name, num_classes=5).parameters())


def smallest(family: str, tries: int = 3) -> tuple[str, float]:
    """The smallest of the first few models, or the first one that is small enough."""
    counts: dict[str, float] = {}
    for name in candidates(family):
        counts[name] = parameter_count(name)
        if len(counts) >= tries and min(counts.values()) <= MAX_PARAMETERS:
            break
    return min(counts.items(), key=lambda item: item[1])


def build(name: str) -> tuple[nn.Module, int]:
    """The model and the smallest of a few input sizes that it takes in both modes."""
    config = timm.get_pretrained_cfg(name)
    last = (config.input_size[-1], {})
    options: list[tuple[int, dict[str, Any]]] = (
        [(px, {"img_size": px}) for px in (64, 128)] if config.fixed_input_size else []
    )
    error: Exception | None = None
    model, made_with = None, None
    for px, kwargs in [*options, *((px, {}) for px in (64, 96, 128) if not config.fixed_input_size), last]:
        try:
            if model is None or made_with != kwargs:
                model, made_with = timm.create_model(name, num_classes=5, **kwargs), kwargs
            for mode in (True, False):
                model.train(mode)
                with torch.no_grad():
                    model(torch.randn(2, 3, px, px))
        except Exception as problem:
            error = problem
            model = None
        else:
            return model, px
    raise RuntimeError(f"{name} takes none of the sizes tried: {error}")


def randomise(model: nn.Module) -> None:
    """No zero or constant weight and no fresh running statistics: they would hide leaks and wrong features."""
    for parameter in model.parameters():
        if parameter.numel() > 1 and parameter.std() == 0:
            parameter.data += 0.1 * torch.randn_like(parameter)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.8, 1.2)


def freeze(model: nn.Module, boundary: str) -> None:
    """Freeze layer groups from the input; modules with frozen parameters only go to eval mode, others to train mode."""
    try:
        names = [list(names) for names in group_parameters(model, model.group_matcher(coarse=True)).values()]
    except (AttributeError, NotImplementedError, AssertionError):  # no grouping; rdnet asserts
        children = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
        names = [[n for n, _ in model.named_parameters() if n.split(".")[0] == child] for child in children]
    heads = model.get_classifier() if hasattr(model, "get_classifier") else ()
    heads = heads if isinstance(heads, tuple | list) else (heads,)  # distilled models have two
    classifier = {id(p) for head in heads for p in head.parameters()}
    parameters = dict(model.named_parameters())
    groups = [
        group for names_ in names if (group := [parameters[n] for n in names_ if id(parameters[n]) not in classifier])
    ]
    frozen = {"first": groups[:1], "middle": groups[: max(1, len(groups) // 2)], "last": groups}[boundary]
    frozen_ids = {id(p) for group in frozen for p in group}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) not in frozen_ids)
    model.train()
    for module in model.modules():
        own = list(module.parameters())
        if own and not any(p.requires_grad for p in own):
            module.eval()


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    output = model(x)
    output = output[0] if isinstance(output, tuple | list) else output
    (output.square().mean() + output.sum()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach().clone()} | gradients


def holds(model: nn.Module, prefix: FrozenPrefix, images: Tensor) -> bool:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = step(model, images)
    model.load_state_dict(state)
    with prefix.replay(prefix.extract(images)) as x:
        replayed = step(model, x)
    model.load_state_dict(state)
    finite = all(tensor.isfinite().all() for tensor in plain.values())
    return finite and plain.keys() == replayed.keys() and all(torch.equal(plain[k], replayed[k]) for k in plain)


def sweep_family(family: str) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    name, count = smallest(family)
    if count > MAX_PARAMETERS:
        return []
    model, px = build(name)
    randomise(model)
    images = torch.randn(4, 3, px, px)
    rows = []
    for boundary in BOUNDARIES:
        freeze(model, boundary)
        start = time.perf_counter()
        prefix, reason = find_prefix(model, images[:3])
        seconds = time.perf_counter() - start
        works = prefix is not None and holds(model, prefix, images)
        if prefix is not None and not works:
            reason = f"WRONG: differs from the plain step; {reason}"
        rows.append(
            {
                "family": family, "model": name, "parameters": int(count), "px": px, "boundary": boundary,
                "works": works, "walked_back": works and bool(reason), "module": prefix.boundary if prefix else "",
                "tensors": len(prefix.shapes) if prefix else 0,
                "bytes_per_image": prefix.bytes_per_image if prefix else 0,
                "search_seconds": round(seconds, 2), "reason": reason,
            }
        )  # fmt: skip
    return rows


def run_family(family: str, seconds: int) -> list[dict[str, Any]]:
    """The rows of a family; of one that is too large, or gives an error or takes too long, rows that say so."""

    def give_up(*_: Any) -> None:
        raise TookTooLong(f"more than {seconds} s of processor time")

    signal.signal(signal.SIGPROF, give_up)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        found, reason = sweep_family(family), f"SKIPPED more than {MAX_PARAMETERS / 1e6:.0f} M parameters"
    except (Exception, TookTooLong) as error:
        found, reason = [], f"ERROR {error!r}"[:400]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return found or [{"family": family, "boundary": b, "works": False, "reason": reason} for b in BOUNDARIES]


def read_rows(path: Path | None) -> list[dict[str, Any]]:
    if path is None or not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            {**row, "works": row["works"] == "True", "walked_back": row["walked_back"] == "True"}
            for row in csv.DictReader(file)
        ]


def write_rows(path: Path | None, rows: list[dict[str, Any]]) -> None:
    if path is None:
        return
    partial = path.with_name(path.name + ".part")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def show(found: list[dict[str, Any]]) -> None:
    marks = " ".join("~" if r.get("walked_back") else "+" if r["works"] else "-" for r in found)
    reasons = "; ".join(dict.fromkeys(f"{r['boundary']}: {r['reason']}" for r in found if r["reason"]))
    print(f"{found[0]['family']:28} {found[0].get('model', ''):36} {marks}  {reasons[:400]}", flush=True)


def summary(rows: list[dict[str, Any]]) -> str:
    """Counts per boundary, and the families that do not work everywhere."""
    skipped = {row["family"] for row in rows if row["reason"].startswith("SKIPPED")}
    failed = {row["family"]: row["reason"] for row in rows if row["reason"].startswith("ERROR")}
    ran = [row for row in rows if row["family"] not in skipped | failed.keys()]
    families = {row["family"] for row in ran}
    lines = [f"{len(families)} families ran to the end, {len(failed)} failed, {len(skipped)} are too large"]
    lines.append("| boundary | works | of which further towards the input | does not |\n|---|---|---|---|")
    for boundary in BOUNDARIES:
        of_boundary = [row for row in ran if row["boundary"] == boundary]
        works = [row for row in of_boundary if row["works"]]
        walked_back = sum(bool(row.get("walked_back")) for row in works)
        lines.append(f"| {boundary} | {len(works)} | {walked_back} | {len(of_boundary) - len(works)} |")
    lines += [f"{row['family']}, {row['boundary']}: {row['reason']}" for row in ran if not row["works"]]
    lines += [f"{family}: {reason}" for family, reason in failed.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="timm module names, e.g. resnet; all when none is given")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th family, from the i-th")
    parser.add_argument("--family-seconds", type=int, default=90, help="give a family up after this processor time")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no other family after this time")
    parser.add_argument("--out", type=Path, help="CSV with one row per family and boundary; kept and added to")
    parser.add_argument("--again", action="store_true", help="run families anew that the file has an error of")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.monotonic()
    rows = [row for row in read_rows(args.out) if not (args.again and row["reason"].startswith("ERROR"))]
    first, of = map(int, args.shard.split("/"))
    left = [f for f in args.families or timm.list_modules()[first::of] if f not in {row["family"] for row in rows}]
    while left and time.monotonic() - start < args.seconds:
        found = run_family(left.pop(0), args.family_seconds)
        rows += found
        write_rows(args.out, rows)
        show(found)
    print(summary(rows))
    if left:
        print(f"{len(left)} families are left: {' '.join(left)}")


if __name__ == "__main__":
    main()
