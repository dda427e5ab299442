"""The recursion-wise key/value cache as a layer of Transformers' caches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin

from mor.modules.packing import Packing

__all__ = ["Placement", "RecursionCacheLayer", "Slots", "recursion_layers"]

#: Position of an unused slot: after every query, so that causal attention never reads it.
_UNUSED = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Slots:
    """Where the rows of one forward call go in a cache of B sequences.

    Attributes:
        slots: [K] int64 place of each row among the B * capacity slots.
        positions, lengths: see `RecursionCacheLayer`, the rows included.
        cu_seqlens: [B + 1] int32 multiples of the capacity.
        longest: upper bound of the lengths.
    """

    slots: Tensor
    positions: Tensor
    lengths: Tensor
    cu_seqlens: Tensor
    longest: int


class Placement:
    """`Slots` for all layers that the same rows run one after another: their caches fill alike.

    Attributes:
        longest: most rows any sequence can have in this call.
        found: None until the first layer appends.
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.found: Slots | None = None


class RecursionCacheLayer(CacheLayerMixin):
    """Keys and values of one unrolled layer, only of the tokens that were active there.

    Each sequence has its own length, so a token that exited early costs no slot, and a pad never
    has one. Slots are reserved with room to grow: appending writes the new rows only. The layers of
    one recursion hold the same positions and lengths, as the same tensors: `append` writes to them
    once for all, and every other method that changes them makes new ones.

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
        self, keys: Tensor, values: Tensor, packing: Packing, placement: Placement
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Adds the rows of one forward call.

        Args:
            keys: [K, Hkv, head_dim] of the active tokens.
            values: [K, Hkv, head_dim].
            packing: their sequences (the rows of the batch) and positions.
            placement: where they go; found here by the first of the layers that share it.

        Returns:
            keys and values [B * capacity, Hkv, head_dim], positions [B * capacity] and cu_seqlens
            [B + 1] of all slots, unused ones at a position no query reaches.
        """
        if self.keys is None:
            self.lazy_initialization(keys, values)
            shape = (packing.num_sequences, 0, *keys.shape[1:])
            self.keys, self.values = keys.new_empty(shape), values.new_empty(shape)
            self.is_initialized = True
        assert self.keys is not None and self.values is not None
        if packing.num_sequences != self.keys.shape[0]:
            raise ValueError(
                f"mor cache: expected {self.keys.shape[0]} sequences, got {packing.num_sequences}"
            )
        found = placement.found
        if found is None:
            found = placement.found = self._place(packing, placement.longest)
        self.positions, self.lengths, self._longest = found.positions, found.lengths, found.longest
        batch, capacity = found.positions.shape
        if self.keys.shape[1] < capacity:
            self.keys, self.values = _grow(self.keys, capacity), _grow(self.values, capacity)
        elif self.keys.is_inference() and not torch.is_inference_mode_enabled():
            # Tensors made in inference mode cannot be updated in place outside it.
            self.keys, self.values = self.keys.clone(), self.values.clone()
        flat = self.keys.flatten(0, 1), self.values.flatten(0, 1)
        if keys.requires_grad or self.keys.requires_grad:
            # A graph keeps what it attended over, so nothing of it may be overwritten.
            flat = (
                flat[0].index_copy(0, found.slots, keys),
                flat[1].index_copy(0, found.slots, values),
            )
            self.keys, self.values = (x.unflatten(0, (batch, capacity)) for x in flat)
        else:
            flat[0].index_copy_(0, found.slots, keys)
            flat[1].index_copy_(0, found.slots, values)
        return *flat, found.positions.flatten(), found.cu_seqlens

    def _place(self, packing: Packing, longest: int) -> Slots:
        """Finds slots for the rows of a packing, at most `longest` of each sequence."""
        positions, lengths = self.positions, self.lengths
        if positions is None or lengths is None:
            positions = packing.positions.new_empty(packing.num_sequences, 0)
            lengths = packing.positions.new_zeros(packing.num_sequences)
        capacity, bound = positions.shape[1], self._longest + longest
        if bound > capacity:
            # The bound is loose where tokens exited early: ask before growing.
            bound = (int(lengths.max()) if lengths.numel() else 0) + longest
        if bound > capacity:
            # One and a half times, and at least 64 slots more: appends stay O(1) on average.
            capacity = max(bound + 64, capacity + capacity // 2)
            positions = _grow(positions, capacity, _UNUSED)
        ids = packing.sequence_ids
        slots = ids * capacity + lengths[ids] + packing.ranks
        positions = positions.flatten()
        if torch.is_grad_enabled() or (
            positions.is_inference() and not torch.is_inference_mode_enabled()
        ):
            positions = positions.index_copy(0, slots, packing.positions)
        else:
            positions.index_copy_(0, slots, packing.positions)
        return Slots(
            slots,
            positions.unflatten(0, (packing.num_sequences, capacity)),
            lengths + packing.cu_seqlens.diff(),
            torch.arange(packing.num_sequences + 1, dtype=torch.int32, device=slots.device)
            * capacity,
            bound,
        )

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


def recursion_layers(
    cache: Cache, indices: Sequence[int], num_dense_layers: int, where: str
) -> list[RecursionCacheLayer]:
    """Layers of a model's cache at some indices; made where there were none of this kind.

    Args:
        cache: of the whole model.
        indices: beyond the cache's layers, it grows.
        num_dense_layers: layers of the model as it was.
        where: begins the errors.

    Raises:
        ValueError: a cache for another model, or filled by one.
    """
    if len(cache.layers) < num_dense_layers:
        raise ValueError(
            f"{where}: expected past_key_values = DynamicCache(config=model.config), got a cache "
            f"of {len(cache.layers)} layers"
        )
    while len(cache.layers) <= max(indices):
        cache.layers.append(RecursionCacheLayer())
    for index in indices:
        if not isinstance(cache.layers[index], RecursionCacheLayer):
            if cache.layers[index].get_seq_length():
                raise ValueError(
                    f"{where}: expected past_key_values that this model filled, got keys of layer "
                    f"{index} from another"
                )
            cache.layers[index] = RecursionCacheLayer()
    return [cache.layers[index] for index in indices]


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
