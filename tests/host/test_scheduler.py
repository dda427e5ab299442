"""The scheduler's promises, one by one.

A trap is a fault that other engines had; its number is that of the serving design, section 4.
One file, as the promises share one engine and its helpers.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mor import _host
from tests.host.fake_engine import FakeEngine

OPTIONS: dict[str, Any] = {
    "num_blocks": 64, "block_size": 4, "ends_block_tokens": 8, "num_recursions": 3,
    "router": "expert", "kv_strategy": "recursion", "max_rows": 8, "chunk": 16,
    "policy": "lock-step", "window": None, "watermark": 0.0,
}  # fmt: skip
REQUEST: dict[str, Any] = {
    "max_tokens": 4, "now": 0.0, "n": 1, "max_recursions": None, "threshold": 0.5,
}  # fmt: skip


class Deep(FakeEngine):
    """Every row takes all recursions, and no sequence stops by itself."""

    def depth(self, id: int, position: int) -> int:
        return self.requests[id]["max_recursions"] or self.R

    def next_token(self, tokens: Any, child: int) -> int:
        return 1 + super().next_token(tokens, child)


def engine(kind: type[FakeEngine] = Deep, **options: Any) -> FakeEngine:
    options = OPTIONS | options
    return kind(_host.Scheduler(**options), options)


def add(e: FakeEngine, tokens: Any, **request: Any) -> int:
    return e.add(**{**REQUEST, "tokens": list(tokens), **request})


def drain(e: FakeEngine, now: float = 0.0, seconds: float = 0.0) -> list[Any]:
    """All passes until nothing is left to do."""
    plans = []
    while e.scheduler.has_work:
        plans.append(e.step(now))
        e.scheduler.check()
        now += seconds
    return plans


def until(e: FakeEngine, reached: Callable[[Any], bool]) -> Any:
    """The first plan that is as wanted, not yet reported."""
    while True:
        plan = e.scheduler.plan(0.0)
        assert plan.kind != "idle"
        if reached(plan):
            return plan
        e.scheduler.report(*e.decide(plan))


def finished(e: FakeEngine) -> dict[int, str]:
    return dict(e.scheduler.take_finished())


# Many children of one request ------------------------------------------------------------------
def test_trap_6_children_share_a_prompt_and_end_each_by_itself() -> None:
    e = engine(FakeEngine)
    id = add(e, range(1, 15), n=3, max_tokens=8)
    prompt_rows = sum(p.num_rows for p in drain(e) if p.kind == "enter" and p.num_entries == 1)
    assert prompt_rows >= 14
    assert set(finished(e)) == {id, id + 1, id + 2}
    for k in range(3):
        assert e.tokens[id + k] == e.alone(e.requests[id + k], k)
    assert e.scheduler.stats().enter_rows < 14 + 3 * 8, "the prompt was computed once"


def test_trap_6_abort_before_the_fork_ends_all_children() -> None:
    e = engine()
    id = add(e, range(1, 40), n=4)
    e.step(0.0)
    assert not e.scheduler.abort(id + 1), "there is no such sequence yet"
    assert e.scheduler.abort(id)
    assert finished(e) == {id + k: "abort" for k in range(4)}
    e.scheduler.check()
    assert not e.scheduler.has_work


def test_trap_6_abort_in_the_pass_that_forks_leaves_no_block() -> None:
    e = engine()
    id = add(e, range(1, 8), n=4)
    plan = until(e, lambda p: p.kind == "exit")
    assert plan.sample_ids.tolist() == [id, id + 1, id + 2, id + 3]
    assert e.scheduler.abort(id)
    assert not e.scheduler.abort(id)
    e.scheduler.report(*e.decide(plan))
    assert finished(e) == {id + k: "abort" for k in range(4)}
    e.scheduler.check()
    assert e.scheduler.stats().blocks_free == 64


def test_trap_6_children_are_admitted_together() -> None:
    e = engine(max_rows=4)
    add(e, [1], max_tokens=8)
    add(e, [2], max_tokens=8, n=4)
    plans = drain(e)
    running = [p.num_entries for p in plans if p.kind == "block"]
    assert running[0] == 1, "three free places are too few for four"
    assert max(running) == 4


def test_more_children_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"n: expected 1 to max_rows = 8, got 9"):
        add(engine(), [1], n=9)


def test_trap_7_abort_of_an_unknown_or_ended_sequence_is_no_error() -> None:
    e = engine()
    id = add(e, [1], max_tokens=1)
    assert not e.scheduler.abort(999)
    assert not e.scheduler.abort(-1)
    drain(e)
    assert not e.scheduler.abort(id)
    assert add(e, [1]) == id + 1, "ids are never used again"


# Prefixes --------------------------------------------------------------------------------------
def test_trap_10_a_cached_prompt_still_computes_its_last_token() -> None:
    e = engine()
    for _ in range(2):
        add(e, range(1, 17), max_tokens=1)  # four whole nodes
        plans = drain(e)
    assert plans[0].positions.tolist() == [12, 13, 14, 15]
    assert e.scheduler.stats().prefix_hit_tokens == 12


def test_trap_11_new_tokens_are_counted_after_the_hit() -> None:
    e = engine(chunk=8)
    add(e, range(1, 14), max_tokens=1)
    drain(e)
    add(e, [*range(1, 13), 50, 51, 52], max_tokens=1)
    assert [p.positions.tolist() for p in drain(e) if p.kind == "enter"] == [[12, 13, 14]]


def test_trap_11_a_preempted_sequence_computes_what_it_generated_too() -> None:
    e = engine(num_blocks=24, growth_ratio=0.0, prefix_cache=False, chunk=64)
    ids = [add(e, range(1, 9), max_tokens=12) for _ in range(2)]
    drain(e)
    assert e.scheduler.stats().preemptions > 0
    for id in ids:
        assert e.tokens[id] == e.alone(e.requests[id], 0)


def test_trap_12_an_evicted_prefix_is_not_found() -> None:
    e = engine(num_blocks=16)
    add(e, range(1, 13), max_tokens=1)
    drain(e)
    assert e.scheduler.stats().blocks_cached > 0
    add(e, range(101, 117), max_tokens=1)  # takes every block
    drain(e)
    add(e, range(1, 13), max_tokens=1)
    drain(e)  # the engine demands the right keys
    assert e.scheduler.stats().prefix_hit_tokens == 0


def test_trap_13_the_tail_of_a_shared_block_is_copied() -> None:
    e = engine()  # group E: nodes of 4 tokens in blocks of 8
    add(e, range(1, 8), max_tokens=1)
    drain(e)
    add(e, [1, 2, 3, 4, 90, 91], max_tokens=1)
    plan = e.scheduler.plan(0.0)
    assert plan.num_rows == 2
    assert len(plan.copy_sources) == 1
    assert not set(plan.copy_destinations) & set(plan.fresh_blocks)
    e.scheduler.report(*e.decide(plan))
    drain(e)


def test_every_block_that_is_taken_is_fresh_or_a_copy() -> None:
    e = engine(FakeEngine)
    add(e, range(1, 30), n=2, max_tokens=20)
    seen: set[int] = set()
    while e.scheduler.has_work:
        plan = e.step(0.0)
        seen |= set(plan.fresh_blocks) | set(plan.copy_destinations)
        assert set(plan.block_table.ravel()) - {-1} <= seen


def test_equal_hashes_of_different_prefixes_are_told_apart() -> None:
    e = engine(hash_bits=0)
    for first in range(1, 8):
        add(e, [first] * 12, max_tokens=1)
        drain(e)
    assert e.scheduler.stats().prefix_hit_tokens == 0


@pytest.mark.parametrize(
    "other", [{"tenant": 1}, {"threshold": 0.25}, {"max_recursions": 2}, {"prompt_logits": True}],
    ids=lambda other: next(iter(other)),
)  # fmt: skip
def test_what_changes_a_prefix_keeps_it_apart(other: dict[str, Any]) -> None:
    e = engine()
    add(e, range(1, 14), max_tokens=1)
    drain(e)
    add(e, range(1, 14), max_tokens=1, **other)
    drain(e)
    assert e.scheduler.stats().prefix_hit_tokens == 0


def test_flipped_depths_do_not_mix_in_one_prefix() -> None:
    """Rounding may change a depth the second time: ranks differ then, and nothing is shared."""

    class Flips(Deep):
        def depth(self, id: int, position: int) -> int:
            return self.R if id == 0 or position > 1 else 1

        def next_token(self, tokens: Any, child: int) -> int:
            return 1

    e = engine(Flips, chunk=64)
    add(e, range(1, 18), max_tokens=1)
    add(e, range(1, 18), max_tokens=1)  # at the same time: neither finds the other's
    drain(e)
    e.depth = lambda id, position: Deep.depth(e, id, position)  # type: ignore[method-assign]
    add(e, range(1, 18), max_tokens=1)
    drain(e)
    assert e.scheduler.stats().prefix_hit_tokens == 16


def test_a_conversation_finds_what_was_generated() -> None:
    e = engine()
    id = add(e, range(1, 7), max_tokens=8)
    drain(e)
    add(e, [*e.tokens[id], 60, 61], max_tokens=2)
    drain(e)
    assert e.scheduler.stats().prefix_hit_tokens == 12


# Memory and order ------------------------------------------------------------------------------
def test_trap_14_nothing_is_admitted_in_ends_after_a_preemption() -> None:
    e = engine(num_blocks=24, growth_ratio=0.0, prefix_cache=False, chunk=64)
    for _ in range(2):
        add(e, range(1, 9), max_tokens=12)
    admitted: list[set[int]] = []
    preempted_at = []
    while e.scheduler.has_work:
        before = e.scheduler.stats().preemptions
        plan = e.step(0.0)
        if e.scheduler.stats().preemptions > before:
            preempted_at.append(len(admitted))
        if plan.kind == "enter":
            admitted.append(set(plan.ids.tolist()))
    assert preempted_at
    assert all(1 not in admitted[at] for at in preempted_at)
    assert e.scheduler.stats().preemptions <= 2, "the newer sequence thrashes"


def test_the_oldest_is_never_preempted_and_the_lowest_priority_goes_first() -> None:
    e = engine(num_blocks=36, growth_ratio=0.0, prefix_cache=False, chunk=64)
    ids = [add(e, range(1, 9), max_tokens=12, priority=p) for p in (0, 0, 1)]
    order: list[int] = []
    while e.scheduler.has_work:
        states = {id: e.scheduler.describe(id) for id in ids}
        e.step(0.0)
        for id, before in states.items():
            after = e.scheduler.describe(id)
            if before and before["state"] != "waiting" and after and after["state"] == "waiting":
                order.append(id)
    assert order
    assert order[0] == ids[1]
    assert ids[0] not in order


def test_trap_15_low_priority_is_served_in_time() -> None:
    e = engine(max_rows=1, aging_s=5.0, prefix_cache=False)
    low = add(e, [1], max_tokens=1, priority=0)
    now = 0.0
    while e.scheduler.describe(low) is not None:
        add(e, [2], max_tokens=1, priority=3, now=now)
        e.step(now)
        now += 1.0
        # Those that came in the first 15 seconds go first, at 5 passes each; no later one does.
        assert now < 16 * 5 + 10


def test_trap_15_a_long_prompt_does_not_stop_decoding() -> None:
    e = engine(num_blocks=512, chunk=4)
    short = add(e, [1], max_tokens=20)
    add(e, range(1, 101), max_tokens=1)
    plans = drain(e)
    exits = [p for p in plans if p.kind == "exit"]
    assert all(short in p.sample_ids for p in exits[:20]), "each of the ends gives it a token"
    assert max(p.num_rows for p in plans) <= 5


def test_trap_15_prompt_rows_at_most_double_the_pass_of_those_that_decode() -> None:
    seconds = [(1, 1.0), (4, 2.5), (16, 8.5)]  # of n rows (n + 1) / 2
    e = engine(num_blocks=512, chunk=16, block_seconds=seconds, ends_seconds=FLAT)
    for first in (1, 2, 3):
        add(e, [first], max_tokens=30)
    long = add(e, range(1, 101), max_tokens=1)
    plans = [p for p in drain(e) if p.kind == "block"]
    rows = [(len(p.ids) - (long in p.ids), p.num_rows) for p in plans if long in p.ids]
    alone = [total for decoding, total in rows if not decoding]
    # 3 that decode take 2 seconds, so 7 rows are as many as take 4.
    assert max(total for decoding, total in rows if decoding == 3) == 7
    assert not alone or max(alone) == 16


def test_trap_15_a_long_prompt_is_not_overtaken_for_ever() -> None:
    e = engine(num_blocks=512, max_rows=3, chunk=4, prefix_cache=False)
    long = add(e, range(1, 61), max_tokens=1)
    passes = 0
    while e.scheduler.describe(long) is not None:
        add(e, [1, 2, 3, 4, 5], max_tokens=1)
        e.step(0.0)
        passes += 1
    assert passes <= 15 * 5 + 5, "the oldest has the prompt rows first"


def test_trap_16_a_chunk_runs_the_last_layer_as_a_whole() -> None:
    class Mixed(FakeEngine):
        def depth(self, id: int, position: int) -> int:
            return (1, 3, 0, 2)[position % 4]

    e = engine(Mixed, policy=0.0)
    add(e, range(1, 14), max_tokens=1)
    plans = drain(e)
    assert [p.kind for p in plans] == ["enter", "block", "block", "block", "exit"]
    assert [p.num_rows for p in plans] == [13, 10, 6, 3, 13]
    rank, last = plans[2], plans[-1]
    assert rank.positions.tolist() == [1, 3, 5, 7, 9, 11]
    assert rank.context_lens.tolist() == [1, 2, 3, 4, 5, 6], "a slot is a rank, not a position"
    assert last.positions.tolist() == [12, *range(12)]
    assert last.num_logit_rows == 1
    assert last.recursions.tolist() == [1, *[1, 3, 0, 2] * 3]


def test_trap_16_rows_are_sorted_by_recursion_and_in_order_within_an_entry() -> None:
    e = engine(FakeEngine, policy=0.0, max_rows=8)
    for first in range(1, 8):
        add(e, range(first, first + 9), max_tokens=12)
    for plan in drain(e):
        if plan.kind == "block":
            assert (np.diff(plan.recursions) >= 0).all()
            for b in range(plan.num_entries):
                rows = slice(plan.cu_seqlens[b], plan.cu_seqlens[b + 1])
                assert (np.diff(plan.positions[rows]) > 0).all()
                assert (np.diff(plan.context_lens[rows]) >= 0).all()


def test_recursion_stores_only_what_was_active() -> None:
    class Shallow(Deep):
        def depth(self, id: int, position: int) -> int:
            return 1 if position % 2 else 3

    e = engine(Shallow, ends_block_tokens=0)
    id = add(e, range(1, 41), max_tokens=2)
    until(e, lambda p: p.kind == "exit" and len(p.sample_ids) > 0)
    state = e.scheduler.describe(id)
    assert state is not None
    assert state["counts"] == [40, 40, 20, 20]
    assert [len(blocks) for blocks in state["blocks"]] == [0, 10, 5, 5]


@pytest.mark.parametrize(
    ("strategy", "blocks"), [("shared", [5, 10, 0, 0]), ("hybrid", [5, 10, 10, 10])]
)
def test_blocks_of_the_other_strategies(strategy: str, blocks: list[int]) -> None:
    e = engine(kv_strategy=strategy)
    id = add(e, range(1, 41), max_tokens=2)
    until(e, lambda p: p.kind == "exit" and len(p.sample_ids) > 0)
    state = e.scheduler.describe(id)
    assert state is not None
    assert [len(b) for b in state["blocks"]] == blocks


def test_a_request_too_large_for_the_pool_is_refused_at_once() -> None:
    e = engine(num_blocks=16)
    with pytest.raises(
        ValueError, match=r"fits alone into num_blocks = 16, got 12 tokens and max_"
    ):
        add(e, range(1, 13), max_tokens=12)
    assert not e.scheduler.has_work


def test_rows_never_pass_max_recursions() -> None:
    e = engine()
    add(e, range(1, 6), max_tokens=3, max_recursions=2)
    plans = drain(e)
    assert {int(r) for p in plans if p.kind == "block" for r in p.recursions} == {1, 2}


def test_prompt_logits_and_no_tokens() -> None:
    e = engine()
    id = add(e, range(1, 10), max_tokens=0, prompt_logits=True)
    (last,) = (p for p in drain(e) if p.kind == "exit")
    assert last.num_logit_rows == 9
    assert len(last.sample_rows) == 0
    assert finished(e) == {id: "length"}


def test_token_choice_knows_the_depths_as_rows_enter() -> None:
    e = engine(FakeEngine, router="token", policy=0.5)
    ids = [add(e, range(1, k), max_tokens=6) for k in range(3, 12)]
    drain(e)
    assert sorted(finished(e)) == ids
    e = engine(router="token")
    add(e, [1])
    e.step(0.0)
    e.scheduler.plan(0.0)
    with pytest.raises(ValueError, match="decisions: expected none where depths are known"):
        e.scheduler.report(np.ones(1, dtype=np.uint8))


# Deadlines, aborts, ends -----------------------------------------------------------------------
def test_deadlines_end_waiting_and_running_sequences() -> None:
    e = engine(max_rows=1)
    ids = [add(e, range(1, 9), max_tokens=20, deadline=d) for d in (4.0, 2.0)]
    drain(e, seconds=1.0)
    assert e.scheduler.take_finished() == [(ids[1], "deadline"), (ids[0], "deadline")]


@pytest.mark.parametrize("passes", range(12))
def test_abort_at_any_point_returns_all_blocks(passes: int) -> None:
    e = engine(chunk=4, prefix_cache=False)
    id = add(e, range(1, 10), max_tokens=2)
    for _ in range(passes):
        e.step(0.0)
    plan = e.scheduler.plan(0.0)
    assert e.scheduler.abort(id)
    if plan.kind != "idle":
        e.scheduler.report(*e.decide(plan))
    e.scheduler.check()
    stats = e.scheduler.stats()
    assert (stats.blocks_free, stats.running) == (64, 0)
    assert finished(e) == {id: "abort"}


class Uneven(Deep):
    """Sequence 0 takes one recursion, sequence 1 takes two, the others all."""

    def depth(self, id: int, position: int) -> int:
        return min(id + 1, self.R)


@pytest.mark.parametrize(
    ("policy", "kinds"),
    [
        ("lock-step", ["enter", "block", "block", "block", "exit"]),
        (0.0, ["enter", "block", "exit", "enter", "block"]),
        (0.5, ["enter", "block", "block", "exit", "enter"]),
    ],
)
def test_a_policy_says_when_the_ends_run(policy: Any, kinds: list[str]) -> None:
    e = engine(Uneven, policy=policy, num_recursions=3)
    for first in range(1, 4):
        add(e, [first], max_tokens=5)
    assert [e.step(0.0).kind for _ in kinds] == kinds


FLAT = [(1, 1.0), (64, 1.0)]
PROPORTIONAL = [(1, 1.0), (64, 64.0)]


@pytest.mark.parametrize(
    ("block", "ends", "third"),
    [
        (FLAT, [(1, 9.0), (64, 9.0)], "block"),  # a big head waits for company
        (FLAT, [(1, 0.01), (64, 0.01)], "exit"),  # a small one does not
        (FLAT, PROPORTIONAL, "exit"),  # nothing is saved by pooling
    ],
    ids=["big head", "small head", "compute-bound head"],
)
def test_auto_weighs_the_ends_against_the_blocks(block: Any, ends: Any, third: str) -> None:
    e = engine(Uneven, policy="auto", block_seconds=block, ends_seconds=ends)
    for first in range(1, 4):
        add(e, [first], max_tokens=5)
    assert [e.step(0.0).kind for _ in range(3)] == ["enter", "block", third]


def test_no_row_waits_longer_than_max_wait_or_its_deadline() -> None:
    big = {"policy": "auto", "block_seconds": FLAT, "ends_seconds": [(1, 9.0), (64, 9.0)]}
    e = engine(Uneven, max_wait=1, **big)
    for first in range(1, 5):
        add(e, [first], max_tokens=5)
    assert [e.step(0.0).kind for _ in range(4)] == ["enter", "block", "block", "exit"]
    e = engine(Uneven, **big)
    add(e, [1], max_tokens=5, deadline=10.5)
    for first in range(2, 4):
        add(e, [first], max_tokens=5)
    assert [e.step(0.0).kind for _ in range(2)] == ["enter", "block"]
    assert e.step(1.0).kind == "exit", "another block pass would end at 11"


def test_expected_seconds_come_from_the_curves() -> None:
    e = engine(block_seconds=[(1, 1.0), (3, 2.0)], ends_seconds=[(2, 3.0)])
    for first in range(1, 7):
        add(e, [first], max_tokens=1)
    seconds = [(p.kind, p.expected_seconds) for p in drain(e)]
    assert seconds == [("enter", 9.0), *[("block", 4.0)] * 3, ("exit", 9.0)]


# Wrong arguments ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"num_blocks": 0}, "num_blocks: expected at least 1, got 0"),
        ({"block_size": 0}, "block_size: expected at least 1, got 0"),
        ({"ends_block_tokens": -1}, "ends_block_tokens: expected at least 0, got -1"),
        ({"num_recursions": 256}, "num_recursions: expected 1 to 255, got 256"),
        ({"router": "both"}, "router: expected one of expert, token, none, got both"),
        ({"kv_strategy": "all"}, "kv_strategy: expected one of recursion, shared, hybrid, got all"),
        ({"policy": "auto"}, "policy: expected block_seconds and ends_seconds with policy auto"),
        ({"policy": 1.5}, "policy: expected auto, lock-step or a share of rows in"),
        ({"max_wait": 0}, "max_wait: expected at least 1, got 0"),
        ({"block_seconds": [(4, 1.0), (2, 1.0)]}, "block_seconds: expected increasing numbers"),
        ({"ends_seconds": [(4, -1.0)]}, "ends_seconds: expected seconds > 0, got -1"),
        ({"aging_s": float("nan")}, "aging_s: expected seconds > 0, got nan"),
        ({"watermark": 1.0}, "watermark: expected a share of the blocks"),
        ({"growth_ratio": 2.0}, "growth_ratio: expected a share of max_tokens"),
        ({"window": 0}, "window: expected at least 1, got 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_options_are_named(option: dict[str, Any], message: str) -> None:
    options = OPTIONS | option
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        _host.Scheduler(**options)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"tokens": []}, "tokens: expected at least 1, got 0"),
        ({"tokens": [1.5]}, "tokens: expected 1 dimension of integers, got 1 of float64"),
        ({"tokens": [-1]}, "tokens: expected 0 to 2^31 - 1, got -1"),
        ({"max_tokens": -1}, "max_tokens: expected at least 0, got -1"),
        ({"n": 0}, "n: expected 1 to max_rows = 8, got 0"),
        ({"n": 2, "max_tokens": 0}, "n: expected 1 with max_tokens = 0, got 2"),
        ({"max_recursions": 4}, "max_recursions: expected 1 to num_recursions = 3, got 4"),
        ({"deadline": float("nan")}, "deadline: expected seconds, got nan"),
        ({"threshold": float("nan")}, "threshold: expected a number, got nan"),
        ({"now": float("nan")}, "now: expected a time of at least"),
    ],
)
def test_wrong_requests_are_named(request_: dict[str, Any], message: str) -> None:
    scheduler = engine().scheduler
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        scheduler.add(**{"tokens": [1], "max_tokens": 1, "now": 0.0, **request_})
    assert not scheduler.has_work


def test_wrong_reports_are_named_and_change_nothing() -> None:
    e = engine()
    add(e, [1, 2])
    with pytest.raises(ValueError, match="report: expected a pass in flight, got none"):
        e.scheduler.report()
    plan = e.scheduler.plan(1.0)
    with pytest.raises(ValueError, match="plan: expected the results of the pass in flight first"):
        e.scheduler.plan(1.0)
    with pytest.raises(ValueError, match="decisions: expected 2 elements, got 3"):
        e.scheduler.report(np.ones(3, dtype=np.uint8))
    with pytest.raises(ValueError, match="tokens: expected none"):
        e.scheduler.report(None, np.ones(2, dtype=np.int64))
    e.scheduler.report(*e.decide(plan))
    with pytest.raises(ValueError, match="now: expected a time of at least 1"):
        e.scheduler.plan(0.0)
    plan = until_now(e, 1.0, "exit")
    with pytest.raises(ValueError, match="tokens: expected 1 elements, got 0"):
        e.scheduler.report()
    with pytest.raises(ValueError, match=r"tokens: expected 0 to 2\^31 - 1, got -5"):
        e.scheduler.report(None, np.array([-5]))
    e.scheduler.report(*e.decide(plan))
    e.scheduler.check()


def until_now(e: FakeEngine, now: float, kind: str) -> Any:
    while (plan := e.scheduler.plan(now)).kind != kind:
        e.scheduler.report(*e.decide(plan))
    return plan


def test_shared_keys_need_every_row_at_recursion_1() -> None:
    e = engine(kv_strategy="shared")
    add(e, [1, 2])
    plan = e.scheduler.plan(0.0)
    with pytest.raises(ValueError, match="expected every row to take recursion 1"):
        e.scheduler.report(np.array([1, 0], dtype=np.uint8))
    e.scheduler.report(*e.decide(plan))


def test_arrays_outlive_the_pass() -> None:
    e = engine()
    add(e, [7, 8, 9], max_tokens=1)
    tokens = e.step(0.0).tokens
    drain(e)
    del e
    assert tokens.tolist() == [7, 8, 9]
