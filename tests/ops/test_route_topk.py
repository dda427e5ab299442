from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mor.ops import route_topk
from mor.ops.route_topk import reference
from tests.cases.route_topk import CASES, MASKS, VALUES, case
from tests.support.operators import (
    DTYPES,
    INSTRUCTION_SETS,
    OpCase,
    check_bad_input,
    check_op,
    instruction_set,
    packed,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op_case", {c.id: c for c in CASES}.values(), ids=lambda c: c.id)
def test_route_topk(op_case: OpCase, dtype: torch.dtype) -> None:
    check_op(op_case, dtype)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    with instruction_set(isa):
        for lengths in ("ragged", "long"):
            for values in VALUES:
                for masks in MASKS:
                    op_case = case(lengths, values, "half", masks)
                    inputs = op_case.make(dtype, "cpu", generator)
                    assert torch.equal(route_topk(**inputs), reference(**inputs)), op_case.id


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_k(dtype: torch.dtype) -> None:
    scores = torch.randn(67, generator=torch.Generator().manual_seed(2)).round(decimals=1).to(dtype)
    for k in range(68):
        for by_score in (False, True):
            rows = route_topk(scores, k, packed([67]), by_score=by_score)
            assert torch.equal(rows, reference(scores, k, packed([67]), by_score=by_score))


def test_counts_of_more_than_16_bits() -> None:
    # The kernel counts in 16-bit lanes; 2^20 equal rows reach every lane more than 2^15 times.
    scores = torch.zeros(2**20 + 3)
    scores[-3:] = 1.0
    rows = route_topk(scores, 600_000, packed([scores.numel()]))
    expected = torch.cat([torch.arange(600_000 - 3), torch.arange(3) + 2**20])
    assert torch.equal(rows, expected)


def test_an_int_k_is_the_same_for_every_sequence() -> None:
    scores = torch.tensor([0.1, 0.9, 0.5, 0.7, 0.2])
    cu_seqlens = packed([3, 2])
    assert route_topk(scores, 2, cu_seqlens).tolist() == [1, 2, 3, 4]
    assert route_topk(scores, 1, cu_seqlens, by_score=True).tolist() == [1, 3]
    assert route_topk(scores, torch.tensor([1, 2]), cu_seqlens, num_rows=3).tolist() == [1, 3, 4]


def test_ranks_in_float32() -> None:
    # Equal in bfloat16, different in float32: the float32 scores decide.
    scores = torch.tensor([1.0, 1.0 + 2**-20, 1.0 - 2**-20])
    assert route_topk(scores, 1, packed([3])).tolist() == [1]
    assert route_topk(scores.bfloat16(), 1, packed([3])).tolist() == [0]


def test_scores_that_require_grad_give_rows_without() -> None:
    scores = torch.randn(8, requires_grad=True)
    rows = route_topk(scores, 3, packed([8]))
    assert not rows.requires_grad
    scores[rows].sum().backward()
    assert scores.grad is not None
    assert scores.grad.sum() == 3


def test_nan_that_does_not_compete_is_ignored() -> None:
    scores = torch.tensor([torch.nan, 2.0, torch.nan, 1.0, 3.0])
    candidates = torch.tensor([False, True, True, True, True])
    protected_rows = torch.tensor([False, False, True, False, False])
    masks = {"candidates": candidates, "protected_rows": protected_rows}
    assert route_topk(scores, 2, packed([5]), **masks).tolist() == [1, 2, 4]
    assert route_topk(scores, 2, packed([5]), by_score=True, **masks).tolist() == [4, 1, 2]


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", [0, 63, 70])
def test_nan_names_the_row(isa: str, dtype: torch.dtype, row: int) -> None:
    scores = torch.zeros(71, dtype=dtype)
    scores[row] = torch.nan
    with instruction_set(isa):
        for k in (0, 1, 35):
            with pytest.raises(RuntimeError, match=rf"without NaN, got scores\[{row}\] = nan"):
                route_topk(scores, torch.tensor([0, k]), packed([0, 71]))


SCORES, CU, TWO = torch.zeros(5), packed([3, 2]), torch.tensor([1, 1])
BAD_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "scores-rank": (r"scores of shape \[N\], got \[5, 1\]", {"scores": SCORES[:, None]}),
    "scores-dtype": ("scores of dtype float32.* got int64", {"scores": torch.zeros(5).long()}),
    "k-rank": (r"k of shape \[B\], got \[2, 1\]", {"k": TWO[:, None]}),
    "k-dtype": ("k of dtype int64, got int32", {"k": TWO.int()}),
    "k-size": (r"k of 2 elements .one for each sequence.*got \[3\]", {"k": torch.ones(3).long()}),
    "cu-rank": (r"cu_seqlens of shape \[B \+ 1\], got \[\]", {"cu_seqlens": CU[0]}),
    "cu-dtype": ("cu_seqlens of dtype int32, got int64", {"cu_seqlens": CU.long()}),
    "cu-empty": ("cu_seqlens of at least one element", {"cu_seqlens": CU[:0], "k": TWO[:0]}),
    "rows-negative": ("num_rows >= 0, got -1", {"num_rows": -1}),
    "int-k-negative": ("k >= 0, got -1", {"k": -1}),
    "candidates-rank": (r"candidates of shape \[N\]", {"candidates": torch.ones(5, 1).bool()}),
    "candidates-dtype": ("candidates of dtype bool, got int64", {"candidates": TWO.new_ones(5)}),
    "candidates-size": ("candidates of 5 elements", {"candidates": torch.ones(4).bool()}),
    "protected-dtype": ("protected_rows of dtype bool", {"protected_rows": torch.ones(5)}),
    "protected-size": ("protected_rows of 5 elements", {"protected_rows": torch.ones(6).bool()}),
}  # fmt: skip
BAD_VALUES: dict[str, tuple[str, dict[str, Any]]] = {
    "k-negative": ("k >= 0, got k = -1 for sequence 1", {"k": torch.tensor([3, -1])}),
    "k-large": (
        "sequence 1 has 2 rows to choose from, got k = 3",
        {"k": torch.tensor([0, 3]), "num_rows": 3},
    ),
    "k-candidates": (
        "sequence 0 has 1 rows to choose from, got k = 2",
        {"k": torch.tensor([2, 0]), "candidates": torch.tensor([True, False, False, True, True])},
    ),
    "k-protected": (
        "sequence 0 has 2 rows to choose from, got k = 3",
        {
            "k": torch.tensor([3, 0]),
            "num_rows": 4,
            "protected_rows": torch.tensor([True, False, False, False, False]),
        },
    ),
    "int-k-large": ("sequence 1 has 2 rows to choose from, got k = 3", {"k": 3, "num_rows": None}),
    "num-rows": ("expected num_rows = 2 .*got 3", {"num_rows": 3}),
    "cu-start": ("cu_seqlens to start at 0, got 1", {"cu_seqlens": CU + 1}),
    "cu-falls": (
        "cu_seqlens never to fall, got 6 then 5 at 2",
        {"cu_seqlens": torch.tensor([0, 6, 5]).int()},
    ),
    "cu-end": (
        r"cu_seqlens to end at 5 .*got 4",
        {"cu_seqlens": torch.tensor([0, 3, 4]).int()},
    ),
}


