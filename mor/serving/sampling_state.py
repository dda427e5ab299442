"""State of sampling in a continuation: its tokens, its random numbers, its grammar."""

import hashlib
import struct
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mor.serving.requests import SamplingParams

__all__ = ["GrammarMatcher", "SamplingState", "uniform"]


class GrammarMatcher(Protocol):
    """The state of a grammar after some tokens; `mor.serving.grammar` has the implementation."""

    @property
    def finished(self) -> bool:
        """No token may follow."""
        ...

    def allowed(self) -> NDArray[np.bool_]:
        """Tokens that may come next, `[V]`."""
        ...

    def accept(self, token_id: int) -> None:
        """Advance by a token."""
        ...


def uniform(seed: int, index: int, place: int) -> float:
    """Draw the random number of one token.

    Args:
        seed: of the request.
        index: which of its continuations.
        place: tokens generated before.

    Returns:
        A number in [0, 1), a multiple of 2**-52.

    Example:
        >>> uniform(0, 0, 0) == uniform(0, 0, 0) != uniform(0, 0, 1)
        True
    """
    counter = struct.pack("<QQQ", seed % 2**64, index, place)
    digest = hashlib.blake2b(counter, digest_size=8).digest()
    return float((int.from_bytes(digest, "little") >> 12) * 2.0**-52)


class _Seen:
    """Distinct tokens of prompt and output, with the number of times each is in the output."""

    def __init__(self, prompt_ids: Iterable[int]) -> None:
        self._place: dict[int, int] = {}
        self._ids = np.zeros(64, np.int64)
        self._counts = np.zeros(64, np.float32)
        for token in prompt_ids:
            self._add(token, 0)

    def _add(self, token: int, count: int) -> None:
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token
        self._counts[place] += count

    def add(self, token: int) -> None:
        """Count a token of the output."""
        self._add(token, 1)

    @property
    def ids(self) -> NDArray[np.int64]:
        return self._ids[: len(self._place)]

    @property
    def counts(self) -> NDArray[np.float32]:
        return self._counts[: len(self._place)]


class SamplingState:
    """State of sampling in one continuation.

    Args:
        params: its parameters.
        prompt_ids: tokens of the prompt.
        seed: of the request.
        index: which of its continuations.
        ends: tokens that may not be chosen before `params.min_tokens`.
        grammar: the matcher of its grammar, for this continuation alone.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        *,
        seed: int = 0,
        index: int = 0,
        ends: Iterable[int] = (),
        grammar: GrammarMatcher | None = None,
    ) -> None:
        """Start after the prompt."""
        self.params = params
        self.prompt_ids = prompt_ids
        self.token_ids: list[int] = []
        self.seed = seed
        self.index = index
        self.ends = sorted(set(ends) | set(params.stop_token_ids))
        self.grammar = grammar
        self.penalized = (
            params.repetition_penalty != 1
            or params.presence_penalty != 0
            or params.frequency_penalty != 0
        )
        self.seen = _Seen(prompt_ids) if self.penalized else None
        self._adjusted = (
            self.penalized
            or grammar is not None
            or bool(params.logit_bias)
            or bool(params.logits_processors)
        )

    @property
    def ends_forbidden(self) -> bool:
        """The sequence may not end yet."""
        return bool(self.ends) and len(self.token_ids) < self.params.min_tokens

    @property
    def plain(self) -> bool:
        """The token is the most probable one of the raw logits."""
        return self.params.greedy and not self._adjusted and not self.ends_forbidden

    def uniform(self) -> float:
        """Draw the random number of the next token."""
        return uniform(self.seed, self.index, len(self.token_ids))

    def accept(self, token_id: int) -> None:
        """Remember a token as part of the output."""
        self.token_ids.append(token_id)
        if self.seen is not None:
            self.seen.add(token_id)
        if self.grammar is not None:
            self.grammar.accept(token_id)
