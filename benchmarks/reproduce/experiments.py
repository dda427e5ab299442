"""The experiments: what each trains, measures and claims.

Over 300 lines in one file, because it is one list.
"""

from typing import Any

from benchmarks.reproduce.design import LOSS, Claim, Experiment, Variant
from benchmarks.reproduce.measures import (
    compare_times,
    measure_depths,
    measure_leak,
    measure_memory,
    measure_routing,
    measure_scaling,
)
from benchmarks.reproduce.presets import PRESETS, Preset
from mor.models.schedule import SHARINGS

__all__ = ["EXPERIMENTS"]

_LEAK_VARIANTS = [
    Variant("dense", None),
    Variant("MoR-3, auxiliary loss", {"num_recursions": 3}),
    Variant("MoR-3, auxiliary router", {"num_recursions": 3, "router_aux": "router"}),
]
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
    variants=lambda preset: _LEAK_VARIANTS,
    claims=(
        Claim(
            "Top-k evaluation has a lower loss than causal evaluation (auxiliary loss).",
            ("MoR-3, auxiliary loss", "topk_loss"),
            ("MoR-3, auxiliary loss", LOSS),
        ),
        Claim(
            "Evaluated by top-k, MoR-3 has a lower loss than the dense model of equal FLOPs.",
            ("MoR-3, auxiliary loss", "topk_loss"),
            ("dense", LOSS),
        ),
        Claim(
            "Evaluated causally, MoR-3 has a lower loss than the dense model of equal FLOPs.",
            ("MoR-3, auxiliary loss", LOSS),
            ("dense", LOSS),
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
            ("expert-choice, recursion", LOSS),
            ("expert-choice, shared", LOSS),
        ),
        Claim(
            "Token-choice has a lower loss with sharing than with recursion-wise caching.",
            ("token-choice, shared", LOSS),
            ("token-choice, recursion", LOSS),
        ),
    ),
)

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
            for sharing in SHARINGS
        ),
    ],
    claims=tuple(
        Claim(
            f"Middle-cycle has a lower loss than {other.replace('_', '-')}, {count} recursions.",
            (f"middle_cycle, {count}", LOSS),
            (f"{other}, {count}", LOSS),
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
            (_isoflop_name("MoR-3", size, 2), LOSS),
            (_isoflop_name(other, size, 2), LOSS),
        )
        for size in (size.name for preset in PRESETS.values() for size in preset.sizes)
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
    warmed = {"num_recursions": 3, "capacity_warmup_steps": max(1, steps)}
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
            ("1, 2/3, 1/3", LOSS),
            ("1, 2/3, 1/3, warmed up", LOSS),
        ),
    ),
    measure=measure_leak,
)

_LESS = {
    "fewer FLOPs": "train_flops",
    "less training time": "seconds",
    "less memory": "memory_mib",
}
_COST = Experiment(
    name="cost",
    title="Cost at equal tokens",
    about=(
        "A dense, a recursive and two expert-choice models of equal training tokens, trained in "
        "turns. `seconds` is the time in training steps at the median speed of the turns; "
        "`memory_mib` is what a step holds when its forward ends: weights, gradients, AdamW's "
        "moments, and the tensors kept for the backward of one batch. The paper says that MoR-2 "
        "needs 25% fewer FLOPs, 19% less time and 25% less memory than the dense model (table 3)."
    ),
    equal="tokens",
    variants=lambda preset: [
        Variant("dense", None),
        Variant("recursive-3", {"num_recursions": 3, "router": None}),
        *(Variant(f"MoR-{count}", {"num_recursions": count}) for count in (2, 3)),
    ],
    claims=(
        *(
            Claim(
                f"MoR-2 needs {less} than the dense model.",
                ("MoR-2", key),
                ("dense", key),
                relative=True,
            )
            for less, key in _LESS.items()
        ),
        Claim("MoR-2 has a lower loss than the dense model.", ("MoR-2", LOSS), ("dense", LOSS)),
    ),
    measure=measure_memory,
    compare=compare_times,
    timed=True,
)

_WALL_TIME = Experiment(
    name="wall_time",
    title="Loss against wall time",
    about=(
        "The trainings of `leak`, which had the same training FLOPs, against the clock. `seconds` "
        "is the time in training steps at the median speed of the turns; `loss_at_equal_time` is "
        "the loss at the time when the fastest training had ended, interpolated between "
        "evaluations. Only the fastest one has had its whole learning-rate decay by then."
    ),
    equal="FLOPs",
    variants=lambda preset: _LEAK_VARIANTS,
    claims=(
        Claim(
            "MoR-3 needs less time than the dense model for the same training FLOPs.",
            ("MoR-3, auxiliary loss", "seconds"),
            ("dense", "seconds"),
            relative=True,
        ),
        Claim(
            "MoR-3 has a lower loss than the dense model after the same time.",
            ("MoR-3, auxiliary loss", "loss_at_equal_time"),
            ("dense", "loss_at_equal_time"),
        ),
    ),
    compare=compare_times,
    timed=True,
)

