"""Layer groups of one model per timm module family: how many are ordered, complete and disjoint.

    python benchmarks/layer_groups_sweep.py [--max-params 30e6] [--no-trace] [--out table.md]

One model of each of timm's model modules, the first that has at most `--max-params` parameters, small ones first, built
on the `meta` device without weights (on the CPU where it does not build there). Four columns are computed without the
code under test: *complete* and *disjoint* count parameters by identity; *ordered* runs one forward pass and asks that
the first call of each group's modules comes after the first call of the group before it, *sequential* that it comes
after the last call of that group. A parameter of no module that is called (a class token) does not count for the order.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from pathlib import Path

import timm
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_unfreeze.layers.groups import layer_groups

SMALL = ("test_", "atto", "femto", "pico", "nano", "xxt", "xtiny", "tiny", "_xxs", "_xs", "_s0", "small", "mini", "050")


def families() -> dict[str, list[str]]:
    """Module name -> its model names, small ones first."""
    names: dict[str, list[str]] = {}
    for module in timm.list_modules():
        models = timm.list_models(module=module)
        if models and hasattr(timm.models, module):  # others may have registered models, too
            size = {m: next((i for i, word in enumerate(SMALL) if word in m), len(SMALL)) for m in models}
            names[module] = sorted(models, key=lambda m: (size[m], len(m), m))
    return names


def build(name: str, device: str) -> nn.Module:
    with torch.device(device):
        return timm.create_model(name, pretrained=False).eval()


def first_within(names: list[str], max_params: float) -> tuple[str, nn.Module, int] | None:
    # those with a classifier first
    for name in sorted(names, key=lambda n: not timm.models.get_pretrained_cfg(n).num_classes):
        try:
            network = build(name, "meta")
        except Exception:  # some constructors compute with values
            network = build(name, "cpu")
        count = sum(p.numel() for p in network.parameters())
        if count <= max_params:
            return name, network, count
    return None


def call_spans(name: str, network: nn.Module) -> dict[str, tuple[int, int]]:
    """Parameter name -> indices of the first and the last call of the module that holds it, in one forward pass."""
    calls: dict[str, list[int]] = {}
    count = 0

    def record(path: str):
        def hook(*_: object) -> None:
            nonlocal count
            calls.setdefault(path, []).append(count)
            count += 1

        return hook

    for path, module in network.named_modules():
        if path and next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(record(path))
    size = network.pretrained_cfg.get("fixed_input_size", False), network.pretrained_cfg["input_size"]
    shape = size[1] if size[0] else (3, *size[1][1:])
    device = next(network.parameters()).device
    with torch.no_grad():
        try:
            network(torch.zeros(1, *shape, device=device))
        except Exception:  # a value is asked for in forward
            calls.clear()
            network = build(name, "cpu")
            return call_spans(name, network) if device.type == "meta" else {}
    owners = {n: n.rpartition(".")[0] for n, _ in network.named_parameters()}
    return {n: (min(calls[o]), max(calls[o])) for n, o in owners.items() if o in calls}


def row(module: str, names: list[str], max_params: float, trace: bool) -> dict[str, object] | None:
    chosen = first_within(names, max_params)
    if chosen is None:
        return None
    name, network, count = chosen
    result: dict[str, object] = {"module": module, "model": name, "params": count}
    try:
        groups = layer_groups(network)
    except MisconfigurationException as error:
        return {**result, "groups": 0, "error": str(error)}
    ids = Counter(id(p) for group in groups.values() for p in group)
    result |= {
        "groups": len(groups),
        "head": sum(p.numel() for p in groups["head"]),
        "names": " ".join(groups),
        "complete": set(ids) == {id(p) for p in network.parameters()},
        "disjoint": max(ids.values()) == 1,
    }
    if trace:
        spans = call_spans(name, network)
        per_group = [[spans[n] for n in g.parameter_names if n in spans] for g in groups.values()]
        firsts = [min(first for first, _ in group) for group in per_group if group]
        lasts = [max(last for _, last in group) for group in per_group if group]
        result["ordered"] = firsts == sorted(firsts) if spans else None
        result["sequential"] = all(a < b for a, b in zip(lasts, firsts[1:], strict=False)) if spans else None
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-params", type=float, default=30e6)
    parser.add_argument("--no-trace", action="store_true", help="leave the forward passes out")
    parser.add_argument("--module", help="this module alone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    rows, too_large = [], []
    for module, names in families().items():
        if options.module in (None, module):
            found = row(module, names, options.max_params, not options.no_trace)
            rows.append(found) if found else too_large.append(module)

    checks = ["complete", "disjoint"] + ([] if options.no_trace else ["ordered", "sequential"])
    words = {True: "yes", False: "NO", None: "?"}
    lines = [f"| module | model | M params | groups | head params | {' | '.join(checks)} | names |"]
    lines.append("|" + "---|" * (6 + len(checks)))
    for r in rows:
        cells = [r["module"], r["model"], f"{r['params'] / 1e6:.1f}", r["groups"], r.get("head", 0)]
        cells += [words[r.get(check)] for check in checks] + [r.get("names") or r.get("error")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    totals = ", ".join(f"{check} {sum(bool(r.get(check)) for r in rows)}" for check in checks)
    lines += [
        "",
        f"{len(rows)} families (timm {timm.__version__}): grouped {sum(r['groups'] > 0 for r in rows)}, {totals}",
    ]
    lines.append(f"no model with <= {options.max_params / 1e6:g} M parameters: {', '.join(too_large) or 'none'}")
    table = "\n".join(lines)
    print(table)
    if options.out:
        options.out.write_text(table + "\n")


if __name__ == "__main__":
    main()
