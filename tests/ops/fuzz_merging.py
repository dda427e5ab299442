"""segment_reduce, bipartite_match and their backward, as fuzz_operators.py lists them."""

from collections.abc import Callable
from typing import Any

import torch
from fuzzing import (
    COUNTS,
    FLOATING,
    WIDTHS,
    Draw,
    Inputs,
    Operator,
    broken_cu_seqlens,
    changed,
    in_double,
)
from torch import Tensor

from mor.ops import bipartite_match, segment_reduce
from mor.ops.bipartite_match import reference as match_reference
from mor.ops.segment_reduce import reference as reduce_reference
from tests.support.operators import EPSILON, packed


def draw_segments(d: Draw) -> tuple[int, Tensor]:
    num_segments = d.pick(*COUNTS)
    return num_segments, d.rows(num_segments, d.pick(*COUNTS))


def draw_reduce(d: Draw, **kinds: bool) -> Inputs:
    """Of sums and means, with and without weights."""
    dtype, width = d.pick(*FLOATING), d.pick(1, *WIDTHS, 0)
    num_segments, segments = draw_segments(d)
    reduce, kind = d.pick("sum", "mean"), d.pick(None, dtype, torch.float32)
    weights = None
    if kind is not None:
        weights = d.floats(kind, len(segments), layout=False, large=False, tiny=reduce == "sum")
        if reduce == "mean" and not weights.equal(weights.round()):
            weights = weights.abs()  # a total near 0 makes any error large, but 0 is exact
        weights = d.layout(weights)
    return {
        "x": d.floats(dtype, len(segments), width, **kinds),
        "segments": segments,
        "num_segments": num_segments,
        "reduce": reduce,
        "weights": weights,
    }


