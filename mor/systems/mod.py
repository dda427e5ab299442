"""Mixture-of-Depths on a loaded model: every other layer takes one token in eight."""

from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel

from mor.models.swap.swap import check_swappable, put_in
from mor.modules.routers import RouterScore
from mor.schedules import Schedule
from mor.systems.ratios import layer_ratios

__all__ = ["apply_mod"]


def apply_mod(
    model: PreTrainedModel,
    capacity: float | Schedule = 0.125,
    every: int = 2,
    *,
    loss_coefficients: dict[str, float] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Makes layers of a loaded decoder Mixture-of-Depths layers, in place.

    Each routes on its own, as `mor.modules.MixtureOfDepths` does, and keeps keys and values of the
    tokens that took it alone. Evaluation and generation are causal.

    Args:
        model: a causal language model of one of the architectures that `mor.swap` takes; it stays
            in the mode it is in.
        capacity: share of the tokens that take a routed layer, or a `mor.schedules.Schedule` of one
            ratio for each layer, in which layers of ratio 1 stay as they are.
        every: of a number: the layers every - 1, 2 * every - 1, ... are routed.
        loss_coefficients: weights of the router's losses in `output.loss`; default 0.001 for
            "aux_loss", which is the sum over the layers.
        **options: of `ExpertChoice`, as `MixtureOfDepths` takes them; `score` also as a dict.

    Returns:
        The same model. It trains, generates and saves; `mor.load_swapped` loads it, and
        `mor.remove` takes the routing off. `output.token_depths` counts the routed layers that each
        token took, and `output.routing` has a step for each of them.

    Raises:
        ValueError: an architecture, a capacity or an option that it does not take; the model is
            left as it was.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4,
        ...     num_hidden_layers=4, vocab_size=64)
        >>> model = apply_mod(LlamaForCausalLM(config))
        >>> [type(layer).__name__ for layer in model.model.layers[:2]]
        ['LlamaDecoderLayer', 'RoutedLayers']

    Reference: Raposo et al., Mixture-of-Depths (arXiv 2404.02258).
    """
    check_swappable(model, "apply_mod")
    num_layers = model.config.num_hidden_layers
    schedule = layer_ratios("apply_mod", "capacity", capacity, every, num_layers)
    if isinstance(options.get("score"), RouterScore):
        options["score"] = asdict(options["score"])
    settings = {
        "system": "mod",
        "ratios": list(schedule),
        "loss_coefficients": loss_coefficients,
        **options,
    }
    return put_in(model, settings)
