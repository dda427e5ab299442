"""Grammars through llguidance: which tokens may come next (`pip install mor[structured]`)."""

import json
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mor.serving.requests import Grammar, RequestError

__all__ = ["Grammars", "Matcher"]

#: Compiled grammars that are remembered.
_REMEMBERED = 64


class Matcher:
    """The state of a grammar after some tokens.

    Args:
        matcher: llguidance's.
        vocab_size: tokens of the model.
    """

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        """Start where the matcher stands."""
        self._matcher = matcher
        self._vocab_size = vocab_size

    def copy(self) -> "Matcher":
        """Return another matcher in the same state, for another continuation."""
        return Matcher(self._matcher.deep_copy(), self._vocab_size)

    @property
    def finished(self) -> bool:
        """The text is complete and nothing may follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> NDArray[np.bool_]:
        """Find the tokens that may come next.

        Returns:
            `[V]`; only ends of sequence once the text is complete.

        Raises:
            ValueError: the grammar exceeds llguidance's limits.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._raise()
        mask = np.unpackbits(bits, count=min(8 * len(bits), self._vocab_size), bitorder="little")
        return np.pad(mask, (0, self._vocab_size - len(mask))).astype(np.bool_)

    def accept(self, token_id: int) -> None:
        """Advance by a token.

        Args:
            token_id: one of those allowed.

        Raises:
            ValueError: the token is not allowed.
        """
        if not self.finished:
            self._matcher.consume_token(token_id)
            self._raise()

    def _raise(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"grammar: {self._matcher.get_error()[:200]}")


class Grammars:
    """Grammars over one tokenizer, compiled once each. Methods may be called from any thread.

    Args:
        tokenizer: a fast Transformers tokenizer.
        vocab_size: tokens that can be sampled.
        eos_token_ids: tokens that end a sequence.

    Raises:
        ModuleNotFoundError: llguidance is not installed.
        ValueError: the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        """Build llguidance's view of the tokenizer, which takes about a second."""
        try:
            import llguidance
            import llguidance.hf
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "grammar: expected llguidance to be installed; run `pip install mor[structured]`"
            ) from error
        self._llguidance = llguidance
        self._vocab_size = vocab_size
        self._tokenizer = llguidance.hf.from_tokenizer(
            tokenizer, n_vocab=vocab_size, eos_token=list(eos_token_ids) or None
        )
        self._lock = threading.Lock()
        self._compiled: OrderedDict[Grammar, Matcher] = OrderedDict()

    def matcher(self, grammar: Grammar) -> Matcher:
        """Return a matcher at the start of a text.

        Args:
            grammar: the form of the text.

        Returns:
            A matcher of its own.

        Raises:
            RequestError: llguidance does not understand the grammar.
        """
        with self._lock:
            found = self._compiled.get(grammar)
        if found is None:
            found = self._compile(grammar)
        with self._lock:
            self._compiled[grammar] = found
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > _REMEMBERED:
                self._compiled.popitem(last=False)
            return found.copy()

    def _compile(self, grammar: Grammar) -> Matcher:
        matcher = self._llguidance.LLMatcher
        try:
            if grammar.kind == "json_schema":
                if not isinstance(json.loads(grammar.source), dict | bool):
                    raise ValueError("it is neither an object nor a boolean")
                source = matcher.grammar_from_json_schema(grammar.source)
            else:
                source = matcher.grammar_from_regex(grammar.source)
            made = matcher(self._tokenizer, source, log_level=0)
            if made.is_error():
                raise ValueError(made.get_error())
        except (ValueError, RecursionError) as error:
            raise RequestError("grammar", f"a valid {grammar.kind}", str(error)[:200]) from error
        return Matcher(made, self._vocab_size)
