"""Seeded bugs of paged_depth_attention."""

from typing import Any

from mutations import Mutation

PAGED = "attention/paged_depth_attention.cuh"


def paged(
    name: str, old: str, new: str, tests: str, build: str = "plain", **options: Any
) -> Mutation:
    return Mutation(name, PAGED, old, new, tests, build, **{"dtype": "bfloat16", **options})


MUTATIONS = [
    paged(
        "no barrier before the bounds of the rows are read",
        "  __syncthreads();\n  // Neither contexts",
        "  // Neither contexts",
        "few-queries-any",
        build="race",
    ),
    paged(
        "no barrier before the warps are merged",
        "merge_paged_groups(sums, s);\n  __syncthreads();",
        "merge_paged_groups(sums, s);",
        "few-queries-any",
        build="race",
    ),
    paged(
        "a row sees what its block sees",
        "if (key >= end || !seen.has(uint32_t(key))) score = kNone;",
        "if (key >= end) score = kNone;",
        "few-queries-any",
    ),
    paged(
        "windows are ignored",
        "begin = p.context_starts == nullptr ? 0 : uint32_t(p.context_starts[rows.query(r)]);",
        "begin = 0;",
        "few-queries-window",
    ),
    paged(
        "keys past the last that is seen are read",
        "const int64_t end = min(begin + piece, all_end);",
        "const int64_t end = begin + piece;",
        "few-queries-any",
        build="asan",
    ),
    paged(
        "pieces begin at key 0",
        "const int64_t begin = all_begin + int64_t(blockIdx.z) * piece;",
        "const int64_t begin = int64_t(blockIdx.z) * piece;",
        "end-of-long",
        dtype="float32",
    ),
    paged(
        "every entry has the blocks of the first",
        "p.block_table + int64_t(rows.entry) * p.max_blocks",
        "p.block_table",
        "test_paged_depth_attention and decode",
    ),
    paged(
        "values lie as keys do",
        "int64_t(blockIdx.y) * p.v.head_stride",
        "int64_t(blockIdx.y) * p.k.head_stride",
        "keys_heads_first",
    ),
    paged(
        "older sums are not rescaled",
        "for (int e = 0; e < Lanes::kElements; ++e) sums.out[r][c][e] *= shrink;",
        "for (int e = 0; e < Lanes::kElements; ++e) sums.out[r][c][e] *= 1;",
        "test_paged_depth_attention and decode",
    ),
    paged(
        "groups of a warp keep their own largest score",
        "      highest = max(highest, __shfl_xor_sync(~0u, highest, lanes));\n",
        "",
        "test_paged_depth_attention and decode",
    ),
    paged(
        "a lane reads past the head dimensions",
        "if (row == nullptr || d >= head_dim) continue;",
        "if (row == nullptr) continue;",
        "mixed-any-window",
        build="asan",
    ),
    paged(
        "an unaligned row is read to the end of its chunk",
        "d + e < head_dim ? row[d + e] : T(0)",
        "row[d + e]",
        "prefill",
        build="asan",
    ),
    paged(
        "pieces are added without their largest scores",
        "sum += total[1] * exp2_acc(total[0] - reference);",
        "sum += total[1];",
        "one-long",
        dtype="float32",
    ),
    paged(
        "the last piece is not merged",
        "for (int s = 0; s < p.num_splits; ++s) {\n        const Acc shrink",
        "for (int s = 0; s + 1 < p.num_splits; ++s) {\n        const Acc shrink",
        "one-long",
        dtype="float32",
    ),
    paged(
        "the largest score is given in powers of two",
        "sees ? top * kLn2<acc_t<T>> + log_acc(sum)",
        "sees ? top + log_acc(sum)",
        "test_paged_depth_attention and decode",
    ),
    Mutation(
        "room for one part, however many there are",
        "attention/paged_depth_attention.cu",
        "splits > 1 ? splits * rows : 0",
        "splits > 1 ? rows : 0",
        "test_paged_depth_attention or fused",
        build="asan",
    ),
    Mutation(
        "an empty call is launched",
        "attention/paged_depth_attention.cu",
        "if (rows == 0 || dims.num_entries == 0) return {out, lse};\n",
        "",
        "test_paged_depth_attention",
    ),
]
