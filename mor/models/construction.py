"""The parts a MoR model is made of: the dense architecture's own modules, and the router."""

import copy
from typing import Any

from transformers import MODEL_MAPPING

from mor.models.attention import check_attention
from mor.models.configuration_mor import MoRConfig
from mor.modules.expert_choice import ExpertChoice
from mor.modules.routers import RouterScore
from mor.modules.token_choice import TokenChoice

__all__ = ["ARCHITECTURES", "base_model", "recursion"]

#: Dense architectures whose models are nothing but embedding, layers, norm and head: others scale
#: embeddings or logits in places a recursion would skip.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


def base_model(config: MoRConfig) -> Any:
    """The dense architecture with only the unique layers, its attention served by mor."""
    base = copy.deepcopy(config.base_config)
    if base.model_type not in ARCHITECTURES:
        raise ValueError(
            f"MoRConfig.base_config: expected an architecture of {ARCHITECTURES}, got "
            f"{base.model_type!r}"
        )
    check_attention(base, "MoRConfig.base_config")
    types = getattr(base, "layer_types", None)
    base.num_hidden_layers = config.num_unique_layers
    if types is not None:
        first_use = [config.layer_schedule.index(layer) for layer in range(base.num_hidden_layers)]
        base.layer_types = [types[depth] for depth in first_use]
    base._attn_implementation = "mor"
    return MODEL_MAPPING[type(base)](base)


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
