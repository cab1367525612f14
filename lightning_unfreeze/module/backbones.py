"""The network of a classifier: from timm or torchvision, with published weights, with those of a file, or without."""

from __future__ import annotations

import difflib
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.data import resolve_model_data_config
from timm.models import (
    get_pretrained_cfg,
    is_model,
    is_model_pretrained,
    list_models,
    list_pretrained,
    load_state_dict,
    split_model_name_tag,
)
from torch import nn

import lightning_unfreeze.module.digits_resnet  # noqa: F401  (registers the demo's backbone with timm)
from lightning_unfreeze.layers.families import HEAD
from lightning_unfreeze.layers.groups import layer_groups
from lightning_unfreeze.seeding import kept_rng

TORCHVISION = "torchvision/"
_PROBE_SECONDS = 5.0


def build_network(
    backbone: str, num_outputs: int, pretrained: bool | str, kwargs: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """A network with a new head, and what it expects of its input, in timm's words; see `TransferClassifier`.

    Raises:
        ValueError: For an unknown backbone, or weights that are missing, out of reach, or of another network.

    >>> network, config = build_network("digits_resnet", 5, True, {})
    >>> config["input_size"]
    (1, 32, 32)
    """
    if isinstance(pretrained, str) and not Path(pretrained).is_file():
        raise ValueError(f"pretrained={pretrained!r}: no such file; give a safetensors or pth file, true or false.")
    build = _build_torchvision if backbone.startswith(TORCHVISION) else _build_timm
    try:
        network, config = build(backbone, num_outputs, pretrained, kwargs)
    except RuntimeError as error:  # shapes that clash, on many lines
        if not isinstance(pretrained, str):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"pretrained={pretrained!r} does not fit backbone={backbone!r}: {reason}") from error
    if pretrained:
        _shrink_head(network, num_outputs)
    return network, config


def _build_timm(
    name: str, num_outputs: int, pretrained: bool | str, kwargs: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    if ":" not in name:  # `hf-hub:` and `local-dir:` names are timm's to resolve
        base, tag = split_model_name_tag(name)
        if not is_model(base):
            raise _unknown(name, list_models())
        if tag and name not in list_pretrained(f"{base}.*"):
            raise _unknown(name, list_pretrained(f"{base}.*"))
        if pretrained is True and not is_model_pretrained(name):
            raise ValueError(f"backbone={name!r}: timm has no weights for it; set pretrained to false or to a file.")
    if not isinstance(pretrained, str):
        if pretrained:
            _check_published(name, get_pretrained_cfg(name))
        model = timm.create_model(name, pretrained=pretrained, num_classes=num_outputs, **kwargs)
        return model, resolve_model_data_config(model)

    # the same draws twice: what equals the network without weights afterwards was not in the file
    with kept_rng():
        reference = timm.create_model(name, num_classes=num_outputs, **kwargs)
    # timm drops a head of another number of classes from the file; -1 is always another
    overlay = {"file": pretrained, "num_classes": -1}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_outputs, **kwargs)
    head = model.pretrained_cfg["classifier"] or ()
    head_keys = tuple(f"{part}." for part in ([head] if isinstance(head, str) else head))
    pairs = zip(model.named_parameters(), reference.parameters(), strict=True)
    drawn = [(key, new, old) for (key, new), old in pairs if old.numel() > 1 and old.std() > 0]
    _check_loaded(
        name, pretrained, [key for key, new, old in drawn if torch.equal(new, old) and not key.startswith(head_keys)]
    )
    return model, resolve_model_data_config(model)


def _build_torchvision(
    name: str, num_outputs: int, pretrained: bool | str, kwargs: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    short = name.removeprefix(TORCHVISION)
    known = torchvision.models.list_models(module=torchvision.models)
    if short not in known:
        raise _unknown(name, [TORCHVISION + other for other in known])
    model = torchvision.models.get_model(short, weights=None, num_classes=num_outputs, **kwargs)
    weights = torchvision.models.get_model_weights(short).DEFAULT
    if pretrained is True:
        cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        _check_reachable(name, weights.url, cached.exists())
    if pretrained:
        state = load_state_dict(pretrained) if isinstance(pretrained, str) else weights.get_state_dict(check_hash=True)
        # torchvision's classifiers register the head last
        head = [key for key, child in model.named_modules() if list(child.parameters(recurse=False))][-1]
        state = {key: value for key, value in state.items() if not key.startswith(f"{head}.")}
        missing = model.load_state_dict(state, strict=False).missing_keys
        _check_loaded(name, str(pretrained), [key for key in missing if not key.startswith(f"{head}.")])
    preset = weights.transforms()
    return model, {
        "input_size": (3, preset.crop_size[0], preset.crop_size[0]),
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
        "interpolation": preset.interpolation.value,
        "crop_pct": preset.crop_size[0] / preset.resize_size[0],
        "crop_mode": "center",
    }


def _shrink_head(model: nn.Module, num_outputs: int) -> None:
    """Small weights for the new head, as its features are good already.

    Initialisations for training from scratch can be so large (0.3 for timm's MobileNets, on 1280 features) that what
    they leave in directions the data does not span costs several points of accuracy.
    """
    for part in layer_groups(model)[HEAD].modules():
        for layer in part.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.shape[0] == num_outputs:
                nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


def _unknown(name: str, known: Sequence[str]) -> ValueError:
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    hint = f"near it are {', '.join(near)}" if near else "timm.list_models() lists what there is"
    return ValueError(f"backbone={name!r} is unknown: {hint}; give a timm model name or '{TORCHVISION}NAME'.")


def _check_loaded(name: str, source: str, missing: list[str]) -> None:
    if missing:
        raise ValueError(
            f"pretrained={source!r} lacks {len(missing)} weights of backbone={name!r} ({', '.join(missing[:3])}...): "
            "give a file of the same network, or set backbone to the network of the file."
        )


def _check_published(name: str, config: Any) -> None:
    """Refuses at once what timm would try for a minute and more: weights that are neither here nor in reach."""
    if config is None or config.file:
        return
    if config.hf_hub_id:
        import huggingface_hub as hub

        files = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
        cached = any(isinstance(hub.try_to_load_from_cache(config.hf_hub_id, file), str) for file in files)
        _check_reachable(name, hub.constants.ENDPOINT, cached, offline=hub.constants.HF_HUB_OFFLINE)
    elif config.url:
        cached = (Path(torch.hub.get_dir()) / "checkpoints" / Path(config.url).name).exists()
        _check_reachable(name, config.url, cached)


def _check_reachable(name: str, url: str, is_cached: bool, offline: bool = False) -> None:
    if is_cached or (not offline and _answers(url)):
        return
    reason = "HF_HUB_OFFLINE is set" if offline else f"{url} does not answer"
    raise ValueError(
        f"the weights of backbone={name!r} are not on this machine, and {reason}: give a local file "
        "(--model.pretrained FILE, safetensors or pth), or set pretrained to false."
    )


def _answers(url: str) -> bool:
    """Whether a host answers within some seconds, with whatever status; proxies of the environment are used."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_PROBE_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
