"""route_topk, route_threshold and group_rows, as fuzz_operators.py lists them."""

from typing import Any

import torch
from fuzzing import COUNTS, FLOATING, Draw, Inputs, Operator, broken_cu_seqlens, changed
from torch import Tensor

from mor.ops import group_rows, route_threshold, route_topk
from mor.ops.group_rows import reference as group_reference
from mor.ops.route_threshold import reference as threshold_reference
from mor.ops.route_topk import reference as route_reference
from tests.support.operators import packed

KINDS = ("absolute", "quantile", "mass")
LONG = (*COUNTS, 64, 130, 4095, 4096, 4097, 20_000)  # past the pieces that threads share


def draw_route_topk(d: Draw) -> Inputs:
    dtype, lengths = d.pick(*FLOATING), d.lengths(sizes=LONG)
    n = sum(lengths)
    candidates = d.random(0, 3, n) > 0 if d.flag() else None
    protected = d.random(0, 9, n) == 0 if d.flag() else None
    competes = torch.ones(n, dtype=torch.bool)
    if candidates is not None:
        candidates = d.layout(candidates, expand=False)
        competes &= candidates
    if protected is not None:
        protected = d.layout(protected, expand=False)
        competes &= ~protected
    scores = d.floats(dtype, n, layout=False, infinite=True, huge=True)
    bad = scores.isnan() & competes
    scores = d.layout(torch.where(bad, 0.5, scores), expand=False)
    available = torch.tensor([int(part.sum()) for part in competes.split(lengths)] or [0])
    if d.flag() and lengths:
        share = d.pick(0.0, 0.3, 0.5, 1.0)
        k: Tensor | int = (available * share).long()
    else:
        k = d.integer(0, int(available.min()))
    return {
        "scores": scores,
        "k": k,
        "cu_seqlens": packed(lengths),
        "candidates": candidates,
        "protected_rows": protected,
        "by_score": d.flag(),
    }


def too_many(d: Draw, inputs: Inputs) -> Inputs | None:
    """More rows than a sequence has, or fewer than none."""
    k = inputs["k"]
    if inputs["cu_seqlens"].numel() < 2:
        return None
    if isinstance(k, int):
        return {"k": d.pick(-1, inputs["scores"].numel() + 1)}
    return {"k": changed(d, k, -1, inputs["scores"].numel() + 1)}


def competing_nan(d: Draw, inputs: Inputs) -> Inputs | None:
    """A score that cannot be ranked."""
    scores = changed(d, inputs["scores"], torch.nan)
    return (
        None if scores is None else {"scores": scores, "candidates": None, "protected_rows": None}
    )


def wrong_num_rows(d: Draw, inputs: Inputs) -> Inputs:
    """A result of another size than the rows that are chosen."""
    return {"num_rows": route_reference(**inputs).numel() + d.pick(1, 5, 1000)}


def draw_route_threshold(d: Draw) -> Inputs:
    dtype, lengths, kind = d.pick(*FLOATING), d.lengths(sizes=LONG), d.pick(*KINDS)
    n = sum(lengths)
    candidates = d.layout(d.random(0, 3, n) > 0, expand=False) if d.flag() else None
    scores = d.floats(dtype, n, layout=False, infinite=True, huge=True)
    if kind == "mass" and d.flag():
        scores = scores.abs()
    bad = ~scores.isfinite() | (scores < 0) if kind == "mass" else scores.isnan()
    if candidates is not None:
        bad &= candidates  # what does not compete may be anything
    scores = d.layout(torch.where(bad, 0.5, scores), expand=False)
    at = scores[d.integer(0, n - 1)].item() if n else 0.0
    if kind == "absolute":
        threshold: float | Tensor = d.pick(0.0, -0.0, 0.5, 1e300, -torch.inf, torch.inf, at)
        threshold = 0.1 if threshold != threshold else threshold
        share = torch.randn(len(lengths), generator=d.generator, dtype=torch.float64)
    else:
        threshold = d.pick(0.0, 0.1, 0.5, 0.75, 0.9, 1.0 - 2**-53, 1.0, 5e-324)
        share = d.random(0, 9, len(lengths)).double() / 8
    if d.flag():
        threshold = d.layout(share.to(d.pick(torch.float32, torch.float64)))
    min_k = d.pick(0, 1, 7, 100)
    inputs = {
        "scores": scores,
        "threshold": threshold,
        "cu_seqlens": packed(lengths),
        "kind": kind,
        "inclusive": kind != "mass" and d.flag(),
        "min_k": min_k,
        "max_k": d.pick(None, min_k, min_k + 5, 2**40),
        "candidates": candidates,
        "max_rows": None,
    }
    if d.flag():
        inputs["max_rows"] = threshold_reference(**inputs)[0].numel() + d.pick(0, 1, 1000)
    return inputs


