"""Memory of the engine: one pool of key/value blocks, and the states of the rows in flight."""

import torch
from torch import Tensor

__all__ = ["KVPool", "States"]


class KVPool:
    """Blocks of keys and values of one size, which any group of layers can use.

    A middle group (one recursion of the shared block) sees a block as `block_size` tokens of its
    layers; the group of the first and last layer sees the same bytes as `end_block_size` tokens of
    two layers. So there is one pool, and no fixed share of either.

    Args:
        num_blocks: blocks of the pool.
        block_size: tokens of a block in a middle group.
        num_layers: layers of a middle group that own keys and values.
        has_ends: whether a first and last layer have keys and values of their own.
        num_kv_heads: Hkv.
        head_dim: of the heads.
        dtype: of keys and values.
        device: of the pool.

    Attributes:
        data: [num_blocks, elements].
        end_block_size: tokens of a block in the group of the ends.
        middle: keys and values [num_blocks, block_size, Hkv, head_dim] of each layer of a group.
        ends: keys and values [num_blocks, end_block_size, Hkv, head_dim] of first and last layer.
        block_bytes: of one block.

    Raises:
        ValueError: a block that does not hold a whole number of tokens of the ends.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_layers: int,
        has_ends: bool,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        if has_ends and block_size * num_layers % 2:
            raise ValueError(
                f"block_size: expected an even number, as the block has {num_layers} layers, got "
                f"{block_size}"
            )
        self.block_size, self.end_block_size = block_size, block_size * num_layers // 2
        per_token = 2 * num_kv_heads * head_dim
        self.data = torch.empty(
            num_blocks, block_size * num_layers * per_token, dtype=dtype, device=device
        )
        self.block_bytes = self.data.shape[1] * self.data.element_size()

        def views(layers: int, size: int) -> list[tuple[Tensor, Tensor]]:
            shaped = self.data.view(num_blocks, layers, 2, size, num_kv_heads, head_dim)
            return [(shaped[:, layer, 0], shaped[:, layer, 1]) for layer in range(layers)]

        self.middle = views(num_layers, block_size)
        self.ends = views(2, self.end_block_size) if has_ends else []

    def copy_blocks(self, sources: Tensor, targets: Tensor) -> None:
        """Copies blocks [K] to other blocks [K], as for a prefix that ends inside a block."""
        self.data[targets] = self.data[sources]


class States:
    """States of the rows in flight; a row is a number of a slot, and its state never moves.

    Args:
        num_slots: rows at most.
        hidden_size: the width D.
        dtype: of the model.
        chained: token-choice, which keeps the result of the last recursion beside the state.
        device: of the states.

    Attributes:
        hidden: [num_slots, D].
        gates: [num_slots] factor of the row's next recursion (token-choice: of its last).
        chain: [num_slots, D] the block's last result (token-choice), or None.
        depths: [num_slots] int64 recursions that the row will take (token-choice), or None.
    """

    def __init__(
        self,
        num_slots: int,
        hidden_size: int,
        dtype: torch.dtype,
        chained: bool,
        device: torch.device | str = "cpu",
    ) -> None:
        self.hidden = torch.zeros(num_slots, hidden_size, dtype=dtype, device=device)
        widest = torch.promote_types(dtype, torch.float32)
        self.gates = torch.zeros(num_slots, dtype=widest, device=device)
        self.chain = torch.zeros_like(self.hidden) if chained else None
        self.depths = torch.zeros(num_slots, dtype=torch.int64, device=device) if chained else None
