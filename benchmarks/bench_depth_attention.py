"""depth_attention against SDPA, FlexAttention and varlen_attn, forward and backward.

causal: every row is a query and a key; ragged: the same for sequences of several lengths; sharing:
half the rows are queries on all keys (recursive KV sharing); depths: the same, and keys have left
at depths of their own; window: causal, 256 keys back. The peers get [B, H, S, head_dim], padded to
the longest; `each` calls SDPA for every sequence; varlen_attn is CUDA's and bfloat16's alone. The
authors repeat keys and values for every query head and, where half the rows are queries, compute
all and take these afterwards. `x limit mm` is the share of the GFLOP/s of torch.mm that is reached
on visible pairs. Decoding is the matter of bench_paged_depth_attention.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from harness import DTYPES, compiled, dtype_name, generator, line, parse_args, report, wanted
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from mor.ops import depth_attention

HEADS = ((9, 3), (15, 5))
HEAD_DIM = 64
#: Lengths of the sequences, and what else differs from causal attention among all rows.
CASES: dict[str, tuple[list[int], dict[str, Any]]] = {
    "causal 8x512": ([512] * 8, {}),
    "causal 2x2048": ([2048] * 2, {}),
    "causal 1x8192": ([8192], {}),
    "ragged 128..2048": ([2048, 1536, 1024, 512, 256, 128], {}),
    "sharing 1024 of 2x2048": ([2048] * 2, {"share": 2}),
    "depths 1024 of 2x2048": ([2048] * 2, {"share": 2, "depths": True}),
    "window 256 of 2x2048": ([2048] * 2, {"window": 256}),
}
SMOKE = {
    "ragged 8..40": ([40, 8, 24], {}),
    "depths 32 of 2x64": ([64] * 2, {"share": 2, "depths": True}),
}

sdpa = partial(scaled_dot_product_attention, enable_gqa=True)


class Problem:
    """Queries, keys and values packed for us and padded for the others, and what is visible."""

    def __init__(
        self,
        lengths: list[int],
        heads: tuple[int, int],
        dtype: torch.dtype,
        share: int = 1,
        depths: bool = False,
        window: int | None = None,
    ) -> None:
        """One row of `share`, in ascending order, is a query, at depth 2 if `depths`."""
        random, self.lengths, self.window = generator(), lengths, window
        self.queries = [n // share for n in lengths]
        self.chosen = [
            torch.randperm(n, generator=random)[:k].sort().values
            for n, k in zip(lengths, self.queries, strict=True)
        ]
        left = [torch.randint(1, 4, (n,), generator=random, dtype=torch.int32) for n in lengths]
        for depth, chosen in zip(left, self.chosen, strict=True):
            depth[chosen] = depth[chosen].clamp(min=2)
        self.left = left if depths else None
        self.plainly_causal = share == 1 and not depths and window is None
        shape = (sum(self.queries), heads[0], HEAD_DIM)
        self.q, self.grad = (torch.randn(shape, generator=random).to(dtype) for _ in "qg")
        shape = (sum(lengths), heads[1], HEAD_DIM)
        self.k, self.v = (torch.randn(shape, generator=random).to(dtype) for _ in "kv")
        # A query of the padding stands at position 0 and sees a key: SDPA has no empty rows then.
        self.q_pos, k_depths = pad_sequence(self.chosen, True), pad_sequence(left, True)

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            seen = j <= self.q_pos[b, i]
            if window is not None:
                seen = seen & (self.q_pos[b, i] - j < window)
            return seen & (k_depths[b, j] >= 2) if depths else seen

        self.sees, sequence = sees, torch.arange(len(lengths))[:, None, None]
        longest = torch.arange(max(self.queries))
        self.mask = sees(sequence, sequence, longest[:, None], torch.arange(max(lengths)))
        real = longest < torch.tensor(self.queries)[:, None]
        self.flop = 4 * HEAD_DIM * heads[0] * int(self.mask[real].sum())

    def ours(self) -> Callable[..., Tensor]:
        counts = torch.tensor([[0, *self.queries], [0, *self.lengths]])
        cu_q, cu_k = counts.cumsum(1, dtype=torch.int32)
        q_pos, k_pos = torch.cat(self.chosen), torch.cat([torch.arange(n) for n in self.lengths])
        options: dict[str, Any] = {"window": self.window}
        if self.left:
            options["k_depths"] = torch.cat(self.left)
            options["q_depths"] = torch.full_like(q_pos, 2, dtype=torch.int32)
        return lambda q, k, v: depth_attention(q, k, v, q_pos, k_pos, cu_q, cu_k, **options)[0]

    def authors(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        if self.left or self.window:
            return sdpa(q, k, v, attn_mask=self.mask[:, None])
        out = sdpa(q, k, v, is_causal=True)
        if self.plainly_causal:
            return out
        return out.gather(2, self.q_pos[:, None, :, None].expand(-1, q.shape[1], -1, HEAD_DIM))

    def masked(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, attn_mask=self.mask[:, None])

    def each(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        split = (t.transpose(0, 1).split(self.lengths, dim=1) for t in (q, k, v))
        outs = [
            sdpa(*(t[None] for t in qkv), is_causal=True)[0] for qkv in zip(*split, strict=True)
        ]
        return torch.cat(outs, dim=1).transpose(0, 1)

    def flex(self) -> Callable[..., Tensor]:
        sizes, device = self.mask.shape, torch.get_default_device()
        block_mask = create_block_mask(self.sees, sizes[0], None, *sizes[1:], device=device)
        flex = compiled(flex_attention)
        return lambda q, k, v: flex(q, k, v, block_mask=block_mask, enable_gqa=True)

    def varlen(self) -> Callable[..., Tensor]:
        cu = torch.tensor([0, *self.lengths]).cumsum(0, dtype=torch.int32)
        options: dict[str, Any] = {"window_size": (-1, 0)}
        if "enable_gqa" in varlen_attn.__kwdefaults__:  # torch 2.11 takes it as it comes
            options["enable_gqa"] = True
        longest = max(self.lengths)
        return lambda q, k, v: varlen_attn(q, k, v, cu, cu, longest, longest, **options)

    def forms(self) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
        """Functions, and the inputs they take."""
        packed = (self.q, self.k, self.v)
        padded = (pad(self.q, self.queries), pad(self.k, self.lengths), pad(self.v, self.lengths))
        forms = {"ours": (self.ours(), packed), "authors": (self.authors, padded)}
        if not (self.plainly_causal or self.left or self.window):
            index = self.q_pos[:, None, :, None].expand_as(padded[0])
            every = padded[0].new_zeros(*padded[0].shape[:2], max(self.lengths), HEAD_DIM)
            forms["authors"] = (self.authors, (every.scatter(2, index, padded[0]), *padded[1:]))
        if self.plainly_causal:
            forms["sdpa"] = (partial(sdpa, is_causal=True), padded)
        else:
            forms["sdpa masked"] = (self.masked, padded)
        ragged = len(set(self.lengths)) > 1
        if ragged:
            forms["each"] = (self.each, packed)
            if self.q.is_cuda and self.q.dtype == torch.bfloat16:
                forms["varlen_attn"] = (self.varlen(), packed)
        if ragged or not self.plainly_causal:
            forms["flex"] = (self.flex(), padded)
        return forms


def pad(packed: Tensor, counts: list[int]) -> Tensor:
    """[N, H, head_dim] as [B, H, S, head_dim]."""
    return pad_sequence(packed.split(counts), True).transpose(1, 2).contiguous()


def pack(t: Tensor, counts: list[int]) -> Tensor:
    """The other way; what is packed stays so."""
    if t.dim() == 3:
        return t
    return torch.cat([x[:, :n].transpose(0, 1) for x, n in zip(t, counts, strict=True)])


def measure(case: str, heads: tuple[int, int], dtype: torch.dtype) -> None:
    what = {"case": case, "heads": f"{heads[0]}/{heads[1]}", "dtype": dtype_name(dtype)}
    whats = [{**what, "pass": name} for name in ("forward", "backward")]
    if not any(map(wanted, whats)):
        return
    lengths, options = (CASES | SMOKE)[case]
    problem = Problem(lengths, heads, dtype, **options)
    forms = problem.forms()
    near = (1e-3, 1e-3) if dtype == torch.float32 else (0.03, 0.1)  # forward, gradients
    side = 4096 if problem.q.is_cuda else 1024
    a, b = (torch.randn(side, side).to(dtype) for _ in "ab")
    for described, backward in zip(whats, (False, True), strict=True):
        if not wanted(described):
            continue
        if backward and not problem.q.is_cuda:
            forms.pop("flex", None)  # which has no backward on the CPU
        calls: dict[str, Callable[[], Any]] = {}
        want: list[Tensor] = []
        with torch.inference_mode(not backward):
            for name, (form, inputs) in forms.items():
                inputs = tuple(t.detach().requires_grad_(backward) for t in inputs)
                calls[name] = partial(form, *inputs)
                got = [out := calls[name]()]
                if backward:
                    grad = problem.grad if out.dim() == 3 else pad(problem.grad, problem.queries)
                    calls[name] = partial(torch.autograd.grad, out, inputs, grad, retain_graph=True)
                    got = calls[name]()[1:]
                got = [pack(t, problem.lengths if backward else problem.queries) for t in got]
                want = want or got
                torch.testing.assert_close(got, want, rtol=near[backward], atol=near[backward])
            calls["limit mm"] = lambda: torch.mm(a, b)
            work = problem.flop * (2.5 if backward else 1) / (2 * side**3)
            line(described, calls, work={"limit mm": work})


if __name__ == "__main__":
    args = parse_args(__doc__)
    for what in product(SMOKE if args.smoke else CASES, HEADS[: 1 if args.smoke else 2], DTYPES):
        measure(*what)
    report("depth_attention")
