"""What a replica of examples/serve_ray.py builds, with Ray itself left out."""

import argparse
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'mor[serve]'")

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve_ray.py"


@pytest.mark.parametrize(("gpus", "device"), [(0.0, "cpu"), (0.5, "cuda")])
def test_a_replica_computed_where_its_gpus_were_not(monkeypatch, gpus, device):
    """With --gpus 0 on a machine with a GPU, or the other way round."""
    options: dict = {}
    builders: list = []

    def ingress(build):
        builders.append(build)
        return lambda replica: replica

    def deployment(**given):
        options.update(given)
        return lambda replica: SimpleNamespace(bind=lambda: replica)

    ray, serve, config = (ModuleType(name) for name in ("ray", "ray.serve", "ray.serve.config"))
    ray.serve, serve.ingress, serve.deployment = serve, ingress, deployment
    config.HTTPOptions = None
    for module in (ray, serve, config):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    engines: list = []
    monkeypatch.setattr(
        "mor.training.generate.load_model",
        lambda folder: (SimpleNamespace(to=lambda place: f"model on {place}"), None),
    )
    monkeypatch.setattr("mor.serving.Engine", lambda model, *_, **__: engines.append(model))
    monkeypatch.setattr(
        "mor.serving.server.create_app",
        lambda *_, **__: SimpleNamespace(add_middleware=lambda kind: None),
    )
    example = runpy.run_path(str(EXAMPLE))
    args = argparse.Namespace(
        model=Path("model"), kv_memory="1MiB", replicas=1, threads=1, gpus=gpus
    )
    example["deployment"](args)
    builders[0]()
    assert engines == [f"model on {device}"]
    assert options["ray_actor_options"]["num_gpus"] == gpus
