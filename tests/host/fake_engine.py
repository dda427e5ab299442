"""An engine without a model: it stores who wrote each slot and demands what each row should see.

The depth of a row and the token after it are functions of the tokens up to it, as in a model, so a
schedule must not change what a request generates: `alone` computes it without any cache.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

EOS = 0


def digest(tokens: Sequence[int], salt: int = 0) -> int:
    return zlib.crc32(np.asarray(tokens, dtype=np.int64).tobytes(), salt)


class FakeEngine:
    def __init__(self, scheduler: Any, options: dict[str, Any], vocabulary: int = 40) -> None:
        self.scheduler, self.options, self.vocabulary = scheduler, options, vocabulary
        self.R, self.strategy = options["num_recursions"], options["kv_strategy"]
        self.memory: list[dict[Any, Any]] = [{} for _ in range(options["num_blocks"])]
        self.states: dict[int, Any] = {}
        self.tokens: dict[int, list[int]] = {}  # by sequence, prompt and generated
        self.requests: dict[int, dict[str, Any]] = {}
        self.passes = 0

    # What a model would compute ---------------------------------------------------------------
    def depth(self, id: int, position: int) -> int:
        """Recursions that a row takes."""
        cap = self.requests[id]["max_recursions"] or self.R
        if self.options["router"] == "none":
            return cap
        least = 0 if self.strategy == "recursion" else 1
        tokens, threshold = self.tokens[id][: position + 1], self.requests[id]["threshold"]
        return min(cap, least + digest(tokens, int(threshold * 8)) % (self.R + 1 - least))

    def next_token(self, tokens: Sequence[int], child: int) -> int:
        return digest(tokens, 77 + child) % self.vocabulary

    def alone(self, request: dict[str, Any], child: int) -> list[int]:
        tokens = list(request["tokens"])
        for _ in range(request["max_tokens"]):
            tokens.append(self.next_token(tokens, child))
            if tokens[-1] == EOS:
                break
        return tokens

    # Requests and passes ----------------------------------------------------------------------
    def add(self, **request: Any) -> int:
        id: int = self.scheduler.add(**request)
        for k in range(request["n"]):
            self.tokens[id + k] = list(request["tokens"])
            self.requests[id + k] = {**request, "child": k}
        return id

    def decide(self, plan: Any) -> tuple[Any, Any]:
        """Runs a pass: what to report of it."""
        self.passes += 1
        sources = [dict(self.memory[b]) for b in plan.copy_sources]
        for block, contents in zip(plan.copy_destinations, sources, strict=True):
            self.memory[block] = contents
        for block in plan.fresh_blocks:
            self.memory[block] = {}  # NaN would be: whoever reads it is told
        return getattr(self, plan.kind)(plan)

    def step(self, now: float) -> Any:
        plan = self.scheduler.plan(now)
        if plan.kind != "idle":
            self.scheduler.report(*self.decide(plan))
        return plan

    def owners(self, plan: Any) -> list[int]:
        """The sequence of each row that attends."""
        cu = plan.cu_seqlens
        return [int(id) for b, id in enumerate(plan.ids) for _ in range(cu[b], cu[b + 1])]

    def tag(self, id: int, position: int) -> Any:
        return position, digest(self.tokens[id][: position + 1])

    def write(self, group: int, slot: int, layer: str, tag: Any) -> None:
        tokens = self.options["block_size"] if group else self.options["ends_block_tokens"]
        self.memory[slot // tokens][layer, slot % tokens] = tag

    def demand(self, plan: Any, row: int, entry: int, group: int, layer: str, seen: Any) -> None:
        """That the keys which a row attends to are those of `seen`, in order."""
        tokens = self.options["block_size"] if group else self.options["ends_block_tokens"]
        table, length = plan.block_table[entry], int(plan.context_lens[row])
        found = [self.memory[table[i // tokens]].get((layer, i % tokens)) for i in range(length)]
        assert found == seen, (plan.kind, plan.ids[entry], row, layer)
        if self.options["window"]:
            first = int(plan.positions[row]) - self.options["window"] + 1
            hidden = sum(1 for tag in seen if tag[0] < first)
            assert plan.context_starts[row] == hidden

    def enter(self, plan: Any) -> tuple[Any, Any]:
        owners = self.owners(plan)
        ends = self.options["ends_block_tokens"] > 0
        depths = []
        for i, (id, position, slot) in enumerate(
            zip(owners, plan.positions.tolist(), plan.slots.tolist(), strict=True)
        ):
            assert plan.tokens[i] == self.tokens[id][position]
            self.states[slot] = (id, position, 0)
            if ends:
                self.write(0, int(plan.slot_mapping[i]), "first", self.tag(id, position))
            depths.append(self.depth(id, position))
        for i, id in enumerate(owners if ends else []):
            entry = int(np.searchsorted(plan.cu_seqlens, i, side="right")) - 1
            seen = [self.tag(id, p) for p in range(plan.positions[i] + 1)]
            self.demand(plan, i, entry, 0, "first", seen)
        if self.options["router"] == "none":
            return None, None
        given = np.array(depths, dtype=np.uint8)
        return (given if self.options["router"] == "token" else (given > 0)), None

    def block(self, plan: Any) -> tuple[Any, Any]:
        owners, keep = self.owners(plan), []
        offsets = plan.recursion_offsets
        for i, (id, position, slot) in enumerate(
            zip(owners, plan.positions.tolist(), plan.slots.tolist(), strict=True)
        ):
            r = int(plan.recursions[i])
            assert offsets[r - 1] <= i < offsets[r], "rows are sorted by recursion"
            assert self.states[slot] == (id, position, r - 1), "no recursion is skipped or repeated"
            self.states[slot] = (id, position, r)
            tag, mapping = self.tag(id, position), int(plan.slot_mapping[i])
            assert (mapping < 0) == (self.strategy == "shared" and r > 1)
            if mapping >= 0:
                self.write(1 if self.strategy == "shared" else r, mapping, f"middle {r}", tag)
            if self.strategy == "hybrid":
                self.hybrid(plan, i, r, tag)
            keep.append(self.depth(id, position) > r)
        for i, id in enumerate(owners):
            entry = int(np.searchsorted(plan.cu_seqlens, i, side="right")) - 1
            r, past = int(plan.recursions[i]), range(plan.positions[i] + 1)
            if self.strategy == "recursion":
                seen = [self.tag(id, p) for p in past if self.depth(id, p) >= r]
                self.demand(plan, i, entry, r, f"middle {r}", seen)
            elif self.strategy == "shared":
                self.demand(plan, i, entry, 1, "middle 1", [self.tag(id, p) for p in past])
            else:
                seen = [(*self.tag(id, p), r if self.depth(id, p) >= r else 1) for p in past]
                self.demand(plan, i, entry, r, "hybrid", seen)
        return (np.array(keep) if self.options["router"] == "expert" else None), None

    def hybrid(self, plan: Any, i: int, r: int, tag: Any) -> None:
        self.write(r, int(plan.slot_mapping[i]), "hybrid", (*tag, r))
        through = plan.write_through[:, i].tolist()
        cap = self.requests[self.owners(plan)[i]]["max_recursions"] or self.R
        for g, slot in enumerate(through, 2):
            assert (slot < 0) == (r > 1 or g > cap)
            if slot >= 0:
                self.write(g, slot, "hybrid", (*tag, 1))

    def exit(self, plan: Any) -> tuple[Any, Any]:
        owners = self.owners(plan)
        ends = self.options["ends_block_tokens"] > 0
        for i, slot in enumerate(plan.slots.tolist()):
            id, position, r = self.states.pop(slot)
            assert (position, r) == (plan.positions[i], plan.recursions[i])
            assert r == self.depth(id, position)
            assert i >= plan.num_logit_rows or id == owners[i]
            if ends:
                self.write(0, int(plan.slot_mapping[i]), "last", self.tag(id, position))
        for i, id in enumerate(owners if ends else []):
            entry = int(np.searchsorted(plan.cu_seqlens, i, side="right")) - 1
            seen = [self.tag(id, p) for p in range(plan.positions[i] + 1)]
            self.demand(plan, i, entry, 0, "last", seen)
        sampled = []
        for row, id in zip(plan.sample_rows.tolist(), plan.sample_ids.tolist(), strict=True):
            assert plan.positions[row] == len(self.tokens[id]) - 1, "a token was sampled twice"
            sampled.append(self.next_token(self.tokens[id], self.requests[id]["child"]))
            self.tokens[id].append(sampled[-1])
        tokens = np.array(sampled, dtype=np.int64)
        return tokens == EOS, tokens
