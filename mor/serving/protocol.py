"""Bodies of OpenAI's API that clients send, and their translation to sampling parameters.

A parameter that would change the answer and is not supported is refused by name; one that changes
nothing is accepted. Nothing is ignored that a client could miss.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from mor.serving.errors import ApiError
from mor.serving.requests import MAX_LOGPROBS, Grammar, RequestError, SamplingParams, shown

__all__ = [
    "ChatCompletionBody",
    "CompletionBody",
    "DetokenizeBody",
    "ServerLimits",
    "TokenizeBody",
    "parse_body",
    "to_params",
]

#: Accepted, as they change no answer.
_WITHOUT_EFFECT = frozenset(
    {
        "user",
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)

#: Values of unsupported parameters that ask for what happens anyway.
_DEFAULTS: Mapping[str, tuple[object, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
}


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """Limits of one HTTP request.

    Attributes:
        body_bytes: size of a body; more is 413.
        prompts: prompts of one completion request.
        n: continuations of a prompt.
        stops: stop strings.
        stop_characters: of one stop string.
        messages: of one chat.
    """

    body_bytes: int = 4 * 2**20
    prompts: int = 256
    n: int = 16
    stops: int = 4
    stop_characters: int = 256
    messages: int = 1024


_Kind = TypeVar("_Kind", bound="_Body")


class _Body(BaseModel):
    """Unknown parameters are refused by name, but for those without effect."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _unsupported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ApiError(400, f"expected an object of JSON, got {shown(data)}")
        known = {field.alias or name for name, field in cls.model_fields.items()}
        # An absent parameter and null are the same in OpenAI's API.
        kept = {name: value for name, value in data.items() if value is not None}
        for name in list(kept):
            if name in known:
                continue
            if name in _WITHOUT_EFFECT or kept[name] in _DEFAULTS.get(name, ()):
                del kept[name]
            elif name in _DEFAULTS:
                message = f"{name[:100]}: this server does not support it"
                raise ApiError(400, message, param=name, code="unsupported_parameter")
            else:
                message = f"{name[:100]}: there is no such parameter"
                raise ApiError(400, message, param=name, code="unknown_parameter")
        return kept


class _StreamOptions(_Body):
    include_usage: bool = False


class _JsonSchema(_Body):
    name: str = ""
    description: str = ""
    strict: bool = True
    schema_: dict[str, JsonValue] = Field(default_factory=dict, alias="schema")


class _ResponseFormat(_Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None


class _StructuredOutputs(_Body):
    json_: dict[str, JsonValue] | str | None = Field(default=None, alias="json")
    regex: str | None = None


# One wrong element is enough: a list of a million must not make a million errors.
_Strings = Annotated[list[str], Field(fail_fast=True)]
_Integers = Annotated[list[int], Field(fail_fast=True)]


class _SamplingBody(_Body):
    """Parameters of both kinds of completion."""

    model: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    stop: str | _Strings = Field(default_factory=list)
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, Any] = Field(default_factory=dict)
    stream: bool = False
    stream_options: _StreamOptions | None = None
    response_format: _ResponseFormat | None = None
    # As other engines call them.
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop_token_ids: _Integers = Field(default_factory=list)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    structured_outputs: _StructuredOutputs | None = None
    # Ours.
    max_recursions: int | None = None
    exit_threshold: float | None = None
    priority: int = 0
    deadline_s: float | None = None
    return_depths: bool = False

    @property
    def include_usage(self) -> bool:
        """The last chunk of a stream has the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(_SamplingBody):
    """Body of `/v1/completions`."""

    prompt: str | _Strings | _Integers | Annotated[list[_Integers], Field(fail_fast=True)]
    max_tokens: int = 16
    echo: bool = False
    logprobs: int | None = None
    add_special_tokens: bool = True


class TextPart(_Body):
    """Text in the content of a message."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = None
    refusal: str | None = None

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


_Messages = Annotated[list[Message], Field(fail_fast=True)]


class ChatCompletionBody(_SamplingBody):
    """Body of `/v1/chat/completions`."""

    messages: _Messages
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None


