"""How continuations end, and that streams are what is returned at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mor.serving import Output, Request, SamplingParams
from mor.serving.continuation import Continuation
from mor.serving.prompts import Prompt
from mor.serving.sampling import Sampled

from .toy import EOS, LIMITS, VOCABULARY, outputs, run

PROMPT = Prompt(tuple(b"say "))


def feed(tokens: list[int], **options: object) -> Output:
    """A continuation that gets these tokens, until it ends."""
    request = Request.make(1, PROMPT.ids, SamplingParams(**options), LIMITS, arrival=10.0)
    child = Continuation(request, 0, LIMITS, VOCABULARY)
    child.schedule(11.0)
    deltas = []
    for place, token in enumerate(tokens):
        deltas.append(child.advance(Sampled(token), 2, now=12.0 + place))
        if child.finish_reason is not None:
            return Output.join(deltas)
    return Output.join([*deltas, child.end("abort", now=20.0)])


def test_the_end_of_sequence_is_counted_and_not_written():
    output = feed([*b"hi", EOS], skip_special_tokens=False)
    assert (output.text, output.finish_reason, output.stop) == ("hi", "stop", None)
    assert output.token_ids == (*b"hi", EOS)
    assert output.usage.prompt_tokens == 4
    assert output.usage.completion_tokens == 3
    assert output.depths == (2, 2, 2)


def test_the_end_of_sequence_is_passed_over_if_asked():
    output = feed([*b"hi", EOS, *b"yo"], ignore_eos=True, max_tokens=5)
    assert (output.text, output.finish_reason) == ("hiyo", "length")


def test_a_stop_token_is_not_written():
    output = feed(list(b"hi!x"), stop_token_ids=[ord("!")])
    assert (output.text, output.finish_reason, output.stop) == ("hi", "stop", ord("!"))


def test_a_stop_string_is_cut_and_its_tokens_are_counted():
    output = feed(list(b"one\n\ntwo"), stop="\n\n")
    assert (output.text, output.finish_reason, output.stop) == ("one", "stop", "\n\n")
    assert output.usage.completion_tokens == 5


def test_the_length_flushes_what_is_held():
    output = feed([*b"EN", 0xE2], stop="END", max_tokens=3)
    assert (output.text, output.finish_reason) == ("EN\ufffd", "length")


def test_a_stop_string_completed_by_the_last_incomplete_character():
    output = feed([*b"ab", 0xE2], stop="b\ufffd", max_tokens=3)
    assert (output.text, output.finish_reason, output.stop) == ("a", "stop", "b\ufffd")


@pytest.mark.parametrize("reason", ["abort", "deadline"])
def test_an_end_from_outside_flushes_the_text(reason):
    request = Request.make(1, PROMPT.ids, SamplingParams(stop="END"), LIMITS)
    child = Continuation(request, 0, LIMITS, VOCABULARY)
    first = child.advance(Sampled(ord("E")), None, now=1.0)
    last = child.end(reason, now=2.0)
    assert (first.text, last.text, last.finish_reason) == ("", "E", reason)
    assert Output.join([first, last]).depths == ()
    with pytest.raises(ValueError, match="ended before"):
        child.advance(Sampled(3), None, now=3.0)


def test_trap_22_a_failed_row_ends_with_its_error():
    output = feed_error("the model's largest logit is nan")
    assert (output.finish_reason, output.error) == ("error", "the model's largest logit is nan")
    assert output.token_ids == ()


def feed_error(message: str) -> Output:
    request = Request.make(1, PROMPT.ids, SamplingParams(), LIMITS)
    child = Continuation(request, 0, LIMITS, VOCABULARY)
    return Output.join([child.advance(Sampled(-1, None, message), 1, now=1.0)])


def test_times_count_from_the_arrival():
    timings = feed([*b"hi", EOS]).timings
    assert (timings.scheduled, timings.first_token, timings.finished) == (1.0, 2.0, 4.0)


def test_a_continuation_without_a_tokenizer_has_tokens():
    request = Request.make(1, [1], SamplingParams(max_tokens=2), LIMITS)
    child = Continuation(request, 0, LIMITS, None)
    output = Output.join([child.advance(Sampled(7), 1, 1.0), child.advance(Sampled(8), 1, 2.0)])
    assert (output.text, output.token_ids, output.finish_reason) == ("", (7, 8), "length")


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 3),
    stop=st.lists(st.text("abcdefgh", min_size=1, max_size=2), max_size=3),
    max_tokens=st.integers(1, 30),
    temperature=st.sampled_from([0.0, 1.0, 3.0]),
)
def test_streams_joined_are_the_texts_for_every_stop_and_n(seed, n, stop, max_tokens, temperature):
    min_tokens = min(2, max_tokens)
    params = SamplingParams(
        seed=seed,
        n=n,
        stop=stop,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        logprobs=1,
    )
    deltas = list(run(PROMPT, params))
    for index in range(n):
        own = [delta for delta in deltas if delta.index == index]
        assert [d.finish_reason for d in own[:-1]] == [None] * (len(own) - 1)
        output = Output.join(own)
        written = output.token_ids
        if output.finish_reason == "stop" and output.stop is None:
            assert written[-1] == EOS
            written = written[:-1]
        plain = VOCABULARY.decode(written)
        assert plain.startswith(output.text)
        if not isinstance(output.stop, str):
            assert output.text == plain
        else:
            assert plain[len(output.text) :].startswith(output.stop)
        assert len(output.logprobs) == len(output.token_ids) == len(output.depths)
        # A continuation does not depend on how many there are beside it.
        if index == 0:
            alone = {name: getattr(params, name) for name in SamplingParams.__dataclass_fields__}
            assert outputs(PROMPT, SamplingParams(**{**alone, "n": 1}))[0] == output
    if temperature == 3.0 and n > 1 and max_tokens > 10 and not stop:
        assert len({output.token_ids for output in outputs(PROMPT, params)}) == n


def test_no_tokens_with_prompt_logprobs():
    params = SamplingParams(max_tokens=0, prompt_logprobs=2, n=2)
    for output in outputs(PROMPT, params):
        assert output.token_ids == ()
        assert output.prompt_logprobs[0] is None
        assert [entry.token_id for entry in output.prompt_logprobs[1:]] == list(PROMPT.ids[1:])
        assert all(len(entry.top) == 2 for entry in output.prompt_logprobs[1:])
