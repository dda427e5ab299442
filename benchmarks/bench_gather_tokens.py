"""gather_tokens against torch.gather over an expanded index (the authors' form) and index_select.

Forward and forward + backward, every result freshly allocated; `limit clone` is a copy of the
result. A ratio above 1 means that ours is faster.
"""

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from harness import DTYPES, compiled, dtype_name, line, parse_args, report, wanted
from routed import SHAPES, ascending_rows, both_ways, packed
from torch import Tensor

from mor.ops import gather_tokens


def forms(shape: tuple[int, int, int], k: int) -> dict[str, Callable[[Tensor], Tensor]]:
    batch, length, width = shape
    chosen = ascending_rows(batch, length, k)
    rows = packed(chosen, length)
    expanded = chosen[:, :, None].expand(-1, -1, width)
    compiled_index = compiled(lambda x: x[rows])
    compiled_select = compiled(lambda x: torch.index_select(x, 0, rows))
    return {
        "ours": lambda x: gather_tokens(x, rows),
        "authors": lambda x: x.view(shape).gather(1, expanded).view(-1, width),
        "index_select": lambda x: torch.index_select(x, 0, rows),
        "x[rows]": lambda x: x[rows],
        "compiled x[rows]": compiled_index,
        "compiled index_select": compiled_select,
    }


def measure(size: str, share: int, dtype: torch.dtype) -> None:
    shape = SHAPES[size]
    k = shape[1] // share
    what = {"shape": str(list(shape)), "k": k, "dtype": dtype_name(dtype)}
    whats = [{**what, "pass": name} for name in ("forward", "forward + backward")]
    if not any(map(wanted, whats)):
        return
    x = torch.randn(shape[0] * shape[1], shape[2], dtype=dtype)
    candidates = forms(shape, k)
    result = candidates["ours"](x)
    for function in candidates.values():
        assert torch.equal(function(x), result)
    with torch.inference_mode():
        forward = {name: partial(function, x) for name, function in candidates.items()}
        forward["limit clone"] = result.clone
        line(whats[0], forward)
    both = both_ways(candidates, (x.requires_grad_(),), torch.randn_like(result))
    if wanted(whats[1]):
        want = both["ours"]()
        for run in both.values():
            torch.testing.assert_close(run(), want)
    line(whats[1], both)


if __name__ == "__main__":
    args = parse_args(__doc__)
    for what in product(["smoke"] if args.smoke else ["small", "large"], (2, 3), DTYPES):
        measure(*what)
    report("gather_tokens")
