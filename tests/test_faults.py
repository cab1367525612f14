"""Killed at any moment, resumed, and bitwise equal: `python -m tests.test_faults` prints the table of moments.

A child process is forked for each run, so that imports are paid once, and kills itself with SIGKILL at a moment chosen
by a seed: the n-th function call, Python's or C's, inside one part of the recipe. So a moment is the same on every
machine.
"""

from __future__ import annotations

import csv
import os
import random
import signal
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loops import _EvaluationLoop, _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy

from lightning_unfreeze.callbacks.base import Conductor, StageCallback
from lightning_unfreeze.callbacks.lr_finder import LRFinderPerStage
from lightning_unfreeze.callbacks.precompute import PrecomputeFeatures
from lightning_unfreeze.callbacks.restarts import CosineRestarts
from lightning_unfreeze.callbacks.tta import TTAEval
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.features.fill import FeaturePass
from lightning_unfreeze.features.layout import StoreError
from lightning_unfreeze.features.store import FeatureStore
from lightning_unfreeze.stages.plan import Stage
from tests.processes import Forked, fork, needs_fork
from tests.zoo import (
    Images,
    LogsByEpoch,
    Saves,
    SmallNet,
    UserModule,
    checkpoint_at,
    keyed_loader,
    loader,
    quiet_trainer,
    random_images,
    same_weights,
    steady_module,
    weights_of,
)

pytestmark = [
    pytest.mark.slow,
    needs_fork,
    # Lightning, about checkpoints that are there and those that are not yet
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Found .* module:UserWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    # random labels need not have a signal; the rate then stays
    pytest.mark.filterwarnings("ignore:.*no signal in the range test"),
]

RECIPE = [
    Stage("head_on_features", train="head", epochs=2, precompute=True, lr="find"),
    Stage("head_augmented", train="head", cycle_len=1, num_cycles=2),
    Stage("full", lr="find", lr_mult=1 / 3, cycle_len=1, cycle_mult=2, num_cycles=2, until="overfit"),
]
# part of the recipe -> the call that it is; the innermost one counts
PARTS: dict[str, tuple[type, str]] = {
    "feature pass": (FeaturePass, "fill"),
    "range test": (LRFinderPerStage, "range_test"),
    "stage start": (Conductor, "announce"),
    "stage end": (GradualUnfreeze, "finish_stage"),
    "saving a checkpoint": (pl.Trainer, "save_checkpoint"),
    "training batch": (_TrainingEpochLoop, "advance"),
    "validation": (_EvaluationLoop, "run"),
}
HOW_MANY = {
    "feature pass": 4,
    "range test": 4,
    "stage start": 2,
    "stage end": 2,
    "saving a checkpoint": 3,
    "training batch": 4,
    "validation": 1,
}


def recipe_fit(folder: Path, save_every: int = 1, *callbacks: Callback) -> tuple[UserModule, pl.Trainer]:
    """Starts or goes on: all steps of the recipe on a tiny network, with augmentation, BatchNorm and dropout."""
    torch.manual_seed(0)
    module = UserModule(SmallNet())
    # without version counters, for a version that was written after the last checkpoint would be written again
    last = ModelCheckpoint(
        folder, save_top_k=0, save_last=True, every_n_train_steps=save_every, enable_version_counter=False
    )
    best = ModelCheckpoint(folder, "best", monitor="val_loss", enable_version_counter=False)
    players = [
        GradualUnfreeze(RECIPE),
        PrecomputeFeatures(folder / "feature_store", policy="always"),
        LRFinderPerStage(num_steps=20),
        CosineRestarts(snapshots=True),
        TTAEval(),
        last,
        best,
    ]
    trainer = quiet_trainer([*players, *callbacks], enable_checkpointing=True, default_root_dir=folder)
    trainer.fit(module, keyed_loader(), loader(random_images(16, seed=1)), ckpt_path="last")
    return module, trainer


# --- children --------------------------------------------------------------------------------------------------------


