"""The earlier place of what stands before a dense class, by which pickles of it are read."""

from mor.models.swap.swapped_model import _SwappedDecoder, _SwappedModel

__all__ = ["_SwappedDecoder", "_SwappedModel"]
