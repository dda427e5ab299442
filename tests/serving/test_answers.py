"""Answers as OpenAI's own client and lm_eval read them."""

import json

import httpx2
import openai
import pytest
import torch
from lm_eval.models.openai_completions import LocalCompletionsAPI

from mor.serving.answers import CompletionAnswer, dumps
from mor.serving.outputs import Output, TokenLogprobs, Usage
from mor.serving.prompts import Prompt
from mor.serving.protocol import CompletionBody

from . import toy
from .test_protocol import CHAT
from .toy import EOS, MODEL, VOCABULARY, answer, logits_after, post

MESSAGES = [{"role": "user", "content": "hi"}]


def client(served=MODEL) -> openai.OpenAI:
    """OpenAI's client on our answers, without a socket."""

    def handle(request: httpx2.Request) -> httpx2.Response:
        path = request.url.path.replace("/v1/models/", "/v1/models?")
        status, media, data = answer(path, request.read(), served)
        return httpx2.Response(status, headers={"content-type": media}, content=data)

    transport = httpx2.MockTransport(handle)
    return openai.OpenAI(
        api_key="x",
        base_url="http://toy/v1",
        max_retries=0,
        http_client=openai.DefaultHttpxClient(transport=transport),
    )


def test_the_client_reads_a_completion():
    completion = client().completions.create(
        model="toy", prompt=["ab", "c"], n=2, max_tokens=3, seed=1, logprobs=2
    )
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    assert all(len(choice.logprobs.tokens) == 3 for choice in completion.choices)
    assert completion.usage.total_tokens == 3 + 12
    assert completion.object == "text_completion"


@pytest.mark.parametrize("stop", [None, ["e", "the"]])
@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_of_the_client_is_the_completion(stop, echo):
    options = {
        "model": "toy",
        "prompt": ["ab", "€ "],
        "n": 2,
        "max_tokens": 12,
        "seed": 5,
        "stop": stop,
        "echo": echo,
        "logprobs": 1,
        "temperature": 3,
        "extra_body": {"return_depths": True, "max_recursions": 3},
    }
    whole = client().completions.create(**options)
    joined = {choice.index: ("", [], [], [], None) for choice in whole.choices}
    usage = []
    stream = client().completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        usage.append(chunk.usage)
        if not chunk.choices:
            continue
        [choice] = chunk.choices
        text, tokens, offsets, depths, reason = joined[choice.index]
        assert reason is None
        joined[choice.index] = (
            text + choice.text,
            tokens + choice.logprobs.tokens,
            offsets + choice.logprobs.text_offset,
            depths + choice.depths,
            choice.finish_reason,
        )
    for choice in whole.choices:
        assert joined[choice.index] == (
            choice.text,
            choice.logprobs.tokens,
            choice.logprobs.text_offset,
            choice.depths,
            choice.finish_reason,
        )
        assert choice.text.startswith(["ab", "€ "][choice.index // 2]) or not echo
    assert usage[-1] == whole.usage
    assert usage[:-1] == [None] * (len(usage) - 1)


def test_trap_23_usage_comes_only_if_asked_for():
    _, _, data = answer("/v1/completions", b'{"prompt": "a", "max_tokens": 2, "stream": true}')
    events = data.split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    bodies = [json.loads(event[6:]) for event in events[:-2]]
    assert all("usage" not in body and len(body["choices"]) == 1 for body in bodies)


def test_trap_23_a_chat_tells_its_role_first_and_its_end_once():
    stream = client(CHAT).chat.completions.create(
        model="chat",
        messages=MESSAGES,
        n=2,
        max_tokens=5,
        stream=True,
        seed=3,
        logprobs=True,
        top_logprobs=2,
        stream_options={"include_usage": True},
    )
    roles, reasons, texts, logprobs = {}, {}, {}, {}
    chunks = list(stream)
    assert chunks[-1].choices == []
    for chunk in chunks[:-1]:
        [choice] = chunk.choices
        if choice.index not in roles:
            roles[choice.index] = choice.delta.role
            assert choice.delta.content == ""
        else:
            assert choice.delta.role is None
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        if choice.logprobs is not None:
            logprobs.setdefault(choice.index, []).extend(choice.logprobs.content)
        if choice.finish_reason is not None:
            assert choice.index not in reasons
            reasons[choice.index] = choice.finish_reason
    assert roles == {0: "assistant", 1: "assistant"}
    assert set(reasons) == {0, 1}
    whole = client(CHAT).chat.completions.create(
        model="chat", messages=MESSAGES, n=2, max_tokens=5, seed=3, logprobs=True, top_logprobs=2
    )
    assert chunks[-1].usage == whole.usage
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content
        assert reasons[choice.index] == choice.finish_reason
        assert logprobs[choice.index] == choice.logprobs.content
        for entry in choice.logprobs.content:
            assert bytes(entry.bytes).decode() == entry.token
            assert len(entry.top_logprobs) == 2


def test_trap_24_an_error_within_a_stream_is_raised_by_the_client(monkeypatch):
    def broken(ids):
        logits = logits_after(ids)
        return logits * float("nan") if len(ids) > 3 else logits

    monkeypatch.setattr(toy, "logits_after", broken)
    stream = client().completions.create(model="toy", prompt="ab", stream=True)
    assert len([next(stream), next(stream)]) == 2
    with pytest.raises(openai.APIError, match=r"generation failed: .* nan"):
        next(stream)
    with pytest.raises(openai.InternalServerError, match="generation failed"):
        client().completions.create(model="toy", prompt="ab")


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (openai.BadRequestError, {"temperature": -1}),
        (openai.BadRequestError, {"extra_body": {"tools": [1]}}),
        (openai.NotFoundError, {"model": "other"}),
    ],
)
def test_the_client_raises_our_errors(error, options):
    with pytest.raises(error) as found:
        client().completions.create(**{"model": "toy", "prompt": "a", **options})
    assert found.value.param in ("temperature", "tools", "model")
    assert found.value.type == "invalid_request_error"


