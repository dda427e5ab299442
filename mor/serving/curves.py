"""Curves of the seconds of a pass by its rows, which the scheduler and its simulator use."""

import time
from collections.abc import Callable, Sequence

import torch

from mor.serving.forward import PackedModel, Rows
from mor.serving.memory import KVPool, States

__all__ = ["measure_curves"]

_REPEATS = 3
_ENOUGH_ROWS = 64


def measure_curves(
    packed: PackedModel,
    pool: KVPool,
    states: States,
    max_rows: int,
    chunk: int = 1,
    context: int = 1,
    kinds: Sequence[str] = ("block", "ends"),
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of passes: "block", "enter", and an exit and an enter pass together ("ends").

    At powers of two, the fastest of three passes: other work on the machine, which slows a pass now
    and then, is no part of a curve. By default rows have no context, so attention over it comes on
    top, in all alike.

    Args:
        packed: the model.
        pool: of keys and values; its contents are lost.
        states: of the rows; their contents are lost.
        max_rows: the most rows of the ends to measure, which rows of a prompt need little of.
        chunk: rows of prompts, which are measured in block and enter passes too.
        context: keys that each row sees, its own among them. Rows share blocks where the pool is
            too small for blocks of their own.
        kinds: of passes to measure; the scheduler needs no "enter".

    Returns:
        (rows, seconds) by kind of pass, in order of rows.
    """
    available = min(pool.data.shape[0], states.hidden.shape[0])
    states.hidden.zero_()
    curves: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    # A CPU multiplies as fast as it can by then, and a curve goes on in proportion to the rows.
    prompt_rows = min(chunk, _ENOUGH_ROWS) if packed.device.type == "cpu" else chunk
    for count in _sizes(min(max_rows, available), min(prompt_rows, available)):
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

        runs: dict[str, Callable[[], None]] = {
            "enter": run_enter,
            "ends": run_ends,
            "block": run_block,
        }
        for kind in kinds:
            if kind == "ends" and count > max_rows:
                continue
            run = runs[kind]
            run()
            curves[kind].append((count, min(_seconds(run) for _ in range(_REPEATS))))
    return curves


def _sizes(*ends: int) -> list[int]:
    """These numbers, and all powers of two up to the largest."""
    return sorted({*ends, *(2**k for k in range(max(ends).bit_length()))})


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
