from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mor.ops import group_rows
from mor.ops.group_rows import reference
from tests.cases.group_rows import CASES, DTYPES, NUM_KEYS, case
from tests.support.operators import (
    INSTRUCTION_SETS,
    OpCase,
    check_bad_input,
    check_op,
    instruction_set,
    packed,
)


@pytest.mark.parametrize("op_case", CASES, ids=lambda c: c.id)
def test_group_rows(op_case: OpCase) -> None:
    check_op(op_case, torch.float32)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    with instruction_set(isa):
        for lengths in ("ragged", "chunks", "unpacked"):
            for num_keys in (2,) if dtype == torch.bool else NUM_KEYS:
                for kind in ("random", "equal", "sorted", "skewed"):
                    op_case = case(lengths, num_keys, kind, dtype)
                    inputs = op_case.make(torch.float32, "cpu", generator)
                    for got, want in zip(group_rows(**inputs), reference(**inputs), strict=True):
                        assert torch.equal(got, want), op_case.id


def test_runs_of_a_key_are_the_rows_of_each_sequence() -> None:
    keys = torch.tensor([True, False, True, True, False, True])
    rows, offsets = group_rows(keys, 2, packed([4, 0, 2]))
    runs = [rows[a:b].tolist() for a, b in pairwise(offsets.tolist())]
    assert runs == [[1], [], [4], [0, 2, 3], [], [5]]


KEYS, CU = torch.tensor([1, 0, 2, 1, 0]), packed([3, 2])
BAD_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "keys-rank": (r"keys of shape \[N\], got \[5, 1\]", {"keys": KEYS[:, None]}),
    "keys-dtype": ("keys of dtype int64, int32 or bool, got float32", {"keys": KEYS.float()}),
    "num-keys": ("num_keys >= 1, got 0", {"num_keys": 0}),
    "cu-rank": (r"cu_seqlens of shape \[B \+ 1\], got \[3, 1\]", {"cu_seqlens": CU[:, None]}),
    "cu-dtype": ("cu_seqlens of dtype int32, got int64", {"cu_seqlens": CU.long()}),
    "cu-empty": ("cu_seqlens of at least one element", {"cu_seqlens": CU[:0]}),
}
BAD_VALUES: dict[str, tuple[str, dict[str, Any]]] = {
    "key-large": (r"keys in \[0, 2\), got keys\[2\] = 2", {"num_keys": 2}),
    "key-negative": (
        r"keys in \[0, 3\), got keys\[1\] = -1",
        {"keys": torch.tensor([0, -1, 1, -1, 0])},
    ),
    "key-negative-many-keys": (
        r"keys in \[0, 100\), got keys\[4\] = -5",
        {"keys": torch.tensor([0, 99, 1, 7, -5]), "num_keys": 100},
    ),
    "bool-one-key": (
        r"keys in \[0, 1\), got keys\[3\] = 1",
        {"keys": torch.tensor([False, False, False, True, True]), "num_keys": 1},
    ),
    # Its low 32 bits, and its low byte, are a key.
    "key-wide": (
        r"keys in \[0, 3\), got keys\[0\] = 4294967297",
        {"keys": torch.tensor([2**32 + 1, 0, 1, 1, 0])},
    ),
    "cu-start": ("cu_seqlens to start at 0, got 1", {"cu_seqlens": CU + 1}),
    "cu-falls": (
        "cu_seqlens never to fall, got 6 then 5 at 2",
        {"cu_seqlens": torch.tensor([0, 6, 5]).int()},
    ),
    "cu-end": ("cu_seqlens to end at 5 .*got 4", {"cu_seqlens": torch.tensor([0, 3, 4]).int()}),
}


@pytest.mark.parametrize("name", [*BAD_SHAPES, *BAD_VALUES])
def test_bad_input(name: str) -> None:
    message, change = {**BAD_SHAPES, **BAD_VALUES}[name]
    inputs = {"keys": KEYS, "num_keys": 3, "cu_seqlens": CU, **change}
    check_bad_input("group_rows: .*" + message, group_rows, **inputs, fake=name in BAD_SHAPES)


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_first_bad_key_is_named(isa: str) -> None:
    keys = torch.zeros(20_000, dtype=torch.int64)
    keys[[9_000, 9_001, 19_999]] = torch.tensor([2, 255, 8])
    with instruction_set(isa), pytest.raises(RuntimeError, match=r"got keys\[9000\] = 2"):
        group_rows(keys, 2)


def test_operands_of_two_devices_are_refused() -> None:
    with FakeTensorMode():
        keys = torch.zeros(5, dtype=torch.int64, device="cuda")
        cu_seqlens = torch.zeros(3, dtype=torch.int32)
        with pytest.raises(
            RuntimeError, match="group_rows: expected cu_seqlens on cuda:0, got cpu"
        ):
            group_rows(keys, 2, cu_seqlens)


@pytest.mark.unsanitized
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic: bool) -> None:
    def split(gates: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        rows, offsets = group_rows(gates > 0.5, 2, cu_seqlens)
        return gates[rows], offsets

    compiled = torch.compile(split, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths in ([12, 12], [5, 20]):
        args = torch.rand(sum(lengths)), packed(lengths)
        for got, want in zip(compiled(*args), split(*args), strict=True):
            assert torch.equal(got, want)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("op_case", CASES, ids=lambda c: c.id)
def test_group_rows_on_cuda(op_case: OpCase) -> None:
    check_op(op_case, torch.float32, "cuda")
