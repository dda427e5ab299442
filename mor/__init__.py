"""Mixture-of-Recursions for PyTorch: operators, modules, Hugging Face models, training.

Importing the package registers the operators (`torch.ops.mor.*`) and the model type `mor` with
Transformers' Auto classes.
"""

import importlib as _importlib
import sys as _sys
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from mor._moved import NEW_PATHS as _NEW_PATHS
from mor.version import __version__


def _is_command() -> bool:
    """Whether this process is `mor` or `python -m mor`, which import the package first.

    The command loads the models itself, once it needs them: --help and a misspelt option would wait
    seconds for PyTorch and Transformers.
    """
    script = _sys.argv[:1]
    if script == ["-m"]:  # as long as the package is looked for
        given = _sys.orig_argv
        return "-m" in given and given[given.index("-m") + 1 :][:1] == ["mor"]
    return bool(script) and _Path(script[0]).name == "mor"


if _TYPE_CHECKING or not _is_command():
    from mor.models import (
        MoRConfig,
        MoRForCausalLM,
        MoRModel,
        load_authors_checkpoint,
        load_swapped,
        swap,
    )
if _TYPE_CHECKING:
    from mor.systems import (
        apply_dynamoe,
        apply_mod,
        apply_pmod,
        apply_token_merging,
        apply_video_mod,
        remove,
    )

#: Imported at their first use as `mor.NAME`: they bring the Trainer, matplotlib and the like.
_SUBMODULES = (
    "analysis", "data", "models", "modules", "ops", "schedules", "systems", "training", *_NEW_PATHS,
)  # fmt: skip

#: Of `mor.systems`, imported at their first use.
_SYSTEMS = (
    "apply_dynamoe", "apply_mod", "apply_pmod", "apply_token_merging", "apply_video_mod", "remove",
)  # fmt: skip

__all__ = [
    "MoRConfig",
    "MoRForCausalLM",
    "MoRModel",
    "__version__",
    "apply_dynamoe",
    "apply_mod",
    "apply_pmod",
    "apply_token_merging",
    "apply_video_mod",
    "load_authors_checkpoint",
    "load_swapped",
    "remove",
    "swap",
]


def __getattr__(name: str) -> _Any:
    if name in _SUBMODULES:
        return _importlib.import_module(f"mor.{name}")
    if name in _SYSTEMS:
        return getattr(_importlib.import_module("mor.systems"), name)
    if name in __all__:
        return getattr(_importlib.import_module("mor.models"), name)
    raise AttributeError(f"module 'mor' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBMODULES, *(name for name in globals() if name[:2] == "__")})
