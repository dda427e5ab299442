"""What a wrapped block is called with besides hidden states, cut to the tokens that a router keeps.

A tensor among the arguments has one of four layouts (`LAYOUTS`), B sequences of S tokens:

- "token": one entry per token, [B or 1, S, ...]; becomes [b, k, ...].
- "mask": what each query sees, [S, S], [B * heads, S or 1, S] or [B or 1, heads or 1, S or 1, S];
  becomes the same of k kept tokens.
- "sequence": one entry per sequence, [B or 1, ...], as the memory of cross-attention.
- "whole": handed over as it is.

The caller may name the layout of an argument. Otherwise its name says it where PyTorch or
Transformers fixed what that name means, or else its shape; a shape that leaves a doubt is refused.

More than 300 lines, so that a layout is described, recognised and cut in one place.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LAYOUTS", "BlockArguments", "CallArguments"]

Given = tuple[tuple[Any, ...], dict[str, Any]]
LAYOUTS = ("token", "mask", "sequence", "whole")

_KNOWN = {
    "src_mask": "mask",
    "tgt_mask": "mask",
    "src_key_padding_mask": "token",
    "tgt_key_padding_mask": "token",
    "key_padding_mask": "token",
    "memory": "sequence",
    "memory_key_padding_mask": "sequence",
    "position_ids": "token",
    "position_embeddings": "token",
    "encoder_hidden_states": "sequence",
}
#: Take a mask of each sequence as [B * heads, S, S] in place of one [S, S] for all.
_TAKE_MASKS_OF_HEADS = (
    nn.TransformerEncoderLayer,
    nn.TransformerEncoder,
    nn.TransformerDecoderLayer,
    nn.TransformerDecoder,
)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_CATCH_ALL = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_SHAPES = {
    "token": "one entry per token, [B or 1, S, ...]",
    "mask": "a mask [S, S], [B * heads, S, S] or [B or 1, heads or 1, S, S]",
    "sequence": "one entry per sequence, [B or 1, ...]",
    "whole": "anything else",
}


class BlockArguments:
    """Names and layouts of a block's arguments.

    Args:
        block: whose `forward` takes hidden states first.
        layouts: layout of arguments by name, or by position in the call (hidden states are 0).
        where: begins the errors: the module that wraps the block.

    Raises:
        ValueError: an argument that the block does not have, an unknown layout, a block of hidden
            states [S, B, D].
    """

    def __init__(
        self,
        block: nn.Module,
        layouts: Mapping[str | int, str] | None,
        where: str = "MixtureOfRecursions",
    ) -> None:
        self.where = where
        parameters = _parameters(block)
        kinds = {parameter.kind for parameter in parameters}
        names = [p.name for p in parameters if p.kind not in _CATCH_ALL]
        self.names = [p.name for p in parameters if p.kind in _POSITIONAL]
        self.layouts: dict[str | int, str] = {}
        for key, layout in (layouts or {}).items():
            if layout not in LAYOUTS:
                raise ValueError(f"arguments[{key!r}]: expected one of {LAYOUTS}, got {layout!r}")
            if isinstance(key, int):
                known = 1 <= key <= len(self.names)
                catch_all = key >= 1 and inspect.Parameter.VAR_POSITIONAL in kinds
                name: str | int = self.names[key - 1] if known else key
            else:
                known, name = key in names, key
                catch_all = inspect.Parameter.VAR_KEYWORD in kinds
            if not known and not catch_all:
                raise ValueError(
                    f"arguments: expected arguments that {type(block).__name__} takes besides "
                    f"hidden states, {names}, got {key!r}"
                )
            self.layouts[name] = layout
        attentions = [m for m in block.modules() if isinstance(m, nn.MultiheadAttention)]
        if not isinstance(block, _TAKE_MASKS_OF_HEADS):
            attentions = []
        if not all(getattr(module, "batch_first", True) for module in (block, *attentions)):
            raise ValueError(
                f"{where}: expected a block of hidden states [B, S, D], got a "
                f"{type(block).__name__} of [S, B, D]; make it with batch_first=True"
            )
        if isinstance(block, nn.TransformerEncoder):
            self.layouts.setdefault("mask", "mask")
        heads = {attention.num_heads for attention in attentions}
        self.num_heads = heads.pop() if len(heads) == 1 else None

    def of_call(self, given: Given, batch_size: int, length: int) -> "CallArguments":
        """The arguments of one call on hidden states [batch_size, length, D].

        Raises:
            ValueError: a tensor that does not have the layout it was said to have, or whose shape
                leaves it open.
        """

        def find(name: str | int, value: Any) -> Any:
            return _map(
                value,
                Tensor,
                lambda x: _Found(x, self._layout(name, tuple(x.shape), batch_size, length)),
            )

        args, kwargs = given
        names = [*self.names, *range(len(self.names) + 1, len(args) + 1)]
        found = (
            tuple(find(name, value) for name, value in zip(names, args, strict=False)),
            {name: find(name, value) for name, value in kwargs.items()},
        )
        return CallArguments(given, found, batch_size, length, self.num_heads)

    def as_taken(self, given: Given, batch_size: int) -> Given:
        """PyTorch's layers get masks [B or 1, heads or 1, S, S] as [S, S] or [B * heads, S, S]."""
        heads = self.num_heads
        if heads is None:
            return given

        def one(x: Tensor) -> Tensor:
            if x.dim() != 4 or x.shape[0] not in (1, batch_size):
                return x
            if x.shape[:2] == (1, 1):
                return x[0, 0]
            return x.expand(batch_size, heads, *x.shape[2:]).flatten(0, 1)

        taken: Given = _map(given, Tensor, one)
        return taken

    def _layout(self, name: str | int, shape: tuple[int, ...], batch_size: int, length: int) -> str:
        given = self.layouts.get(name)
        known = _KNOWN.get(name) if isinstance(name, str) else None
        for layout in (given, known):
            if layout is not None and _fits(layout, shape, batch_size, length):
                return layout
        got = f"got {list(shape)} with B = {batch_size} sequences of S = {length} tokens"
        label = f"argument {name}" if isinstance(name, int) else name
        if given is not None:
            raise ValueError(
                f"{self.where}: {label}: expected {_SHAPES[given]}, since its layout was "
                f"said to be {given!r}, {got}"
            )
        guessed = _guess(shape, batch_size, length)
        if guessed is None:
            layouts = "; ".join(f"{layout!r}: {text}" for layout, text in _SHAPES.items())
            raise ValueError(
                f"{self.where}: {label}: expected a shape that tells its layout, {got}; "
                f"name it, as in {self.where}(..., arguments={{{name!r}: 'token'}}): "
                f"{layouts}"
            )
        return guessed


