"""What the operators do where derivatives are not those of one backward pass.

PyTorch gives an operator of a library one kind of derivative: `backward` without `create_graph`.
Elsewhere it would drop the derivative with a warning, or without one (forward mode). So

- under `torch.func` (grad, vmap, jvp, hessian) and forward mode, an operator that is differentiable
  runs its plain-PyTorch `reference`, and one that is not refuses (`refuse_gradients`);
- in a backward pass with `create_graph=True`, the backward is built of differentiable operations.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["forward_mode", "has_tangent", "transformed"]

_torch_func_is_active = torch._C._are_functorch_transforms_active


def forward_mode() -> bool:
    """Whether tensors may carry tangents."""
    return forward_ad._current_level >= 0


def transformed() -> bool:
    """Whether `torch.func` or forward mode looks at the calls: 0.08 us."""
    return forward_ad._current_level >= 0 or _torch_func_is_active()


def has_tangent(t: Tensor) -> bool:
    """Whether forward mode differentiates by `t`; a level further out counts too."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        if forward_ad.unpack_dual(t).tangent is not None:
            return True
        t = torch._C._functorch.get_unwrapped(t)
    return forward_ad.unpack_dual(t).tangent is not None
