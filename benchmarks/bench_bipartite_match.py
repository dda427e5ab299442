"""bipartite_match against ToMe's search: normalise, batched product, max; eager and compiled.

`x limit mm` is the share of torch.mm's GFLOP/s that is reached. A ratio above 1 means that ours is
faster.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from harness import DTYPES, compiled, dtype_name, generator, line, parse_args, report, wanted
from torch import Tensor

from mor.ops import bipartite_match

#: B, Na, Nb, D: ViT-B/16 and ViT-L/16@384 (ToMe, every second token), Stable Diffusion (tomesd, one
#: of four tokens is a destination) at its first two resolutions.
SHAPES = {
    "ViT-B": (32, 99, 98, 64),
    "ViT-L 384": (8, 289, 288, 64),
    "SD 32x32": (2, 768, 256, 640),
    "SD 64x64": (2, 3072, 1024, 320),
    "smoke": (2, 33, 32, 17),
}


def authors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a, b = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
    scores, index = (a @ b.transpose(-1, -2)).max(dim=-1)
    return scores, index


def measure(name: str, dtype: torch.dtype) -> None:
    what = {"shape": name, "dtype": dtype_name(dtype)}
    if not wanted(what):
        return
    (batch, num_a, num_b, width), random = SHAPES[name], generator()
    a = torch.randn(batch, num_a, width, generator=random).to(dtype)
    b = torch.randn(batch, num_b, width, generator=random).to(dtype)
    square = torch.randn(1024, 1024).to(dtype)
    flat_a, flat_b = a.flatten(0, 1), b.flatten(0, 1)
    cu_a, cu_b = (torch.arange(batch + 1, dtype=torch.int32) * n for n in (num_a, num_b))
    graph = compiled(authors)
    forms: dict[str, Callable[[], Any]] = {
        "ours": lambda: bipartite_match(flat_a, flat_b, cu_a, cu_b),
        "authors": lambda: authors(a, b),
        "compiled": lambda: graph(a, b),
        "limit bmm": lambda: a @ b.transpose(-1, -2),
        "limit mm": lambda: torch.mm(square, square),
    }
    with torch.inference_mode():
        for form in ("authors", "compiled"):
            near = 1e-5 if dtype == torch.float32 else 3e-2  # theirs is rounded to bfloat16
            torch.testing.assert_close(
                forms["ours"]()[0], forms[form]()[0].flatten().float(), rtol=near, atol=near
            )
        work = batch * num_a * num_b * width / 1024**3
        line(what, forms, work={"limit mm": work})


if __name__ == "__main__":
    args = parse_args(__doc__)
    for what in product([n for n in SHAPES if (n == "smoke") == args.smoke], DTYPES):
        measure(*what)
    report("bipartite_match")