_ROUTER_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "expert": {
        "chosen": {},
        "random": {"router_type": "random"},
        "auxiliary router": {"router_aux": "router"},
        "MLP": {"router_type": "mlp"},
        "tanh": {"router_func": "tanh"},
        "alpha 1": {"router_alpha": 1.0},
        "z-loss": {"router_z_coef": 1e-3},
    },
    "token": {
        "chosen": {},
        "random": {"router_type": "random"},
        "loss-free": {"router_balancing": "loss_free"},
        "MLP": {"router_type": "mlp"},
        "sigmoid": {"router_func": "sigmoid"},
    },
}
_ROUTER = Experiment(
    name="router",
    title="Router ablations",
    about=(
        "Models of three recursions that differ from the chosen router in one option; all had the "
        "same training tokens (paper, router ablations). The chosen expert-choice router is linear "
        "with a sigmoid, alpha 0.1 and the auxiliary loss; the chosen token-choice router is "
        "linear with a softmax and the balancing loss. Routing is that of the held-out rows: "
        "`recursions` is the mean of a token, `dead_tokens` the share of positions that never "
        "reach the last recursion, `entropy` that of the mean selection probabilities, `max_vio` "
        "the excess of the largest load over the mean load."
    ),
    equal="tokens",
    variants=lambda preset: [
        Variant(f"{router}, {name}", {"num_recursions": 3, "router": router, **options})
        for router, ablations in _ROUTER_OPTIONS.items()
        for name, options in ablations.items()
    ],
    claims=(
        *(
            Claim(
                f"{router.capitalize()}-choice has a lower loss as chosen than with {other}.",
                (f"{router}, chosen", LOSS),
                (f"{router}, {name}", LOSS),
            )
            for router, name, other in (
                ("expert", "random", "random selection"),
                ("expert", "auxiliary router", "an auxiliary router"),
                ("expert", "MLP", "an MLP router"),
                ("expert", "tanh", "tanh scores"),
                ("expert", "alpha 1", "alpha 1"),
                ("expert", "z-loss", "a z-loss"),
                ("token", "random", "random selection"),
                ("token", "MLP", "an MLP router"),
                ("token", "sigmoid", "sigmoid scores"),
            )
        ),
        Claim(
            "Token-choice has a lower loss with loss-free balancing than as chosen.",
            ("token, loss-free", LOSS),
            ("token, chosen", LOSS),
        ),
        Claim(
            "Token-choice has a lower MaxVio as chosen than with loss-free balancing.",
            ("token, chosen", "max_vio"),
            ("token, loss-free", "max_vio"),
        ),
        Claim(
            "Expert-choice has a lower loss than token-choice, both as chosen.",
            ("expert, chosen", LOSS),
            ("token, chosen", LOSS),
        ),
    ),
    measure=measure_routing,
)

_DEPTH = Experiment(
    name="depth",
    title="What depth is spent on",
    about=(
        "The two chosen routers of `router`, on the held-out rows: `depth_word` is the mean "
        "recursions of tokens of letters and digits, and `depth_space`, `depth_number` and "
        "`depth_punctuation` those of the other classes."
    ),
    equal="tokens",
    variants=lambda preset: [
        Variant(f"{router}-choice", {"num_recursions": 3, "router": router})
        for router in _ROUTER_OPTIONS
    ],
    claims=(
        *(
            Claim(
                f"{router.capitalize()}-choice spends fewer recursions on punctuation than on "
                "words (figure 1).",
                (f"{router}-choice", "depth_punctuation"),
                (f"{router}-choice", "depth_word"),
            )
            for router in _ROUTER_OPTIONS
        ),
    ),
    measure=measure_depths,
)

_SCALING = Experiment(
    name="scaling",
    title="Test-time scaling with depth",
    about=(
        "Expert-choice models of equal training tokens, evaluated with their first recursions "
        "only: `loss_after_1` is the loss where every token stops after at most one (paper, figure "
        "5c)."
    ),
    equal="tokens",
    variants=lambda preset: [
        Variant(f"MoR-{count}", {"num_recursions": count}) for count in (2, 3, 4)
    ],
    claims=tuple(
        Claim(
            f"MoR-{count} has a lower loss after {more} recursions than after {more - 1}.",
            (f"MoR-{count}", f"loss_after_{more}"),
            (f"MoR-{count}", f"loss_after_{more - 1}"),
        )
        for count in (2, 3, 4)
        for more in range(2, count + 1)
    ),
    measure=measure_scaling,
)

#: The timed ones come first: what they train may serve others, not the other way round.
EXPERIMENTS = {
    one.name: one
    for one in (
        _LEAK,
        _WALL_TIME,
        _COST,
        _KV,
        _SHARING,
        _ROUTER,
        _DEPTH,
        _SCALING,
        _CAPACITY,
        _ISOFLOP,
    )
}
