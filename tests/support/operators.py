"""The checks every operator passes, written once: values, gradients, registration, determinism.

Tests give `check_op` a case (how to make the inputs), and it compares the operator with its
plain-PyTorch reference in float64.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mor.ops  # noqa: F401 - loads the library

__all__ = [
    "DTYPES",
    "INSTRUCTION_SETS",
    "ON_SIMT",
    "OpCase",
    "assert_close_to_reference",
    "check_bad_input",
    "check_op",
    "instruction_set",
    "packed",
]

#: What the kernels of floating values take.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Levels of the CPU kernels, each including the ones before it.
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")

#: Whether `mor.ops` has the CUDA operators for the CPU (tests/simt).
ON_SIMT = torch.ops.mor.cuda_architectures() == "simt"

#: Error allowed whatever the reference in the same dtype does, relative to the largest value.
EPSILON = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class OpCase:
    """One operator on one kind of input.

    Attributes:
        id: readable name, the pytest id.
        op: the public function of `mor.ops`.
        reference: the same in plain PyTorch, taking the same arguments.
        raw: the dispatcher's operator, whose fake kernel must say what it returns; None if sizes
            of its results depend on values.
        make: makes the keyword arguments from (dtype, device, generator); floating tensors come in
            `dtype` unless the operator fixes theirs.
        differentiable: names of the arguments that have a gradient.
        exact: the result is a copy or an index, so it must equal the reference bit for bit.
        raw_args: turns the keyword arguments into the dispatcher's positional ones.
        opcheck: run torch's checks of the registration, once for each kind of input: they compile.
    """

    id: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    make: Callable[[torch.dtype, str, torch.Generator], dict[str, Any]]
    raw: Any = None
    raw_args: Callable[..., tuple[Any, ...]] | None = None
    differentiable: tuple[str, ...] = ()
    exact: bool = False
    opcheck: bool = False


def check_op(case: OpCase, dtype: torch.dtype, device: str = "cpu") -> None:
    """Runs every check that applies to `case` in `dtype`; a failure names the worst element."""
    inputs = case.make(dtype, device, torch.Generator().manual_seed(0))
    _check_values(case, inputs, dtype)
    _check_strided(case, inputs)
    _check_repeatable(case, inputs, device)
    if case.differentiable:
        _check_gradients(case, inputs, dtype)
    if case.raw is not None:
        args = case.raw_args(**inputs) if case.raw_args else tuple(inputs.values())
        _check_fake(case, args)
        if case.opcheck and dtype == torch.float32:  # registration does not depend on the dtype
            torch.library.opcheck(case.raw, args)


def assert_close_to_reference(
    name: str,
    got: Tensor,
    same_dtype: Tensor,
    exact: Tensor,
    factor: float = 2.0,
    magnitude: float = 0.0,
) -> None:
    """Asserts that `got` errs at most `factor` times as much as PyTorch in the same dtype.

    Args:
        name: what is compared, for the message.
        got: the operator's result.
        same_dtype: the reference computed in the operator's dtype.
        exact: the reference computed in float64.
        factor: allowed multiple of the reference's own error.
        magnitude: size of the terms summed, where they may cancel in every expected value.
    """
    assert got.shape == exact.shape, (
        f"{name}: shape {list(got.shape)}, expected {list(exact.shape)}"
    )
    if got.numel() == 0:
        return
    want = exact.double()
    finite = want.isfinite()
    assert torch.equal(got.double()[~finite], want[~finite]), f"{name}: infinities differ"
    if not finite.any():
        return
    error = (got.double() - want).abs().masked_fill(~finite, 0)
    theirs = (same_dtype.double() - want).abs().masked_fill(~finite, 0).max().item()
    scale = max(want[finite].abs().max().item(), magnitude)
    bound = max(factor * theirs, EPSILON[got.dtype] * max(scale, 1e-6))
    worst = int(error.argmax())
    where = [int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape)]
    assert error.max().item() <= bound, (
        f"{name}: error {error.max().item():.3g} at {where} (got "
        f"{got.flatten()[worst].item():.6g}, expected {want.flatten()[worst].item():.6g}), allowed "
        f"{bound:.3g}; {int((error > bound).sum())} of {error.numel()} wrong"
    )


def packed(lengths: list[int]) -> Tensor:
    """cu_seqlens of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def check_bad_input(
    message: str, op: Callable[..., Any], *args: Any, fake: bool = True, **kwargs: Any
) -> None:
    """Asserts that `op` refuses the arguments with `message`, on real and on fake tensors.

    Where fake tensors and the shapes on one device say nothing (fake=False), a value is bad: CUDA's
    operators do not look at those.
    """
    devices = {a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor)}
    if ON_SIMT and not fake and len(devices) == 1:
        return
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        op(*args, **kwargs)
    if fake:
        with FakeTensorMode() as mode:

            def convert(a: Any) -> Any:
                return mode.from_tensor(a) if isinstance(a, Tensor) else a

            fake_args = [convert(a) for a in args]
            fake_kwargs = {name: convert(a) for name, a in kwargs.items()}
            with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
                op(*fake_args, **fake_kwargs)


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Forces the CPU kernels of one of `INSTRUCTION_SETS`; skips a test the machine cannot run."""
    best = torch.ops.mor.instruction_set("best")
    if INSTRUCTION_SETS.index(name) > INSTRUCTION_SETS.index(best):
        pytest.skip(f"this machine has only {best}")
    torch.ops.mor.instruction_set(name)
    try:
        yield
    finally:
        torch.ops.mor.instruction_set("best")


def _check_fake(case: OpCase, args: tuple[Any, ...]) -> None:
    """The fake kernel gives results of the shapes, strides and dtypes that the operator gives."""
    with FakeTensorMode() as mode:
        fake = case.raw(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    real = case.raw(*(a.clone() if isinstance(a, Tensor) else a for a in args))
    for i, (mine, want) in enumerate(zip(_outputs(fake), _outputs(real), strict=True)):
        assert mine.shape == want.shape, f"{case.id}: fake output {i} has shape {mine.shape}"
        assert mine.dtype == want.dtype, f"{case.id}: fake output {i} has dtype {mine.dtype}"
        assert mine.stride() == want.stride(), f"{case.id}: fake output {i} has other strides"


def _outputs(result: Any) -> tuple[Tensor, ...]:
    if result is None:  # it writes into its operands
        return ()
    return result if isinstance(result, (tuple, list)) else (result,)


def _cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }


def _check_values(case: OpCase, inputs: dict[str, Any], dtype: torch.dtype) -> None:
    got = _outputs(case.op(**inputs))
    if case.exact:
        for i, (mine, want) in enumerate(zip(got, _outputs(case.reference(**inputs)), strict=True)):
            assert torch.equal(mine, want), f"{case.id}: output {i} differs from the reference"
        return
    same = _outputs(case.reference(**inputs))
    exact = _outputs(case.reference(**_cast(inputs, torch.float64)))
    for i, (mine, low, high) in enumerate(zip(got, same, exact, strict=True)):
        assert_close_to_reference(f"{case.id}: output {i} ({dtype})", mine, low, high)


def _strided(t: Tensor) -> Tensor:
    """The same values as a slice of a larger tensor, so that no stride or offset is trivial."""
    if t.dim() == 0:
        return t
    larger = torch.zeros(
        [s * 2 + 1 for s in t.shape[:-1]] + [t.shape[-1] + 3], dtype=t.dtype, device=t.device
    )
    view = larger[(*(slice(1, 1 + 2 * s, 2) for s in t.shape[:-1]), slice(2, 2 + t.shape[-1]))]
    return view.copy_(t)


def _check_strided(case: OpCase, inputs: dict[str, Any]) -> None:
    strided = {k: _strided(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    for a, b in zip(_outputs(case.op(**inputs)), _outputs(case.op(**strided)), strict=True):
        assert torch.equal(a, b), f"{case.id}: strided inputs change the result"


def _check_repeatable(case: OpCase, inputs: dict[str, Any], device: str) -> None:
    first = _outputs(case.op(**inputs))
    for a, b in zip(first, _outputs(case.op(**inputs)), strict=True):
        assert torch.equal(a, b), f"{case.id}: two runs differ"
    if device != "cpu":
        return
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        for a, b in zip(first, _outputs(case.op(**inputs)), strict=True):
            assert torch.equal(a, b), f"{case.id}: the number of threads changes the result"
    finally:
        torch.set_num_threads(threads)


def _gradients(
    function: Callable[..., Any], case: OpCase, inputs: dict[str, Any], expanded: bool
) -> list[Tensor]:
    leaves = {k: inputs[k].detach().clone().requires_grad_() for k in case.differentiable}
    outputs = [
        o
        for o in _outputs(function(**{**inputs, **leaves}))
        if o.is_floating_point() and o.requires_grad
    ]
    if expanded:  # .sum() sends a gradient of stride 0
        torch.autograd.backward([outputs[0].sum()])
    else:
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(outputs[0].shape, generator=generator, dtype=torch.float64)
        outputs[0].backward(grad.to(outputs[0]))
    return [
        leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves.values()
    ]


def _check_gradients(case: OpCase, inputs: dict[str, Any], dtype: torch.dtype) -> None:
    for expanded in (False, True):
        got = _gradients(case.op, case, inputs, expanded)
        low = _gradients(case.reference, case, inputs, expanded)
        high = _gradients(case.reference, case, _cast(inputs, torch.float64), expanded)
        for name, a, b, c in zip(case.differentiable, got, low, high, strict=True):
            assert_close_to_reference(
                f"{case.id}: gradient of {name} ({dtype})", a, b, c, factor=3.0
            )
    if dtype == torch.float64 and sum(inputs[k].numel() for k in case.differentiable) <= 128:
        names = case.differentiable

        def first_output(*tensors: Tensor) -> Tensor:
            return _outputs(case.op(**{**inputs, **dict(zip(names, tensors, strict=True))}))[0]

        leaves = tuple(inputs[k].detach().clone().requires_grad_() for k in names)
        torch.autograd.gradcheck(first_output, leaves, fast_mode=False)
