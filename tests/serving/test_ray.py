"""examples/serve_ray.py: two replicas on this machine, one of which is killed under load."""

import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .small_server import model
from .small_tokenizers import byte_level

pytestmark = pytest.mark.slow
pytest.importorskip("ray.serve", reason="needs Ray: pip install 'ray[serve]'")

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
PORT, CLUSTER_PORT = 8177, 6397


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served") / "small"
    model().save_pretrained(folder)
    byte_level().save_pretrained(folder)
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as home:  # sockets: a short path
        env = os.environ | {
            "HOME": home, "RAY_TMPDIR": home, "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ADDRESS": f"127.0.0.1:{CLUSTER_PORT}",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        }  # fmt: skip
        head = [RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=2"]
        head += [
            f"--port={CLUSTER_PORT}",
            "--include-dashboard=false",
            "--object-store-memory=100000000",
        ]
        example = [sys.executable, ROOT / "examples" / "serve_ray.py", folder]
        example += ["--replicas", "2", "--kv-memory", "4MiB", "--port", str(PORT)]
        log = Path(home) / "log"
        started = []
        try:
            with log.open("w") as file:
                for command, sign in ((head, "Ray runtime started"), (example, "2 replicas at")):
                    started.append(
                        subprocess.Popen(command, stdout=file, stderr=file, env=env, cwd=home)
                    )

                    def ready(process=started[-1], sign=sign) -> bool:
                        assert process.poll() is None, log.read_text()
                        return sign in log.read_text()

                    wait_for(ready, 120, log.read_text)
            yield f"http://127.0.0.1:{PORT}"
        finally:
            for process in reversed(started):
                process.send_signal(signal.SIGTERM)
                process.wait(60)


def wait_for(condition, seconds: float, why=str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, why()
        time.sleep(0.2)


class Answer:
    """A stream that is read as it comes, and the process that gives it."""

    def __init__(self, url: str, first: int, tokens: int) -> None:
        body = {"prompt": [first, 6, 7], "max_tokens": tokens, "temperature": 0}
        data = json.dumps(body | {"ignore_eos": True, "stream": True}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/completions", data, headers)
        self.response = urllib.request.urlopen(request, timeout=120)
        self.replica = int(self.response.headers["x-replica"])

    def text(self) -> str | None:
        """All of it; None if the replica was lost."""
        text = ""
        try:
            for line in self.response:
                if line.strip() == b"data: [DONE]":
                    return text
                if line.startswith(b"data: "):
                    choices = json.loads(line[6:]).get("choices", ())
                    text += "".join(choice["text"] for choice in choices)
        except (OSError, http.client.HTTPException):
            pass
        return None


def test_a_replica_killed_under_load_costs_its_own_requests_alone(url):
    with ThreadPoolExecutor(32) as pool:
        running = list(pool.map(lambda i: Answer(url, 5 + i, 400), range(16)))
        replicas = {answer.replica for answer in running}
        assert len(replicas) == 2
        victim = running[0].replica
        texts = [pool.submit(answer.text) for answer in running]
        os.kill(victim, signal.SIGKILL)
        later = list(pool.map(lambda i: Answer(url, 30 + i, 8).text(), range(16)))
        assert None not in later  # those that came after it
        found = [text.result() for text in texts]
        lost = [i for i, text in enumerate(found) if text is None]
        assert lost == [i for i, answer in enumerate(running) if answer.replica == victim]
        kept = [i for i in range(16) if i not in lost]
        assert kept
        for i in kept[:2]:
            assert found[i] == Answer(url, 5 + i, 400).text()

    def seen() -> set[int]:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda i: Answer(url, 5 + i, 2), range(8)))
        assert all(answer.text() is not None for answer in answers)
        return {answer.replica for answer in answers}

    wait_for(lambda: len(seen() - {victim}) == 2, 120)  # Ray started another