def test_trap_17_what_lm_eval_reads_are_the_logprobs_of_the_prompt():
    context, continuation = list(b"the "), list(b"cat")
    ids = context + continuation
    _, body = post(
        "/v1/completions",
        prompt=[ids, ids],
        temperature=0,
        max_tokens=1,
        logprobs=1,
        echo=True,
        seed=1234,
    )
    found = LocalCompletionsAPI.parse_logprobs(body, ctxlens=[len(context)] * 2)
    expected, greedy = 0.0, True
    for place in range(len(context), len(ids)):
        logprobs = logits_after(ids[:place]).log_softmax(-1)[0]
        expected += logprobs[ids[place]].item()
        greedy = greedy and logprobs.argmax().item() == ids[place]
    assert found == [(pytest.approx(expected, abs=1e-4), greedy)] * 2
    # A continuation that is the most probable one.
    best = list(context)
    for _ in range(3):
        best.append(logits_after(best).argmax().item())
    _, body = post(
        "/v1/completions", prompt=best, temperature=0, max_tokens=1, logprobs=1, echo=True
    )
    assert LocalCompletionsAPI.parse_logprobs(body, ctxlens=[len(context)])[0][1] is True


def test_echo_alone_returns_the_prompt_and_its_logprobs():
    status, body = post("/v1/completions", prompt="the cat", max_tokens=0, echo=True, logprobs=0)
    [choice] = body["choices"]
    assert status == 200
    assert (choice["text"], choice["finish_reason"]) == ("the cat", "length")
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert all(value < 0 for value in choice["logprobs"]["token_logprobs"][1:])
    tokens = choice["logprobs"]["tokens"]
    assert "".join(tokens) == "the cat"
    for token, offset in zip(tokens, choice["logprobs"]["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)


def whole_of(entry: TokenLogprobs) -> dict:
    body = CompletionBody(prompt="a", logprobs=2)
    reply = CompletionAnswer(MODEL, 7, body=body, prompts=[Prompt((97,), "a")])
    output = Output(
        request_id=1,
        token_ids=(entry.token_id,),
        logprobs=(entry,),
        finish_reason="deadline",
        usage=Usage(1, 1, 1),
    )
    return reply.whole([[output]])


def test_trap_17_minus_infinity_is_a_number_of_json():
    body = json.loads(
        dumps(whole_of(TokenLogprobs(97, -torch.inf, 4, ((98, 0.0), (99, -torch.inf)))))
    )
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [-9999.0]
    assert logprobs["top_logprobs"] == [{"b": 0.0, "c": -9999.0, "a": -9999.0}]
    assert body["choices"][0]["finish_reason"] == "deadline"
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}


def test_trap_17_tokens_of_equal_text_stay_apart(monkeypatch):
    monkeypatch.setattr(VOCABULARY, "token_text", lambda token: "same")
    [top] = whole_of(TokenLogprobs(97, -1.0, 1, ((97, -1.0), (98, -2.0))))["choices"][0][
        "logprobs"
    ]["top_logprobs"]
    assert top == {"same": -1.0, "token_id:98": -2.0}


def test_special_tokens_have_no_place_in_the_text():
    body = CompletionBody(prompt="a", logprobs=0, echo=True)
    reply = CompletionAnswer(MODEL, 7, body=body, prompts=[Prompt((EOS, 97))])
    entry = TokenLogprobs(98, -1.0, 1)
    output = Output(
        request_id=1,
        token_ids=(98,),
        text="b",
        logprobs=(entry,),
        finish_reason="length",
        usage=Usage(2, 1),
    )
    [choice] = reply.whole([[output]])["choices"]
    assert choice["text"] == "ab"
    assert choice["logprobs"]["text_offset"] == [0, 0, 1]
