"""paged_depth_attention: values, layouts, determinism, bad input."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mor.ops import depth_attention, kv_gather, paged_depth_attention
from mor.ops.paged_depth_attention import reference
from tests.cases.paged_depth_attention import CASES, GQA, MIXED, NAMES, make_inputs
from tests.support.operators import (
    DTYPES,
    INSTRUCTION_SETS,
    OpCase,
    assert_close_to_reference,
    check_bad_input,
    check_op,
    instruction_set,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op_case", CASES, ids=lambda c: c.id)
def test_paged_depth_attention(op_case: OpCase, dtype: torch.dtype) -> None:
    check_op(op_case, dtype)


VARIED = ("decode", "decode-window", "decode-head-20", "decode-head-128", "decode-8-heads-of-one",
          "few-queries-any", "mixed", "mixed-any-window", "prefill-split",
          "prefill-rising")  # fmt: skip


@pytest.mark.parametrize("isa", INSTRUCTION_SETS[:-1])
@pytest.mark.parametrize("dtype", DTYPES[:-1], ids=str)
@pytest.mark.parametrize("op_case", [c for c in CASES if c.id in VARIED], ids=lambda c: c.id)
def test_every_instruction_set(op_case: OpCase, dtype: torch.dtype, isa: str) -> None:
    if isa == torch.ops.mor.instruction_set("best"):
        pytest.skip("test_paged_depth_attention ran it")
    with instruction_set(isa):
        check_op(op_case, dtype)


@pytest.mark.cpu_kernels  # those of CUDA have no threads of torch
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_threads_change_nothing(dtype: torch.dtype) -> None:
    """Entries long enough to be cut into parts, and tiles of queries beside them."""
    inputs = make_inputs(dtype, queries=[1, 1, 30, 1], keys=[5000, 700, 900, 3], **GQA)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(paged_depth_attention(**inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    same, exact = (reference(**inputs | {n: inputs[n].to(t) for n in NAMES[:3]})
                   for t in (dtype, torch.float64))  # fmt: skip
    for i in range(2):
        assert_close_to_reference(str(i), results[0][i], same[i], exact[i])


@pytest.fixture(scope="module")
def many_sequences() -> dict[str, Any]:
    """64 decoding sequences and a chunk of 40 queries, of 2,048 keys each."""
    return make_inputs(queries=[1] * 64 + [40], keys=[2048] * 65, heads=(3, 1), head_dim=64)


@pytest.mark.cpu_kernels  # those of CUDA cut keys by the size of the whole call
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES[:-1], ids=str)
def test_an_entry_depends_on_no_other_one(
    many_sequences: dict[str, Any], dtype: torch.dtype, isa: str
) -> None:
    """To the last bit: the keys of an entry are cut by its own sizes alone."""
    inputs = many_sequences | {name: many_sequences[name].to(dtype) for name in NAMES[:3]}
    cu = inputs["cu_seqlens_q"].tolist()
    with instruction_set(isa):
        out, lse = paged_depth_attention(**inputs)
        for entries in [(b, b + 1) for b in (0, 1, 31, 63, 64)] + [(3, 40), (62, 65)]:
            first, last = cu[entries[0]], cu[entries[1]]
            alone = {
                **inputs,
                "q": inputs["q"][first:last],
                "block_table": inputs["block_table"][slice(*entries)],
                "context_lens": inputs["context_lens"][first:last],
                "cu_seqlens_q": inputs["cu_seqlens_q"][entries[0] : entries[1] + 1] - first,
            }
            got, got_lse = paged_depth_attention(**alone)
            assert torch.equal(got, out[first:last]), entries
            assert torch.equal(got_lse, lse[:, first:last]), entries


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 25])
def test_equals_depth_attention_over_gathered_rows(dtype: torch.dtype, window: int | None) -> None:
    """With positions as keys stand in the cache, a window of keys is one of positions."""
    inputs = make_inputs(dtype, **MIXED, **GQA, window=window)
    keys = torch.tensor(MIXED["keys"], dtype=torch.int32)
    k, v, cu_k = kv_gather(
        inputs["k_cache"], inputs["v_cache"], inputs["block_table"], keys, int(keys.sum())
    )
    positions = torch.cat([torch.arange(n) for n in MIXED["keys"]])
    want = depth_attention(
        inputs["q"], k, v, inputs["context_lens"].long() - 1, positions,
        inputs["cu_seqlens_q"], cu_k, window=window,
    )  # fmt: skip
    got = paged_depth_attention(**inputs)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3}.get(dtype, 1.6e-2)
    torch.testing.assert_close(got[0], want[0], rtol=tolerance, atol=tolerance)
    lse = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got[1], want[1], rtol=lse, atol=lse)


def test_a_window_of_positions_over_a_recursion() -> None:
    """A recursion that some tokens left has gaps: its window starts by position, not by count."""
    inputs = make_inputs(queries=[1, 1], keys=[40, 40], **GQA)
    positions = torch.randperm(200, generator=torch.Generator().manual_seed(1))[:40].sort().values
    window, query = 50, 210
    first = torch.searchsorted(positions, query - window, right=True)
    inputs["context_starts"] = first.expand(2).to(torch.int32)
    k, v, cu_k = kv_gather(
        inputs["k_cache"], inputs["v_cache"], inputs["block_table"],
        torch.tensor([40, 40], dtype=torch.int32), 80,
    )  # fmt: skip
    want, _ = depth_attention(
        inputs["q"], k, v, torch.tensor([query, query]), positions.repeat(2),
        inputs["cu_seqlens_q"], cu_k, window=window,
    )  # fmt: skip
    assert 0 < int(first) < 30
    torch.testing.assert_close(paged_depth_attention(**inputs)[0], want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "layout", ["layers", "fused", "fused_in_block", "heads_first", "keys_heads_first"]
)
def test_slices_of_a_pool(layout: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(dtype, **MIXED, **GQA, block_size=5)
    blocks = inputs["k_cache"].shape[0]
    pool = {
        "layers": torch.zeros(2, blocks, 4, 5, 3, 64, dtype=dtype)[:, :, 1],
        "fused": torch.zeros(blocks, 2, 5, 3, 64, dtype=dtype).transpose(0, 1),
        "fused_in_block": torch.zeros(blocks, 5, 2, 3, 64, dtype=dtype).movedim(2, 0),
        "heads_first": torch.zeros(2, blocks, 3, 5, 64, dtype=dtype).transpose(2, 3),
        "keys_heads_first": [torch.zeros(blocks, 3, 5, 64, dtype=dtype).transpose(1, 2),
                             torch.zeros(blocks, 5, 3, 64, dtype=dtype)],
    }[layout]  # fmt: skip
    for cache, name in zip(pool, ("k_cache", "v_cache"), strict=True):
        cache.copy_(inputs[name])
    got = paged_depth_attention(**{**inputs, "k_cache": pool[0], "v_cache": pool[1]})
    want = paged_depth_attention(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 40])
def test_what_no_query_sees_is_not_read(queries: int, dtype: torch.dtype) -> None:
    """Neither keys past a context or before a window, nor blocks of which no key is seen."""
    inputs = make_inputs(dtype, queries=[queries], keys=[400], **GQA, window=100)
    inputs["context_lens"] -= 30
    inputs["context_starts"] -= 30
    want = paged_depth_attention(**inputs)
    first, limit = int(inputs["context_starts"][0]), int(inputs["context_lens"][-1])
    table = inputs["block_table"]
    for name in ("k_cache", "v_cache"):
        used = inputs[name][table[0].long()].flatten(0, 1)  # [400, Hkv, head_dim]
        used[:first], used[limit:] = torch.nan, torch.nan
        inputs[name] = torch.full_like(inputs[name], torch.nan)
        inputs[name][table[0].long()] = used.unflatten(0, (-1, 16))
    table[0, : first // 16], table[0, -(-limit // 16) :] = 10**9, -1
    got = paged_depth_attention(**inputs)
    assert first > 16
    assert want[0].isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("queries", [1, 40])
def test_nan_reaches_the_rows_that_see_it(queries: int) -> None:
    inputs = make_inputs(queries=[queries], keys=[400], **GQA)
    inputs["k_cache"][int(inputs["block_table"][0, 12]), 3] = torch.nan
    assert paged_depth_attention(**inputs)[0][-1].isnan().all()


def test_large_scores_do_not_overflow() -> None:
    inputs = make_inputs(**MIXED, **GQA, scale=300.0)
    want = reference(**{**inputs, **{n: inputs[n].double() for n in NAMES[:3]}})
    got = paged_depth_attention(**inputs)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=1e-3)


def test_queries_of_a_fused_projection() -> None:
    inputs = make_inputs(**MIXED, **GQA)
    want = paged_depth_attention(**inputs)
    fused = torch.cat([inputs["q"], torch.zeros_like(inputs["q"])], dim=1)
    for q in (fused[:, :9], inputs["q"].mT.contiguous().mT):
        assert torch.equal(paged_depth_attention(**{**inputs, "q": q})[0], want[0])


def test_a_gradient_is_refused() -> None:
    inputs = make_inputs(**MIXED)
    inputs["q"].requires_grad_()
    message = "paged_depth_attention: expected operands that need no gradient, got q"
    check_bad_input(message, paged_depth_attention, **inputs)
    with torch.no_grad():
        paged_depth_attention(**inputs)


@pytest.mark.unsanitized
def test_compiles() -> None:
    inputs = make_inputs(**MIXED)

    def step(**kwargs: Any) -> Tensor:
        out, lse = paged_depth_attention(**kwargs)
        return out * 2 + lse.T[..., None].clamp(min=-9)

    torch.testing.assert_close(torch.compile(step, fullgraph=True)(**inputs), step(**inputs))


INT = torch.int32
CACHE, Q = torch.zeros(9, 4, 2, 8), torch.zeros(5, 4, 8)
BAD: dict[str, dict[str, Any]] = {
    "k_cache of shape": {"k_cache": CACHE[0]},
    "v_cache of the shape of k_cache": {"v_cache": CACHE[:3]},
    "v_cache with a contiguous head_dim": {"v_cache": torch.zeros(9, 4, 8, 2).mT},
    r"head_dim in 1\.\.256, got 257": {
        "k_cache": torch.zeros(1, 4, 2, 257), "v_cache": torch.zeros(1, 4, 2, 257),
    },
    r"head_dim in 1\.\.256, got 0": {"k_cache": CACHE[..., :0], "v_cache": CACHE[..., :0]},
    r"q of shape \[N, H, head_dim\]": {"q": Q[0]},
    "q of dtype float32, got bfloat16": {"q": Q.bfloat16()},
    "q with head_dim 8": {"q": Q[..., :7]},
    "the 3 heads of q to be a multiple of those of k_cache, got 2": {"q": Q[:, :3]},
    "the 4 heads of q to be a multiple of those of k_cache, got 0": {
        "k_cache": CACHE[:, :, :0], "v_cache": CACHE[:, :, :0],
    },
    r"block_table of shape \[B, max_blocks\]": {"block_table": torch.zeros(2, dtype=INT)},
    "block_table of dtype int32, got int64": {"block_table": torch.zeros(2, 3).long()},
    r"context_lens of shape \[N\]": {"context_lens": torch.zeros(5, 1, dtype=INT)},
    "context_lens of dtype int32, got int64": {"context_lens": torch.zeros(5).long()},
    "context_lens of 5 elements": {"context_lens": torch.zeros(4, dtype=INT)},
    r"cu_seqlens_q of shape \[B \+ 1\]": {"cu_seqlens_q": torch.zeros(3, 1, dtype=INT)},
    "cu_seqlens_q of dtype int32, got int64": {"cu_seqlens_q": torch.zeros(3).long()},
    "cu_seqlens_q of 3 elements": {"cu_seqlens_q": torch.zeros(2, dtype=INT)},
    r"context_starts of shape \[N\]": {"context_starts": torch.zeros(1, 5, dtype=INT)},
    "context_starts of dtype int32, got float32": {"context_starts": torch.zeros(5)},
    "context_starts of 5 elements": {"context_starts": torch.zeros(6, dtype=INT)},
}  # fmt: skip
BAD_VALUES: dict[str, dict[str, Any]] = {
    "cu_seqlens_q to start at 0, got 1": {"cu_seqlens_q": [1, 2, 5]},
    "cu_seqlens_q never to fall, got 6 then 5": {"cu_seqlens_q": [0, 6, 5]},
    "cu_seqlens_q to end at 5 .* got 4": {"cu_seqlens_q": [0, 2, 4]},
    r"context_lens in \[0, 12\] .* got context_lens\[1\] = 13": {"context_lens": [1, 13, 3, 4, 5]},
    r"context_lens in \[0, 12\] .* got context_lens\[2\] = -1": {"context_lens": [1, 2, -1, 4, 5]},
    r"context_lens that do not fall inside an entry, got context_lens\[4\] = 3 after 4": {
        "context_lens": [1, 2, 0, 4, 3],
    },
    r"context_starts in \[0, context_lens\], got context_starts\[3\] = 5 with .* = 4": {
        "context_starts": [0, 0, 0, 5, 5],
    },
    r"context_starts in \[0, context_lens\], got context_starts\[0\] = -1": {
        "context_starts": [-1, 0, 0, 0, 0],
    },
    r"context_starts that do not fall inside an entry, got context_starts\[1\] = 0 after 1": {
        "context_starts": [1, 0, 0, 0, 0],
    },
    r"block_table in \[0, 9\), got block_table\[1, 1\] = 9": {
        "block_table": [[1, 9, 9], [0, 9, 2]],
    },
    r"block_table in \[0, 9\), got block_table\[0, 0\] = -1": {
        "block_table": [[-1, 9, 9], [0, 1, 2]],
    },
}  # fmt: skip


def example() -> dict[str, Any]:
    return {
        "q": Q,
        "k_cache": CACHE,
        "v_cache": CACHE,
        "block_table": torch.tensor([[1, 9, 9], [8, 0, -3]], dtype=INT),
        "context_lens": torch.tensor([1, 4, 3, 4, 5], dtype=INT),
        "cu_seqlens_q": torch.tensor([0, 2, 5], dtype=INT),
        "context_starts": None,
    }


@pytest.mark.parametrize("message", [*BAD, *BAD_VALUES])
def test_bad_input(message: str) -> None:
    paged_depth_attention(**example())
    changed = BAD.get(message) or {
        name: torch.tensor(value, dtype=INT) for name, value in BAD_VALUES[message].items()
    }
    check_bad_input(
        f"paged_depth_attention: expected {message}", paged_depth_attention,
        fake=message in BAD, **{**example(), **changed},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["q", "v_cache", "block_table", "context_lens", "cu_seqlens_q"])
def test_bad_device(name: str) -> None:
    bad = {**example(), name: example()[name].to("meta"), "scale": 1.0}
    check_bad_input(f"{name} on cpu, got meta", paged_depth_attention, fake=False, **bad)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op_case", CASES, ids=lambda c: c.id)
def test_paged_depth_attention_on_cuda(op_case: OpCase, dtype: torch.dtype) -> None:
    check_op(op_case, dtype, "cuda")
