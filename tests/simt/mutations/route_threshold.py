"""Seeded bugs of route_threshold."""

from mutations import Mutation

THRESHOLD = "routing/route_threshold.cuh"


def threshold(
    name: str,
    old: str,
    new: str,
    tests: str,
    build: str = "plain",
) -> Mutation:
    return Mutation(name, THRESHOLD, old, new, tests, build, dtype="float32")


MUTATIONS = [
    threshold(
        "no barrier after the histogram is cleared",
        "shared.histogram[thread] = 0;\n    __syncthreads();\n",
        "shared.histogram[thread] = 0;\n",
        "random and ragged",
        build="race",
    ),
    threshold(
        "no barrier before the histogram is read",
        "    __syncthreads();\n    const int bin",
        "    const int bin",
        "random and ragged",
        build="race",
    ),
    threshold(
        "no barrier before the sum of the weights is read",
        "  atomicAdd(&shared.total, total);\n  __syncthreads();\n",
        "  atomicAdd(&shared.total, total);\n",
        "random and ragged",
        build="race",
    ),
    threshold(
        "no barrier before the digit is read",
        "    __syncthreads();\n    prefix = ",
        "    prefix = ",
        "random and ragged",
        build="race",
    ),
    threshold(
        "two bins claim the last weight",
        "if (before < need &&",
        "if (before <= need &&",
        "test_route_threshold and ties",
    ),
    threshold(
        "lower digits forget the mass above them", "= need - before;", "= need;", "long-random"
    ),
    threshold("the prefix is not compared", "key >> 8 == prefix && ", "", "long-random"),
    threshold(
        "equal weights are rounded down",
        "(shared.need + shared.each - 1) / shared.each",
        "shared.need / shared.each",
        "ties",
    ),
    threshold(
        "an infinite weight counts",
        "weight > 0 && weight < INFINITY",
        "weight > 0",
        "no_weight",
    ),
    threshold(
        "an inclusive quantile is that of the score below",
        "        place += rule.inclusive && static_cast<Acc>(place) < h;\n",
        "",
        "every_rule",
    ),
    threshold(
        "shares are not clamped",
        "rule.rule == RouteRule::kAbsolute ? t : fmin(fmax(t, 0.0), 1.0);",
        "t;",
        "shares_out_of_range",
    ),
    threshold(
        "more than compete are chosen",
        "rule.max_k < 0 ? available : min(rule.max_k, available)",
        "rule.max_k < 0 ? available : rule.max_k",
        "test_route_threshold and between",
    ),
    threshold(
        "sums of the counts start anew at every scan",
        "rule.chosen[b] = int32_t(min(start + before, bound));",
        "rule.chosen[b] = int32_t(min(int64_t(before), bound));",
        "more_sequences",
    ),
    threshold(
        "chosen rows end past the result",
        "int32_t(min(start + before, bound))",
        "int32_t(start + before)",
        "do_not_fit",
    ),
    Mutation(
        "float64 thresholds are read as float32",
        "routing/route_threshold.cu",
        "each->scalar_type() == ScalarType::Double",
        "false",
        "test_route_threshold and float64",
    ),
    Mutation(
        "no sequences leave the rows unwritten",
        "routing/route_threshold.cu",
        "    if (dims.num_sequences == 0) torch::stable::fill_(*rows, -1);\n",
        "",
        "test_route_threshold",
    ),
]
