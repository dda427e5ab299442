"""Mixture-of-Recursions for PyTorch: operators, modules, Hugging Face models, training.

Importing the package registers the operators (`torch.ops.mor.*`) and the model type `mor` with
Transformers' Auto classes.
"""

import importlib
from types import ModuleType

from mor.version import __version__  # isort: skip - before the rest, which may read it

from mor.models import (
    MoRConfig,
    MoRForCausalLM,
    MoRModel,
    load_authors_checkpoint,
    load_swapped,
    swap,
)

#: Imported at their first use as `mor.NAME`: they bring the Trainer, matplotlib and the like.
_LAZY = ("analysis", "callbacks", "convert", "data", "distributed", "optim", "training", "viz")

__all__ = [
    "MoRConfig",
    "MoRForCausalLM",
    "MoRModel",
    "__version__",
    "load_authors_checkpoint",
    "load_swapped",
    "swap",
]


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return importlib.import_module(f"mor.{name}")
    raise AttributeError(f"module 'mor' has no attribute {name!r}")
