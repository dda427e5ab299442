"""packed_linear against PyTorch's linear and oneDNN's prepacked form (what Inductor calls).

As in decoding, no call finds its weights where the last one left them: calls go round over as many
matrices as fill 128 MiB. `x limit read` is the rate at which the weights are read, over that of a
sum of 256 MiB. A ratio above 1 means that ours is faster.
"""

from collections.abc import Callable, Sequence
from itertools import cycle, product

import torch
from harness import DTYPES, dtype_name, generator, line, parse_args, report, wanted
from torch import Tensor
from torch.nn import functional

from mor.ops import packed_linear
from mor.ops.packed_linear import pack_linear

MATRICES_BYTES = 128 << 20


def prepacked(weight: Tensor, rows: int) -> Tensor:
    """The weight in the layout oneDNN prefers for so many rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def in_turn(call: Callable[[Tensor], Tensor], weights: Sequence[Tensor]) -> Callable[[], Tensor]:
    """A call with the next of the weights."""
    following = cycle(weights)
    return lambda: call(next(following))


def measure(shape: tuple[int, int], rows: int, dtype: torch.dtype, smoke: bool) -> None:
    outputs, inputs = shape
    matrices = 2 if smoke else MATRICES_BYTES // (outputs * inputs * dtype.itemsize)
    what = {"weight": str([outputs, inputs]), "rows": rows, "dtype": dtype_name(dtype)}
    if not wanted(what):
        return
    random = generator()
    x = torch.randn(rows, inputs, generator=random).to(dtype)
    plain = [torch.randn(shape, generator=random).to(dtype) / 32 for _ in range(matrices)]
    packed = [pack_linear(weight) for weight in plain]
    calls = {
        "ours": in_turn(lambda w: packed_linear(x, w, outputs), packed),
        "linear": in_turn(lambda w: functional.linear(x, w), plain),
    }
    has_dtype = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if x.device.type == "cpu" and has_dtype:
        reordered = [prepacked(weight, rows) for weight in plain]
        linear = torch.ops.mkldnn._linear_pointwise
        calls["prepacked"] = in_turn(lambda w: linear(x, w, None, "none", [], ""), reordered)
    with torch.inference_mode():
        want = calls["ours"]()
        for name, call in calls.items():
            if name != "ours":
                torch.testing.assert_close(call(), want, atol=0.05, rtol=0.05, msg=name)
        large = torch.ones((1 << 20) if smoke else (64 << 20))
        calls["limit read"] = large.sum
        line(what, calls, work={"limit read": plain[0].nbytes / large.nbytes})


if __name__ == "__main__":
    args = parse_args(__doc__)
    shapes = [(48, 32)] if args.smoke else [(1536, 576), (576, 1536)]
    for what in product(shapes, (1, 4, 16, 32), DTYPES):
        measure(*what, args.smoke)
    report("packed_linear")
