"""Plugin of pytest (-p): mor loads the library in MOR_INSTRUMENTED instead of its own."""

import os
from pathlib import Path
from typing import Any

import torch

_load_library = torch.ops.load_library


def _load_instrumented(path: Any) -> None:
    is_ours = Path(path).name == "_ops.so"
    _load_library(os.environ["MOR_INSTRUMENTED"] if is_ours else path)


torch.ops.load_library = _load_instrumented  # type: ignore[method-assign]
torch.set_num_threads(3)  # a machine of one core has threads, too
