"""The engine of mor.serving: MoR against the dense model, its policies, prefixes, long prompts.

Models have the shape of SmolLM2-135M and a router that draws depths by a given law: `uniform` over
1 .. R; `shallow`: 80% exit after the first recursion; a number: all rows exit there. A ratio above
1 means that ours is faster. Rows, each chosen by its first word and --only:

    throughput  MoR against the dense model in the same engine, prompts of one token, all timed; `x
                limit bound` is the share that is reached of the dense model's time scaled by the
                layers and the head that are executed. `host` is the share of the time outside the
                model and the sampler, `plan us` that time of one pass.
    generate    The dense model in the engine against Transformers' generate().
    policy      `auto` against lock-step and fixed shares of waiting rows. `predicted` is the
                simulator's time over ours, and `p99 ms` the time between two tokens.
    prefix      The first token of a prompt that is in the prefix cache, against one that is not;
                the bound is the share of its rows that is computed nevertheless.
    chunked     Time between two tokens of sequences that decode while a long prompt enters (p99),
                and while none does.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, product, repeat
from typing import Any

import numpy as np
import torch
from bench_generate import dense_config, executed, mor_model
from harness import DTYPES, dtype_name, line, parse_args, report, wanted
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mor import MoRConfig
from mor.serving import Engine, SamplingParams
from mor.serving.simulator import simulate

MEMORY = "1GiB"
#: Shares of the rows that must wait before the ends run; lock-step is 1.
FIXED = (0.0, 0.25, 0.5, 0.75)


class Drawn(nn.Module):
    """A router by which a row goes on with a given probability.

    The draw is a hash of the row's state, which depends on no other row of the pass: a sequence has
    the same depths whenever it runs, so all policies do the same work.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, hidden: Tensor, positions: Tensor, learns: bool = False) -> Tensor:
        draws = (hidden.double().sum(-1, keepdim=True) * 1e5).remainder(1)
        return (self.probability - draws).to(hidden.dtype)


def shares_of(law: str, recursions: int) -> list[float]:
    """Share of the rows that take each recursion."""
    if law == "uniform":
        return [1 - r / recursions for r in range(recursions)]
    if law == "shallow":
        return [1.0] + [0.2 * (recursions - r) / (recursions - 1) for r in range(1, recursions)]
    return [float(r < int(law)) for r in range(recursions)]


def mor_engine(
    base: LlamaConfig, recursions: int, law: str, dtype: torch.dtype, **options: Any
) -> Engine:
    model = mor_model(base, recursions).to(dtype)
    before = 1.0
    for step, share in enumerate(shares_of(law, recursions)):
        model.model.recursion.routers[step] = Drawn(share / before if before else 0.0)
        before = share
    return Engine(model, kv_memory=MEMORY, **options)


