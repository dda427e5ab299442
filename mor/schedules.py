"""Schedules over layers: the share of the tokens kept, the tokens merged, or the experts of each.

Over 300 lines: one value, and every way to make it that papers publish.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mor._extras import extra

__all__ = [
    "EXPERT_SCHEDULES",
    "Schedule",
    "constant",
    "cosine",
    "expert_schedule",
    "interleave",
    "linear",
    "shifted_cosine",
    "token_removals",
]

RATIO, COUNT, EXPERTS = "share of the tokens", "tokens merged", "experts"
_DPI = 150

#: From the place of a layer, 0 at the first to 1 at the last, to a share of the range [low, high].
_EXPERT_SHAPES: dict[str, Callable[[float], float]] = {
    "descending": lambda t: 1 - t,
    "ascending": lambda t: t,
    "pyramid": lambda t: 1 - abs(2 * t - 1),
    "valley": lambda t: abs(2 * t - 1),
    "wave": lambda t: (1 + math.sin(2 * math.pi * t)) / 2,
    "uniform": lambda t: 0.5,
}

EXPERT_SCHEDULES = tuple(_EXPERT_SHAPES)


@dataclass(frozen=True)
class Schedule:
    """One value for every layer, first to last. A list of ratios is a schedule: `Schedule(list)`.

    Attributes:
        values: one for each layer; ratios lie in (0, 1], tokens merged are at least 0, experts at
            least 1.
        name: how the values were made.
        unit: "share of the tokens" for ratios, "tokens merged" or "experts" for counts.

    Raises:
        ValueError: no values, a ratio outside (0, 1], a count that is too small or no integer, an
            unknown unit.

    Example:
        >>> print(shifted_cosine(8, average=0.5))
        shifted_cosine(average=0.5, lowest=0.15, highest=0.85), share of the tokens
        layer 0: 1
        layer 1: 1
        layer 2: 0.812
        layer 3: 0.611
        layer 4: 0.389
        layer 5: 0.188
        layer 6: 0.15
        layer 7: 0.15
        mean 0.5375, budget 4.3
    """

    values: tuple[float, ...]
    name: str = "list"
    unit: str = RATIO

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))
        if not self.values:
            raise ValueError("Schedule: values: expected one for each layer, got none")
        if self.unit not in (RATIO, COUNT, EXPERTS):
            raise ValueError(
                f"Schedule: unit: expected {RATIO!r}, {COUNT!r} or {EXPERTS!r}, got {self.unit!r}"
            )
        least = int(self.unit == EXPERTS)
        for layer, value in enumerate(self.values):
            if self.unit == RATIO and not 0 < value <= 1:
                raise ValueError(
                    f"Schedule: values: expected ratios in (0, 1], got {value} for layer {layer}"
                )
            if self.unit != RATIO and not (value >= least and value == int(value)):
                raise ValueError(
                    f"Schedule: values: expected integers from {least}, got {value} for layer "
                    f"{layer}"
                )

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[float]:
        return iter(self.values)

    def __getitem__(self, layer: int) -> float:
        return self.values[layer]

    @property
    def budget(self) -> float:
        """Sum over the layers: in full layers for ratios, else in tokens merged or in experts."""
        return math.fsum(self.values)

    @property
    def mean(self) -> float:
        """Budget per layer: for ratios the share of a dense model's layers, keys and values."""
        return self.budget / len(self.values)

    def clamped(self, lowest: float, highest: float) -> "Schedule":
        """Ratios of at least `lowest`, in which a layer above `highest` keeps every token."""
        if not 0 < lowest <= highest <= 1:
            raise ValueError(
                f"Schedule: clamped: expected 0 < lowest <= highest <= 1, got {lowest}, {highest}"
            )
        return Schedule(_clamp(self.values, lowest, highest), self.name, self.unit)

    def __str__(self) -> str:
        lines = [f"{self.name}, {self.unit}"]
        lines += [f"layer {layer}: {value:.3g}" for layer, value in enumerate(self.values)]
        return "\n".join([*lines, f"mean {self.mean:.6g}, budget {self.budget:.6g}"])

    def plot(self, path: str | Path) -> None:
        """Draws the value of every layer and the mean.

        Args:
            path: the file; its ending chooses the format.

        Raises:
            ImportError: matplotlib is missing; the extra "plots" brings it.
        """
        with extra("plots"):
            from matplotlib.figure import Figure
        figure = Figure(figsize=(6, 3), layout="constrained")
        axes = figure.subplots()
        axes.bar(range(len(self)), self.values, color="#4477aa")
        axes.axhline(self.mean, color="#222222", linestyle="--", label=f"mean {self.mean:.4g}")
        axes.set(xlabel="layer", ylabel=self.unit, title=self.name)
        axes.legend()
        figure.savefig(path, dpi=_DPI)


