"""Choose the next token of every row of a batch, each row by its own parameters.

A row's token depends on its logits, its parameters and its own history alone, bit for bit: no
operation below reduces over rows, the random number is a hash of (seed, continuation, place), and a
tie is decided by value, not by the order in which a sort happens to leave it. `torch.sum` over a
whole row and `torch.logsumexp` are not used: with several threads their last bits depend on the
number of rows.

The order is that of Transformers: logit bias, penalties, forbidden ends, custom processors,
grammar, temperature, top-k, top-p, min-p.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mor.serving.outputs import TokenLogprobs
from mor.serving.requests import SamplingParams
from mor.serving.sampling_state import SamplingState

__all__ = ["Sampled", "Sampler", "token_logprobs"]

#: Candidates tried for top-k and top-p before all tokens are sorted, which costs 20 times as much.
_CANDIDATES = (256, 2048)

#: Tokens whose probabilities are summed before one of them is looked for.
_BLOCK = 256

#: Values of a slab of rows on a CPU: intermediate results of more would be fresh memory each time.
_SLAB = 2**20


@dataclass(frozen=True)
class Sampled:
    """The next token of one row.

    Attributes:
        token_id: the token; -1 if the row failed.
        logprobs: of the raw logits, if asked for.
        error: why the row failed.
    """

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None


class Sampler:
    """Choose tokens of a batch.

    Args:
        vocab_size: tokens that may be chosen. Columns of the logits beyond it are padding.

    Example:
        >>> state = SamplingState(SamplingParams(temperature=0), prompt_ids=[1])
        >>> Sampler(3)(torch.tensor([[0.0, 2.0, 1.0, 9.0]]), [state])[0].token_id
        1
    """

    def __init__(self, vocab_size: int) -> None:
        """Remember the vocabulary."""
        self.vocab_size = vocab_size

    def __call__(self, logits: Tensor, states: Sequence[SamplingState]) -> list[Sampled]:
        """Choose a token for each row. The states are not changed; call their `accept`.

        Args:
            logits: `[n, V]` or wider, of any floating dtype.
            states: of the n rows.

        Returns:
            The n tokens. A row whose logits are NaN or infinite, or that may take no token, has
            an error instead; the other rows are not touched by it.
        """
        if logits.dim() != 2 or len(logits) != len(states) or logits.shape[1] < self.vocab_size:
            raise ValueError(
                f"Sampler: expected logits [{len(states)}, V] with V >= {self.vocab_size}, "
                f"got {list(logits.shape)}"
            )
        if not states:
            return []
        raw = logits[:, : self.vocab_size]
        if raw.dtype not in (torch.float32, torch.float64):
            raw = raw.float()
        tokens, failures = [-1] * len(states), dict[int, str]()
        # An infinity or NaN is the largest value or stands where it is looked for.
        first, values = _argmax(raw)
        for row, (token, value) in enumerate(zip(first, values, strict=True)):
            if not math.isfinite(value):
                failures[row] = f"the model's largest logit is {value}"
            elif states[row].plain:
                tokens[row] = token
        rest = [i for i, state in enumerate(states) if not state.plain and i not in failures]
        for slab in _slabs(rest, raw):
            chosen, errors = _sample_rest(raw[slab], [states[i] for i in slab])
            for row, token, error in zip(slab, chosen, errors, strict=True):
                if error is None:
                    tokens[row] = token
                else:
                    failures[row] = error
        asked = {
            row: (tokens[row], count)
            for row, state in enumerate(states)
            if (count := state.params.logprobs) is not None and row not in failures
        }
        found = dict[int, TokenLogprobs]()
        for slab in _slabs(list(asked), raw):
            ids, counts = zip(*(asked[row] for row in slab), strict=True)
            found.update(zip(slab, token_logprobs(raw[slab], ids, counts), strict=True))
        return [
            Sampled(tokens[row] if row not in failures else -1, found.get(row), failures.get(row))
            for row in range(len(states))
        ]


def _slabs(rows: list[int], logits: Tensor) -> list[list[int]]:
    """Split rows into groups that are sampled at once."""
    size = max(1, _SLAB // logits.shape[1]) if logits.device.type == "cpu" else len(rows)
    return [rows[start : start + size] for start in range(0, len(rows), max(1, size))]


def _argmax(scores: Tensor) -> tuple[list[int], list[float]]:
    """The first largest value of each row, NaN counting as the largest, and its place."""
    if scores.device.type == "cpu":
        # NumPy's takes a tenth of the time of torch's.
        array = scores.detach().numpy()
        places = array.argmax(axis=1)
        return places.tolist(), array[np.arange(len(places)), places].tolist()
    values, places = scores.max(dim=1)
    return places.tolist(), values.tolist()


def _sample_rest(
    scores: Tensor, states: Sequence[SamplingState]
) -> tuple[list[int], list[str | None]]:
    """Tokens of rows that are not plainly greedy. `scores` is theirs to overwrite."""
    errors = _adjust(scores, states)
    tokens, values = _argmax(scores)
    for row, value in enumerate(values):
        if errors[row] is None and not math.isfinite(value):
            errors[row] = (
                "no token is allowed" if value == -math.inf else f"the largest score is {value}"
            )
    random = [i for i, state in enumerate(states) if errors[i] is None and not state.params.greedy]
    if random:
        if len(random) < len(states):
            scores = scores[random]
        largest = torch.tensor([values[i] for i in random], dtype=scores.dtype)
        scores.sub_(largest.to(scores.device)[:, None])
        drawn = _draw(scores, [states[i] for i in random])
        for row, token in zip(random, drawn, strict=True):
            tokens[row] = token
    return tokens, errors


def _adjust(scores: Tensor, states: Sequence[SamplingState]) -> list[str | None]:
    """Apply to `scores` in place all that depends on more than the temperature."""
    errors: list[str | None] = [None] * len(states)
    for row, state in enumerate(states):
        if bias := state.params.logit_bias:
            ids = torch.tensor(list(bias), device=scores.device)
            scores[row, ids] += torch.tensor(
                list(bias.values()), dtype=scores.dtype, device=scores.device
            )
    _penalize(scores, states)
    for row, state in enumerate(states):
        if state.ends_forbidden and not (state.grammar is not None and state.grammar.finished):
            scores[row, torch.tensor(state.ends, device=scores.device)] = -math.inf
        try:
            if state.params.logits_processors:
                scores[row] = _process(scores[row : row + 1], state)
            if state.grammar is not None:
                allowed = torch.from_numpy(state.grammar.allowed()).to(scores.device)
                scores[row].masked_fill_(~allowed, -math.inf)
        except Exception as error:  # A caller's code fails its own row, not the batch.
            errors[row] = f"{type(error).__name__}: {error}"[:300]
            scores[row] = 0
    return errors


def _process(scores: Tensor, state: SamplingState) -> Tensor:
    """One row `[1, V]` after the caller's processors."""
    ids = torch.tensor([[*state.prompt_ids, *state.token_ids]], device=scores.device)
    shape = scores.shape
    scores = scores.clone()
    for processor in state.params.logits_processors:
        scores = processor(ids, scores)
        if not isinstance(scores, Tensor) or scores.shape != shape:
            raise TypeError(f"logits_processors: expected scores of shape {list(shape)} back")
    return scores[0]


