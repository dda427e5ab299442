"""Serve a model from several processes or machines behind one address, with Ray Serve.

pip install 'mor[serve]' 'ray[serve]'
python examples/serve_ray.py runs/demo/mor --replicas 2 --threads 4

Each replica is the application of `mor serve` with an engine of its own. Ray sends a request to the
replica of two that has fewer, and replaces a replica that died or whose engine failed. On a cluster
(`ray start`) the replicas spread over its machines, which all see the model's folder. How many it
takes, and what to watch: docs/serving.md.
"""

import argparse
import os
import signal
import threading
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import HTTPOptions

from mor.serving import Engine
from mor.serving.server import create_app
from mor.training.generate import load_model

#: Open requests of a replica; the server answers 429 to more, and Ray sends it no more than these.
MOST_REQUESTS = 256


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", type=Path, help="folder of a saved model, on every machine")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="CPU cores of a replica")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of a replica")
    parser.add_argument("--kv-memory", default="2GiB", help="of each replica")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    return parser.parse_args()


class ReplicaHeader:
    """Says in every answer which process gave it."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI has it."""

        async def named(message: Any) -> None:
            if message["type"] == "http.response.start":
                replica = b"x-replica", str(os.getpid()).encode()
                message = {**message, "headers": [*message.get("headers", ()), replica]}
            await send(message)

        await self.app(scope, receive, named)


def deployment(args: argparse.Namespace) -> Any:
    """What Ray runs: the application, built in each replica."""
    folder, kv_memory = args.model.resolve(), args.kv_memory
    device = "cuda" if args.gpus else "cpu"

    def build() -> FastAPI:
        model, tokenizer = load_model(folder)
        app = create_app(
            Engine(model.to(device), tokenizer, kv_memory=kv_memory),
            name=folder.name,
            max_requests=MOST_REQUESTS,
        )
        app.add_middleware(ReplicaHeader)
        return app

    @serve.deployment(
        name="mor",
        num_replicas=args.replicas,
        max_ongoing_requests=MOST_REQUESTS,
        health_check_period_s=2,
        # Ray sets OMP_NUM_THREADS, which PyTorch follows, to the cores of a replica.
        ray_actor_options={"num_cpus": args.threads, "num_gpus": args.gpus},
    )
    @serve.ingress(build)
    class Replica:
        def check_health(self) -> None:
            """Raises if the engine failed: then Ray starts another replica."""
            self.app.state.loop.check_open()

    return Replica.bind()


def main() -> None:
    """Serves until a signal comes."""
    args = parse()
    ray.init(include_dashboard=False, log_to_driver=False)
    serve.start(http_options=HTTPOptions(host=args.host, port=args.port))
    serve.run(deployment(args), name="mor")
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    print(f"{args.replicas} replicas at http://{args.host}:{args.port}", flush=True)
    stopped.wait()
    serve.shutdown()  # running requests have the 20 s that Ray gives them
    ray.shutdown()


if __name__ == "__main__":
    main()
