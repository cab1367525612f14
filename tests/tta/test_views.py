"""Views, merges and uncertainty against peers' numbers, and against arithmetic written here."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_unfreeze.tta.views import VIEW_SETS, check_view, draw_view, merge_views, uncertainty

GOLDEN = Path(__file__).parents[2].resolve().parent / "shared" / "golden"


@cache
def golden(name: str) -> dict[str, Any]:
    path = GOLDEN / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"the peers' numbers are not at {path}")
    return json.loads(path.read_text())


def double(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(got: torch.Tensor, expected: Any, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, double(expected), rtol=0, atol=atol)


# two views of one sample: p = (.9, .1) and (.4, .6)
TWO = double([[[0.9, 0.1]], [[0.4, 0.6]]]).log() + 3.0
GEOMETRIC = math.sqrt(0.9 * 0.4) / (math.sqrt(0.9 * 0.4) + math.sqrt(0.1 * 0.6))


@pytest.mark.parametrize(
    ("method", "weights", "expected"),
    [
        ("mean", None, 0.65),
        ("mean", [1.0, 3.0], (0.9 + 3 * 0.4) / 4),
        ("mean", [0.0, 2.0], 0.4),
        # per class: .9 * .2 + .4 * .8 against .1 * .5 + .6 * .5, then normalised
        ("mean", [[0.2, 0.5], [0.8, 0.5]], 0.5 / (0.5 + 0.35)),
        ("gmean", None, GEOMETRIC),
        ("log_mean", None, GEOMETRIC),
        ("gmean", [1.0, 0.0], 0.9),
        ("max", None, 0.9 / 1.5),
        ("vote", None, 0.5),
        ("vote", [1.0, 3.0], 0.25),
    ],
)
def test_merge__is_the_table(method: Any, weights: Any, expected: float) -> None:
    merged = merge_views(TWO, method, None if weights is None else double(weights)).exp()
    atol = 1e-6 if method == "vote" else 1e-12
    close(merged, [[expected, 1 - expected]], atol)


def test_merge__sigmoid_merges_each_label_alone() -> None:
    probs = double([[[0.9, 0.2]], [[0.4, 0.3]]])
    close(merge_views(torch.logit(probs), activation="sigmoid").exp(), [[0.65, 0.25]])
    close(merge_views(torch.logit(probs), "max", activation="sigmoid").exp(), [[0.9 / 1.5, 0.3 / 1.1]])


def test_merge__vote_ties_go_to_the_more_probable_class() -> None:
    ballots = double([[[0.1, 0.1, 0.8]], [[0.05, 0.9, 0.05]]]).log()
    assert merge_views(ballots, "vote").argmax().item() == 1
    assert merge_views(ballots.flip(0), "vote").argmax().item() == 1


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_merge__is_float32_or_better(dtype: torch.dtype, expected: torch.dtype) -> None:
    logits = torch.tensor([[[40.0, -40.0]]] * 40, dtype=dtype)
    for method in ("mean", "gmean", "max", "vote"):
        merged = merge_views(logits, method)  # type: ignore[arg-type]
        assert merged.dtype == expected
        assert torch.isfinite(merged).all()
    # 40 factors of exp(-80): a raw product would be zero in every precision
    assert merge_views(logits, "gmean")[0, 1].item() == pytest.approx(-80, rel=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"method": "median"}, "median"),
        ({"weights": torch.ones(3)}, r"\(3,\).*\(2,\)"),
        ({"weights": torch.tensor([-1.0, 2.0])}, "not negative"),
        ({"weights": torch.zeros(2)}, "not all zero"),
        ({"method": "max", "weights": torch.ones(2)}, "no weights"),
    ],
)
def test_merge__refuses(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_views(TWO, **kwargs)
    with pytest.raises(ValueError, match="V, N, C"):
        merge_views(TWO[0])


def test_merge__equals_ttach() -> None:
    keys = {"mean": "mean_probs", "gmean": "geometric_mean_normalised", "max": "max_probs_normalised"}
    for case in golden("ttach")["cases"]:
        logits, reference = double(case["per_view_logits"]), case["reference"]
        for method, key in keys.items():
            close(merge_views(logits, method).exp(), reference[key])  # type: ignore[arg-type]
        close(merge_views(logits), reference["log_mean_probs"])
        close(merge_views(logits), double(case["softmax"]["mean"]).log().tolist())
        others = len(logits) - 1
        beta = double([0.25] + [0.75 / others] * others)
        close(merge_views(logits, weights=beta).exp(), reference["fastai_beta_025_excluding_identity"])


def test_merge__is_normalised_and_finite_where_ttach_is_not() -> None:
    for case in golden("ttach")["cases"]:
        assert "logits/gmean" in case["nan"] or "logits/tsharpen" in case["nan"]
        logits = double(case["per_view_logits"])
        for method, peer in (("gmean", "gmean"), ("max", "max")):
            assert (double(case["softmax"][peer]).sum(-1) - 1).abs().max() > 1e-3
            close(merge_views(logits, method).exp().sum(-1), [1.0] * logits.shape[1])  # type: ignore[arg-type]


def test_merge__equals_fastai() -> None:
    for case in golden("fastai_tta")["cases"]:
        plain, others = double(case["orig"]), double(case["augs"])
        logits, num_others = torch.cat([plain[None], others]).log(), len(others)
        for beta, key in ((0.25, "v2_beta_0p25"), (0.0, "v2_beta_0"), (1.0, "v2_beta_1"), (0.4, "v1_beta_0p4")):
            weights = double([beta] + [(1 - beta) / num_others] * num_others)
            close(merge_views(logits, weights=weights).exp(), case[key], 1e-6)
        # 0.7 repeats the plain view once for every four others
        votes = double([math.ceil(num_others / 4)] + [1.0] * num_others)
        close(merge_views(logits, weights=votes).exp(), case["v07_mean"], 1e-6)


def test_uncertainty__equals_the_peers_numbers() -> None:
    for case in golden("ttach")["cases"]:
        got = uncertainty(double(case["per_view_logits"]))
        close(got["entropy"], case["reference"]["predictive_entropy"])
        close(got["mutual_information"], case["reference"]["mutual_information"])
        close(got["agreement"], case["reference"]["argmax_agreement"])


def test_uncertainty__is_zero_where_views_agree_and_log_2_where_they_contradict() -> None:
    certain = double([[[50.0, -50.0], [50.0, -50.0]], [[50.0, -50.0], [-50.0, 50.0]]])
    got = uncertainty(certain)
    close(got["entropy"], [0.0, math.log(2)], 1e-9)
    close(got["mutual_information"], [0.0, math.log(2)], 1e-9)
    close(got["agreement"], [1.0, 0.5])
    close(uncertainty(certain[..., :1], "sigmoid")["mutual_information"], [0.0, math.log(2)], 1e-9)


def peer_model(images: torch.Tensor) -> torch.Tensor:
    weights = golden("ttach")["model"]
    features = F.conv2d(images, double(weights["K"]), padding=1)
    return F.adaptive_avg_pool2d(features, (4, 4)).flatten(1) @ double(weights["W"]).T + double(weights["b"])


def test_views__d4_and_flips_stand_in_ttachs_order() -> None:
    cases = {(case["name"], case["input"]): case for case in golden("ttach")["cases"]}
    images = double(golden("ttach")["inputs"]["x8"])
    for name, views in (("d4", VIEW_SETS["d4"]), ("flip", ("identity", "vflip", "hflip", "hflip+vflip"))):
        got = torch.stack([peer_model(draw_view(images, view)) for view in views])
        close(got, cases[name, "x8"]["per_view_logits"])
    assert VIEW_SETS["flip"] == ("identity", "hflip")


@pytest.mark.parametrize("size", ["x8", "x9x7"])
def test_views__crops_stand_where_torchvision_puts_them(size: str) -> None:
    images, expected = double(golden("ttach")["inputs"][size]), golden("ttach")["torchvision"]
    got = torch.stack([peer_model(draw_view(images, view, crop_px=5)) for view in VIEW_SETS["ten_crop"][1:]])
    close(got, expected[f"ten_crop_5x5_{size}"])


def test_views__crops_without_a_size_keep_the_batchs_shape() -> None:
    images = torch.rand(2, 3, 16, 24)
    for view in (*VIEW_SETS["ten_crop"], *VIEW_SETS["flip"]):
        assert draw_view(images, view).shape == images.shape
    # the upper left pixel of the upper left crop is the image's, the scaling being 16 / 14 about that corner
    assert draw_view(images, "scale:1.25").shape == (2, 3, 20, 30)
    assert draw_view(images.half(), "scale:0.5").dtype == torch.float16


def test_views__of_a_constant_image_are_constant() -> None:
    images = torch.full((1, 3, 16, 16), 0.7)
    for views in VIEW_SETS.values():
        for view in views:
            torch.testing.assert_close(draw_view(images, view), torch.full_like(draw_view(images, view), 0.7))


def test_views__refuse_what_the_images_do_not_have() -> None:
    images = torch.rand(1, 3, 8, 6)
    with pytest.raises(ValueError, match=r"square.*8x6"):
        draw_view(images, "rot90")
    with pytest.raises(ValueError, match=r"7 px is larger.*8x6"):
        draw_view(images, "centre", crop_px=7)
    assert draw_view(images, "rot180").shape == images.shape
    for unknown in ("hflop", "hflip+rot45", "scale:x", "scale:0", "scale:-1"):
        with pytest.raises(ValueError, match="not known"):
            check_view(unknown)
