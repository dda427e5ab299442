"""paged_depth_attention decoding against matmul, SDPA, FlexAttention and the memory's read rate.

The others get caches padded to the longest sequence, [B, Hkv, S, head_dim], laid out as they like
best, and a mask; the authors repeat keys and values for every query head. As in a model, no call
finds its cache where the last one left it: calls go round over as many layers as fill 128 MiB.
`x limit read` is the rate at which K and V are read, over that of a sum of 256 MiB; above 1 the
cache held a part. `x limit equal` stands against our own time for sequences of one length that hold
as many keys: near 1, ragged lengths cost their own bytes alone.
"""

from collections.abc import Callable
from itertools import cycle, product
from typing import Any

import torch
from harness import DTYPES, compiled, dtype_name, generator, line, parse_args, report, wanted
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from mor.ops import paged_depth_attention

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 9, 3, 64, 16
LAYERS_BYTES = 128 << 20


class Decoding:
    """One query for each sequence of a ragged batch, in several layers with caches of their own."""

    def __init__(self, lengths: list[int], dtype: torch.dtype) -> None:
        """Blocks are dealt in a random order."""
        random, self.lengths, self.batch = generator(), lengths, len(lengths)
        blocks = [-(-n // BLOCK) for n in lengths]
        order = torch.randperm(sum(blocks), generator=random).int()
        self.table = torch.full((self.batch, max(blocks)), -1, dtype=torch.int32)
        for b, dealt in enumerate(order.split(blocks)):
            self.table[b, : blocks[b]] = dealt
        self.lens = torch.tensor(lengths, dtype=torch.int32)
        self.cu = torch.arange(self.batch + 1, dtype=torch.int32)
        self.q = torch.randn(self.batch, HEADS, HEAD_DIM, generator=random).to(dtype)
        self.bytes = 2 * sum(lengths) * KV_HEADS * HEAD_DIM * self.q.element_size()
        shape = (sum(blocks), BLOCK, KV_HEADS, HEAD_DIM)
        self.layers = [
            tuple(torch.randn(shape, generator=random).to(dtype) for _ in "kv")
            for _ in range(min(max(1, LAYERS_BYTES // self.bytes), 64))
        ]
        hidden = torch.arange(max(lengths)) >= self.lens[:, None]
        self.bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -torch.inf)
        self.bias = self.bias[:, None, None]

    def padded(self, cache: Tensor) -> Tensor:
        """[B, Hkv, longest, head_dim]."""
        rows = cache[self.table.long().clamp(min=0)].flatten(1, 2)[:, : max(self.lengths)]
        return rows.transpose(1, 2).contiguous()

    def ours(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return paged_depth_attention(q, k, v, self.table, self.lens, self.cu)[0]

    def authors(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        return scaled_dot_product_attention(q[:, :, None], k, v, self.bias)[:, :, 0]

    def matmul(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Query heads of a group as rows of one product, as a strong user writes decoding."""
        q = q.view(self.batch, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
        scores = (q @ k.transpose(2, 3)) * HEAD_DIM**-0.5 + self.bias
        return (scores.softmax(-1) @ v).view(self.batch, HEADS, HEAD_DIM)

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = scaled_dot_product_attention(q[:, :, None], k, v, self.bias, enable_gqa=True)
        return out[:, :, 0]

    def flex(self) -> Callable[..., Tensor]:
        sizes = (self.batch, None, 1, max(self.lengths))
        device, lens = torch.get_default_device(), self.lens
        mask = create_block_mask(lambda b, h, i, j: j < lens[b], *sizes, device=device)
        flex = compiled(flex_attention)
        return lambda q, k, v: flex(q[:, :, None], k, v, block_mask=mask, enable_gqa=True)[:, :, 0]


def rotating(form: Callable[..., Tensor], q: Tensor, layers: list[Any]) -> Callable[[], Tensor]:
    """A call without arguments, which takes the next layer every time."""
    turn = cycle(layers)
    return lambda: form(q, *next(turn))


def measure(case: str, lengths: list[int], dtype: torch.dtype) -> None:
    what = {"case": case, "dtype": dtype_name(dtype)}
    if not wanted(what):
        return
    problem = Decoding(lengths, dtype)
    padded = [tuple(map(problem.padded, layer)) for layer in problem.layers]
    forms = {name: getattr(problem, name) for name in ("authors", "matmul", "sdpa")}
    forms["flex"] = problem.flex()
    calls = {"ours": rotating(problem.ours, problem.q, problem.layers)}
    calls |= {name: rotating(form, problem.q, padded) for name, form in forms.items()}
    large = torch.ones(64 << 20)
    with torch.inference_mode():
        want = calls["ours"]()
        near = 1e-4 if dtype == torch.float32 else 0.03
        for call in [*calls.values()][1:]:  # each at its first layer
            torch.testing.assert_close(call(), want, rtol=near, atol=near)
        calls["limit read"] = large.sum
        if len(set(lengths)) > 1:
            equal = Decoding([sum(lengths) // len(lengths)] * len(lengths), dtype)
            calls["limit equal"] = rotating(equal.ours, equal.q, equal.layers)
        work = {"limit read": problem.bytes / large.nbytes}
        line(what, calls, seconds=0.1, work=work)


if __name__ == "__main__":
    args = parse_args(__doc__)
    longest, sizes = (64, (2,)) if args.smoke else (4096, (8, 32))
    for batch, dtype in product(sizes, DTYPES):
        ragged = torch.linspace(longest, longest // 32, batch).long().tolist()
        measure(f"ragged {batch} x {longest // 32}..{longest}", ragged, dtype)
        measure(f"equal {batch} x {longest // 8}", [longest // 8] * batch, dtype)
    report("paged_depth_attention")
