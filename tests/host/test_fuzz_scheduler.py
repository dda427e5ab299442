"""Random operations on the scheduler and on its model: equal decisions, nothing lost, all ends."""

import itertools
import random
from typing import Any

import numpy as np
import pytest

from mor import _host
from tests.host.fake_engine import FakeEngine
from tests.host.model import Model

ARRAYS = (
    "ids", "slots", "positions", "tokens", "slot_mapping", "write_through", "recursions",
    "cu_seqlens", "block_table", "context_lens", "context_starts", "sample_rows", "sample_ids",
    "copy_sources", "copy_destinations", "fresh_blocks",
)  # fmt: skip


def draw_options(rng: random.Random) -> dict[str, Any]:
    recursions = rng.choice([1, 2, 3, 4])
    block_size = rng.choice([1, 2, 3, 4])
    strategy = rng.choice(["recursion", "recursion", "shared", "hybrid"])
    # About what the largest request may need: preemption is common.
    groups = 2 if strategy == "shared" else recursions + 1
    return {
        "num_blocks": int(rng.choice([0.6, 0.7, 0.8, 1, 1.5]) * groups * 64 / block_size),
        "block_size": block_size,
        "ends_block_tokens": block_size * rng.choice([0, 1, 1, 2, 5]),
        "num_recursions": recursions,
        "router": rng.choice(["expert", "expert", "token", "none"]),
        "kv_strategy": strategy,
        "max_rows": rng.choice([3, 8, 16]),
        "chunk": rng.choice([1, 8, 16, 64]),
        "policy": rng.choice(["auto", "auto", "lock-step", 0.0, 0.25, 0.5, 0.75, 1.0]),
        "max_wait": rng.choice([None, None, 1, 2]),
        "block_seconds": [(1, 0.1), (4, 0.1 + rng.random() / 10), (16, 0.5)],
        "ends_seconds": [(1, rng.choice([0.05, 0.2])), (8, 0.25)],
        "aging_s": rng.choice([1.0, 10.0]),
        "watermark": rng.choice([0.0, 0.01, 0.2]),
        "growth_ratio": rng.choice([0.0, 0.0, 0.0, 0.5]),
        "prefix_cache": rng.random() < 0.8,
        "window": rng.choice([None, None, 1, 5]),
        "hash_bits": rng.choice([64, 2, 0]),
    }


def curve(points: list[tuple[float, float]]) -> Any:
    """Linear between the points, constant before them, proportional after them."""

    def seconds(rows: float) -> float:
        if rows < points[0][0]:
            return points[0][1]
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if rows < x1:
                return y0 + (y1 - y0) * ((rows - x0) / (x1 - x0))
        return points[-1][1] * (rows / points[-1][0])

    return seconds


def draw_request(rng: random.Random, options: dict[str, Any], now: float) -> dict[str, Any]:
    # Few prompts, so that prefixes are found.
    base = [1 + (i * i + rng.randrange(2) * (i > 12)) % 7 for i in range(20)]
    tail = [rng.randrange(40) for _ in range(rng.choice([0, 0, 1, 4]))]
    return {
        "tokens": base[: rng.choice([1, 2, 5, 9, 14, 20])] + tail,
        "max_tokens": rng.choice([0, 1, 2, 12, 30, 40, 40]),
        "now": now,
        "priority": rng.choice([0, 0, 0, 1, 2]),
        "deadline": rng.choice([None] * 12 + [now + rng.random() * 9]),
        "n": 1,
        "max_recursions": rng.choice([None] * 4 + [rng.randint(1, options["num_recursions"])]),
        "threshold": rng.choice([0.5, 0.5, 0.25]),
        "tenant": rng.choice([0, 0, 0, 1]),
        "prefix_cache": rng.random() < 0.9,
        "prompt_logits": rng.random() < 0.1,
    }


