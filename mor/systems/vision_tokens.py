"""The vision tokens of a batch, and the choice of those that stay in a layer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mor.models.cache import RecursionCacheLayer
from mor.models.swap.routed_layers import pack_call
from mor.modules.packing import PackedBatch, Packing
from mor.ops.route_topk import route_topk

__all__ = ["FrameSizes", "VisionCall", "VisionTokens"]


@dataclass(frozen=True)
class FrameSizes:
    """Sizes of the frames of a prompt's video tokens.

    Attributes:
        frame: vision tokens of a frame.
        video: tokens of a video. Those behind its last whole frame (the newline of LLaVA-OneVision)
            are text.
    """

    frame: int
    video: int


@dataclass(frozen=True)
class VisionTokens:
    """The packed tokens of a batch, and the segments in which vision tokens compete.

    Attributes:
        batch: how the batch was packed.
        is_vision: [N] bool.
        segments: [G + 1] int32 bounds of the segments, each within one sequence but for text: its
            vision tokens compete with each other alone.
        counts: vision tokens of each segment, on the host.
        segments_of: segments of each sequence that hold its vision tokens, on the host.
    """

    batch: PackedBatch
    is_vision: Tensor
    segments: Tensor
    counts: tuple[int, ...]
    segments_of: tuple[int, ...]

    @classmethod
    def of(cls, batch: PackedBatch, vision: Tensor) -> "VisionTokens":
        """Those of a sequence compete. Reads counts of vision [B, S] bool, once for all layers."""
        is_vision, cu_seqlens = batch.pack(vision), batch.packing.cu_seqlens
        counts = _count(is_vision, batch.packing).tolist()
        return cls(batch, is_vision, cu_seqlens, tuple(counts), (1,) * len(counts))

    @classmethod
    def of_frames(
        cls, batch: PackedBatch, video: Tensor, sizes: FrameSizes, where: str
    ) -> "VisionTokens":
        """Those of a frame compete.

        Args:
            batch: how the batch was packed.
            video: [B, S] bool, tokens of videos. Text may stand between frames.
            sizes: of frames and videos.
            where: begins the errors.

        Raises:
            ValueError: a sequence with an incomplete video, or a video with an incomplete frame.
        """
        is_video, packing = batch.pack(video), batch.packing
        totals: list[int] = _count(is_video, packing).tolist()
        frames = sizes.video // sizes.frame if sizes.video else 0
        for row, total in enumerate(totals):
            if total % max(sizes.video, 1):
                raise ValueError(
                    f"{where}: input_ids: expected a multiple of {sizes.video} video tokens "
                    f"(frames: {frames}) in each row, got {total} in row {row}: a call holds whole "
                    "frames"
                )
        if not any(totals):
            return cls(batch, is_video, packing.cu_seqlens[:1], (), (0,) * len(totals))
        rank = is_video.cumsum(0) - 1  # rows hold whole videos, so the count runs on over rows
        place = rank % sizes.video
        is_vision = is_video & (place < frames * sizes.frame)
        segments_of = tuple(total // sizes.video * frames for total in totals)
        begins = is_vision & (place % sizes.frame == 0)
        # Their number is known, so the host need not wait for it.
        begins = begins.nonzero_static(size=sum(segments_of)).squeeze(1)
        # Text before a frame goes with the frame before it: it is kept anyway.
        bounds = functional.pad(begins[1:], (1, 0))
        bounds = functional.pad(bounds, (0, 1), value=is_vision.shape[0])
        counts = (sizes.frame,) * sum(segments_of)
        return cls(batch, is_vision, bounds.to(torch.int32), counts, segments_of)

    def k(self, ratio: float, least: int) -> list[int]:
        """trunc(n * ratio) of the n vision tokens of each segment, `least` at least (or all n)."""
        return [max(int(count * ratio), min(least, count)) for count in self.counts]

    def keep(self, scores: Tensor, ratio: float, least: int = 0) -> tuple[Tensor, Packing]:
        """Text and the vision tokens with the best scores [N], ascending, and their packing.

        The packing is the batch's own if everything is kept. The host reads nothing.
        """
        packing, k = self.batch.packing, self.k(ratio, least)
        if k == [*self.counts]:
            return torch.arange(scores.shape[0], device=scores.device), packing
        assert packing.lengths is not None
        lengths, begin = [], 0
        for length, segments in zip(packing.lengths, self.segments_of, strict=True):
            own = slice(begin, begin + segments)
            lengths.append(length - sum(self.counts[own]) + sum(k[own]))
            begin += segments
        kept = route_topk(
            scores,
            k[0] if len(set(k)) == 1 else torch.tensor(k, dtype=torch.int64).to(scores.device),
            self.segments,
            num_rows=sum(lengths),
            candidates=self.is_vision,
            protected_rows=~self.is_vision,
        )
        return kept, packing.select(kept, lengths=lengths)


def _count(marked: Tensor, packing: Packing) -> Tensor:
    """[B] marked rows of each sequence."""
    return functional.pad(marked.cumsum(0), (1, 0))[packing.cu_seqlens.long()].diff()


class VisionCall:
    """One forward call of a model whose layers vision tokens skip.

    Not a dataclass: FSDP2 rebuilds those that reach a sharded layer, and a copy would take what the
    first layer finds.

    Args:
        where: begins the errors.
        vision: [B, S] bool, the vision tokens.
        find_tokens: makes `VisionTokens` of the packed batch and `vision`.
        attention_mask: [B, S] or [B, past + S] as the caller gave it.
        described: the caller gave position_ids.
    """

    def __init__(
        self,
        where: str,
        vision: Tensor,
        find_tokens: Callable[[PackedBatch, Tensor], VisionTokens] = VisionTokens.of,
        *,
        attention_mask: Tensor | None = None,
        described: bool = False,
    ) -> None:
        self.where, self.vision, self.find_tokens = where, vision, find_tokens
        self.attention_mask, self.described = attention_mask, described
        self.tokens: VisionTokens | None = None

    def find(self, position_ids: Tensor | None, cache: RecursionCacheLayer | None) -> VisionTokens:
        """The tokens of this call, found by the first routed layer for all."""
        if self.tokens is None:
            batch = pack_call(self.vision, self.attention_mask, position_ids, self.described, cache)
            if batch.has_documents:
                raise ValueError(
                    f"{self.where}: position_ids: expected one document in each row, got positions "
                    "that restart"
                )
            self.tokens = self.find_tokens(batch, self.vision)
        return self.tokens
