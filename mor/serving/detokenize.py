"""Text of a sequence, token by token: whole characters only, and nothing of a stop string.

`tokenizers.DecodeStream` does the first half but for three cases, which is why it is not used: it
holds back an endless run of invalid bytes for ever, it repeats a prompt that ends within a
character, and what it holds at the end cannot be read. The joined texts equal the text decoded at
once.
"""

import codecs
from collections.abc import Sequence

from mor.serving.vocabulary import Vocabulary, incomplete_bytes

__all__ = ["TextStream", "prompt_text"]

#: Tokens before a token that may decide how it is written (whether a space precedes it).
_CONTEXT = 8


class _Decoder:
    """Characters of a sequence of tokens, each as soon as no later token can change it.

    `window` holds the last tokens that have text: the first `read` are written and stay as context,
    the others are pending. `written` counts the characters of the window's text that were returned.
    """

    def __init__(
        self, vocabulary: Vocabulary, prompt_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._vocabulary = vocabulary
        self._skip = skip_special_tokens
        self._window = list(prompt_ids[-_CONTEXT:])
        cut, extra = _incomplete_tail(vocabulary, self._window, skip_special_tokens)
        self._read = len(self._window) - cut
        self._written = len(self._text(self._window[: self._read])) + extra
        # Only asked whether a character is incomplete; the tokenizer makes the text.
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in self._window:
            self._bytes.decode(vocabulary.token_bytes(token_id, skip_special_tokens))

    def _text(self, ids: Sequence[int]) -> str:
        return self._vocabulary.decode(ids, self._skip)

    def push(self, token_id: int) -> str:
        """Add a token, return the characters that are complete."""
        data = self._vocabulary.token_bytes(token_id, self._skip)
        if not data:
            return ""
        self._bytes.decode(data)
        self._window.append(token_id)
        text = self._text(self._window)
        whole = not self._bytes.getstate()[0]
        if whole:
            certain = len(text)
        elif self._vocabulary.byte_level:
            # The incomplete character is one U+FFFD.
            certain = len(text) - 1
        else:
            # With byte fallback it is one for each byte, and changes those of the bytes before.
            certain = self._written
        new = text[self._written : certain]
        self._written = max(self._written, certain)
        if whole and (new or len(self._window) - self._read > _CONTEXT):
            self._window = self._window[self._read :]
            self._read = len(self._window)
            self._written = len(self._text(self._window))
        return new

    def finish(self) -> str:
        """Return what is held back, incomplete characters as U+FFFD."""
        return self._text(self._window)[self._written :]


def _incomplete_tail(
    vocabulary: Vocabulary, ids: Sequence[int], skip_special_tokens: bool
) -> tuple[int, int]:
    """Tokens at the end that hold an incomplete character, and characters before it in them."""
    last = [vocabulary.token_bytes(token, skip_special_tokens) for token in ids[-_CONTEXT:]]
    missing = incomplete_bytes(b"".join(last))
    cut, size = 0, 0
    while size < missing:
        cut += 1
        size += len(last[-cut])
    before = b"".join(last[len(last) - cut :])[: size - missing] if cut else b""
    return cut, len(before.decode(errors="replace"))


def prompt_text(
    vocabulary: Vocabulary, prompt_ids: Sequence[int], skip_special_tokens: bool = True
) -> str:
    """Text of a prompt that a `TextStream` continues.

    Args:
        vocabulary: of the tokenizer.
        prompt_ids: tokens of the prompt.
        skip_special_tokens: leave special tokens out.

    Returns:
        The text, without an incomplete character at the end: that belongs to the continuation.
    """
    cut, extra = _incomplete_tail(vocabulary, prompt_ids, skip_special_tokens)
    text = vocabulary.decode(prompt_ids, skip_special_tokens)
    if not cut:
        return text
    end = len(prompt_ids) - cut
    return text[: len(vocabulary.decode(prompt_ids[:end], skip_special_tokens)) + extra]


class TextStream:
    """Text of one continuation as its tokens come.

    Args:
        vocabulary: of the tokenizer.
        prompt_ids: tokens of the prompt, which decide how the first token is written.
        stop: strings that end the text. Of several, that which is complete first ends it; of
            those, the longest. The text ends before it. Nothing matches within the prompt.
        min_tokens: a stop string that is complete before this many tokens ends nothing.
        skip_special_tokens: leave special tokens out.

    Attributes:
        stopped: the stop string that ended the text.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt_ids: Sequence[int],
        *,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        """Start after the prompt."""
        self._decoder = _Decoder(vocabulary, prompt_ids, skip_special_tokens)
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._tokens = 0
        self._held = ""
        self.stopped: str | None = None

    def push(self, token_id: int) -> str:
        """Add a token.

        Args:
            token_id: the token. A token that ends the sequence is not pushed.

        Returns:
            The text that is certain: complete characters that no stop string begins with. After a
            stop string it is the text before it, and `stopped` is set.
        """
        self._tokens += 1
        return self._release(self._decoder.push(token_id), end=False)

    def finish(self) -> str:
        """End the sequence for another reason than a stop string.

        Returns:
            All that was held back.
        """
        if self.stopped is not None:
            return ""
        return self._release(self._decoder.finish(), end=True)

    def _release(self, new: str, end: bool) -> str:
        if not self._stop:
            return new
        before = len(self._held)
        self._held += new
        if self._tokens >= self._min_tokens:
            matches = []
            for stop in self._stop:
                start = self._held.find(stop, max(0, before - len(stop) + 1))
                if start >= 0:
                    matches.append((start + len(stop), start, stop))
            if matches:
                _, start, self.stopped = min(matches)
                text, self._held = self._held[:start], ""
                return text
        keep = 0 if end else self._begun()
        text, self._held = self._held[: len(self._held) - keep], self._held[-keep:] if keep else ""
        return text

    def _begun(self) -> int:
        """Characters at the end that a stop string begins with."""
        longest = max(len(stop) for stop in self._stop) - 1
        for keep in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-keep:]
            if any(stop.startswith(tail) for stop in self._stop):
                return keep
        return 0
