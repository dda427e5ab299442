"""Ratios of the tokens that layers take, from a number or a schedule."""

from mor.schedules import RATIO, Schedule, interleave

__all__ = ["layer_ratios"]


def layer_ratios(
    where: str, option: str, value: float | Schedule, every: int, num_layers: int
) -> Schedule:
    """A ratio for each layer, some below 1.

    Args:
        where: begins the errors.
        option: the name of `value`.
        value: a ratio for every `every`-th layer, or one for each layer.
        every: of a number: the layers every - 1, 2 * every - 1, ... have it.
        num_layers: of the model.

    Raises:
        ValueError: anything else, naming the option.
    """
    if isinstance(value, Schedule):
        if every != 2:
            raise ValueError(f"{where}: every: a Schedule names its layers, got every={every}")
        if len(value) != num_layers:
            raise ValueError(
                f"{where}: {option}: expected a ratio for each of the {num_layers} layers, got "
                f"{len(value)}"
            )
        if value.unit != RATIO:
            raise ValueError(f"{where}: {option}: expected ratios, got {value.name}, {value.unit}")
        schedule = value
    else:
        if isinstance(every, bool) or not isinstance(every, int) or not 1 <= every <= num_layers:
            raise ValueError(
                f"{where}: every: expected 1 to {num_layers}, the number of layers, got {every}"
            )
        if not isinstance(value, int | float) or not 0 < value <= 1:
            raise ValueError(f"{where}: {option}: expected a share in (0, 1], got {value!r}")
        schedule = interleave(num_layers, value, every, every - 1)
    if min(schedule) == 1:
        raise ValueError(f"{where}: {option}: expected a ratio below 1, got 1 for every layer")
    return schedule
