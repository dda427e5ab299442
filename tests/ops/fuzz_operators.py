"""The operators that test_fuzz.py fuzzes: a new one joins by an entry of `OPERATORS`."""

from typing import Any

import fuzz_attention
import torch
from fuzzing import COUNTS, FLOATING, WIDTHS, Draw, Inputs, Operator, cumulative
from torch import Tensor

from mor.ops import (
    gather_tokens,
    group_rows,
    route_topk,
    scatter_tokens,
    scatter_tokens_,
)
from mor.ops.gather_tokens import reference as gather_reference
from mor.ops.group_rows import reference as group_reference
from mor.ops.route_topk import reference as route_reference
from mor.ops.scatter_tokens import reference as scatter_reference

LONG = (*COUNTS, 64, 130, 4095, 4096, 4097, 20_000)  # past the pieces that threads share


def row_out_of_range(d: Draw, inputs: Inputs) -> Inputs | None:
    """One row that the operand of N rows does not have."""
    rows = inputs["rows"]
    unread = inputs.get("need_updates") is False and inputs["updates"] is None
    if rows.numel() == 0 or unread:
        return None
    num_rows = inputs["num_rows"] if "num_rows" in inputs else inputs[ROWS_OF(inputs)].shape[0]
    rows = rows.clone()
    rows[d.integer(0, rows.numel() - 1)] = d.pick(num_rows, -1, num_rows + 2**32, -(2**63))
    return {"rows": rows}


def ROWS_OF(inputs: Inputs) -> str:
    return next(name for name in ("x", "grad", "base") if name in inputs)


