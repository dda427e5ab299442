"""paged_depth_attention decoding against matmul, SDPA and the memory's read rate.

The others get caches padded to the longest sequence, [B, Hkv, S, head_dim], laid out as they like
best, and a mask. As in a model, no call finds its cache where the last one left it: calls go round
over as many layers as fill 128 MiB. `of read` is the rate at which K and V are read, over that of a
sum of 256 MiB in the same run; above 1 the cache held a part.
"""

from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from harness import interleave, parse_args, report
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from mor.ops import paged_depth_attention

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 9, 3, 64, 16
LAYERS_BYTES = 128 << 20


class Decoding:
    """One query for each sequence of a ragged batch, in several layers with caches of their own."""

    def __init__(self, lengths: list[int], dtype: torch.dtype) -> None:
        """Blocks are dealt in a random order."""
        generator = torch.Generator().manual_seed(0)
        self.lengths, self.batch = lengths, len(lengths)
        blocks = [-(-n // BLOCK) for n in lengths]
        order = torch.randperm(sum(blocks), generator=generator).int()
        self.table = torch.full((self.batch, max(blocks)), -1, dtype=torch.int32)
        for b, dealt in enumerate(order.split(blocks)):
            self.table[b, : blocks[b]] = dealt
        self.lens = torch.tensor(lengths, dtype=torch.int32)
        self.cu = torch.arange(self.batch + 1, dtype=torch.int32)
        self.q = torch.randn(self.batch, HEADS, HEAD_DIM, generator=generator).to(dtype)
        self.bytes = 2 * sum(lengths) * KV_HEADS * HEAD_DIM * self.q.element_size()
        shape = (sum(blocks), BLOCK, KV_HEADS, HEAD_DIM)
        self.layers = [
            tuple(torch.randn(shape, generator=generator).to(dtype) for _ in "kv")
            for _ in range(max(1, LAYERS_BYTES // self.bytes))
        ]
        hidden = torch.arange(max(lengths)) >= self.lens[:, None]
        self.bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -torch.inf)

    def padded(self, cache: Tensor) -> Tensor:
        """[B, Hkv, longest, head_dim]."""
        rows = cache[self.table.long().clamp(min=0)].flatten(1, 2)[:, : max(self.lengths)]
        return rows.transpose(1, 2).contiguous()

    def ours(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The operator, on the paged caches."""
        return paged_depth_attention(q, k, v, self.table, self.lens, self.cu)[0]

    def matmul(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Query heads of a group as rows of one product, as a strong user writes decoding."""
        q = q.view(self.batch, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
        scores = (q @ k.transpose(2, 3)) * HEAD_DIM**-0.5 + self.bias[:, None, None]
        return (scores.softmax(-1) @ v).view(self.batch, HEADS, HEAD_DIM)

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """SDPA with a mask."""
        mask = self.bias[:, None, None]
        return sdpa(q[:, :, None], k, v, attn_mask=mask, enable_gqa=True)[:, :, 0]


def measure(label: str, lengths: list[int], dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    problem = Decoding(lengths, dtype)
    padded = [tuple(problem.padded(t) for t in layer) for layer in problem.layers]
    forms = {
        "ours": (problem.ours, problem.layers),
        "matmul": (problem.matmul, padded),
        "sdpa": (problem.sdpa, padded),
    }
    want = problem.matmul(problem.q, *padded[-1]).float()
    candidates: dict[str, Callable[[], Any]] = {}
    for name, (form, layers) in forms.items():
        error = (form(problem.q, *layers[-1]).float() - want).abs().max().item()
        assert error < 0.03, f"{label}: {name} differs by {error}"
        turn = cycle(layers)
        candidates[name] = lambda form=form, turn=turn: form(problem.q, *next(turn))
    large = torch.ones(64 << 20)
    candidates["read"] = large.sum
    with torch.inference_mode():
        times = interleave(candidates, repeats, seconds=0.1)
    rate = problem.bytes / times["ours"] / 1e9
    read = large.nbytes / times.pop("read") / 1e9
    row = {"case": label, "dtype": str(dtype)[6:], "MB": problem.bytes / 1e6}
    row |= {f"{name} ms": seconds * 1e3 for name, seconds in times.items()}
    row |= {"GB/s": rate, "of read": rate / read}
    return row | {f"x {name}": times[name] / times["ours"] for name in ("matmul", "sdpa")}


def main() -> None:
    args = parse_args(__doc__)
    longest = 64 if args.smoke else 4096
    sizes = (2,) if args.smoke else (1, 8, 32)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for batch in sizes:
            lengths = torch.linspace(longest, longest // 32, batch).long().tolist()
            rows.append(measure(f"ragged B{batch} to {longest}", lengths, dtype, args.repeats))
        equal = [longest // 8] * sizes[-1]
        rows.append(measure(f"equal B{sizes[-1]} S{longest // 8}", equal, dtype, args.repeats))
    report("paged_depth_attention", rows, args)


if __name__ == "__main__":
    main()