def constant(num_layers: int, ratio: float) -> Schedule:
    """The same ratio in every layer."""
    return _of_layers(num_layers, f"constant({ratio:g})", lambda _: ratio)


def linear(num_layers: int, first: float, last: float) -> Schedule:
    """Ratios on a line from `first` to `last`; both are reached."""

    def ratio(layer: int) -> float:
        t = layer / max(num_layers - 1, 1)
        return first * (1 - t) + last * t

    return _of_layers(num_layers, f"linear({first:g}, {last:g})", ratio)


def cosine(num_layers: int, first: float, last: float) -> Schedule:
    """Ratios on half a cosine from `first` to `last`; both are reached."""

    def ratio(layer: int) -> float:
        t = (1 - _cosine(num_layers, layer)) / 2
        return first * (1 - t) + last * t

    return _of_layers(num_layers, f"cosine({first:g}, {last:g})", ratio)


def shifted_cosine(
    num_layers: int, average: float = 0.5, lowest: float = 0.15, highest: float = 0.85
) -> Schedule:
    """Progressive ratio decay: `cos(pi * l / (L - 1)) / 2 + average`, clamped.

    Args:
        num_layers: the number L.
        average: what the cosine is shifted by, the mean before clamping.
        lowest: smaller ratios become this one.
        highest: a layer with a larger ratio keeps every token.

    Raises:
        ValueError: no layers, or bounds that are not 0 < lowest <= highest <= 1.

    Reference: p-MoD (arXiv 2412.04449), progressive ratio decay; the defaults are its published
        setting, whose mean is 0.5375 for 32 layers.
    """
    name = f"shifted_cosine(average={average:g}, lowest={lowest:g}, highest={highest:g})"
    if not 0 < lowest <= highest <= 1:
        raise ValueError(
            f"shifted_cosine: expected 0 < lowest <= highest <= 1, got lowest={lowest}, "
            f"highest={highest}"
        )
    raw = [_cosine(num_layers, layer) / 2 + average for layer in range(num_layers)]
    return Schedule(_clamp(raw, lowest, highest), name)


def interleave(num_layers: int, ratio: float, every: int = 2, offset: int = 1) -> Schedule:
    """`ratio` in the layers `offset`, `offset + every`, ...; every token in the others.

    Raises:
        ValueError: every below 1, or an offset outside the first `every` layers.

    Reference: Mixture-of-Depths (arXiv 2404.02258): every other layer, ratio 0.125.
    """
    if every < 1 or not 0 <= offset < every:
        raise ValueError(
            "interleave: expected every of at least 1 and 0 <= offset < every, got "
            f"every={every}, offset={offset}"
        )
    return _of_layers(
        num_layers,
        f"interleave({ratio:g}, every={every}, offset={offset})",
        lambda layer: ratio if layer % every == offset else 1.0,
    )


