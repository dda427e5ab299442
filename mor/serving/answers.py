"""Answers in OpenAI's form: whole bodies, chunks of a stream, server-sent events.

A body is made by `json.dumps`, with every character outside ASCII escaped (U+2028 ends a line for
some readers) and without numbers that JSON does not have.
"""

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mor.serving.detokenize import prompt_text
from mor.serving.errors import ApiError, error_body
from mor.serving.outputs import Delta, Output, TokenLogprobs, Usage
from mor.serving.prompts import Prompt, ServedModel
from mor.serving.protocol import ChatCompletionBody, CompletionBody
from mor.serving.vocabulary import Vocabulary

__all__ = ["DONE", "ChatAnswer", "CompletionAnswer", "dumps", "error_event", "event"]

#: The last event of a stream.
DONE = b"data: [DONE]\n\n"

#: Stands for the log probability of what cannot be sampled, as in OpenAI's API.
_LEAST = -9999.0


def dumps(body: Any) -> bytes:
    """A body as JSON in ASCII.

    Args:
        body: of objects, lists, strings and finite numbers.

    Returns:
        The JSON.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    return json.dumps(body, allow_nan=False, separators=(",", ":")).encode("ascii")


def event(body: Any) -> bytes:
    r"""A server-sent event.

    Args:
        body: what is sent.

    Returns:
        One line of data and an empty line.

    Example:
        >>> event({"text": "\u2028"})
        b'data: {"text":"\\u2028"}\n\n'
    """
    return b"data: " + dumps(body) + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """The event that tells of an error within a stream, which OpenAI's client raises.

    Args:
        error: what happened.

    Returns:
        The event; `DONE` does not follow.
    """
    return event(error_body(error))


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)


def _sum_usage(outputs: Sequence[Delta], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Usage of all continuations, each prompt counted once."""
    usages = [(output.index, output.usage or Usage(0, 0)) for output in outputs]
    prompt = sum(len(prompt.ids) for prompt in prompts)
    completion = sum(usage.completion_tokens for _, usage in usages)
    cached = sum(usage.cached_tokens for index, usage in usages if index == 0)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _raise_error(outputs: Sequence[Delta]) -> None:
    for output in outputs:
        if output.finish_reason == "error":
            raise ApiError(500, f"generation failed: {output.error}", code="generation_failed")


@dataclass
class _Answer:
    """Common base of both kinds of completion.

    Attributes:
        model: that is served.
        created: seconds since 1970.
        id: of the answer, drawn.
    """

    model: ServedModel
    created: int
    id: str = field(default_factory=lambda: secrets.token_hex(12))

    #: Beginning of the id, and OpenAI's names of a whole body and of a chunk.
    _names: ClassVar[tuple[str, str, str]]

    def _head(self, chunk: bool, usage: bool) -> dict[str, Any]:
        """Fields that begin every body. Chunks tell that usage will come, if it was asked for."""
        prefix, whole, part = self._names
        return {
            "id": f"{prefix}-{self.id}",
            "object": part if chunk else whole,
            "created": self.created,
            "model": self.model.name,
            **({"usage": None} if usage else {}),
        }

    def _end(self, usage: dict[str, Any] | None) -> list[bytes]:
        """The usage, if it was asked for, and `DONE`."""
        if usage is None:
            return [DONE]
        return [event(self._head(True, False) | {"choices": [], "usage": usage}), DONE]


