"""The solved head against scikit-learn, which minimises the same objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from lightning_unfreeze.features.solve import HeadRows, logistic_regression, solve_head


def blobs(num: int = 90, size: int = 6, classes: int = 3, seed: int = 0, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(num) % classes
    means = torch.randn(classes, size, generator=torch.Generator().manual_seed(99))
    features = means[targets] + spread * torch.randn(num, size, generator=generator) + 5  # far from the origin
    return features.double() * 3, targets


def sklearn_head(features: Tensor, targets: Tensor, ridge: float, weights: Any = None) -> tuple[Tensor, Tensor]:
    rows = len(features) if weights is None else float(torch.tensor(weights)[targets].sum())
    model = LogisticRegression(
        C=1 / (ridge * rows),
        tol=1e-10,
        max_iter=20_000,
        class_weight=None if weights is None else dict(enumerate(weights)),
    )
    model.fit(features.numpy(), targets.numpy())
    return torch.tensor(model.coef_), torch.tensor(model.intercept_)


@pytest.mark.parametrize("ridge", [1.0, 1e-2, 1e-3])
@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.5]])
def test_logistic_regression__is_scikit_learns(ridge: float, weights: Any) -> None:
    features, targets = blobs()
    class_weights = None if weights is None else torch.tensor(weights)
    weight, bias = logistic_regression(features, targets, ridge, num_classes=3, class_weights=class_weights)
    expected, intercept = sklearn_head(features, targets, ridge, weights)
    assert (weight - expected).abs().max() < 1e-4
    # a constant added to all of them changes nothing
    torch.testing.assert_close(bias - bias.mean(), intercept - intercept.mean(), rtol=1e-5, atol=1e-4)


def test_logistic_regression__starts_anywhere_and_ends_at_the_same() -> None:
    features, targets = blobs()
    cold = logistic_regression(features, targets, 1e-2, num_classes=3)
    other = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([5.0, -3.0, 1.0])
    warm = logistic_regression(features, targets, 1e-2, num_classes=3, start=other)
    assert (cold[0] - warm[0]).abs().max() < 1e-5
    again = logistic_regression(features, targets, 1e-2, num_classes=3)
    assert torch.equal(cold[0], again[0]) and torch.equal(cold[1], again[1])


def test_logistic_regression__labels_are_one_problem_each() -> None:
    features, _ = blobs(num=120)
    generator = torch.Generator().manual_seed(3)
    truth = torch.randn(2, 6, generator=generator).double()
    labels = ((features - 15) @ truth.T + 6 * torch.randn(120, 2, generator=generator) > 0).long()
    weight, bias = logistic_regression(features, labels, 1e-2, num_classes=2, kind="sigmoid")
    for label in range(2):
        expected, intercept = sklearn_head(features, labels[:, label], 1e-2)
        assert (weight[label] - expected[0]).abs().max() < 1e-4
        assert (bias[label] - intercept[0]).abs() < 1e-3
    weights = torch.tensor([1.0, 4.0])
    weight_4, _ = logistic_regression(features, labels, 1e-2, num_classes=2, kind="sigmoid", class_weights=weights)
    model = LogisticRegression(C=1 / (1e-2 * 120), tol=1e-10, max_iter=20_000, class_weight={0: 1.0, 1: 4.0})
    expected = torch.tensor(model.fit(features.numpy(), labels[:, 1].numpy()).coef_)
    assert (weight_4[1] - expected[0]).abs().max() < 1e-4
    single, _ = logistic_regression(features, labels[:, 0], 1e-2, num_classes=1, kind="sigmoid")
    assert (single[0] - weight[0]).abs().max() < 1e-6


def test_logistic_regression__shares_of_classes_are_rows_of_each() -> None:
    features, targets = blobs(num=60)
    whole = logistic_regression(features, F.one_hot(targets).double(), 1e-2, num_classes=3)
    assert (whole[0] - logistic_regression(features, targets, 1e-2, num_classes=3)[0]).abs().max() < 1e-6
    other = (targets + 1) % 3
    mixed = 0.75 * F.one_hot(targets) + 0.25 * F.one_hot(other)
    four_rows = torch.cat([features] * 4), torch.cat([targets, targets, targets, other])
    expected = logistic_regression(*four_rows, 1e-2, num_classes=3)
    assert (logistic_regression(features, mixed, 1e-2, num_classes=3)[0] - expected[0]).abs().max() < 1e-6


def test_solve_head__takes_the_ridge_of_the_lowest_validation_loss() -> None:
    train, val = blobs(num=45), blobs(num=300, seed=1)
    ridges = [1.0, 0.1, 0.01, 1e-3]
    scale = float(train[0].var(0, correction=0).mean())
    losses = []
    for ridge in ridges:
        weight, bias = sklearn_head(*train, ridge * scale)
        losses.append(float(F.cross_entropy(val[0] @ weight.T + bias, val[1])))
    best = int(np.argmin(losses))
    assert 0 < best < 3  # a ridge in between, or the test says little
    solved = solve_head(HeadRows(*train), HeadRows(*val), num_classes=3, ridges=ridges[::-1])
    weight, bias = sklearn_head(*train, ridges[best] * scale)
    logits = val[0] @ weight.T + bias
    assert solved.ridge == ridges[best]
    assert solved.val_loss == pytest.approx(losses[best], abs=1e-4)
    assert solved.val_acc == pytest.approx(float((logits.argmax(1) == val[1]).double().mean()), abs=1e-6)
    assert (solved.weight - weight).abs().max() < 2e-3
    assert solved.train_loss == pytest.approx(float(F.cross_entropy(train[0] @ weight.T + bias, train[1])), abs=1e-3)


def test_solve_head__means_the_same_in_other_units() -> None:
    train, val = blobs(num=45), blobs(num=90, seed=1)
    one = solve_head(HeadRows(*train), HeadRows(*val), num_classes=3)
    other = solve_head(HeadRows(1000 * train[0], train[1]), HeadRows(1000 * val[0], val[1]), num_classes=3)
    assert one.ridge == other.ridge
    assert one.val_loss == pytest.approx(other.val_loss, rel=1e-4)
    assert (one.weight - 1000 * other.weight).abs().max() < 1e-3


def test_solve_head__without_validation_holds_out_a_fifth_and_then_takes_all() -> None:
    features, targets = blobs(num=75)
    place = torch.arange(75) // 3  # the classes take turns
    held_out = place % 5 == 4
    fitted = HeadRows(features[~held_out], targets[~held_out])
    judged = solve_head(fitted, HeadRows(features[held_out], targets[held_out]), num_classes=3)
    solved = solve_head(HeadRows(features, targets), num_classes=3)
    assert solved.ridge == judged.ridge
    scale = float(features.var(0, correction=0).mean())
    expected = sklearn_head(features, targets, solved.ridge * scale)[0]
    assert (solved.weight - expected).abs().max() < 2e-3


def test_solve_head__can_stop_at_a_training_loss() -> None:
    train, val = blobs(num=45), blobs(num=90, seed=1)
    losses = {}
    for ridge in (10.0, 1.0, 0.1, 0.01):
        losses[ridge] = solve_head(HeadRows(*train), HeadRows(*val), num_classes=3, ridges=[ridge]).train_loss
    assert sorted(losses.values(), reverse=True) == list(losses.values())
    wanted = (losses[1.0] + losses[0.1]) / 2
    stopped = solve_head(HeadRows(*train), HeadRows(*val), num_classes=3, ridges=list(losses), stop_at_loss=wanted)
    assert stopped.ridge == 0.1 and stopped.train_loss <= wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(4, 2, 2)}, r"shape \(N, D\)"),
        ({"features": torch.full((4, 2), torch.nan)}, "finite"),
        ({"targets": torch.tensor([0, 1, 2, 3])}, "from 0 to 2"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "do not fit"),
        ({"targets": torch.zeros(4, 2)}, "do not fit"),
        ({"kind": "hinge"}, "kind='hinge'"),
        ({"ridges": [-1.0]}, "ridge=-1.0"),
        ({"ridges": []}, "ridges is empty"),
    ],
)
def test_solve_head__refuses_the_impossible(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"features": torch.zeros(4, 2), "targets": torch.zeros(4, dtype=torch.int64), **change}
    train = HeadRows(given.pop("features"), given.pop("targets"), given.pop("kind", "softmax"))
    with pytest.raises(ValueError, match=message):
        solve_head(train, num_classes=3, **given)


@pytest.mark.slow
def test_solve_head__on_real_features_is_no_worse_than_training_and_scikit_learn(shared_data: Path) -> None:
    network: Any = timm.create_model(
        "mobilenetv2_035",
        pretrained=True,
        pretrained_cfg_overlay={
            "file": str(shared_data / "weights" / "mobilenetv2_035.keras_in1k.safetensors"),
            "num_classes": -1,
        },
        num_classes=5,
        pad_type="same",
        bn_eps=1e-3,
    ).eval()
    transform = v2.Compose([v2.PILToTensor(), v2.Resize(64, antialias=True), v2.CenterCrop(64)])
    rows = {}
    for split, every in (("train", 2), ("val", 1), ("test", 3)):
        data = ImageFolder(str(shared_data / "flowers5" / split), transform)
        chosen = range(0, len(data), every)
        images = torch.stack([data[index][0] for index in chosen]).float() / 127.5 - 1
        with torch.no_grad():
            features = [
                network.forward_head(network.forward_features(part), pre_logits=True) for part in images.split(64)
            ]
        rows[split] = torch.cat(features), torch.tensor([data.targets[index] for index in chosen])

    def scores(weight: Tensor, bias: Tensor, split: str) -> tuple[float, float]:
        logits = rows[split][0].double() @ weight.double().T + bias.double()
        return float(F.cross_entropy(logits, rows[split][1])), float(
            (logits.argmax(1) == rows[split][1]).float().mean()
        )

    solved = solve_head(HeadRows(*rows["train"]), HeadRows(*rows["val"]), num_classes=5)
    loss, accuracy = scores(solved.weight, solved.bias, "test")
    assert scores(solved.weight, solved.bias, "val")[0] == pytest.approx(solved.val_loss, abs=1e-4)

    features, targets = rows["train"]
    scale = float(features.var(0, correction=0).mean())
    best = min(
        (scores(*(part.double() for part in sklearn_head(features.double(), targets, ridge * scale)), "val")[0], ridge)
        for ridge in (1.0, 0.1, 0.01)
    )
    assert solved.val_loss < best[0] + 1e-4  # our path has these ridges, too

    trained = nn.Linear(features.shape[1], 5)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    torch.manual_seed(0)
    for _ in range(8):
        for index in torch.randperm(len(targets)).split(16):
            optimizer.zero_grad()
            F.cross_entropy(trained(features[index]), targets[index]).backward()
            optimizer.step()
    by_steps = scores(trained.weight.detach(), trained.bias.detach(), "test")
    assert loss < by_steps[0] and accuracy > by_steps[1] - 0.02  # 433 images: one standard error
