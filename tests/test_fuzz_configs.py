"""200 spoilt configs: each runs, or is refused in one line. `python -m tests.test_fuzz_configs` lists them."""

from __future__ import annotations

import copy
import io
import os
import random
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_unfreeze.cli import main
from lightning_unfreeze.cli.parser import UnfreezeCLI

NUM_CONFIGS = 200
LIMIT_SECONDS = 60  # of a config, on a machine that is busy with other things; one takes half a second

BASE: dict[str, Any] = {
    "seed_everything": 0,
    "trainer": {
        "accelerator": "cpu",
        "precision": "32-true",
        "accumulate_grad_batches": 1,
        "gradient_clip_val": 1.0,
        "val_check_interval": 1.0,
        "check_val_every_n_epoch": 1,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "deterministic": False,
        "default_root_dir": "run",
        "callbacks": [
            {
                "class_path": "GradualUnfreeze",
                "init_args": {
                    "stages": [
                        {"name": "features", "train": "head", "epochs": 1, "precompute": True, "lr": "find"},
                        {"name": "top", "train": 2, "lr": 0.01, "lr_mult": 0.5, "cycle_len": 1, "num_cycles": 2},
                        {
                            "name": "full",
                            "train": ["layer*", "head"],
                            "lr_mult": 0.3,
                            "cycle_len": 1,
                            "cycle_mult": 2,
                            "num_cycles": 2,
                            "until": "overfit",
                        },
                    ],
                    "on_plan_change": "error",
                },
            },
            {
                "class_path": "PrecomputeFeatures",
                "init_args": {"policy": "always", "num_views": 2, "dtype": "auto", "max_bytes": 10_000_000},
            },
            {"class_path": "LRFinderPerStage", "init_args": {"num_steps": 20, "min_lr": 1e-6, "max_lr": 1.0}},
            {"class_path": "CosineRestarts", "init_args": {"floor": 0.1, "decay": 0.5, "momentum": [0.85, 0.95]}},
            {"class_path": "TTAEval", "init_args": {"views": ["identity", "hflip"], "merge": "mean"}},
        ],
    },
    "model": {
        "class_path": "TransferClassifier",
        "init_args": {"backbone": "digits_resnet", "num_classes": 5, "pretrained": True},
    },
    "data": {
        "class_path": "DigitsData",
        "init_args": {"train_per_class": 2, "batch_size": 4, "augmentation": "shift"},
    },
}
# whatever a config asks for, it may not take long; and starting a thousand processes is a user's right
LIMITS = [
    "--trainer.max_steps=2",
    "--trainer.limit_train_batches=1",
    "--trainer.limit_val_batches=1",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
]
Place = tuple[Any, Any]  # a container and a key in it


def places(node: Any) -> Iterator[Place]:
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from places(node[key])


def misspell(word: str, draw: random.Random) -> str:
    index = draw.randrange(len(word)) if word else 0
    return draw.choice([word[:index] + word[index + 1 :], word[:index] + "x" + word[index:], word.upper(), ""])


def spoil(config: dict[str, Any], draw: random.Random) -> str:
    """One mutation, in place; what was done."""
    node, key = draw.choice(list(places(config)))
    before = node[key]
    kind = draw.choice(["delete", "type", "number", "name", "word", "swap", "twice"])
    if kind == "delete":
        del node[key]
    elif kind == "type":
        node[key] = draw.choice([None, "text", "", [], {}, [1, "a"], {"a": 1}, True, 3, 0.5, [[]]])
    elif kind == "number":
        node[key] = draw.choice(
            [0, -1, 1, 2, 10**6, 10**12, -(10**12), 1e300, -0.5, 1e-300, float("nan"), float("inf")]
        )
    elif kind == "name" and isinstance(node, dict):
        node[misspell(key, draw)] = node.pop(key)
    elif kind == "word" and isinstance(before, str):
        node[key] = misspell(before, draw)
    elif kind == "twice" and isinstance(node, list):
        node.insert(key, copy.deepcopy(before))
    else:
        other, there = draw.choice(list(places(config)))
        node[key], other[there] = other[there], node[key]
        # a section that now holds itself has no YAML
        if any(node[key] is each for each in (node, config)) or _is_cyclic(config):
            raise RecursionError
        return f"swap {key} and {there}"
    return f"{kind} {key}: {str(before)[:30]} -> {str(node.get(key, 'gone') if isinstance(node, dict) else node)[:30]}"


