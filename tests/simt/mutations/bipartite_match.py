"""Seeded bugs of bipartite_match."""

from typing import Any

from mutations import Mutation

MATCH = "match/bipartite_match.cuh"


def match(
    name: str, old: str, new: str, tests: str, build: str = "plain", **options: Any
) -> Mutation:
    return Mutation(name, MATCH, old, new, tests, build, **{"dtype": "float32", **options})


MUTATIONS = [
    match(
        "no barrier before a tile is multiplied",
        "p.num_b, d, p.width);\n        __syncthreads();\n",
        "p.num_b, d, p.width);\n",
        "test_bipartite_match and ragged",
        build="race",
    ),
    match(
        "no barrier before a tile is overwritten",
        "        __syncthreads();\n      }\n#pragma unroll\n      for (int j",
        "      }\n#pragma unroll\n      for (int j",
        "test_bipartite_match and tiles",
        build="race",
    ),
    match(
        "no barrier before the ranges are overwritten",
        "    __syncthreads();  // the ranges are done with\n",
        "",
        "test_bipartite_match and tiles",
        build="race",
    ),
    match(
        "no barrier after the ranges are cleared",
        "    s.last = 0;\n  }\n  __syncthreads();\n",
        "    s.last = 0;\n  }\n",
        "test_bipartite_match and ragged",
    ),
    match(
        "rows of the sequence before compete",
        "column >= s.begin[r] && ",
        "",
        "test_bipartite_match and ragged",
    ),
    match(
        "the first row of the next sequence competes",
        "column < s.end[r] &&",
        "column <= s.end[r] &&",
        "test_bipartite_match and ragged",
    ),
    match(
        "the larger of equals wins in a thread",
        "similarity > best[i])",
        "similarity >= best[i])",
        "equals",
    ),
    match(
        "the larger of equals wins among threads",
        "other_index < index[i])",
        "other_index > index[i])",
        "equals",
    ),
    match(
        "half of the columns are lost",
        "lanes < 16; lanes *= 2",
        "lanes < 8; lanes *= 2",
        "test_bipartite_match and tiles",
    ),
    match(
        "half of a row is its norm",
        "int lanes = 16; lanes > 0",
        "int lanes = 8; lanes > 0",
        "test_bipartite_match and tiles",
    ),
    match(
        "a row of zeros is like nothing",
        "sum > 0 ? 1 / sqrt(sum) : sum",
        "1 / sqrt(sum)",
        "zeros",
    ),
    match(
        "rows past the last are read",
        "if (first + r < num_rows && d + e < width)",
        "if (d + e < width)",
        "test_bipartite_match and ragged",
        build="asan",
    ),
    match(
        "elements past the row are multiplied",
        "if (first + r < num_rows && d + e < width)",
        "if (first + r < num_rows)",
        "test_bipartite_match and ragged",
        build="asan",
    ),
    match(
        "rows are taken to be packed",
        "rows + (first + r) * stride + d + e",
        "rows + (first + r) * width + d + e",
        "test_bipartite_match and ragged",
        dtype="bfloat16",
    ),
    Mutation(
        "room for the norms of a alone",
        "match/bipartite_match.cu",
        "dims.num_a + dims.num_b : 0",
        "dims.num_a : 0",
        "test_bipartite_match and cosine",
        build="asan",
    ),
    Mutation(
        "the stride of a is used for b",
        "match/bipartite_match.cu",
        "args.b_stride = b.stride;",
        "args.b_stride = a.stride;",
        "test_bipartite_match",
    ),
]
