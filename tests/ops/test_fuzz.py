"""Every operator on calls drawn at random, right and wrong ones, against the plain reference.

CI runs a few, always the same; `make fuzz` runs MOR_FUZZ_EXAMPLES of them, other ones each time.
"""

import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuzz_operators import OPERATORS
from fuzzing import Draw, Inputs, Operator, break_operand, compare, in_double, outputs, same_bits
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.operators import INSTRUCTION_SETS

EXAMPLES = int(os.environ.get("MOR_FUZZ_EXAMPLES", "0"))
REFUSING = [name for name, op in OPERATORS.items() if op.refused_as]
SETTINGS = settings(
    derandomize=EXAMPLES == 0,
    deadline=None,
    max_examples=EXAMPLES // (len(OPERATORS) + len(REFUSING)) + 1 if EXAMPLES else 60,
    suppress_health_check=list(HealthCheck),
    print_blob=EXAMPLES > 0,
)
BEST = torch.ops.mor.instruction_set("best")
LEVELS = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(BEST) + 1]


def describe(inputs: Inputs) -> str:
    return ", ".join(
        f"{name}: {t.dtype} {list(t.shape)} strides {t.stride()}" if isinstance(t, Tensor)
        else f"{name}={t}"
        for name, t in inputs.items()
    )  # fmt: skip


def run(call: Callable[..., Any], inputs: Inputs, level: str, threads: int) -> tuple[Tensor, ...]:
    torch.ops.mor.instruction_set(level)
    torch.set_num_threads(threads)
    try:
        return outputs(call(**inputs))
    finally:
        torch.ops.mor.instruction_set("best")
        torch.set_num_threads(1)  # the references are too small for more


def check(op: Operator, name: str, inputs: Inputs, level: str, threads: int) -> None:
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, Tensor)}
    got = run(op.call, inputs, level, threads)
    for k, v in before.items():
        assert same_bits(inputs[k], v), f"{name} changed {k}"
    packed = {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    other = run(op.call, packed, level, 3 - min(threads, 2))
    low, high = outputs(op.reference(**inputs)), outputs(op.reference(**in_double(inputs)))
    assert len(got) == len(low)
    sizes = high if op.exact else op.magnitudes(op, inputs)
    for i, mine in enumerate(got):
        what = f"{name}: output {i} ({level}, {threads} threads)"
        assert same_bits(mine, other[i]), f"{what}: strides or threads change it"
        if op.exact:
            assert same_bits(mine, low[i]), f"{what}: {mine} instead of {low[i]}"
        else:
            compare(what, mine, low[i], high[i], op.factor, sizes[i])


@pytest.mark.parametrize("name", OPERATORS)
def test_valid_calls(name: str) -> None:
    op, threads_before = OPERATORS[name], torch.get_num_threads()

    @SETTINGS
    @given(st.data())
    def one(data: st.DataObject) -> None:
        d = Draw(data.draw)
        inputs, level, threads = op.draw(d), d.pick(*LEVELS), d.pick(1, 2, 3)
        note(describe(inputs))
        check(op, name, inputs, level, threads)

    try:
        one()
    finally:
        torch.set_num_threads(threads_before)


def on_cuda(t: Any) -> Any:
    """The tensor with the strides and offset it has, in a storage on the device."""
    if not isinstance(t, Tensor):
        return t
    whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).cuda()
    return whole.as_strided(t.shape, t.stride(), t.storage_offset())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", OPERATORS)
def test_valid_calls_on_cuda(name: str) -> None:
    op = OPERATORS[name]

    @SETTINGS
    @given(st.data())
    def one(data: st.DataObject) -> None:
        inputs = op.draw(Draw(data.draw))
        note(describe(inputs))
        got = outputs(op.call(**{k: on_cuda(v) for k, v in inputs.items()}))
        low, high = outputs(op.reference(**inputs)), outputs(op.reference(**in_double(inputs)))
        sizes = high if op.exact else op.magnitudes(op, inputs)
        for i, mine in enumerate(got):
            mine, what = mine.cpu(), f"{name}: output {i} (CUDA)"
            if op.exact:
                assert same_bits(mine, low[i]), f"{what}: {mine} instead of {low[i]}"
            else:
                compare(what, mine, low[i], high[i], op.factor, sizes[i])

    one()


@pytest.mark.parametrize("name", REFUSING)
def test_invalid_calls_are_refused(name: str) -> None:
    """With the operator's name, and without a trace in the operands."""
    op = OPERATORS[name]

    @SETTINGS
    @given(st.data())
    def one(data: st.DataObject) -> None:
        d = Draw(data.draw)
        broken = break_operand(d, op, op.draw(d))
        assume(broken is not None)
        what, inputs = broken
        note(f"{what}: {describe(inputs)}")
        kept = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.is_cpu}
        before = {k: v.clone() for k, v in kept.items()}
        with pytest.raises((RuntimeError, ValueError, TypeError)) as error:
            op.call(**inputs)
        assert re.search(rf"(^|, ){op.refused_as}: ", str(error.value)), f"{what}: {error.value}"
        for k, v in before.items():
            assert same_bits(kept[k], v), f"{name} changed {k}"

    one()
