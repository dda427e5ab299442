"""A scheduler in plain Python that drives the passes of `PackedModel` in random order."""

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mor.serving.forward import PackedModel, Rows


@dataclass
class Chunk:
    """Tokens of one sequence in flight, of which the active ones are at one recursion."""

    positions: list[int]
    slots: list[int]
    active: list[int] = field(default_factory=list)  # indices that take the next recursion
    recursion: int = 0  # which that is


@dataclass
class Sequence:
    tokens: list[int]
    chunk_sizes: list[int]
    max_recursions: int
    threshold: float
    done: int = 0
    chunk: Chunk | None = None
    blocks: dict = field(default_factory=dict)  # of each group: "ends", 0, 1, ...
    members: dict = field(default_factory=dict)  # positions with keys in each middle group
    logits: dict = field(default_factory=dict)
    depths: list = field(default_factory=list)


class Planner:
    """Runs sequences to their logits, some in flight at any time, each step drawn at random.

    Args:
        packed: the model.
        sequences: what to run.
        all_logits: keep the logits of every token, not of the last of each chunk alone.
        together: take everything that can run in each pass (lock-step); False draws subsets.
        block_size: of the pool.
        num_blocks: of the pool.
    """

    def __init__(
        self,
        packed: PackedModel,
        sequences: list[Sequence],
        *,
        all_logits: bool = True,
        together: bool = False,
        block_size: int = 2,
        num_blocks: int = 512,
        seed: int = 0,
    ) -> None:
        self.packed, self.sequences = packed, sequences
        self.all_logits, self.together = all_logits, together
        self.random = random.Random(seed)
        self.pool = packed.new_pool(num_blocks, block_size)
        self.pool.data.fill_(float("nan"))
        self.free = list(range(num_blocks))
        self.random.shuffle(self.free)
        self.states = packed.new_states(sum(len(s.tokens) for s in sequences))
        self.states.hidden.fill_(float("nan"))
        self.free_slots = list(range(self.states.hidden.shape[0]))
        self.random.shuffle(self.free_slots)
        self.num_mixed = 0  # block passes with rows of several recursions

    def run(self, free: bool = True) -> None:
        """Until every token has gone through; `free`: blocks of finished sequences are reused."""
        self.frees = free
        while unfinished := [s for s in self.sequences if s.done < len(s.tokens)]:
            idle = [s for s in unfinished if s.chunk is None]
            inside = [s for s in unfinished if s.chunk is not None]
            deep = [s for s in inside if s.chunk.active]
            out = [s for s in inside if not s.chunk.active]
            if not self.packed.mixes_recursions and deep:
                step = self.random.choice(deep).chunk.recursion
                deep = [s for s in deep if s.chunk.recursion == step]
            actions = [(self.enter, idle), (self.block, deep), (self.leave, out)]
            actions = [(act, who) for act, who in actions if who]
            act, who = self.random.choice(actions)
            if not self.together:
                who = self.random.sample(who, self.random.randint(1, len(who)))
            act(who)
        assert not free or sorted(self.free) == list(range(self.pool.data.shape[0]))

    def enter(self, sequences: list[Sequence]) -> None:
        tokens = []
        for s in sequences:
            count = min(s.chunk_sizes.pop(0) if s.chunk_sizes else 1, len(s.tokens) - s.done)
            positions = list(range(s.done, s.done + count))
            s.chunk = Chunk(positions, [self.free_slots.pop() for _ in positions])
            tokens += [s.tokens[p] for p in positions]
        who = [(s, i) for s in sequences for i in range(len(s.chunk.positions))]
        rows = self.end_rows(sequences, who)
        result = self.packed.run_enter(torch.tensor(tokens), rows, self.states, self.pool)
        for (s, i), value in zip(who, self.as_list(result, len(who)), strict=True):
            if value:
                s.chunk.active.append(i)
            if self.packed.routing == "token":
                s.depths.append(value)
            else:
                s.depths.append(0)

    def block(self, sequences: list[Sequence]) -> None:
        sequences = sorted(sequences, key=lambda s: s.chunk.recursion)
        self.num_mixed += len({s.chunk.recursion for s in sequences}) > 1
        who = [(s, i) for s in sequences for i in s.chunk.active]
        strategy, steps = self.packed.kv_strategy, self.packed.num_steps
        counts = [0] * steps
        kv_slots, context, starts = [], [], []
        for s, i in who:
            position, r = s.chunk.positions[i], s.chunk.recursion
            counts[r] += 1
            if strategy == "recursion":
                members = s.members.setdefault(r, [])
                members.append(position)
                places = [self.place(s, r, len(members) - 1)]
                context.append(len(members))
                starts.append(sum(p < self.window_start(position) for p in members))
            else:
                groups = [0] if strategy == "shared" else range(steps) if r == 0 else [r]
                places = [self.place(s, g, position) for g in groups]
                if strategy == "shared" and r > 0:
                    places = [-1]
                context.append(position + 1)
                starts.append(self.window_start(position))
            kv_slots.append(places + [-1] * (steps - len(places)))
        kv_slots = torch.tensor(kv_slots).T
        group = (lambda s: 0) if strategy == "shared" else lambda s: s.chunk.recursion
        rows = Rows(
            slots=self.slots(who),
            positions=torch.tensor([s.chunk.positions[i] for s, i in who]),
            slot_mapping=kv_slots[0],
            write_through=kv_slots[1:] if strategy == "hybrid" else None,
            block_table=self.table([s.blocks[group(s)] for s in sequences]),
            context_lens=torch.tensor(context, dtype=torch.int32),
            cu_seqlens=self.ends([len(s.chunk.active) for s in sequences]),
            context_starts=torch.tensor(starts, dtype=torch.int32) if self.packed.window else None,
            thresholds=self.thresholds(who),
            recursions=torch.tensor([s.chunk.recursion + 1 for s, _ in who]),
            recursion_offsets=self.ends(counts).tolist(),
        )
        result = self.packed.run_block(rows, self.states, self.pool)
        values = self.as_list(result, len(who))
        for s in sequences:
            s.chunk.active.clear()
        for (s, i), goes_on in zip(who, values, strict=True):
            at = s.chunk.positions[i]
            if self.packed.routing == "token":
                goes_on = s.depths[at] > s.chunk.recursion + 1
            else:
                s.depths[at] = (s.chunk.recursion + 1) * self.packed.recursions_per_step
                goes_on = self.packed.routing == "expert" and goes_on
                goes_on = goes_on and s.chunk.recursion + 1 < s.max_recursions
            if goes_on:
                s.chunk.active.append(i)
        for s in sequences:
            s.chunk.recursion += 1

    def leave(self, sequences: list[Sequence]) -> None:
        who = [(s, i) for s in sequences for i in range(len(s.chunk.positions))]
        wanted = [(s, i) for s, i in who if self.all_logits or i == len(s.chunk.positions) - 1]
        rest = [(s, i) for s, i in who if not any(s is t and i == j for t, j in wanted)]
        rows = self.end_rows(sequences, wanted + rest, len(wanted))
        logits = self.packed.run_exit(rows, self.states, self.pool)
        for (s, i), row in zip(wanted, logits, strict=True):
            s.logits[s.chunk.positions[i]] = row
        for s in sequences:
            s.done += len(s.chunk.positions)
            self.states.hidden[s.chunk.slots] = float("nan")
            self.free_slots += s.chunk.slots
            s.chunk = None
            if self.frees and s.done == len(s.tokens):
                for blocks in s.blocks.values():
                    self.pool.data[blocks] = float("nan")
                    self.free += blocks
                s.blocks = {}

    def end_rows(self, sequences, who, num_logit_rows: int | None = None) -> Rows:
        """Rows of an ends pass, of which the first attend."""
        has_ends, attending = self.packed.has_ends, who[:num_logit_rows]
        kv_slots = [self.place(s, "ends", s.chunk.positions[i]) if has_ends else -1 for s, i in who]
        at = [s.chunk.positions[i] for s, i in attending]
        starts = torch.tensor([self.window_start(p) for p in at], dtype=torch.int32)
        return Rows(
            slots=self.slots(who),
            positions=torch.tensor([s.chunk.positions[i] for s, i in who]),
            slot_mapping=torch.tensor(kv_slots),
            block_table=self.table([s.blocks.get("ends", [0]) for s in sequences]),
            context_lens=torch.tensor([p + 1 for p in at], dtype=torch.int32),
            cu_seqlens=self.ends([sum(t is s for t, _ in attending) for s in sequences]),
            context_starts=starts if self.packed.window else None,
            thresholds=self.thresholds(who),
            max_recursions=torch.tensor([s.max_recursions for s, _ in who]),
            num_logit_rows=num_logit_rows,
        )

    def window_start(self, position: int) -> int:
        """First position that a row sees in windowed layers."""
        return max(0, position + 1 - self.packed.window) if self.packed.window else 0

    def thresholds(self, who) -> Tensor:
        return torch.tensor([s.threshold for s, _ in who])

    def place(self, s: Sequence, group, index: int) -> int:
        """Slot of the index-th key of a group, in a new block where the last one is full."""
        size = self.pool.end_block_size if group == "ends" else self.pool.block_size
        blocks = s.blocks.setdefault(group, [])
        while len(blocks) <= index // size:
            blocks.append(self.free.pop())
        return blocks[index // size] * size + index % size

    def slots(self, who) -> Tensor:
        return torch.tensor([s.chunk.slots[i] for s, i in who])

    def table(self, blocks: list[list[int]]) -> Tensor:
        longest = max(map(len, blocks))
        padded = [b + [-1] * (longest - len(b)) for b in blocks]
        return torch.tensor(padded, dtype=torch.int32)

    def ends(self, lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

    def as_list(self, result: Tensor | None, count: int) -> list:
        return [1] * count if result is None else result.tolist()
