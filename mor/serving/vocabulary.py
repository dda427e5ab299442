"""A tokenizer as serving sees it: ids to text, and the bytes of a single token."""

import codecs
import re
from collections.abc import Sequence
from copy import copy
from functools import lru_cache
from typing import Any

__all__ = ["Vocabulary", "incomplete_bytes"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@lru_cache(maxsize=1)
def _byte_level_alphabet() -> dict[str, int]:
    """The byte of each character in the tokens of a byte-level tokenizer (as of GPT-2).

    Printable bytes stand for themselves, the others are moved up from 256 in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    moved = [byte for byte in range(256) if chr(byte) not in alphabet]
    alphabet.update({chr(256 + place): byte for place, byte in enumerate(moved)})
    return alphabet


def incomplete_bytes(tail: bytes) -> int:
    """Count the bytes at the end that begin a UTF-8 character which is not complete.

    Args:
        tail: the last bytes of a text.

    Returns:
        0 to 3.

    Example:
        >>> incomplete_bytes("1 €".encode()[:-1])
        2
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(tail)
    return len(decoder.getstate()[0])


class Vocabulary:
    """Tokens of a Transformers tokenizer, fast or slow, without padding and truncation.

    Args:
        tokenizer: the tokenizer.

    Attributes:
        tokenizer: the same.
        size: one more than the largest id.
        byte_level: tokens are bytes, so a text is decoded from all of them at once (as GPT-2's).
    """

    def __init__(self, tokenizer: Any) -> None:
        """Look at how the tokenizer writes bytes."""
        self.tokenizer = tokenizer
        self._tokens = {index: token for token, index in tokenizer.get_vocab().items()}
        self.size = max(self._tokens) + 1
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None and (self._backend.padding or self._backend.truncation):
            self._backend = copy(self._backend)
            self._backend.no_padding()
            self._backend.no_truncation()
        decoder = str(getattr(self._backend, "decoder", None))
        self.byte_level = "ByteLevel" in decoder
        self._added = set(getattr(tokenizer, "added_tokens_decoder", {}))
        self._special = set(tokenizer.all_special_ids)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Tokens of a text. Several threads may call this; a call of the tokenizer they may not.

        Args:
            text: the text.
            add_special_tokens: as the tokenizer adds them, BOS for example.

        Returns:
            The tokens.
        """
        if self._backend is not None:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of tokens, without any clean-up of spaces.

        Args:
            ids: the tokens.
            skip_special_tokens: leave special tokens out.

        Returns:
            The text, with U+FFFD where bytes are no UTF-8.
        """
        if self._backend is not None:
            return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))
        return str(
            self.tokenizer.decode(
                list(ids),
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        )

    def token_bytes(self, token_id: int, skip_special_tokens: bool = False) -> bytes:
        """Bytes that a token adds to a text.

        Args:
            token_id: the token.
            skip_special_tokens: special tokens add none.

        Returns:
            The bytes, which need not be UTF-8 on their own; none for an id without a token.
        """
        token = self._tokens.get(token_id)
        if token is None or (skip_special_tokens and token_id in self._special):
            return b""
        if token_id in self._added:
            return token.encode()
        if self.byte_level:
            alphabet = _byte_level_alphabet()
            if all(character in alphabet for character in token):
                return bytes(alphabet[character] for character in token)
            return token.encode()
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace("\u2581", " ").encode()

    def token_text(self, token_id: int) -> str:
        r"""Text of one token as log probabilities name it.

        Args:
            token_id: the token.

        Returns:
            Its text, or `bytes:` with escaped bytes where they are no UTF-8 on their own, as in
            OpenAI's API: different tokens keep different names.
        """
        data = self.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