def competing(*values: float, kind: str | None = None) -> Any:
    """A score that must not compete, for one kind or all."""

    def apply(d: Draw, inputs: Inputs) -> Inputs | None:
        scores = changed(d, inputs["scores"], *values)
        wrong_kind = kind is not None and inputs["kind"] != kind
        return None if scores is None or wrong_kind else {"scores": scores, "candidates": None}

    return apply


def bad_threshold(d: Draw, inputs: Inputs) -> Inputs | None:
    """Not a number, or no share."""
    wrong = (torch.nan,) if inputs["kind"] == "absolute" else (torch.nan, -0.1, 1.1, torch.inf)
    if not isinstance(inputs["threshold"], Tensor):
        return {"threshold": d.pick(*wrong)}
    threshold = changed(d, inputs["threshold"], *wrong)
    return None if threshold is None else {"threshold": threshold}


def too_few_rows(d: Draw, inputs: Inputs) -> Inputs:
    """A result that has no place for all rows."""
    chosen = threshold_reference(**inputs | {"max_rows": None})[0].numel()
    return {"max_rows": d.pick(chosen - 1, -1, -(2**40))}


def draw_group_rows(d: Draw) -> Inputs:
    lengths, num_keys = d.lengths(sizes=LONG), d.pick(1, 2, 3, 8, 9, 255, 256, 257, 3000)
    n = sum(lengths)
    keys = d.random(0, num_keys, n)
    kind = d.pick("any", "sorted", "equal", "ends")
    if kind == "sorted":
        keys = keys.sort().values
    if kind == "equal":
        keys = keys[:1].expand(n)
    if kind == "ends":
        keys = keys % 2 * (num_keys - 1)
    dtype = d.pick(torch.int64, torch.int32, *([torch.bool] if num_keys == 2 else []))
    cu_seqlens = packed(lengths) if d.flag() else None
    return {"keys": d.layout(keys.to(dtype)), "num_keys": num_keys, "cu_seqlens": cu_seqlens}


def key_out_of_range(d: Draw, inputs: Inputs) -> Inputs | None:
    """One key that does not exist."""
    keys = inputs["keys"]
    if keys.dtype == torch.bool:
        return None
    wrong = [inputs["num_keys"], -1, 2**31 - 1] + [2**32, -(2**63)] * (keys.dtype == torch.int64)
    keys = changed(d, keys, *wrong)
    return None if keys is None else {"keys": keys}


OPERATORS = {
    "route_topk": Operator(
        route_topk,
        route_reference,
        draw_route_topk,
        "route_topk",
        exact=True,
        tied={"k": (0,), "candidates": (0,), "protected_rows": (0,)},
        any_device=("k", "protected_rows"),
        broken=broken_cu_seqlens()
        | {"k": too_many, "nan": competing_nan, "num_rows": wrong_num_rows},
    ),
    "route_threshold": Operator(
        route_threshold,
        threshold_reference,
        draw_route_threshold,
        "route_threshold",
        exact=True,
        tied={"threshold": (0,), "candidates": (0,)},
        broken=broken_cu_seqlens()
        | {
            "nan": competing(torch.nan),
            "weight": competing(-1.0, -1e-4, torch.inf, -torch.inf, kind="mass"),
            "threshold": bad_threshold,
            "kind": lambda d, _: {"kind": d.pick("", "top-p", "Absolute")},
            "inclusive mass": lambda d, _: {"kind": "mass", "inclusive": True},
            "min_k": lambda d, _: {"min_k": d.pick(-1, -(2**40))},
            "max_k": lambda d, _: {"min_k": 9, "max_k": d.pick(0, 8, -2)},
            "max_rows": too_few_rows,
        },
    ),
    "group_rows": Operator(
        group_rows,
        group_reference,
        draw_group_rows,
        "group_rows",
        exact=True,
        broken=broken_cu_seqlens()
        | {"key": key_out_of_range, "num_keys": lambda d, _: {"num_keys": d.pick(0, -1, -(2**40))}},
    ),
}