def broken_cu_seqlens(name: str = "cu_seqlens") -> dict[str, Any]:
    """Offsets that start late, fall, or end elsewhere."""

    def change(index: int, by: int) -> Any:
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
    scores = d.floats(dtype, n, infinite=True, huge=True)
    scores = torch.where(scores.isnan() & competes, 0.5, scores)  # else an error
    available = torch.tensor([int(part.sum()) for part in competes.split(lengths)] or [0])
    if d.flag() and lengths:
        share = d.pick(0.0, 0.3, 0.5, 1.0)
        k: Tensor | int = (available * share).long()
    else:
        k = d.integer(0, int(available.min()))
    return {
        "scores": scores,
        "k": k,
        "cu_seqlens": cumulative(lengths),
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
    k = k.clone()
    k[d.integer(0, k.numel() - 1)] = d.pick(-1, inputs["scores"].numel() + 1)
    return {"k": k}


def competing_nan(d: Draw, inputs: Inputs) -> Inputs | None:
    """A score that cannot be ranked."""
    if inputs["scores"].numel() == 0:
        return None
    scores = inputs["scores"].clone()
    scores[d.integer(0, scores.numel() - 1)] = torch.nan
    return {"scores": scores, "candidates": None, "protected_rows": None}


def wrong_num_rows(d: Draw, inputs: Inputs) -> Inputs:
    """A result of another size than the rows that are chosen."""
    return {"num_rows": route_reference(**inputs).numel() + d.pick(1, 5, 1000)}


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
    cu_seqlens = cumulative(lengths) if d.flag() else None
    return {"keys": d.layout(keys.to(dtype)), "num_keys": num_keys, "cu_seqlens": cu_seqlens}


def key_out_of_range(d: Draw, inputs: Inputs) -> Inputs | None:
    """One key that does not exist."""
    if inputs["keys"].numel() == 0 or inputs["keys"].dtype == torch.bool:
        return None
    keys = inputs["keys"].clone()
    wrong = [inputs["num_keys"], -1, 2**31 - 1] + [2**32, -(2**63)] * (keys.dtype == torch.int64)
    keys[d.integer(0, keys.numel() - 1)] = d.pick(*wrong)
    return {"keys": keys}


def draw_gather_tokens(d: Draw) -> Inputs:
    dtype = d.pick(*FLOATING, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)
    n = d.pick(*COUNTS)
    shape = d.pick((n,), (n, d.pick(0, *WIDTHS)), (n, 3, d.pick(1, 5, 16)))
    if dtype.is_floating_point:
        x = d.floats(dtype, *shape, infinite=True, huge=True)
    else:
        x = d.layout(d.random(0, 100, *shape).to(dtype))
    return {"x": x, "rows": d.rows(n, d.pick(*COUNTS))}


def draw_gather_backward(d: Draw) -> Inputs:
    dtype, n, width = d.pick(*FLOATING), d.pick(*COUNTS), d.pick(0, *WIDTHS)
    rows = d.rows(n, d.pick(*COUNTS))
    grad = d.floats(dtype, rows.numel(), width, infinite=True, huge=True)
    return {"grad": grad, "rows": rows, "num_rows": n}


def gather_backward_reference(grad: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    return grad.new_zeros(num_rows, grad.shape[1]).index_add(0, rows, grad)


def draw_scatter_tokens(d: Draw) -> Inputs:
    dtype, n, width = d.pick(*FLOATING), d.pick(*COUNTS), d.pick(0, *WIDTHS)
    rows = d.rows(n, d.pick(*COUNTS))
    kinds = {"infinite": d.flag()}

    def factor(size: int) -> Tensor | None:
        kind = d.pick(None, dtype, torch.float32)
        return None if kind is None else d.floats(kind, size, large=dtype != torch.float16)

    return {
        "base": d.floats(dtype, n, width, huge=True, **kinds),
        "updates": d.floats(dtype, rows.numel(), width, huge=True, **kinds),
        "rows": rows,
        "gate": factor(rows.numel()),
        "base_scale": factor(n),
    }


def draw_scatter_in_place(d: Draw) -> Inputs:
    inputs = draw_scatter_tokens(d)
    if 0 in inputs["base"].stride():  # refused: its elements share memory
        inputs["base"] = d.layout(inputs["base"].contiguous(), expand=False)
    return inputs


def in_place(base: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
    """`scatter_tokens_` on a base that is restored; writes around it are found."""
    storage = torch.empty(0, dtype=base.dtype).set_(base.untyped_storage())
    before, original = storage.clone(), base.clone()
    try:
        scatter_tokens_(base, *rest, **kwargs)
        return base.clone(memory_format=torch.contiguous_format)
    finally:
        base.copy_(original)
        same = storage.view(torch.uint8).equal(before.view(torch.uint8))
        assert same, "scatter_tokens_ wrote beside base"


def draw_scatter_backward(d: Draw) -> Inputs:
    inputs = draw_scatter_tokens(d)
    grad = d.floats(inputs["base"].dtype, *inputs["base"].shape)
    if inputs["gate"] is None or d.flag():
        inputs["updates"] = None
    if inputs["base_scale"] is None or d.flag():
        inputs["base"] = None
    return {"grad": grad, **inputs, "need_base": d.flag(), "need_updates": d.flag()}


def scatter_backward_reference(
    grad: Tensor,
    base: Tensor | None,
    updates: Tensor | None,
    rows: Tensor,
    gate: Tensor | None,
    base_scale: Tensor | None,
    need_base: bool,
    need_updates: bool,
) -> tuple[Tensor, ...]:
    none, taken = grad.new_zeros(0), grad[rows]
    scaled = none if base_scale is None else (grad * base_scale[:, None]).to(grad.dtype)
    gated = taken if gate is None else (taken * gate[:, None]).to(grad.dtype)
    return (
        scaled if need_base else none,
        gated if need_updates else none,
        none if updates is None or gate is None else (taken * updates).sum(1).to(gate.dtype),
        none if base is None or base_scale is None else (grad * base).sum(1).to(base_scale.dtype),
    )


SCATTER: dict[str, Any] = {
    "refused_as": "scatter_tokens",
    "tied": {"base": (1,), "updates": (0, 1), "rows": (0,), "gate": (0,), "base_scale": (0,)},
    "broken": {"row out of range": row_out_of_range},
}
OPERATORS: dict[str, Operator] = {
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
    "group_rows": Operator(
        group_rows,
        group_reference,
        draw_group_rows,
        "group_rows",
        exact=True,
        broken=broken_cu_seqlens()
        | {"key": key_out_of_range, "num_keys": lambda d, _: {"num_keys": d.pick(0, -1, -(2**40))}},
    ),
    "gather_tokens": Operator(
        gather_tokens,
        gather_reference,
        draw_gather_tokens,
        "gather_tokens",
        exact=True,
        any_rank=("x",),
        any_dtype=("x",),
        broken={"row out of range": row_out_of_range},
    ),
    "gather_tokens_backward": Operator(
        torch.ops.mor.gather_tokens_backward,
        gather_backward_reference,
        draw_gather_backward,
        "gather_tokens_backward",
        tied={"grad": (0,), "rows": (0,)},
        broken={
            "row out of range": row_out_of_range,
            "num_rows": lambda d, _: {"num_rows": d.pick(-1, -(2**40))},
        },
    ),
    "scatter_tokens": Operator(scatter_tokens, scatter_reference, draw_scatter_tokens, **SCATTER),
    "scatter_tokens_": Operator(
        in_place,
        scatter_reference,
        draw_scatter_in_place,
        **SCATTER | {"refused_as": "scatter_tokens_"},
    ),
    "scatter_tokens_backward": Operator(
        torch.ops.mor.scatter_tokens_backward,
        scatter_backward_reference,
        draw_scatter_backward,
        factor=3.0,
        **SCATTER
        | {
            "refused_as": "scatter_tokens_backward",
            "tied": {n: d for n, d in SCATTER["tied"].items() if n != "rows"},
        },
    ),
    **fuzz_attention.OPERATORS,
}
