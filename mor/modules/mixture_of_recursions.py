"""MixtureOfRecursions: any block of an existing model, used several times on routed tokens."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mor.modules.expert_choice import ExpertChoice
from mor.modules.packing import Packing, pack
from mor.modules.recursion import LastRouting, RecursionOutput
from mor.modules.token_choice import TokenChoice

__all__ = ["MixtureOfRecursions"]


class MixtureOfRecursions(nn.Module):
    """Wraps a block so that a router decides how often each token goes through it.

    The block is any module whose first input and (first) output are hidden states [B, S, D]. It is
    called on the selected tokens of each sequence, in order, as shorter sequences; arguments that
    have one entry per token are cut to the same tokens: tensors [B or 1, S, ...] (positions, rotary
    embeddings, a padding mask) and masks [B or 1, heads or 1, S, S], also inside tuples. Pads are
    named by `token_mask`; sequences that keep different numbers of tokens are called one length at
    a time, so the block never sees a pad.

    Args:
        block: the module to wrap.
        hidden_size: D.
        num_recursions: R.
        router: "expert", "token" or None (every token takes every recursion).
        **options: of `ExpertChoice` or `TokenChoice`.

    Attributes:
        routing: the `RecursionOutput` of this thread's last call, with its losses; add
            `routing.aux_loss` (expert-choice) or `routing.balancing_loss` (token-choice), times a
            coefficient, to the loss.

    Example:
        >>> block = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        >>> layer = MixtureOfRecursions(block, 8, num_recursions=3)
        >>> layer(torch.randn(2, 6, 8)).shape
        torch.Size([2, 6, 8])

    Reference: MoR paper, section 2.2.
    """

    def __init__(
        self,
        block: nn.Module,
        hidden_size: int,
        num_recursions: int,
        router: str | None = "expert",
        **options: Any,
    ) -> None:
        super().__init__()
        if num_recursions < 1:
            raise ValueError(f"num_recursions: expected at least 1, got {num_recursions}")
        self.block, self.hidden_size = block, hidden_size
        self.num_recursions = num_recursions
        self.recursion: ExpertChoice | TokenChoice | None
        if router == "expert":
            self.recursion = ExpertChoice(hidden_size, num_recursions, **options)
        elif router == "token":
            self.recursion = TokenChoice(hidden_size, num_recursions, **options)
        elif router is None and not options:
            self.recursion = None
        else:
            raise ValueError(f"router: expected expert, token or None, got {router!r} {options}")
        self._last = LastRouting()

    @property
    def routing(self) -> RecursionOutput | None:
        """The `RecursionOutput` of this thread's last call."""
        return self._last.output

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
            ValueError: hidden states of another rank or width, a mask of another shape.
        """
        if hidden.dim() != 3 or hidden.shape[2] != self.hidden_size:
            raise ValueError(
                f"MixtureOfRecursions: expected hidden of shape [B, S, {self.hidden_size}], got "
                f"{list(hidden.shape)}"
            )
        batch_size, length, width = hidden.shape
        if self.recursion is None:
            for _ in range(self.num_recursions):
                result = self.block(hidden, *args, **kwargs)
                hidden = _first(result)
            return result
        extra: list[Any] = []

        def block(x: Tensor, packing: Packing, step: int, rows: Tensor) -> Tensor:
            def call(hidden: Tensor, sequences: Tensor, tokens: Tensor) -> Tensor:
                cut = _cutter(batch_size, length, sequences, tokens)
                result = self.block(
                    hidden, *map(cut, args), **{k: cut(v) for k, v in kwargs.items()}
                )
                extra[:] = [result]
                return _first(result)

            return _by_length(call, x, packing, batch.columns[rows])

        batch = pack((batch_size, length), hidden.device, token_mask)
        everyone = batch.rows
        routing = self.recursion(batch.pack(hidden), batch.packing, block)
        self._last.output = routing
        out = routing.hidden
        if everyone is not None:
            out = hidden.reshape(-1, width).index_copy(0, everyone, out)
        out = out.reshape(batch_size, length, width)
        result = extra[0] if extra else out
        return (out, *result[1:]) if isinstance(result, tuple) else out


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _by_length(
    call: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    packing: Packing,
    tokens: Tensor,
) -> Tensor:
    """Calls the block on [b, k, D] once for each number k of tokens that sequences keep."""
    lengths: Sequence[int] = packing.lengths or packing.cu_seqlens.diff().tolist()
    if x.shape[0] == 0:
        # Nobody takes this step; the block still runs, so that every process calls it.
        nobody = torch.zeros(1, 1, dtype=torch.int64, device=x.device)
        dropped = call(x.new_zeros(1, 1, x.shape[1]) + 0 * x.sum(), nobody[0], nobody)
        return dropped.reshape(1, -1)[:0].reshape(0, x.shape[1])
    out: Tensor | None = None
    for count in sorted(set(lengths) - {0}):
        sequences = torch.tensor([b for b, n in enumerate(lengths) if n == count], device=x.device)
        starts = packing.cu_seqlens[sequences].long()
        local = starts.unsqueeze(1) + torch.arange(count, device=x.device)
        y = call(x[local], sequences, tokens[local])
        if len(set(lengths)) == 1:
            return y.reshape(-1, y.shape[-1])
        out = y.new_zeros(x.shape[0], y.shape[-1]) if out is None else out
        out = out.index_copy(0, local.reshape(-1), y.reshape(-1, y.shape[-1]))
    assert out is not None
    return out


def _cutter(
    batch_size: int, length: int, sequences: Tensor, tokens: Tensor
) -> Callable[[Any], Any]:
    """Cuts what has one entry per token to `tokens` [b, k] of `sequences` [b]."""

    def cut(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(cut(v) for v in value)
        if not isinstance(value, Tensor) or value.dim() < 2:
            return value
        if value.dim() == 2 and value.shape[0] == length != batch_size:
            raise ValueError(
                f"MixtureOfRecursions: expected masks of shape [B or 1, heads or 1, {length}, "
                f"{length}] or per token, got {list(value.shape)}"
            )
        if value.shape[0] not in (1, batch_size):
            return value
        value_rows = value.expand(batch_size, *value.shape[1:])[sequences]
        index = torch.arange(len(sequences), device=tokens.device).unsqueeze(1)
        if value.dim() == 4 and value.shape[2] == value.shape[3] == length:
            heads = value_rows.transpose(1, 2)[index, tokens]  # [b, k, heads, S]
            keys = tokens.view(*tokens.shape[:1], 1, 1, -1).expand(*heads.shape[:-1], -1)
            return heads.gather(3, keys).transpose(1, 2)
        return value_rows[index, tokens] if value.shape[1] == length else value

    return cut
