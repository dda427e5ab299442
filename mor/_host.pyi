"""Host-side classes of mor, free of tensors: compiled from csrc/host."""

from collections.abc import Sequence
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

def compiler() -> str:
    """Name and version of the C++ compiler that built this module."""

class SequenceState(TypedDict):
    """Where a sequence stands; groups are E, 1 .. R."""

    state: Literal["waiting", "enter", "block", "exit"]
    tokens: list[int]
    done: int  # positions that ran the last layer
    counts: list[int]  # tokens appended to each group
    depths: list[int]  # of the positions done
    blocks: list[list[int]]  # block table of each group

class Stats:
    """Counters of a scheduler since it was made, and its state now."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def blocks_free(self) -> int:
        """Those that can be taken, cached ones among them."""
    @property
    def blocks_cached(self) -> int:
        """Free blocks that hold a prefix."""
    @property
    def block_passes(self) -> int: ...
    @property
    def ends_passes(self) -> int:
        """Exit passes, each with the enter pass after it, and enter passes alone."""
    @property
    def block_rows(self) -> int: ...
    @property
    def exit_rows(self) -> int: ...
    @property
    def enter_rows(self) -> int: ...
    @property
    def sampled_tokens(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def prefix_tokens(self) -> int:
        """Tokens of the sequences that were admitted."""
    @property
    def prefix_hit_tokens(self) -> int:
        """Of these, those that were found in the prefix cache."""
    @property
    def exit_depths(self) -> list[int]:
        """Rows by the number of recursions they took, 0 .. R."""
    @property
    def growth_ratio(self) -> float:
        """Share of max_tokens that admission expects running sequences to use."""

class Plan:
    """One pass; csrc/host/plan.h is its contract. Arrays are views that keep the plan alive.

    N rows, B entries (sequences), S tokens to sample, R recursions. Arrays that a kind of pass has
    no use for are empty.
    """

    @property
    def kind(self) -> Literal["idle", "enter", "block", "exit"]: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def num_entries(self) -> int: ...
    @property
    def num_logit_rows(self) -> int:
        """exit: the first rows, which need all of the last layer and the head."""
    @property
    def expected_seconds(self) -> float:
        """By the curves; 0 without them."""
    @property
    def ids(self) -> NDArray[np.int64]:
        """[B] sequence of each entry."""
    @property
    def slots(self) -> NDArray[np.int64]:
        """[N] place of each row in the pool of states, below `num_slots`."""
    @property
    def positions(self) -> NDArray[np.int64]:
        """[N]."""
    @property
    def tokens(self) -> NDArray[np.int64]:
        """[N] (enter) tokens to embed."""
    @property
    def slot_mapping(self) -> NDArray[np.int64]:
        """[N] for `kv_append`, in blocks of the row's group; negative: nothing is appended."""
    @property
    def write_through(self) -> NDArray[np.int64]:
        """[R - 1, N] (block, hybrid) the same for groups 2 .. R."""
    @property
    def recursions(self) -> NDArray[np.int32]:
        """[N] block: the recursion each row takes; exit: the recursions it took."""
    @property
    def recursion_offsets(self) -> NDArray[np.int32]:
        """[R + 1] (block) rows at recursion r are offsets[r - 1] .. offsets[r] - 1."""
    @property
    def thresholds(self) -> NDArray[np.float32]:
        """[N] (enter, block) exit threshold of each row's request."""
    @property
    def cu_seqlens(self) -> NDArray[np.int32]:
        """[B + 1] rows of the entries."""
    @property
    def block_table(self) -> NDArray[np.int32]:
        """[B, max_blocks], -1 after the blocks of an entry."""
    @property
    def context_lens(self) -> NDArray[np.int32]:
        """[N] (exit: [num_logit_rows]) keys that each row sees, its own among them."""
    @property
    def context_starts(self) -> NDArray[np.int32]:
        """As context_lens, with a window: the keys before are out of it."""
    @property
    def sample_rows(self) -> NDArray[np.int64]:
        """[S] (exit) rows whose logits give a token; a row with n children stands n times."""
    @property
    def sample_ids(self) -> NDArray[np.int64]:
        """[S] the sequences that the tokens are for."""
    @property
    def copy_sources(self) -> NDArray[np.int64]:
        """[C] blocks to copy before the pass: read all of them, then write."""
    @property
    def copy_destinations(self) -> NDArray[np.int64]:
        """[C]."""
    @property
    def fresh_blocks(self) -> NDArray[np.int64]:
        """Blocks whose contents are undefined after the copies: poison them in tests."""

