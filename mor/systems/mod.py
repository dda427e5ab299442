"""Mixture-of-Depths on a loaded model: every other layer takes one token in eight."""

from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel

from mor.models.swap.swap import check_swappable, put_in
from mor.modules.mixture_of_depths import depth_options
from mor.modules.routers import RouterScore
from mor.schedules import Schedule, interleave

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
    if isinstance(capacity, Schedule):
        if every != 2:
            raise ValueError(f"apply_mod: every: a Schedule names its layers, got every={every}")
        schedule = capacity
    else:
        if not isinstance(every, int) or not 1 <= every <= num_layers:
            raise ValueError(
                f"apply_mod: every: expected 1 to {num_layers}, the number of layers, got {every}"
            )
        depth_options("apply_mod", capacity, {})
        schedule = interleave(num_layers, capacity, every, every - 1)
    if min(schedule) == 1:
        raise ValueError("apply_mod: capacity: expected a ratio below 1, got 1 for every layer")
    if isinstance(options.get("score"), RouterScore):
        options["score"] = asdict(options["score"])
    settings = {
        "system": "mod",
        "ratios": list(schedule),
        "loss_coefficients": loss_coefficients,
        **options,
    }
    return put_in(model, settings)
