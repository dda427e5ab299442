"""Serving: requests with their own sampling parameters, depths and streams, in one engine.

`import mor` does not import this package. The HTTP parts need `pip install mor[serve]`, grammars
need `pip install mor[structured]`.
"""

from mor.serving.engine import Engine
from mor.serving.loop import EngineLoop, EngineStopped
from mor.serving.outputs import Delta, Output, Timings, TokenLogprobs, Usage
from mor.serving.requests import Grammar, ModelLimits, Request, RequestError, SamplingParams

__all__ = [
    "Delta",
    "Engine",
    "EngineLoop",
    "EngineStopped",
    "Grammar",
    "ModelLimits",
    "Output",
    "Request",
    "RequestError",
    "SamplingParams",
    "Timings",
    "TokenLogprobs",
    "Usage",
]