def _penalize(scores: Tensor, states: Sequence[SamplingState]) -> None:
    rows = [(row, state, state.seen) for row, state in enumerate(states) if state.seen is not None]
    if not rows:
        return

    def spread(value: Callable[[SamplingParams], float]) -> Tensor:
        """A parameter for each token of each row."""
        values = [np.full(len(seen.ids), value(state.params)) for _, state, seen in rows]
        return torch.from_numpy(np.concatenate(values)).to(scores)

    where = torch.from_numpy(np.concatenate([np.full(len(seen.ids), row) for row, _, seen in rows]))
    ids = torch.from_numpy(np.concatenate([seen.ids for _, _, seen in rows]))
    counts = torch.from_numpy(np.concatenate([seen.counts for _, _, seen in rows])).to(scores)
    index = (where.to(scores.device), ids.to(scores.device))
    values = scores[index]
    repetition = spread(lambda params: params.repetition_penalty)
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = values - counts * spread(lambda params: params.frequency_penalty)
    values = values - (counts > 0) * spread(lambda params: params.presence_penalty)
    scores[index] = values


def _draw(scores: Tensor, states: Sequence[SamplingState]) -> list[int]:
    """Sample rows `[m, V]` by temperature, top-k, top-p and min-p.

    The largest score of each row is 0, so no temperature overflows. `scores` is overwritten.
    """
    params = [state.params for state in states]

    def column(values: Iterable[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(list(values), dtype=dtype).to(scores.device)[:, None]

    if any(p.temperature != 1 for p in params):
        scores.div_(column((p.temperature for p in params), scores.dtype))
    drawn = column((state.uniform() for state in states), torch.float64)
    # A score relative to the largest is the logarithm of the ratio of the probabilities.
    floor = column((math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params), scores.dtype)
    tokens = [-1] * len(states)
    groups: dict[int, list[int]] = {}
    for row, p in enumerate(params):
        groups.setdefault(_candidates(p, scores.shape[1]), []).append(row)
    while groups:
        count, rows = groups.popitem()
        own = scores if len(rows) == len(states) else scores[rows]
        if count == 0:
            if any(params[row].min_p > 0 for row in rows):
                own = own.masked_fill(own < floor[rows], -math.inf)
            found = _inverse(own, drawn[rows])
        else:
            values, ids = own.topk(count, dim=1)
            least = _least(values, ids, own, [params[row] for row in rows])
            kept = values >= torch.maximum(least, floor[rows])
            if count < scores.shape[1]:
                # What equals the last candidate may go on beyond it: more candidates for those.
                missing = [row for row, yes in zip(rows, kept[:, -1].tolist(), strict=True) if yes]
                if missing:
                    more = next((c for c in _CANDIDATES if c > count), scores.shape[1])
                    groups.setdefault(min(more, scores.shape[1]), []).extend(missing)
            values = values.masked_fill(~kept, -math.inf)
            # In order of tokens: a sort leaves ties in any order.
            ids, order = ids.sort(dim=1)
            place = _inverse(values.gather(1, order), drawn[rows])
            found = ids.gather(1, place)
        for row, token in zip(rows, found[:, 0].tolist(), strict=True):
            tokens[row] = token
    return tokens


def _candidates(params: SamplingParams, vocab_size: int) -> int:
    """Most probable tokens to look at, by the row's own parameters; 0 looks at none apart."""
    top_k = params.top_k if params.top_k < vocab_size else 0
    if top_k == 0 and params.top_p >= 1:
        return 0
    enough = next((count for count in _CANDIDATES if count > top_k), vocab_size)
    return min(enough, vocab_size)


def _least(values: Tensor, ids: Tensor, scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The least score that top-k and top-p keep among sorted candidates `[m, K]`, as `[m, 1]`."""
    count, vocab_size = values.shape[1], scores.shape[1]
    top_k = torch.tensor([p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params])
    top_k = top_k.to(values.device)[:, None]
    limited = top_k < vocab_size
    least = torch.where(limited, values.gather(1, top_k.clamp(max=count) - 1), -math.inf)
    if all(p.top_p >= 1 for p in params):
        return least
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64).to(values.device)[:, None]
    kept = values >= least
    # The mass is a fraction of that of all tokens, or of those that top-k keeps.
    probabilities = torch.where(
        limited,
        values.masked_fill(~kept, -math.inf).softmax(dim=1),
        scores.softmax(dim=1).gather(1, ids),
    )
    before = probabilities.cumsum(dim=1, dtype=torch.float64) - probabilities
    inside = kept & ((before < top_p) | (top_p >= 1))
    inside[:, 0] = True
    return values.gather(1, inside.sum(dim=1, keepdim=True) - 1)


def _inverse(scores: Tensor, drawn: Tensor) -> Tensor:
    """The first place of each row where the cumulative probability exceeds `drawn`, `[m, 1]`."""
    probabilities = scores.softmax(dim=1)
    size = scores.shape[1]
    if size <= 8 * _BLOCK:
        cumulative = probabilities.cumsum(dim=1, dtype=torch.float64)
        return torch.searchsorted(cumulative, drawn * cumulative[:, -1:], right=True)
    # First the block, then the place in it: a sum is read at the speed of memory, a cumulative sum
    # is not. One sum over a block is never split between threads.
    whole = size - size % _BLOCK
    sums = [probabilities[:, :whole].unflatten(1, (-1, _BLOCK)).sum(dim=2)]
    if whole < size:
        sums.append(probabilities[:, whole:].sum(dim=1, keepdim=True))
    cumulative = torch.cat(sums, dim=1).cumsum(dim=1, dtype=torch.float64)
    target = drawn * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, target, right=True)
    target -= cumulative.gather(1, (block - 1).clamp(min=0)).masked_fill(block == 0, 0)
    columns = block * _BLOCK + torch.arange(_BLOCK, device=scores.device)
    inside = probabilities.gather(1, columns.clamp(max=size - 1)).masked_fill(columns >= size, 0)
    inside = inside.cumsum(dim=1, dtype=torch.float64)
    place = torch.searchsorted(inside, target, right=True)
    # The block's sum was rounded otherwise: not beyond the last token that has a probability.
    last = torch.searchsorted(inside, inside[:, -1:].contiguous())
    return block * _BLOCK + torch.minimum(place, last)


def token_logprobs(
    logits: Tensor, token_ids: Sequence[int], counts: Sequence[int]
) -> list[TokenLogprobs]:
    """Log probabilities of given tokens and of the most probable ones.

    Args:
        logits: `[m, V]`, raw, without padding.
        token_ids: one for each row.
        counts: how many of the most probable tokens each row asks for.

    Returns:
        One entry for each row.
    """
    logprobs = logits.log_softmax(dim=1)
    column = torch.tensor(token_ids, device=logits.device)[:, None]
    own = logprobs.gather(1, column)
    ranks = ((logprobs > own).sum(dim=1) + 1).tolist()
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(token_ids)
    groups: dict[int, list[int]] = {}
    for row, count in enumerate(counts):
        groups.setdefault(min(count, logits.shape[1]), []).append(row)
    for count, rows in groups.items():
        if count > 0:
            values, ids = logprobs[rows].topk(count, dim=1)
            for row, top_ids, top in zip(rows, ids.tolist(), values.tolist(), strict=True):
                tops[row] = tuple(zip(top_ids, top, strict=True))
    return [
        TokenLogprobs(token, dict(top).get(token, value), rank, top)
        for token, value, rank, top in zip(token_ids, own[:, 0].tolist(), ranks, tops, strict=True)
    ]
