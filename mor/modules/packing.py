"""Packed rows: a batch of sequences as one matrix [N, D], without its padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from mor.ops.gather_tokens import gather_tokens

__all__ = ["PackedBatch", "Packing", "pack"]


@dataclass(frozen=True)
class Packing:
    """Which sequence each packed row belongs to, and where it stands in it.

    Attributes:
        cu_seqlens: [B + 1] int32; sequence b owns rows cu_seqlens[b] .. cu_seqlens[b + 1] - 1.
        positions: [N] int64 position of each row in its sequence; they ascend, and keep their
            values when rows are left out.
        lengths: rows of each sequence, known on the host; None where they depend on data.
    """

    cu_seqlens: Tensor
    positions: Tensor
    lengths: tuple[int, ...] | None = None

    @classmethod
    def uniform(cls, batch_size: int, length: int, positions: Tensor) -> "Packing":
        """B sequences of one length; positions [B * length]."""
        steps = torch.arange(batch_size + 1, dtype=torch.int32, device=positions.device)
        return cls(steps * length, positions, (length,) * batch_size)

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], positions: Tensor) -> "Packing":
        """Sequences of the given lengths; positions [sum(lengths)]."""
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(ends.to(positions.device), positions, tuple(lengths))

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def num_rows(self) -> int:
        """N."""
        return self.positions.shape[0]

    @cached_property
    def sequence_ids(self) -> Tensor:
        """[N] int64: the sequence of each row."""
        rows = torch.arange(self.num_rows, dtype=torch.int32, device=self.positions.device)
        return torch.searchsorted(self.cu_seqlens[1:], rows, right=True)

    @cached_property
    def ranks(self) -> Tensor:
        """[N] int64: index of each row inside its sequence."""
        rows = torch.arange(self.num_rows, device=self.positions.device)
        return rows - self.cu_seqlens[self.sequence_ids].long()

    def select(
        self,
        rows: Tensor,
        *,
        lengths: Sequence[int] | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> "Packing":
        """The packing of some rows, given in ascending order, with their positions unchanged.

        Args:
            rows: [K] int64, ascending.
            lengths: rows kept of each sequence, if the host knows them; else
            cu_seqlens: [B + 1] int32, the same on the device.
        """
        positions = gather_tokens(self.positions, rows)
        if lengths is None:
            assert cu_seqlens is not None, "select needs lengths or cu_seqlens"
            return Packing(cu_seqlens, positions)
        if len(set(lengths)) <= 1:
            return Packing.uniform(len(lengths), lengths[0] if lengths else 0, positions)
        return Packing.from_lengths(lengths, positions)


@dataclass(frozen=True)
class PackedBatch:
    """How a batch [B, S] was packed, to pack its tensors and unpack the result.

    Attributes:
        packing: the sequences; more than B of them where a row holds several documents.
        shape: (B, S).
        rows: [N] int64 rows of the flattened batch that are tokens; None if all are.
        source: [B * S] int64 packed row shown at each place of the batch. A pad shows the token
            before it (so the last place of a right-padded prompt shows its last token), or the
            first one.
    """

    packing: Packing
    shape: tuple[int, int]
    rows: Tensor | None = None
    source: Tensor | None = None

    def pack(self, x: Tensor) -> Tensor:
        """[B, S, ...] to [N, ...]."""
        flat = x.reshape(-1, *x.shape[2:])
        return flat if self.rows is None else gather_tokens(flat, self.rows)

    def unpack(self, x: Tensor) -> Tensor:
        """[N, ...] to [B, S, ...]."""
        if self.source is not None:
            if x.shape[0] == 0:
                x = x.new_zeros(self.source.shape[0], *x.shape[1:])
            else:
                x = gather_tokens(x, self.source)
        return x.reshape(*self.shape, *x.shape[1:])

    def last_positions(self) -> Tensor:
        """[B] position of the last token of each sequence; -1 for one without tokens."""
        ends = self.packing.cu_seqlens[1:].long() - 1
        if self.packing.num_rows == 0:
            return torch.full_like(ends, -1)
        last = self.packing.positions[ends.clamp(min=0)]
        return torch.where(self.packing.cu_seqlens.diff() > 0, last, -1)

    def unpack_masked(self, x: Tensor, fill: int) -> Tensor:
        """[N] to [B, S], with `fill` at pads."""
        if self.rows is None:
            return x.reshape(self.shape)
        out = x.new_full((self.shape[0] * self.shape[1],), fill)
        return out.index_copy(0, self.rows, x).reshape(self.shape)


def pack(
    shape: tuple[int, int],
    device: torch.device,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    past_length: int = 0,
    documents: bool = True,
) -> PackedBatch:
    """Packs a batch of token ids or states.

    Args:
        shape: (B, S) of the batch.
        device: where the batch is.
        attention_mask: [B, S] or [B, past + S], non-zero at tokens; left and right padding, or any
            other holes. Costs one host synchronisation.
        position_ids: [B or 1, S] int64. Without pads, a row whose positions restart at 0 holds
            several documents, and no token attends to another document.
        cu_seqlens: [documents + 1] int32 for B = 1: document boundaries given outright.
        past_length: columns already in the cache; positions continue from there.
        documents: look for documents in `position_ids`.

    Raises:
        ValueError: wrong shapes, or cu_seqlens that do not rise from 0 to S, naming the argument.
    """
    batch_size, length = shape
    positions = _positions(shape, device, position_ids, past_length)
    if cu_seqlens is not None:
        lengths = _document_lengths(shape, cu_seqlens, attention_mask)
        if position_ids is None:
            positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        return PackedBatch(Packing.from_lengths(lengths, positions.reshape(-1)), shape)
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.shape[0] != batch_size:
            raise ValueError(
                f"attention_mask: expected shape [{batch_size}, {length}] (or with past columns), "
                f"got {list(attention_mask.shape)}"
            )
        if attention_mask.shape[1] not in (length, past_length + length):
            raise ValueError(
                f"attention_mask: expected {length} columns"
                f"{f' or {past_length + length}' if past_length else ''}, got "
                f"{attention_mask.shape[1]}"
            )
        valid = attention_mask[:, attention_mask.shape[1] - length :].to(device) != 0
        lengths = valid.sum(dim=1).tolist()
        if any(n != length for n in lengths):
            flat = valid.reshape(-1)
            rows = flat.nonzero().squeeze(1)
            shown = (flat.cumsum(0) - 1).reshape(shape)
            first = torch.tensor([0, *lengths[:-1]], device=device).cumsum(0).unsqueeze(1)
            source = torch.maximum(shown, first).clamp(max=max(rows.shape[0] - 1, 0)).reshape(-1)
            packing = Packing.from_lengths(lengths, positions.reshape(-1)[rows])
            return PackedBatch(packing, shape, rows, source)
    if documents and position_ids is not None and length > 1:
        starts = positions[:, 1:] <= positions[:, :-1]
        if bool(starts.any()):
            if bool((positions[:, 1:][starts] != 0).any()):
                raise ValueError(
                    "position_ids: expected positions that rise, or restart at 0 for a new "
                    "document, got positions that fall to another value"
                )
            edge = torch.ones(batch_size, 1, dtype=torch.bool, device=device)
            begins = torch.cat([edge, starts], dim=1).reshape(-1).nonzero().squeeze(1).tolist()
            ends = [*begins[1:], batch_size * length]
            lengths = [end - begin for begin, end in zip(begins, ends, strict=True)]
            return PackedBatch(Packing.from_lengths(lengths, positions.reshape(-1)), shape)
    return PackedBatch(Packing.uniform(batch_size, length, positions.reshape(-1)), shape)


def _positions(
    shape: tuple[int, int], device: torch.device, position_ids: Tensor | None, past_length: int
) -> Tensor:
    batch_size, length = shape
    if position_ids is None:
        return torch.arange(past_length, past_length + length, device=device).expand(batch_size, -1)
    if (
        position_ids.dim() != 2
        or position_ids.shape[0] not in (1, batch_size)
        or position_ids.shape[1] != length
    ):
        raise ValueError(
            f"position_ids: expected shape [{batch_size}, {length}], got {list(position_ids.shape)}"
        )
    return position_ids.to(device=device, dtype=torch.int64).expand(batch_size, -1)


def _document_lengths(
    shape: tuple[int, int], cu_seqlens: Tensor, attention_mask: Tensor | None
) -> list[int]:
    if shape[0] != 1 or attention_mask is not None:
        raise ValueError(
            "cu_seqlens: expected one packed row (batch size 1) without attention_mask, got batch "
            f"size {shape[0]}{' and an attention_mask' if attention_mask is not None else ''}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens: expected integers of shape [B + 1], got {cu_seqlens.dtype} "
            f"{list(cu_seqlens.shape)}"
        )
    ends = cu_seqlens.tolist()
    lengths = [b - a for a, b in pairwise(ends)]
    if ends[0] != 0 or ends[-1] != shape[1] or min(lengths, default=0) < 0:
        raise ValueError(
            f"cu_seqlens: expected values that rise from 0 to {shape[1]}, got {ends[:8]}"
            f"{'...' if len(ends) > 8 else ''}"
        )
    return lengths
