"""DynaMoE: a mixture of experts in which a gate decides how many experts each token takes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import register_dataclass
from torch.nn import functional

from mor.modules.expert_gates import ExpertGate
from mor.modules.experts import Experts
from mor.modules.recursion import LastRouting
from mor.ops.gather_tokens import gather_tokens
from mor.ops.group_rows import group_rows
from mor.ops.segment_reduce import segment_reduce

__all__ = ["DynaMoE", "ExpertRouting", "expert_balancing_loss"]


@dataclass
class ExpertRouting:
    """Which experts the tokens of one call took.

    Attributes:
        gates: [N, E] float32, softmax of the router's logits; differentiable.
        active: [N, E] bool, the experts that each token takes.
        weights: [N, E] float32 mixing weights: 0 where inactive, rows add up to 1.
        balancing_loss: see `expert_balancing_loss`.
    """

    gates: Tensor
    active: Tensor
    weights: Tensor
    balancing_loss: Tensor


# FSDP2 finds the tensors of an output by torch's pytrees, and torch.export returns them so.
register_dataclass(ExpertRouting, serialized_type_name="mor.ExpertRouting")


def expert_balancing_loss(gates: Tensor, active: Tensor, is_token: Tensor | None = None) -> Tensor:
    """Balances experts: E * sum of f_e * P_e; 1 where all are used alike.

    f_e is the share of all (token, active expert) pairs that expert e has, P_e its mean gate.

    Args:
        gates: [N, E], differentiable.
        active: [N, E] bool.
        is_token: [N] bool; pads, where it is False, do not count.

    Reference: ours, after Switch Transformers (equation 4); DynaMoE itself is trained without.
    """
    pairs = active.to(gates.dtype)
    tokens: int | Tensor = max(gates.shape[0], 1)
    if is_token is not None:
        kept = is_token.to(gates.dtype)
        tokens = kept.sum().clamp(min=1)
        gates, pairs = gates * kept[:, None], pairs * kept[:, None]
    counts = pairs.sum(dim=0)
    shares = counts / counts.sum().clamp(min=1)
    means = gates.sum(dim=0) / tokens
    return gates.shape[1] * (shares * means).sum()


class DynaMoE(nn.Module):
    """A mixture of experts whose gate decides which experts each token takes, and how many.

    With g the gate's softmax and A the experts that a token takes (see `ExpertGate`), it becomes
    the sum over A of w_e * expert_e(x), w the softmax of g over A. There is no residual stream
    inside and no capacity: no token is dropped.

    Args:
        hidden_size: the width D.
        intermediate_size: F, of each expert.
        num_experts: the number E.
        second_softmax: mix by the softmax of g over A, as the paper; False: by g / sum of g over A.
        gated, bias, activation: of `Experts`.
        **options: of `ExpertGate`: `gate`, `threshold`, `min_k`, `max_k`, `noise`, `temperature`,
            `std`. The default gate is "mass"; the published one is "row_quantile".

    Attributes:
        gate, experts: the parts.
        routing: the `ExpertRouting` of this thread's last call; add a multiple of its
            `balancing_loss` to the loss if the experts are to be used alike.
        num_active_experts: [B, S] (the shape of the input without D) int64 of that call.

    Raises:
        ValueError: an option with a value it does not take.

    Example:
        >>> layer = DynaMoE(8, 16, num_experts=4)
        >>> layer(torch.randn(2, 6, 8)).shape
        torch.Size([2, 6, 8])
        >>> layer.num_active_experts.shape
        torch.Size([2, 6])

    Reference: DynaMoE (arXiv 2603.01697). What the second softmax is taken of is our reading.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        second_softmax: bool = True,
        gated: bool = False,
        bias: bool = False,
        activation: Callable[[Tensor], Tensor] = functional.gelu,
        **options: Any,
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_experts = hidden_size, num_experts
        self.second_softmax = second_softmax
        self.gate = ExpertGate(hidden_size, num_experts, **options)
        self.experts = Experts(
            num_experts, hidden_size, intermediate_size, gated=gated, bias=bias,
            activation=activation,
        )  # fmt: skip
        self._last = LastRouting()

    @property
    def routing(self) -> ExpertRouting | None:
        """The `ExpertRouting` of this thread's last call."""
        return self._last.output

    @property
    def num_active_experts(self) -> Tensor | None:
        """[B, S] int64: how many experts each token of this thread's last call took."""
        return self._last.token_depths

    def forward(self, hidden: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Mixes the experts.

        Args:
            hidden: [B, S, D], or of other leading dimensions.
            token_mask: [B, S], non-zero at tokens. Pads take no expert, become 0, and count
                neither for the batch's quantile nor for the balancing loss.

        Returns:
            Of the shape of hidden.

        Raises:
            ValueError: hidden states of another width, a token_mask of another shape.
            RuntimeError: NaN among the router's logits (on the CPU).
        """
        if hidden.dim() < 2 or hidden.shape[-1] != self.hidden_size:
            raise ValueError(
                f"DynaMoE: expected hidden of shape [B, S, {self.hidden_size}], got "
                f"{list(hidden.shape)}"
            )
        is_token = None
        if token_mask is not None:
            if token_mask.shape != hidden.shape[:-1]:
                raise ValueError(
                    f"DynaMoE: token_mask: expected shape {list(hidden.shape[:-1])}, got "
                    f"{list(token_mask.shape)}"
                )
            is_token = token_mask.reshape(-1) != 0
        x = hidden.reshape(-1, self.hidden_size)
        # Where the size of a result may depend on data nothing is filled in.
        exact = x.device.type == "cpu" and not torch.compiler.is_compiling()
        gates, rows = self.gate(x, is_token, exact)
        real = rows if exact else torch.where(rows < 0, gates.numel(), rows)  # one place more
        active = torch.zeros(gates.numel() + 1, dtype=torch.bool, device=x.device)
        active = active.index_fill(0, real, True)[:-1].view_as(gates)
        shares = (gates.exp() if self.second_softmax else gates) * active
        tiny = torch.finfo(shares.dtype).tiny
        weights = shares / shares.sum(dim=-1, keepdim=True).clamp(min=tiny)
        self._last.output = ExpertRouting(
            gates, active, weights, expert_balancing_loss(gates, active, is_token)
        )
        self._last.token_depths = active.sum(dim=-1).view(hidden.shape[:-1])
        return self._mix(x, rows, weights, exact).view(hidden.shape)

    def _mix(self, x: Tensor, rows: Tensor, weights: Tensor, exact: bool) -> Tensor:
        """Sum over a token's experts of their weighted outputs; x [N, D] to [N, D]."""
        num_tokens, num_experts = weights.shape
        # What is filled in gets a key of its own, and so comes after the rows of all experts.
        key = (
            rows % num_experts if exact else torch.where(rows < 0, num_experts, rows % num_experts)
        )
        order, offsets = group_rows(key, num_experts + 1)
        rows = gather_tokens(rows, order)
        is_filled = None if exact else rows < 0
        rows = rows.clamp(min=0)
        tokens = rows // num_experts
        pair_weights = gather_tokens(weights.reshape(-1), rows)
        inputs = gather_tokens(x, tokens)
        if is_filled is None:
            outputs = self.experts(inputs, offsets[:-1])
        else:  # no expert reads or writes these rows: they must reach neither a sum nor a gradient
            inputs = inputs.masked_fill(is_filled.unsqueeze(1), 0)
            outputs = self.experts(inputs, offsets[:-1]).masked_fill(is_filled.unsqueeze(1), 0)
            pair_weights = pair_weights.masked_fill(is_filled, 0)
        return segment_reduce(outputs, tokens, num_tokens, "sum", pair_weights)