@pytest.mark.parametrize("name", [*BAD_SHAPES, *BAD_VALUES])
def test_bad_input(name: str) -> None:
    message, change = {**BAD_SHAPES, **BAD_VALUES}[name]
    inputs = {"scores": SCORES, "k": TWO, "cu_seqlens": CU, "num_rows": 2, **change}
    check_bad_input("route_topk: .*" + message, route_topk, **inputs, fake=name in BAD_SHAPES)


@pytest.mark.parametrize("operand", ["k", "cu_seqlens", "candidates", "protected_rows"])
def test_operands_of_two_devices_are_refused(operand: str) -> None:
    with FakeTensorMode():
        inputs: dict[str, Any] = {
            "k": torch.ones(2, dtype=torch.int64, device="cuda"),
            "cu_seqlens": torch.zeros(3, dtype=torch.int32, device="cuda"),
            "candidates": torch.ones(5, dtype=torch.bool, device="cuda"),
            "protected_rows": torch.ones(5, dtype=torch.bool, device="cuda"),
        }
        inputs[operand] = inputs[operand].to("cpu")
        scores = torch.zeros(5, device="cuda")
        with pytest.raises(
            RuntimeError, match=f"route_topk: expected {operand} on cuda:0, got cpu"
        ):
            route_topk(scores, **inputs, num_rows=2)


@pytest.mark.unsanitized
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic: bool) -> None:
    def select(scores: Tensor, cu_seqlens: Tensor, k: int, candidates: Tensor) -> Tensor:
        rows = route_topk(scores.float() * 2, k, cu_seqlens, candidates=candidates)
        return scores[rows]

    compiled = torch.compile(select, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for k in (3, 5):
        scores, candidates = torch.randn(24), torch.arange(24) % 3 > 0
        args = scores, packed([12, 12]), k, candidates
        assert torch.equal(compiled(*args), select(*args))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op_case", {c.id: c for c in CASES}.values(), ids=lambda c: c.id)
def test_route_topk_on_cuda(op_case: OpCase, dtype: torch.dtype) -> None:
    check_op(op_case, dtype, "cuda")