def _is_cyclic(node: Any, above: tuple[int, ...] = ()) -> bool:
    if not isinstance(node, dict | list):
        return False
    inside = node.values() if isinstance(node, dict) else node
    return id(node) in above or any(_is_cyclic(each, (*above, id(node))) for each in inside)


def spoilt_text(text: str, draw: random.Random) -> str:
    """Mutations of the file rather than of what it says: a line twice, lost, or indented wrongly; a character lost."""
    lines = text.splitlines()
    index = draw.randrange(len(lines))
    kind = draw.choice(["twice", "lost", "indented", "cut"])
    if kind == "twice":
        lines.insert(index, lines[index])
    elif kind == "lost":
        del lines[index]
    elif kind == "indented":
        lines[index] = " " + lines[index]
    else:
        lines[index] = lines[index][: len(lines[index]) // 2]
    return "\n".join(lines)


def configs() -> Iterator[tuple[str, str]]:
    """What was spoilt, and the YAML."""
    draw = random.Random(6)
    for number in range(NUM_CONFIGS):
        done: list[str] = []
        config = copy.deepcopy(BASE)
        if number % 8 == 7:
            yield "text", spoilt_text(yaml.safe_dump(config, sort_keys=False), draw)
            continue
        while len(done) < (2 if number % 4 == 3 else 1):
            attempt = copy.deepcopy(config)
            try:
                done.append(spoil(attempt, draw))
            except RecursionError:
                continue
            config = attempt
        yield "; ".join(done), yaml.safe_dump(config, sort_keys=False, width=200)


class TooLongError(BaseException):
    """No `Exception`, so that nothing on the way takes it for a failure of the data."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(text: str, folder: Path) -> tuple[str, str]:
    """`"runs"`, `"refused"` with its line, or `"FAILS"` with what came instead."""
    path = folder / "config.yaml"
    path.write_text(text)
    shown, errors = io.StringIO(), io.StringIO()
    try:
        with time_limit(LIMIT_SECONDS), redirect_stdout(shown), redirect_stderr(errors):
            main(["fit", "--config", str(path), *LIMITS])
    except SystemExit as stop:
        lines = [line for line in errors.getvalue().splitlines() if line.startswith("error:")]
        # a line that says of what kind a value has to be, and not which value, helps nobody
        names_it = len(lines) == 1 and not lines[0].startswith("error: Expected a")
        if stop.code == 2 and names_it and 20 < len(lines[0]) < 1000 and "Traceback" not in errors.getvalue():
            return "refused", lines[0]
        return "FAILS", f"exit status {stop.code}, error lines {[line[:1500] for line in lines]}"
    except TooLongError:
        return "FAILS", f"took longer than {LIMIT_SECONDS} seconds"
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return "FAILS", f"{type(error).__name__}: {str(error)[:300]} ({last.filename}:{last.lineno})"
    return "runs", ""


def outcomes(folder: Path) -> Iterator[tuple[str, str, str, str]]:
    for what, text in configs():
        yield what, *outcome(text, folder), text


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="limits each config by a timer signal")
# what a spoilt config earns from Lightning and torch is not known in advance
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_config__spoilt_in_200_ways_runs_or_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    only_fit = {"fit": UnfreezeCLI.subcommands()["fit"]}  # the parsers of the other commands are built for nothing
    monkeypatch.setattr(UnfreezeCLI, "subcommands", staticmethod(lambda: only_fit))
    seen = list(outcomes(tmp_path))
    assert [(what, says, text) for what, kind, says, text in seen if kind == "FAILS"] == []
    kinds = Counter(kind for _, kind, _, _ in seen)
    assert len(seen) == NUM_CONFIGS
    # the mutations are neither harmless nor hopeless
    assert kinds["runs"] > 20
    assert kinds["refused"] > 80


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        for number, (what, kind, says, _) in enumerate(outcomes(Path(scratch))):
            print(f"{number:3d} {kind:8s} {what}  {says}", flush=True)
