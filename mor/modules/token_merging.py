"""Token merging (ToMe): similar tokens become one, and every token gets its result back."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mor.ops.bipartite_match import bipartite_match
from mor.ops.gather_tokens import gather_tokens
from mor.ops.route_topk import route_topk
from mor.ops.segment_reduce import segment_reduce

__all__ = ["MergePlan", "MergedTokens", "TokenMerging", "even_lengths", "match", "match_alternate"]


class MergePlan(NamedTuple):
    """Where each of N tokens of B sequences goes; M_b of sequence b remain.

    Attributes:
        segments: [B * N] int64, the packed row of the merged tokens that each token became a part
            of. Rows of one sequence are: protected tokens, sources that stayed, destinations, each
            in their old order.
        cu_seqlens: [B + 1] int32, the merged rows of each sequence.
        num_rows: sum of M_b.
    """

    segments: Tensor
    cu_seqlens: Tensor
    num_rows: int

    def merge(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Averages the tokens of each merged row.

        Args:
            x: [B, N, D]; differentiable.
            weights: [B, N] float32, of each token; None stands for ones.

        Returns:
            [num_rows, D].
        """
        if weights is not None:
            weights = weights.flatten()
        return segment_reduce(x.flatten(0, 1), self.segments, self.num_rows, "mean", weights)

    def unmerge(self, y: Tensor) -> Tensor:
        """Gives each token the row it became a part of: [num_rows, D] to [B, N, D]."""
        batch = self.cu_seqlens.shape[0] - 1
        return gather_tokens(y, self.segments).view(batch, -1, y.shape[-1])


class MergedTokens(NamedTuple):
    """Tokens after a merge.

    Attributes:
        x: [B, M, D] hidden states.
        size: [B, M] float32, how many of the N first tokens each one stands for.
        sources: [B, N] int64, the token in [0, M) that each of the first tokens is now a part of.
    """

    x: Tensor
    size: Tensor
    sources: Tensor

    def unmerge(self) -> Tensor:
        """[B, N, D]: each of the first tokens with the state of the token it is a part of."""
        batch, tokens, width = self.x.shape
        starts = torch.arange(batch, device=self.x.device)[:, None] * tokens
        rows = gather_tokens(self.x.flatten(0, 1), (self.sources + starts).flatten())
        return rows.view(batch, -1, width)


