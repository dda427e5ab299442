"""What the CUDA kernels can reach on an A100 and an H200, on paper: bytes, FLOPs, time.

A kernel takes at least the time of its bytes at the memory's rate, of its tensor FLOPs at the dense
bfloat16 peak and of its float32 FLOPs at theirs. `share` is the part of that limit which a kernel
of its kind reaches; where it comes from stands in the last column. The case is one recursion of the
360M model of the paper: 32 sequences of 2048 tokens, of which 1024 stay, D = 960, 15 query and 5
key heads of 64, bfloat16.

Attention on tensor cores is held up by whichever of three is slower: the tensor cores, the issue of
instructions (one a cycle for each quarter of a multiprocessor; counted in the machine code of a
whole unmasked tile of 64 x 64 scores), or their sum, if nothing overlaps. The two shares are those
of perfect and of no overlap.
"""

from dataclasses import dataclass

BATCH, LENGTH, ACTIVE, WIDTH = 32, 2048, 1024, 960
HEADS, KV_HEADS, HEAD_DIM = 15, 5, 64
ITEM = 2  # bytes of a bfloat16
ROW = WIDTH * ITEM
TOKENS, CHOSEN = BATCH * LENGTH, BATCH * ACTIVE
TILE = 64


@dataclass(frozen=True)
class Gpu:
    """Peak rates of the data sheets, per second.

    Attributes:
        mma_sync: part of the tensor peak that mma.sync reaches at best. Hopper's needs wgmma: 0.63
            is what arXiv 2501.12084 measures.
    """

    name: str
    bytes: float
    tensor: float
    float32: float
    mma_sync: float


GPUS = (Gpu("A100", 2.04e12, 312e12, 19.5e12, 1.0), Gpu("H200", 4.8e12, 989e12, 67e12, 0.63))


@dataclass(frozen=True)
class Kernel:
    """One operator in one case.

    Attributes:
        bytes: read and written once.
        flop: of float32 on the CUDA cores.
        share: of the limit that is expected, or None: bytes do not count.
        latency: microseconds, about 3 for each launch, more for passes of one block over L2.
    """

    name: str
    what: str
    bytes: float
    share: float | None
    why: str
    flop: float = 0
    latency: float = 0


COPY = "a copy reaches 88 to 92% of the memory's rate; rows of 1920 bytes, indices from cache"
#: Of route_topk: scores are read once for each digit, but from L2 after the first time.
SCORES = TOKENS * 2
CACHE = 64 * 2048 * KV_HEADS * HEAD_DIM * ITEM * 2

KERNELS = (
    Kernel("gather_tokens", "rows read, rows written", 2 * CHOSEN * ROW, 0.85, COPY),
    Kernel(
        "gather_tokens backward",
        "every row written, zeros or gradient; hits: 8 bytes a row, written and read",
        (TOKENS + CHOSEN) * ROW + 16 * TOKENS,
        0.80,
        "as above, three launches",
    ),
    Kernel(
        "scatter_tokens_",
        "updates, chosen rows of base read and written; hits of all rows",
        3 * CHOSEN * ROW + 16 * TOKENS,
        0.80,
        "as above, three launches",
    ),
    Kernel(
        "scatter_tokens",
        "base and updates read, every row written; hits",
        (2 * TOKENS + CHOSEN) * ROW + 16 * TOKENS,
        0.85,
        COPY,
    ),
    Kernel(
        "scatter_tokens backward",
        "gradient and updates of chosen rows read, gradient of updates written; gate: no more",
        3 * CHOSEN * ROW,
        0.80,
        "gradient rows are gathered",
    ),
    Kernel(
        "route_topk",
        "scores, rows",
        SCORES + 8 * CHOSEN,
        None,
        "2 digits of 8 bits and a scan",
        latency=8,
    ),
    Kernel(
        "route_threshold",
        "scores, rows",
        SCORES + 8 * CHOSEN,
        None,
        "as route_topk, twice",
        latency=15,
    ),
    Kernel("group_rows", "keys, rows", (8 + 8) * TOKENS, None, "3 launches", latency=9),
    Kernel(
        "kv_append",
        "32 tokens of 5 heads, K and V read and written",
        2 * 2 * 32 * KV_HEADS * HEAD_DIM * ITEM,
        None,
        "1 launch",
        latency=3,
    ),
    Kernel("kv_gather", "64 x 2048 rows of K and V copied", 2 * CACHE, 0.85, COPY),
    Kernel(
        "paged_depth_attention",
        "decoding 64 sequences of 2048: K and V read once",
        CACHE,
        0.75,
        "FlashInfer and FlashAttention 2 decode at 75 to 85%",
    ),
    Kernel(
        "segment_reduce",
        "pairs of rows added: rows read, half as many written",
        1.5 * TOKENS * ROW,
        0.80,
        "as scatter_tokens",
    ),
    Kernel(
        "bipartite_match",
        "2 x (3072 on 1024), D = 320, float32 products",
        2 * 4096 * 320 * ITEM,
        0.5,
        "8 shared loads of 16 bytes for 64 products of a thread: both pipes are as busy",
        flop=2 * 2 * 3072 * 1024 * 320,
    ),
)


