"""The arms of the study: the whole recipe, and what is left of it when steps are dropped, as lists of stages.

An arm is data. Its stages carry no rates: these come from tuning, from the range test, or are fixed, and are filled
in by `Arm.with_rates`. The stage programs follow the recipe's own lengths, so another recipe gives other arms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

from lightning_unfreeze.stages.plan import Stage

CORE = ("full9", "skip34@epochs", "skip34@images", "skip34@flops", "skip34+uniform@flops", "lp_only")
ALL = (
    *("full9", "skip3", "skip4", "skip34@epochs", "skip34@images", "skip34@flops", "uniform", "skip34+uniform@flops"),
    *(
        "layer_decay@flops",
        "gradual",
        "no_lr_find",
        "lp_only",
        "lp_ft",
        "solved_ft",
        "surgical_first",
        "surgical_middle",
        "surgical_last",
    ),
    *("scratch@images", "scratch@5x", "no_aug", "full9+other_bn", "skip34@flops+other_bn"),
)
REFERENCE = "full9"
LP_FT_EPOCHS = 30
SURGICAL_HEAD_EPOCHS = 5
ULMFIT_FACTOR = 1 / 2.6
LAYER_DECAY = 0.75
"""Factor from layer to layer that ELECTRA, BEiT and MAE fine-tune with."""

Rate = float | Literal["find"]
BatchNormPolicy = Literal["train", "frozen"]
Flops = Callable[[Sequence[Stage]], float]


@dataclass(frozen=True)
class Recipe:
    """Lengths and factors of the whole recipe, from which every arm follows.

    Args:
        cached_epochs: Step 3: the head on stored features.
        augmented_epochs: Step 4: the head on augmented images, one cosine cycle an epoch.
        cycle_len: Step 8: epochs of the first cycle with everything unfrozen.
        cycle_mult: Length of such a cycle over that of the one before.
        num_cycles: Number of such cycles.
        lr_span: Step 6: rate of the first layer group over that of the head, the others spread between (`Stage`).
        default_head_lr: Rate of head-only stages where none is looked for (arm `no_lr_find`).
        default_lr: Rate of the other stages there.

    Raises:
        ValueError: For an impossible length or factor.
    """

    cached_epochs: int = 2
    augmented_epochs: int = 3
    cycle_len: int = 1
    cycle_mult: int = 2
    num_cycles: int = 3
    lr_span: float = 1 / 9
    default_head_lr: float = 1e-2
    default_lr: float = 3e-3

    def __post_init__(self) -> None:
        for name in ("cached_epochs", "augmented_epochs", "cycle_len", "cycle_mult", "num_cycles"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"recipe.{name}={getattr(self, name)}: give 1 or more; arms drop steps, recipes do not."
                )
        if not 0 < self.lr_span <= 1:
            raise ValueError(f"recipe.lr_span={self.lr_span}: give a ratio in (0, 1].")

    @property
    def cycles(self) -> tuple[int, ...]:
        """Epochs of the unfrozen cycles."""
        return tuple(self.cycle_len * self.cycle_mult**index for index in range(self.num_cycles))

    @property
    def stages(self) -> list[Stage]:
        """The whole recipe, without rates."""
        cached = Stage("head_cached", "head", epochs=self.cached_epochs, precompute=True)
        augmented = Stage("head_augmented", "head", cycle_len=1, num_cycles=self.augmented_epochs)
        return [cached, augmented, *cycle_stages(self.cycles, "full", lr_span=self.lr_span)]

    @property
    def num_epochs(self) -> int:
        """Epochs of the whole recipe."""
        return self.cached_epochs + self.augmented_epochs + sum(self.cycles)

    def fitted_cycles(self, epochs: int) -> tuple[int, ...]:
        """Return cycles of the recipe's lengths that last `epochs`, also where those do not add up to it.

        Cycles go on growing while they fit. What remains is a cycle of its own if it is at least half of the next
        one, else it lengthens the last.

        >>> Recipe().fitted_cycles(12), Recipe().fitted_cycles(8)
        ((1, 2, 4, 5), (1, 2, 5))
        """
        cycles: list[int] = []
        following = self.cycle_len
        while sum(cycles) + following <= epochs:
            cycles.append(following)
            following *= self.cycle_mult
        rest = epochs - sum(cycles)
        if rest and (not cycles or 2 * rest >= following):
            cycles.append(rest)
        elif rest:
            cycles[-1] += rest
        return tuple(cycles)


@dataclass(frozen=True)
class Arm:
    """One way to train: stages without rates, and what else differs from the reference.

    Args:
        name: As in the report.
        stages: The stages; `lr` is filled in by `with_rates`.
        rate: What is tuned: the place on the two grids of rates (`full`), that on the head's grid (`head`), or nothing,
            with the two `fixed` rates.
        fixed: Rates (head's stages, others) of an arm that is not tuned.
        pretrained: Start from the pretrained weights.
        augmentation: Augment the training images.
        other_batch_norm: Take the other BatchNorm policy than the rest of the study.

    Raises:
        ValueError: For a stage with `solve="auto"`: what an arm does and costs is known before it runs.
    """

    name: str
    stages: tuple[Stage, ...]
    rate: Literal["full", "head", "fixed"] = "full"
    fixed: tuple[float, float] = (1e-2, 3e-3)
    pretrained: bool = True
    augmentation: bool = True
    other_batch_norm: bool = False

    def __post_init__(self) -> None:
        for stage in self.stages:
            if stage.solve == "auto":
                raise ValueError(
                    f"arm {self.name!r}, stage {stage.name!r}: solve='auto' is decided in a run; an arm has solve=True "
                    "(then without lr and epochs), or leaves it out"
                )

    def with_rates(self, head: Rate, full: Rate) -> list[Stage]:
        """Return the stages with these peak rates of the head's stages and of all others."""
        if self.rate == "fixed":
            head, full = self.fixed
        return [
            stage if stage.solve is True else replace(stage, lr=head if stage.train == "head" else full)
            for stage in self.stages
        ]

    @property
    def num_epochs(self) -> int:
        """Epochs of all stages."""
        return sum(stage.num_epochs for stage in self.stages)


def arm_names(arms: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names that `core`, `all` or a list (also separated by commas) stands for.

    >>> arm_names("full9,skip3")
    ('full9', 'skip3')

    Raises:
        ValueError: For an arm that there is not.
    """
    parts = [part.strip() for part in arms.split(",")] if isinstance(arms, str) else list(arms)
    names = [name for part in parts for name in {"core": CORE, "all": ALL}.get(part, (part,))]
    unknown = [name for name in names if name not in ALL]
    if unknown or not names:
        raise ValueError(
            f"arms={arms!r}: {unknown or 'nothing'} is no arm; give core, all, or some of {', '.join(ALL)}."
        )
    return tuple(dict.fromkeys(names))


def make_arms(names: Sequence[str], recipe: Recipe, groups: Sequence[str], flops: Flops) -> list[Arm]:
    """Return arms by name.

    Args:
        names: As `arm_names` gives them.
        recipe: The whole recipe.
        groups: The network's layer groups, input first.
        flops: Training FLOPs of stages, for the arms that match the reference's.

    Raises:
        ValueError: For a network that is too short for an arm.
    """
    known = _programs(recipe, groups, flops)
    return [known[name]() for name in names]


def matched_epochs(reference_flops: float, epoch_flops: float) -> int:
    """Return the number of whole epochs that comes nearest to a number of FLOPs, at least one.

    >>> matched_epochs(8.33e9, 1e9)
    8
    """
    return max(1, round(reference_flops / epoch_flops))


def cycle_stages(
    cycles: Sequence[int], name: str, train: Literal["all"] | list[str] = "all", **rates: Any
) -> list[Stage]:
    """Return stages that run cosine cycles of these lengths: one stage for as long as they grow by one factor.

    Args:
        cycles: Lengths in epochs.
        name: Of the first stage.
        train: As for `Stage`.
        rates: `lr_mult` or `lr_span` of `Stage`.

    >>> [(s.name, s.cycle_len, s.num_cycles) for s in cycle_stages([1, 2, 5], "full")]
    [('full', 1, 2), ('full_rest', 5, 1)]
    """
    mult = cycles[1] // cycles[0] if len(cycles) > 1 else 1
    regular = sum(1 for index, length in enumerate(cycles) if length == cycles[0] * mult**index)
    stages = [
        Stage(name, train, cycle_len=cycles[0], cycle_mult=mult if regular > 1 else 1, num_cycles=regular, **rates)
    ]
    if cycles[regular:]:
        stages += cycle_stages(cycles[regular:], f"{name}_rest", train, **rates)
    return stages


def _programs(recipe: Recipe, groups: Sequence[str], flops: Flops) -> dict[str, Callable[[], Arm]]:
    """Return the builder of each arm; STUDY's A0 to A13."""
    total = recipe.num_epochs
    full = recipe.stages
    cached, augmented = full[:2]

    def unfrozen(cycles: Sequence[int], lr_span: float | None = recipe.lr_span) -> list[Stage]:
        return cycle_stages(cycles, "full", lr_span=lr_span)

    def epochs_of_same_flops() -> int:
        return matched_epochs(flops(full), flops([Stage("full", epochs=1)]))

    def same_flops() -> tuple[int, ...]:
        return recipe.fitted_cycles(epochs_of_same_flops())

    def arm(name: str, stages: Sequence[Stage], **options: object) -> Arm:
        return Arm(name, tuple(stages), **options)  # type: ignore[arg-type]

    def surgical(part: str, index: int) -> Arm:
        if len(groups) < 4:
            raise ValueError(f"surgical arms need 3 layer groups beside the head, the network has {list(groups)}.")
        only = cycle_stages(recipe.cycles, "surgical", train=[groups[index]])
        return arm(f"surgical_{part}", [replace(cached, epochs=SURGICAL_HEAD_EPOCHS), *only])

    fixed = {"rate": "fixed", "fixed": (recipe.default_head_lr, recipe.default_lr)}
    return {
        "full9": lambda: arm("full9", full),
        "skip3": lambda: arm("skip3", [augmented, *unfrozen(recipe.cycles)]),
        "skip4": lambda: arm("skip4", [cached, *unfrozen(recipe.cycles)]),
        "skip34@epochs": lambda: arm("skip34@epochs", unfrozen(recipe.cycles)),
        "skip34@images": lambda: arm("skip34@images", unfrozen(recipe.fitted_cycles(total))),
        "skip34@flops": lambda: arm("skip34@flops", unfrozen(same_flops())),
        "uniform": lambda: arm("uniform", [cached, augmented, *unfrozen(recipe.cycles, None)]),
        "skip34+uniform@flops": lambda: arm("skip34+uniform@flops", unfrozen(same_flops(), None)),
        "layer_decay@flops": lambda: arm(
            "layer_decay@flops", cycle_stages([epochs_of_same_flops()], "full", lr_mult=LAYER_DECAY)
        ),
        "gradual": lambda: arm("gradual", _gradual(recipe, groups)),
        "no_lr_find": lambda: arm("no_lr_find", full, **fixed),
        "lp_only": lambda: arm(
            "lp_only", [cached, replace(augmented, num_cycles=total - recipe.cached_epochs)], rate="head"
        ),
        "lp_ft": lambda: arm("lp_ft", [replace(cached, epochs=LP_FT_EPOCHS), *unfrozen(recipe.cycles)]),
        "solved_ft": lambda: arm(
            "solved_ft", [Stage("head_solved", "head", precompute=True, solve=True), *unfrozen(recipe.cycles)]
        ),
        "surgical_first": lambda: surgical("first", 0),
        "surgical_middle": lambda: surgical("middle", (len(groups) - 1) // 2),
        "surgical_last": lambda: surgical("last", len(groups) - 2),
        "scratch@images": lambda: arm("scratch@images", unfrozen(recipe.fitted_cycles(total), None), pretrained=False),
        "scratch@5x": lambda: arm("scratch@5x", unfrozen(recipe.fitted_cycles(5 * total), None), pretrained=False),
        "no_aug": lambda: arm("no_aug", full, augmentation=False),
        "full9+other_bn": lambda: arm("full9+other_bn", full, other_batch_norm=True),
        "skip34@flops+other_bn": lambda: arm("skip34@flops+other_bn", unfrozen(same_flops()), other_batch_norm=True),
    }


def _gradual(recipe: Recipe, groups: Sequence[str]) -> list[Stage]:
    """Return ULMFiT's unfreezing (Howard & Ruder 2018): a slice of the network more each epoch, then all of it.

    A network of many layer groups is cut into at most half as many slices as there are epochs, so that the second
    half of the images trains everything; rates fall by 2.6 from slice to slice.
    """
    slices = max(2, min(len(groups), recipe.num_epochs // 2))
    # the head is a slice of its own; the backbone's groups are shared out evenly, the rest to the slices at the input
    sizes = [1] + [(len(groups) - 1 + index) // (slices - 1) for index in range(slices - 1)]
    ratios = [ULMFIT_FACTOR**index for index, size in enumerate(sizes) for _ in range(size)][::-1]
    steps = [
        Stage(f"top_{count}", count, lr_mult=ratios, cycle_len=1)
        for count in accumulate(sizes[:-1])
        # the last slice joins in the stages that train everything
    ]
    rest = recipe.fitted_cycles(recipe.num_epochs - len(steps))
    return [*steps, *cycle_stages(rest, "full", lr_mult=ratios)]
