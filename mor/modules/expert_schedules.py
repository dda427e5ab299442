"""Expert schedules: how many experts each layer of a DynaMoE network has."""

import math
from collections.abc import Callable

__all__ = ["EXPERT_SCHEDULES", "expert_schedule"]

#: From the place of a layer, 0 at the first to 1 at the last, to a share of the range [low, high].
_SHAPES: dict[str, Callable[[float], float]] = {
    "descending": lambda t: 1 - t,
    "ascending": lambda t: t,
    "pyramid": lambda t: 1 - abs(2 * t - 1),
    "valley": lambda t: abs(2 * t - 1),
    "wave": lambda t: (1 + math.sin(2 * math.pi * t)) / 2,
    "uniform": lambda t: 0.5,
}

EXPERT_SCHEDULES = tuple(_SHAPES)


def expert_schedule(
    kind: str, num_layers: int, low: int = 1, high: int = 8, *, total: int | None = None
) -> tuple[int, ...]:
    """Number of experts of each layer: `max(1, round(low + (high - low) * f(t)))`.

    t runs from 0 at the first layer to 1 at the last, and f(t) is `1 - t` (descending), `t`
    (ascending), `1 - |2t - 1|` (pyramid), `|2t - 1|` (valley), `(1 + sin(2 pi t)) / 2` (wave) or
    `1/2` (uniform). The formulas are ours: the paper names descending, ascending, pyramid, wave and
    uniform schedules and one more, and we have not seen how it defines them.

    Args:
        kind: one of `EXPERT_SCHEDULES`.
        num_layers: the number L. The only layer of a network of one is the first.
        low: fewest experts, at least 1.
        high: most experts, at least `low`.
        total: experts of all layers together. Given, the layers share them in the proportions of
            low + (high - low) * f(t), each at least 1, so that schedules can be compared at equal
            size.

    Raises:
        ValueError: an unknown kind, no layer, a range that is none, fewer experts than layers.

    Reference: DynaMoE (arXiv 2603.01697), layer-wise expert schedules.

    Example:
        >>> expert_schedule("descending", 4, 1, 7)
        (7, 5, 3, 1)
        >>> expert_schedule("uniform", 4, total=18)
        (5, 5, 4, 4)
    """
    if kind not in _SHAPES:
        raise ValueError(f"kind: expected one of {EXPERT_SCHEDULES}, got {kind!r}")
    if num_layers < 1:
        raise ValueError(f"num_layers: expected at least 1, got {num_layers}")
    if not 1 <= low <= high:
        raise ValueError(f"low, high: expected 1 <= low <= high, got {low} and {high}")
    places = [layer / max(num_layers - 1, 1) for layer in range(num_layers)]
    wanted = [low + (high - low) * _SHAPES[kind](t) for t in places]
    if total is None:
        return tuple(max(1, math.floor(value + 0.5)) for value in wanted)
    if total < num_layers:
        raise ValueError(
            f"total: expected at least one expert for each of the {num_layers} layers, got {total}"
        )
    # One for every layer; of the rest each gets its share, and the largest remainders one more.
    spare = total - num_layers
    weights = [max(total * value / sum(wanted) - 1, 0.0) for value in wanted]
    weights = weights if sum(weights) else [1.0] * num_layers
    shares = [spare * weight / sum(weights) for weight in weights]
    # Shares that differ by rounding alone are equal; of equal remainders the earlier layer's wins.
    counts = [math.floor(share + 1e-9) for share in shares]
    order = sorted(range(num_layers), key=lambda i: -round(shares[i] - counts[i], 9))
    for i in order[: spare - sum(counts)]:
        counts[i] += 1
    return tuple(1 + count for count in counts)
