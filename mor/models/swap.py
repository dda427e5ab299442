"""mor.swap: replaces a range of decoder layers of a loaded model by one routed, shared block."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mor.models.attention import check_attention
from mor.models.modeling_mor import batch_share
from mor.models.routed_layers import RoutedLayers
from mor.modules.routers import RouterScore

__all__ = ["load_swapped", "swap"]

_COEFFICIENTS = {"aux_loss": 0.001, "balancing_loss": 0.1, "z_loss": 1e-5}


def swap(
    model: PreTrainedModel,
    layers: int | range | tuple[int, int],
    num_recursions: int,
    router: str = "expert",
    *,
    loss_coefficients: dict[str, float] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Replaces decoder layers of a loaded model, in place, by a Mixture-of-Recursions block.

    Of a range, which stays as deep as before when unrolled, the first (last - first) / R layers are
    kept and used up to R times. One layer, given by its index, is kept and used up to R times: the
    model becomes R - 1 layers deeper for the tokens that go all the way.

    Args:
        model: a causal language model of the Llama family (`model.model.layers`).
        layers: range, or (first, one after the last), or the index of one layer.
        num_recursions: R; divides the number of layers of a range.
        router: "expert" or "token".
        loss_coefficients: weights of the router's losses in `output.loss`; default 0.001 for
            "aux_loss", 0.1 for "balancing_loss".
        **options: of `mor.modules.ExpertChoice` or `TokenChoice`; `score` also as a dict of
            `RouterScore`'s fields.

    Returns:
        The same model. It trains (the router's losses are part of `output.loss`), generates, and
        saves with `save_pretrained`; `mor.load_swapped` loads it.

    Raises:
        ValueError: layers outside the model, a count that R does not divide, a model without the
            expected structure.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4,
        ...     num_hidden_layers=8, vocab_size=64)
        >>> model = swap(LlamaForCausalLM(config), (1, 7), num_recursions=3)
        >>> len(model.model.layers)
        3
    """
    stack = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(stack, nn.ModuleList):
        raise ValueError(f"swap: expected a model with model.layers, got {type(model).__name__}")
    span = _span(layers)
    if span.step != 1 or not 0 <= span.start < span.stop <= len(stack):
        raise ValueError(
            f"swap: expected the index of a layer below {len(stack)}, or (first, end) with "
            f"0 <= first < end <= {len(stack)}, got {layers}"
        )
    if num_recursions < 1:
        raise ValueError(f"swap: expected num_recursions of at least 1, got {num_recursions}")
    slots, kept = list(span), list(stack[span.start : span.stop])
    if isinstance(layers, int):
        slots += range(len(stack), len(stack) + num_recursions - 1)
    elif len(span) % num_recursions:
        raise ValueError(
            f"swap: {num_recursions} recursions must divide the {len(span)} layers of {span}; one "
            f"layer to be used again and again is given by its index, as in layers={span.start}"
        )
    else:
        kept = kept[: len(span) // num_recursions]
    if any(isinstance(layer, RoutedLayers) for layer in stack):
        raise ValueError("swap: the model has routed layers already")
    coefficients = {**_COEFFICIENTS, **(loss_coefficients or {})}
    if len(coefficients) > len(_COEFFICIENTS):
        raise ValueError(
            f"swap: loss_coefficients: expected names among {list(_COEFFICIENTS)}, got "
            f"{list(loss_coefficients or {})}"
        )
    check_attention(model.config, "swap")
    kinds = sorted(set(getattr(model.config, "layer_types", None) or ()))
    if len(kinds) > 1:  # the model would hand the layers behind the block another kind's masks
        raise ValueError(f"swap: expected layers of one attention type, got {kinds}; see MoRConfig")
    score = options.get("score")
    if isinstance(score, RouterScore):
        options["score"] = asdict(score)
    made = {**options, **({"score": RouterScore(**options["score"])} if score else {})}
    routed = RoutedLayers(kept, model.config, slots, num_recursions, router, **made)
    routed.to(device=model.device, dtype=model.dtype)
    model.model.layers = nn.ModuleList([*stack[: span.start], routed, *stack[span.stop :]])
    model.config.mor_swap = {
        "layers": layers if isinstance(layers, int) else [span.start, span.stop],
        "num_recursions": num_recursions,
        "router": router,
        "loss_coefficients": loss_coefficients,
        **options,
    }

    def add_losses(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        loss = getattr(output, "loss", None)
        if loss is None or routed.routing is None:
            return output
        labels, items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
        share = 1.0 if labels is None else batch_share(labels, items)
        for name, coefficient in coefficients.items():
            part = getattr(routed.routing, name)
            if part is not None:
                loss = loss + coefficient * share * part
        output.loss = loss
        return output

    model.register_forward_hook(add_losses, with_kwargs=True)
    return model


def _span(layers: Any) -> range:
    if isinstance(layers, int):
        return range(layers, layers + 1)
    if isinstance(layers, range):
        return layers
    if isinstance(layers, Sequence) and [type(bound) for bound in layers] == [int, int]:
        return range(layers[0], layers[1])
    raise ValueError(
        "swap: expected layers to be a range, (first, one after the last) or the index of one "
        f"layer, got {layers!r}"
    )


def load_swapped(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Loads a model that was swapped and saved with `save_pretrained`, in evaluation mode.

    Args:
        path: the directory.
        **kwargs: passed to `AutoModelForCausalLM.from_config` (dtype, ...).

    Raises:
        ValueError: a directory of a model that was not swapped.
    """
    config = AutoConfig.from_pretrained(path)
    options = dict(getattr(config, "mor_swap", None) or {})
    if not options:
        raise ValueError(f"load_swapped: {path} holds no swapped model (no mor_swap in its config)")
    model = swap(AutoModelForCausalLM.from_config(config, **kwargs), **options)
    weights: dict[str, Tensor] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        weights |= load_file(file)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(model.all_tied_weights_keys)
    if unexpected or set(missing) - tied:
        raise ValueError(
            f"load_swapped: {path} does not fit its config: missing {sorted(set(missing) - tied)}, "
            f"unexpected {unexpected}"
        )
    model.tie_weights()
    return model.eval()
