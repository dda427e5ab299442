"""The scheduler's rules in plain Python: lists where csrc/host has linked lists and hashes.

Written from the contract in csrc/host/scheduler.h, to be read and to be compared with: equal calls
must give equal plans, down to the numbers of the blocks. One file, so that a rule is found.
"""

import math
from dataclasses import dataclass, field
from typing import Any

WAITING, ENTER, BLOCK, EXIT = "waiting", "enter", "block", "exit"


@dataclass(eq=False)
class Node:
    parent: "Node | None"
    key: Any
    depths: list[int]
    counts: list[int]
    blocks: list[list[int]]
    level: int
    children: list["Node"] = field(default_factory=list)
    alive: bool = True


@dataclass(eq=False)
class Seq:
    id: int
    tokens: list[int]
    max_tokens: int
    priority: int
    deadline: float
    n: int
    cap: int
    salt: Any
    use_cache: bool
    all_logits: bool
    arrival: float
    groups: int
    prompt: int = 0
    state: str = WAITING
    aborted: bool = False

    def __post_init__(self) -> None:
        self.prompt = self.prompt or len(self.tokens)
        self.restart()

    def restart(self) -> None:
        self.done, self.depths, self.counts = 0, [], [0] * self.groups
        self.tables: list[list[int]] = [[] for _ in range(self.groups)]
        self.node: Node | None = None
        self.node_end, self.on_tree = 0, True
        self.fork_blocks: list[int] = []
        self.end_chunk()

    def end_chunk(self) -> None:
        self.rows: list[list[int]] = []  # slot, depth, target of each row in flight
        self.is_prompt, self.r, self.active, self.waited = False, 0, [], 0

    @property
    def remaining(self) -> int:
        return len(self.tokens) - self.done


