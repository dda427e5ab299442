"""Seeded bugs of route_topk."""

from mutations import Mutation

ROUTE = "routing/route_topk.cuh"
SCAN = "RouteScan(shared.scan).ExclusiveSum(count, before);\n"


def route(
    name: str, old: str, new: str, tests: str, build: str = "plain", **options: str
) -> Mutation:
    return Mutation(name, ROUTE, old, new, tests, build, **{"dtype": "float32", **options})


MUTATIONS = [
    route(
        "-0.0 ranks below 0.0",
        "  if (score == 0) return Key{1} << (RouteKey<T>::kBits - 1);\n",
        "",
        "test_route_topk and special",
    ),
    route("NaN ranks by its bits", "  if (score != score) return 0;\n", "", "lowest_score"),
    route("negative scores rank upside down", "? ~bits :", "? bits :", "equal or random"),
    route(
        "bfloat16 ranks on too few bits",
        "static constexpr int kBits = 16;",
        "static constexpr int kBits = 8;",
        "random",
        dtype="bfloat16",
    ),
    route("float16 ranks on too few bits", "? 32 : 24;", "? 32 : 16;", "random", dtype="float16"),
    route("two bins claim the k-th row", "if (before < need &&", "if (before <= need &&", "random"),
    route("digits below the k-th forget it", "need - before;", "need;", "random"),
    route(
        "the prefix is not compared",
        "counted = counted && key >> 8 == prefix;",
        "",
        "random",
    ),
    route(
        "no barrier after the histogram is cleared",
        "shared.histogram[thread] = 0;\n    __syncthreads();\n",
        "shared.histogram[thread] = 0;\n",
        "random and ragged",
        build="race",
    ),
    route(
        "no barrier before the histogram is read",
        "    __syncthreads();\n    const int bin",
        "    const int bin",
        "random and ragged",
        build="race",
    ),
    route(
        "no barrier before the digit is read",
        "    __syncthreads();\n    prefix = ",
        "    prefix = ",
        "random and ragged",
        build="race",
    ),
    route("one tie too many", "earlier_equal < ties))", "earlier_equal <= ties))", "ties"),
    route(
        "ties beyond the last shift the places",
        "(before >> 16) + min(earlier_equal, ties)",
        "(before >> 16) + earlier_equal",
        "ties",
    ),
    route(
        "equal scores overflow their half of the sum", "before & 0xffff", "before & 0xff", "equal"
    ),
    route("tiles start anew", "above_before += total >> 16;", "", "long-random"),
    route("a row goes before itself", "other == key && j < i", "other == key && j <= i", "ties"),
    route(
        "agreeing lanes are counted twice",
        "if (counted && digit != leading)",
        "if (counted)",
        "ties",
    ),
    route(
        "writes past the rows asked for",
        "&& place < args.num_selected)",
        ")",
        "best_rows_stay",
        build="asan",
    ),
    route(
        "a sequence begins outside",
        "min(max(int64_t{args.cu_seqlens[b]}, int64_t{0}), args.num_rows)",
        "int64_t{args.cu_seqlens[b]}",
        "best_rows_stay",
        build="asan",
    ),
    route(
        "protected rows compete",
        "args.candidates[row] != 0) && !route_protected(args, row)",
        "args.candidates[row] != 0)",
        "test_route_topk and protected_rows",
    ),
    route(
        "k counts the protected rows",
        "args.totals[b] = args.taken[b] + kept;",
        "args.totals[b] = args.taken[b];",
        "test_route_topk and protected_rows",
    ),
    route(
        "starts of the sequences miss one",
        "earlier < b; earlier += kRouteThreads",
        "earlier + 1 < b; earlier += kRouteThreads",
        "int_k",
    ),
    Mutation(
        "protected rows alone get no totals",
        "routing/route_topk.cu",
        "candidates.has_value() || protected_rows.has_value()",
        "candidates.has_value()",
        "test_route_topk",
        build="asan",
    ),
    Mutation(
        "candidates are read as if they were contiguous",
        "routing/route_topk.cu",
        "candidates = as_contiguous(candidates_in);\n  const auto protected",
        "candidates = candidates_in;\n  const auto protected",
        "test_route_topk",
    ),
]
