"""kv_append: write keys and values into their slots of a paged cache."""

import torch
from torch import Tensor

from mor.ops._checks import (
    check_kv_cache,
    check_operands,
    expect,
    refuse_gradients,
    refuse_non_tensors,
)

__all__ = ["kv_append", "reference"]

_operator = torch.ops.mor.kv_append.default


def kv_append(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """Writes row i of `k` and `v` into slot `slot_mapping[i]` of the caches, in place.

    The cost is that of the rows, whatever the caches hold. Of several rows with one slot the last
    stays, on every device.

    Args:
        k_cache: [num_blocks, block_size, Hkv, head_dim] float32, bfloat16, float16 or float64; any
            strides with a contiguous head_dim, so it may be a slice of a larger pool.
        v_cache: as `k_cache`.
        k: [N, Hkv, head_dim] in the dtype of the caches, sharing no memory with them.
        v: as `k`.
        slot_mapping: [N] int64, block * block_size + offset; negative skips the row (padding).

    Raises:
        RuntimeError: wrong rank, size, dtype, device or strides; where a gradient would be needed:
            there is none; on the CPU also a slot past the cache (skipped on CUDA). Nothing has been
            written then.

    Reference: MoR paper, section 2.2.2 (recursion-wise caching: only active tokens get a slot).

    Example:
        >>> k_cache, v_cache = torch.zeros(2, 2, 1, 1), torch.zeros(2, 2, 1, 1)
        >>> k = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
        >>> kv_append(k_cache, v_cache, k, -k, torch.tensor([2, -1, 1]))
        >>> k_cache.flatten(), v_cache.flatten()
        (tensor([0., 3., 1., 0.]), tensor([ 0., -3., -1.,  0.]))
    """
    try:
        refuse_gradients(
            "kv_append", "torch.no_grad()", k_cache=k_cache, v_cache=v_cache, k=k, v=v
        )  # fmt: skip
        _operator(k_cache, v_cache, k, v, slot_mapping)
    except (AttributeError, RuntimeError, TypeError):
        refuse_non_tensors(
            kv_append, k_cache=k_cache, v_cache=v_cache, k=k, v=v, slot_mapping=slot_mapping
        )
        raise


def reference(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """The same in plain PyTorch, row by row."""
    for i, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, k_cache.shape[1])
            k_cache[block, offset] = k[i]
            v_cache[block, offset] = v[i]


@torch.library.register_fake("mor::kv_append")
def _(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    op = "kv_append"
    check_operands(op, k_cache, v_cache, slot_mapping, k, v)
    check_kv_cache(k_cache, v_cache, op)
    for t, name in ((k_cache, "k_cache"), (v_cache, "v_cache")):
        strides = list(t.stride())
        shared = any(size > 1 and step == 0 for size, step in zip(t.shape, strides, strict=True))
        expect(op, not shared, f"{name} whose elements do not share memory, got strides {strides}")
