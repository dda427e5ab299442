"""Bodies: what is accepted, refused by name, or too much; and the errors."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mor.serving import RequestError
from mor.serving.answers import dumps, event
from mor.serving.errors import ApiError, error_body
from mor.serving.prompts import ServedModel
from mor.serving.protocol import CompletionBody, ServerLimits, parse_body, to_params
from mor.serving.vocabulary import Vocabulary

from .small_tokenizers import byte_level
from .toy import EOS, LIMITS, MODEL, SERVER, answer, post


def completion(**body: object) -> tuple[int, dict]:
    return post("/v1/completions", **{"prompt": "ab", "max_tokens": 2, **body})


def chat_model() -> ServedModel:
    tokenizer = byte_level()
    copy = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=(
            "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
            "{{ raise_exception('system comes first') }}{% endif %}"
            "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
        ),
    )
    return ServedModel(name="chat", vocabulary=Vocabulary(copy), limits=LIMITS)


CHAT = chat_model()


@pytest.mark.parametrize(
    "prompt", ["ab", ["ab", "c"], [97, 98], [[97], [98, 99]]], ids=["text", "texts", "ids", "lists"]
)
def test_prompts_of_four_kinds(prompt):
    status, body = completion(prompt=prompt, n=2)
    count = 2 if prompt in (["ab", "c"], [[97], [98, 99]]) else 1
    assert status == 200
    assert [choice["index"] for choice in body["choices"]] == list(range(2 * count))
    assert body["usage"]["completion_tokens"] == 4 * count
    assert body["usage"]["prompt_tokens"] == {1: 2, 2: 3}[count]


@pytest.mark.parametrize(
    ("name", "value", "param"),
    [
        ("tools", [{"type": "function"}], "tools"),
        ("tool_choice", "required", "tool_choice"),
        ("best_of", 2, "best_of"),
        ("suffix", "x", "suffix"),
        ("temprature", 1.0, "temprature"),
        ("include_stop_str_in_output", True, "include_stop_str_in_output"),
        ("temperature", "1", "temperature"),
        ("temperature", True, "temperature"),
        ("max_tokens", 2.5, "max_tokens"),
        ("n", 17, "n"),
        ("stop", ["a"] * 5, "stop"),
        ("stop", "a" * 257, "stop"),
        ("stop", [""], "stop"),
        ("logprobs", 21, "logprobs"),
        ("logit_bias", {"-1": 1}, "logit_bias"),
        ("logit_bias", {"5": 101}, "logit_bias"),
        ("logit_bias", {"5": "x"}, "logit_bias"),
        ("logit_bias", {"9999": 1}, "logit_bias"),
        ("logit_bias", {"\u0661": 1}, "logit_bias"),
        ("stop_token_ids", [10**20], "stop_token_ids"),
        ("stream_options", {"include_usage": True}, "stream_options"),
        ("response_format", {"type": "json_schema"}, "response_format"),
        ("response_format", {"type": "xml"}, "response_format"),
        ("prompt", [], "prompt"),
        ("prompt", "", "prompt"),
        ("prompt", [[]], "prompt"),
        ("prompt", [1, "a"], "prompt"),
        ("prompt", [-1], "prompt"),
        ("prompt", ["a"] * 257, "prompt"),
        ("prompt", "\ud800", "prompt"),
        ("max_recursions", 4, "max_recursions"),
        ("exit_threshold", 2.0, "exit_threshold"),
        ("max_tokens", 63, "max_tokens"),
        ("deadline_s", 0, "deadline_s"),
        ("deadline_s", -1.5, "deadline_s"),
    ],
)
def test_a_parameter_is_refused_by_name(name, value, param):
    status, body = completion(**{name: value})
    assert status == 400
    assert body["error"]["param"] == param
    assert param in body["error"]["message"]
    assert body["error"]["type"] == "invalid_request_error"
    assert len(body["error"]["message"]) < 520


def test_trap_27_parameters_without_effect_are_accepted():
    same = {
        "user": "me",
        "store": True,
        "metadata": {"a": "b"},
        "tools": None,
        "tool_choice": "none",
        "best_of": 1,
        "suffix": "",
        "response_format": {"type": "text"},
        "logit_bias": {},
        "stop": None,
        "top_k": -1,
        "temperature": 0,
    }
    status, body = completion(**same)
    assert status == 200
    plain = completion(temperature=0)[1]
    assert body["choices"] == plain["choices"]


def test_what_a_body_becomes():
    body = parse_body(
        CompletionBody,
        json.dumps(
            {
                "prompt": "a",
                "echo": True,
                "logprobs": 3,
                "logit_bias": {"5": -2.5},
                "top_k": 4,
                "structured_outputs": {"regex": "a+"},
                "max_recursions": 2,
                "exit_threshold": 0.25,
                "seed": -5,
            }
        ).encode(),
        SERVER,
    )
    params = to_params(body)
    assert (params.max_tokens, params.logprobs, params.prompt_logprobs) == (16, 3, 3)
    assert (params.logit_bias, params.top_k, params.seed) == ({5: -2.5}, 4, -5)
    assert (params.max_recursions, params.exit_threshold) == (2, 0.25)
    assert (params.grammar.kind, params.grammar.source) == ("regex", "a+")


@pytest.mark.parametrize(
    ("form", "source"),
    [
        ({"type": "json_object"}, {"type": "object"}),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}}},
            {"type": "array"},
        ),
    ],
)
def test_a_response_format_is_a_grammar(form, source):
    body = parse_body(
        CompletionBody, json.dumps({"prompt": "a", "response_format": form}).encode(), SERVER
    )
    grammar = to_params(body).grammar
    assert (grammar.kind, json.loads(grammar.source)) == ("json_schema", source)


def test_two_grammars_are_refused():
    both = {"json": {}, "regex": "a"}
    body = {"prompt": "a", "structured_outputs": both}
    with pytest.raises(RequestError, match="structured_outputs: expected one grammar, got 2"):
        to_params(parse_body(CompletionBody, json.dumps(body).encode(), SERVER))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b"\xff\xfe{",
        b'{"prompt": "\xff"}',
        b'{"prompt": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": '
        + b'{"a":' * 20_000
        + b"1"
        + b"}" * 20_000
        + b"}}}",
        b"{}",
        b'{"prompt": [' + b"null," * 700_000 + b"null]}",
        b'{"prompt": [' + b"[]," * 700_000 + b"[null]]}",
        b'{"prompt": "a", "logit_bias": {'
        + b",".join(b'"%d":"x"' % k for k in range(99_999))
        + b"}}",
        b'{"prompt": "a", "' + b"x" * 1_000_000 + b'": 1}',
    ],
    ids=range(18),
)
def test_trap_25_a_wrong_body_is_400_with_a_bounded_message(data):
    status, media, reply = answer("/v1/completions", data)
    assert status == 400
    assert media == "application/json"
    assert len(reply) < 1200
    assert set(json.loads(reply)["error"]) == {"message", "type", "param", "code"}


def test_a_body_that_is_too_large_is_413():
    limits = ServerLimits(body_bytes=10)
    with pytest.raises(ApiError, match="at most 10 bytes, got 15") as error:
        parse_body(CompletionBody, b'{"prompt": "a"}', limits)
    assert error.value.status == 413


@given(st.text(max_size=30))
def test_trap_26_an_error_is_json_whatever_it_quotes(text):
    reply = dumps(error_body(ApiError(400, text, param=text, code=text)))
    assert json.loads(reply)["error"]["message"] == text


def test_an_error_of_the_server_tells_no_details():
    error = ApiError.of(KeyError("/secret/path"))
    assert (error.status, error.type) == (500, "server_error")
    assert "secret" not in error.message
    assert ApiError(429, "later", retry_after=3).type == "rate_limit_error"
    assert ApiError(401, "who").type == "authentication_error"


def test_trap_4_an_event_is_one_line_of_ascii():
    line = event({"text": "a\u2028\u2029\n\r\u0085é👍\ud800"})
    assert line.isascii()
    assert line.startswith(b"data: ")
    assert line.endswith(b"\n\n")
    assert len(line.splitlines()) == 2
    with pytest.raises(ValueError, match="JSON"):
        dumps({"x": math.nan})


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "prompt",
                "max_tokens",
                "stop",
                "logit_bias",
                "n",
                "seed",
                "stream",
                "echo",
                "logprobs",
                "top_p",
                "messages",
                "response_format",
                "stop_token_ids",
                "structured_outputs",
                "x",
            ]
        ),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False)
            | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
            max_leaves=5,
        ),
    ),
    st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]),
)
def test_any_json_is_answered_without_a_server_error(body, path):
    try:
        data = json.dumps(body).encode()
    except ValueError:
        return
    status, _, reply = answer(path, data, CHAT)
    assert status in (200, 400), reply


def test_trap_3_a_chat_has_one_bos():
    tokenizer = CHAT.vocabulary.tokenizer
    status, body = post("/tokenize", CHAT, messages=[{"role": "user", "content": "hi"}])
    assert status == 200
    assert body["tokens"].count(tokenizer.bos_token_id) == 1
    assert CHAT.vocabulary.decode(body["tokens"], False) == "<s>[user]hi[a]"


def test_trap_3_no_template_is_400():
    status, body = post("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}])
    assert status == 400
    assert "no chat template" in body["error"]["message"]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "tool", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
        [{"role": "user", "content": "\ud83d"}],
        [{"role": "user", "content": "x", "tool_calls": [1]}],
        "hi",
    ],
    ids=["none", "role", "content", "image", "template", "surrogate", "tool", "text"],
)
def test_wrong_messages_are_400(messages):
    status, body = post("/v1/chat/completions", CHAT, messages=messages)
    assert status == 400, body


def test_messages_of_parts():
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    _, body = post("/tokenize", CHAT, messages=[{"role": "user", "content": parts, "name": "x"}])
    assert CHAT.vocabulary.decode(body["tokens"], False) == "<s>[user]hi[a]"


def test_another_model_is_404():
    status, body = completion(model="gpt-9")
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    assert completion(model="toy")[0] == 200


def test_tokenize_there_and_back():
    status, body = post("/tokenize", prompt="the € </s>", return_token_strs=True)
    assert status == 200
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert body["max_model_len"] == 64
    assert EOS in body["tokens"]
    assert post("/detokenize", tokens=body["tokens"])[1] == {"prompt": "the € </s>"}
    assert post("/tokenize", prompt="")[1]["tokens"] == []
    assert post("/tokenize")[0] == 400
    assert post("/tokenize", prompt="a", messages=[])[0] == 400
    assert post("/detokenize", tokens=[9999])[0] == 400


def test_tokenizer_info_is_what_lm_eval_reads():
    info = post("/tokenizer_info", CHAT)[1]
    assert (info["bos_token"], info["eos_token"], info["pad_token"]) == ("<s>", "</s>", None)
    assert info["chat_template"].startswith("{{ bos_token }}")
    assert info["vocab_size"] == LIMITS.vocab_size


def test_models():
    model = post("/v1/models")[1]["data"][0]
    assert (model["id"], model["object"], model["max_model_len"]) == ("toy", "model", 64)
    assert MODEL.model() == model
