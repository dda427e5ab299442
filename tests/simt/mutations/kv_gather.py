"""Seeded bugs of kv_gather."""

from mutations import Mutation

GATHER = "kv/kv_gather.cuh"
MUTATIONS = [
    Mutation(
        "no barrier between two scans",
        GATHER,
        "    start += total;\n    __syncthreads();\n",
        "    start += total;\n",
        "more_entries",
        build="race",
    ),
    Mutation("sums start anew at every scan", GATHER, "start + up_to", "up_to", "more_entries"),
    Mutation(
        "lengths beyond the table",
        GATHER,
        "length = min(max(length, int64_t{0}), room);",
        "length = max(length, int64_t{0});",
        "lengths_and_sums",
        build="asan",
    ),
    Mutation(
        "entries end past the result",
        GATHER,
        "int32_t(min(start + up_to, args.num_rows))",
        "int32_t(start + up_to)",
        "lengths_and_sums",
    ),
    Mutation(
        "the first row of an entry belongs to the one before",
        GATHER,
        "args.cu_seqlens[middle + 1] <= row",
        "args.cu_seqlens[middle + 1] < row",
        "test_kv_gather",
    ),
    Mutation(
        "every entry has the blocks of the first",
        GATHER,
        "args.block_table[low * args.max_blocks + i / args.block_size]",
        "args.block_table[i / args.block_size]",
        "test_kv_gather",
    ),
    Mutation(
        "rows run on into the next block",
        GATHER,
        "i % args.block_size * side.offset_stride",
        "i * side.offset_stride",
        "test_kv_gather",
    ),
    Mutation(
        "rows of no entry are copied",
        GATHER,
        "found ? *reinterpret_cast<const Chunk*>(from + head * side.head_stride + at) : Chunk{};",
        "*reinterpret_cast<const Chunk*>(from + head * side.head_stride + at);",
        "lengths_and_sums",
    ),
    Mutation(
        "heads are neighbours",
        GATHER,
        "from + head * side.head_stride + at",
        "from + head * args.head_bytes + at",
        "heads_first",
    ),
    Mutation(
        "caches whose strides allow no large access",
        GATHER,
        " |\n            uintptr_t(side.block_stride | side.offset_stride | side.head_stride);",
        ";",
        "middle",
        build="asan",
    ),
    Mutation(
        "no room for the end of the last sequence",
        "kv/kv_gather.cu",
        "{dims.num_entries + 1}",
        "{dims.num_entries}",
        "test_kv_gather",
        build="asan",
    ),
    Mutation(
        "lengths are read as if they were contiguous",
        "kv/kv_gather.cu",
        "seq_lens = as_contiguous(seq_lens_in)",
        "seq_lens = seq_lens_in",
        "test_kv_gather",
    ),
]
