"""Seeded bugs of segment_reduce and the backward of its amax."""

from typing import Any

from mutations import Mutation

REDUCE = "rows/segment_reduce.cuh"


def reduce(
    name: str, old: str, new: str, tests: str, build: str = "plain", **options: Any
) -> Mutation:
    return Mutation(name, REDUCE, old, new, tests, build, **{"dtype": "float32", **options})


MUTATIONS = [
    reduce(
        "a maximum is never below 0",
        "is_first || v > acc[k]",
        "v > acc[k]",
        "test_segment_reduce and D17 and amax",
    ),
    reduce("a NaN is no maximum", " || v != v ? v", " ? v", "special_values"),
    reduce("weights are ignored", "acc[k] += weight * v;", "acc[k] += v;", "segment_reduce"),
    reduce(
        "an empty segment divides by 0",
        "total == 0 ? 0 : acc[k] / total;",
        "acc[k] / total;",
        "test_segment_reduce and S90 and mean",
    ),
    reduce(
        "the mean divides by the last weight",
        "total += a.weights.at(i);",
        "total = a.weights.at(i);",
        "test_segment_reduce and D17 and mean and same",
    ),
    reduce(
        "columns beyond the first pass are lost",
        "begin < a.width; begin += 32 * kPack) {\n      const int64_t d = begin + lane * kPack;\n"
        "      const bool active = d < a.width;\n      acc_t<T>",
        "begin < min(a.width, int64_t{32} * kPack); begin += 32 * kPack) {\n"
        "      const int64_t d = begin + lane * kPack;\n"
        "      const bool active = d < a.width;\n      acc_t<T>",
        "test_segment_reduce and D65",
    ),
    reduce(
        "lanes write past the row",
        "const bool active = d < a.width;\n      acc_t<T>",
        "const bool active = true;\n      acc_t<T>",
        "test_segment_reduce and D17",
        build="asan",
    ),
    reduce(
        "rows are taken to be packed",
        "a.x + i * a.x_stride + d);\n  const acc_t<T> weight",
        "a.x + i * a.width + d);\n  const acc_t<T> weight",
        "test_segment_reduce and D17",
        dtype="bfloat16",
    ),
    reduce(
        "every equal row gets the gradient",
        "if (largest) rest.v[k] = from_acc<T>(0);",
        "",
        "test_segment_reduce and amax-ties",
    ),
    reduce(
        "a NaN gets no gradient",
        "v == top || (v != v && top != top)",
        "v == top",
        "special_values",
    ),
    reduce(
        "gradients are packed",
        "a.grad + s * a.grad_stride + d",
        "a.grad + s * a.width + d",
        "expanded",
        build="asan",
    ),
    Mutation(
        "only the mean needs room for totals, and has none",
        "rows/segment_reduce.cu",
        "{mean ? num_segments : 0}",
        "{0}",
        "test_segment_reduce and mean",
        build="asan",
    ),
    Mutation(
        "totals of float64 are float32",
        "rows/segment_reduce.cu",
        "is_double ? ScalarType::Double : ScalarType::Float",
        "ScalarType::Float",
        "test_segment_reduce and mean and float64",
    ),
]