class Profile:
    """Counts function calls per part of the recipe; at the n-th of one part it kills the process."""

    def __init__(self, part: str | None = None, call: int = -1, place: Path | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self.part, self.call, self.place = part, call, place
        self.inside: str | None = None
        self.before: list[tuple[type, str, Any]] = []

    def __enter__(self) -> Profile:
        for part, (owner, name) in PARTS.items():
            self.before.append((owner, name, vars(owner)[name]))
            setattr(owner, name, self.within(part, vars(owner)[name]))
        return self

    def within(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            outer = self.inside
            self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.enter(outer)

        return wrapped

    def enter(self, part: str | None) -> None:
        self.inside = part
        counted = part is not None and self.part in (None, part)
        sys.setprofile(self.count if counted else None)

    def count(self, frame: Any, event: str, argument: Any) -> None:
        if event not in ("call", "c_call") or self.inside is None:
            return
        self.counts[self.inside] += 1
        if self.part is not None and self.counts[self.part] == self.call:
            code = frame.f_code
            called = f" -> {argument.__name__}" if event == "c_call" else ""
            assert self.place is not None
            self.place.write_text(f"{Path(code.co_filename).name}:{code.co_name}{called}")
            os.kill(os.getpid(), signal.SIGKILL)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        for owner, name, function in self.before:
            setattr(owner, name, function)


def child(scratch: Path, action: Callable[[], object]) -> Forked:
    """A process that runs `action`; what it prints goes into `scratch`."""
    scratch.mkdir(parents=True, exist_ok=True)

    def in_scratch() -> None:
        output = os.open(scratch / f"output-{os.getpid()}.txt", os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        # Lightning writes a checkpoint there first, and moves it: what a kill leaves of that is not the package's
        tempfile.tempdir = str(scratch)
        action()

    return fork(in_scratch)


def wait(process: Forked, timeout_seconds: float = 120) -> int:
    return process.wait(timeout_seconds)


def output_of(scratch: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted(scratch.glob("output-*.txt")))


def finish(folder: Path, scratch: Path, save_every: int = 1, profile: Profile | None = None) -> None:
    """In a child: the fit to its end, and the weights to a file."""
    if profile is None:
        module, _ = recipe_fit(folder, save_every)
    else:
        with profile:
            module, _ = recipe_fit(folder, save_every)
        torch.save(dict(profile.counts), scratch / "counts.pt")
    torch.save(weights_of(module), scratch / "weights.pt")


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def tables_in(folder: Path) -> dict[str, list[dict[str, str]]]:
    """The tables that a run leaves, without what a clock says."""
    tables = {}
    for path in sorted(folder.glob("*.csv")):
        rows = list(csv.DictReader(path.read_text().splitlines()))
        tables[path.name] = [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    return tables


def killed_and_resumed(root: Path, part: str, call: int, save_every: int) -> tuple[dict[str, Any], str]:
    """One moment: the run is killed there, then resumed; the row of the table, and what went wrong."""
    folder, scratch = root / "run", root / "scratch"
    place = scratch / "place.txt"
    profile = Profile(part, call, place)
    killed = wait(child(scratch, lambda: finish(folder, scratch, save_every, profile)))
    last = folder / "last.ckpt"
    step = torch.load(last, weights_only=True)["global_step"] if last.is_file() else None
    row = {
        "killed in": part,
        "call": call,
        "at": place.read_text() if place.is_file() else "not reached",
        "saved every": save_every,
        "goes on at step": "the start" if step is None else step,
    }
    if killed != -signal.SIGKILL:
        return row, f"was to be killed, ended with {killed}: {output_of(scratch)}"
    resumed = wait(child(scratch, lambda: finish(folder, scratch, save_every)))
    return row, "" if resumed == 0 else f"the resumed run ended with {resumed}: {output_of(scratch)}"


def all_moments(root: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The uninterrupted runs, then every moment; the table, and what went wrong."""
    whole = {save_every: root / f"whole {save_every}" for save_every in (1, 4)}
    for save_every, there in whole.items():
        status = wait(child(there / "scratch", lambda: finish(there / "run", there / "scratch", save_every, Profile())))  # noqa: B023
        if status:
            raise RuntimeError(f"the uninterrupted run ended with {status}: {output_of(there / 'scratch')}")
    counts = {save_every: torch.load(there / "scratch" / "counts.pt") for save_every, there in whole.items()}
    draw = random.Random(0)
    rows, failures = [], []
    for part, number in HOW_MANY.items():
        for index in range(number):
            save_every = (1, 4)[index % 2]
            # the number of calls is the same to within few: caches are warm in one run and not in another
            calls = int(0.97 * counts[save_every][part])
            # one in each share of the calls, so that the moments lie all over the run whatever is drawn
            call = draw.randrange(1 + calls * index // number, 1 + calls * (index + 1) // number)
            there = root / f"{len(rows):02d}"
            row, failure = killed_and_resumed(there, part, call, save_every)
            if not failure:
                # all are compared with the run that saved after every step: saving changes nothing either
                row |= differences(whole[1], there)
                failure = (
                    str(row) if any(row[name] for name in ("weights differ", "stray files", "tables differ")) else ""
                )
            rows.append(row)
            failures += [failure] if failure else []
    return rows, failures


def differences(whole: Path, resumed: Path) -> dict[str, Any]:
    weights, weights_after = (torch.load(path / "scratch" / "weights.pt") for path in (whole, resumed))
    tables, tables_after = (tables_in(path / "run") for path in (whole, resumed))
    return {
        "weights differ": len(same_weights(weights, weights_after)),
        "stray files": len(set(files_in(whole / "run")) ^ set(files_in(resumed / "run"))),
        "tables differ": sum(tables_after.get(name) != table for name, table in tables.items()),
    }


def as_table(rows: list[dict[str, Any]]) -> str:
    names = list(max(rows, key=len))
    lines = [names, ["---"] * len(names), *([str(row.get(name, "-")) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- kill -9 ---------------------------------------------------------------------------------------------------------


def test_kill__at_20_moments_the_resumed_run_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    rows, failures = all_moments(tmp_path)
    print(as_table(rows))
    assert failures == []
    assert len(rows) == 20
    # the moments lie all over the recipe: before the first checkpoint, and in every stage after it
    went_on_at = {row["goes on at step"] for row in rows}
    assert "the start" in went_on_at
    assert len(went_on_at) > 6
    assert len({row["at"] for row in rows}) > 10


# --- SIGTERM ---------------------------------------------------------------------------------------------------------


class SendsSigterm(Callback):
    """As a cluster does before it takes the machine away: in a step, or in the end of an epoch."""

    def __init__(self, at_step: int, at_epoch_end: bool) -> None:
        self.at_step, self.at_epoch_end = at_step, at_epoch_end

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.at_epoch_end and trainer.global_step == self.at_step + 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        if not self.at_epoch_end and trainer.global_step == self.at_step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights and the tables of a run of the recipe that nothing stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    scratch = folder / "scratch"
    assert wait(child(scratch, lambda: finish(folder / "run", scratch, 1000))) == 0, output_of(scratch)
    return torch.load(scratch / "weights.pt"), tables_in(folder / "run")


@pytest.mark.parametrize(
    ("at_step", "at_epoch_end"),
    # inside an epoch of each stage; in the last batch of a stage, of a cycle and of the run, where Lightning stops
    # inside the validation after it; in an epoch's end
    [(4, False), (7, False), (16, False), (11, False), (14, False), (20, False), (2, True), (11, True)],
)
def test_sigterm__lightning_ends_the_run_and_it_goes_on_where_it_was(
    at_step: int, at_epoch_end: bool, uninterrupted: tuple[Any, Any], tmp_path: Path
) -> None:
    def interrupted() -> None:
        saves = ModelCheckpoint(tmp_path / "run", "preempted", save_on_exception=True, every_n_epochs=1000)
        recipe_fit(tmp_path / "run", 1000, saves, SendsSigterm(at_step, at_epoch_end))

    assert wait(child(tmp_path / "stop", interrupted)) == 0, output_of(tmp_path / "stop")
    (saved,) = (tmp_path / "run").glob("preempted*.ckpt")
    assert torch.load(saved, weights_only=True)["global_step"] == at_step + 1
    saved.rename(tmp_path / "run" / "last.ckpt")
    resumed = child(tmp_path / "scratch", lambda: finish(tmp_path / "run", tmp_path / "scratch", 1000))
    assert wait(resumed) == 0, output_of(tmp_path / "scratch")
    weights, tables = uninterrupted
    assert same_weights(weights, torch.load(tmp_path / "scratch" / "weights.pt")) == []
    assert tables == tables_in(tmp_path / "run")


# --- ranks -----------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class KillsRank(Callback):
    """Kills (or stops) the last rank inside a training step, or inside the pass that fills the store."""

    def __init__(self, where: str, how: signal.Signals) -> None:
        self.where, self.how = where, how

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if self.where == "feature pass" and trainer.global_rank == 1:
            FeaturePass._fill_rows = lambda *_: os.kill(os.getpid(), self.how)  # type: ignore[assignment, method-assign]

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        if self.where == "training step" and trainer.global_rank == 1 and trainer.global_step == 3:
            os.kill(os.getpid(), self.how)


def ranked_fit(
    folder: Path, num_ranks: int, *callbacks: Callback, ckpt: str | None = None, wait_seconds: float = 60
) -> UserModule:
    """Two stages on the same global batches whatever the number of ranks; without what depends on the rank's own."""
    torch.manual_seed(0)
    module = steady_module()
    stages = [
        Stage("head", train="head", epochs=2, precompute=True, lr=0.1),
        Stage("full", epochs=2, lr=0.05, lr_mult=0.5),
    ]
    options: dict[str, Any] = {}
    if num_ranks > 1:
        strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=wait_seconds))
        options = {"strategy": strategy, "devices": num_ranks}
    precompute = PrecomputeFeatures(folder / "feature_store", policy="always")
    trainer = quiet_trainer([GradualUnfreeze(stages), precompute, *callbacks], default_root_dir=folder, **options)
    trainer.fit(module, keyed_loader(batch_size=12 // num_ranks), ckpt_path=ckpt)
    if trainer.is_global_zero:
        folder.mkdir(exist_ok=True)
        torch.save(weights_of(module), folder / "weights.pt")
    return module


def ranks(scratch: Path, num_ranks: int, action: Callable[[], object]) -> list[Forked]:
    """Processes that nobody watches over, as on the nodes of a cluster: no launcher ends one for the other's sake."""
    port = str(free_port())

    def as_rank(rank: int) -> None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(num_ranks)}
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}
        action()

    return [child(scratch / str(rank), lambda rank=rank: as_rank(rank)) for rank in range(num_ranks)]  # type: ignore[misc]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks that nothing happened to."""
    folder, scratch = tmp_path_factory.mktemp("undisturbed") / "run", tmp_path_factory.mktemp("scratch")
    started = ranks(scratch, 2, lambda: ranked_fit(folder, 2))
    assert [wait(each) for each in started] == [0, 0], output_of(scratch / "0")
    return folder


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("where", "how"),
    # a rank that is killed closes its connections; one that is stopped, as on a machine that died, does not
    [
        ("feature pass", signal.SIGKILL),
        ("training step", signal.SIGKILL),
        ("feature pass", signal.SIGSTOP),
        ("training step", signal.SIGSTOP),
    ],
)
def test_ranks__one_is_lost_and_the_other_ends_with_an_error(
    where: str, how: signal.Signals, undisturbed: Path, tmp_path: Path
) -> None:
    folder, scratch = tmp_path / "run", tmp_path / "scratch"
    first, last = ranks(scratch, 2, lambda: ranked_fit(folder, 2, KillsRank(where, how), wait_seconds=5))
    assert wait(first, 60) == 1, output_of(scratch / "0")
    assert "Error" in output_of(scratch / "0")
    last.kill()
    assert wait(last) == -signal.SIGKILL
    # the store is finished and true, or unfinished and known to be
    (store,) = (path for path in (folder / "feature_store").iterdir() if path.is_dir())
    finished = (store / "manifest.json").is_file()
    assert finished == (where == "training step")
    if not finished:
        with pytest.raises(StoreError, match=r"manifest.json is missing"):
            FeatureStore.open(store, fingerprint="any")
    # another run takes what is there and ends as one that was never disturbed
    started = ranks(tmp_path / "again", 2, lambda: ranked_fit(folder, 2))
    assert [wait(each) for each in started] == [0, 0], output_of(tmp_path / "again" / "0")
    weights = [torch.load(path / "weights.pt") for path in (folder, undisturbed)]
    assert same_weights(*weights) == []
    assert files_in(folder) == files_in(undisturbed)


@pytest.mark.ddp
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_resume__with_another_number_of_ranks_at_an_epochs_end(before: int, after: int, tmp_path: Path) -> None:
    whole = tmp_path / "whole"

    def run(folder: Path, num_ranks: int, *callbacks: Callback, ckpt: str | None = None) -> dict[str, torch.Tensor]:
        started = ranks(
            tmp_path / f"output {folder.name}", num_ranks, lambda: ranked_fit(folder, num_ranks, *callbacks, ckpt=ckpt)
        )
        assert [wait(each) for each in started] == [0] * num_ranks, output_of(tmp_path / f"output {folder.name}" / "0")
        weights: dict[str, torch.Tensor] = torch.load(folder / "weights.pt")
        return weights

    uninterrupted = run(whole, before, Saves(whole, ("epoch_end", None, None)))
    for epoch in (0, 1, 2):  # inside the first stage, at its end, inside the second
        resumed = run(tmp_path / f"resumed {epoch}", after, ckpt=str(checkpoint_at(whole, "epoch_end", epoch)))
        for name, value in uninterrupted.items():
            torch.testing.assert_close(resumed[name], value, rtol=0, atol=1e-6)


# --- what Lightning loses --------------------------------------------------------------------------------------------


LAST_BATCH = ("batch_end", None, 2)


@pytest.mark.parametrize("last", [False, True], ids=["a stage follows", "it is the last stage"])
def test_resume__makes_up_for_the_end_of_an_epoch_that_a_checkpoint_lacks(last: bool, tmp_path: Path) -> None:
    """Such a checkpoint has all batches, and neither the validation nor the decisions after them."""

    def run(folder: Path | None, ckpt: Path | None = None) -> tuple[Any, ...]:
        torch.manual_seed(0 if ckpt is None else 99)
        module, restarts = LogsByEpoch([3.0, 9.0, 2.0, 2.5, 9.0]), CosineRestarts()
        until = Stage("until", cycle_len=1, cycle_mult=2, num_cycles=3, until="overfit", lr=0.1)  # 3, then 2: goes on
        after = [] if last else [Stage("after", train="head", epochs=1, lr=0.01)]
        ends = EndsAfterFourEpochs()
        plan = GradualUnfreeze([until, *after])
        trainer = quiet_trainer([ends, restarts, plan, *([] if folder is None else [Saves(folder, LAST_BATCH)])])
        trainer.fit(module, keyed_loader(), loader(random_images(8)), ckpt_path=ckpt)
        assert torch.is_grad_enabled()
        journal = plan.journal.state_dict()
        told = (
            restarts.cycle_values,
            [row["epochs"] for row in journal["rows"]],
            journal["metric"],
            trainer.current_epoch,
        )
        return weights_of(module), told, module.validated

    weights, told, validated = run(tmp_path)
    assert told[:2] == ({"until": [3.0, 2.0]}, [4] if last else [4, 1])
    assert validated == list(range(4 + (not last)))
    for epoch in validated:
        weights_again, told_again, validated_again = run(None, checkpoint_at(tmp_path, "batch_end", epoch, 2))
        assert told_again == told
        assert validated_again == validated[epoch:]
        assert same_weights(weights, weights_again) == []


@pytest.mark.parametrize("pays", [True, False])
def test_resume__keeps_the_decision_whether_a_store_pays(
    pays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was made by a clock, and training on stored features is another run where the images are augmented."""

    def run(estimate: bool, folder: str, ckpt: Path | None = None, *callbacks: Callback) -> dict[str, torch.Tensor]:
        seconds = [0.001, 1.0] if estimate else [1.0, 0.001]  # of an image: with a store, without
        monkeypatch.setattr(FeaturePass, "seconds_per_image", lambda *_: seconds[0])
        monkeypatch.setattr("lightning_unfreeze.features.estimate.seconds", lambda *_: 8 * seconds[1])
        torch.manual_seed(0)
        module = UserModule(SmallNet())
        stages = [Stage("head", train="head", epochs=3, precompute=True)]
        store = PrecomputeFeatures(tmp_path / folder)
        trainer = quiet_trainer([GradualUnfreeze(stages), store, *callbacks])
        train = keyed_loader(Images(lambda image: image + torch.rand(1)))
        trainer.fit(module, train, loader(Images(lambda image: image)), ckpt_path=ckpt)
        assert bool(list((tmp_path / folder).glob("*-train"))) == pays
        return weights_of(module)

    whole = run(pays, "store", None, Saves(tmp_path, LAST_BATCH))
    assert same_weights(whole, run(not pays, "another store", checkpoint_at(tmp_path, "batch_end", 1, 2))) == []


class EndsAfterFourEpochs(StageCallback):
    """Another player ends the stage inside its third cycle, so that the best weights are those of the second."""

    def wants_to_end_stage(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> bool:
        return stage.name == "until" and trainer.current_epoch == 3


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        table, problems = all_moments(Path(folder))
    print(as_table(table))
    print(f"\n{len(table) - len(problems)} of {len(table)} bitwise equal, without stray files")
    print("\n".join(problems))
