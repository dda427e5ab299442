"""route_threshold: values, quantiles as torch has them, exact mass, bad input."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mor.ops import route_threshold, route_topk
from mor.ops.route_threshold import reference
from tests.cases.route_threshold import BOUNDS, CASES, KINDS, RULES, case
from tests.cases.route_topk import LENGTHS, VALUES
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
def test_route_threshold(op_case: OpCase, dtype: torch.dtype) -> None:
    check_op(op_case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rule_with_every_length_and_bound(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    for rule in RULES:
        varied = [case(lengths, "random", rule) for lengths in LENGTHS]
        varied += [case("ragged", "ties", rule, bounds) for bounds in BOUNDS]
        for op_case in varied:
            inputs = op_case.make(dtype, "cpu", generator)
            for got, want in zip(route_threshold(**inputs), reference(**inputs), strict=True):
                assert torch.equal(got, want), op_case.id


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    with instruction_set(isa):
        for values in VALUES:
            for rule in RULES:
                for masked in (False, True):
                    op_case = case("ragged", values, rule, masked=masked)
                    inputs = op_case.make(dtype, "cpu", generator)
                    want = reference(**inputs)
                    for got, expected in zip(route_threshold(**inputs), want, strict=True):
                        assert torch.equal(got, expected), op_case.id


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 2, 5, 11, 100, 1001])
def test_quantile_is_that_of_torch(n: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n)
    for values in ("random", "ties"):
        scores = VALUES[values](n, generator).to(dtype)
        for q in [0.0, 0.05, 0.1, 0.29, 0.3, 0.5, 0.7, 0.75, 0.9, 0.99, 1.0]:
            limit = torch.quantile(scores, q)  # linear
            for inclusive in (False, True):
                want = scores >= limit if inclusive else scores > limit
                rows, _ = route_threshold(
                    scores, q, packed([n]), kind="quantile", inclusive=inclusive
                )
                assert torch.equal(rows, want.nonzero()[:, 0]), (n, q, inclusive)


def test_a_percentile_of_a_tokens_own_scores_is_always_as_many() -> None:
    # DynaMoE's published gate; the share of probability is what varies.
    gates = (torch.randn(500, 8, generator=torch.Generator().manual_seed(0)) * 2).softmax(-1)
    args = gates.flatten(), 0.75, torch.arange(0, 4001, 8, dtype=torch.int32)
    for kind, counts in (("quantile", [2]), ("mass", [1, 2, 3, 4])):
        chosen = route_threshold(*args, kind=kind)[1].diff().unique().tolist()
        assert set(counts) <= set(chosen)
        assert kind == "mass" or chosen == counts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mass_of_equal_weights_is_a_share_of_the_rows(dtype: torch.dtype) -> None:
    for value in (0.1, 3.0, 1e-6):
        for n in (1, 10, 64, 1000):
            scores = torch.full((n,), value, dtype=dtype)
            for tenths in range(11):
                rows, _ = route_threshold(scores, tenths / 10, packed([n]), kind="mass")
                assert rows.tolist() == list(range(-(-tenths * n // 10)))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_mass_over_every_exponent(isa: str) -> None:
    cases = {
        torch.float64: torch.tensor([1e308, 1e308, 5e-324, 1e-300, 0, 1], dtype=torch.float64),
        torch.float32: torch.tensor([3e38, 1e-45, 3e38, 0.0, 1e30, 1e25]),
        torch.float16: torch.tensor([65504.0, 6e-8, 1.0, 65504.0, 0.0, 2.0]),
    }
    with instruction_set(isa):
        for dtype, scores in cases.items():
            for given in (scores.to(dtype), scores.to(dtype)[[1, 1, 1, 4]]):
                for mass in (0.0, 0.3, 0.5, 0.9999999, 1.0):
                    args = given, mass, packed([len(given)])
                    rows, chosen = route_threshold(*args, kind="mass")
                    want, counts = reference(*args, kind="mass")
                    assert torch.equal(rows, want)
                    assert torch.equal(chosen, counts)


def test_one_giant_sequence() -> None:
    scores = torch.rand(200_003, generator=torch.Generator().manual_seed(0))
    cu_seqlens = packed([scores.numel()])
    rows, chosen = route_threshold(scores, 0.9, cu_seqlens)
    assert torch.equal(rows, (scores > 0.9).nonzero()[:, 0])
    assert chosen.tolist() == [0, rows.numel()]
    rows, _ = route_threshold(scores, 0.5, cu_seqlens, kind="mass")
    total = scores.double().sum()
    assert scores[rows].double().sum() >= 0.5 * total
    assert scores[rows].double().sum() - scores[rows].min() < 0.5 * total
    assert torch.equal(rows, route_topk(scores, rows.numel(), cu_seqlens))


def test_sequences_do_not_look_at_one_another() -> None:
    generator = torch.Generator().manual_seed(3)
    parts = [torch.rand(n, generator=generator) for n in (40, 7, 90)]
    bounds = packed([40, 7, 90])
    for kind in KINDS:
        rows, chosen = route_threshold(torch.cat(parts), 0.6, bounds, kind=kind)
        for b, (begin, end) in enumerate(pairwise(chosen.tolist())):
            alone, _ = route_threshold(parts[b], 0.6, packed([len(parts[b])]), kind=kind)
            assert torch.equal(rows[begin:end] - bounds[b], alone)


def test_more_sequences_than_threads_of_a_block() -> None:
    lengths = [b % 4 for b in range(1100)]
    args = torch.rand(sum(lengths)), 0.4, packed(lengths)
    for got, want in zip(route_threshold(*args), reference(*args), strict=True):
        assert torch.equal(got, want)


def test_compares_in_float32() -> None:
    scores = torch.tensor([0.7, 0.7], dtype=torch.float32)  # below 0.7 in float64
    assert route_threshold(scores, 0.7, packed([2]))[0].tolist() == []
    assert route_threshold(scores, 0.7, packed([2]), inclusive=True)[0].tolist() == [0, 1]
    for dtype in (torch.float32, torch.float64):
        each = torch.tensor([0.7], dtype=dtype)
        assert route_threshold(scores, each, packed([2]), inclusive=True)[0].tolist() == [0, 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_rows", [None, 8])
def test_opcheck(kind: str, max_rows: int | None) -> None:
    scores, candidates = torch.rand(12), torch.arange(12) % 3 > 0
    each = torch.tensor([0.5, 0.4])
    args = scores, 0.0, each, packed([7, 5]), kind, False, 1, 4, candidates, max_rows
    torch.library.opcheck(torch.ops.mor.route_threshold.default, args)


@pytest.mark.unsanitized
@pytest.mark.parametrize("max_rows", [None, 24])
def test_compiles_without_a_graph_break(max_rows: int | None) -> None:
    def select(scores: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        rows, chosen = route_threshold(scores * 2, 1.0, cu_seqlens, min_k=1, max_rows=max_rows)
        return scores[rows.clamp(min=0)] * 3, chosen

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(select, fullgraph=True, backend="aot_eager")
        for seed in (0, 1):
            args = torch.rand(24, generator=torch.Generator().manual_seed(seed)), packed([12, 12])
            for got, want in zip(compiled(*args), select(*args), strict=True):
                assert torch.equal(got, want)


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_none_name_the_row(isa: str, kind: str) -> None:
    with instruction_set(isa):
        for row in (0, 63, 70):
            for value, message in ((torch.nan, "without NaN.* = nan"), (-0.5, "not negative.*")):
                if value == -0.5 and kind != "mass":
                    continue
                scores = torch.ones(71)
                scores[row] = value
                with pytest.raises(RuntimeError, match=message.replace(".*", rf".*\[{row}\].*")):
                    route_threshold(scores, 0.5, packed([0, 71]), kind=kind)
        scores = torch.tensor([1.0, torch.inf, -0.0])
        if kind == "mass":
            with pytest.raises(RuntimeError, match=r"finite and not negative.*scores\[1\]"):
                route_threshold(scores, 0.5, packed([3]), kind=kind)
        candidates = torch.tensor([True, False, True])
        scores[1] = torch.nan
        rows, _ = route_threshold(scores, 0.5, packed([3]), kind=kind, candidates=candidates)
        assert rows.tolist() == [0]


SCORES, CU, TWO = torch.zeros(5), packed([3, 2]), torch.tensor([0.5, 0.5])
BAD_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "scores-rank": (r"scores of shape \[N\], got \[5, 1\]", {"scores": SCORES[:, None]}),
    "scores-dtype": ("scores of dtype float32.* got int64", {"scores": torch.zeros(5).long()}),
    "cu-rank": (r"cu_seqlens of shape \[B \+ 1\], got \[\]", {"cu_seqlens": CU[0]}),
    "cu-dtype": ("cu_seqlens of dtype int32, got int64", {"cu_seqlens": CU.long()}),
    "cu-empty": ("cu_seqlens of at least one element", {"cu_seqlens": CU[:0]}),
    "kind": ("kind absolute, quantile or mass, got top-p", {"kind": "top-p"}),
    "inclusive": (
        "kind absolute or quantile with inclusive", {"kind": "mass", "inclusive": True},
    ),
    "threshold-rank": (r"threshold of shape \[B\], got \[\]", {"threshold": TWO[0]}),
    "threshold-dtype": (
        "threshold of dtype float32 or float64, got float16",
        {"threshold": TWO.half()},
    ),
    "threshold-size": (r"threshold of 2 elements .*got \[1\]", {"threshold": TWO[:1]}),
    "threshold-nan": ("threshold not to be nan", {"threshold": torch.nan}),
    "threshold-large": (r"threshold in \[0, 1\], got 1.5", {"threshold": 1.5, "kind": "mass"}),
    "min-k": ("min_k >= 0, got -1", {"min_k": -1}),
    "max-k": ("max_k >= min_k = 3, got 2", {"min_k": 3, "max_k": 2}),
    "candidates-rank": (r"candidates of shape \[N\]", {"candidates": torch.ones(5, 1).bool()}),
    "candidates-dtype": ("candidates of dtype bool, got int64", {"candidates": CU.long()}),
    "candidates-size": ("candidates of 5 elements", {"candidates": torch.ones(4).bool()}),
    "max-rows": ("max_rows >= 0, got -1", {"max_rows": -1}),
}  # fmt: skip
BAD_VALUES: dict[str, tuple[str, dict[str, Any]]] = {
    "each-nan": (
        r"threshold not to be nan, got threshold\[1\]",
        {"threshold": TWO * torch.tensor([1.0, torch.nan])},
    ),
    "each-large": (
        r"threshold in \[0, 1\], got threshold\[0\] = 2",
        {"threshold": TWO * 4, "kind": "quantile"},
    ),
    "too-many": (
        "max_rows of at least 4 .the rows chosen., got 3",
        {"min_k": 2, "max_rows": 3},
    ),
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
    inputs = {"scores": SCORES, "threshold": 0.5, "cu_seqlens": CU, **change}
    check_bad_input(
        "route_threshold: expected " + message, route_threshold, **inputs, fake=name in BAD_SHAPES
    )


@pytest.mark.parametrize("operand", ["threshold", "cu_seqlens", "candidates"])
def test_operands_of_two_devices_are_refused(operand: str) -> None:
    with FakeTensorMode():
        inputs: dict[str, Any] = {
            "threshold": torch.ones(2, device="cuda"),
            "cu_seqlens": torch.zeros(3, dtype=torch.int32, device="cuda"),
            "candidates": torch.ones(5, dtype=torch.bool, device="cuda"),
        }
        inputs[operand] = inputs[operand].to("cpu")
        message = f"route_threshold: expected {operand} on cuda:0, got cpu"
        with pytest.raises(RuntimeError, match=message):
            route_threshold(torch.zeros(5, device="cuda"), **inputs, max_rows=2)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op_case", {c.id: c for c in CASES}.values(), ids=lambda c: c.id)
def test_route_threshold_on_cuda(op_case: OpCase, dtype: torch.dtype) -> None:
    check_op(op_case, dtype, "cuda")
