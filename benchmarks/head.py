"""A head solved, beside scikit-learn's logistic regression and AdamW, on the same pooled features of real photos.

python benchmarks/head.py DATA
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from finder import features_of, photos, pretrained, trained
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import TensorDataset

from lightning_unfreeze.features.solve import HeadRows, solve_head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--px", type=int, default=96)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("monkeys10", "rsscn7", "flowers5"):
        splits = [split for split in ("train", "val", "test") if (options.data / name / split).is_dir()]
        images = {split: photos(options.data / name / split, options.px) for split in splits}
        num_classes = int(images["train"][1].max()) + 1
        network = pretrained(options, "mobilenetv2_035", num_classes)
        rows = {s: features_of(network, TensorDataset(*images[s]), torch.device("cpu")).tensors for s in splits}
        print(name, len(images["train"][1]), {way: measured(way, rows, num_classes) for way in WAYS}, flush=True)


def measured(way: str, rows: dict[str, Any], num_classes: int) -> tuple[float, float]:
    """Accuracy on the last split, and CPU seconds."""
    start = time.process_time()
    logits_of = WAYS[way](rows, num_classes)
    seconds = time.process_time() - start
    features, targets = list(rows.values())[-1]
    return accuracy(logits_of, features, targets), round(seconds, 2)


def accuracy(logits_of: Callable[[Any], Any], features: Any, targets: Any) -> float:
    with torch.no_grad():
        return float((torch.as_tensor(logits_of(features)).argmax(1) == targets).float().mean())


def solved(rows: dict[str, Any], num_classes: int) -> Callable[[Any], Any]:
    found = solve_head(HeadRows(*rows["train"]), HeadRows(*rows["val"]), num_classes=num_classes)
    return lambda features: features @ found.weight.T + found.bias


def scikit_learn(rows: dict[str, Any], num_classes: int) -> Callable[[Any], Any]:
    tried = [
        LogisticRegression(C=c, max_iter=2000).fit(rows["train"][0].numpy(), rows["train"][1].numpy())
        for c in 10.0 ** np.arange(-4, 3, 0.5)
    ]
    best = max(tried, key=lambda model: model.score(rows["val"][0].numpy(), rows["val"][1].numpy()))
    return lambda features: best.predict_proba(features.numpy())


def adamw(rows: dict[str, Any], num_classes: int) -> Callable[[Any], Any]:
    start, train = nn.Linear(rows["train"][0].shape[1], num_classes), TensorDataset(*rows["train"])
    tried = [trained(start, train, rate, 16, 8, 0) for rate in (1e-3, 3e-3, 1e-2)]
    return max(tried, key=lambda head: accuracy(head, *rows["val"]))


WAYS = {"solved": solved, "scikit-learn": scikit_learn, "AdamW, three rates": adamw}


if __name__ == "__main__":
    main()
