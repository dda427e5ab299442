"""PyPI's `mixture-of-depth` 1.2.0, a Mixture-of-Depths layer to compare with, where installed.

Its package imports what today's Transformers lacks, so the one file with the layer is loaded alone:
`pip install --no-deps mixture-of-depth` is enough.
"""

import importlib.util
from pathlib import Path
from typing import Any

from torch import Tensor, nn

__all__ = ["WithAngles", "published_layer"]


def published_layer() -> Any:
    """The class `MoD(capacity, block)`; None where the package is not installed."""
    found = importlib.util.find_spec("MoD")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).with_name("MoD.py")
    spec = importlib.util.spec_from_file_location("published_mod_layer", path)
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MoD


class WithAngles(nn.Module):
    """A decoder layer as of 2024, which that package calls: it finds the angles of its positions.

    Args:
        layer: of today's Transformers.
        rotary: its model's rotary embedding.
        hidden_size: D.
    """

    def __init__(self, layer: nn.Module, rotary: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.layer, self.rotary, self.hidden_size = layer, rotary, hidden_size

    def forward(self, x: Tensor, position_ids: Tensor, **kwargs: Any) -> tuple[Tensor]:
        """[1, K, D] to a tuple of [1, K, D]."""
        return (self.layer(x, position_embeddings=self.rotary(x, position_ids)),)
