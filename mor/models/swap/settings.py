"""What users ask of `swap` and its kin, as kept in a configuration: read and checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mor.modules.mixture_of_depths import depth_options

__all__ = ["Block", "blocks_of", "caller_of", "coefficients_of", "span_of"]

_COEFFICIENTS = {"aux_loss": 0.001, "balancing_loss": 0.1, "z_loss": 1e-5}


@dataclass(frozen=True)
class Block:
    """A routed block to be put into a dense model: `RoutedLayers` in place of `span`."""

    span: range
    kept: int
    slots: Sequence[int]
    num_recursions: int
    router: str
    options: Mapping[str, Any]


def blocks_of(num_layers: int, settings: dict[str, Any]) -> list[Block]:
    """The routed blocks that settings of `swap` or `apply_mod` describe, first to last.

    Raises:
        ValueError: layers that the model does not have; see `swap` and `apply_mod`.
    """
    if caller_of(settings) == "apply_mod":
        return _depth_blocks(num_layers, settings)
    return [_recursed_block(num_layers, settings)]


def caller_of(settings: Mapping[str, Any]) -> str:
    """The function that was given these settings; begins the errors."""
    system = settings.get("system")
    return "swap" if system is None else f"apply_{system}"


def coefficients_of(settings: dict[str, Any]) -> dict[str, float]:
    """Weights of the router's losses of a swapped model, defaults filled in."""
    given = settings.get("loss_coefficients") or {}
    if unknown := set(given) - set(_COEFFICIENTS):
        raise ValueError(
            f"{caller_of(settings)}: loss_coefficients: expected names among "
            f"{list(_COEFFICIENTS)}, got {sorted(unknown)}"
        )
    return {**_COEFFICIENTS, **given}


def span_of(layers: Any) -> range:
    """The layers that an argument `layers` of `swap` names."""
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


def _depth_blocks(num_layers: int, settings: dict[str, Any]) -> list[Block]:
    """One layer each, wherever the capacity is below 1."""
    options = {k: v for k, v in settings.items() if k not in ("system", "loss_coefficients")}
    ratios = options.pop("ratios")
    if len(ratios) != num_layers:
        raise ValueError(
            f"apply_mod: capacity: expected a ratio for each of the {num_layers} layers, got "
            f"{len(ratios)}"
        )
    return [
        Block(
            range(index, index + 1),
            1,
            [index],
            1,
            "expert",
            depth_options("apply_mod", ratio, options),
        )
        for index, ratio in enumerate(ratios)
        if ratio < 1
    ]


def _recursed_block(num_layers: int, settings: dict[str, Any]) -> Block:
    options = dict(settings)
    layers, num_recursions, router = (
        options.pop(name) for name in ("layers", "num_recursions", "router")
    )
    options.pop("loss_coefficients", None)
    span = span_of(layers)
    if not 0 <= span.start < span.stop <= num_layers:
        got = layers if isinstance(layers, int) else (span.start, span.stop)
        raise ValueError(
            f"swap: expected the index of a layer below {num_layers}, or (first, end) with "
            f"0 <= first < end <= {num_layers}, got {got}"
        )
    if num_recursions < 1:
        raise ValueError(f"swap: expected num_recursions of at least 1, got {num_recursions}")
    slots, kept = list(span), len(span)
    if isinstance(layers, int):
        slots += range(num_layers, num_layers + num_recursions - 1)
    elif len(span) % num_recursions:
        raise ValueError(
            f"swap: {num_recursions} recursions must divide the {len(span)} layers of {span}; one "
            f"layer to be used again and again is given by its index, as in layers={span.start}"
        )
    else:
        kept = len(span) // num_recursions
    return Block(span, kept, slots, num_recursions, router, options)