def one_nan(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`call` with NaN of the same bits: amax names the number, not which NaN."""

    def apply(*args: Any, **inputs: Any) -> Tensor:
        out = call(*args, **inputs)
        return out.masked_fill(out.isnan(), torch.nan)

    return apply


def draw_amax(d: Draw) -> Inputs:
    num_segments, segments = draw_segments(d)
    shape = d.pick((), (d.pick(1, *WIDTHS, 0),), (3, 5))
    return {
        "x": d.floats(d.pick(*FLOATING), len(segments), *shape, infinite=True, huge=True),
        "segments": segments,
        "num_segments": num_segments,
        "reduce": "amax",
    }


def draw_amax_backward(d: Draw) -> Inputs:
    dtype, width = d.pick(*FLOATING), d.pick(1, *WIDTHS, 0)
    num_segments, segments = draw_segments(d)
    kinds = {"infinite": True, "huge": True}
    x = d.floats(dtype, len(segments), width, **kinds)
    return {
        "grad": d.floats(dtype, num_segments, width, **kinds),
        "x": x,
        "out": d.layout(reduce_reference(x, segments, num_segments, "amax"), expand=False),
        "segments": segments,
    }


def amax_backward_reference(grad: Tensor, x: Tensor, out: Tensor, segments: Tensor) -> Tensor:
    top = out[segments]
    largest = (x == top) | (x.isnan() & top.isnan())
    earlier = (segments[:, None] == segments).tril(-1).double() @ largest.double()
    return torch.where(largest & (earlier == 0), grad[segments], 0)


def gradients(call: Callable[..., Any], *names: str) -> Callable[..., tuple[Tensor, ...]]:
    """The gradients of the first result of `call` with respect to operands of these names."""

    def backward(grad: Tensor, **inputs: Any) -> tuple[Tensor, ...]:
        leaves = {n: inputs[n].detach().requires_grad_() for n in names if inputs[n] is not None}
        result = call(**inputs | leaves)
        out = result if isinstance(result, Tensor) else result[0]
        return torch.autograd.grad(
            out, tuple(leaves.values()), grad.to(out.dtype), materialize_grads=True,
            allow_unused=True,
        )  # fmt: skip

    return backward


def draw_reduce_backward(d: Draw) -> Inputs:
    inputs = draw_reduce(d)
    shape = inputs["num_segments"], inputs["x"].shape[1]
    return {"grad": d.floats(inputs["x"].dtype, *shape), **inputs}


def shares(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Of each row what its segment's sum is multiplied by, and what the row is, without signs."""
    weights, segments, x = inputs["weights"], inputs["segments"], inputs["x"]
    signed = torch.ones(len(x)).double() if weights is None else weights.double()
    if inputs["reduce"] == "sum":
        return torch.ones_like(signed), signed.abs()
    totals = signed.new_zeros(inputs["num_segments"]).index_add(0, segments, signed)
    share = torch.where(totals == 0, 0, 1 / totals.abs())[segments]
    return share, signed.abs() * share


def reduce_magnitudes(op: Operator, inputs: Inputs) -> tuple[Tensor, ...]:
    x = inputs["x"].double().abs()
    zeros = x.new_zeros(inputs["num_segments"], x.shape[1])
    return (zeros.index_add(0, inputs["segments"], x * shares(inputs)[1][:, None]),)


def reduce_backward_magnitudes(op: Operator, inputs: Inputs) -> tuple[Tensor, ...]:
    """Sums of the terms' absolute values; the mean itself is rounded to the dtype of x."""
    segments, weights = inputs["segments"], inputs["weights"]
    exact, (share, each) = in_double(inputs, absolute=True), shares(inputs)
    grad = exact["grad"][segments]
    of_x = grad * each[:, None]
    if weights is None:
        return (of_x,)
    of_weights = (grad * exact["x"]).sum(1)
    if inputs["reduce"] == "mean":
        ratio = max(EPSILON[inputs["x"].dtype] / EPSILON[weights.dtype], 1)
        (means,) = reduce_magnitudes(op, inputs)
        of_weights = (of_weights + (grad * means[segments]).sum(1) * ratio) * share
    return of_x, of_weights


def segment_out_of_range(d: Draw, inputs: Inputs) -> Inputs | None:
    size = inputs["num_segments"] if "num_segments" in inputs else len(inputs["grad"])
    segments = changed(d, inputs["segments"], size, -1, size + 2**32, -(2**63))
    return None if segments is None else {"segments": segments}


def draw_match(d: Draw, **kinds: bool) -> Inputs:
    dtype, width = d.pick(*FLOATING), d.pick(*WIDTHS, 0, 257, 300)
    of_a = d.lengths(4)
    of_b = [d.pick(*COUNTS, 100) for _ in of_a]
    metric = d.pick("cosine", "dot")
    kinds = {"infinite": metric == "dot", "tiny": metric == "dot"} | kinds
    return {
        "a": d.floats(dtype, sum(of_a), width, **kinds),
        "b": d.floats(dtype, sum(of_b), width, **kinds),
        "cu_seqlens_a": packed(of_a),
        "cu_seqlens_b": packed(of_b),
        "metric": metric,
    }


def draw_ties(d: Draw) -> Inputs:
    """Small integers, whose products and sums are exact: of equals the smallest row."""
    inputs = draw_match(d)
    for name in ("a", "b"):
        t = inputs[name]
        whole = d.random(-2, 2, *t.shape)
        inputs[name] = d.layout((whole + (whole >= 0)).to(t.dtype))  # no 0, which has two signs
    return inputs | {"metric": "dot"}


def similarities(a: Tensor, b: Tensor, metric: str, index: Tensor) -> Tensor:
    """In float64, of each row of a and the chosen one of b; -inf where there is none."""
    found = index >= 0
    a, b = a.double()[found], b.double()[index[found]]
    mine = (a * b).sum(1)
    if metric == "cosine":
        norms = a.norm(dim=1) * b.norm(dim=1)
        mine = torch.where(norms == 0, 0, mine / norms)
    result = torch.full(index.shape, -torch.inf, dtype=torch.float64)
    result[found] = mine
    return result


def scores_and_choice(**inputs: Any) -> tuple[Tensor, ...]:
    """The scores, and how similar the chosen rows are: near equals either may be chosen."""
    scores, index = bipartite_match(**inputs)
    a, b, metric = inputs["a"], inputs["b"], inputs["metric"]
    cu_a, cu_b = inputs["cu_seqlens_a"].tolist(), inputs["cu_seqlens_b"].tolist()
    for i in range(len(cu_a) - 1):
        mine = index[cu_a[i] : cu_a[i + 1]]
        assert ((mine == -1) | (mine >= cu_b[i]) & (mine < cu_b[i + 1])).all()
    return scores, similarities(a, b, metric, index).to(scores.dtype)


def twice_the_scores(**inputs: Any) -> tuple[Tensor, Tensor]:
    scores, _ = match_reference(**inputs)
    return scores, scores


def match_magnitudes(op: Operator, inputs: Inputs) -> tuple[Tensor, ...]:
    if inputs["metric"] == "cosine":
        return (torch.ones(()),) * 2
    exact = in_double(inputs, absolute=True)
    return twice_the_scores(**exact | {n: exact[n].nan_to_num(0, 0) for n in ("a", "b")})


def clear_choices(inputs: Inputs) -> Tensor:
    """Rows of a whose best row of b is the best by far."""
    a, b = (inputs[n].double() for n in ("a", "b"))
    similar, sizes = a @ b.T, a.abs() @ b.abs().T
    if inputs["metric"] == "cosine":
        norms = a.norm(dim=1)[:, None] * b.norm(dim=1)
        similar, sizes = torch.where(norms == 0, 0, similar / norms), torch.ones(1)
    of_a, of_b = (
        torch.repeat_interleave(inputs[n].diff()) for n in ("cu_seqlens_a", "cu_seqlens_b")
    )
    similar[of_a[:, None] != of_b] = -torch.inf
    best, second = torch.nn.functional.pad(similar, (0, 2), value=-torch.inf).topk(2).values.T
    return second.isneginf() | (best - second > 1e-2 * max([0.0, *sizes.flatten().tolist()]))


def draw_match_backward(d: Draw) -> Inputs:
    """No gradient for what is chosen by a hair: another dtype may choose differently."""
    inputs = draw_match(d, infinite=False, tiny=False)
    total = torch.float64 if inputs["a"].dtype == torch.float64 else torch.float32
    grad = d.floats(total, len(inputs["a"]), layout=False)
    return {"grad": d.layout(torch.where(clear_choices(inputs), grad, 0), expand=False), **inputs}


def match_backward_magnitudes(op: Operator, inputs: Inputs) -> tuple[Tensor, ...]:
    _, index = match_reference(**in_double({n: t for n, t in inputs.items() if n != "grad"}))
    exact = in_double(inputs, absolute=True)
    a, b = exact["a"], exact["b"]
    found = index >= 0
    a, index, grad = a[found], index[found], exact["grad"][found, None]
    if inputs["metric"] == "dot":
        return grad * b[index], torch.zeros_like(b).index_add(0, index, grad * a)
    inverse_a, inverse_b = (1 / t.norm(dim=1).where(t.any(1), torch.inf) for t in (a, b))
    pulls = b.new_zeros(len(b)).index_add(0, index, 2 * grad[:, 0])
    return 2 * grad[:, 0] * inverse_a, pulls * inverse_b


REDUCE: dict[str, Any] = {
    "tied": {"x": (0,), "segments": (0,), "weights": (0,)},
    "any_rank": ("x",),
    "broken": {
        "segment": segment_out_of_range,
        "num_segments": lambda d, _: {"num_segments": d.pick(-1, -(2**40))},
        "reduce": lambda d, _: {"reduce": d.pick("", "max", "SUM")},
        "weights of amax": lambda d, inputs: {
            "reduce": "amax",
            "weights": inputs["x"].new_ones(len(inputs["x"])),
        },
    },
}
MATCH: dict[str, Any] = {
    "tied": {"a": (0, 1), "b": (0, 1), "cu_seqlens_a": (0,), "cu_seqlens_b": (0,)},
    "broken": broken_cu_seqlens("cu_seqlens_a")
    | broken_cu_seqlens("cu_seqlens_b")
    | {"metric": lambda d, _: {"metric": d.pick("", "l2", "Cosine")}},
}
OPERATORS = {
    "segment_reduce": Operator(
        segment_reduce,
        reduce_reference,
        lambda d: draw_reduce(d, infinite=d.flag(), huge=True),
        "segment_reduce",
        magnitudes=reduce_magnitudes,
        **REDUCE,
    ),
    "segment_reduce_backward": Operator(
        gradients(segment_reduce, "x", "weights"),
        gradients(reduce_reference, "x", "weights"),
        draw_reduce_backward,
        "",
        factor=3.0,
        magnitudes=reduce_backward_magnitudes,
    ),
    "amax of segment_reduce": Operator(
        one_nan(segment_reduce),
        one_nan(reduce_reference),
        draw_amax,
        "segment_reduce",
        exact=True,
        **REDUCE,
    ),
    "segment_reduce_amax_backward": Operator(
        one_nan(torch.ops.mor.segment_reduce_amax_backward),
        one_nan(amax_backward_reference),
        draw_amax_backward,
        "segment_reduce_amax_backward",
        exact=True,
        tied={"grad": (0, 1), "x": (0, 1), "out": (0, 1), "segments": (0,)},
        broken={"segment": segment_out_of_range},
    ),
    "bipartite_match": Operator(
        scores_and_choice,
        twice_the_scores,
        draw_match,
        "bipartite_match",
        magnitudes=match_magnitudes,
        **MATCH,
    ),
    "ties of bipartite_match": Operator(
        bipartite_match, match_reference, draw_ties, "", exact=True
    ),
    "bipartite_match_backward": Operator(
        gradients(bipartite_match, "a", "b"),
        gradients(match_reference, "a", "b"),
        draw_match_backward,
        "",
        factor=3.0,
        magnitudes=match_backward_magnitudes,
    ),
}
