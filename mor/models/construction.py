"""The parts a MoR model is made of: the dense architecture's own modules, and the router."""

import copy
from typing import Any

from transformers import MODEL_MAPPING

from mor.models.configuration_mor import MoRConfig
from mor.modules.expert_choice import ExpertChoice
from mor.modules.routers import RouterScore
from mor.modules.token_choice import TokenChoice

__all__ = ["base_model", "recursion"]


def base_model(config: MoRConfig) -> Any:
    """The dense architecture with only the unique layers, its attention served by mor."""
    base = copy.deepcopy(config.base_config)
    types = getattr(base, "layer_types", None)
    base.num_hidden_layers = config.num_unique_layers
    if types is not None:
        first_use = [config.layer_schedule.index(layer) for layer in range(base.num_hidden_layers)]
        base.layer_types = [types[depth] for depth in first_use]
        if any(kind != "full_attention" for kind in base.layer_types):
            raise ValueError(
                f"MoRConfig.base_config: only full attention layers are supported, got {types}"
            )
    base._attn_implementation = "mor"
    if type(base) not in MODEL_MAPPING:
        raise ValueError(f"MoRConfig.base_config: no model is known for {type(base).__name__}")
    model = MODEL_MAPPING[type(base)](base)
    for name in ("embed_tokens", "layers", "norm", "rotary_emb"):
        if not hasattr(model, name):
            raise ValueError(
                f"MoRConfig.base_config: {type(model).__name__} has no {name}; expected a decoder "
                "of the Llama family"
            )
    return model


def recursion(config: MoRConfig) -> ExpertChoice | TokenChoice | None:
    """The routed middle of the model; None where every token takes every recursion."""
    if config.router is None:
        return None
    assert config.router_func is not None and config.router_alpha is not None
    score = RouterScore(config.router_func, config.router_alpha)
    common: dict[str, Any] = {
        "router_type": config.router_type,
        "temperature": config.router_temperature,
        "std": config.initializer_range,
        "score": score,
        "gating": config.router_gating,
        "use_z_loss": config.router_z_coef != 0,
    }
    if config.router == "expert":
        return ExpertChoice(
            config.hidden_size,
            config.num_recursions,
            capacities=config.capacities,
            aux=config.router_aux,
            eval_routing=config.eval_routing,
            capacity_warmup_steps=config.capacity_warmup_steps,
            **common,
        )
    return TokenChoice(
        config.hidden_size,
        config.num_recursions,
        balancing=config.router_balancing,
        bias_update_rate=config.router_bias_update_rate,
        balance_warmup_steps=config.balance_warmup_steps,
        **common,
    )
