"""Seeded bugs of gather_tokens."""

from mutations import Mutation

GATHER = "rows/gather_tokens.cuh"
MUTATIONS = [
    Mutation(
        "tail skips every other chunk",
        GATHER,
        "for (; c < chunks; c += 32) out[c] = in[c];",
        "for (; c < chunks; c += 64) out[c] = in[c];",
        "test_gather_tokens and D65",
    ),
    Mutation(
        "four chunks in flight run past the row",
        GATHER,
        "c + 32 * (kInFlight - 1) < chunks",
        "c < chunks",
        "test_gather_tokens and D65",
        build="asan",
    ),
    Mutation(
        "chunks in flight overlap",
        GATHER,
        "held[k] = in[c + 32 * k];",
        "held[k] = in[c + 31 * k];",
        "test_gather_tokens and D576",
    ),
    Mutation(
        "rows are taken to be packed",
        GATHER,
        "x + rows[i] * stride",
        "x + rows[i] * chunks * int64_t(sizeof(Chunk))",
        "test_gather_tokens and D17",
    ),
    Mutation(
        "16-byte chunks of rows of another length",
        GATHER,
        "uintptr_t(stride) | uintptr_t(bytes);",
        "uintptr_t(stride);",
        "test_gather_tokens and D17",
    ),
    Mutation(
        "wide accesses although x is not aligned",
        GATHER,
        "const uintptr_t bits = reinterpret_cast<uintptr_t>(in) |",
        "const uintptr_t bits =",
        "test_gather_tokens and D576",
        build="asan",
    ),
    Mutation(
        "warps start at the same row",
        "rows/rows.cuh",
        "return (int64_t(blockIdx.x) * kRowThreads + threadIdx.x) / 32;",
        "return (int64_t(blockIdx.x) * kRowThreads + threadIdx.x) / 64;",
        "test_gather_tokens and D576",
    ),
    Mutation(
        "the grid takes rows only once",
        "rows/rows.cuh",
        "return int64_t(gridDim.x) * (kRowThreads / 32);",
        "return int64_t(65535) * (kRowThreads / 32);",
        "test_gather_tokens and D576",
    ),
    Mutation(
        "strides between the rows are dropped",
        "rows/gather_tokens.cu",
        "x.stride * item, dims.width * item,",
        "dims.width * item, dims.width * item,",
        "test_gather_tokens or columns",
    ),
]
