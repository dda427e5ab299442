"""Dense model to MoR: which of its layers start each unique layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mor.models.configuration_mor import MoRConfig
from mor.models.relaxation import shared_part, start_as_shared, start_from_dense

__all__ = ["INITIALISATIONS", "dense_depths", "initialise_from_dense", "source_layers"]

INITIALISATIONS = ("stepwise", "average", "lower", "upper", "random")


def source_layers(
    config: MoRConfig, num_dense_layers: int, init: str = "stepwise", seed: int = 0
) -> list[list[int]]:
    """The dense layers each unique layer starts from; several are averaged.

    Args:
        config: the MoR configuration.
        num_dense_layers: layers of the dense model; it may differ from the unrolled depth.
        init: "stepwise" (evenly spaced), "lower" (the first), "upper" (the last), "random" (sorted)
            or "average" (all layers at the depths that share the unique layer). With own first and
            last layers (middle sharing) those are copied, and the rest chosen from between.
        seed: of "random".

    Returns:
        One list of dense layer indices per unique layer.

    Raises:
        ValueError: an unknown init, or a dense model with fewer layers than are needed.

    Reference: MoR paper, appendix (initialisation, after Relaxed Recursive Transformers).
    """
    if init not in INITIALISATIONS:
        raise ValueError(f"from_dense: expected init to be one of {INITIALISATIONS}, got {init!r}")
    ends = config.schedule.num_ends
    wanted = config.num_unique_layers - 2 * ends
    first, last = ends, num_dense_layers - 1 - ends
    available = last - first + 1
    if available < wanted:
        raise ValueError(
            f"from_dense: {config.num_unique_layers} unique layers need a dense model of at least "
            f"as many, got {num_dense_layers}"
        )
    if init == "average":
        middle = _sharing_depths(config, num_dense_layers)
    elif init == "lower":
        middle = [[first + i] for i in range(wanted)]
    elif init == "upper":
        middle = [[last - wanted + 1 + i] for i in range(wanted)]
    elif init == "random":
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(available, generator=generator)[:wanted].sort().values
        middle = [[first + int(i)] for i in chosen]
    else:
        steps = torch.linspace(first, last, wanted, dtype=torch.float64).round()
        middle = [[int(i)] for i in steps]
    if not ends:
        return middle
    return [[0], *middle, [num_dense_layers - 1]]


def _sharing_depths(config: MoRConfig, num_dense_layers: int) -> list[list[int]]:
    """Dense layers at the depths of each shared unique layer, ends left out."""
    schedule = config.schedule
    dense = dense_depths(config, num_dense_layers)
    layers = sorted({schedule.layers[depth] for depth in schedule.shared_depths})
    return [sorted({dense[depth] for depth in schedule.depths_of(layer)}) for layer in layers]


def dense_depths(config: MoRConfig, num_dense_layers: int) -> list[int]:
    """The dense layer at each unrolled depth: stretched over it, where the depths differ."""
    ends = config.schedule.num_ends
    middle = config.num_hidden_layers - 2 * ends
    stretch = (num_dense_layers - 1 - 2 * ends) / max(middle - 1, 1)
    between = [ends + round(i * stretch) for i in range(middle)]
    return [0, *between, num_dense_layers - 1] if ends else between


def initialise_from_dense(
    model: Any, dense: Any, sources: Sequence[Sequence[int]], svd_start: bool = True
) -> None:
    """Copies embedding, norm, head and layers of a dense causal language model into a MoR one.

    Args:
        model: a `MoRForCausalLM`.
        dense: the dense model, of the architecture of `model.config.base_config`.
        sources: see `source_layers`.
        svd_start: of a relaxed model: the adapters start at what the dense layers are more than the
            shared ones, not at zero.
    """
    inner = dense.model
    with torch.no_grad():
        _copy(model.model.embed_tokens, inner.embed_tokens)
        _copy(model.model.norm, inner.norm)
        if not model.config.tie_word_embeddings:
            _copy(model.lm_head, dense.lm_head)
        for layer, indices in zip(model.model.layers, sources, strict=True):
            for name, module in inner.layers[indices[0]].named_modules():
                states = [inner.layers[i].get_submodule(name).state_dict() for i in indices]
                if next(module.parameters(False), None) is not None:
                    mean = {key: _mean([s[key] for s in states]) for key in states[0]}
                    shared_part(layer.get_submodule(name)).load_state_dict(mean)
        if model.config.relaxation is None:
            return
        if svd_start:
            depths = dense_depths(model.config, len(inner.layers))
            start_from_dense(model.model.layers, inner.layers, model.config, depths)
        else:
            start_as_shared(model.model.layers)


def _copy(target: nn.Module, source: nn.Module) -> None:
    target.load_state_dict(source.state_dict())


def _mean(tensors: list[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0]
    return torch.stack([t.float() for t in tensors]).mean(0).to(tensors[0].dtype)
