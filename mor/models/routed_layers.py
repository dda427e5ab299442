"""The earlier place of `RoutedLayers`, by which pickles of swapped models find it."""

from mor.models.swap.routed_layers import RoutedLayers, SwapCall

__all__ = ["RoutedLayers", "SwapCall"]