class TokenizeBody(_Body):
    """Body of `/tokenize`: a text, or a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: _Messages | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeBody(_Body):
    """Body of `/detokenize`."""

    model: str | None = None
    tokens: _Integers


def parse_body(kind: type[_Kind], data: bytes, limits: ServerLimits) -> _Kind:
    """Read a body.

    Args:
        kind: the class of the body.
        data: what the client sent.
        limits: of the server.

    Returns:
        The body.

    Raises:
        ApiError: 413 for a body that is too long, 400 for any other that is not one.
        RequestError: the body asks for more than the server's limits.
    """
    if len(data) > limits.body_bytes:
        message = f"body: expected at most {limits.body_bytes} bytes, got {len(data)}"
        raise ApiError(413, message, code="body_too_large")
    try:
        value = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        # UnicodeDecodeError is a ValueError.
        reason = "nesting too deep" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"body: expected JSON: {reason}", code="invalid_json") from None
    try:
        body = kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        # Alternatives of a union are named in the place too: the parameter comes first.
        place = ".".join(str(part) for part in first["loc"][:3])
        message = f"{place or 'body'}: {first['msg']}"
        param = str(first["loc"][0]) if first["loc"] else None
        raise ApiError(400, message, param=param, code="invalid_value") from None
    except RecursionError:
        raise ApiError(400, "body: nesting too deep", code="invalid_json") from None
    _check_limits(body, limits)
    return body


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _check_limits(body: _Body, limits: ServerLimits) -> None:
    if isinstance(body, _SamplingBody):
        if body.n > limits.n:
            raise RequestError("n", f"at most {limits.n}", shown(body.n))
        stops = [body.stop] if isinstance(body.stop, str) else body.stop
        if len(stops) > limits.stops:
            raise RequestError("stop", f"at most {limits.stops} strings", shown(stops))
        longest = max(map(len, stops), default=0)
        if longest > limits.stop_characters:
            expected = f"strings of at most {limits.stop_characters} characters"
            raise RequestError("stop", expected, f"{longest}")
        if body.deadline_s is not None and not 0 < body.deadline_s < math.inf:
            raise RequestError("deadline_s", "a positive number", shown(body.deadline_s))
        if body.stream_options is not None and not body.stream:
            raise RequestError("stream_options", "stream = true", "stream = false")
    if isinstance(body, ChatCompletionBody | TokenizeBody):
        if len(body.messages or ()) > limits.messages:
            expected = f"at most {limits.messages} messages"
            raise RequestError("messages", expected, shown(body.messages))


def to_params(body: CompletionBody | ChatCompletionBody) -> SamplingParams:
    """Translate a body into sampling parameters.

    Args:
        body: of either kind of completion.

    Returns:
        The parameters. What depends on the model is checked by `Request.make`.

    Raises:
        RequestError: a value that no model can serve.
    """
    common: dict[str, Any] = {
        name: getattr(body, name)
        for name in (
            "min_tokens",
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "seed",
            "n",
            "stop",
            "stop_token_ids",
            "ignore_eos",
            "max_recursions",
            "exit_threshold",
            "skip_special_tokens",
        )
    }
    common["top_k"] = 0 if body.top_k == -1 else body.top_k
    common["logit_bias"] = _logit_bias(body.logit_bias)
    common["grammar"] = _grammar(body)
    if isinstance(body, CompletionBody):
        return SamplingParams(
            max_tokens=body.max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
            **common,
        )
    if body.top_logprobs is not None:
        if not body.logprobs:
            raise RequestError("top_logprobs", "logprobs = true", "logprobs = false")
        if not 0 <= body.top_logprobs <= MAX_LOGPROBS:
            expected = f"an integer in 0..{MAX_LOGPROBS}"
            raise RequestError("top_logprobs", expected, shown(body.top_logprobs))
    tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return SamplingParams(
        max_tokens=tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        **common,
    )


def _logit_bias(bias: Mapping[str, Any]) -> dict[int, float]:
    found = {}
    for token, value in bias.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise RequestError("logit_bias", "token ids as keys", shown(token))
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not -100 <= value <= 100:
            raise RequestError("logit_bias", "numbers in -100..100", shown(value))
        found[int(token)] = value
    return found


def _grammar(body: _SamplingBody) -> Grammar | None:
    grammars = []
    if (form := body.response_format) is not None and form.type != "text":
        schema: Any = {"type": "object"}
        if form.type == "json_schema":
            if form.json_schema is None:
                raise RequestError("response_format", "a json_schema", "none")
            schema = form.json_schema.schema_
        grammars.append(Grammar("json_schema", json.dumps(schema)))
    if (structured := body.structured_outputs) is not None:
        if structured.json_ is not None:
            source = structured.json_
            source = source if isinstance(source, str) else json.dumps(source)
            grammars.append(Grammar("json_schema", source))
        if structured.regex is not None:
            grammars.append(Grammar("regex", structured.regex))
    if len(grammars) > 1:
        raise RequestError("structured_outputs", "one grammar", f"{len(grammars)}")
    return grammars[0] if grammars else None
