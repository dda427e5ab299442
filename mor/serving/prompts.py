"""A server's uses of a tokenizer: prompts, chats, `/tokenize`, `/tokenizer_info`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mor.serving.errors import ApiError
from mor.serving.protocol import (
    CompletionBody,
    DetokenizeBody,
    Message,
    ServerLimits,
    TokenizeBody,
)
from mor.serving.requests import ModelLimits, RequestError, check_token_ids, shown
from mor.serving.vocabulary import Vocabulary

__all__ = ["Prompt", "ServedModel"]


@dataclass(frozen=True)
class Prompt:
    """One prompt of a request.

    Attributes:
        ids: its tokens.
        text: as the client wrote it; None for a list of tokens.
    """

    ids: tuple[int, ...]
    text: str | None = None


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """The model that a server has, as clients see it.

    Attributes:
        name: by which clients ask for it.
        vocabulary: of its tokenizer.
        limits: what the model can serve.
        created: seconds since 1970, for `/v1/models`.
        owner: for `/v1/models`.
    """

    name: str
    vocabulary: Vocabulary
    limits: ModelLimits
    created: int = 0
    owner: str = "mor"

    def check_name(self, name: str | None) -> None:
        """Refuse a request for another model.

        Args:
            name: what the client asks for; None asks for any.

        Raises:
            ApiError: 404.
        """
        if name is not None and name != self.name:
            message = f"model: expected {self.name!r}, got {shown(name)}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def models(self) -> dict[str, Any]:
        """Return the body of `/v1/models`."""
        return {"object": "list", "data": [self.model()]}

    def model(self) -> dict[str, Any]:
        """Return the body of `/v1/models/NAME`."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": self.owner,
            "max_model_len": self.limits.context_length,
            "num_recursions": self.limits.num_recursions,
        }

    def prompts(self, body: CompletionBody, limits: ServerLimits) -> list[Prompt]:
        """Tokens of the prompts of a completion.

        Args:
            body: of the request.
            limits: of the server.

        Returns:
            One prompt or more, whose tokens `Request.make` checks.

        Raises:
            RequestError: there is none, there are too many, or one is not text or tokens.
        """
        given = body.prompt
        one = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
        several: list[Any] = [given] if one else list(given)
        if not several:
            raise RequestError("prompt", "at least one token", "none")
        if len(several) > limits.prompts:
            raise RequestError("prompt", f"at most {limits.prompts} prompts", f"{len(several)}")
        return [self._prompt(prompt, body.add_special_tokens) for prompt in several]

    def _prompt(self, prompt: str | list[int], add_special_tokens: bool) -> Prompt:
        if isinstance(prompt, str):
            return Prompt(tuple(self.encode(prompt, add_special_tokens)), prompt)
        return Prompt(tuple(prompt))

    def encode(self, text: str, add_special_tokens: bool, option: str = "prompt") -> list[int]:
        """Tokens of a text.

        Args:
            text: the text.
            add_special_tokens: as the tokenizer adds them, BOS for example.
            option: the parameter that the text comes from.

        Returns:
            The tokens.

        Raises:
            RequestError: the text has half a surrogate pair, which no UTF-8 has.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RequestError(option, "Unicode text", "half a surrogate pair") from None
        return self.vocabulary.encode(text, add_special_tokens)

    def chat(self, messages: Sequence[Message]) -> Prompt:
        """Tokens of a chat, up to where the assistant answers.

        The template writes the special tokens itself, so the tokenizer adds none.

        Args:
            messages: of the chat.

        Returns:
            The prompt, with the text of the template.

        Raises:
            ApiError: 400 if the model has no chat template: none is guessed.
            RequestError: there is no message, or the template refuses them.
        """
        tokenizer = self.vocabulary.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            message = f"messages: {self.name} has no chat template; use /v1/completions"
            raise ApiError(400, message, param="messages", code="no_chat_template")
        if not messages:
            raise RequestError("messages", "at least one message", "none")
        turns = [
            {"role": message.role, "content": message.text}
            | ({"name": message.name} if message.name is not None else {})
            for message in messages
        ]
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # A template is code of the model's author.
            reason = str(error)[:200]
            raise RequestError("messages", "what the chat template takes", reason) from error
        return Prompt(tuple(self.encode(text, False, "messages")), text)

    def tokenize(self, body: TokenizeBody) -> dict[str, Any]:
        """Answer `/tokenize`.

        Args:
            body: a text or a chat.

        Returns:
            The body of the answer.

        Raises:
            RequestError: there are both, or neither.
        """
        if (body.prompt is None) == (body.messages is None):
            got = "neither" if body.prompt is None else "both"
            raise RequestError("prompt", "either prompt or messages", got)
        if body.messages is not None:
            ids = list(self.chat(body.messages).ids)
        else:
            ids = self.encode(body.prompt or "", body.add_special_tokens)
        strings = None
        if body.return_token_strs:
            strings = self.vocabulary.tokenizer.convert_ids_to_tokens(ids)
        return {
            "count": len(ids),
            "max_model_len": self.limits.context_length,
            "tokens": ids,
            "token_strs": strings,
        }

    def detokenize(self, body: DetokenizeBody) -> dict[str, Any]:
        """Answer `/detokenize`.

        Args:
            body: the tokens.

        Returns:
            The body of the answer, special tokens as they are written.

        Raises:
            RequestError: an id is not in the vocabulary.
        """
        check_token_ids("tokens", body.tokens, self.limits)
        return {"prompt": self.vocabulary.decode(body.tokens, skip_special_tokens=False)}

    def tokenizer_info(self) -> dict[str, Any]:
        """Answer `/tokenizer_info`, by which clients count and template as the server does."""
        tokenizer = self.vocabulary.tokenizer
        names = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": self.limits.vocab_size,
            "model_max_length": self.limits.context_length,
            **{name: getattr(tokenizer, name, None) for name in names},
        }