@dataclass
class CompletionAnswer(_Answer):
    """Answers to `/v1/completions`.

    Continuation `index` of prompt `p` is choice `p * n + index`.

    Attributes:
        body: of the request.
        prompts: its prompts.
    """

    _names = ("cmpl", "text_completion", "text_completion")

    body: CompletionBody = field(kw_only=True)
    prompts: Sequence[Prompt] = field(kw_only=True)

    def __post_init__(self) -> None:
        """Prepare what is remembered of each choice within a stream."""
        self._offsets = dict[int, int]()
        self._sent_echo = set[int]()

    def _echo(self, prompt: Prompt) -> str:
        if not self.body.echo:
            return ""
        if prompt.text is not None:
            return prompt.text
        skip = self.body.skip_special_tokens
        return prompt_text(self.model.vocabulary, prompt.ids, skip)

    def _choice(self, place: int, delta: Delta) -> dict[str, Any]:
        """A choice of a body, or of a chunk, which differ in what came before only."""
        number = place * self.body.n + delta.index
        prompt, text = self.prompts[place], delta.text
        ids: list[int] = list(delta.token_ids)
        entries: list[TokenLogprobs | None] = list(delta.logprobs or ())
        if self.body.echo and number not in self._sent_echo:
            self._sent_echo.add(number)
            text = self._echo(prompt) + text
            ids = [*prompt.ids, *ids]
            entries = [*(delta.prompt_logprobs or [None] * len(prompt.ids)), *entries]
        choice: dict[str, Any] = {
            "index": number,
            "text": text,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop,
        }
        if self.body.logprobs is not None:
            choice["logprobs"] = self._logprobs(number, ids, entries)
        if self.body.return_depths:
            choice["depths"] = list(delta.depths)
        return choice

    def _logprobs(
        self, number: int, ids: Sequence[int], entries: Sequence[TokenLogprobs | None]
    ) -> dict[str, Any]:
        vocabulary = self.model.vocabulary
        tokens = [vocabulary.token_text(token) for token in ids]
        skip = self.body.skip_special_tokens
        offsets, offset = [], self._offsets.get(number, 0)
        for token in ids:
            offsets.append(offset)
            offset += len(vocabulary.token_bytes(token, skip).decode(errors="replace"))
        self._offsets[number] = offset
        return {
            "tokens": tokens,
            "token_logprobs": [None if e is None else _finite(e.logprob) for e in entries],
            "top_logprobs": [None if e is None else _named(e, vocabulary) for e in entries],
            "text_offset": offsets,
        }

    def whole(self, outputs: Sequence[Sequence[Output]]) -> dict[str, Any]:
        """The body of an answer that is no stream.

        Args:
            outputs: the continuations of each prompt.

        Returns:
            The body.

        Raises:
            ApiError: a continuation failed.
        """
        every = [output for prompt in outputs for output in prompt]
        _raise_error(every)
        return self._head(False, False) | {
            "choices": [
                self._choice(place, output)
                for place, prompt in enumerate(outputs)
                for output in prompt
            ],
            "usage": _sum_usage(every, self.prompts),
        }

    def chunk(self, place: int, delta: Delta) -> list[bytes]:
        """Events of one delta.

        Args:
            place: of its prompt.
            delta: what is new.

        Returns:
            The events; none where nothing can be seen yet.

        Raises:
            ApiError: the continuation failed. The stream ends with `error_event`.
        """
        _raise_error([delta])
        nothing = not delta.text and not delta.token_ids and not delta.finish_reason
        if nothing and delta.prompt_logprobs is None:
            return []
        head = self._head(True, self.body.include_usage)
        return [event(head | {"choices": [self._choice(place, delta)]})]

    def end(self, last: Sequence[Delta]) -> list[bytes]:
        """Events after the last delta.

        Args:
            last: the last delta of each continuation of each prompt.

        Returns:
            The usage, if it was asked for, and `DONE`.
        """
        return self._end(_sum_usage(last, self.prompts) if self.body.include_usage else None)


def _named(entry: TokenLogprobs, vocabulary: Vocabulary) -> dict[str, float]:
    """The most probable tokens by text. One whose text is there already goes by its number."""
    named: dict[str, float] = {}
    places = dict(entry.top)
    places.setdefault(entry.token_id, entry.logprob)
    for token, logprob in places.items():
        name = vocabulary.token_text(token)
        named[f"token_id:{token}" if name in named else name] = _finite(logprob)
    return named


@dataclass
class ChatAnswer(_Answer):
    """Answers to `/v1/chat/completions`.

    Attributes:
        body: of the request.
        prompt: the chat.
    """

    _names = ("chatcmpl", "chat.completion", "chat.completion.chunk")

    body: ChatCompletionBody = field(kw_only=True)
    prompt: Prompt = field(kw_only=True)

    def __post_init__(self) -> None:
        """Remember which choices have told their role."""
        self._begun = set[int]()

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.model.vocabulary.token_bytes(token)
        return {
            "token": self.model.vocabulary.token_text(token),
            "logprob": _finite(logprob),
            "bytes": list(data),
        }

    def _logprobs(self, entries: Sequence[TokenLogprobs] | None) -> dict[str, Any] | None:
        if entries is None:
            return None
        content = [
            self._token(entry.token_id, entry.logprob)
            | {"top_logprobs": [self._token(token, logprob) for token, logprob in entry.top]}
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def _choice(self, delta: Delta, message: dict[str, Any]) -> dict[str, Any]:
        choice = {
            "index": delta.index,
            **message,
            "logprobs": self._logprobs(delta.logprobs),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop,
        }
        if self.body.return_depths:
            choice["depths"] = list(delta.depths)
        return choice

    def whole(self, outputs: Sequence[Output]) -> dict[str, Any]:
        """The body of an answer that is no stream.

        Args:
            outputs: the continuations.

        Returns:
            The body.

        Raises:
            ApiError: a continuation failed.
        """
        _raise_error(outputs)
        choices = []
        for output in outputs:
            message = {"role": "assistant", "content": output.text, "refusal": None}
            choices.append(self._choice(output, {"message": message}))
        usage = {"usage": _sum_usage(outputs, [self.prompt])}
        return self._head(False, False) | {"choices": choices} | usage

    def chunk(self, delta: Delta) -> list[bytes]:
        """Events of one delta: before the first of a choice, one with its role.

        Args:
            delta: what is new.

        Returns:
            The events; none where nothing can be seen yet.

        Raises:
            ApiError: the continuation failed. The stream ends with `error_event`.
        """
        _raise_error([delta])
        head = self._head(True, self.body.include_usage)
        events = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            first = Delta(request_id=delta.request_id, index=delta.index)
            role = {"delta": {"role": "assistant", "content": ""}}
            events.append(event(head | {"choices": [self._choice(first, role)]}))
        if delta.text or delta.token_ids or delta.finish_reason:
            content = {"delta": {"content": delta.text} if delta.text else {}}
            events.append(event(head | {"choices": [self._choice(delta, content)]}))
        return events

    def end(self, last: Sequence[Delta]) -> list[bytes]:
        """Events after the last delta.

        Args:
            last: the last delta of each continuation.

        Returns:
            The usage, if it was asked for, and `DONE`.
        """
        return self._end(_sum_usage(last, [self.prompt]) if self.body.include_usage else None)
