"""Schedules over layers: the share of the tokens each layer keeps, or how many it merges."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mor._extras import extra

__all__ = [
    "Schedule",
    "constant",
    "cosine",
    "interleave",
    "linear",
    "shifted_cosine",
    "token_removals",
]

RATIO, COUNT = "share of the tokens", "tokens merged"
_DPI = 150


@dataclass(frozen=True)
class Schedule:
    """One value for every layer, first to last. A list of ratios is a schedule: `Schedule(list)`.

    Attributes:
        values: one for each layer; ratios lie in (0, 1], counts are at least 0.
        name: how the values were made.
        unit: "share of the tokens" for ratios, "tokens merged" for counts.

    Raises:
        ValueError: no values, a ratio outside (0, 1], a negative count or an unknown unit.

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
        if self.unit not in (RATIO, COUNT):
            raise ValueError(f"Schedule: unit: expected {RATIO!r} or {COUNT!r}, got {self.unit!r}")
        for layer, value in enumerate(self.values):
            if self.unit == RATIO and not 0 < value <= 1:
                raise ValueError(
                    f"Schedule: values: expected ratios in (0, 1], got {value} for layer {layer}"
                )
            if self.unit == COUNT and not (value >= 0 and value == int(value)):
                raise ValueError(
                    f"Schedule: values: expected integers from 0, got {value} for layer {layer}"
                )

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[float]:
        return iter(self.values)

    def __getitem__(self, layer: int) -> float:
        return self.values[layer]

    @property
    def budget(self) -> float:
        """Sum over the layers: in full layers for ratios, in tokens for counts."""
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
