"""MixtureOfRecursions: any block of an existing model, used several times on routed tokens."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mor.modules.block_arguments import BlockArguments, CallArguments
from mor.modules.expert_choice import ExpertChoice
from mor.modules.layer_pass import LayerPass
from mor.modules.packing import PackedBatch, Packing, pack
from mor.modules.recursion import LastRouting, RecursionOutput
from mor.modules.recursion_options import recursion_with
from mor.modules.token_choice import TokenChoice

__all__ = ["MixtureOfRecursions"]


class MixtureOfRecursions(nn.Module):
    """Wraps a block so that a router decides how often each token goes through it.

    The block is any module whose first input and (first) output are hidden states [B, S, D]. It is
    called on the selected tokens of each sequence, in order, as shorter sequences, and so are its
    other arguments: what has one entry per token ([B or 1, S, ...]: positions, rotary embeddings,
    `src_key_padding_mask`) and masks ([S, S], [B * heads, S, S] or [B or 1, heads or 1, S, S]) are
    cut to the same tokens, also inside tuples, lists and dicts. Pads are named by `token_mask`;
    sequences that keep different numbers of tokens are called one length at a time, so the block
    never sees a pad. A block that keeps state between calls, as in a key/value cache, cannot be
    wrapped.

    What an argument is follows from its name, where PyTorch or Transformers fixed that
    (`src_mask`), or else from its shape. What could be several things, as a mask [S, S] of a block
    of your own when S = B, is refused until `arguments` names it.

    Args:
        block: the module to wrap.
        hidden_size: the width D.
        num_recursions: the number R. One recursion is useful too: with `capacities=[0.5]` half of
            the tokens skip the block.
        router: "expert", "token" or None (every token takes every recursion).
        arguments: for arguments of the block, by name or position (hidden states are 0): "token",
            "mask", "sequence" (one entry per sequence, as the memory of cross-attention) or
            "whole" (handed over as it is).
        **options: of `ExpertChoice` or `TokenChoice`; `score` also as a dict of `RouterScore`'s
            fields.

    Attributes:
        routing: the `RecursionOutput` of this thread's last call, with its losses; add
            `routing.aux_loss` (expert-choice) or `routing.balancing_loss` (token-choice), times a
            coefficient, to the loss.
        token_depths: [B, S] recursions that each token took in this thread's last call; 0 for pads.

    Raises:
        ValueError: an option that the router does not have, or a value that it does not take.

    Example:
        >>> block = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        >>> layer = MixtureOfRecursions(block, 8, num_recursions=3)
        >>> layer(torch.randn(2, 6, 8)).shape
        torch.Size([2, 6, 8])
        >>> layer.token_depths.shape
        torch.Size([2, 6])

    Reference: MoR paper, section 2.2.
    """

    def __init__(
        self,
        block: nn.Module,
        hidden_size: int,
        num_recursions: int,
        router: str | None = "expert",
        *,
        arguments: Mapping[str | int, str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if num_recursions < 1:
            raise ValueError(f"num_recursions: expected at least 1, got {num_recursions}")
        self.block, self.hidden_size = block, hidden_size
        self.num_recursions = num_recursions
        self.arguments = BlockArguments(block, arguments, type(self).__name__)
        self.recursion: ExpertChoice | TokenChoice | None = recursion_with(
            type(self).__name__, router, hidden_size, num_recursions, options
        )
        self._last = LastRouting()

    @property
    def routing(self) -> RecursionOutput | None:
        """The `RecursionOutput` of this thread's last call; None without a router."""
        return self._last.output

    @property
    def token_depths(self) -> Tensor | None:
        """[B, S] int64: the recursions that each token took in this thread's last call."""
        return self._last.token_depths

    def forward(
        self, hidden: Tensor, *args: Any, token_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Runs the recursions.

        Args:
            hidden: [B, S, D].
            token_mask: [B, S], non-zero at tokens; pads take no recursion and keep their state.
            *args: passed to the block, cut to its tokens.
            **kwargs: likewise.

        Returns:
            What the block returns in its last call, its first output replaced by [B, S, D].

        Raises:
            ValueError: hidden states of another rank or width, a token_mask of another shape, an
                argument whose layout is left open.
        """
        if hidden.dim() != 3 or hidden.shape[2] != self.hidden_size:
            raise ValueError(
                f"{type(self).__name__}: expected hidden of shape [B, S, {self.hidden_size}], got "
                f"{list(hidden.shape)}"
            )
        batch_size, length, width = hidden.shape
        if token_mask is not None:
            token_mask = _is_token(type(self).__name__, token_mask, (batch_size, length))
        args, kwargs = given = self.arguments.as_taken((args, kwargs), batch_size)
        if self.recursion is None and token_mask is None:
            for _ in range(self.num_recursions):
                result = self.block(hidden, *args, **kwargs)
                hidden = _first(result)
            self._last.token_depths = torch.full(
                (batch_size, length), self.num_recursions, device=hidden.device
            )
            return result
        batch = pack((batch_size, length), hidden.device, token_mask)
        arguments = self.arguments.of_call(given, batch_size, length)
        layers = _BlockPass(self.block, arguments, batch)
        packed = batch.pack(hidden)
        if self.recursion is None:
            rows = torch.arange(packed.shape[0], device=packed.device)
            depths = torch.full_like(rows, self.num_recursions)
            out = packed
            for step in range(self.num_recursions):
                out = layers(out, batch.packing, step, rows)
        else:
            routing = self.recursion(packed, batch.packing, layers)
            self._last.output = routing
            out, depths = routing.hidden, routing.depths
        self._last.token_depths = batch.unpack_masked(depths, 0)
        if batch.rows is not None:
            out = hidden.reshape(-1, width).index_copy(0, batch.rows, out)
        out = out.reshape(batch_size, length, width)
        result = layers.last_result(hidden)
        return (out, *result[1:]) if isinstance(result, tuple) else out


class _BlockPass(LayerPass):
    """A wrapped block during one forward call, on sequences [b, k, D] of its tokens.

    Args:
        block: the module.
        arguments: its other arguments in this call.
        batch: how the batch was packed.
    """

    def __init__(self, block: nn.Module, arguments: CallArguments, batch: PackedBatch) -> None:
        self.block, self.arguments, self.batch = block, arguments, batch
        self._result: Any = None
        self._was_called = False

    def run(self, x: Tensor, packing: Packing, step: int, rows: Tensor) -> Tensor:
        """The block on rows [K, D], at least one."""
        return _by_length(self._call_some, x, packing, self.batch.columns[rows])

    def run_dummy_row(self, x: Tensor, step: int) -> Tensor:
        """The block on a row [1, D] with the arguments of a token, or of none if there is none."""
        batch_size, length = self.batch.shape
        first = None if self.batch.rows is None else self.batch.rows[:1]
        if first is None and batch_size * length > 0:
            first = torch.zeros(1, dtype=torch.int64, device=x.device)
        if first is None or first.shape[0] == 0:
            cut: Any = self.arguments.of_no_token()
        else:  # of the first token, from which attention is not NaN
            cut = self.arguments.cut(first // length, (first % length).unsqueeze(1))
        return self._call(x.unsqueeze(0), cut).reshape(1, -1)

    def last_result(self, hidden: Tensor) -> Any:
        """What the block returned in its last call; its form is known from a call alone."""
        if not self._was_called:
            self.run_dummy_row(hidden.new_zeros(1, hidden.shape[-1]), 0)
        return self._result

    def _call_some(self, x: Tensor, sequences: Tensor, tokens: Tensor) -> Tensor:
        """The block on tokens [b, k] of some sequences, one by one where arguments need it."""
        cut = self.arguments.cut(sequences, tokens)
        if cut is None:
            alone = zip(x.split(1), sequences.split(1), tokens.split(1), strict=True)
            return torch.cat([self._call_some(*one) for one in alone])
        return self._call(x, cut)

    def _call(self, x: Tensor, cut: Any) -> Tensor:
        self._result, self._was_called = self.block(x, *cut[0], **cut[1]), True
        return _first(self._result).to(x.dtype)  # autocast may have made it narrower


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _is_token(where: str, token_mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """The token mask as bool."""
    if token_mask.shape != shape:
        raise ValueError(
            f"{where}: token_mask: expected shape {list(shape)}, got {list(token_mask.shape)}"
        )
    if token_mask.dtype != torch.bool and bool((token_mask < 0).any()):
        raise ValueError(
            f"{where}: token_mask: expected 0 at pads and 1 at tokens, got negative values"
        )
    return token_mask != 0


def _by_length(
    call: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    packing: Packing,
    tokens: Tensor,
) -> Tensor:
    """Calls the block on [b, k, D] once for each number k of tokens that sequences keep."""
    lengths: Sequence[int] = packing.lengths or packing.cu_seqlens.diff().tolist()
    if len(set(lengths)) == 1:
        shape = len(lengths), lengths[0]
        sequences = torch.arange(len(lengths), device=x.device)
        y = call(x.reshape(*shape, -1), sequences, tokens.reshape(shape))
        return y.reshape(-1, y.shape[-1])
    out: Tensor | None = None
    for count in sorted(set(lengths) - {0}):
        sequences = torch.tensor([b for b, n in enumerate(lengths) if n == count], device=x.device)
        starts = packing.cu_seqlens[sequences].long()
        local = starts.unsqueeze(1) + torch.arange(count, device=x.device)
        y = call(x[local], sequences, tokens[local])
        out = y.new_zeros(x.shape[0], y.shape[-1]) if out is None else out
        out = out.index_copy(0, local.reshape(-1), y.reshape(-1, y.shape[-1]))
    assert out is not None
    return out
