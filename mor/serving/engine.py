"""The engine: requests in, tokens out, one pass at a time.

The scheduler (`mor._host.Scheduler`) says which rows run next and where their keys and values lie,
`PackedModel` runs them, `Sampler` chooses tokens, `Continuation` makes text of them. An engine is
used by one thread at a time; `mor.serving.loop` serves many callers.
"""

import math
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mor._host import Plan, Scheduler
from mor.serving.continuation import Continuation
from mor.serving.curves import measure_curves
from mor.serving.forward import PackedModel, Rows
from mor.serving.outputs import Delta, Output
from mor.serving.requests import ModelLimits, Request, RequestError, SamplingParams
from mor.serving.sampling import Sampler, token_logprobs
from mor.serving.vocabulary import Vocabulary

__all__ = ["CHUNK", "Engine", "PassReport", "policy_options"]

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

#: What the scheduler refuses of a valid request: more blocks or more rows than there are.
_TOO_LARGE = re.compile("(n|tokens, max_tokens): expected (.*), got (.*)")

#: Rows of a prompt that one pass takes: about the work at which a CPU's products stop gaining.
CHUNK = {"cpu": 128, "cuda": 2048}


@dataclass(frozen=True)
class PassReport:
    """Report on the last step.

    Attributes:
        kind: "enter", "block", "exit" or "idle".
        rows: of the pass.
        host_seconds: spent outside the model and the sampler.
    """

    kind: str = "idle"
    rows: int = 0
    host_seconds: float = 0.0