class Model:
    def __init__(self, **o: Any) -> None:
        self.o, self.R = o, o["num_recursions"]
        middle = [o["block_size"]] * self.R
        if o["kv_strategy"] == "shared":
            middle[1:] = [0] * (self.R - 1)
        self.t = [o["ends_block_tokens"], *middle]
        self.free = list(range(o["num_blocks"]))
        self.refs, self.level = [0] * o["num_blocks"], [0] * o["num_blocks"]
        self.named: list[list[Node]] = [[] for _ in self.free]
        self.tree: dict[Any, Node] = {}
        self.slots = list(reversed(range(o["max_rows"] + o["chunk"])))
        self.seqs: dict[int, Seq] = {}
        self.next_id, self.time, self.ratio = 0, 0.0, o["growth_ratio"]
        self.recent = [0] * (self.R + 1)
        self.preempted = self.enter_next = False
        self.passed: list[Seq] = []
        self.kind = "idle"
        self.copies: list[tuple[int, int, int]] = []
        self.fresh: list[int] = []
        self.finished: list[tuple[int, str]] = []
        self.preemptions: list[int] = []

    # Blocks and prefixes ---------------------------------------------------------------------
    def take(self) -> int:
        while self.named[self.free[0]]:
            self.forget(self.named[self.free[0]][0])
        block = self.free.pop(0)
        self.refs[block] = 1
        self.fresh.append(block)
        return block

    def hold(self, block: int) -> None:
        if self.refs[block] == 0:
            self.free.remove(block)
        self.refs[block] += 1

    def release(self, block: int) -> None:
        self.refs[block] -= 1
        if self.refs[block] == 0:
            self.free.insert(len(self.free) if self.named[block] else 0, block)

    def forget(self, node: Node) -> None:
        for child in list(node.children):
            self.forget(child)
        node.alive = False
        for block in (b for blocks in node.blocks for b in blocks):
            self.named[block].remove(node)
            if not self.named[block]:
                self.level[block] = 0
                if self.refs[block] == 0:  # caches nothing any more: reused first
                    self.free.remove(block)
                    self.free.insert(0, block)
        if node.parent:
            node.parent.children.remove(node)
        del self.tree[node.key]

    def release_all(self, s: Seq) -> None:
        blocks = [b for table in s.tables for b in reversed(table)]
        for block in sorted(blocks, key=lambda b: -self.level[b]):
            self.release(block)
        s.tables = [[] for _ in self.t]

    def key(self, s: Seq, parent: Node | None, start: int) -> Any:
        return parent and id(parent), s.salt, tuple(s.tokens[start : start + self.o["block_size"]])

    def lookup(self, s: Seq) -> Node | None:
        node, size = None, self.o["block_size"]
        if self.o["prefix_cache"] and s.use_cache and not s.all_logits:
            for start in range(0, len(s.tokens) - size, size):
                found = self.tree.get(self.key(s, node, start))
                if found is None:
                    break
                node = found
        return node

    def prefix(self, node: Node) -> tuple[list[list[int]], list[int]]:
        """Block tables and depths of all tokens up to the node."""
        tables: list[list[int]]
        tables, depths = self.prefix(node.parent) if node.parent else ([[] for _ in self.t], [])
        before = node.parent.counts if node.parent else [0] * len(self.t)
        for g, t in enumerate(self.t):
            if t:
                tables[g] = tables[g][: before[g] // t] + node.blocks[g]
        return tables, depths + node.depths

    def appended(self, s: Seq, r: int) -> list[int]:
        if self.o["kv_strategy"] == "recursion":
            return [r]
        if r > 1:
            return []
        return list(range(1, s.cap + 1)) if self.o["kv_strategy"] == "hybrid" else [1]

    def remember(self, s: Seq) -> None:
        """Gives the tree what was computed, in whole nodes."""
        size = self.o["block_size"]
        if not (self.o["prefix_cache"] and s.use_cache and s.on_tree) or s.node_end + size > s.done:
            return
        if s.node and not s.node.alive:
            s.node, s.node_end = None, 0
        counts = list(s.node.counts) if s.node else [0] * len(self.t)
        while s.node_end + size <= s.done:
            before, depths = list(counts), s.depths[s.node_end : s.node_end + size]
            counts[0] += size
            for depth in depths:
                for g in (g for r in range(1, depth + 1) for g in self.appended(s, r)):
                    counts[g] += 1
            key = self.key(s, s.node, s.node_end)
            node = self.tree.get(key)
            if node is None:
                blocks = [
                    s.tables[g][before[g] // t : -(-counts[g] // t)] if t else []
                    for g, t in enumerate(self.t)
                ]
                level = s.node.level + 1 if s.node else 1
                node = Node(s.node, key, depths, list(counts), blocks, level)
                self.tree[key] = node
                if s.node:
                    s.node.children.append(node)
                for block in (b for table in blocks for b in table):
                    if not self.named[block]:
                        self.level[block] = level
                    self.named[block].append(node)
            elif node.depths != depths:
                s.on_tree = False
                return
            s.node, s.node_end = node, s.node_end + size

    # Requests --------------------------------------------------------------------------------
    def add(self, tokens: list[int], *, max_tokens: int, now: float, priority: int, n: int,
            deadline: float | None, max_recursions: int | None, threshold: float, tenant: int,
            prefix_cache: bool, prompt_logits: bool) -> int:  # fmt: skip
        self.time, first = now, self.next_id
        cap = max_recursions or self.R
        deadline = math.inf if deadline is None else deadline
        salt = (tenant, threshold, cap)
        self.seqs[first] = Seq(
            first, list(tokens), max_tokens, priority, deadline, n, cap, salt, prefix_cache,
            prompt_logits, now, len(self.t),
        )  # fmt: skip
        self.next_id += n
        return first

    def abort(self, id: int) -> bool:
        s = self.seqs.get(id)
        if s is None or s.aborted:
            return False
        if self.kind != "idle" and s in self.passed:
            s.aborted = True
        else:
            self.finish(s, "abort")
        return True

    def finish(self, s: Seq, reason: str) -> None:
        self.finished += [(s.id + k, reason) for k in range(s.n)]
        self.clear(s)
        del self.seqs[s.id]

    def clear(self, s: Seq) -> None:
        self.slots += [row[0] for row in s.rows]
        for block in s.fork_blocks:
            self.release(block)
        self.copies = [copy for copy in self.copies if copy[0] != s.id]
        self.release_all(s)
        s.restart()

    @property
    def running(self) -> list[Seq]:
        return sorted((s for s in self.seqs.values() if s.state != WAITING), key=lambda s: s.id)

    # Admission -------------------------------------------------------------------------------
    def head(self) -> Seq | None:
        def rank(s: Seq) -> tuple[int, int]:
            return -s.priority - math.floor((self.time - s.arrival) / self.o["aging_s"]), s.id

        return min((s for s in self.seqs.values() if s.state == WAITING), key=rank, default=None)

    def by_ranks(self) -> bool:
        return self.o["kv_strategy"] == "recursion" and self.o["router"] != "none"

    def blocks_for(self, s: Seq, counts: list[int]) -> int:
        total, blocks = sum(self.recent), 0
        for g, t in enumerate(self.t[: s.cap + 1]):
            tokens = len(s.tokens)
            if g and self.by_ranks():
                tokens = -(-tokens * (sum(self.recent[g:]) + 64) // (total + 64))
            blocks += -(-max(tokens, counts[g]) // t) + s.n - 1 if t else 0
        return blocks

    def growth(self, s: Seq) -> float:
        deepest, total = s.cap, sum(self.recent)
        if self.by_ranks() and total >= 100:
            shallow = (d for d in range(s.cap) if 100 * sum(self.recent[: d + 1]) >= 99 * total)
            deepest = next(shallow, s.cap)
        per_token = 0.0
        for t in self.t[: deepest + 1]:
            per_token += 1.0 / t if t else 0
        return (s.max_tokens - len(s.tokens) + s.prompt) * s.n * self.ratio * per_token

    def fits(self, s: Seq, counts: list[int], held: int, pinned: int) -> bool:
        need, available = self.blocks_for(s, counts) - held, len(self.free) - pinned
        if not self.running:
            return need <= available or pinned == 0
        promised, grown = need + math.ceil(self.o["watermark"] * len(self.refs)), 0.0
        for other in self.running:
            have = sum(map(len, other.tables))
            promised += max(0, self.blocks_for(other, other.counts) - have)
            grown += self.growth(other)
        return promised + (grown + self.growth(s)) <= available

    def admit(self, s: Seq) -> bool:
        node = self.lookup(s)
        if node:
            tables, depths = self.prefix(node)
            whole = [node.counts[g] // t if t else 0 for g, t in enumerate(self.t)]
            shared = [b for g, table in enumerate(tables) for b in table[: whole[g]]]
            tails = [(g, b) for g, table in enumerate(tables) for b in table[whole[g] :]]
            held = sum(self.refs[b] > 0 for b in shared)
            pinned = sum(self.refs[b] == 0 for _, b in tails)
            if not self.fits(s, node.counts, held, pinned):
                node = None
        if not node and not self.fits(s, s.counts, 0, 0):
            return False
        s.state = ENTER
        if node:
            s.counts, s.depths, s.done = list(node.counts), depths, len(depths)
            s.node, s.node_end = node, len(depths)
            for b in shared + [b for _, b in tails]:
                self.hold(b)
            s.tables = [table[: whole[g]] for g, table in enumerate(tables)]
            for g, source in tails:
                s.tables[g].append(self.take())
                self.copies.append((s.id, source, s.tables[g][-1]))
            for _, source in tails:
                self.release(source)
        return True

    def make_room(self, s: Seq, blocks: int) -> bool:
        while len(self.free) < blocks:
            victim = min(self.running[1:], key=lambda v: (v.priority, -v.id))
            self.clear(victim)
            victim.state, self.preempted = WAITING, True
            self.preemptions.append(victim.id)
            self.ratio = min(1.0, self.ratio + 0.2)
            if victim is s:
                return False
        return True

    def reserve(self, s: Seq, groups: list[int], tokens: int) -> bool:
        missing = [
            g
            for g in groups
            for _ in range(-(-tokens // self.t[g]) - len(s.tables[g]) if self.t[g] else 0)
        ]
        if not self.make_room(s, len(missing)):
            return False
        for g in missing:
            s.tables[g].append(self.take())
        return True

    # Passes ----------------------------------------------------------------------------------
    def plan(self, now: float) -> dict[str, Any]:
        self.time, plan = now, None
        for s in sorted(self.seqs.values(), key=lambda s: (s.deadline, s.id)):
            if s.deadline <= now:
                self.finish(s, "deadline")
        while plan is None:
            plan = self.choose()
        copies = [(a, b) for _, a, b in self.copies if a != b]
        plan["copy_sources"] = [a for a, _ in copies]
        plan["copy_destinations"] = [b for _, b in copies]
        plan["fresh_blocks"] = [b for b in self.fresh if b not in plan["copy_destinations"]]
        self.copies, self.fresh, self.kind = [], [], plan["kind"]
        return plan

    def choose(self) -> dict[str, Any] | None:
        if self.enter_next:
            self.enter_next = False
            if plan := self.plan_enter():
                return plan
        active = sum(len(s.active) for s in self.running if s.state == BLOCK)
        exiting = sum(len(s.rows) for s in self.running if s.state == EXIT)
        ends = active == 0 or self.ends_are_due(active, exiting + self.enterable())
        if ends and exiting:
            return self.plan_exit()
        if ends and (plan := self.plan_enter()):
            return plan
        if active:
            return self.plan_block()
        return None if self.seqs else {"kind": "idle"}

    def ends_are_due(self, active: int, waiting: int) -> bool:
        if waiting == 0:
            return False
        block, ends = self.o["block_curve"], self.o["ends_curve"]
        for s in self.running:
            if s.state == EXIT and s.waited >= (self.o["max_wait"] or self.R):
                return True
            if s.state == EXIT and self.time + block(active) + ends(waiting) > s.deadline:
                return True
        if self.o["policy"] != "auto":
            theta = 1.0 if self.o["policy"] == "lock-step" else self.o["policy"]
            return waiting >= theta * (active + waiting)
        later = waiting + self.leaving()
        saved = waiting * (ends(waiting) / waiting - ends(later) / later)
        lost = active * (block(active) / active - block(active + waiting) / (active + waiting))
        return not saved > lost

    def leaving(self) -> float:
        """Active rows that are expected to leave in the next block pass."""
        rows = 0.0
        for s in self.running:
            if s.state == BLOCK and s.r == s.cap:
                rows += len(s.active)
            elif s.state == BLOCK and self.o["router"] == "expert":
                deeper = sum(self.recent[s.r :])
                rows += len(s.active) * (self.recent[s.r] / deeper if deeper else 1.0)
            elif s.state == BLOCK and self.o["router"] == "token":
                rows += sum(s.rows[i][2] == s.r for i in s.active)
        return rows

    def budget(self) -> int:
        """Prompt rows that may join those in flight."""
        decoding, most = sum(s.remaining == 1 for s in self.running), self.o["chunk"]
        if decoding:
            fits = 2 * self.o["block_curve"](decoding)
            while most > 1 and self.o["block_curve"](decoding + most) > fits:
                most -= 1
        return max(0, most - sum(len(s.rows) for s in self.running if s.is_prompt))

    def enterable(self) -> int:
        rows, budget, candidates = 0, self.budget(), [s for s in self.running if s.state == ENTER]
        head = self.head()
        if (
            head
            and not self.preempted
            and self.has_place(head)
            and self.fits(head, head.counts, 0, 0)
        ):
            candidates.append(head)
        for s in candidates:
            its_rows = 1 if s.remaining == 1 else min(s.remaining, budget)
            budget -= its_rows if s.remaining > 1 else 0
            rows += its_rows
        return rows

    def has_place(self, s: Seq) -> bool:
        return sum(r.n for r in self.running) + s.n <= self.o["max_rows"]

    def begin_chunk(self, s: Seq) -> None:
        rows = 1 if s.remaining == 1 else min(s.remaining, self.budget())
        if rows and self.reserve(s, [0], s.done + rows):
            s.is_prompt = s.remaining > 1
            s.rows = [[self.slots.pop(), 0, 0] for _ in range(rows)]

    def plan_enter(self) -> dict[str, Any] | None:
        closed, self.preempted = self.preempted and bool(self.running), False
        for s in self.running:
            if s.state == ENTER:
                self.begin_chunk(s)
        while not closed and not self.preempted and (head := self.head()):
            if not self.has_place(head) or not (head.remaining == 1 or self.budget()):
                break
            if not self.admit(head):
                break
            self.begin_chunk(head)
        self.preempted = False
        self.passed = [s for s in self.running if s.state == ENTER and s.rows]
        if not self.passed:
            return None
        rows = [(s, s.done + i, 0, s.done + i) for s in self.passed for i in range(len(s.rows))]
        plan = self.arrays("enter", self.passed, rows, len(rows))
        return {**plan, "tokens": [s.tokens[p] for s, p, _, _ in rows]}

    def plan_block(self) -> dict[str, Any] | None:
        for s in self.running:
            groups = self.appended(s, s.r)
            if s.state == BLOCK and groups:
                self.reserve(s, groups, s.counts[groups[0]] + len(s.active))
        self.passed = sorted((s for s in self.running if s.state == BLOCK), key=lambda s: s.r)
        if not self.passed:
            return None
        shared, ranks = self.o["kv_strategy"] == "shared", self.o["kv_strategy"] == "recursion"
        rows = [
            (s, s.done + i, 1 if shared else s.r, s.counts[s.r] + k if ranks else s.done + i)
            for s in self.passed
            for k, i in enumerate(s.active)
        ]
        plan = self.arrays("block", self.passed, rows, len(rows))
        plan["recursions"] = [s.r for s, *_ in rows]
        if shared:
            plan["slot_mapping"] = [
                m if s.r == 1 else -1 for m, (s, *_) in zip(plan["slot_mapping"], rows, strict=True)
            ]
        if self.o["kv_strategy"] == "hybrid":
            plan["write_through"] = [
                [self.place(s, g, p) if s.r == 1 and g <= s.cap else -1 for s, p, _, _ in rows]
                for g in range(2, self.R + 1)
            ]
        return plan

    def plan_exit(self) -> dict[str, Any] | None:
        for s in self.running:
            if s.state == EXIT and s.n > 1 and len(s.rows) == s.remaining:
                tails = sum(1 for g, t in enumerate(self.t) if t and s.counts[g] % t)
                if self.make_room(s, tails * (s.n - 1)):
                    s.fork_blocks = [self.take() for _ in range(tails * (s.n - 1))]
        self.passed = [s for s in self.running if s.state == EXIT]
        if not self.passed:
            return None
        full, partial, entries, samples = [], [], [], []
        for s in self.passed:
            ends = len(s.rows) == s.remaining and s.max_tokens > 0
            first = 0 if s.all_logits else len(s.rows) - ends
            rows = [(s, s.done + i, 0, s.done + i) for i in range(len(s.rows))]
            full, partial = full + rows[first:], partial + rows[:first]
            entries += [s] if rows[first:] else []
            samples += [(len(full) - 1, s.id + k) for k in range(s.n)] if ends else []
        plan = self.arrays("exit", entries, full + partial, len(full))
        plan["recursions"] = [s.rows[p - s.done][1] for s, p, _, _ in full + partial]
        plan["sample_rows"] = [row for row, _ in samples]
        return {**plan, "sample_ids": [id for _, id in samples]}

    def place(self, s: Seq, g: int, i: int) -> int:
        return s.tables[g][i // self.t[g]] * self.t[g] + i % self.t[g] if self.t[g] else -1

    def arrays(self, kind: str, entries: list[Seq], rows: list[Any], attend: int) -> dict[str, Any]:
        """Rows are (sequence, position, group, place in the group); the first `attend` attend."""
        cu, groups, starts = [0], {}, []
        for s, p, g, _i in rows[:attend]:
            groups[s.id] = g
            first = max(0, p - (self.o["window"] or 0) + 1)
            if g and self.o["kv_strategy"] == "recursion":
                depths = s.depths + [
                    s.r if k in s.active else row[1] for k, row in enumerate(s.rows)
                ]
                first = sum(1 for d in depths[:first] if d >= g)
            starts.append(first)
        for s in entries:
            cu.append(cu[-1] + sum(row[0] is s for row in rows[:attend]))
        tables = [s.tables[groups[s.id]] for s in entries]
        longest = max(map(len, tables), default=0)
        return {
            "kind": kind,
            "ids": [s.id for s in entries],
            "slots": [s.rows[p - s.done][0] for s, p, _, _ in rows],
            "positions": [p for _, p, _, _ in rows],
            "slot_mapping": [self.place(s, g, i) for s, _, g, i in rows],
            "context_lens": [i + 1 for _, _, _, i in rows[:attend]],
            "context_starts": starts if self.o["window"] else [],
            "cu_seqlens": cu,
            "block_table": [table + [-1] * (longest - len(table)) for table in tables],
        }

    # Reports ---------------------------------------------------------------------------------
    def report(self, decisions: list[int] | None, tokens: list[int] | None) -> None:
        kind, self.kind = self.kind, "idle"
        passed = list(self.passed)
        if kind == "enter":
            self.report_enter(decisions)
        elif kind == "block":
            self.report_block(decisions)
        else:
            self.report_exit(decisions, tokens or [])
        for s in passed:
            if s.aborted and s.id in self.seqs:
                self.finish(s, "abort")

    def report_enter(self, decisions: list[int] | None) -> None:
        given = iter(decisions or [])
        for s in self.passed:
            s.counts[0], s.r = s.counts[0] + len(s.rows), 1
            for row in s.rows:
                row[2] = min(next(given), s.cap) if decisions is not None else s.cap
                if self.o["router"] == "expert" and row[2]:
                    row[2] = s.cap
            s.active = [i for i, row in enumerate(s.rows) if row[2]]
            s.state = BLOCK if s.active else EXIT

    def report_block(self, decisions: list[int] | None) -> None:
        for s in self.running:
            s.waited += s.state == EXIT
        keep = iter(decisions or [])
        for s in self.passed:
            for g in self.appended(s, s.r):
                s.counts[g] += len(s.active)
            stay = []
            for i in s.active:
                s.rows[i][1] = s.r
                if (decisions is None or next(keep)) and s.r < s.rows[i][2]:
                    stay.append(i)
            s.active, s.r = stay, s.r + 1
            s.state = BLOCK if stay else EXIT

    def report_exit(self, stops: list[int] | None, tokens: list[int]) -> None:
        self.ratio, self.enter_next = max(min(0.1, self.o["growth_ratio"]), self.ratio * 0.99), True
        samples = list(zip(tokens, stops or [0] * len(tokens), strict=True))
        for s in self.passed:
            ends = len(s.rows) == s.remaining
            for _, depth, _ in s.rows:
                self.recent[depth] += 1
            if sum(self.recent) >= 1 << 16:
                self.recent = [count // 2 for count in self.recent]
            s.depths += [row[1] for row in s.rows]
            s.done, s.state = s.done + len(s.rows), ENTER
            self.slots += [row[0] for row in s.rows]
            s.end_chunk()
            self.remember(s)
            if not ends:
                continue
            mine = [samples.pop(0) for _ in range(s.n)] if s.max_tokens else [(None, 0)]
            if s.aborted:
                continue
            for k, (token, stop) in enumerate(mine[1:], 1):
                self.sampled(self.child(s, k), token, stop)
            s.n, s.fork_blocks = 1, []
            self.sampled(s, *mine[0])

    def child(self, s: Seq, k: int) -> Seq:
        child = Seq(
            s.id + k, list(s.tokens), s.max_tokens, s.priority, s.deadline, 1, s.cap, s.salt,
            s.use_cache, s.all_logits, s.arrival, s.groups, s.prompt, ENTER,
        )  # fmt: skip
        child.done, child.depths, child.counts = s.done, list(s.depths), list(s.counts)
        child.node, child.node_end, child.on_tree = s.node, s.node_end, s.on_tree
        for g, t in enumerate(self.t):
            if t:
                child.tables[g] = s.tables[g][: s.counts[g] // t]
                for block in child.tables[g]:
                    self.hold(block)
                if s.counts[g] % t:
                    child.tables[g].append(s.fork_blocks.pop(0))
                    self.copies.append((child.id, s.tables[g][-1], child.tables[g][-1]))
        self.seqs[child.id] = child
        return child

    def sampled(self, s: Seq, token: int | None, stop: int) -> None:
        s.tokens += [] if token is None else [token]
        if stop:
            self.finish(s, "stop")
        elif len(s.tokens) - s.prompt >= s.max_tokens:
            self.finish(s, "length")