def dense_model(base: LlamaConfig, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(base).eval().to(dtype)


class Decoding:
    """Sequences that start together and decode greedily; keeps what its last call saw."""

    def __init__(self, engine: Engine, batch: int, tokens: int) -> None:
        self.engine, self.batch = engine, batch
        self.params = SamplingParams(max_tokens=tokens, temperature=0)

    def __call__(self) -> None:
        self.seconds, self.host, self.passes = 0.0, 0.0, 0
        self.gaps: list[float] = []
        for sequence in range(self.batch):
            self.engine.add([1 + sequence], self.params, tenant=sequence)
        self.run()

    def run(self, before_step: Callable[[], None] = lambda: None) -> None:
        """To the end of all sequences."""
        last: dict[tuple[int, int], float] = {}
        begin = time.perf_counter()
        while self.engine.has_work:
            before_step()
            deltas, now = self.engine.step(), time.perf_counter()
            self.host += self.engine.last_pass.host_seconds
            self.passes += self.engine.last_pass.rows > 0
            for delta in deltas:
                key = delta.request_id, delta.index
                if key in last:
                    self.gaps.append(now - last[key])
                last[key] = now
        self.seconds = time.perf_counter() - begin

    def depths(self) -> list[float]:
        """Share of the rows that took each number of recursions, in all calls so far."""
        rows = self.engine.statistics()["exit_depths"]
        return [count / sum(rows) for count in rows]

    def p99(self) -> float:
        """Milliseconds between two tokens of a sequence."""
        return float(np.percentile(self.gaps, 99)) * 1e3 if self.gaps else 0.0


def throughput(args: argparse.Namespace) -> None:
    counts, batch, tokens = ((3,), 2, 4) if args.smoke else ((2, 3, 4), 32, args.tokens)
    for recursions, dtype in product(counts, DTYPES):
        base = dense_config(recursions, args.smoke)
        laws = ["uniform", *map(str, range(1, recursions + 1))]
        for law in laws[:1] if args.smoke else laws:
            what = {"row": "throughput", "model": f"MoR-{recursions}", "depths": law}
            what |= {"batch": batch, "dtype": dtype_name(dtype), "tokens": tokens}
            if not wanted(what):
                continue
            engine = mor_engine(base, recursions, law, dtype, max_rows=batch)
            dense = dense_model(base, dtype)
            ours = Decoding(engine, batch, tokens)
            vanilla = Decoding(Engine(dense, kv_memory=MEMORY, max_rows=batch), batch, tokens)
            config = MoRConfig(base_config=base, num_recursions=recursions)
            if row := line(what, {"ours": ours, "vanilla": vanilla}, seconds=0.01):
                taken = [sum(ours.depths()[r:]) for r in range(1, recursions + 1)]
                share = executed(config, taken) / executed(base, None)
                row["x limit bound"] = share * row["x best"]
                row |= {"tokens/s": batch * tokens / row["ours ms"] * 1e3}
                row |= {"host": ours.host / ours.seconds, "plan us": ours.host / ours.passes * 1e6}


def generate(args: argparse.Namespace) -> None:
    tokens = 4 if args.smoke else args.tokens
    base = dense_config(3, args.smoke)
    for batch, dtype in product((2,) if args.smoke else (1, 32), DTYPES):
        what = {"row": "generate", "model": "Llama", "batch": batch, "dtype": dtype_name(dtype)}
        what["tokens"] = tokens
        if not wanted(what):
            continue
        dense = dense_model(base, dtype)
        prompts = torch.arange(1, batch + 1).unsqueeze(1)
        options = {"max_new_tokens": tokens, "do_sample": False}
        ours = Decoding(Engine(dense, kv_memory=MEMORY, max_rows=batch), batch, tokens)
        theirs = partial(
            dense.generate, prompts, attention_mask=torch.ones_like(prompts), **options
        )
        if row := line(what, {"ours": ours, "generate": theirs}, seconds=0.01):
            row["tokens/s"] = batch * tokens / row["ours ms"] * 1e3


def policy(args: argparse.Namespace) -> None:
    tokens = 4 if args.smoke else args.tokens
    sizes, batches = ((512,), (2,)) if args.smoke else ((49152, 4096), (4, 8, 16, 32))
    for size, law, batch, dtype in product(sizes, ("uniform", "shallow"), batches, DTYPES):
        what = {"row": "policy", "vocabulary": size, "depths": law, "batch": batch}
        what |= {"dtype": dtype_name(dtype), "tokens": tokens}
        if not wanted(what):
            continue
        base = dense_config(3, args.smoke)
        base.vocab_size = size
        model = partial(mor_engine, base, 3, law, dtype, max_rows=batch)
        ours = Decoding(model(), batch, tokens)
        calls = {"ours": ours, "lock-step": Decoding(model(policy="lock-step"), batch, tokens)}
        for share in FIXED[:1] if args.smoke else FIXED:
            calls[f"share {share}"] = Decoding(model(policy=share), batch, tokens)
        if row := line(what, calls, seconds=0.01):
            engine = ours.engine
            predicted = simulate(
                [(0.0, 1, tokens)] * batch,
                ours.depths(),
                num_blocks=engine.pool.data.shape[0], ends_block_tokens=engine.pool.end_block_size,
                num_recursions=3, router="expert", policy="auto", max_rows=batch,
                block_seconds=engine.curves["block"], ends_seconds=engine.curves["ends"],
            )  # fmt: skip
            row["predicted"] = predicted.seconds / row["ours ms"] * 1e3
            row |= {"p99 ms": ours.p99(), "lock-step p99 ms": calls["lock-step"].p99()}


def first_token(engine: Engine, prompt: list[int], tenants: Iterator[int]) -> None:
    """The first token of the next tenant: tenants share no prefixes."""
    engine.add(prompt, SamplingParams(max_tokens=1, temperature=0), tenant=next(tenants))
    while engine.has_work:
        engine.step()


def engine_of(name: str, base: Any, dtype: torch.dtype) -> Engine:
    """Of "Llama", or of a MoR model of three recursions."""
    if name == "Llama":
        return Engine(dense_model(base, dtype), kv_memory=MEMORY)
    return mor_engine(base, 3, "uniform", dtype)


def prefix(args: argparse.Namespace) -> None:
    length = 64 if args.smoke else 1024
    base = dense_config(3, args.smoke)
    for name, dtype in product(("Llama", "MoR-3"), DTYPES):
        what = {"row": "prefix", "model": name, "prompt": length, "dtype": dtype_name(dtype)}
        if not wanted(what):
            continue
        engine = engine_of(name, base, dtype)
        prompt = torch.randint(1, base.vocab_size, (length,)).tolist()
        hit = partial(first_token, engine, prompt, repeat(0))
        miss = partial(first_token, engine, prompt, count(1))
        hit()
        before = engine.statistics()["prefix_hit_tokens"]
        hit()
        computed = length - (engine.statistics()["prefix_hit_tokens"] - before)
        if row := line(what, {"ours": hit, "miss": miss}, seconds=0.01):
            row["x limit bound"] = computed / length * row["x best"]
            row["of a miss"] = 1 / row["x best"]


class Entering(Decoding):
    """The same while a long prompt enters, a quarter of the way."""

    def __init__(self, engine: Engine, batch: int, tokens: int, prompt: list[int]) -> None:
        super().__init__(engine, batch, tokens)
        self.prompt, self.tenants = prompt, count(batch)

    def run(self, before_step: Callable[[], None] = lambda: None) -> None:
        steps, entered = count(), self.params.max_tokens // 4

        def enter() -> None:
            if next(steps) == entered:
                params = SamplingParams(max_tokens=1, temperature=0)
                self.engine.add(self.prompt, params, tenant=next(self.tenants))

        super().run(enter)


def chunked(args: argparse.Namespace) -> None:
    length, batch, tokens = (64, 2, 8) if args.smoke else (2048, 8, args.tokens)
    base = dense_config(3, args.smoke)
    for name, dtype in product(("Llama", "MoR-3"), DTYPES):
        what = {"row": "chunked", "model": name, "prompt": length, "batch": batch}
        what |= {"dtype": dtype_name(dtype), "tokens": tokens}
        if not wanted(what):
            continue
        engine = engine_of(name, base, dtype)
        prompt = torch.randint(1, base.vocab_size, (length,)).tolist()
        ours, alone = Entering(engine, batch, tokens, prompt), Decoding(engine, batch, tokens)
        if row := line(what, {"ours": ours, "limit alone": alone}, seconds=0.01):
            row |= {"p99 ms": ours.p99(), "alone p99 ms": alone.p99()}
            row["p99 of alone"] = row["p99 ms"] / row["alone p99 ms"]


if __name__ == "__main__":
    args = parse_args(
        __doc__,
        lambda parser: parser.add_argument(
            "--tokens", type=int, default=64, help="new tokens of a sequence (default 64)"
        ),
    )
    for rows in (throughput, generate, policy, prefix, chunked):
        rows(args)
    report("serving")
