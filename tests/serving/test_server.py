"""The server with the real client: answers, streams, errors, departures, signals."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

openai = pytest.importorskip("openai")
from fastapi.testclient import TestClient  # noqa: E402

from mor.serving.server import create_app  # noqa: E402

from .small_server import engine  # noqa: E402

ROOT = Path(__file__).parents[2]
PROMPT = "the cat"


def start(*arguments: str) -> tuple[subprocess.Popen, str]:
    """The process and its address, once it listens."""
    command = [sys.executable, "-m", "tests.serving.small_server", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    line = process.stdout.readline()
    assert line.startswith("small at http://"), line
    url = line.split()[2]
    for _ in range(200):
        try:
            urllib.request.urlopen(f"{url}/health")
            break
        except OSError:
            time.sleep(0.05)
    return process, url


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    process, url = start()
    yield url
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)


def post(url, data, path="/v1/completions", **headers):
    """Status and body of any answer."""
    data = data if isinstance(data, bytes) else json.dumps(data).encode()
    headers = {"Content-Type": "application/json", **headers}
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, data, headers)) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def metric(url, name):
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    return float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1])


def wait_until_idle(url):
    for _ in range(200):
        if metric(url, "mor_requests_running") + metric(url, "mor_requests_waiting") == 0:
            break
        time.sleep(0.05)
    assert metric(url, "mor_requests_running") == metric(url, "mor_kv_blocks_used") == 0


def test_a_completion_is_that_of_the_model(client):
    from .small_server import model
    from .small_tokenizers import byte_level

    answer = client.completions.create(
        model="small", prompt=PROMPT, max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
    )
    ids = torch.tensor([byte_level()(PROMPT)["input_ids"]])
    want = model().generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert answer.choices[0].text == byte_level().decode(want)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12


def test_a_stream_joined_is_the_whole_answer(client):
    options = {"model": "small", "prompt": PROMPT, "max_tokens": 20, "seed": 3, "n": 2}
    whole = client.completions.create(**options)
    texts = ["", ""]
    usage = None
    for chunk in client.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert usage == whole.usage.model_copy(
        update={"prompt_tokens_details": usage.prompt_tokens_details}
    )


def test_a_chat_with_depths_and_log_probabilities(client):
    messages = [{"role": "user", "content": "hello"}]
    answer = client.chat.completions.create(
        model="small",
        messages=messages,
        max_tokens=6,
        logprobs=True,
        top_logprobs=2,
        extra_body={"return_depths": True, "max_recursions": 2},
    )
    (choice,) = answer.choices
    assert len(choice.logprobs.content) == len(choice.depths) <= 6
    assert set(choice.depths) <= {1, 2}
    streamed = client.chat.completions.create(
        model="small", messages=messages, max_tokens=6, temperature=0, stream=True
    )
    again = client.chat.completions.create(
        model="small", messages=messages, max_tokens=6, temperature=0
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
    assert text == again.choices[0].message.content


def test_echo_gives_the_prompts_log_probabilities(client):
    answer = client.completions.create(
        model="small", prompt=[5, 6, 7], max_tokens=1, echo=True, logprobs=1, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None
    assert len(logprobs.token_logprobs) == 4
    assert max(logprobs.token_logprobs[1:]) < 0


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "JSON"),
        (b"\xff\xfe", 400, "JSON"),
        (b"[" * 100_000, 400, "nesting"),
        ({"prompt": PROMPT, "model": "other"}, 404, "model"),
        ({"prompt": PROMPT, "tools": [1]}, 400, "tools"),
        ({"prompt": [10**9]}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": PROMPT, "max_tokens": 10**6}, 400, "max_tokens"),
        ({"prompt": PROMPT, "temperature": -1}, 400, "temperature"),
        ({"prompt": PROMPT, "max_recursions": 9}, 400, "max_recursions"),
        ({"prompt": ["a"] * 81}, 429, "open prompts"),
        (b'{"prompt": "' + b"x" * 5_000_000 + b'"}', 413, "bytes"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_bad_request_is_refused_by_name(url, body, status, words):
    got, answer = post(url, body)
    assert got == status
    assert words in json.loads(answer)["error"]["message"]
    assert len(answer) < 2000


def test_only_what_a_client_can_mend_is_a_bad_request(monkeypatch):
    """An unexpected ValueError was answered 400, with its message."""
    served = engine()
    with TestClient(create_app(served), raise_server_exceptions=False) as client:
        too_large = {"prompt": PROMPT, "max_tokens": 1, "n": 65}
        answer = client.post("/v1/completions", json=too_large)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")

        def fail(*args: object, **options: object) -> int:
            raise ValueError("a secret")

        monkeypatch.setattr(served, "add", fail)
        answer = client.post("/v1/completions", json={"prompt": PROMPT})
        assert answer.status_code == 500
        assert "secret" not in answer.text


def test_an_error_before_a_stream_is_no_stream(client):
    with pytest.raises(openai.BadRequestError, match="max_recursions"):
        client.completions.create(
            model="small", prompt=PROMPT, stream=True, extra_body={"max_recursions": 9}
        )


def test_other_paths(url):
    assert json.load(urllib.request.urlopen(f"{url}/v1/models"))["data"][0]["id"] == "small"
    assert json.loads(post(url, {"prompt": "the"}, "/tokenize")[1])["tokens"] == [257]
    assert json.loads(post(url, {"tokens": [257]}, "/detokenize")[1])["prompt"] == "the"
    assert b"EventSource" in urllib.request.urlopen(url).read()
    assert post(url, {}, "/nothing")[0] == 404
    assert post(url, {}, "/health")[0] == 405
    schema = json.load(urllib.request.urlopen(f"{url}/openapi.json"))
    assert "prompt" in json.dumps(schema["paths"]["/v1/completions"])


def test_the_docs_name_every_metric(url):
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    there = {name.removesuffix("_created") for name in re.findall(r"^# TYPE (mor_\w+)", text, re.M)}
    page = (ROOT / "docs" / "serving.md").read_text().partition("## What to watch")[2]
    assert set(re.findall(r"`(mor_\w+)`", page.partition("## ")[0])) == there


def test_the_live_page_gets_tokens_and_depths(url, client):
    with urllib.request.urlopen(f"{url}/live") as live:
        assert live.readline() == b"event: start\n"
        client.completions.create(model="small", prompt=PROMPT, max_tokens=3)
        lines = iter(live.readline, b"")
        deltas = json.loads(next(x for x in lines if x.startswith(b"data: ["))[6:])
    assert deltas[0]["depths"]
    assert "text" in deltas[0]


def serve_many(url) -> None:
    """30% of 64 disconnect, streaming or waiting; the others get what they get alone."""

    async def all_of_them():
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)

        async def one(i, leave):
            options = {
                "model": "small",
                "prompt": [5 + i % 50, 6, 7],
                "max_tokens": 24,
                "temperature": 0,
                "extra_body": {"ignore_eos": True},
            }
            if leave and i % 2:
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(client.completions.create(**options), 0.02)
                return None
            text = ""
            stream = await client.completions.create(**options, stream=True)
            async for chunk in stream:
                text += chunk.choices[0].text
                if leave:
                    await stream.close()
                    return None
            return text

        together = await asyncio.gather(*(one(i, leave=i % 10 < 3) for i in range(64)))
        alone = [await one(i, False) for i in (3, 9, 44)]
        assert [together[i] for i in (3, 9, 44)] == alone
        assert sum(text is not None for text in together) == 43
        await client.close()

    asyncio.run(all_of_them())
    wait_until_idle(url)


def test_many_clients_of_whom_some_leave(url):
    serve_many(url)


@pytest.mark.slow
def test_memory_does_not_grow_by_clients_that_leave_and_bodies_that_are_wrong():
    psutil = pytest.importorskip("psutil")
    process, url = start()
    memory = psutil.Process(process.pid).memory_info

    def a_round() -> int:
        serve_many(url)
        for body in (b"{", b"\xff", b"[" * 100_000, b'{"prompt": "' + b"x" * 5_000_000 + b'"}'):
            assert post(url, body)[0] in (400, 413)
        return memory().rss

    before = [a_round() for _ in range(3)][-1]  # what is imported, pooled and cached is there now
    after = [a_round() for _ in range(12)][-1]
    assert after < 1.05 * before
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def test_a_key_is_asked_for():
    process, url = start("secret")
    try:
        assert post(url, {"prompt": PROMPT})[0] == 401
        assert post(url, {"prompt": PROMPT}, Authorization="Bearer secret")[0] == 200
        assert urllib.request.urlopen(f"{url}/health").status == 200
    finally:
        process.terminate()
        assert process.wait(30) == 0


def test_a_signal_lets_running_requests_finish():
    """Trap 9: uvicorn ends streams as soon as it should exit."""
    process, url = start()
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
    options = {"model": "small", "prompt": PROMPT, "temperature": 0, "max_tokens": 300}
    stream = client.completions.create(**options, stream=True, extra_body={"ignore_eos": True})
    first = next(stream)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    status, answer = post(url, {"prompt": PROMPT})
    assert status == 503
    assert json.loads(answer)["error"]["code"] == "unavailable"
    chunks = [first, *stream]
    assert chunks[-1].choices[0].finish_reason == "length"
    assert process.wait(30) == 0
