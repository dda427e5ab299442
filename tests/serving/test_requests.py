"""What is refused, by name, and what a request remembers."""

import math
import pickle

import pytest

from mor.serving import Delta, Grammar, ModelLimits, Output, Request, RequestError, SamplingParams

LIMITS = ModelLimits(
    vocab_size=10, context_length=8, num_recursions=3, exit_threshold=True, eos_token_ids=(2,)
)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("max_tokens", -1, "expected an integer of at least 0, got -1"),
        ("max_tokens", 1.0, "expected an integer"),
        ("max_tokens", True, "expected an integer"),
        ("min_tokens", -1, "expected an integer"),
        ("temperature", -0.1, "expected a number in 0..100, got -0.1"),
        ("temperature", math.nan, "got nan"),
        ("temperature", math.inf, "got inf"),
        ("temperature", "1", "got '1'"),
        ("top_k", -1, "at least 0"),
        ("top_p", 1.1, "0..1"),
        ("min_p", -1, "0..1"),
        ("repetition_penalty", 0, "got 0"),
        ("presence_penalty", math.nan, "got nan"),
        ("frequency_penalty", 1e9, "got 1000000000.0"),
        ("n", 0, "at least 1"),
        pytest.param("n", -(10**5000), "an integer of", id="huge"),
        ("seed", 2**64, "got 18446744073709551616"),
        ("stop", "", "at least one character"),
        ("stop", ["a", ""], "at least one character"),
        ("stop", [1], "at least one character"),
        ("logprobs", 21, "0..20"),
        ("prompt_logprobs", -1, "0..20"),
        ("logit_bias", {1: math.nan}, "got nan"),
        ("logit_bias", [1], "got a list of 1"),
        ("logits_processors", [3], "callables"),
        ("max_recursions", 0, "at least 1"),
        ("exit_threshold", 1.5, "0..1"),
    ],
)
def test_a_wrong_value_is_refused_by_name(option, value, message):
    with pytest.raises(RequestError, match=option) as error:
        SamplingParams(**{option: value})
    assert message in str(error.value)
    assert error.value.option == option
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("option", "value", "limits"),
    [
        ("max_recursions", 4, LIMITS),
        ("exit_threshold", 0.3, ModelLimits(vocab_size=10, context_length=8)),
        ("stop", "x", ModelLimits(vocab_size=10, context_length=8, has_tokenizer=False)),
    ],
)
def test_what_this_model_cannot_do_is_refused_by_name(option, value, limits):
    with pytest.raises(RequestError, match=option):
        Request.make(0, [1], SamplingParams(**{option: value}), limits)


@pytest.mark.parametrize("bad", [-1, 10, 2**70, True, 1.0, "1"])
@pytest.mark.parametrize("option", ["prompt", "logit_bias", "stop_token_ids"])
def test_trap_20_ids_out_of_range_are_refused(option, bad):
    prompt, options = [1], {}
    if option == "prompt":
        prompt = [1, bad]
    elif option == "logit_bias":
        options = {option: {bad: 1.0}}
    else:
        options = {option: [bad]}
    with pytest.raises(RequestError, match=f"{option}: expected token ids in 0..9"):
        Request.make(0, prompt, SamplingParams(**options), LIMITS)


def test_trap_21_an_empty_prompt_is_refused():
    with pytest.raises(RequestError, match="prompt: expected at least one token, got none"):
        Request.make(0, [], SamplingParams(), LIMITS)


def test_trap_21_a_prompt_over_the_context_is_refused_with_both_numbers():
    with pytest.raises(RequestError, match=r"at most 8 tokens .*, got 9 tokens"):
        Request.make(0, [1] * 9, SamplingParams(max_tokens=0), LIMITS)


def test_trap_21_a_full_context_has_no_room():
    with pytest.raises(RequestError, match="context of 8 tokens for 1 more, got 8"):
        Request.make(0, [1] * 8, SamplingParams(), LIMITS)
    with pytest.raises(RequestError, match=r"within the context of 8 tokens, got 8 \+ 1 = 9"):
        Request.make(0, [1] * 8, SamplingParams(max_tokens=1), LIMITS)


def test_trap_21_no_tokens_are_legal():
    request = Request.make(0, [1] * 8, SamplingParams(max_tokens=0, prompt_logprobs=1), LIMITS)
    assert request.max_tokens == 0


def test_tokens_are_generated_until_the_context_is_full():
    assert Request.make(0, [1, 1], SamplingParams(), LIMITS).max_tokens == 6
    with pytest.raises(RequestError, match="prompt: expected room"):
        Request.make(0, [1, 1], SamplingParams(min_tokens=7), LIMITS)
    with pytest.raises(RequestError, match="min_tokens: expected at most max_tokens = 2, got 3"):
        SamplingParams(max_tokens=2, min_tokens=3)


def test_trap_6_parameters_are_copied():
    bias, stops, ids = {1: 1.0}, ["a"], [3]
    params = SamplingParams(logit_bias=bias, stop=stops, stop_token_ids=ids)
    bias[99], stops[0], ids[0] = 1.0, "", 99
    assert (params.logit_bias, params.stop, params.stop_token_ids) == ({1: 1.0}, ("a",), (3,))
    assert pickle.loads(pickle.dumps(params)) == params


def test_seeds_are_drawn_where_none_is_given():
    seeds = {Request.make(0, [1], SamplingParams(), LIMITS).seed for _ in range(50)}
    assert len(seeds) == 50
    assert Request.make(0, [1], SamplingParams(seed=-1), LIMITS).seed == 2**64 - 1


def test_requests_have_no_counter_of_their_own():
    """Trap 28: two engines in a process must not share one, and trap 7: ids are the engine's."""
    assert Request.make(5, [1], SamplingParams(), LIMITS).id == 5
    assert Request.make(5, [1], SamplingParams(), LIMITS).id == 5


@pytest.mark.parametrize("value", [math.nan, math.inf, "soon"])
def test_a_deadline_is_a_time(value):
    with pytest.raises(RequestError, match="deadline"):
        Request.make(0, [1], SamplingParams(), LIMITS, deadline=value)


@pytest.mark.parametrize("value", [10**30, 0.5, "high"])
def test_a_priority_is_an_integer(value):
    with pytest.raises(RequestError, match="priority"):
        Request.make(0, [1], SamplingParams(), LIMITS, priority=value)


def test_deltas_join_in_any_grouping():
    deltas = [
        Delta(request_id=1, token_ids=(k,), text=str(k), depths=(k % 3,)) for k in range(5)
    ] + [Delta(request_id=1, finish_reason="length")]
    whole = Output.join(deltas)
    assert (whole.token_ids, whole.text, whole.depths) == (
        (0, 1, 2, 3, 4),
        "01234",
        (0, 1, 2, 0, 1),
    )
    first = deltas[0].merge(deltas[1])
    assert Output.join([first, deltas[2].merge(deltas[3]), *deltas[4:]]) == whole
    with pytest.raises(ValueError, match="one continuation"):
        deltas[0].merge(Delta(request_id=1, index=1))
    with pytest.raises(ValueError, match="finish reason"):
        Output.join(deltas[:-1])


def test_a_grammar_has_a_kind():
    with pytest.raises(RequestError, match="grammar: expected kind"):
        Grammar("yaml", "")
    with pytest.raises(RequestError, match="grammar: expected a string"):
        Grammar("regex", 3)
