"""packed_linear: a linear layer for few rows, its weights packed once. Not differentiable."""

import torch
from torch import Tensor
from torch.nn import functional

from mor.ops._checks import check_operands, expect, refuse_gradients, refuse_non_tensors

__all__ = ["pack_linear", "packed_linear", "reference"]

_operator = torch.ops.mor.packed_linear.default

#: Outputs of a panel; see csrc/ops/packed_linear.h.
_PANEL = 16


def pack_linear(weight: Tensor) -> Tensor:
    """Packs the weight [M, K] of a linear layer for `packed_linear`: panels of 16 outputs.

    Args:
        weight: [M, K] float32 or bfloat16.

    Returns:
        [ceil(M / 16), K, 16], in bfloat16 [ceil(M / 16), ceil(K / 2), 16, 2], with zeros where
        there is no output or input.

    Raises:
        RuntimeError: wrong rank or dtype.
    """
    op, dtype = "pack_linear", weight.dtype
    expect(op, weight.dim() == 2, "weight of shape [M, K]", list(weight.shape))
    known = dtype in (torch.float32, torch.bfloat16)
    expect(op, known, "weight of dtype float32 or bfloat16", str(dtype).removeprefix("torch."))
    outputs, inputs = weight.shape
    panels = -(-outputs // _PANEL)
    pairs = weight.dtype == torch.bfloat16
    weight = functional.pad(weight.detach(), (0, inputs % 2 if pairs else 0, 0, -outputs % _PANEL))
    if not pairs:
        return weight.view(panels, _PANEL, inputs).transpose(1, 2).contiguous()
    return weight.view(panels, _PANEL, weight.shape[1] // 2, 2).transpose(1, 2).contiguous()


def packed_linear(
    x: Tensor, packed: Tensor, num_outputs: int, bias: Tensor | None = None
) -> Tensor:
    """`x W^T + bias` for few rows, W packed by `pack_linear`.

    What decoding waits for is the reading of the weights: here they are read once for all rows, in
    the order they lie in memory. Each result is one sum in float32 in a fixed order, so a row's
    depends on nothing beside it, to the last bit.

    Args:
        x: [N, K] float32 or bfloat16; any strides.
        packed: of the weight [M, K], in the dtype of x.
        num_outputs: the number M.
        bias: [M] as x; None stands for zeros.

    Returns:
        [N, M], contiguous. On CUDA the weight is unpacked and multiplied: packing pays on CPUs.

    Raises:
        RuntimeError: wrong rank, size, dtype or device; where a gradient would be needed: there is
            none.

    Reference: MoR paper, section 3 (throughput: decoding rows of any recursion in one pass).

    Example:
        >>> weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> packed_linear(torch.tensor([[1.0, 10.0]]), pack_linear(weight), 3)
        tensor([[21., 43., 65.]])
    """
    try:
        refuse_gradients(
            "packed_linear", "torch.no_grad(), or torch.nn.functional.linear",
            x=x, packed=packed, bias=bias,
        )  # fmt: skip
        return _operator(x, packed, num_outputs, bias)
    except (AttributeError, RuntimeError, TypeError):
        refuse_non_tensors(packed_linear, x=x, packed=packed, bias=bias)
        raise


def reference(x: Tensor, packed: Tensor, num_outputs: int, bias: Tensor | None = None) -> Tensor:
    """The same in plain PyTorch."""
    if packed.dim() == 4:
        packed = packed.transpose(1, 2).flatten(2).transpose(1, 2)
    weight = packed.transpose(1, 2).flatten(0, 1)[:num_outputs, : x.shape[1]]
    return functional.linear(x, weight, bias)


@torch.library.impl("mor::packed_linear", "CUDA")
def _on_cuda(x: Tensor, packed: Tensor, num_outputs: int, bias: Tensor | None) -> Tensor:
    _check(x, packed, num_outputs, bias)
    return reference(x, packed, num_outputs, bias)


@torch.library.register_fake("mor::packed_linear")
def _(x: Tensor, packed: Tensor, num_outputs: int, bias: Tensor | None) -> Tensor:
    _check(x, packed, num_outputs, bias)
    return x.new_empty(x.shape[0], num_outputs)


def _check(x: Tensor, packed: Tensor, num_outputs: int, bias: Tensor | None) -> None:
    op = "packed_linear"
    check_operands(op, x, packed, bias)
    expect(op, num_outputs >= 0, "num_outputs >= 0", num_outputs)
    panels, inputs = -(-num_outputs // _PANEL), x.shape[1]
    if x.dtype == torch.bfloat16:
        expected = [panels, (inputs + 1) // 2, _PANEL, 2]
    else:
        expected = [panels, inputs, _PANEL]
    text = f"packed of pack_linear for {num_outputs} outputs and x {list(x.shape)}"
    expect(op, list(packed.shape) == expected, text, list(packed.shape))
    if bias is not None:
        size = bias.shape[0]
        expect(op, size == num_outputs, f"bias of {num_outputs} elements", list(bias.shape))
