"""Seeded bugs of group_rows."""

from mutations import Mutation

GROUP = "routing/group_rows.cuh"
MUTATIONS = [
    Mutation(
        "no barrier before the keys are overwritten",
        GROUP,
        "  __syncthreads();  // the chunk before is done with\n",
        "",
        "chunks-300",
        build="race",
    ),
    Mutation(
        "no barrier after the keys are written",
        GROUP,
        "  shared.keys[threadIdx.x] = key;\n  __syncthreads();\n",
        "  shared.keys[threadIdx.x] = key;\n",
        "ragged",
    ),
    Mutation(
        "rows of a chunk come out in descending order",
        GROUP,
        "rank += equal && j < int(threadIdx.x);",
        "rank += equal && j > int(threadIdx.x);",
        "ragged",
    ),
    Mutation(
        "counts start anew at every step of the scan",
        GROUP,
        "counts[i] = start + before;",
        "counts[i] = before;",
        "chunks-300",
    ),
    Mutation(
        "no barrier between two scans",
        GROUP,
        "    start += total;\n    __syncthreads();\n",
        "    start += total;\n",
        "chunks-300",
        build="race",
    ),
    Mutation(
        "an offset counts the first row of its sequence",
        GROUP,
        "row < sequence; ++row",
        "row <= sequence; ++row",
        "ragged",
    ),
    Mutation(
        "a negative key is not clamped",
        GROUP,
        "min(max(static_cast<int64_t>(keys[row]), int64_t{0}), num_keys - 1)",
        "min(static_cast<int64_t>(keys[row]), num_keys - 1)",
        "keys_are_clamped",
    ),
    Mutation(
        "a large key is not clamped",
        GROUP,
        "min(max(static_cast<int64_t>(keys[row]), int64_t{0}), num_keys - 1)",
        "max(static_cast<int64_t>(keys[row]), int64_t{0})",
        "keys_are_clamped",
        build="asan",
    ),
    Mutation(
        "rows past the end are counted",
        GROUP,
        "if (last && chunk * kGroupChunk + threadIdx.x < args.num_rows)",
        "if (last)",
        "ragged",
        build="asan",
    ),
    Mutation(
        "runs are laid out by sequence",
        GROUP,
        "key = run / args.num_sequences, b = run % args.num_sequences",
        "key = run % args.num_keys, b = run / args.num_keys",
        "ragged",
    ),
    Mutation(
        "the rank of the key's last row only",
        GROUP,
        "last = last && !(equal && j > int(threadIdx.x));",
        "last = last && !(equal && j > int(threadIdx.x) + 1);",
        "ragged",
        build="race",
    ),
    Mutation(
        "int32 keys are read as int64",
        "routing/group_rows.cu",
        "run(int32_t{});",
        "run(int64_t{});",
        "test_group_rows or sequence",
    ),
    Mutation(
        "no room for the total of the counts",
        "routing/group_rows.cu",
        "num_keys * num_chunks + 1",
        "num_keys * num_chunks",
        "test_group_rows",
        build="asan",
    ),
]
