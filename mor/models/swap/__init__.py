"""mor.swap: decoder layers of a loaded model replaced by one routed, shared block."""

from mor.models.swap.swap import SWAPPABLE, load_swapped, swap

__all__ = ["SWAPPABLE", "load_swapped", "swap"]
