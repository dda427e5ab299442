"""MoRConfig: a dense model's configuration plus how its depth is shared and routed.

Over 300 lines in one file: most of them describe the options and check them.
"""

import copy
import math
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from mor.models.schedule import SHARINGS, Schedule
from mor.modules.recursion import check_capacities
from mor.modules.routers import GATINGS, ROUTER_TYPES, SCORE_FUNCTIONS

__all__ = ["ARCHITECTURES", "MoRConfig"]

#: Dense architectures whose models are nothing but embedding, layers, norm and head: others scale
#: embeddings or logits in places a recursion would skip (Gemma 3's embedding module scales itself).
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
KV_STRATEGIES = ("recursion", "shared", "hybrid")
#: What Transformers itself adds to configurations, though they have no such field.
_OF_SAVED_FILES = ("auto_map", "quantization_config")


@strict
class MoRConfig(PreTrainedConfig):
    """Configuration of `MoRModel` and `MoRForCausalLM`.

    Attributes that are not its own (`hidden_size`, `vocab_size`, ...) are those of `base_config`;
    `num_hidden_layers` is the unrolled depth L.

    Args:
        base_config: configuration of the dense model of the same unrolled depth, an object or a
            dict with `model_type` (default Llama); its decoder layers are used. None is
            `LlamaConfig()`, which has 32 layers of width 4096.
        num_recursions: R, how often the shared block can run.
        sharing: "middle_cycle" (own first and last layer, the (L - 2) / R layers between cycle; the
            paper's choice for MoR), "cycle", "middle_sequence" or "sequence" (paper, table 1). The
            sequence strategies have no recursion step a token could exit after, so no router.
        router: "expert" (each recursion picks its tokens), "token" (each token picks its depth) or
            None (every token takes all recursions).
        kv_strategy: "recursion": at recursion r a token sees only keys of tokens active at r.
            "shared": later uses of a layer attend over the keys and values its first use computed
            for all tokens, and compute none. "hybrid": as shared, but active tokens overwrite
            their own keys and values with fresh ones (paper, section 2.2.2).
        capacities: expert-choice, share of the tokens that recursion r takes, non-increasing, in
            (0, 1]; default (R - r) / R.
        router_type: "linear", "mlp" (hidden size 2D), "wide_mlp" (4D), or "random", uniform scores
            (the ablation's baseline; the router's losses are left out).
        router_func: "sigmoid", "tanh", "softmax" (token-choice only) or "none"; default sigmoid for
            expert-choice, softmax for token-choice.
        router_alpha: factor on the score; default 1 for softmax, else 0.1. With residual gating it
            is what makes the gate of an untrained router 1: 2 for sigmoid, R for softmax.
        router_temperature: the router reads hidden / temperature.
        router_gating: "weighted" (the paper's), "additive" (no gate) or "residual",
            `H + g (f(H) - H)`: not in the paper, but with it a converted model starts as the
            recursive model without router for the tokens it takes.
        router_aux: expert-choice, how causal routing is learnt: "loss", "router" or None.
        router_aux_coef: weight of that loss.
        router_balancing: token-choice: "loss", "loss_free" or None.
        router_balance_coef: weight of the balancing loss.
        router_bias_update_rate: u of loss-free balancing.
        router_z_coef: weight of the z-loss; 0 leaves it out.
        capacity_warmup_steps: expert-choice, training forwards in which capacities decrease from 1.
        balance_warmup_steps: token-choice, training forwards in which all tokens go all the way.
        relaxation: "lora" or "dora" gives every use of a shared layer its own low-rank adapter (by
            peft) and norms; None shares layers entirely.
        relaxation_rank: rank of the adapters.
        relaxation_alpha: factor on them, over the rank; default twice the rank.
        relaxation_targets: names of the linear layers that get one ("q_proj", ...); default all.
        recursion_encoding: multiplies the output of every recursion's block (sequence strategies:
            of every use of a layer) by a learnt vector of its own, which starts at ones.
        train_routing: expert-choice in training: "topk" (the paper's), or "threshold", as in
            evaluation: causal, and what trainers need that compare a model in training with one in
            evaluation (DPO, KTO).
        eval_routing: expert-choice in evaluation: "threshold" (causal) or "topk", which looks at
            later tokens and exists to reproduce published numbers.

    Raises:
        ValueError: a name that is no option, an option outside its values, a depth the recursions
            do not divide, capacities that increase or are outside (0, 1]; the message names the
            option.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = MoRConfig(base_config=LlamaConfig(num_hidden_layers=8), num_recursions=3)
        >>> config.layer_schedule
        [0, 1, 2, 1, 2, 1, 2, 3]
    """

    model_type = "mor"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "lm_loss",
        "aux_loss",
        "z_loss",
        "balancing_loss",
        "token_depths",
        "router_loss",
        "routing",
    ]
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "base_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")
    }

    base_config: Any = None
    num_recursions: int = 3
    sharing: str = "middle_cycle"
    router: str | None = "expert"
    kv_strategy: str = "recursion"
    capacities: list[float | int] | tuple[float | int, ...] | None = None
    router_type: str = "linear"
    router_func: str | None = None
    router_alpha: float | int | None = None
    router_temperature: float | int = 1.0
    router_gating: str = "weighted"
    router_aux: str | None = "loss"
    router_aux_coef: float | int = 0.001
    router_balancing: str | None = "loss"
    router_balance_coef: float | int = 0.1
    router_bias_update_rate: float | int = 0.001
    router_z_coef: float | int = 0.0
    capacity_warmup_steps: int = 0
    balance_warmup_steps: int = 0
    relaxation: str | None = None
    relaxation_rank: int = 16
    relaxation_alpha: float | int | None = None
    relaxation_targets: list[str] | tuple[str, ...] | None = None
    recursion_encoding: bool = False
    train_routing: str = "topk"
    eval_routing: str = "threshold"

    def __post_init__(self, **kwargs: Any) -> None:
        """Fills the defaults that depend on other options, then checks everything."""
        if isinstance(self.base_config, PreTrainedConfig):
            # Transformers writes to sub-configs; the caller's dense model may still use this one.
            self.base_config = copy.deepcopy(self.base_config)
        elif not isinstance(self.base_config, dict | None):
            raise ValueError(
                "MoRConfig.base_config: expected the configuration of a dense model, an object "
                f"such as LlamaConfig(...) or a dict with model_type, got {self.base_config!r}; "
                "AutoConfig.from_pretrained(NAME) reads that of a saved model"
            )
        self._refuse_misspelt(kwargs)
        super().__post_init__(**kwargs)
        self._refuse_unknown(kwargs)
        if self.router_func is None:
            learnt = "softmax" if self.router == "token" else "sigmoid"
            self.router_func = "none" if self.router_type == "random" else learnt
        if self.router_alpha is None:
            if self.router_gating == "residual":
                even = {"softmax": float(self.num_recursions), "sigmoid": 2.0}
                self.router_alpha = even.get(self.router_func, 1.0)
            else:
                self.router_alpha = 1.0 if self.router_func == "softmax" else 0.1
        if self.relaxation_alpha is None:
            self.relaxation_alpha = 2.0 * self.relaxation_rank
        self._check_options()
        if self.router == "expert":
            self.capacities = check_capacities(self.capacities, self.num_recursions)
            if self.kv_strategy != "recursion" and self.capacities[0] != 1:
                raise ValueError(
                    f"MoRConfig.capacities: kv_strategy {self.kv_strategy} needs every token at "
                    f"the first recursion (capacity 1), got {self.capacities}"
                )

    def __getattr__(self, name: str) -> Any:
        """Attributes of the dense model: hidden_size, vocab_size, rms_norm_eps, ..."""
        base = self.__dict__.get("base_config")
        if name.startswith("_") or not isinstance(base, PreTrainedConfig):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What the dense model's configuration owns is written there: one value, one place."""
        base = self.__dict__.get("base_config")
        owned = isinstance(base, PreTrainedConfig) and hasattr(base, name)
        if owned and not name.startswith("_") and not hasattr(type(self), name):
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def layer_types(self) -> list[str]:
        """Cache layer type of every unrolled layer."""
        return ["mor_recursion"] * self.num_hidden_layers

    @property
    def _rope_type_labels(self) -> list[str] | None:
        """By what Transformers recognises rotary parameters that differ between layer types."""
        return getattr(self.base_config, "layer_types", None)

    @property
    def schedule(self) -> Schedule:
        """Which layer runs at which unrolled depth, as the options say now."""
        return Schedule.of_model(
            self.num_hidden_layers, self.num_recursions, self.sharing, self.kv_strategy
        )

    @property
    def block_depth(self) -> int:
        """b, layers of the shared block (or, for the sequence strategies, of the repeated part)."""
        return self.schedule.block_depth

    @property
    def num_unique_layers(self) -> int:
        """Layers that have their own weights."""
        return self.schedule.num_unique_layers

    @property
    def layer_schedule(self) -> list[int]:
        """The unique layer used at each unrolled depth (paper, table 1)."""
        return list(self.schedule.layers)

    @property
    def layer_uses(self) -> list[int]:
        """How many earlier depths used the layer of each unrolled depth."""
        return list(self.schedule.uses)

    @property
    def encoded_depths(self) -> list[int]:
        """Unrolled depths whose output a recursion encoding multiplies: where a block ends."""
        return list(self.schedule.encoded_depths)

    def validate_layer_type(self) -> None:
        """The cache layers are mor's own, which Transformers' list does not know."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Refuse a configuration of another kind, which Transformers would fill with defaults."""
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(
                f"MoRConfig: expected a configuration of model_type {cls.model_type!r}, got "
                f"{kind!r}; MoRForCausalLM.from_dense converts a dense model"
            )
        return super().from_dict(config_dict, **kwargs)

    def _refuse_misspelt(self, others: dict[str, Any]) -> None:
        """Transformers takes any name; one that is nearly an option was meant to be it."""
        own = [
            field.name for field in fields(type(self)) if field.name in MoRConfig.__annotations__
        ]
        for name in others:
            if f"router_{name}" in own:  # as the command line calls some of them
                meant = f"router_{name}"
            elif name.startswith("router_") or get_close_matches(name, own, n=1, cutoff=0.75):
                meant = get_close_matches(name, own, n=1, cutoff=0)[0]
            else:
                continue
            raise ValueError(f"MoRConfig: no option {name!r}; did you mean {meant!r}?")

    def _refuse_unknown(self, others: dict[str, Any]) -> None:
        """Refuses names that neither MoR, Transformers nor the dense model's configuration has.

        What Transformers wrote says its version, and may carry what other tools left in it.
        """
        if self.transformers_version is not None:
            return
        own = vars(self)  # what the dense model's configuration has is there, not here
        for name in others:
            if name in own and not hasattr(type(self), name) and name not in _OF_SAVED_FILES:
                raise ValueError(
                    f"MoRConfig: no option {name!r}, and {type(self.base_config).__name__} has "
                    "none of that name either; an attribute of your own is set afterwards, "
                    f"config.{name} = ..."
                )

    def _check_options(self) -> None:
        if self.base_config.model_type not in ARCHITECTURES:
            raise ValueError(
                f"MoRConfig.base_config: expected an architecture of {ARCHITECTURES}, got "
                f"{self.base_config.model_type!r}"
            )
        base = self.base_config
        head_dim = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
        if head_dim > 256:
            raise ValueError(
                f"MoRConfig.base_config: expected heads of at most 256 dimensions, got {head_dim} "
                f"(hidden_size {base.hidden_size}): give more than {base.num_attention_heads} heads"
            )
        options = {
            "sharing": SHARINGS,
            "router": ("expert", "token", None),
            "kv_strategy": KV_STRATEGIES,
            "router_type": ROUTER_TYPES,
            "router_func": SCORE_FUNCTIONS,
            "router_gating": GATINGS,
            "router_aux": ("loss", "router", None),
            "router_balancing": ("loss", "loss_free", None),
            "relaxation": ("lora", "dora", None),
            "train_routing": ("topk", "threshold"),
            "eval_routing": ("threshold", "topk"),
        }
        for name, allowed in options.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"MoRConfig.{name}: expected one of {allowed}, got {value!r}")
        if self.num_recursions < 1:
            raise ValueError(
                f"MoRConfig.num_recursions: expected at least 1, got {self.num_recursions}"
            )
        if self.router is not None and not self.schedule.in_cycles:
            raise ValueError(
                f"MoRConfig.sharing: {self.sharing} has no recursion step after which a token "
                "could exit; use cycle or middle_cycle with a router, or router=None"
            )
        if self.router != "expert" and self.capacities is not None:
            raise ValueError(
                f"MoRConfig.capacities: only expert-choice has capacities, got {self.capacities} "
                f"with router {self.router!r}"
            )
        depth = self.num_hidden_layers
        shared = depth - 2 * self.schedule.num_ends
        if shared < self.num_recursions or shared % self.num_recursions:
            raise ValueError(
                f"MoRConfig.num_recursions: {self.num_recursions} recursions must divide the "
                f"{shared} layers that {self.sharing} shares (base_config has "
                f"num_hidden_layers = {depth})"
            )
        if (self.relaxation or self.recursion_encoding) and self.num_recursions == 1:
            raise ValueError(
                "MoRConfig.relaxation, recursion_encoding: one recursion uses every layer once; "
                "there is nothing to relax"
            )
        if self.relaxation_rank < 1:
            raise ValueError(
                f"MoRConfig.relaxation_rank: expected at least 1, got {self.relaxation_rank}"
            )
        for name in ("router_alpha", "router_temperature", "relaxation_alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"MoRConfig.{name}: expected a positive number, got {getattr(self, name)}"
                )
        for name in (
            "router_aux_coef",
            "router_balance_coef",
            "router_bias_update_rate",
            "router_z_coef",
            "capacity_warmup_steps",
            "balance_warmup_steps",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"MoRConfig.{name}: expected at least 0, got {getattr(self, name)}"
                )
        trained = {"expert": self.router_aux, "token": self.router_balancing}.get(self.router or "")
        if (
            self.router is not None
            and self.router_type != "random"
            and self.router_gating == "additive"
            and trained != "loss"
            and self.router_z_coef == 0
        ):
            raise ValueError(
                "MoRConfig.router_gating: with additive gating nothing would train the router; use "
                "weighted or residual gating, or router_aux (token-choice: router_balancing) "
                '"loss"'
            )
        if self.router_type == "random" and self.router_func != "none":
            raise ValueError(
                f"MoRConfig.router_func: random scores are used as they are, got {self.router_func}"
            )
        if self.router == "expert" and self.router_func == "softmax":
            raise ValueError("MoRConfig.router_func: softmax needs token-choice routing")
