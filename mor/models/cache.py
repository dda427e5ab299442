"""The recursion-wise key/value cache as a layer of Transformers' caches."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin

from mor.modules.packing import Packing

__all__ = ["RecursionCacheLayer"]

#: Position of an unused slot: after every query, so that causal attention never reads it.
_UNUSED = torch.iinfo(torch.int64).max


class RecursionCacheLayer(CacheLayerMixin):
    """Keys and values of one unrolled layer, only of the tokens that were active there.

    Each sequence has its own length, so a token that left early costs no slot, and a pad never has
    one. Slots are reserved with room to grow: appending writes the new rows only.

    Attributes:
        keys, values: [B, capacity, Hkv, head_dim].
        positions: [B, capacity] int64 position of each slot's token.
        lengths: [B] int64 slots in use.
        last_positions: [B, C] position of the last token up to each of the C columns seen so far
            (-1: none yet), pads among them; Transformers calls C the length.
        last_states: [B, D] what the model made of each sequence's last token, for a later call in
            which the sequence has pads only; kept by a model's first layer.
    """

    _layer_type = "mor_recursion"
    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.positions: Tensor | None = None
        self.lengths: Tensor | None = None
        self.last_positions: Tensor | None = None
        self.last_states: Tensor | None = None
        self._longest = 0  # upper bound of lengths, known without asking the device

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes shape and dtype from the first rows appended; see `append`."""
        self.dtype, self.device = key_states.dtype, key_states.device

    def append(
        self, keys: Tensor, values: Tensor, packing: Packing, longest: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Adds the rows of one forward call.

        Args:
            keys: [K, Hkv, head_dim] of the active tokens.
            values: [K, Hkv, head_dim].
            packing: their sequences (the rows of the batch) and positions.
            longest: most rows any sequence can have in this call.

        Returns:
            keys and values [B * capacity, Hkv, head_dim], positions [B * capacity] and cu_seqlens
            [B + 1] of all slots, unused ones at a position no query reaches.
        """
        if self.keys is None:
            self.lazy_initialization(keys, values)
            shape = (packing.num_sequences, 0, *keys.shape[1:])
            self.keys, self.values = keys.new_empty(shape), values.new_empty(shape)
            self.positions = packing.positions.new_empty(shape[:2])
            self.lengths = packing.positions.new_zeros(shape[0])
            self.is_initialized = True
        assert self.keys is not None and self.values is not None
        assert self.positions is not None and self.lengths is not None
        if packing.num_sequences != self.keys.shape[0]:
            raise ValueError(
                f"mor cache: expected {self.keys.shape[0]} sequences, got {packing.num_sequences}"
            )
        if self.keys.is_inference() and not torch.is_inference_mode_enabled():
            # Tensors made in inference mode cannot be updated in place outside it.
            self.keys, self.values = self.keys.clone(), self.values.clone()
            self.positions, self.lengths = self.positions.clone(), self.lengths.clone()
        # A graph keeps what it attended over, so nothing of it may be overwritten.
        in_graph = keys.requires_grad or self.keys.requires_grad
        self._reserve(longest)
        batch, capacity = self.keys.shape[:2]
        slots = packing.sequence_ids * capacity + self.lengths[packing.sequence_ids] + packing.ranks
        flat = [x.flatten(0, 1) for x in (self.keys, self.values, self.positions)]
        new = (keys, values, packing.positions)
        if in_graph:
            flat = [x.index_copy(0, slots, y) for x, y in zip(flat, new, strict=True)]
            self.keys, self.values, self.positions = (
                x.reshape(batch, capacity, *x.shape[1:]) for x in flat
            )
        else:
            for x, y in zip(flat, new, strict=True):
                x.index_copy_(0, slots, y)
        self.lengths = self.lengths + packing.cu_seqlens.diff()
        steps = torch.arange(packing.num_sequences + 1, dtype=torch.int32, device=keys.device)
        flat_keys, flat_values, flat_positions = flat
        return flat_keys, flat_values, flat_positions, steps * capacity

    def _reserve(self, more: int) -> None:
        assert self.keys is not None and self.values is not None
        assert self.positions is not None and self.lengths is not None
        capacity = self.keys.shape[1]
        if self._longest + more > capacity:
            # The bound is loose where tokens left early: ask before growing.
            self._longest = int(self.lengths.max()) if self.lengths.numel() else 0
        self._longest += more
        if self._longest <= capacity:
            return
        # One and a half times, and at least 64 slots more: appends stay O(1) on average.
        grown = max(self._longest + 64, capacity + capacity // 2)
        self.keys = _grow(self.keys, grown)
        self.values = _grow(self.values, grown)
        self.positions = _grow(self.positions, grown, _UNUSED)

    @property
    def num_columns(self) -> int:
        """C."""
        return 0 if self.last_positions is None else self.last_positions.shape[1]

    def advance(self, last_positions: Tensor) -> None:
        """Notes that a forward call is over: `last_positions` [B, C] with its columns."""
        self.last_positions = last_positions

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Not the way in: mor's attention calls `append` with the packing of the active tokens."""
        raise NotImplementedError("mor cache: rows are added by append(); use it with MoR models")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of a mask over past and present, and its offset."""
        return self.num_columns + query_length, 0

    def get_seq_length(self) -> int:
        """Columns seen so far."""
        return self.num_columns

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Forgets all rows."""
        self.__init__()  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last columns; `tokens_to_remove` is negative or 0, as in Transformers."""
        if tokens_to_remove > 0:
            raise ValueError(f"mor cache: crop takes a number <= 0, got {tokens_to_remove}")
        if self.last_positions is None or tokens_to_remove == 0:
            return
        kept = max(self.num_columns + tokens_to_remove, 0)
        self.last_positions, self.last_states = self.last_positions[:, :kept], None
        if self.positions is not None:
            # Positions ascend in a sequence, so its last token names the slots that go.
            before = self.positions.new_full((self.positions.shape[0], 1), -1)
            last = torch.cat([before, self.last_positions], dim=1)[:, -1:]
            self.positions = self.positions.masked_fill(self.positions > last, _UNUSED)
            self.lengths = (self.positions != _UNUSED).sum(dim=1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the sequences for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence."""
        if self.last_positions is not None:
            rows = torch.arange(self.last_positions.shape[0], device=self.last_positions.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given sequences."""
        for name in ("keys", "values", "positions", "lengths", "last_positions", "last_states"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value[indices])


def _refuse_static(**kwargs: Any) -> None:
    raise ValueError(
        "mor cache: expected DynamicCache(config=model.config), got a StaticCache, which has no "
        "place for sequences of different lengths"
    )


STATIC_LAYER_TYPE_MAPPING[RecursionCacheLayer._layer_type] = _refuse_static


def _grow(x: Tensor, capacity: int, fill: int = 0) -> Tensor:
    out = x.new_full((x.shape[0], capacity, *x.shape[2:]), fill)
    out[:, : x.shape[1]] = x
    return out
