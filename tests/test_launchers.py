"""Every way to start two processes runs the stages; what the user set on DDP stays; what cannot work is refused.

Script, `torchrun`, spawn: this file itself, started as a script.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_unfreeze.callbacks.base import StageCallback
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.stages.plan import Stage
from tests.inside_lightning.test_distributed import needs_fork, ranks_differ_by
from tests.zoo import SmallNet, UserModule, keyed_loader, loader, quiet_trainer, random_images

pytestmark = [
    pytest.mark.ddp,
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Found .* module"),
]

PLAN = [Stage("head", train="head", epochs=1, lr=0.1), Stage("full", epochs=1, lr=0.05, lr_mult=0.5)]
REPO = Path(__file__).parents[1]


class ChecksRanks(StageCallback):
    """After each stage: how far apart the ranks are, how much the head and the stem moved since the start."""

    order = 95

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, {}  # type: ignore[var-annotated]

    def on_stage_start(self, trainer: pl.Trainer, pl_module: Any, stage: Stage) -> None:
        self.before = [
            pl_module.net.head[2].weight.detach().clone(),
            pl_module.net.backbone[0][0].weight.detach().clone(),
        ]

    def on_stage_end(self, trainer: pl.Trainer, pl_module: Any, stage: Stage) -> None:
        after = [pl_module.net.head[2].weight, pl_module.net.backbone[0][0].weight]
        moved = [not torch.equal(now, before) for now, before in zip(after, self.before, strict=True)]
        self.rows[stage.name] = [trainer.world_size, ranks_differ_by(pl_module), *moved]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.path.write_text(json.dumps(self.rows))


def fit(path: Path, strategy: Any) -> None:
    torch.manual_seed(0)
    trainer = quiet_trainer([GradualUnfreeze(PLAN), ChecksRanks(path)], strategy=strategy, devices=2)
    trainer.fit(UserModule(SmallNet(), optimizer="sgd"), keyed_loader(batch_size=6))


def check(path: Path) -> None:
    # two ranks, no difference between them; the head moved in both stages, the stem in the second only
    assert json.loads(path.read_text()) == {"head": [2, 0.0, True, False], "full": [2, 0.0, True, True]}


@needs_fork
@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_notebook"])
def test_launcher__fork_and_notebook(strategy: str, tmp_path: Path) -> None:
    fit(tmp_path / "rows.json", strategy)
    check(tmp_path / "rows.json")


@pytest.mark.parametrize("time", ["first", "second"])
def test_launcher__one_process_in_this_one_leaves_its_rank_to_no_later_test(time: str) -> None:
    assert "LOCAL_RANK" not in os.environ
    quiet_trainer([], strategy="ddp", devices=1, max_epochs=1).fit(UserModule(SmallNet()), loader(batch_size=6))
    assert os.environ["LOCAL_RANK"] == "0"  # Lightning's, which the fixture of all tests takes away


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["script", "torchrun", "spawn"])
def test_launcher__processes_of_their_own(launcher: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    runner = [sys.executable]
    if launcher == "torchrun":
        runner += ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    strategy = "ddp_spawn" if launcher == "spawn" else "ddp"
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [*runner, str(Path(__file__).resolve()), str(path), strategy]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    check(path)


# --- what the user set on DDP ----------------------------------------------------------------------------------------


class LooksAtDDP(StageCallback):
    def __init__(self) -> None:
        self.seen: list[tuple[bool, dict[str, Any]]] = []

    def on_stage_start(self, trainer: pl.Trainer, pl_module: Any, stage: Stage) -> None:
        wrapper = trainer.strategy.model
        assert isinstance(wrapper, nn.parallel.DistributedDataParallel)
        options = {
            "bucket_mb": wrapper.bucket_bytes_cap // 2**20,
            "view": wrapper.gradient_as_bucket_view,
            "static": wrapper.static_graph,
            "unused": wrapper.find_unused_parameters,
            "timeout": trainer.strategy._timeout,  # type: ignore[attr-defined]
            "same group": wrapper.process_group is not None,
        }
        self.seen.append((hasattr(wrapper, "seen_before"), options))
        wrapper.seen_before = True  # type: ignore[assignment]


@needs_fork
def test_rebuild_ddp__keeps_the_users_options_in_every_stage(tmp_path: Path) -> None:
    strategy = DDPStrategy(
        start_method="fork",
        process_group_backend="gloo",
        timeout=timedelta(seconds=77),
        bucket_cap_mb=3,
        gradient_as_bucket_view=True,
        static_graph=True,
    )
    wanted = {"bucket_mb": 3, "view": True, "static": True, "unused": False, "same group": True}

    class Asserts(LooksAtDDP):
        """In the forked process, whose failure is the test's."""

        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            assert [before for before, _ in self.seen] == [False, False]
            for _, options in self.seen:
                assert options == {**wanted, "timeout": timedelta(seconds=77)}
            (tmp_path / f"{trainer.global_rank}.txt").write_text("seen")

    looks = Asserts()
    trainer = quiet_trainer([GradualUnfreeze(PLAN), looks], strategy=strategy, devices=2)
    trainer.fit(UserModule(SmallNet()), loader(batch_size=6))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.txt", "1.txt"]


# --- sync_batchnorm --------------------------------------------------------------------------------------------------


def test_sync_batchnorm__is_refused_where_torch_drops_an_activation() -> None:
    module = UserModule(timm.create_model("test_efficientnet", num_classes=3))
    trainer = quiet_trainer([GradualUnfreeze(PLAN)], strategy="ddp", devices=1, sync_batchnorm=True)
    with pytest.raises(MisconfigurationException) as error:
        trainer.fit(module, loader(random_images(8, size_px=32)))
    for part in ("BatchNormAct2d", "net.", "timm.layers.convert_sync_batchnorm", "sync_batchnorm=False"):
        assert part in str(error.value)


def test_sync_batchnorm__the_refusal_is_for_a_reason() -> None:
    """torch's converter takes the activation of timm's layer away, timm's own keeps it."""
    layer = timm.layers.BatchNormAct2d(2).eval()
    images = torch.randn(4, 2, 3, 3)
    layer.requires_grad_(False)
    assert float(layer(images).min()) == 0.0
    assert float(nn.SyncBatchNorm.convert_sync_batchnorm(layer).eval()(images).min()) < 0
    assert float(timm.layers.convert_sync_batchnorm(layer).eval()(images).min()) == 0.0


def test_sync_batchnorm__replaced_layers_are_frozen_as_the_ones_before() -> None:
    """Lightning replaces them between `setup`, where the layer groups are found, and `configure_optimizers`."""
    seen = []

    class Looks(UserModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            nn.SyncBatchNorm.convert_sync_batchnorm(self)  # what Lightning calls; under DDP it wants GPUs
            return super().configure_optimizers()

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int:
            parts = [part for part in self.modules() if hasattr(part, "running_mean")]
            seen.extend((type(part).__name__, part.training) for part in parts)
            return -1  # no step

    # its first layer group is a convolution and a normalisation, side by side
    module = Looks(timm.create_model("test_resnet", num_classes=3))
    trainer = quiet_trainer([GradualUnfreeze([Stage("head", train="head", epochs=1)])])
    trainer.fit(module, loader(random_images(8, size_px=32), batch_size=4))
    assert set(seen) == {("SyncBatchNorm", False)}


if __name__ == "__main__":
    # some sandboxed machines do not hand file descriptors of shared memory to other processes
    torch.multiprocessing.set_sharing_strategy("file_system")
    fit(Path(sys.argv[1]), sys.argv[2])
