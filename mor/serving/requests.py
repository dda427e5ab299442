"""Sampling parameters and requests.

Every value is checked before the engine sees it: ranges when `SamplingParams` is made, what depends
on the model (vocabulary, context, recursions) in `Request.make`. The engine checks nothing again.
"""

import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "GREEDY_BELOW",
    "MAX_LOGPROBS",
    "Grammar",
    "ModelLimits",
    "Request",
    "RequestError",
    "SamplingParams",
]

#: Below this temperature the most probable token has all the probability that float32 can hold.
GREEDY_BELOW = 1e-5

#: Alternatives that can be asked for at a position, as in OpenAI's API.
MAX_LOGPROBS = 20

_SHOWN = 60


class RequestError(ValueError):
    """A request that can never work, so that a server answers 400.

    Attributes:
        option: the name of the option at fault.
    """

    def __init__(self, option: str, expected: str, got: str) -> None:
        """State which option is wrong, what it must be and what it is."""
        super().__init__(f"{option}: expected {expected}, got {got}")
        self.option = option


def shown(value: object) -> str:
    """A value as an error message shows it: bounded, whatever a client sent."""
    if isinstance(value, str):
        return repr(value) if len(value) <= _SHOWN else f"{value[:_SHOWN]!r}... of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple | set | dict):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _integer(option: str, value: object, low: int, high: int | None = None) -> None:
    if isinstance(value, int) and not isinstance(value, bool):
        if value >= low and (high is None or value <= high):
            return
    expected = f"an integer of at least {low}" if high is None else f"an integer in {low}..{high}"
    raise RequestError(option, expected, shown(value))


def _number(option: str, value: object, low: float, high: float = math.inf) -> None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        # A comparison, as an integer may be too large for a float.
        if low <= value <= high and not (isinstance(value, float) and math.isinf(value)):
            return
    expected = f"a number in {low}..{high}" if math.isfinite(high) else f"a finite number >= {low}"
    raise RequestError(option, expected, shown(value))