@dataclass(frozen=True)
class _Found:
    """A tensor among the arguments, and its layout."""

    tensor: Tensor
    layout: str


@dataclass(frozen=True)
class CallArguments:
    """The arguments of one call, to be cut as often as its block is called.

    Attributes:
        given: positional and keyword arguments as the caller gave them.
        found: the same, each tensor with its layout.
        batch_size, length: B, S.
        num_heads: of a block that takes masks [B * heads, S, S]; None for others.
    """

    given: Given
    found: Any
    batch_size: int
    length: int
    num_heads: int | None

    def cut(self, sequences: Tensor, tokens: Tensor) -> Given | None:
        """The arguments for `tokens` [b, k] of `sequences` [b].

        None if the sequences have to be handed over one at a time: they keep different tokens and
        so see different parts of one mask [S, S], of which the block takes one for all.
        """
        if tokens.shape == (self.batch_size, self.length):
            return self.given  # every token of every sequence, in order
        apart = False

        def one(found: _Found) -> Any:
            nonlocal apart
            x = found.tensor
            if found.layout == "mask" and x.dim() == 2:
                parts = x[tokens.unsqueeze(2), tokens.unsqueeze(1)]  # [b, k, k]
                if _all_the_same(parts):
                    return parts[0]
                if self.num_heads is None:
                    apart = True
                    return parts
                return parts.repeat_interleave(self.num_heads, dim=0)
            return _cut(found, sequences, tokens, self.batch_size)

        cut: Given = _map(self.found, _Found, one)
        return None if apart else cut

    def of_no_token(self) -> Given:
        """Arguments for one token of a batch without tokens: zeros."""

        def one(found: _Found) -> Any:
            x, layout = found.tensor, found.layout
            if layout == "whole":
                return x
            cut = {"mask": range(x.dim() - 2, x.dim()), "token": (1,)}.get(layout, ())
            shape = [1 if i == 0 or i in cut else size for i, size in enumerate(x.shape)]
            if layout == "mask" and x.dim() == 3:
                shape[0] = self.num_heads or max(1, x.shape[0] // max(self.batch_size, 1))
            return x.new_zeros(shape)

        nothing: Given = _map(self.found, _Found, one)
        return nothing


def _all_the_same(parts: Tensor) -> bool:
    """Whether one of [b, k, k] stands for all, as it does for causal masks.

    A mask that is learnt gets its gradient from every part. A graph cannot depend on values.
    """
    if parts.shape[0] == 1:
        return True
    if parts.requires_grad or torch.compiler.is_compiling():
        return False
    return bool((parts == parts[0]).all())


def _cut(found: _Found, sequences: Tensor, tokens: Tensor, batch_size: int) -> Tensor:
    """Cuts anything but a mask [S, S]."""
    x, layout = found.tensor, found.layout
    if layout == "whole":
        return x
    if layout == "sequence":
        return x if x.shape[0] == 1 or len(sequences) == batch_size else x[sequences]
    if layout == "mask":
        per_head = x.dim() == 3
        if per_head:  # [B * heads, S or 1, S]
            x = x.unsqueeze(0) if x.shape[0] == 1 else x.unflatten(0, (batch_size, -1))
        queries = tokens if x.shape[2] > 1 else torch.zeros_like(tokens[:, :1])
        rows = sequences if x.shape[0] > 1 else torch.zeros_like(sequences)
        # Indices around a slice come first: [b, k, k, heads].
        index = (rows.view(-1, 1, 1), slice(None), queries.unsqueeze(2), tokens.unsqueeze(1))
        x = x[index].permute(0, 3, 1, 2)
        return x.flatten(0, 1) if per_head else x
    return x[0][tokens] if x.shape[0] == 1 else x[sequences.unsqueeze(1), tokens]


def _fits(layout: str, shape: tuple[int, ...], batch_size: int, length: int) -> bool:
    """Whether a tensor of this shape can have the layout."""
    if layout == "whole":
        return True
    of_batch = len(shape) > 0 and shape[0] in (1, batch_size)
    if layout == "sequence":
        return of_batch
    if layout == "token":
        return of_batch and len(shape) > 1 and shape[1] == length
    if len(shape) == 2:
        return shape == (length, length)
    if len(shape) not in (3, 4) or shape[-1] != length or shape[-2] not in (1, length):
        return False
    of_heads = len(shape) == 3 and batch_size > 0 and shape[0] % batch_size == 0
    return of_batch or of_heads


def _guess(shape: tuple[int, ...], batch_size: int, length: int) -> str | None:
    """The layout that a shape has; None if it may have several, or has no batch dimension."""
    if not shape:
        return "whole"
    if length == 1 and shape[0] in (1, batch_size):
        return "sequence"  # all layouts are cut alike
    if len(shape) == 3 and shape[2] == length and shape[1] in (1, length):
        return None  # per token, [B * heads, S, S], [heads, S, S], or the keys that all see
    token, mask = (_fits(layout, shape, batch_size, length) for layout in ("token", "mask"))
    if token or mask:
        return None if token and mask else "token" if token else "mask"
    if shape[0] == length or (len(shape) > 3 and shape[2] == length):
        return None  # per token without a batch dimension, or behind that of heads
    return "sequence" if shape[0] == batch_size else "whole"


def _map(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Applies a function to what is of a kind, also inside tuples, lists and dicts."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, tuple | list):
        values = [_map(v, kind, function) for v in value]
        return value._make(values) if hasattr(value, "_make") else type(value)(values)
    if type(value) is dict:
        return {key: _map(v, kind, function) for key, v in value.items()}
    return value


def _parameters(block: nn.Module) -> list[inspect.Parameter]:
    """Parameters of a block's forward behind its hidden states."""
    try:
        parameters = list(inspect.signature(block.forward).parameters.values())
    except (TypeError, ValueError):  # compiled code
        empty = inspect.Parameter
        return [empty("args", empty.VAR_POSITIONAL), empty("kwargs", empty.VAR_KEYWORD)]
    first = parameters[:1]
    return parameters[1:] if first and first[0].kind in _POSITIONAL else parameters
