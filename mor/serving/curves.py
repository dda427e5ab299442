"""How long passes take by their rows: what the scheduler decides by, and what simulates it."""

import statistics
import time
from collections.abc import Callable

import torch

from mor.serving.forward import PackedModel, Rows
from mor.serving.memory import KVPool, States

__all__ = ["measure_curves"]

_REPEATS = 3


def measure_curves(
    packed: PackedModel, pool: KVPool, states: States, max_rows: int, context: int = 1
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of a block pass ("block"), an enter pass ("enter"), and of an exit and it ("ends").

    At powers of two and the most rows, the median of three passes. By default rows have no context,
    so attention over it comes on top, in all alike.

    Args:
        packed: the model.
        pool: of keys and values; its contents are lost.
        states: of the rows; their contents are lost.
        max_rows: the most rows to measure.
        context: keys that each row sees, its own among them. Rows share blocks where the pool is
            too small for blocks of their own.

    Returns:
        (rows, seconds) by kind of pass, in order of rows.
    """
    most = min(max_rows, pool.data.shape[0], states.hidden.shape[0])
    sizes = [2**k for k in range(most.bit_length()) if 2**k < most] + [most]
    states.hidden.zero_()
    curves: dict[str, list[tuple[float, float]]] = {"block": [], "enter": [], "ends": []}
    for count in sizes:
        tokens = torch.zeros(count, dtype=torch.int64, device=packed.device)
        ends, middle = (
            _rows(packed, count, size, steps, context, pool.data.shape[0])
            for size, steps in ((pool.end_block_size, 0), (pool.block_size, packed.num_steps))
        )

        def run_enter(ends: Rows = ends, tokens: torch.Tensor = tokens) -> None:
            packed.run_enter(tokens, ends, states, pool)

        def run_ends(ends: Rows = ends, tokens: torch.Tensor = tokens) -> None:
            packed.run_exit(ends, states, pool)
            packed.run_enter(tokens, ends, states, pool)

        def run_block(middle: Rows = middle) -> None:
            packed.run_block(middle, states, pool)

        for kind, run in (("enter", run_enter), ("ends", run_ends), ("block", run_block)):
            run()
            curves[kind].append((count, statistics.median(_seconds(run) for _ in range(_REPEATS))))
    return curves


def _rows(
    packed: PackedModel,
    count: int,
    block_size: int,
    num_steps: int,
    context: int,
    num_blocks: int,
) -> Rows:
    """The last token of sequences of `context` tokens, at the first recursion."""

    def integers(values: torch.Tensor, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return values.to(packed.device, dtype)

    each, last = torch.arange(count), context - 1
    table = torch.arange(count * (last // block_size + 1)).view(count, -1) % num_blocks
    windowed = packed.window is not None
    starts = torch.full_like(each, max(0, context - (packed.window or context)))
    return Rows(
        slots=integers(each),
        positions=integers(torch.full_like(each, last)),
        slot_mapping=integers(table[:, -1] * block_size + last % block_size),
        block_table=integers(table, torch.int32),
        context_lens=integers(torch.full_like(each, context), torch.int32),
        cu_seqlens=integers(torch.arange(count + 1), torch.int32),
        context_starts=integers(starts, torch.int32) if windowed else None,
        recursions=integers(torch.ones(count)) if num_steps else None,
        recursion_offsets=[0] + [count] * num_steps if num_steps else (),
    )


def _seconds(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - begin