def most_blocks(options: dict[str, Any], request: dict[str, Any]) -> int:
    """What a request may need alone: all tokens at all depths, and its children's tails."""
    cap = request["max_recursions"] or options["num_recursions"]
    groups = 1 if options["kv_strategy"] == "shared" else cap
    sizes = [options["block_size"]] * groups + [options["ends_block_tokens"]]
    prompt, n = len(request["tokens"]), request["n"]
    length = prompt + max(request["max_tokens"], 1) - 1
    alone = sum(-(-length // size) for size in sizes if size)
    return max(alone, sum(prompt // size + n for size in sizes if size) if n > 1 else 0)


def same_plan(plan: Any, expected: dict[str, Any]) -> None:
    assert plan.kind == expected["kind"]
    if plan.kind == "idle":
        return
    for name in ARRAYS:
        found = getattr(plan, name)
        wanted = np.array(expected.get(name, []))
        same = found.size == wanted.size and (found.ravel() == wanted.ravel()).all()
        assert same, (plan.kind, name, found, wanted)


class Run:
    """One scheduler, its model, and an engine that tells what the rows should see."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.options = draw_options(rng)
        self.engine = FakeEngine(_host.Scheduler(**self.options), self.options)
        self.scheduler = self.engine.scheduler
        curves = {
            "block_curve": curve(self.options["block_seconds"]),
            "ends_curve": curve(self.options["ends_seconds"]),
        }
        self.model = Model(**self.options, **curves)
        self.now, self.operations, self.ended = 0.0, 0, dict[int, str]()

    def operate(self) -> None:
        """One random operation, and `check`."""
        self.operations += 1
        choice = self.rng.random()
        if choice < 0.12:
            self.add()
        elif choice < 0.13 and self.model.next_id:
            self.abort()
        elif choice < 0.15:
            self.now += self.rng.random() * 3
        else:
            self.step()
        self.scheduler.check()

    def add(self) -> None:
        request = draw_request(self.rng, self.options, self.now)
        request["n"] = self.rng.choice([1, 1, 1, 1, 2, 3]) if request["max_tokens"] else 1
        possible = (
            request["n"] <= self.options["max_rows"]
            and most_blocks(self.options, request) <= self.options["num_blocks"]
        )
        if not possible:
            with pytest.raises(ValueError, match=r"^(n|tokens, max_tokens): expected"):
                self.engine.add(**request)
            return
        assert self.engine.add(**request) == self.model.add(**request)

    def abort(self) -> None:
        id = self.rng.randrange(self.model.next_id)
        assert self.scheduler.abort(id) == self.model.abort(id)

    def step(self, disturbed: bool = True) -> None:
        oldest = next(iter(self.model.running), None)
        before = len(self.model.preemptions)
        plan = self.scheduler.plan(self.now)
        same_plan(plan, self.model.plan(self.now))
        if oldest and oldest.id in self.model.seqs:
            assert oldest.id not in self.model.preemptions[before:], "the oldest was preempted"
        self.scheduler.check()
        if plan.kind != "idle":
            if disturbed and self.rng.random() < 0.03:
                self.abort()  # in flight, perhaps
            if disturbed and self.rng.random() < 0.03:
                self.add()
            decisions, tokens = self.engine.decide(plan)
            self.scheduler.report(decisions, tokens)
            self.model.report(
                None if decisions is None else decisions.tolist(),
                None if tokens is None else tokens.tolist(),
            )
            self.now += 0.05
        self.compare()

    def compare(self) -> None:
        ended = self.scheduler.take_finished()
        assert ended == self.model.finished
        self.model.finished = []
        for id, reason in ended:
            assert id not in self.ended, "a sequence ended twice"
            self.ended[id] = reason
            request, tokens = self.engine.requests[id], self.engine.tokens[id]
            alone = self.engine.alone(request, request["child"])
            if reason in ("stop", "length"):
                assert tokens == alone, "a schedule changed what was generated"
            else:
                assert tokens == alone[: len(tokens)]
        for s in self.model.seqs.values():
            found = self.scheduler.describe(s.id)
            assert found is not None
            assert found["state"] == s.state
            assert (found["done"], found["counts"], found["blocks"]) == (s.done, s.counts, s.tables)
        stats = self.scheduler.stats()
        assert stats.preemptions == len(self.model.preemptions)
        assert stats.blocks_free == len(self.model.free)

    def drain(self) -> None:
        """Without new requests every one ends: the oldest gains a token in each round of passes."""
        waiting = [self.engine.requests[id] for id in self.model.seqs]
        work = sum(len(r["tokens"]) + r["n"] * (r["max_tokens"] + 1) for r in waiting)
        rounds = 2 * (self.options["num_recursions"] + 2) * (work + 1)
        for _ in range(rounds):
            if not self.scheduler.has_work:
                break
            self.step(disturbed=False)
        assert not self.scheduler.has_work, "a request starves"
        assert set(self.ended) == set(range(self.model.next_id))
        stats = self.scheduler.stats()
        assert stats.blocks_free == stats.blocks
        assert stats.running == stats.waiting == 0
        self.scheduler.check()


def run(seeds: range, operations: int) -> dict[str, int]:
    total = {"operations": 0, "preemptions": 0, "hits": 0}
    for seed in seeds:
        r = Run(seed)
        try:
            for _ in range(operations):
                r.operate()
            r.drain()
        except Exception as error:
            raise AssertionError(f"seed {seed}, operation {r.operations}") from error
        stats = r.scheduler.stats()
        total["operations"] += r.operations
        total["preemptions"] += stats.preemptions
        total["hits"] += stats.prefix_hit_tokens
    return total


def test_3000_operations_decide_as_the_model_does() -> None:
    total = run(range(40), 75)
    assert total["operations"] == 3000
    assert total["preemptions"] > 20, total
    assert total["hits"] > 100, total


@pytest.mark.slow
def test_100000_operations_decide_as_the_model_does() -> None:
    total = run(range(1000, 1500), 200)
    print(total)
    assert total["operations"] == 100_000
    assert total["preemptions"] > 1000, total
    assert total["hits"] > 10_000, total
