"""Texts of a form: JSON schemas and regular expressions through llguidance."""

import json
import re

import numpy as np
import pytest

from mor.serving import Grammar, RequestError, SamplingParams
from mor.serving.grammar import Grammars
from mor.serving.prompts import Prompt

from .toy import EOS, LIMITS, VOCABULARY, outputs

pytest.importorskip("llguidance")

PROMPT = Prompt(tuple(b"say "))
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "yy"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(VOCABULARY.tokenizer, LIMITS.vocab_size, (EOS,))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_text_has_the_schema(grammars, temperature):
    grammar = Grammar("json_schema", json.dumps(SCHEMA))
    params = SamplingParams(
        grammar=grammar, n=3, seed=4, temperature=temperature, logit_bias={32: -50}
    )
    for output in outputs(PROMPT, params, grammars):
        assert output.finish_reason == "stop"
        value = json.loads(output.text)
        assert set(value) == {"a", "b"}
        assert value["b"] in ("x", "yy")


def test_the_text_matches_the_expression(grammars):
    params = SamplingParams(
        grammar=Grammar("regex", "[0-9]{3}-(ab|cd)"), n=4, seed=1, min_tokens=20
    )
    found = outputs(PROMPT, params, grammars)
    # It is complete before min_tokens, and nothing else is allowed.
    assert all(re.fullmatch("[0-9]{3}-(ab|cd)", output.text) for output in found)
    assert len({output.text for output in found}) > 1


def test_a_grammar_that_is_cut_by_the_length(grammars):
    params = SamplingParams(grammar=Grammar("regex", "[ab]{9}"), max_tokens=4, seed=0)
    [output] = outputs(PROMPT, params, grammars)
    assert output.finish_reason == "length"
    assert re.fullmatch("[ab]{4}", output.text)


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("regex", "(a"),
        Grammar("regex", "\ud800"),
        Grammar("json_schema", "{"),
        Grammar("json_schema", "[1]"),
        Grammar("json_schema", '{"type": "nothing"}'),
        Grammar("json_schema", "[" * 100_000),
    ],
    ids=["regex", "surrogate", "json", "list", "type", "deep"],
)
def test_a_wrong_grammar_is_refused(grammars, grammar):
    with pytest.raises(RequestError, match="grammar: expected a valid") as error:
        grammars.matcher(grammar)
    assert len(str(error.value)) < 300


def test_matchers_do_not_share_their_state(grammars):
    grammar = Grammar("regex", "ab")
    first, second = grammars.matcher(grammar), grammars.matcher(grammar)
    first.accept(ord("a"))
    assert np.flatnonzero(second.allowed()).tolist() == [ord("a")]
    copy = first.copy()
    first.accept(ord("b"))
    assert np.flatnonzero(copy.allowed()).tolist() == [ord("b")]
    assert first.finished
    assert first.allowed().shape == (LIMITS.vocab_size,)


def test_a_token_that_is_not_allowed_is_an_error(grammars):
    matcher = grammars.matcher(Grammar("regex", "ab"))
    with pytest.raises(ValueError, match="grammar"):
        matcher.accept(ord("z"))


def test_few_grammars_are_remembered(grammars):
    for place in range(200):
        grammars.matcher(Grammar("regex", f"a{place}"))
    assert len(grammars._compiled) <= 64
