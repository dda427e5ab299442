"""scatter_tokens against torch.scatter_add (the authors' form), index_add and index_copy.

In place against in place, a new tensor against a new tensor, and forward + backward with the
gradients of base, updates and gate. A ratio above 1 means that ours is faster.
"""

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from harness import DTYPES, compiled, dtype_name, line, parse_args, report, wanted
from routed import SHAPES, ascending_rows, both_ways, packed
from torch import Tensor

from mor import ops

Form = Callable[[Tensor, Tensor, Tensor], Tensor]
#: And the ending that the operators' names have.
PASSES = {"forward, in place": "_", "forward, new tensor": "", "forward + backward": ""}


def forms(shape: tuple[int, int, int], chosen: Tensor, ending: str) -> dict[str, Form]:
    width, rows = shape[2], packed(chosen, shape[1])
    expanded = chosen[:, :, None].expand(-1, -1, width)
    scatter = getattr(ops, f"scatter_tokens{ending}")

    def index_add(base: Tensor, updates: Tensor, gate: Tensor) -> Tensor:
        return getattr(base, f"index_add{ending}")(0, rows, updates * gate[:, None])

    def index_copy(base: Tensor, updates: Tensor, gate: Tensor) -> Tensor:
        # Only right because no row repeats.
        added = torch.addcmul(torch.index_select(base, 0, rows), updates, gate[:, None])
        return getattr(base, f"index_copy{ending}")(0, rows, added)

    def authors(base: Tensor, updates: Tensor, gate: Tensor) -> Tensor:
        gated = (updates * gate[:, None]).view(shape[0], -1, width)
        added = getattr(base.view(shape), f"scatter_add{ending}")(1, expanded, gated)
        return added.view(-1, width)

    return {
        "ours": lambda base, updates, gate: scatter(base, updates, rows, gate),
        "authors": authors,
        f"index_add{ending}": index_add,
        f"index_copy{ending}": index_copy,
        f"compiled index_add{ending}": compiled(index_add),
        f"compiled index_copy{ending}": compiled(index_copy),
    }


def measure(size: str, share: int, dtype: torch.dtype) -> None:
    shape = SHAPES[size]
    k = shape[1] // share
    chosen = ascending_rows(shape[0], shape[1], k)
    inputs = [torch.randn(shape[0] * shape[1], shape[2], dtype=dtype)]
    inputs += [torch.randn(chosen.numel(), shape[2], dtype=dtype)]
    inputs += [torch.rand(chosen.numel(), dtype=dtype)]
    grad = torch.randn_like(inputs[0])
    for name, ending in PASSES.items():
        what = {"shape": str(list(shape)), "k": k, "dtype": dtype_name(dtype), "pass": name}
        if not wanted(what):
            continue
        named = forms(shape, chosen, ending)
        if name == "forward + backward":
            leaves = tuple(t.clone().requires_grad_() for t in inputs)
            calls = both_ways(named, leaves, grad)
            want = calls["ours"]()
            for call in calls.values():
                torch.testing.assert_close(call(), want, rtol=4e-2, atol=0.5)
            line(what, calls)
            continue
        with torch.inference_mode():
            want = named["ours"](inputs[0].clone(), *inputs[1:])
            for form in named.values():
                got = form(inputs[0].clone(), *inputs[1:])
                torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
            calls = {name: partial(form, *inputs) for name, form in named.items()}
            if not ending:
                calls["limit clone"] = inputs[0].clone
            line(what, calls)


if __name__ == "__main__":
    args = parse_args(__doc__)
    for what in product(["smoke"] if args.smoke else ["small", "large"], (2, 3), DTYPES):
        measure(*what)
    report("scatter_tokens")
