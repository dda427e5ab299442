"""scatter_tokens against torch.scatter_add (the authors' form), index_add and index_copy.

In place against in place, a new tensor against a new tensor, and forward + backward with the
gradients of base, updates and gate. A ratio above 1 means that ours is faster.
"""

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
from harness import DTYPES, compiled, dtype_name, line, parse_args, report, wanted
from routed import SHAPES, ascending_rows, packed, shares
from torch import Tensor

from mor.ops import scatter_tokens, scatter_tokens_

Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def functional_forms(shape: tuple[int, int, int], chosen: Tensor) -> dict[str, Form]:
    width, rows = shape[2], packed(chosen, shape[1])
    expanded = chosen[:, :, None].expand(-1, -1, width)

    def index_add(base: Tensor, updates: Tensor, gate: Tensor) -> Tensor:
        return base.index_add(0, rows, updates * gate[:, None])

    def index_copy(base: Tensor, updates: Tensor, gate: Tensor) -> Tensor:
        # Only right because no row repeats.
        taken = torch.index_select(base, 0, rows)
        return base.index_copy(0, rows, torch.addcmul(taken, updates, gate[:, None]))

    def authors(base: Tensor, updates: Tensor, gate: Tensor) -> Tensor:
        gated = (updates * gate[:, None]).view(shape[0], -1, width)
        return torch.scatter_add(base.view(shape), 1, expanded, gated).view(-1, width)

    return {
        "ours": lambda base, updates, gate: scatter_tokens(base, updates, rows, gate),
        "authors": authors,
        "index_add": index_add,
        "index_copy": index_copy,
        "compiled index_add": compiled(index_add),
        "compiled index_copy": compiled(index_copy),
    }


def in_place_forms(shape: tuple[int, int, int], chosen: Tensor) -> dict[str, Form]:
    width, rows = shape[2], packed(chosen, shape[1])
    expanded = chosen[:, :, None].expand(-1, -1, width)

    def index_add(base: Tensor, updates: Tensor, gate: Tensor) -> Tensor:
        return base.index_add_(0, rows, updates * gate[:, None])

    def index_copy(base: Tensor, updates: Tensor, gate: Tensor) -> Tensor:
        taken = torch.index_select(base, 0, rows)
        return base.index_copy_(0, rows, torch.addcmul(taken, updates, gate[:, None]))

    def authors(base: Tensor, updates: Tensor, gate: Tensor) -> Tensor:
        gated = (updates * gate[:, None]).view(shape[0], -1, width)
        return base.view(shape).scatter_add_(1, expanded, gated).view(-1, width)

    return {
        "ours": lambda base, updates, gate: scatter_tokens_(base, updates, rows, gate),
        "authors": authors,
        "index_add_": index_add,
        "index_copy_": index_copy,
        "compiled index_add_": compiled(index_add),
        "compiled index_copy_": compiled(index_copy),
    }


def check(forms: dict[str, Form], base: Tensor, updates: Tensor, gate: Tensor) -> None:
    want = forms["ours"](base.clone(), updates, gate)
    for function in forms.values():
        torch.testing.assert_close(
            function(base.clone(), updates, gate), want, rtol=2e-2, atol=2e-2
        )


def measure(
    shape: tuple[int, int, int], k: int, dtype: torch.dtype, repeats: int
) -> list[dict[str, Any]]:
    what = {"shape": str(list(shape)), "k": k, "dtype": dtype_name(dtype)}
    passes = ("forward, in place", "forward, new tensor", "forward + backward")
    whats = [{**what, "pass": name} for name in passes]
    if not any(map(wanted, whats)):
        return []
    chosen = ascending_rows(shape[0], shape[1], k)
    base = torch.randn(shape[0] * shape[1], shape[2], dtype=dtype)
    updates = torch.randn(chosen.numel(), shape[2], dtype=dtype)
    gate = torch.rand(chosen.numel(), dtype=dtype)
    lines = []
    for described, make in zip(whats, (in_place_forms, functional_forms), strict=False):
        forms = make(shape, chosen)
        with torch.inference_mode():
            if wanted(described):
                check(forms, base, updates, gate)
            forward = {name: partial(form, base, updates, gate) for name, form in forms.items()}
            if make is functional_forms:
                forward["limit clone"] = base.clone
            lines.append(line(described, forward, repeats))
    leaves = [t.clone().requires_grad_() for t in (base, updates, gate)]
    grad = torch.randn_like(base)

    def gradients(form: Form) -> tuple[Tensor, ...]:
        return torch.autograd.grad(form(*leaves), leaves, grad)

    both = {n: partial(gradients, form) for n, form in functional_forms(shape, chosen).items()}
    if wanted(whats[2]):
        want = both["ours"]()
        for run in both.values():
            for got, expected in zip(run(), want, strict=True):
                torch.testing.assert_close(got, expected, rtol=4e-2, atol=0.5)
    return [*lines, line(whats[2], both, repeats)]


def main() -> None:
    args = parse_args(__doc__, shares)
    shapes = [SHAPES[name] for name in (("smoke",) if args.smoke else ("small", "large"))]
    lines = (
        measure(shape, shape[1] // share, dtype, args.repeats)
        for shape in shapes
        for share in args.shares
        for dtype in DTYPES
    )
    report("scatter_tokens", list(chain.from_iterable(lines)), args)


if __name__ == "__main__":
    main()
