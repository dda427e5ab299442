"""Outputs of the engine: deltas while a continuation runs, and the whole of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["Delta", "FinishReason", "Output", "Timings", "TokenLogprobs", "Usage"]

FinishReason = Literal["stop", "length", "abort", "deadline", "error"]


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities at one position, of the model's raw logits.

    Attributes:
        token_id: the token that stands there.
        logprob: its log probability.
        rank: 1 for the most probable token, then in order.
        top: the most probable tokens with theirs, most probable first. Where the token is one of
            them, its entry is the same float, so that equality tells a greedy choice.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens of a request.

    Attributes:
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens generated, including an end of sequence and the tokens of a stop
            string, which the text does not contain.
        cached_tokens: tokens of the prompt whose keys and values were in the prefix cache.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """Seconds since the request arrived.

    Attributes:
        scheduled: until its first tokens ran; None if none did.
        first_token: until its first token was sampled; None if none was.
        finished: until it ended.
    """

    scheduled: float | None
    first_token: float | None
    finished: float


@dataclass(frozen=True, kw_only=True)
class Delta:
    """New tokens, and more, of one continuation of a request.

    Attributes:
        request_id: the engine's number of the request.
        index: which of the n continuations.
        token_ids: new tokens.
        text: new text. It may lag behind the tokens, where a character is incomplete or a stop
            string may have begun.
        logprobs: of the new tokens, if asked for.
        depths: of each new token, the recursion steps of the row that predicted it.
        prompt_logprobs: with the first delta, if asked for; None at the first position.
        finish_reason: with the last delta.
        stop: the stop string or stop token that ended the text.
        error: why it ended, for the finish reason `"error"`.
        usage: with the last delta.
        timings: with the last delta.
    """

    request_id: int
    index: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    depths: tuple[int, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
    error: str | None = None
    usage: Usage | None = None
    timings: Timings | None = None

    def merge(self, later: "Delta") -> "Delta":
        """Join two deltas of a continuation, so that a slow reader finds one.

        Args:
            later: what came after this one.

        Returns:
            A delta with what is new in both.
        """
        if (self.request_id, self.index) != (later.request_id, later.index):
            raise ValueError("Delta.merge: expected deltas of one continuation")
        logprobs = self.logprobs
        if later.logprobs is not None:
            logprobs = (logprobs or ()) + later.logprobs
        prompt = self.prompt_logprobs if later.prompt_logprobs is None else later.prompt_logprobs
        return replace(
            later,
            token_ids=self.token_ids + later.token_ids,
            text=self.text + later.text,
            logprobs=logprobs,
            depths=self.depths + later.depths,
            prompt_logprobs=prompt,
        )


@dataclass(frozen=True, kw_only=True)
class Output(Delta):
    """A whole continuation: all deltas joined, with a finish reason."""

    finish_reason: FinishReason

    @classmethod
    def join(cls, deltas: Sequence[Delta]) -> "Output":
        """Join all deltas of one continuation.

        Args:
            deltas: from the first to the last, which has the finish reason.

        Returns:
            The whole continuation.
        """
        whole = deltas[0]
        for delta in deltas[1:]:
            whole = whole.merge(delta)
        if whole.finish_reason is None:
            raise ValueError("Output.join: expected a last delta with a finish reason")
        return cls(**{name: getattr(whole, name) for name in Delta.__dataclass_fields__})
