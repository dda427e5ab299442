"""One continuation of a request: from a sampled token to what its reader gets."""

from mor.serving.detokenize import TextStream
from mor.serving.outputs import Delta, FinishReason, Timings, TokenLogprobs, Usage
from mor.serving.requests import ModelLimits, Request
from mor.serving.sampling import Sampled
from mor.serving.sampling_state import GrammarMatcher, SamplingState
from mor.serving.vocabulary import Vocabulary

__all__ = ["Continuation"]


class Continuation:
    """Tokens, text and end of one of a request's n continuations.

    It knows nothing of blocks and passes, so preemption does not touch it.

    Args:
        request: the request.
        index: which of its continuations.
        limits: what the model can serve.
        vocabulary: of the tokenizer; None makes no text.
        grammar: a matcher of this continuation's own, where the request has a grammar.

    Attributes:
        sampling: what the sampler remembers.
        finish_reason: why it ended; None while it runs.
        cached_tokens: tokens of the prompt found in the prefix cache, which the engine sets.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        limits: ModelLimits,
        vocabulary: Vocabulary | None,
        grammar: GrammarMatcher | None = None,
    ) -> None:
        """Start after the prompt."""
        params = request.params
        self.request = request
        self.index = index
        self.sampling = SamplingState(
            params,
            request.prompt_ids,
            seed=request.seed,
            index=index,
            ends=() if params.ignore_eos else limits.eos_token_ids,
            grammar=grammar,
        )
        self.finish_reason: FinishReason | None = None
        self.cached_tokens = 0
        self._eos = frozenset(limits.eos_token_ids)
        self._text = None
        if vocabulary is not None:
            self._text = TextStream(
                vocabulary,
                request.prompt_ids,
                stop=tuple(params.stop),
                min_tokens=params.min_tokens,
                skip_special_tokens=params.skip_special_tokens,
            )
        self._scheduled: float | None = None
        self._first_token: float | None = None
        self._prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None

    @property
    def token_ids(self) -> list[int]:
        """Tokens generated so far."""
        return self.sampling.token_ids

    @property
    def started(self) -> bool:
        """Whether tokens of its prompt ran."""
        return self._scheduled is not None

    def schedule(self, now: float) -> None:
        """Note when the first tokens of the prompt ran."""
        if self._scheduled is None:
            self._scheduled = now

    def add_prompt_logprobs(self, logprobs: tuple[TokenLogprobs, ...]) -> None:
        """Add log probabilities of the next positions of the prompt, from the second on.

        Args:
            logprobs: of one chunk. They come with the next delta.
        """
        self._prompt_logprobs = (self._prompt_logprobs or (None,)) + logprobs

    def advance(self, sampled: Sampled, depth: int | None, now: float) -> Delta:
        """Add a sampled token.

        Args:
            sampled: the sampler's answer for this continuation's row.
            depth: recursion steps of the row; None for a model without recursion.
            now: time on the engine's clock, in seconds.

        Returns:
            What is new. Its `finish_reason` tells whether the continuation goes on.
        """
        if self.finish_reason is not None:
            raise ValueError(f"Continuation.advance: it ended before ({self.finish_reason})")
        if sampled.error is not None:
            return self.end("error", now, sampled.error)
        if self._first_token is None:
            self._first_token = now
        token, params = sampled.token_id, self.request.params
        try:
            self.sampling.accept(token)
        except ValueError as error:
            return self.end("error", now, str(error))
        text = ""
        stop: str | int | None = None
        if (token in self._eos and not params.ignore_eos) or token in params.stop_token_ids:
            self.finish_reason = "stop"
            stop = token if token in params.stop_token_ids else None
        elif self._text is not None:
            text = self._text.push(token)
            if self._text.stopped is not None:
                self.finish_reason, stop = "stop", self._text.stopped
        grammar = self.sampling.grammar
        if self.finish_reason is None and grammar is not None and grammar.finished:
            self.finish_reason = "stop"
        if self.finish_reason is None and len(self.token_ids) >= self.request.max_tokens:
            self.finish_reason = "length"
        logprobs = None if sampled.logprobs is None else (sampled.logprobs,)
        depths = () if depth is None else (depth,)
        return self._delta(now, (token,), text, logprobs, depths, stop)

    def end(self, reason: FinishReason, now: float, error: str | None = None) -> Delta:
        """End without another token: aborted, out of time, failed, or nothing to generate.

        Args:
            reason: why.
            now: time on the engine's clock, in seconds.
            error: what failed, for the reason `"error"`.

        Returns:
            The last delta, with the text that was held back.
        """
        self.finish_reason = reason
        return self._delta(now, (), "", None, (), None, error)

    def _delta(
        self,
        now: float,
        token_ids: tuple[int, ...],
        text: str,
        logprobs: tuple[TokenLogprobs, ...] | None,
        depths: tuple[int, ...],
        stop: str | int | None,
        error: str | None = None,
    ) -> Delta:
        usage = timings = None
        if self.finish_reason is not None:
            if self._text is not None:
                text += self._text.finish()
                if stop is None and self._text.stopped is not None:
                    # An incomplete character, written at the end, completed a stop string.
                    stop, self.finish_reason = self._text.stopped, "stop"
            prompt = len(self.request.prompt_ids)
            usage = Usage(prompt, len(self.token_ids), self.cached_tokens)
            timings = self._timings(now)
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        return Delta(
            request_id=self.request.id,
            index=self.index,
            token_ids=token_ids,
            text=text,
            logprobs=logprobs,
            depths=depths,
            prompt_logprobs=prompt_logprobs,
            finish_reason=self.finish_reason,
            stop=stop,
            error=error,
            usage=usage,
            timings=timings,
        )

    def _timings(self, now: float) -> Timings:
        start = self.request.arrival
        return Timings(
            scheduled=None if self._scheduled is None else self._scheduled - start,
            first_token=None if self._first_token is None else self._first_token - start,
            finished=now - start,
        )
