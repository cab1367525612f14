"""R2a: why fine-tuning can distort good features (Kumar et al. 2022, section 3), in a two-layer linear network.

`y = v'Bx`, `d` inputs, `k` features. Training inputs lie in a random subspace, shifted ones do not. The pretrained
features are the true ones, rotated, with an error `eps`. Linear probing (LP) fits `v` by least squares and leaves `B`;
fine-tuning (FT) trains both by gradient descent from a random `v`, LP-FT from the fitted one. Errors are relative to
predicting 0. Run it for the table:

    python benchmarks/reproductions/lp_ft_theory.py
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Outcome:
    """Relative squared errors in and out of the training subspace, and how far the features moved."""

    id: float
    ood: float
    moved: float


def toy(
    eps: float,
    seed: int,
    d: int = 100,
    k: int = 20,
    subspace: int = 40,
    samples: int = 60,
    lr: float = 0.2,
    max_steps: int = 20_000,
    tolerance: float = 1e-5,
) -> dict[str, Outcome]:
    """Return the outcome of LP, FT and LP-FT for features with error `eps`.

    Args:
        eps: Error of the pretrained features, over their size.
        seed: Of everything that is drawn.
        d: Inputs.
        k: Features.
        subspace: Dimensions of the training inputs.
        samples: Training inputs.
        lr: Rate of gradient descent.
        max_steps: Most steps.
        tolerance: Training loss, over that of predicting 0, at which it stops.
    """
    rng = np.random.default_rng(seed)
    true_features = np.linalg.qr(rng.normal(size=(d, k)))[0].T
    true_head = rng.normal(size=k) / np.sqrt(k)
    rotation = np.linalg.qr(rng.normal(size=(k, k)))[0]
    # of the size of the true ones, whatever the error: the size alone decides how far gradient descent moves them
    pretrained = rotation @ (true_features + eps * rng.normal(size=(k, d)) / np.sqrt(d)) / np.sqrt(1 + eps**2)
    basis = np.linalg.qr(rng.normal(size=(d, subspace)))[0]
    inputs = rng.normal(size=(samples, subspace)) @ basis.T
    target_map = true_head @ true_features
    targets = inputs @ target_map
    probe = np.linalg.lstsq(inputs @ pretrained.T, targets, rcond=None)[0]
    random_head = rng.normal(size=k) / np.sqrt(k)

    def outcome(features: np.ndarray, head: np.ndarray) -> Outcome:
        error = head @ features - target_map
        # expected squared error of x ~ N(0, I), in the subspace and in all directions
        id_error = np.sum((error @ basis) ** 2) / np.sum((target_map @ basis) ** 2)
        ood_error = np.sum(error**2) / np.sum(target_map**2)
        moved = np.linalg.norm(features - pretrained) / np.linalg.norm(pretrained)
        return Outcome(float(id_error), float(ood_error), float(moved))

    def fine_tune(head: np.ndarray) -> Outcome:
        features, head = pretrained.copy(), head.copy()
        scale = np.mean(targets**2)
        for _ in range(max_steps):
            residual = inputs @ features.T @ head - targets
            if np.mean(residual**2) < tolerance * scale:
                break
            slope = residual @ inputs / samples
            features, head = features - lr * np.outer(head, slope), head - lr * features @ slope
        return outcome(features, head)

    return {"LP": outcome(pretrained, probe), "FT": fine_tune(random_head), "LP-FT": fine_tune(probe)}


def medians(eps: float, seeds: int) -> dict[str, Outcome]:
    """Return the median outcome over seeds."""
    runs = [toy(eps, seed) for seed in range(seeds)]
    return {
        name: Outcome(
            *(float(np.median([getattr(run[name], field) for run in runs])) for field in ("id", "ood", "moved"))
        )
        for name in runs[0]
    }


if __name__ == "__main__":
    print(f"{'eps':>4}  " + "  ".join(f"{name + ' ID / OOD / moved':>22}" for name in ("LP", "FT", "LP-FT")))
    for eps in (0.0, 0.3, 1.0, 2.0):
        found = medians(eps, 10).values()
        print(f"{eps:4}  " + "  ".join(f"{o.id:8.3f} {o.ood:6.3f} {o.moved:6.3f}" for o in found))
