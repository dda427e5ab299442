"""Plugin of pytest (-p): mor loads the libraries in the folder MOR_INSTRUMENTED, not its own."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(os.environ["MOR_INSTRUMENTED"])
_load_library = torch.ops.load_library


def _load_instrumented(path: Any) -> None:
    is_ours = Path(path).name == "_ops.so"
    _load_library(_FOLDER / "_ops.so" if is_ours else path)


torch.ops.load_library = _load_instrumented  # type: ignore[method-assign]
for _host in _FOLDER.glob("_host*.so"):
    _spec = importlib.util.spec_from_file_location("mor._host", _host)
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["mor._host"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["mor._host"])
torch.set_num_threads(3)  # a machine of one core has threads, too
