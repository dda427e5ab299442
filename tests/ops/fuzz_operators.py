"""The operators that test_fuzz.py fuzzes: a new one joins by an entry here or in a fuzz_*.py."""

from typing import Any

import fuzz_attention
import fuzz_cache
import fuzz_merging
import fuzz_products
import fuzz_routing
import torch
from fuzzing import COUNTS, FLOATING, WIDTHS, Draw, Inputs, Operator, changed, restored
from torch import Tensor

from mor.ops import gather_tokens, scatter_tokens, scatter_tokens_
from mor.ops.gather_tokens import reference as gather_reference
from mor.ops.scatter_tokens import reference as scatter_reference


def row_out_of_range(d: Draw, inputs: Inputs) -> Inputs | None:
    """One row that the operand of N rows does not have."""
    rows = inputs["rows"]
    unread = inputs.get("need_updates") is False and inputs["updates"] is None
    if rows.numel() == 0 or unread:
        return None
    num_rows = inputs["num_rows"] if "num_rows" in inputs else inputs[ROWS_OF(inputs)].shape[0]
    return {"rows": changed(d, rows, num_rows, -1, num_rows + 2**32, -(2**63))}


def ROWS_OF(inputs: Inputs) -> str:
    return next(name for name in ("x", "grad", "base") if name in inputs)


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
    """`scatter_tokens_` on a base that is restored."""
    with restored(base):
        scatter_tokens_(base, *rest, **kwargs)
        return base.clone(memory_format=torch.contiguous_format)


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
    **fuzz_routing.OPERATORS,
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
    **fuzz_cache.OPERATORS,
    **fuzz_merging.OPERATORS,
    **fuzz_products.OPERATORS,
}
