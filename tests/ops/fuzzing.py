"""What test_fuzz.py needs: operands drawn at random and broken at random, and the comparison."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.support.operators import assert_close_to_reference

Inputs = dict[str, Any]
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Widths around the vectors of every instruction set and dtype.
WIDTHS = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 129)
COUNTS = (0, 1, 2, 3, 5, 8, 16, 17, 33, 40, 65)


class Draw:
    """Choices made by hypothesis; tensors are filled by a generator of a drawn seed."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self._draw = draw
        self.generator = torch.Generator().manual_seed(self.integer(0, 2**16))

    def pick(self, *choices: Any) -> Any:
        """One of `choices`; the first is the simplest."""
        return self._draw(st.sampled_from(choices))

    def integer(self, low: int, high: int) -> int:
        """A number in [low, high]."""
        return self._draw(st.integers(low, high))

    def flag(self) -> bool:
        """Yes or no."""
        return self._draw(st.booleans())

    def lengths(self, most: int = 6, sizes: tuple[int, ...] = COUNTS) -> list[int]:
        """Rows of each of some sequences, none of them possible."""
        return self._draw(st.lists(st.sampled_from(sizes), max_size=most))

    def random(self, low: int, high: int, *shape: int) -> Tensor:
        """Integers in [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator)

    def floats(self, dtype: torch.dtype, *shape: int, layout: bool = True, **kinds: bool) -> Tensor:
        """Values of one of `VALUES`, in any layout; `infinite` and `huge` allow those kinds."""
        allowed = [k for k in VALUES if kinds.get(k, k not in ("infinite", "huge"))]
        values = VALUES[self.pick(*allowed)](self, dtype, shape).to(dtype)
        return self.layout(values) if layout else values

    def layout(self, t: Tensor, expand: bool = True) -> Tensor:
        """The values of `t` with other strides and offset; expanded, the first row everywhere."""
        kind = self.pick("contiguous", "slice", "columns", "transposed", "expanded")
        if kind == "expanded" and expand and t.dim() and t.shape[0]:
            return t[:1].expand(t.shape)
        if kind == "slice":
            larger = t.new_zeros([2 * s + 1 for s in t.shape[:-1]] + [t.shape[-1] + 3])
            rows = (slice(1, 1 + 2 * s, 2) for s in t.shape[:-1])
            return larger[(*rows, slice(2, 2 + t.shape[-1]))].copy_(t)
        if kind == "columns":  # a step of two in the last dimension
            return t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])[..., ::2].copy_(t)
        if kind == "transposed" and t.dim() > 1:
            return t.transpose(0, -1).contiguous().transpose(0, -1)
        return t

    def rows(self, num_rows: int, count: int) -> Tensor:
        """Indices into `num_rows` rows, all kinds that an operator may treat differently."""
        if num_rows == 0:
            return torch.zeros(0, dtype=torch.int64)
        kind = self.pick("ascending", "repeats", "any", "falling", "equal", "ends", "permuted")
        rows = self.random(0, num_rows, count)
        if kind in ("ascending", "permuted"):
            rows = torch.randperm(num_rows, generator=self.generator)[:count]
        if kind == "equal":
            rows = rows[:1].expand(count).contiguous()
        if kind == "ends":
            rows = torch.arange(count) % 2 * (num_rows - 1)
        if kind in ("ascending", "repeats", "falling"):
            rows = rows.sort(descending=kind == "falling").values
        return self.layout(rows)


def _normal(d: Draw, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=d.generator, dtype=torch.float64)


def _some(special: Callable[[torch.dtype], list[float]]) -> Callable[..., Tensor]:
    """Normal values, a third of them replaced by special ones."""

    def make(d: Draw, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        choices = torch.tensor(special(dtype), dtype=torch.float64)
        normal, chosen = _normal(d, dtype, shape), choices[d.random(0, len(choices), *shape)]
        return torch.where(d.random(0, 3, *shape) == 0, chosen, normal)

    return make


def _tiny(dtype: torch.dtype) -> list[float]:
    info = torch.finfo(dtype)
    return [0.0, -0.0, info.tiny, -info.tiny, info.tiny * info.eps, -info.tiny * info.eps, info.eps]


#: Kinds of floating values. Sums of huge ones stay finite in float32, products need not.
VALUES: dict[str, Callable[[Draw, torch.dtype, tuple[int, ...]], Tensor]] = {
    "normal": _normal,
    "whole": lambda d, dtype, shape: _normal(d, dtype, shape).round(),
    "zero": lambda d, dtype, shape: torch.zeros(shape, dtype=torch.float64),
    "tiny": _some(_tiny),
    "large": lambda d, dtype, shape: _normal(d, dtype, shape) * 100,
    "huge": lambda d, dtype, shape: _normal(d, dtype, shape) * torch.finfo(dtype).max / 2**14,
    "infinite": _some(lambda dtype: [torch.inf, -torch.inf, torch.nan, 1.0]),
}


def outputs(result: Any) -> tuple[Tensor, ...]:
    """The result as a tuple."""
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def in_double(inputs: Inputs, absolute: bool = False) -> Inputs:
    """The floating operands, or their absolute values, in float64."""
    floating = {
        k: v.double() for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()
    }
    return inputs | ({k: v.abs() for k, v in floating.items()} if absolute else floating)


def magnitudes_of_sums(op: "Operator", inputs: Inputs) -> tuple[Tensor, ...]:
    """Sums of the terms' absolute values, for an operator that only multiplies and adds."""
    return outputs(op.reference(**in_double(inputs, absolute=True)))