@dataclass(frozen=True)
class Attention:
    """A pass of depth_attention on tensor cores.

    Attributes:
        products: of 2 * HEAD_DIM FLOPs for each score.
        instructions: that a warp issues for a tile, of which 64 / 4 rows are its own (sm_80).
    """

    name: str
    products: int
    instructions: int

    def tensor_cycles(self, gpu: Gpu) -> float:
        """Of a quarter of a multiprocessor for a warp's part of a tile."""
        return self.ideal_cycles(gpu) / gpu.mma_sync

    def ideal_cycles(self, gpu: Gpu) -> float:
        """At the peak: 2048 FLOPs a cycle on a multiprocessor of an A100, 4096 of an H200."""
        rate = {"A100": 2048, "H200": 4096}[gpu.name]
        return self.products * 2 * HEAD_DIM * TILE * TILE / rate

    def shares(self, gpu: Gpu) -> tuple[float, float]:
        """Of the tensor peak: without overlap, with perfect overlap."""
        tensor, issue = self.tensor_cycles(gpu), self.instructions
        ideal = self.ideal_cycles(gpu)
        return ideal / (tensor + issue), ideal / max(tensor, issue)


PASSES = (
    Attention("forward", 2, 550),
    Attention("backward, grad_q", 3, 540),
    Attention("backward, grad_kv", 4, 750),
)
#: (query, key) pairs: all heads of the active queries, on all keys before them or the active ones.
PAIRS = {
    "on all keys": BATCH * HEADS * ACTIVE * (LENGTH + 1) / 2,
    "on the active keys": BATCH * HEADS * ACTIVE * (ACTIVE + 1) / 2,
}


def main() -> None:
    print("| operator | bytes, FLOPs | limit A100 / H200 | expected, share | why |")
    print("| --- | --- | --- | --- | --- |")
    for k in KERNELS:
        limits = [max(k.bytes / gpu.bytes, k.flop / gpu.float32) * 1e6 for gpu in GPUS]
        work = f"{k.bytes / 1e6:.3g} MB" + (f", {k.flop / 1e9:.3g} GFLOP" if k.flop else "")
        limit = " / ".join(f"{t:.3g} us" for t in limits)
        expected = f"about {k.latency} us"
        if k.share is not None:
            expected = " / ".join(f"{t / k.share:.0f} us" for t in limits) + f", {k.share:.0%}"
        print(f"| `{k.name}`: {k.what} | {work} | {limit} | {expected} | {k.why} |")
    print()
    print("| `depth_attention` | TFLOP | limit A100 / H200 | share A100 | share H200 | expected |")
    print("| --- | --- | --- | --- | --- | --- |")
    for where, pairs in PAIRS.items():
        for attention in PASSES:
            flop = attention.products * 2 * HEAD_DIM * pairs
            limits = [flop / gpu.tensor * 1e6 for gpu in GPUS]
            shares = [attention.shares(gpu) for gpu in GPUS]
            spans = [f"{low:.0%} to {high:.0%}" for low, high in shares]
            times = [
                f"{t / high:.0f} to {t / low:.0f} us"
                for t, (low, high) in zip(limits, shares, strict=True)
            ]
            limit = " / ".join(f"{t:.0f} us" for t in limits)
            print(
                f"| {attention.name}, {where} | {flop / 1e12:.3f} | {limit} | {spans[0]} | "
                f"{spans[1]} | {' / '.join(times)} |"
            )


if __name__ == "__main__":
    main()
