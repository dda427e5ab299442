"""MixtureOfDepths: a layer that only some tokens of each sequence take."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from mor.modules.mixture_of_recursions import MixtureOfRecursions
from mor.modules.routers import RouterScore

__all__ = ["MixtureOfDepths", "depth_options"]


class MixtureOfDepths(MixtureOfRecursions):
    """Wraps a layer so that a router picks the tokens of each sequence that go through it.

    `x <- x + w * f(x)` for the picked tokens, w the router's logit and f what the layer adds to its
    residual stream; the others keep their state. Picked tokens attend to each other alone, at their
    own positions. It is one recursion of `MixtureOfRecursions`, which says how arguments of the
    layer are cut to its tokens.

    In training, k = max(1, int(capacity * S)) tokens of every sequence of S tokens are picked:
    exactly k, those with the largest logits. That looks at later tokens, so in evaluation a token
    is picked if its logit is above 0, which the auxiliary loss (`routing.aux_loss`) trains; or with
    `aux="router"` if that of a predictor is, trained beside the router on detached states.

    Args:
        layer: the module to wrap: hidden states [B, S, D] in and out, its residual stream inside.
        hidden_size: the width D.
        capacity: share of the tokens, in (0, 1].
        arguments: layouts of the layer's arguments, see `MixtureOfRecursions`.
        **options: of `ExpertChoice`, but for its capacities and gating; the default `score` is the
            logit itself.

    Attributes:
        routing: the `RecursionOutput` of this thread's last call; add `routing.aux_loss`, times a
            coefficient, to the loss.
        token_depths: [B, S] 1 where a token took the layer in this thread's last call, else 0.

    Raises:
        ValueError: an option that there is not, or a value that it does not take.

    Example:
        >>> import torch
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> mixture = MixtureOfDepths(layer, 8, capacity=0.5)
        >>> mixture(torch.randn(2, 6, 8)).shape
        torch.Size([2, 6, 8])
        >>> mixture.token_depths.sum(dim=1)
        tensor([3, 3])

    Reference: Raposo et al., Mixture-of-Depths (arXiv 2404.02258), section 3.
    """

    def __init__(
        self,
        layer: nn.Module,
        hidden_size: int,
        capacity: float = 0.125,
        *,
        arguments: Mapping[str | int, str] | None = None,
        **options: Any,
    ) -> None:
        options = depth_options("MixtureOfDepths", capacity, options)
        super().__init__(layer, hidden_size, 1, "expert", arguments=arguments, **options)


def depth_options(where: str, capacity: float, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `ExpertChoice` for a Mixture-of-Depths layer.

    Args:
        where: begins the errors.
        capacity: share of the tokens.
        options: what the user gave besides.

    Raises:
        ValueError: a capacity outside (0, 1], or an option that would make it another method.
    """
    if not isinstance(capacity, int | float) or not 0 < capacity <= 1:
        raise ValueError(f"{where}: capacity: expected a share in (0, 1], got {capacity!r}")
    for name in ("capacities", "gating"):
        if name in options:
            raise ValueError(
                f"{where}: {name}: a Mixture-of-Depths layer has one capacity and keeps its "
                "residual stream; MixtureOfRecursions has other forms"
            )
    score = RouterScore("none", 1.0)
    return {"score": score, **options, "capacities": [capacity], "gating": "residual"}
