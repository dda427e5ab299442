"""Experts: MLPs of one shape as stacked weights, computed on rows that are sorted by expert."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Experts", "grouped_linear"]


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiplies the rows of each group by a matrix of their own.

    Where torch has a grouped matrix product for the dtype and the sizes, that is one call: on the
    CPU it took 0.4 to 1.3 of the time of a loop over the groups (forward and backward, 8 to 64
    experts). For bfloat16 on CUDA it does not wait for the device; torch's own product of other
    dtypes there does, and so does the loop, which float64 and rows that are no multiple of 16
    bytes take.

    Args:
        x: [N, D], sorted by group.
        weight: [G, F, D].
        offsets: [G + 1] int64, from 0; group g owns rows `offsets[g]` to `offsets[g + 1] - 1`.

    Returns:
        [N, F]. Rows past the last offset, which no group owns, are undefined.
    """
    if x.dtype == torch.bfloat16 and _is_aligned(x, weight.shape[1:]):
        return functional.grouped_mm(x, weight.transpose(1, 2), offs=offsets[1:].to(torch.int32))
    # torch's fake kernel takes bfloat16 alone, so that others would not compile.
    return _product(x, weight, offsets)


@torch.library.custom_op("mor_experts::product", mutates_args=())
def _product(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    if x.dtype != torch.float64 and _is_aligned(x, weight.shape[1:]):
        return functional.grouped_mm(x, weight.transpose(1, 2), offs=offsets[1:].to(torch.int32))
    bounds, out = offsets.tolist(), x.new_zeros(x.shape[0], weight.shape[1])
    for (begin, end), one in zip(pairwise(bounds), weight, strict=True):
        torch.mm(x[begin:end], one.T, out=out[begin:end])
    return out


@torch.library.custom_op("mor_experts::outer_product", mutates_args=())
def _outer_product(grad: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """[G, F, D] from grad [N, F] and x [N, D]: of each group the transposed grad times x."""
    if x.dtype != torch.float64 and _is_aligned(x, (grad.shape[1], x.shape[1])):
        return functional.grouped_mm(grad.T, x, offs=offsets[1:].to(torch.int32))
    bounds = offsets.tolist()
    out = x.new_zeros(len(bounds) - 1, grad.shape[1], x.shape[1])
    for (begin, end), one in zip(pairwise(bounds), out, strict=True):
        torch.mm(grad[begin:end].T, x[begin:end], out=one)
    return out


@_product.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_outer_product.register_fake
def _(grad: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0] - 1, grad.shape[1], x.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, offsets = ctx.saved_tensors
    grad = grad.contiguous()
    wants_x, wants_weight, _ = ctx.needs_input_grad
    return (
        _product(grad, weight.transpose(1, 2), offsets) if wants_x else None,
        _outer_product(grad, x, offsets) if wants_weight else None,
        None,
    )


_product.register_autograd(_backward, setup_context=_setup_context)


def _is_aligned(x: Tensor, sizes: Sequence[int]) -> bool:
    """Whether rows of these sizes are as torch's grouped product wants them."""
    return all(size * x.element_size() % 16 == 0 for size in sizes)


class Experts(nn.Module):
    """MLPs with weights in two stacks, of which each row takes one.

    `down(act(up(x)))`, or gated as in Llama, `down(act(gate(x)) * up(x))`.

    Args:
        num_experts: the number E.
        in_features: the width D.
        hidden_features: the inner width F.
        out_features: default D.
        gated: whether there is a gate.
        bias: whether the linear maps have biases.
        activation: applied to [K, F].

    Attributes:
        up_proj: [E, F, D], or [E, 2F, D] with the gate's F rows first.
        down_proj: [E, out_features, F].
        up_bias, down_bias: [E, F or 2F] and [E, out_features], or None.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        gated: bool = False,
        bias: bool = False,
        activation: Callable[[Tensor], Tensor] = functional.gelu,
    ) -> None:
        super().__init__()
        out_features = in_features if out_features is None else out_features
        self.num_experts, self.gated, self.activation = num_experts, gated, activation
        up = 2 * hidden_features if gated else hidden_features
        self.up_proj = nn.Parameter(torch.empty(num_experts, up, in_features))
        self.down_proj = nn.Parameter(torch.empty(num_experts, out_features, hidden_features))
        self.up_bias = nn.Parameter(torch.empty(num_experts, up)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(num_experts, out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises each expert as `nn.Linear` does: uniform in +-1 / sqrt(inputs)."""
        for weight, bias in ((self.up_proj, self.up_bias), (self.down_proj, self.down_bias)):
            bound = weight.shape[2] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Rows [K, D], sorted by expert, to [K, out_features].

        Args:
            x: [K, D].
            offsets: [E + 1] int64; expert e owns rows `offsets[e]` to `offsets[e + 1] - 1`. Rows
                past the last are undefined.
        """
        expert = None
        if self.up_bias is not None:
            rows = torch.arange(x.shape[0], device=x.device)
            expert = torch.searchsorted(offsets[1:], rows, right=True)
        hidden = self._linear(x, self.up_proj, self.up_bias, offsets, expert)
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = self.activation(gate) * hidden
        else:
            hidden = self.activation(hidden)
        return self._linear(hidden, self.down_proj, self.down_bias, offsets, expert)

    @staticmethod
    def _linear(
        x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, expert: Tensor | None
    ) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        y = grouped_linear(x.to(dtype), weight.to(dtype), offsets)
        if bias is None:
            return y
        # One more, for rows past the last offset: their gradients are undefined as they are.
        return y + functional.pad(bias.to(dtype), (0, 0, 0, 1))[expert]

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        _, features, inputs = self.up_proj.shape
        return f"{self.num_experts} x ({inputs} -> {features} -> {self.down_proj.shape[1]})"