class Engine:
    """Continuous depth-wise batching: rows at any recursion share the passes of the shared block.

    Args:
        model: a `MoRForCausalLM` or a dense model; see `PackedModel`.
        tokenizer: of Transformers; None serves token ids alone.
        kv_memory: of the pool of keys and values: bytes, or "512MiB", "2GiB".
        block_size: tokens of a block.
        max_rows: sequences that run at once.
        chunk: rows of prompts in flight at once, at most; default 128 on a CPU, 2048 on a GPU.
        policy: when rows that exited go through the last layer and the head. "auto": by the curves
            of both passes, which are measured at the start, and beside sequences that decode only
            as many rows of prompts as at most double the time of a block pass; "lock-step": once no
            row is active; a number: once this share of the rows waits.
        prefix_cache: keep keys and values of prompts for others that begin alike.
        deterministic: a row's result does not depend on the rows beside it, to the last bit.
        max_length: tokens of a sequence; default that of the model's configuration.
        clock: the time in seconds, which deadlines refer to.

    Attributes:
        limits: what requests may ask for.
        curves: measured (rows, seconds) by kind of pass, for `simulate`; see `measure_curves`.
        scheduler_options: of the scheduler, for `simulate`.
        last_pass: what the last step was.

    Raises:
        ValueError: a model, an option or a combination that cannot be served.

    Reference: MoR paper, section 2.2 and its continuous depth-wise batching.

    Example:
        >>> from transformers import LlamaConfig
        >>> from mor import MoRConfig, MoRForCausalLM
        >>> base = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=5, num_attention_heads=1, num_key_value_heads=1)
        >>> model = MoRForCausalLM(MoRConfig(base_config=base)).eval()
        >>> engine = Engine(model, kv_memory="1MiB", policy="lock-step")
        >>> five = SamplingParams(max_tokens=5, ignore_eos=True)
        >>> outputs = engine.generate([[1, 2, 3], [4]], five)
        >>> [len(output.token_ids) for output in outputs]
        [5, 5]
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        kv_memory: int | str = "2GiB",
        block_size: int = 16,
        max_rows: int = 64,
        chunk: int | None = None,
        policy: str | float = "auto",
        prefix_cache: bool = True,
        deterministic: bool = False,
        max_length: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        packed = self.packed = PackedModel(model, max_length, deterministic)
        self.clock = clock
        self.vocabulary = Vocabulary(tokenizer) if tokenizer is not None else None
        self.limits = _limits(model, packed, self.vocabulary)
        chunk = CHUNK[packed.device.type] if chunk is None else chunk
        one = packed.new_pool(1, block_size)
        num_blocks = _bytes(kv_memory) // one.block_bytes
        if num_blocks < 1:
            raise ValueError(
                f"kv_memory: expected at least a block of {one.block_bytes} bytes, got {kv_memory}"
            )
        self.pool = packed.new_pool(num_blocks, block_size)
        self.states = packed.new_states(max_rows + chunk)
        self.curves: dict[str, list[tuple[float, float]]] = {}
        if policy == "auto":
            self.curves = measure_curves(packed, self.pool, self.states, max_rows, chunk)
        self.scheduler_options: dict[str, Any] = dict(
            num_blocks=num_blocks,
            block_size=block_size,
            ends_block_tokens=self.pool.end_block_size if packed.has_ends else 0,
            num_recursions=packed.num_steps,
            router=packed.routing or "none",
            kv_strategy=packed.kv_strategy if packed.num_steps > 1 else "recursion",
            max_rows=max_rows,
            chunk=chunk,
            prefix_cache=prefix_cache,
            window=packed.window,
        )
        self.scheduler_options |= policy_options(packed, policy, self.curves)
        self.scheduler = Scheduler(**self.scheduler_options)
        self._sampler = Sampler(self.limits.vocab_size)
        self._grammars: Any = None
        self._live: dict[int, Continuation] = {}
        self._prompt_scored: dict[int, int] = {}  # positions of prompts with logprobs so far
        self._deltas: list[Delta] = []  # of ends that no pass brings
        self._loop: Any = None
        self.last_pass = PassReport()
        self._model_seconds = 0.0

    def encode(self, prompt: str) -> list[int]:
        """Tokens of a text, with the special tokens that the tokenizer adds."""
        if self.vocabulary is None:
            raise RequestError("prompt", "token ids, as the engine has no tokenizer", "a string")
        return self.vocabulary.encode(prompt)

    def add(
        self,
        prompt: str | Iterable[int],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        deadline: float | None = None,
        tenant: int = 0,
    ) -> int:
        """Queue a request.

        Args:
            prompt: token ids, or a string if there is a tokenizer.
            params: how its tokens are chosen.
            priority: higher is served first.
            deadline: time on the engine's clock at which it ends unfinished.
            tenant: requests share cached prefixes only with equal tenants.

        Returns:
            Its id, which its deltas carry.

        Raises:
            RequestError: a request that can never be served.
        """
        params = params or SamplingParams()
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        now = self.clock()
        request = Request.make(
            0, ids, params, self.limits, priority=priority, arrival=now, deadline=deadline
        )
        matcher = self._matcher(params)
        try:
            id = self.scheduler.add(
                np.asarray(request.prompt_ids, np.int32),
                max_tokens=request.max_tokens,
                now=now,
                priority=priority,
                deadline=deadline,
                n=params.n,
                max_recursions=params.max_recursions,
                threshold=_logit(params.exit_threshold),
                tenant=tenant,
                prompt_logits=params.prompt_logprobs is not None,
            )
        except ValueError as error:
            refused = _TOO_LARGE.fullmatch(str(error))
            if refused is None:
                raise
            raise RequestError(*refused.groups()) from error
        request = replace(request, id=id)
        for index in range(params.n):
            grammar = matcher.copy() if matcher is not None else None
            self._live[id + index] = Continuation(
                request, index, self.limits, self.vocabulary, grammar
            )
        return id

    def abort(self, id: int) -> bool:
        """End all continuations of a request; False if it has ended or was never there."""
        found = [key for key, one in self._live.items() if one.request.id == id]
        for key in found:
            self.scheduler.abort(key)
            self._deltas.append(self._end(key, "abort"))
        return bool(found)

    @property
    def has_work(self) -> bool:
        """Whether some request is unfinished, or its last delta was not given out."""
        return bool(self._live or self._deltas) or self.scheduler.has_work

    def step(self) -> list[Delta]:
        """Run one pass.

        Returns:
            What is new in each continuation that got a token or ended.
        """
        begin, now = time.perf_counter(), self.clock()
        plan = self.scheduler.plan(now)
        deltas, self._deltas = self._deltas, []
        deltas += self._take_finished()
        self._model_seconds = 0.0
        if plan.kind != "idle":
            self._prepare_blocks(plan)
            rows = Rows.of(plan, self.packed.device, self._bounds(plan))
            if plan.kind == "exit":
                deltas += self._run_exit(plan, rows)
            elif plan.kind == "enter":
                self._note_start(plan, now)
                tokens = torch.from_numpy(plan.tokens).to(self.packed.device)
                self._report(self._timed(self.packed.run_enter, tokens, rows))
            else:
                self._report(self._timed(self.packed.run_block, rows))
            deltas += self._take_finished()
        spent = time.perf_counter() - begin - self._model_seconds
        self.last_pass = PassReport(plan.kind, plan.num_rows, spent)
        return deltas

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[Output]:
        """Run requests to their ends.

        Args:
            prompts: strings or token ids.
            params: for all, or one for each.
            progress: show a progress bar.

        Returns:
            The continuations in order of the prompts, n for each.
        """
        each = params if isinstance(params, Sequence) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(
                f"params: expected one for each of {len(prompts)} prompts, got {len(each)}"
            )
        places: dict[int, int] = {}
        found: dict[tuple[int, int], list[Delta]] = {}
        missing = sum((one or SamplingParams()).n for one in each)
        bar = _progress_bar(missing) if progress else None
        others: list[Delta] = []
        try:
            for place, (prompt, one) in enumerate(zip(prompts, each, strict=True)):
                places[self.add(prompt, one)] = place
            while missing:
                for delta in self.step():
                    if delta.request_id not in places:
                        others.append(delta)
                        continue
                    found.setdefault((places[delta.request_id], delta.index), []).append(delta)
                    if delta.finish_reason is not None:
                        missing -= 1
                        if bar is not None:
                            bar.update()
        except BaseException:
            for id in places:
                self.abort(id)
            raise
        finally:
            self._deltas += others  # of requests that were added before
            if bar is not None:
                bar.close()
        return [Output.join(found[key]) for key in sorted(found)]

    async def stream(
        self, prompt: str | Iterable[int], params: SamplingParams | None = None, **options: Any
    ) -> AsyncIterator[Delta]:
        """Run a request beside others, in the engine's own thread; see `EngineLoop.stream`.

        From the first call on, the engine is that thread's: `step` and `generate` are not for
        others any more.
        """
        from mor.serving.loop import EngineLoop

        if self._loop is None:
            self._loop = EngineLoop(self)
        async for delta in self._loop.stream(prompt, params, **options):
            yield delta

    def statistics(self) -> dict[str, Any]:
        """Counters since the start and the state now, by name; see `mor._host.Stats`."""
        stats = self.scheduler.stats()
        names = [name for name in dir(stats) if not name.startswith("_")]
        return {name: getattr(stats, name) for name in names}

    def check(self) -> None:
        """Raise RuntimeError unless every block, slot, row and request is accounted for."""
        self.scheduler.check()
        stats = self.scheduler.stats()
        if not self.scheduler.has_work:
            if self._live:
                raise RuntimeError(f"Engine.check: requests {sorted(self._live)} without sequences")
            if stats.blocks_free != stats.blocks or self._prompt_scored:
                raise RuntimeError(
                    f"Engine.check: idle, but {stats.blocks - stats.blocks_free} of "
                    f"{stats.blocks} blocks are in use"
                )

    def _matcher(self, params: SamplingParams) -> Any:
        if params.grammar is None:
            return None
        if self.vocabulary is None:
            raise RequestError("grammar", "an engine with a tokenizer", "an engine without one")
        if self._grammars is None:
            from mor.serving.grammar import Grammars

            self._grammars = Grammars(
                self.vocabulary.tokenizer, self.limits.vocab_size, self.limits.eos_token_ids
            )
        return self._grammars.matcher(params.grammar)

    def _prepare_blocks(self, plan: Plan) -> None:
        if plan.copy_sources.size:
            sources, targets = (
                torch.from_numpy(blocks).to(self.packed.device)
                for blocks in (plan.copy_sources, plan.copy_destinations)
            )
            self.pool.copy_blocks(sources, targets)

    def _bounds(self, plan: Plan) -> Tensor | None:
        """Most recursions of rows [N] that enter a token-choice model; None: no row has a bound."""
        if plan.kind != "enter" or self.packed.token is None:
            return None
        entries = [self._live.get(id) for id in plan.ids.tolist()]
        bounds = [one and one.request.params.max_recursions for one in entries]
        if not any(bounds):
            return None
        bounds = [bound or self.packed.num_steps for bound in bounds]
        rows = np.repeat(np.asarray(bounds, np.int64), np.diff(plan.cu_seqlens))
        return torch.from_numpy(rows).to(self.packed.device)

    def _note_start(self, plan: Plan, now: float) -> None:
        starts = plan.positions[plan.cu_seqlens[:-1]].tolist() if plan.num_entries else []
        for id, start in zip(plan.ids.tolist(), starts, strict=True):
            first = self._live.get(id)
            if first is None or first.started:
                continue
            for index in range(first.request.params.n):  # the others fork from its prompt
                other = self._live.get(first.request.id + index)
                if other is not None and not other.started:
                    other.schedule(now)
                    other.cached_tokens = start

    def _timed(self, run: Callable[..., Any], *args: Any) -> Any:
        """Run a pass, whose seconds are not the host's, until its result can be read."""
        begin = time.perf_counter()
        result = run(*args, self.states, self.pool)
        if isinstance(result, Tensor) and result.is_cuda:
            torch.cuda.current_stream().synchronize()
        self._model_seconds += time.perf_counter() - begin
        return result

    def _report(self, decisions: Tensor | None) -> None:
        if decisions is None:
            self.scheduler.report()
        else:
            self.scheduler.report(decisions.to("cpu", torch.uint8).numpy())

    def _run_exit(self, plan: Plan, rows: Rows) -> list[Delta]:
        logits = self._timed(self.packed.run_exit, rows)
        self._score_prompts(plan, logits)
        ids, sampled_rows = plan.sample_ids.tolist(), plan.sample_rows
        # One that was aborted meanwhile: its sequence ends with this pass, its token is nobody's.
        wanted = [place for place, id in enumerate(ids) if id in self._live]
        picked = logits[torch.from_numpy(sampled_rows[wanted]).to(logits.device)]
        begin = time.perf_counter()
        sampled = self._sampler(picked, [self._live[ids[place]].sampling for place in wanted])
        self._model_seconds += time.perf_counter() - begin
        now, deltas = self.clock(), []
        tokens, stops = np.zeros(len(ids), np.int64), np.ones(len(ids), np.uint8)
        for place, result in zip(wanted, sampled, strict=True):
            id = ids[place]
            depth = self._depth(int(plan.recursions[sampled_rows[place]]))
            delta = self._live[id].advance(result, depth, now)
            tokens[place] = max(result.token_id, 0)
            stops[place] = delta.finish_reason is not None
            deltas.append(delta)
            if delta.finish_reason is not None:
                self._forget(id)
        self.scheduler.report(stops, tokens)
        return deltas

    def _depth(self, steps: int) -> int | None:
        return steps * self.packed.recursions_per_step if self.packed.recursive else None

    def _score_prompts(self, plan: Plan, logits: Tensor) -> None:
        """Log probabilities of the prompt's tokens, for the requests that ask for them."""
        bounds = plan.cu_seqlens.tolist()
        for entry, id in enumerate(plan.ids.tolist()):
            one = self._live.get(id)
            count = one.request.params.prompt_logprobs if one is not None else None
            if one is None or count is None:
                continue
            prompt = one.request.prompt_ids
            scored = self._prompt_scored.get(id, 0)  # a preempted request comes by again
            rows = [
                row
                for row in range(bounds[entry], bounds[entry + 1])
                if scored <= plan.positions[row] < len(prompt) - 1
            ]
            if not rows:
                continue
            raw = logits[rows][:, : self.limits.vocab_size]
            raw = raw if raw.dtype == torch.float64 else raw.float()
            targets = [prompt[int(plan.positions[row]) + 1] for row in rows]
            found = tuple(token_logprobs(raw, targets, [count] * len(rows)))
            self._prompt_scored[id] = scored + len(rows)
            for index in range(one.request.params.n):
                if (other := self._live.get(one.request.id + index)) is not None:
                    other.add_prompt_logprobs(found)

    def _take_finished(self) -> list[Delta]:
        """Last deltas of the sequences that the scheduler ended by itself."""
        deltas = []
        for id, reason in self.scheduler.take_finished():
            one = self._live.get(id)
            if one is None:
                continue
            # Before its prompt is computed a request is one sequence.
            unforked = not one.token_ids and one.index == 0
            count = one.request.params.n if unforked else 1
            deltas += [self._end(id + k, reason) for k in range(count) if id + k in self._live]
        return deltas

    def _end(self, id: int, reason: Any) -> Delta:
        delta = self._live[id].end(reason, self.clock())
        self._forget(id)
        return delta

    def _forget(self, id: int) -> None:
        del self._live[id]
        self._prompt_scored.pop(id, None)