class TokenMerging(nn.Module):
    """Merges the r most similar pairs of tokens, the step between attention and MLP of a block.

    Tokens alternate between sources and destinations. Each source finds the destination whose
    metric has the largest cosine with its own, and the r best sources join theirs, as the average
    weighted by size. Attention then adds `log(size)` to the scores of each key, which is attention
    over all the tokens that were merged.

    Args:
        r: pairs to merge in each sequence. At most half of the tokens that are not protected are
            merged: where fewer are left, r is that half.
        protected: leading tokens that never merge, as a class token.

    Raises:
        ValueError: r or protected is not an integer of at least 0.

    Reference: Bolya et al., Token Merging (arXiv 2210.09461), section 3.

    Example:
        >>> merging = TokenMerging(r=2, protected=1)
        >>> x = torch.randn(1, 7, 4)
        >>> merged = merging(x, metric=x)
        >>> merged.x.shape, merged.size.sum().item(), merged.unmerge().shape
        (torch.Size([1, 5, 4]), 7.0, torch.Size([1, 7, 4]))
    """

    def __init__(self, r: int, protected: int = 0) -> None:
        super().__init__()
        for name, value in (("r", r), ("protected", protected)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"TokenMerging: {name}: expected an integer from 0, got {value!r}")
        self.r, self.protected = r, protected

    def extra_repr(self) -> str:
        """Its options."""
        return f"r={self.r}, protected={self.protected}"

    def forward(
        self,
        x: Tensor,
        metric: Tensor,
        size: Tensor | None = None,
        sources: Tensor | None = None,
    ) -> MergedTokens:
        """Merges.

        Args:
            x: [B, N, D] hidden states; differentiable.
            metric: [B, N, Dm] what is compared; ToMe takes the mean of the keys over the heads. No
                gradient reaches it: which tokens merge is not differentiable.
            size: [B, N] float32 of the merge before; None stands for ones.
            sources: [B, N0] int64 of the merge before; None stands for `arange(N)`.

        Raises:
            ValueError: x is not [B, N, D], or metric not [B, N, Dm].
        """
        if x.dim() != 3 or metric.dim() != 3 or metric.shape[:2] != x.shape[:2]:
            raise ValueError(
                "TokenMerging: expected x [B, N, D] and metric [B, N, Dm], got "
                f"{list(x.shape)} and {list(metric.shape)}"
            )
        batch, tokens, _ = x.shape
        if size is None:
            size = x.new_ones(batch, tokens, dtype=torch.float32)
        if sources is None:
            sources = torch.arange(tokens, device=x.device).expand(batch, tokens)
        r = min(self.r, max(tokens - self.protected, 0) // 2)
        if r == 0:
            return MergedTokens(x, size, sources)
        plan = match_alternate(metric, r, self.protected)
        left = tokens - r
        merged = plan.merge(x, size).view(batch, left, -1)
        total = segment_reduce(size.flatten(), plan.segments, plan.num_rows).view(batch, left)
        starts = torch.arange(batch, device=x.device)[:, None] * left
        now = plan.segments.view(batch, tokens) - starts
        return MergedTokens(merged, total, now.gather(1, sources))


def match_alternate(metric: Tensor, r: int, protected: int = 0) -> MergePlan:
    """ToMe's plan: even tokens are sources, odd ones destinations; see `TokenMerging`.

    Args:
        metric: [B, N, Dm].
        r: pairs to merge in each sequence, at most `(N - protected) // 2`.
        protected: leading tokens that are neither.
    """
    positions = torch.arange(protected, metric.shape[1], device=metric.device)
    first = protected % 2  # whether the first that may merge has an odd position
    return match(metric, r, positions[first::2], positions[1 - first :: 2])


@torch.no_grad()
def match(metric: Tensor, r: int, sources: Tensor, destinations: Tensor) -> MergePlan:
    """Plans the merge of the r sources that are most similar to a destination.

    Args:
        metric: [B, N, Dm] what is compared, by cosine; 0 for a token of zeros.
        r: sources to merge in each sequence, at most Na. Ties go to the smaller position.
        sources: [Na] int64 ascending positions in [0, N).
        destinations: [Nb] int64 ascending positions in [0, N), none of them a source.

    Returns:
        The plan. Positions in neither list are protected.
    """
    batch, tokens, _ = metric.shape
    num_a, num_b, device = sources.shape[0], destinations.shape[0], metric.device
    lengths = torch.arange(batch + 1, dtype=torch.int32, device=device)
    cu_a = lengths * num_a
    scores, best = bipartite_match(
        metric[:, sources].flatten(0, 1), metric[:, destinations].flatten(0, 1), cu_a,
        lengths * num_b,
    )  # fmt: skip
    rows = route_topk(scores, r, cu_a)
    merged = torch.zeros_like(scores, dtype=torch.bool).index_fill(0, rows, True)
    return _plan(
        merged.view(batch, num_a), best.view(batch, num_a), r, tokens, sources, destinations
    )


def _plan(
    merged: Tensor, best: Tensor, r: int, tokens: int, sources: Tensor, destinations: Tensor
) -> MergePlan:
    """Numbers the rows that remain: [protected, sources that stay, destinations]."""
    batch, num_a = merged.shape
    num_b, device = destinations.shape[0], merged.device
    protected, left = tokens - num_a - num_b, tokens - r
    sequence = torch.arange(batch, device=device)[:, None]
    start = protected + num_a - r  # the first destination in its sequence
    begin = sequence * left
    joined = best - sequence * num_b + start
    stayed = (~merged).cumsum(1) - 1 + protected
    segments = torch.empty(batch, tokens, dtype=torch.int64, device=device)
    if protected:
        segments[:, :protected] = torch.arange(protected, device=device) + begin
    segments[:, sources] = torch.where(merged, joined, stayed) + begin
    segments[:, destinations] = torch.arange(num_b, device=device) + (start + begin)
    return MergePlan(segments.flatten(), even_lengths(batch, left, device), batch * left)


def even_lengths(batch: int, length: int, device: torch.device) -> Tensor:
    """`cu_seqlens` of sequences of one length: [B + 1] int32."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * length
