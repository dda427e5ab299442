"""Training: `transformers.Trainer` with routing in its logs, its options, checkpoints, runs.

Names are imported at their first use: the command reads `mor.training.options`, and must answer
before PyTorch is loaded.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mor.training.arguments import training_arguments
    from mor.training.callbacks import LogRouting, UpdateRouterBias
    from mor.training.optim import parameter_groups
    from mor.training.trainer import Diverged, MoRTrainer, loss_scale

__all__ = [
    "Diverged",
    "LogRouting",
    "MoRTrainer",
    "UpdateRouterBias",
    "loss_scale",
    "parameter_groups",
    "training_arguments",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mor.training' has no attribute {name!r}")
    home = {"parameter_groups": "optim", "training_arguments": "arguments"}.get(name, "trainer")
    return getattr(importlib.import_module(f"mor.training.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *globals()})
