"""depth_attention against SDPA, FlexAttention and matmul; GFLOP/s count visible pairs only."""

from collections.abc import Callable
from typing import Any

import torch
from harness import interleave, parse_args, report
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

from mor.ops import depth_attention

HEADS = ((9, 9), (9, 3))
DTYPES = (torch.float32, torch.bfloat16)


class Problem:
    """One batch of equal sequences, packed for us and [B, H, S, hd] for the others."""

    def __init__(
        self,
        batch: int,
        queries: int,
        keys: int,
        heads: tuple[int, int],
        depths: bool,
        window: int | None = None,
        **to: Any,
    ) -> None:
        """Queries stand at a sorted random choice of the keys' positions."""
        generator = torch.Generator().manual_seed(0)
        head_dim = 64
        chosen = [
            torch.randperm(keys, generator=generator)[:queries].sort().values for _ in range(batch)
        ]
        self.k_pos, self.q_pos = torch.arange(keys).repeat(batch, 1), torch.stack(chosen)
        self.q_depths = torch.full((batch, queries), 2, dtype=torch.int32)
        self.k_depths = torch.randint(1, 4, (batch, keys), generator=generator, dtype=torch.int32)
        self.visible = self.q_pos[:, :, None] >= self.k_pos[:, None]
        if window is not None:
            self.visible &= self.q_pos[:, :, None] - self.k_pos[:, None] < window
        if depths:
            self.visible &= self.k_depths[:, None] >= self.q_depths[:, :, None]
        self.q, self.grad = (
            torch.randn(batch * queries, heads[0], head_dim, generator=generator).to(**to)
            for _ in "qg"
        )
        self.k, self.v = (
            torch.randn(batch * keys, heads[1], head_dim, generator=generator).to(**to)
            for _ in "kv"
        )
        self.shape, self.head_dim, self.depths = (batch, queries, keys, heads), head_dim, depths
        self.window = window
        self.flop = 4 * head_dim * heads[0] * int(self.visible.sum())

    def ours(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """depth_attention on packed rows."""
        batch, queries, keys, _ = self.shape
        q_pos, k_pos = self.q_pos.flatten(), self.k_pos.flatten()
        cu_q = torch.arange(batch + 1, dtype=torch.int32) * queries
        cu_k = torch.arange(batch + 1, dtype=torch.int32) * keys
        options: dict[str, Any] = {"window": self.window}
        if self.depths:
            options["q_depths"] = self.q_depths.flatten()
            options["k_depths"] = self.k_depths.flatten()
        return lambda q, k, v: depth_attention(q, k, v, q_pos, k_pos, cu_q, cu_k, **options)[0]

    def heads_first(self, t: Tensor) -> Tensor:
        """[rows, H, hd] as [B, H, S, hd]."""
        return t.unflatten(0, (self.shape[0], -1)).transpose(1, 2)

    def masked(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """SDPA with a bool mask."""
        mask = self.visible[:, None]
        gqa = self.shape[3][0] != self.shape[3][1]
        return lambda q, k, v: sdpa(q, k, v, attn_mask=mask, enable_gqa=gqa)

    def causal(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """SDPA causal: the fast form, for queries = keys only."""
        gqa = self.shape[3][0] != self.shape[3][1]
        return lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=gqa)

    def flex(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """FlexAttention, compiled; no backward on the CPU."""
        batch, queries, keys, heads = self.shape
        torch._dynamo.reset()  # else the ninth shape would fall back to the eager form
        visible, gqa = self.visible, heads[0] != heads[1]
        mask = create_block_mask(
            lambda b, h, i, j: visible[b, i, j], batch, None, queries, keys, device="cpu"
        )
        compiled = torch.compile(flex_attention)
        return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=gqa)

    def matmul(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Query heads of a group as rows of one product, as a strong user writes decoding."""
        batch, queries, _, (heads, kv_heads) = self.shape
        mask = self.visible[:, None].repeat_interleave(heads // kv_heads, dim=2)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q = q.reshape(batch, kv_heads, heads // kv_heads * queries, self.head_dim)
            scores = (q @ k.transpose(2, 3)) * self.head_dim**-0.5
            out = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
            return out.reshape(batch, heads, queries, self.head_dim)

        return run


def forward_backward(
    function: Callable[..., Tensor], tensors: tuple[Tensor, ...], grad: Tensor
) -> Callable[[], Any]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def measure(
    label: str, problem: Problem, peers: tuple[str, ...], repeats: int
) -> list[dict[str, Any]]:
    """Rows of the table: forward, and backward where the peer has one."""
    packed = (problem.q, problem.k, problem.v)
    split = tuple(problem.heads_first(t).contiguous() for t in packed)
    functions = {name: getattr(problem, name)() for name in peers}
    ours = problem.ours()
    want = problem.heads_first(ours(*packed)).float()
    for name, function in functions.items():
        error = (function(*split).float() - want).abs().max().item()
        assert error < 0.03, f"{label}: {name} differs by {error}"
    rows = []
    for backward in (False, True):
        if backward:
            grad = problem.heads_first(problem.grad).contiguous()
            candidates = {"ours": forward_backward(ours, packed, problem.grad)}
            for name, function in functions.items():
                if name != "flex":
                    candidates[name] = forward_backward(function, split, grad)
        else:
            candidates = {"ours": lambda: ours(*packed)}
            candidates |= {n: lambda f=f: f(*split) for n, f in functions.items()}
        side = 1024 if problem.flop > 1e8 else 64
        a, b = (torch.randn(side, side).to(problem.q.dtype) for _ in "ab")
        with torch.set_grad_enabled(backward):
            times = interleave({**candidates, "mm": lambda a=a, b=b: torch.mm(a, b)}, repeats)
        mm_rate = 2 * side**3 / times.pop("mm") / 1e9
        flop = problem.flop * (2.5 if backward else 1)
        rate = flop / times["ours"] / 1e9
        row = {
            "case": label,
            "dtype": str(problem.q.dtype)[6:],
            "pass": "bwd" if backward else "fwd",
        }
        row |= {f"{name} ms": t * 1e3 for name, t in times.items()}
        row |= {"GFLOP/s": rate, "of mm": rate / mm_rate}
        best = min(t for name, t in times.items() if name != "ours")
        rows.append(row | {"x best": best / times["ours"]})
        if queries_are_few(problem):
            break
    return rows


def queries_are_few(problem: Problem) -> bool:
    return problem.shape[1] == 1


def main() -> None:
    args = parse_args(__doc__ or "")
    repeats = 1 if args.smoke else args.repeats
    s = 64 if args.smoke else 2048
    rows = []
    for heads in HEADS:
        for dtype in DTYPES:
            name = f"H{heads[0]}/{heads[1]}"
            to = {"dtype": dtype}
            cases = [
                (f"causal B2 S{s // 2} {name}", (2, s // 2, s // 2, heads, False), ("causal",)),
                (
                    f"sharing B2 {s // 2}of{s} {name}",
                    (2, s // 2, s, heads, False),
                    ("masked", "flex"),
                ),
                (
                    f"depths B2 {s // 2}of{s} {name}",
                    (2, s // 2, s, heads, True),
                    ("masked", "flex"),
                ),
                (
                    f"window{s // 8} B2 S{s} {name}",
                    (2, s, s, heads, False, s // 8),
                    ("masked", "flex"),
                ),
                (f"decode B8 S{s // 4} {name}", (8, 1, s // 4, heads, False), ("masked", "matmul")),
                (
                    f"decode B32 S{s // 4} {name}",
                    (32, 1, s // 4, heads, False),
                    ("masked", "matmul"),
                ),
            ]
            for label, shape, peers in cases:
                problem = Problem(*shape, **to)
                if shape[1] == 1:  # the newest token sees all keys
                    problem.q_pos[:] = shape[2] - 1
                    problem.visible[:] = True
                    problem.flop = 4 * problem.head_dim * heads[0] * shape[0] * shape[2]
                rows += measure(label, problem, peers, repeats)
    report("depth_attention", rows, args)


if __name__ == "__main__":
    main()