@dataclass(frozen=True)
class Grammar:
    """The form that a text must have.

    Attributes:
        kind: `"json_schema"` or `"regex"`.
        source: the JSON schema as a string of JSON, or the regular expression.
    """

    kind: Literal["json_schema", "regex"]
    source: str

    def __post_init__(self) -> None:
        """Check the kind; `mor.serving.grammar` checks the source."""
        if self.kind not in ("json_schema", "regex"):
            raise RequestError("grammar", "kind 'json_schema' or 'regex'", shown(self.kind))
        if not isinstance(self.source, str):
            raise RequestError("grammar", "a string", shown(self.source))


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    r"""Options of one request: the choice of its tokens, and their end.

    Args:
        max_tokens: tokens to generate; None generates until the context is full. 0 generates
            nothing, which only prompt logprobs have a use for.
        min_tokens: no end of sequence, stop token or stop string ends the text before this many
            tokens are generated.
        temperature: 0 is greedy, and so is anything below 1e-5.
        top_k: sample among the k most probable tokens, and those equal to the last of them; 0 is
            off.
        top_p: sample among the most probable tokens that together reach this mass.
        min_p: sample among tokens at least this fraction as probable as the most probable one.
        repetition_penalty: divides positive logits of tokens in the prompt or the output, and
            multiplies negative ones.
        presence_penalty: subtracted from logits of tokens in the output.
        frequency_penalty: subtracted from a token's logit for each time that it is in the output.
        logit_bias: added to the logits of these tokens.
        seed: with the same seed a request has the same tokens, whatever else is in the batch; None
            draws one.
        n: continuations of the prompt, each with its own random numbers.
        stop: strings that end the text, which does not contain them.
        stop_token_ids: tokens that end the text, which does not contain them.
        ignore_eos: go on after an end of sequence.
        logprobs: log probabilities of this many most probable tokens at each generated position,
            and of the token itself; of the model's logits, before any option above.
        prompt_logprobs: the same for positions of the prompt.
        logits_processors: called row by row with the tokens so far `[1, L]` and the scores
            `[1, V]`, as those of Transformers.
        grammar: the text has this form.
        max_recursions: no token takes more recursion steps than this.
        exit_threshold: a token takes another recursion step while its router's sigmoid is above
            this. None takes the model's own; models with an expert-choice router only.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        RequestError: a value that no model can serve.

    Example:
        >>> SamplingParams(temperature=0.8, top_p=0.95, stop="\n").stop
        ('\n',)
        >>> SamplingParams(top_p=1.5)
        Traceback (most recent call last):
        ...
        mor.serving.requests.RequestError: top_p: expected a number in 0..1, got 1.5
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logits_processors: Sequence[Callable[[Any, Any], Any]] = ()
    grammar: Grammar | None = None
    max_recursions: int | None = None
    exit_threshold: float | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        """Check ranges, and copy what a caller could change afterwards."""
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 0)
        _integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            expected = f"at most max_tokens = {self.max_tokens}"
            raise RequestError("min_tokens", expected, shown(self.min_tokens))
        _number("temperature", self.temperature, 0, 100)
        _integer("top_k", self.top_k, 0)
        _number("top_p", self.top_p, 0, 1)
        _number("min_p", self.min_p, 0, 1)
        _number("repetition_penalty", self.repetition_penalty, 1e-3, 1e3)
        _number("presence_penalty", self.presence_penalty, -100, 100)
        _number("frequency_penalty", self.frequency_penalty, -100, 100)
        _integer("n", self.n, 1)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**64 - 1)
        for option in ("logprobs", "prompt_logprobs"):
            if getattr(self, option) is not None:
                _integer(option, getattr(self, option), 0, MAX_LOGPROBS)
        if self.max_recursions is not None:
            _integer("max_recursions", self.max_recursions, 1)
        if self.exit_threshold is not None:
            _number("exit_threshold", self.exit_threshold, 0, 1)
        self._copy("stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise RequestError("stop", "strings of at least one character", shown(text))
        self._copy("stop_token_ids", tuple(self.stop_token_ids))
        self._copy("logits_processors", tuple(self.logits_processors))
        for processor in self.logits_processors:
            if not callable(processor):
                raise RequestError("logits_processors", "callables", shown(processor))
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError("logit_bias", "token ids with numbers", shown(self.logit_bias))
        self._copy("logit_bias", dict(self.logit_bias))
        for bias in self.logit_bias.values():
            _number("logit_bias", bias, -1e4, 1e4)

    def _copy(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """The most probable token is chosen, without a random number."""
        return self.temperature < GREEDY_BELOW


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """Limits of what a model and its tokenizer can serve.

    Attributes:
        vocab_size: tokens that can be sampled. Rows of the head beyond it are padding.
        context_length: positions of prompt and output together.
        num_recursions: of the shared block; 1 for a model without recursion.
        exit_threshold: tokens exit by a threshold, so requests may choose their own.
        eos_token_ids: tokens that end a sequence.
        has_tokenizer: requests may ask for stop strings.
    """

    vocab_size: int
    context_length: int
    num_recursions: int = 1
    exit_threshold: bool = False
    eos_token_ids: tuple[int, ...] = ()
    has_tokenizer: bool = True


@dataclass(frozen=True, kw_only=True)
class Request:
    """A checked request, as the engine takes it. `make` checks.

    Attributes:
        id: the engine's own number; what a client calls its request plays no part.
        prompt_ids: tokens of the prompt.
        params: sampling parameters.
        max_tokens: tokens to generate at most, which fit into the context.
        seed: of the random numbers, drawn where the caller gave none.
        priority: higher is served first.
        arrival: time of arrival on the engine's clock, in seconds.
        deadline: time on the same clock after which the request is aborted.
    """

    id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    seed: int
    priority: int = 0
    arrival: float = 0.0
    deadline: float | None = None

    @classmethod
    def make(
        cls,
        id: int,
        prompt_ids: Iterable[int],
        params: SamplingParams,
        limits: ModelLimits,
        *,
        priority: int = 0,
        arrival: float = 0.0,
        deadline: float | None = None,
    ) -> "Request":
        """Check a request against the model.

        Args:
            id: the engine's own number.
            prompt_ids: tokens of the prompt.
            params: sampling parameters.
            limits: what the model can serve.
            priority: higher is served first.
            arrival: time of arrival on the engine's clock, in seconds.
            deadline: time on the same clock after which the request is aborted.

        Returns:
            The request, with its seed and the number of tokens that fit into the context.

        Raises:
            RequestError: the model can never serve it.
        """
        prompt = tuple(prompt_ids)
        check_token_ids("prompt", prompt, limits)
        check_token_ids("logit_bias", params.logit_bias, limits)
        check_token_ids("stop_token_ids", params.stop_token_ids, limits)
        _integer("priority", priority, -(2**31), 2**31 - 1)
        if deadline is not None:
            _number("deadline", deadline, -math.inf)
        max_tokens = _room(len(prompt), params, limits)
        if params.stop and not limits.has_tokenizer:
            raise RequestError("stop", "an engine with a tokenizer", "an engine without one")
        if params.max_recursions is not None and params.max_recursions > limits.num_recursions:
            expected = f"at most the model's {limits.num_recursions} recursions"
            raise RequestError("max_recursions", expected, str(params.max_recursions))
        if params.exit_threshold is not None and not limits.exit_threshold:
            expected = "a model with an expert-choice router"
            raise RequestError("exit_threshold", expected, "a model whose tokens exit otherwise")
        seed = secrets.randbits(64) if params.seed is None else params.seed % 2**64
        return cls(
            id=id,
            prompt_ids=prompt,
            params=params,
            max_tokens=max_tokens,
            seed=seed,
            priority=priority,
            arrival=arrival,
            deadline=deadline,
        )


def check_token_ids(option: str, ids: Iterable[int], limits: ModelLimits) -> None:
    """Refuse what is no token of the vocabulary.

    Args:
        option: the option that the ids come from.
        ids: the ids.
        limits: what the model can serve.

    Raises:
        RequestError: an id is not in the vocabulary.
    """
    for token in ids:
        ours = isinstance(token, int) and not isinstance(token, bool)
        if not ours or not 0 <= token < limits.vocab_size:
            expected = f"token ids in 0..{limits.vocab_size - 1}"
            raise RequestError(option, expected, shown(token))


def _room(prompt: int, params: SamplingParams, limits: ModelLimits) -> int:
    """Tokens that the request may generate."""
    context = limits.context_length
    if prompt == 0:
        raise RequestError("prompt", "at least one token", "none")
    if prompt > context:
        raise RequestError("prompt", f"at most {context} tokens (the context)", f"{prompt} tokens")
    if params.max_tokens is None:
        max_tokens = context - prompt
        if max_tokens < max(1, params.min_tokens):
            expected = f"room in the context of {context} tokens for {max(1, params.min_tokens)}"
            raise RequestError("prompt", f"{expected} more", f"{prompt} tokens")
    else:
        max_tokens = params.max_tokens
        if prompt + max_tokens > context:
            got = f"{prompt} + {max_tokens} = {prompt + max_tokens}"
            expected = f"prompt and max_tokens within the context of {context} tokens"
            raise RequestError("max_tokens", expected, got)
    return max_tokens
