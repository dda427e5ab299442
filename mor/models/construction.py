"""The parts a MoR model is made of: the dense architecture's own modules, and the router."""

import copy
from typing import Any

from torch import nn
from transformers import MODEL_MAPPING

from mor.models.attention import check_attention, layer_types_at
from mor.models.configuration_mor import MoRConfig
from mor.modules.expert_choice import ExpertChoice
from mor.modules.routers import RouterScore
from mor.modules.token_choice import TokenChoice

__all__ = ["base_model", "initialise", "recursion"]


def base_model(config: MoRConfig) -> Any:
    """The dense architecture with only the unique layers, its attention served by mor."""
    base = copy.deepcopy(config.base_config)
    check_attention(base, "MoRConfig.base_config")
    types = _unique_layer_types(config)
    base.num_hidden_layers = config.num_unique_layers
    if types is not None:
        base.layer_types = types
    base._attn_implementation = "mor"
    return MODEL_MAPPING[type(base)](base)


def _unique_layer_types(config: MoRConfig) -> list[str] | None:
    """Attention type of each unique layer: the one of all unrolled depths that use it."""
    option, schedule = "MoRConfig.base_config", config.schedule
    types = layer_types_at(config.base_config, len(schedule.layers), option)
    if types is None:
        return None
    found = []
    for unique in range(schedule.num_unique_layers):
        depths = schedule.depths_of(unique)
        used_as = [types[depth] for depth in depths]
        if len(set(used_as)) > 1:
            raise ValueError(
                f"{option}: depths {' and '.join(map(str, depths))} share a layer but differ in "
                f"attention type, got {used_as}; use a num_recursions (now "
                f"{config.num_recursions}) or sharing (now {config.sharing}) that fits the "
                "pattern, or set base_config.layer_types"
            )
        found.append(used_as[0])
    return found


def initialise(config: MoRConfig, module: nn.Module) -> None:
    """Starts a module as the dense architecture does (Gemma 3's norms start at 0, not 1)."""
    dense = MODEL_MAPPING[type(config.base_config)]
    # The method asks its model for nothing but the config, and building one would cost its memory.
    owner = dense.__new__(dense)
    owner.__dict__["config"] = config.base_config
    owner._init_weights(module)


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
            train_routing=config.train_routing,
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