def policy_options(
    packed: PackedModel,
    policy: str | float,
    curves: Mapping[str, Sequence[tuple[float, float]]],
) -> dict[str, Any]:
    """Options of the scheduler that follow from the policy, in an engine and in a simulation.

    Args:
        packed: the model.
        policy: what the user asked for; see `Engine`.
        curves: measured (rows, seconds), which only "auto" uses: with it they also bound the rows
            of prompts beside sequences that decode.

    Returns:
        `policy`, `block_seconds` and `ends_seconds` of `mor._host.Scheduler`.

    Raises:
        ValueError: a model whose recursions cannot share a pass, with a policy that mixes them.
    """
    if not packed.mixes_recursions and policy not in ("auto", "lock-step"):
        raise ValueError(
            "policy: expected 'lock-step' for a relaxed model, whose recursions have weights of "
            f"their own, got {policy!r}"
        )
    used = curves if policy == "auto" else {}
    # One recursion leaves nothing to pool.
    pools = packed.mixes_recursions and packed.num_steps > 1
    return {
        "policy": "lock-step" if policy == "auto" and not pools else policy,
        "block_seconds": used.get("block", ()),
        "ends_seconds": used.get("ends", ()),
    }


def _logit(probability: float | None) -> float:
    """The logit of a sigmoid; 0 for the model's own threshold of 0.5."""
    if probability is None:
        return 0.0
    if probability in (0, 1):
        return math.inf if probability else -math.inf
    return math.log(probability) - math.log1p(-probability)


def _bytes(memory: int | str) -> int:
    if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return memory
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KiB|MiB|GiB)", str(memory))
    if match is None:
        raise ValueError(f'kv_memory: expected bytes or e.g. "2GiB", got {memory!r}')
    return int(float(match[1]) * _UNITS[match[2]])


def _limits(model: Any, packed: PackedModel, vocabulary: Vocabulary | None) -> ModelLimits:
    generation = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    eos = model.config.eos_token_id if eos is None else eos
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    if vocabulary is not None and vocabulary.tokenizer.eos_token_id is not None:
        ends.append(vocabulary.tokenizer.eos_token_id)
    size = packed.vocab_size
    if vocabulary is not None:  # rows of the head beyond it are padding
        size = min(size, vocabulary.size)
    return ModelLimits(
        vocab_size=size,
        context_length=packed.max_length,
        num_recursions=packed.num_steps,
        exit_threshold=packed.routing == "expert",
        eos_token_ids=tuple(sorted({int(end) for end in ends if 0 <= int(end) < size})),
        has_tokenizer=vocabulary is not None,
    )


def _progress_bar(total: int) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, unit="request")