@dataclass(frozen=True)
class Operator:
    """An entry of fuzz_operators.py.

    Attributes:
        call: the operator.
        reference: the same in plain PyTorch, with the same arguments.
        draw: a valid call's keyword arguments.
        exact: results are copies or indices, equal bit for bit.
        factor: allowed multiple of the reference's own error.
        magnitudes: for each result the size of the terms that are summed, for they may cancel.
        tied: for each operand, the dimensions that must fit another operand's.
        any_rank: operands that may have another rank.
        any_dtype: operands that may have another dtype.
        any_device: operands beside the first whose device nothing but Python reads.
        broken: values, not sizes, made wrong: each changes the arguments or returns None where
            these arguments cannot be broken so.
        refused_as: regular expression of the operator's name in its messages; "" leaves out invalid
            calls.
    """

    call: Callable[..., Any]
    reference: Callable[..., Any]
    draw: Callable[[Draw], Inputs]
    refused_as: str
    exact: bool = False
    factor: float = 2.0
    magnitudes: Callable[["Operator", Inputs], tuple[Tensor, ...]] = magnitudes_of_sums
    tied: dict[str, tuple[int, ...]] = field(default_factory=dict)
    any_rank: tuple[str, ...] = ()
    any_dtype: tuple[str, ...] = ()
    any_device: tuple[str, ...] = ()
    broken: dict[str, Callable[[Draw, Inputs], Inputs | None]] = field(default_factory=dict)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, NaN and the sign of zero included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (t.new_empty(t.shape).copy_(t).flatten().view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


@contextmanager
def restored(*written: Tensor) -> Iterator[None]:
    """Operands written in place are as before at the end; writes around them are found."""
    written = tuple(t for t in written if t.is_cpu and 0 not in t.stride())  # others are refused
    storages = [torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()) for t in written]
    before = [(t.clone(), s.clone()) for t, s in zip(written, storages, strict=True)]
    try:
        yield
    finally:
        for t, (original, _) in zip(written, before, strict=True):
            t.copy_(original)
        for storage, (_, whole) in zip(storages, before, strict=True):
            assert same_bits(storage, whole), "wrote beside an operand"


def compare(
    name: str, got: Tensor, low: Tensor, high: Tensor, factor: float, magnitude: Tensor
) -> None:
    """`assert_close_to_reference` where NaN, infinity and overflow are possible."""
    rounded = high.to(got.dtype).double()
    want = torch.where(rounded.isinf(), rounded, high.double())
    assert got.shape == want.shape, f"{name}: {list(got.shape)} instead of {list(want.shape)}"
    assert torch.equal(got.isnan(), want.isnan()), f"{name}: NaN in other places"
    got, want = (t.masked_fill(want.isnan(), 0) for t in (got, want))
    low = torch.where(low.isfinite(), low.double(), want)  # its own overflow excuses nothing
    terms = magnitude[magnitude.isfinite()]
    largest = terms.max().item() if terms.numel() else 0.0
    assert_close_to_reference(name, got, low, want, factor, largest)


def changed(d: Draw, t: Tensor, *values: int | float) -> Tensor | None:
    """A copy with one of `values` somewhere; None where there is no element."""
    if t.numel() == 0:
        return None
    t = t.clone()
    t[d.integer(0, t.numel() - 1)] = d.pick(*values)
    return t


def broken_cu_seqlens(
    name: str = "cu_seqlens",
) -> dict[str, Callable[[Draw, Inputs], Inputs | None]]:
    """Offsets that start late, fall, or end elsewhere."""

    def change(index: int, by: int) -> Callable[[Draw, Inputs], Inputs | None]:
        def apply(d: Draw, inputs: Inputs) -> Inputs | None:
            cu = inputs.get(name)
            if cu is None or cu.numel() < 2:
                return None
            cu = cu.clone()
            cu[index] += by * d.pick(1, 2, 1000, 2**30)
            return {name: cu}

        return apply

    def fall(d: Draw, inputs: Inputs) -> Inputs | None:
        cu = inputs.get(name)
        if cu is None or cu.numel() < 3:
            return None
        cu = cu.clone()
        inner = d.integer(1, cu.numel() - 2)
        cu[inner] = d.pick(-1, -(2**31), int(cu[-1]) + 1, 2**31 - 1)
        return {name: cu}

    return {
        f"{name} starts": change(0, 1),
        f"{name} ends high": change(-1, 1),
        f"{name} ends low": change(-1, -1),
        f"{name} falls": fall,
    }


def break_operand(d: Draw, op: Operator, inputs: Inputs) -> tuple[str, Inputs] | None:
    """The call with one thing wrong, and what; None where the choice does not apply."""
    kind = d.pick("rank", "dtype", "device", "size", *op.broken)
    if kind in op.broken:
        changed = op.broken[kind](d, inputs)
        return None if changed is None else (kind, {**inputs, **changed})
    tensors = [n for n, v in inputs.items() if isinstance(v, Tensor)]
    excused = {"rank": op.any_rank, "dtype": op.any_dtype}
    excused["device"] = (tensors[0], *op.any_device)
    if kind == "size":
        excused["size"] = tuple(n for n in tensors if n not in op.tied)
    names = [n for n in tensors if n not in excused[kind]]
    if not names:
        return None
    name = d.pick(*names)
    t = inputs[name]
    if kind == "rank":
        t = t[None] if d.flag() or t.dim() == 0 or t.shape[0] == 0 else t[0]
    elif kind == "dtype":
        t = t.to(d.pick(torch.int16, torch.int8))
    elif kind == "device":
        t = t.to("meta")
    else:
        dim = d.pick(*op.tied[name])
        longer = d.flag() or t.shape[dim] == 0
        shape = [s + (i == dim) for i, s in enumerate(t.shape)]
        t = t.new_zeros(shape) if longer else t.narrow(dim, 0, t.shape[dim] - 1)
    return f"{kind} of {name}", {**inputs, name: t}
