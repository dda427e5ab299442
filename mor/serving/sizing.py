"""Sizing of a deployment: the throughput and latency of a server, predicted before it runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from mor.analysis.costs import active_shares
from mor.models import MoRConfig
from mor.models.swap.saved_model import unchanged_config
from mor.serving.engine import CHUNK, Engine, policy_options
from mor.serving.simulator import simulate
from mor.serving.timing import DTYPES, Timing, windowed_shares

__all__ = [
    "Load",
    "ServerSize",
    "Timing",
    "depth_shares",
    "expected_depths",
    "size_server",
    "sizing_engine",
]

#: Share of a server's throughput that it is loaded with: above it requests soon queue for long.
UTILISATION = 0.8


@dataclass(frozen=True)
class Load:
    """The requests that a deployment serves.

    Attributes:
        prompt_tokens: of a request, none of which is found in the prefix cache.
        new_tokens: that it generates.
        depths: share of the tokens that take 0 .. R recursions; the sum is 1.
    """

    prompt_tokens: int
    new_tokens: int
    depths: tuple[float, ...]


@dataclass(frozen=True)
class ServerSize:
    """Predicted throughput, latency and memory of one server; times are in seconds.

    Attributes:
        rows: sequences that run at once.
        tokens_per_second: generated, while requests never run out.
        requests_per_second: the same, in whole requests.
        kv_bytes: most keys and values in use meanwhile.
        preemptions: sequences that lost their keys and values meanwhile, for want of memory.
        rate: requests per second, at random times, of the latencies.
        first_token: median and 99th percentile of the time to the first token at this rate.
        inter_token: the same of the time between two tokens.
        replicas: servers that the deployment needs; None where no rate was asked for.
    """

    rows: int
    tokens_per_second: float
    requests_per_second: float
    kv_bytes: int
    preemptions: int
    rate: float
    first_token: tuple[float, float]
    inter_token: tuple[float, float]
    replicas: int | None

    def to_dict(self) -> dict[str, Any]:
        """Fields by name, for JSON."""
        return asdict(self)


def size_server(
    engine: Engine,
    timing: Timing,
    load: Load,
    rows: int,
    *,
    rate: float | None = None,
    limited: bool = False,
    policy: str | float = "auto",
    seed: int = 0,
) -> ServerSize:
    """Simulates one server at its limit, then at four fifths of it.

    Args:
        engine: whose scheduler decides; it computes nothing here (see `sizing_engine`).
        timing: of the passes, on the machine that is to serve.
        load: the requests.
        rows: sequences that run at once.
        rate: requests per second that the whole deployment serves. It takes so many servers that
            none is loaded with more than 0.8 of its limit. None: the latencies are those at 0.8.
        limited: the pool of keys and values is the engine's; otherwise it is as large as needed.
        policy: see `Engine`.
        seed: of arrivals and depths.

    Raises:
        ValueError: a load that does not fit the model, or the memory; times of another model.
    """
    timing.check_model(engine.packed)
    length = load.prompt_tokens + load.new_tokens
    if length > engine.limits.context_length:
        raise ValueError(
            f"expected at most {engine.limits.context_length} tokens of prompt and answer, as the "
            f"model has positions for, got {length}"
        )
    options: dict[str, Any] = engine.scheduler_options | {
        "max_rows": rows,
        **policy_options(engine.packed, policy, timing.curves),
        "seed": seed,
        "pass_seconds": partial(timing.seconds, windowed=windowed_shares(engine.packed)),
    }
    needed = _most_blocks(options, length)
    if not limited:
        options["num_blocks"] = 2 * rows * needed  # admission leaves some free
    elif options["num_blocks"] < needed:
        least = math.ceil(needed * engine.pool.block_bytes / 2**10)
        raise ValueError(
            f"kv_memory: expected at least {least}KiB, which a request of {length} tokens may use, "
            f"got {options['num_blocks']} of its {needed} blocks"
        )
    count = 4 * rows + 40
    one = load.prompt_tokens, load.new_tokens
    full = simulate([(0.0, *one)] * count, load.depths, **options)
    limit = full.tokens_per_second / load.new_tokens
    replicas = None if rate is None else max(1, math.ceil(rate / (UTILISATION * limit)))
    each = UTILISATION * limit if rate is None or replicas is None else rate / replicas
    gaps = np.random.default_rng(seed).exponential(1 / each, count)
    arrivals = [(float(now), *one) for now in np.cumsum(gaps)]
    loaded = simulate(arrivals, load.depths, **options)
    return ServerSize(
        rows=rows,
        tokens_per_second=full.tokens_per_second,
        requests_per_second=limit,
        kv_bytes=full.peak_blocks * engine.pool.block_bytes,
        preemptions=full.stats.preemptions,
        rate=each,
        first_token=loaded.first_token,
        inter_token=loaded.inter_token,
        replicas=replicas,
    )


def _most_blocks(options: Mapping[str, Any], length: int) -> int:
    """Blocks of a request whose every token takes every recursion, which the scheduler demands.

    Blocks whose keys are all outside of a window count: the engine keeps them, for layers without
    window and for prefixes. The last token that is sampled is never computed.
    """
    size, ends = options["block_size"], options["ends_block_tokens"]
    groups = 1 if options["kv_strategy"] == "shared" else options["num_recursions"]
    computed = length - 1
    return groups * math.ceil(computed / size) + (math.ceil(computed / ends) if ends else 0)


def expected_depths(config: PreTrainedConfig) -> tuple[float, ...]:
    """Share of the tokens that take 0 .. R recursions, as the configuration has it.

    The capacities of expert-choice, equal shares of token-choice; without router all tokens take
    the one step that the engine plans.
    """
    if not isinstance(config, MoRConfig) or config.router is None:
        return 0.0, 1.0
    layers = active_shares(config)
    shares = [1.0, *(layers[config.schedule.step(r)[0]] for r in range(config.num_recursions)), 0.0]
    return tuple(before - after for before, after in pairwise(shares))


def depth_shares(counts: Sequence[float], num_steps: int) -> tuple[float, ...]:
    """Shares of tokens by depth, of shares or counts.

    Raises:
        ValueError: not one number >= 0 for each depth from 0 to the recursions, or all 0.
    """
    if len(counts) != num_steps + 1 or min(counts) < 0 or not 0 < sum(counts) < math.inf:
        raise ValueError(
            f"depths: expected shares or counts of the tokens of depth 0 to {num_steps}, got "
            f"{','.join(f'{count:g}' for count in counts)}"
        )
    return tuple(count / sum(counts) for count in counts)


def sizing_engine(
    folder: Path,
    max_rows: int,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    kv_memory: str | None = None,
    timing: Timing | None = None,
) -> Engine:
    """An engine of a saved model's shape, with random weights, which take the same time.

    Args:
        folder: with a config.json.
        max_rows: the most sequences at once.
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda".
        kv_memory: see `Engine`; None: enough to measure.
        timing: with it the engine is for `size_server` alone: it has neither weights nor memory,
            and its dtype is the timing's.

    Raises:
        ValueError: a configuration that cannot be read or served, times of another dtype.
    """
    config = unchanged_config(folder)
    if timing is not None:
        if dtype not in ("auto", timing.dtype):
            raise ValueError(f"dtype: expected {timing.dtype}, of which the times are, got {dtype}")
        dtype = timing.dtype
    if dtype == "auto":
        dtype = str(config.dtype or "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected auto or one of {', '.join(DTYPES)}, got {dtype}")
    with torch.device(device if timing is None else "meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return Engine(
        model.eval(),
        kv_memory=kv_memory or "256MiB",
        max_rows=max_rows,
        chunk=CHUNK[device if timing is None else timing.device],
        policy="lock-step",  # the one that needs no times
    )