class Scheduler:
    """Decides which rows run next and where their keys and values lie; csrc/host/scheduler.h.

    Calls alternate `plan` and `report`; `add` and `abort` may come at any time. There is no clock:
    `now` is in seconds and must not decrease. Wrong arguments raise ValueError and change nothing.

    Args:
        num_blocks: blocks of the pool. The same bytes serve every group.
        block_size: tokens in a block of a middle group, and in a node of the prefix cache.
        ends_block_tokens: tokens in a block of group E (first and last layer): block_size times the
            layers of the shared block / 2; 0 if the model has no such layers.
        num_recursions: R; 1 for a dense model, whose middle layers are one recursion.
        router: who says that a row leaves: "expert" after each pass, "token" as it enters, "none".
        kv_strategy: which keys recursion r sees: "recursion", "shared" or "hybrid".
        max_rows: sequences that run at once, n of them for a request of n.
        chunk: prompt rows in flight at once, at most; beside sequences that decode, no more than
            at most double their block pass by its curve. The pool of states has max_rows + chunk
            slots.
        policy: "auto" (needs both curves), "lock-step", or the share of rows that must wait before
            the ends run.
        max_wait: block passes that an exited row waits at most; R if None.
        block_seconds, ends_seconds: measured (rows, seconds) of a block pass and of the ends.
        aging_s: a waiting request rises by one priority in this time.
        watermark: share of the blocks that admission leaves free.
        growth_ratio: share of max_tokens that admission expects sequences to use, at the start; it
            rises with each preemption and decays to 0.1.
        prefix_cache: whether prefixes are found and kept.
        window: positions that sliding attention sees, its own among them.
        hash_bits: of the prefix cache; fewer than 64 in tests of collisions.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int = 16,
        ends_block_tokens: int = 0,
        num_recursions: int = 1,
        router: Literal["expert", "token", "none"] = "none",
        kv_strategy: Literal["recursion", "shared", "hybrid"] = "recursion",
        max_rows: int = 64,
        chunk: int = 128,
        policy: Literal["auto", "lock-step"] | float = "auto",
        max_wait: int | None = None,
        block_seconds: Sequence[tuple[float, float]] = (),
        ends_seconds: Sequence[tuple[float, float]] = (),
        aging_s: float = 10.0,
        watermark: float = 0.01,
        growth_ratio: float = 0.5,
        prefix_cache: bool = True,
        window: int | None = None,
        hash_bits: int = 64,
    ) -> None: ...
    def add(
        self,
        tokens: Sequence[int] | NDArray[np.integer],
        *,
        max_tokens: int,
        now: float,
        priority: int = 0,
        deadline: float | None = None,
        n: int = 1,
        max_recursions: int | None = None,
        threshold: float = 0.0,
        tenant: int = 0,
        prefix_cache: bool = True,
        prompt_logits: bool = False,
    ) -> int:
        """Queues a request.

        Args:
            tokens: the prompt, at least one token.
            max_tokens: tokens to sample at most; 0 computes the prompt only.
            now: the time.
            priority: higher is served first, and preempted last.
            deadline: time at which the request ends unfinished.
            n: sequences that go on from the prompt, admitted together.
            max_recursions: recursions that its rows take at most; R if None.
            threshold: handed back with each row.
            tenant: requests share cached prefixes only with equal tenants.
            prefix_cache: False neither uses nor fills the cache.
            prompt_logits: logits of all rows are needed, so a cached prefix is of no use.

        Returns:
            The id of its first sequence; the others follow.

        Raises:
            ValueError: a request that could not run even alone, or wrong arguments.
        """
    def abort(self, id: int) -> bool:
        """Ends a sequence; False if there is none. One in flight ends when it is reported.

        A request with n > 1 is the one sequence `id` until its prompt is computed: aborting it
        ends all n.
        """
    def plan(self, now: float) -> Plan:
        """Plans the next pass; "idle" if there is nothing to do, which is not reported."""
    def report(
        self,
        decisions: NDArray[np.uint8] | NDArray[np.bool_] | None = None,
        tokens: NDArray[np.int64] | None = None,
    ) -> None:
        """Results of the pass in flight.

        Args:
            decisions: [N] bytes. Expert-choice, enter and block: whether the row takes the next
                recursion (None: all do; rows at their max_recursions leave anyway). Token-choice,
                enter: the row's depth. Exit, [S]: whether the sequence ends with its token.
            tokens: [S] (exit) tokens sampled.
        """
    def take_finished(self) -> list[tuple[int, Literal["stop", "length", "abort", "deadline"]]]:
        """Sequences that ended since the last call."""
    @property
    def num_slots(self) -> int:
        """Size of the pool of states, max_rows + chunk: no slot is at or above it."""
    @property
    def has_work(self) -> bool: ...
    @property
    def in_flight(self) -> bool: ...
    def stats(self) -> Stats: ...
    def describe(self, id: int) -> SequenceState | None:
        """A sequence's state, for tests and debugging; None if it has ended."""
    def check(self) -> None:
        """Raises RuntimeError unless every block, slot, row and queue is accounted for."""
