"""Packed rows: a batch of sequences as one matrix [N, D], without its padding.

Over 300 lines in one file, so that reading masks and positions stands beside the layout it makes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from mor.ops.gather_tokens import gather_tokens

__all__ = ["PackedBatch", "Packing", "even_lengths", "pack"]


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
        cu_seqlens = even_lengths(batch_size, length, positions.device)
        return cls(cu_seqlens, positions, (length,) * batch_size)

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


def even_lengths(batch_size: int, length: int, device: torch.device) -> Tensor:
    """`cu_seqlens` of sequences of one length: [B + 1] int32."""
    return torch.arange(batch_size + 1, dtype=torch.int32, device=device) * length


@dataclass(frozen=True)
class PackedBatch:
    """How a batch [B, S] was packed, to pack its tensors and unpack the result.

    Attributes:
        packing: the sequences; more than one for a row of the batch that holds several documents.
        shape: (B, S).
        rows: [N] int64 rows of the flattened batch that are tokens; None if all are.
        source: [B * S] int64 packed row shown at each place of the batch; N + b for the last token
            that row b of the batch had in earlier calls.
        shows_earlier: `source` names tokens of earlier calls.
        has_documents: a row of the batch holds several sequences.
        past: [B, C] of earlier calls, see `last_positions`; None if there were none.
    """

    packing: Packing
    shape: tuple[int, int]
    rows: Tensor | None = None
    source: Tensor | None = None
    shows_earlier: bool = False
    has_documents: bool = False
    past: Tensor | None = None

    @property
    def columns(self) -> Tensor:
        """[N] int64: the column of each packed row."""
        device = self.packing.positions.device
        rows = (
            torch.arange(self.packing.num_rows, device=device) if self.rows is None else self.rows
        )
        return rows % max(self.shape[1], 1)

    def pack(self, x: Tensor) -> Tensor:
        """[B, S, ...] to [N, ...]."""
        flat = x.reshape(-1, *x.shape[2:])
        return flat if self.rows is None else gather_tokens(flat, self.rows)

    def unpack(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """[N, ...] to [B, S, ...].

        A pad shows the token before it, so the last column of a right-padded prompt shows its last
        token, or the first token of its row. What no token of this call can show is `before`.

        Args:
            x: [N, ...].
            before: [B, ...] the last token of each row in earlier calls; zeros without it.
        """
        if self.source is not None:
            if self.shows_earlier:
                batch = self.shape[0]
                x = torch.cat([x, x.new_zeros(batch, *x.shape[1:]) if before is None else before])
            x = gather_tokens(x, self.source)
        return x.reshape(*self.shape, *x.shape[1:])

    def last_positions(self) -> Tensor:
        """[B, C + S] position of the last token up to each column so far; -1 where there is none.

        A cache needs them to know where a row continues, and which tokens are removed when columns
        are cropped.
        """
        batch, length = self.shape
        positions = self.packing.positions
        if self.rows is not None:
            everywhere = positions.new_full((batch * length,), -1)
            positions = everywhere.index_copy(0, self.rows, positions)
        last = positions.reshape(self.shape)
        if self.rows is not None:  # a pad has the position of the token before it
            last = torch.cat([self.past[:, -1:] if self.past is not None else last[:, :0], last], 1)
            last = last.cummax(dim=1).values[:, -length:]
        return last if self.past is None else torch.cat([self.past, last], dim=1)

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
    past: Tensor | None = None,
    documents: bool = True,
) -> PackedBatch:
    """Packs a batch of token ids or states.

    Args:
        shape: (B, S) of the batch.
        device: where the batch is.
        attention_mask: [B, S] or [B, C + S], 0 at pads, which may be anywhere, and 1 at tokens, or
            the number of the document that a token belongs to. Costs one host synchronisation.
        position_ids: [B or 1, S] int64; default: the tokens of each row are counted, from where
            `past` ends. A row whose positions restart at 0 holds several documents, and no token
            attends to another document.
        cu_seqlens: [documents + 1] int32 for B = 1: document boundaries given outright.
        past: [B, C] of a cache, see `PackedBatch.last_positions`.
        documents: a row may hold several documents.

    Raises:
        ValueError: wrong shapes, documents where there can be none, or cu_seqlens that are not
            non-decreasing from 0 to S, naming the argument.
    """
    batch_size, length = shape
    if past is not None and past.shape[1] == 0:
        past = None
    if past is not None and past.shape[0] != batch_size:
        raise ValueError(f"past_key_values: expected {past.shape[0]} sequences, got {batch_size}")
    if cu_seqlens is not None:
        if past is not None:
            raise ValueError("cu_seqlens: documents are not continued from a cache")
        lengths = _document_lengths(shape, cu_seqlens, attention_mask)
        if position_ids is None:
            positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        else:
            positions = _given_positions(shape, device, position_ids)
        packing = Packing.from_lengths(lengths, positions.reshape(-1))
        return PackedBatch(packing, shape, has_documents=True)
    lengths, valid, numbers = [length] * batch_size, None, None
    if attention_mask is not None:
        past_length = 0 if past is None else past.shape[1]
        lengths, valid, numbers = _read_mask(shape, device, attention_mask, past_length)
    rows = None if valid is None else valid.reshape(-1).nonzero().squeeze(1)
    positions = (
        _counted_positions(shape, device, valid, past)
        if position_ids is None
        else _given_positions(shape, device, position_ids)
    ).reshape(-1)
    positions = positions if rows is None else positions[rows]
    source, shows_earlier = None, past is not None or 0 in lengths
    if valid is not None:
        shown = (valid.reshape(-1).cumsum(0) - 1).reshape(shape)
        first = torch.tensor([0, *lengths[:-1]], device=device).cumsum(0).unsqueeze(1)
        if shows_earlier:
            earlier = positions.shape[0] + torch.arange(batch_size, device=device).unsqueeze(1)
            source = torch.where(shown < first, earlier, shown).reshape(-1)
        else:
            source = torch.maximum(shown, first).reshape(-1)
    if length > 1 and (position_ids is not None or numbers is not None):
        packing = Packing.from_lengths(lengths, positions)
        numbers = numbers.reshape(-1) if numbers is not None else None
        numbers = numbers if numbers is None or rows is None else numbers[rows]
        ends = _document_ends(packing, numbers, given=position_ids is not None)
        if ends is not None:
            if past is not None or not documents:
                raise ValueError(
                    "position_ids, attention_mask: a row holds several documents, which cannot be "
                    "continued from a cache: they need use_cache=False and no past_key_values"
                )
            if position_ids is None:
                starts = torch.tensor([0, *ends[:-1]], device=device)
                begun = torch.tensor([b - a for a, b in pairwise([0, *ends])], device=device)
                positions = torch.arange(len(positions), device=device)
                positions = positions - starts.repeat_interleave(begun)
            packing = Packing.from_lengths([b - a for a, b in pairwise([0, *ends])], positions)
            return PackedBatch(packing, shape, rows, source, shows_earlier, has_documents=True)
    if rows is None:
        packing = Packing.uniform(batch_size, length, positions)
    else:
        packing = Packing.from_lengths(lengths, positions)
    return PackedBatch(packing, shape, rows, source, shows_earlier, past=past)


def _read_mask(
    shape: tuple[int, int], device: torch.device, attention_mask: Tensor, past_length: int
) -> tuple[list[int], Tensor | None, Tensor | None]:
    """Tokens of each row, where they are (None: everywhere), document numbers (None: none)."""
    batch_size, length = shape
    if (
        not isinstance(attention_mask, Tensor)
        or attention_mask.dim() != 2
        or attention_mask.shape[0] != batch_size
    ):
        is_tensor = isinstance(attention_mask, Tensor)
        got = list(attention_mask.shape) if is_tensor else type(attention_mask).__name__
        raise ValueError(
            f"attention_mask: expected shape [{batch_size}, {length}] (or with past columns), got "
            f"{got}; documents packed in a row are told apart by "
            "position_ids that restart at 0"
        )
    if attention_mask.shape[1] not in (length, past_length + length):
        raise ValueError(
            f"attention_mask: expected {length} columns"
            f"{f' or {past_length + length}' if past_length else ''}, got "
            f"{attention_mask.shape[1]}"
        )
    mask = attention_mask[:, attention_mask.shape[1] - length :].to(device)
    valid = mask != 0
    facts = [valid.sum(dim=1)]
    if mask.dtype != torch.bool and mask.numel():
        facts += [bound.reshape(1).to(torch.int64) for bound in (mask.amin(), mask.amax())]
    lengths = torch.cat(facts).tolist()
    lengths, bounds = lengths[:batch_size], lengths[batch_size:]
    if bounds and bounds[0] < 0:
        raise ValueError(
            "attention_mask: expected 0 at pads and 1 at tokens, got negative values; a mask that "
            "is added to attention scores cannot be used"
        )
    everywhere = all(n == length for n in lengths)
    return lengths, None if everywhere else valid, mask if bounds and bounds[1] > 1 else None


def _counted_positions(
    shape: tuple[int, int], device: torch.device, valid: Tensor | None, past: Tensor | None
) -> Tensor:
    """[B, S] how many tokens of its row are before each; pads are not counted."""
    if valid is None:
        counted = torch.arange(shape[1], device=device).expand(shape[0], -1)
    else:
        counted = (valid.cumsum(dim=1) - 1).clamp(min=0)
    return counted if past is None else counted + past[:, -1:] + 1


def _given_positions(shape: tuple[int, int], device: torch.device, position_ids: Tensor) -> Tensor:
    batch_size, length = shape
    if (
        position_ids.dim() != 2
        or position_ids.shape[0] not in (1, batch_size)
        or position_ids.shape[1] != length
    ):
        raise ValueError(
            f"position_ids: expected shape [{batch_size}, {length}], got {list(position_ids.shape)}"
        )
    return position_ids.to(device=device, dtype=torch.int64).expand(batch_size, -1)


def _document_ends(packing: Packing, numbers: Tensor | None, given: bool) -> list[int] | None:
    """Packed rows at which documents end; None if every row of the batch is one document.

    Args:
        packing: the rows of the batch as sequences.
        numbers: [N] document numbers of a mask.
        given: the positions were given, so that they may restart.
    """
    positions, sequences = packing.positions, packing.sequence_ids
    same = sequences[1:] == sequences[:-1]
    restarts = same & (positions[1:] <= positions[:-1]) if given else torch.zeros_like(same)
    changes = restarts if numbers is None else restarts | (same & (numbers[1:] != numbers[:-1]))
    if not bool(changes.any()):
        return None
    if bool((positions[1:][restarts] != 0).any()):
        raise ValueError(
            "position_ids: expected increasing positions, or 0 where a new document begins, got "
            "positions that decrease to another value (tokens of the attention_mask counted)"
        )
    ends: list[int] = ((changes | ~same).nonzero().squeeze(1) + 1).tolist()
    return [*ends, packing.num_rows]


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
            f"cu_seqlens: expected non-decreasing values from 0 to {shape[1]}, got {ends[:8]}"
            f"{'...' if len(ends) > 8 else ''}"
        )
    return lengths
