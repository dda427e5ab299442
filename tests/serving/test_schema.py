"""Schemathesis: no request that the server's own OpenAPI schema allows or forbids makes a 5xx."""

import json
import signal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

schemathesis = pytest.importorskip("schemathesis", reason="needs pip install schemathesis")

from .test_server import post, start, wait_until_idle  # noqa: E402

pytestmark = pytest.mark.slow
PATHS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]


@pytest.fixture(scope="module")
def server():
    process, url = start()
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    yield url, operations
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def cases(operation) -> st.SearchStrategy:
    return st.one_of(
        operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode
    )


def many(count: int) -> settings:
    return settings(max_examples=count, deadline=None, suppress_health_check=[*HealthCheck])


def test_no_get_breaks_the_server(server):
    gets = [operation for operation in server[1] if operation.method == "get"]
    assert len(gets) >= 5

    @many(100)
    @given(st.one_of(map(cases, gets)))
    def check(case):
        assert case.call(timeout=60).status_code < 500

    check()


@pytest.mark.parametrize("path", PATHS)
def test_no_body_breaks_the_server(server, path):
    url, operations = server
    (operation,) = (o for o in operations if (o.path, o.method) == (path, "post"))
    statuses = []

    @many(200)
    @given(cases(operation))
    def check(case):
        assert case.call(timeout=60).status_code < 500
        statuses.append(mended(url, path, case.body))

    check()
    assert statuses.count(200) > 30


def mended(url, path, body) -> int | None:
    """The status once what is wrong is left out: most bodies come no further than that."""
    seen, status = set(), None
    while isinstance(body, dict):
        if "completions" in path:
            body["deadline_s"] = 0.1  # of long answers a part will do
        status, answer = post(url, body, path)
        assert status < 500, (body, answer)
        if status == 200:
            break
        name = json.loads(answer)["error"]["param"]
        if name not in body or name in seen:
            break
        seen.add(name)
        valid = {"prompt": "the", "messages": [{"role": "user", "content": "the"}], "tokens": [5]}
        body = {key: value for key, value in body.items() if key != name}
        body |= {name: valid[name]} if name in valid else {}
    return status


def test_then_the_server_is_idle(server):
    wait_until_idle(server[0])
    assert post(server[0], {"prompt": "the", "max_tokens": 2})[0] == 200
