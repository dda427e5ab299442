"""Token merging (ToMe): similar tokens become one, and every token gets its result back."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mor.modules.packing import even_lengths
from mor.ops.bipartite_match import bipartite_match
from mor.ops.gather_tokens import gather_tokens
from mor.ops.route_threshold import route_threshold
from mor.ops.route_topk import route_topk
from mor.ops.segment_reduce import segment_reduce

__all__ = [
    "MergePlan",
    "MergedTokens",
    "TokenMerging",
    "match",
    "match_above",
    "match_alternate",
    "split_cells",
]


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
    scores, best, cu_seqlens = _best_pairs(metric, sources, destinations)
    rows = route_topk(scores, r, cu_seqlens)
    return _plan(rows, best, metric, sources, destinations, r)


def match_above(
    metric: Tensor, threshold: float, sources: Tensor, destinations: Tensor
) -> MergePlan:
    """Plans the merge of every source whose cosine with a destination is at least `threshold`.

    Each sequence is judged alone, so it may keep more rows than another. On CUDA the number of rows
    is waited for once; see `route_threshold`.

    Reference: CA-ToMe (arXiv 2501.00946), adaptive merging.
    """
    scores, best, cu_seqlens = _best_pairs(metric, sources, destinations)
    rows, _ = route_threshold(scores, threshold, cu_seqlens, inclusive=True)
    return _plan(rows, best, metric, sources, destinations)


def split_cells(
    height: int, width: int, cell: tuple[int, int], choice: Tensor
) -> tuple[Tensor, Tensor]:
    """Makes one token of every cell of an image a destination, and the others sources.

    Args:
        height: tokens in a column.
        width: tokens in a row.
        cell: rows and columns of a cell; what is left over at the right and below is source.
        choice: [height // rows, width // columns] int64, the destination in each cell, counted row
            by row.

    Returns:
        Ascending positions of the sources and of the destinations in the height * width tokens.

    Reference: Bolya and Hoffman, Token Merging for Stable Diffusion (arXiv 2303.17604).
    """
    (down, across), device = choice.shape, choice.device
    rows = torch.arange(down, device=device)[:, None] * cell[0] + choice // cell[1]
    columns = torch.arange(across, device=device) * cell[1] + choice % cell[1]
    chosen = torch.zeros(height * width, dtype=torch.int8, device=device)
    chosen = chosen.index_fill(0, (rows * width + columns).flatten(), 1)
    order = chosen.argsort(stable=True)
    return order[: -down * across], order[-down * across :]


@torch.no_grad()
def _best_pairs(
    metric: Tensor, sources: Tensor, destinations: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each source the best cosine and its destination, and the `cu_seqlens` of the sources."""
    cu_a, cu_b = (
        even_lengths(metric.shape[0], t.shape[0], metric.device) for t in (sources, destinations)
    )
    a, b = (metric.index_select(1, t).flatten(0, 1) for t in (sources, destinations))
    scores, best = bipartite_match(a, b, cu_a, cu_b)
    return scores, best, cu_a


@torch.no_grad()
def _plan(
    rows: Tensor,
    best: Tensor,
    metric: Tensor,
    sources: Tensor,
    destinations: Tensor,
    r: int | None = None,
) -> MergePlan:
    """Numbers the rows that remain; r of each sequence are merged, or any number (None)."""
    batch, tokens, device = *metric.shape[:2], rows.device
    num_a, num_b = sources.shape[0], destinations.shape[0]
    protected = tokens - num_a - num_b
    merged = torch.zeros(batch * num_a, dtype=torch.bool, device=device)
    merged = merged.index_fill(0, rows, True).view(batch, num_a)
    sequence = torch.arange(batch, device=device)[:, None]
    if r is not None:
        count: int | Tensor = r
        cu_seqlens = even_lengths(batch, tokens - r, device)
    else:
        count = merged.sum(1, keepdim=True)
        cu_seqlens = nn.functional.pad((tokens - count).cumsum(0)[:, 0], (1, 0)).int()
    begin = cu_seqlens[:-1, None].long()
    start = begin + (protected + num_a - count)  # the first destination
    joined = best.view(batch, num_a) - sequence * num_b + start
    stayed = (~merged).cumsum(1) + (begin + (protected - 1))
    segments = torch.empty(batch, tokens, dtype=torch.int64, device=device)
    if protected:
        segments[:, :protected] = torch.arange(protected, device=device) + begin
    segments[:, sources] = torch.where(merged, joined, stayed)
    segments[:, destinations] = torch.arange(num_b, device=device) + start
    return MergePlan(segments.flatten(), cu_seqlens, batch * tokens - rows.shape[0])
