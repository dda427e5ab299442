"""What each experiment trains, measures and claims."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.reproduce.presets import Preset
from mor.modules import ExpertChoice
from mor.training.trainer import MoRTrainer

__all__ = ["EXPERIMENTS", "Claim", "Experiment", "Variant"]


@dataclass(frozen=True)
class Variant:
    """One training.

    Attributes:
        name: in tables and figures.
        options: of `MoRConfig`; None trains the dense model.
        size: index of the preset's size.
        budget: index of the preset's FLOPs.
    """

    name: str
    options: Mapping[str, Any] | None
    size: int = -1
    budget: int = -1


@dataclass(frozen=True)
class Claim:
    """A sentence that holds if one number is lower than another.

    Attributes:
        text: the sentence.
        lower: variant and measured value, "validation_loss" for the loss of the causal model.
        higher: the same of what is to be worse.
    """

    text: str
    lower: tuple[str, str]
    higher: tuple[str, str]


def _nothing(trainer: MoRTrainer) -> dict[str, float]:
    return {}


@dataclass(frozen=True)
class Experiment:
    """Trainings that differ in one thing.

    Attributes:
        name: what is typed.
        title: heading of its section.
        about: what is compared and what is held equal.
        equal: whether the variants get the same training tokens or the same FLOPs.
        variants: of a preset.
        claims: the paper's, and ours where it made none.
        measure: further numbers of a trained model; the keys are columns of the table.
    """

    name: str
    title: str
    about: str
    equal: Literal["tokens", "FLOPs"]
    variants: Callable[[Preset], list[Variant]]
    claims: tuple[Claim, ...]
    measure: Callable[[MoRTrainer], dict[str, float]] = field(default=_nothing)


def measure_leak(trainer: MoRTrainer) -> dict[str, float]:
    """The loss where routing ranks whole sequences, and how many tokens each way selects.

    The same model and the same rows; only `eval_routing` differs. The shares tell how far the
    threshold is from the trained capacities: without that, a gap is not all leak.
    """
    config = trainer.model.config
    if getattr(config, "router", None) != "expert":
        return {}
    routers = [module for module in trainer.model.modules() if isinstance(module, ExpertChoice)]
    losses, shares = {}, {}
    for routing in ("topk", "threshold"):
        config.eval_routing = routing
        for router in routers:  # they took the option when they were built
            router.eval_routing = routing
        trainer.evaluate()
        values = trainer.state.log_history[-1]  # with the routing metrics
        losses[routing] = values["eval_loss"]
        steps = range(1, config.num_recursions + 1)
        shares[routing] = sum(values[f"eval_selected_share_{step}"] for step in steps)
    return {
        "topk_loss": losses["topk"],
        "leak": losses["threshold"] - losses["topk"],
        "recursions_causal": shares["threshold"],
        "recursions_topk": shares["topk"],
    }


_LOSS = "validation_loss"
_LEAK = Experiment(
    name="leak",
    title="Causal against top-k evaluation",
    about=(
        "Expert-choice models of three recursions, each evaluated twice on the same rows: "
        "causally, by the threshold, and by top-k over the whole sequence, which sees later "
        "tokens. The dense model had the same training FLOPs. `leak` is the causal loss less the "
        "top-k loss; `recursions_causal` and `recursions_topk` are the mean recursions of a token."
    ),
    equal="FLOPs",
    variants=lambda preset: [
        Variant("dense", None),
        Variant("MoR-3, auxiliary loss", {"num_recursions": 3}),
        Variant("MoR-3, auxiliary router", {"num_recursions": 3, "router_aux": "router"}),
    ],
    claims=(
        Claim(
            "Top-k evaluation has a lower loss than causal evaluation (auxiliary loss).",
            ("MoR-3, auxiliary loss", "topk_loss"),
            ("MoR-3, auxiliary loss", _LOSS),
        ),
        Claim(
            "Evaluated by top-k, MoR-3 has a lower loss than the dense model of equal FLOPs.",
            ("MoR-3, auxiliary loss", "topk_loss"),
            ("dense", _LOSS),
        ),
        Claim(
            "Evaluated causally, MoR-3 has a lower loss than the dense model of equal FLOPs.",
            ("MoR-3, auxiliary loss", _LOSS),
            ("dense", _LOSS),
        ),
    ),
    measure=measure_leak,
)

_KV = Experiment(
    name="kv",
    title="Key/value strategies",
    about=(
        "Models of three recursions with recursion-wise caching, recursive sharing and the hybrid; "
        "all had the same training tokens (paper, table 15)."
    ),
    equal="tokens",
    variants=lambda preset: [
        Variant(
            f"{router}-choice, {strategy}",
            {"num_recursions": 3, "router": router, "kv_strategy": strategy},
        )
        for router, strategies in (
            ("expert", ("recursion", "shared", "hybrid")),
            ("token", ("recursion", "shared")),
        )
        for strategy in strategies
    ],
    claims=(
        Claim(
            "Expert-choice has a lower loss with recursion-wise caching than with sharing.",
            ("expert-choice, recursion", _LOSS),
            ("expert-choice, shared", _LOSS),
        ),
        Claim(
            "Token-choice has a lower loss with sharing than with recursion-wise caching.",
            ("token-choice, shared", _LOSS),
            ("token-choice, recursion", _LOSS),
        ),
    ),
)

_SHARINGS = ("cycle", "middle_cycle", "sequence", "middle_sequence")
_SHARING = Experiment(
    name="sharing",
    title="Sharing strategies",
    about=(
        "Recursive models without a router, of two and three recursions; all had the same training "
        "tokens (paper, table 10). A depth that the recursions do not divide is rounded up."
    ),
    equal="tokens",
    variants=lambda preset: [
        Variant("dense", None),
        *(
            Variant(
                f"{sharing}, {count}",
                {"num_recursions": count, "router": None, "sharing": sharing},
            )
            for count in (2, 3)
            for sharing in _SHARINGS
        ),
    ],
    claims=tuple(
        Claim(
            f"Middle-cycle has a lower loss than {other.replace('_', '-')}, {count} recursions.",
            (f"middle_cycle, {count}", _LOSS),
            (f"{other}, {count}", _LOSS),
        )
        for count in (2, 3)
        for other in ("cycle", "sequence", "middle_sequence")
    ),
)


def _isoflop_name(kind: str, size: str, budget: int) -> str:
    return f"{kind}, {size}, budget {budget + 1}"


def _isoflop_variants(preset: Preset) -> list[Variant]:
    kinds: dict[str, dict[str, Any] | None] = {"dense": None}
    kinds |= {f"recursive-{r}": {"num_recursions": r, "router": None} for r in (2, 3, 4)}
    kinds |= {f"MoR-{r}": {"num_recursions": r} for r in (2, 3, 4)}
    return [
        Variant(_isoflop_name(kind, size.name, budget), options, number, budget)
        for number, size in enumerate(preset.sizes)
        for budget in range(len(preset.flops))
        for kind, options in kinds.items()
    ]


_ISOFLOP = Experiment(
    name="isoflop",
    title="IsoFLOP: dense, recursive and MoR",
    about=(
        "Every model of a size and a budget had the same training FLOPs (paper, section 4.1 and "
        "table 9)."
    ),
    equal="FLOPs",
    variants=_isoflop_variants,
    claims=tuple(
        Claim(
            f"MoR-3 has a lower loss than {other} at the largest budget ({size}).",
            (_isoflop_name("MoR-3", size, 2), _LOSS),
            (_isoflop_name(other, size, 2), _LOSS),
        )
        for size in ("s32", "d64", "d96", "d128", "135m", "360m", "730m", "1.7b")
        for other in ("recursive-3", "dense")
    ),
)

_CAPACITIES = {
    "1, 2/3, 1/3": None,
    "1, 1/2, 1/4": (1.0, 1 / 2, 1 / 4),
    "1, 1/2, 1/2": (1.0, 1 / 2, 1 / 2),
    "2/3, 2/3, 2/3": (2 / 3, 2 / 3, 2 / 3),
    "1, 1, 1": (1.0, 1.0, 1.0),
}


def _capacity_variants(preset: Preset) -> list[Variant]:
    variants = [
        Variant(name, {"num_recursions": 3, "capacities": capacities})
        for name, capacities in _CAPACITIES.items()
    ]
    steps = round(preset.warmup_share * preset.tokens / preset.seq_len / preset.rows_per_step)
    forwards = max(1, steps)
    warmed = {"num_recursions": 3, "capacity_warmup_steps": forwards}
    return [*variants, Variant("1, 2/3, 1/3, warmed up", warmed)]


_CAPACITY = Experiment(
    name="capacity",
    title="Capacity schedules",
    about=(
        "Expert-choice models of three recursions that differ in the share of the tokens of each "
        "recursion, and one whose capacities decrease from 1 during the learning rate's warm-up; "
        "all had the same training tokens, so their FLOPs differ."
    ),
    equal="tokens",
    variants=_capacity_variants,
    claims=(
        Claim(
            "The default capacities have a lower loss without their warm-up (router ablation).",
            ("1, 2/3, 1/3", _LOSS),
            ("1, 2/3, 1/3, warmed up", _LOSS),
        ),
    ),
    measure=measure_leak,
)

EXPERIMENTS = {one.name: one for one in (_LEAK, _KV, _SHARING, _ISOFLOP, _CAPACITY)}