def token_removals(num_layers: int, r: int, inflect: float = 0.0) -> Schedule:
    """Tokens that each layer merges, on a line through the mean r.

    Args:
        num_layers: number of layers.
        r: tokens merged per layer, on average before rounding down.
        inflect: 0 merges r in every layer, -1 begins with 2 r and ends with 0, 1 the reverse.

    Raises:
        ValueError: r below 0, or inflect outside [-1, 1].

    Reference: ToMe (arXiv 2210.09461), its `(r, inflect)` schedules.
    """
    if r < 0 or not -1 <= inflect <= 1:
        raise ValueError(
            f"token_removals: expected r >= 0 and inflect in [-1, 1], got r={r}, inflect={inflect}"
        )
    first = int(r * (1 - inflect))
    slope = (2 * r - 2 * first) / max(num_layers - 1, 1)
    return _of_layers(
        num_layers,
        f"token_removals({r}, inflect={inflect:g})",
        lambda layer: int(first + slope * layer),
        COUNT,
    )


def expert_schedule(
    kind: str, num_layers: int, low: int = 1, high: int = 8, *, total: int | None = None
) -> Schedule:
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
        >>> expert_schedule("descending", 4, 1, 7).values
        (7, 5, 3, 1)
        >>> expert_schedule("uniform", 4, total=18).values
        (5, 5, 4, 4)
    """
    if kind not in _EXPERT_SHAPES:
        raise ValueError(f"expert_schedule: kind: expected one of {EXPERT_SCHEDULES}, got {kind!r}")
    if num_layers < 1:
        raise ValueError(f"expert_schedule: num_layers: expected at least 1, got {num_layers}")
    if not 1 <= low <= high:
        raise ValueError(
            f"expert_schedule: low, high: expected 1 <= low <= high, got {low} and {high}"
        )
    places = [layer / max(num_layers - 1, 1) for layer in range(num_layers)]
    wanted = [low + (high - low) * _EXPERT_SHAPES[kind](t) for t in places]
    if total is None:
        counts = [max(1, math.floor(value + 0.5)) for value in wanted]
        return Schedule(tuple(counts), f"{kind}({low}, {high})", EXPERTS)
    if total < num_layers:
        raise ValueError(
            "expert_schedule: total: expected at least one expert for each of the "
            f"{num_layers} layers, got {total}"
        )
    counts = _shared(total, wanted)
    return Schedule(tuple(counts), f"{kind}({low}, {high}, total={total})", EXPERTS)


def _shared(total: int, wanted: Sequence[float]) -> list[int]:
    """Integers of at least 1 with this sum, in about these proportions."""
    # One for every layer; of the rest each gets its share, and the largest remainders one more.
    rest = total - len(wanted)
    weights = [max(total * value / sum(wanted) - 1, 0.0) for value in wanted]
    weights = weights if sum(weights) else [1.0] * len(wanted)
    shares = [rest * weight / sum(weights) for weight in weights]
    # Shares that differ by rounding alone are equal; of equal remainders the earlier layer's wins.
    counts = [math.floor(share + 1e-9) for share in shares]
    order = sorted(range(len(wanted)), key=lambda i: -round(shares[i] - counts[i], 9))
    for i in order[: rest - sum(counts)]:
        counts[i] += 1
    return [1 + count for count in counts]


def _of_layers(
    num_layers: int, name: str, value: Callable[[int], float], unit: str = RATIO
) -> Schedule:
    return Schedule(tuple(value(layer) for layer in range(num_layers)), name, unit)


def _cosine(num_layers: int, layer: int) -> float:
    """cos(pi * l / (L - 1)), as a sine: layers at equal distance from the middle cancel exactly."""
    last = max(num_layers - 1, 1)
    return math.sin(math.pi * (last - 2 * layer) / (2 * last))


def _clamp(ratios: Sequence[float], lowest: float, highest: float) -> tuple[float, ...]:
    return tuple(1.0 if ratio > highest else max(ratio, lowest) for ratio in ratios)
