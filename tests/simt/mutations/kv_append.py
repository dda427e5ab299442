"""Seeded bugs of kv_append."""

from mutations import Mutation

APPEND = "kv/kv_append.cuh"
MUTATIONS = [
    Mutation(
        "no barrier before the slots are overwritten",
        APPEND,
        "    __syncthreads();  // the group before is done with\n",
        "",
        "test_kv_append and N2000",
        build="race",
    ),
    Mutation(
        "no barrier after the slots are read",
        APPEND,
        "    __syncthreads();\n    for (int64_t j = first + 1",
        "    for (int64_t j = first + 1",
        "repeated",
        build="race",
        sample=True,
    ),
    Mutation(
        "no barrier before the hidden tokens are known",
        APPEND,
        "    __syncthreads();\n    for (int t = int(threadIdx.x) / 32",
        "    for (int t = int(threadIdx.x) / 32",
        "repeated",
        build="race",
    ),
    Mutation(
        "the next token is not compared",
        APPEND,
        "j = first + 1 + threadIdx.x",
        "j = first + 2 + threadIdx.x",
        "pairs",
    ),
    Mutation(
        "a token is hidden by itself",
        APPEND,
        "j > first + t)",
        "j >= first + t)",
        "once",
    ),
    Mutation("padding is written", APPEND, "shared.slots[t] < 0 || ", "", "once", build="asan"),
    Mutation(
        "a slot past the cache is written",
        APPEND,
        "slot < args.num_slots ? slot : -1",
        "slot",
        "slots_past_the_cache",
        build="asan",
    ),
    Mutation(
        "chunks beyond the first of each lane are lost",
        APPEND,
        "c < row_chunks; c += 32",
        "c < min(row_chunks, 32u); c += 32",
        "test_kv_append",
    ),
    Mutation(
        "heads of the rows lie as those of the cache",
        APPEND,
        "from + head * side.head_stride + at",
        "from + head * side.cache_head_stride + at",
        "heads_first",
    ),
    Mutation(
        "strides that allow no large access",
        APPEND,
        " |\n         uintptr_t(side.block_stride | side.offset_stride | side.cache_head_stride |\n"
        "                   side.row_stride | side.head_stride);",
        ";",
        "middle",
        build="asan",
    ),
    Mutation(
        "the values decide nothing about accesses",
        APPEND,
        "address_bits(args.sides[0]) | address_bits(args.sides[1])",
        "address_bits(args.sides[0])",
        "middle",
        build="asan",
    ),
    Mutation(
        "elements are read as if they were contiguous",
        "kv/kv_append.cu",
        "k = last_contiguous(k_in)",
        "k = k_in",
        "test_kv_append",
    ),
    Mutation(
        "the kernel runs on whichever device is current",
        "kv/kv_append.cu",
        "  const DeviceGuard guard(k_cache.get_device_index());\n",
        "",
        "test_kv_append",
    ),
]
