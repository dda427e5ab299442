"""Operators of mor: one file each, with its plain-PyTorch reference, fake kernel and autograd.

Importing the package loads the compiled library, or the one that the environment variable
`MOR_OPS_LIBRARY` names (tests/simt); `torch.ops.mor.*` are the raw operators. Each file keeps its
own as `_operator`: to look it up costs 0.4 us a call, a fifth of the smallest call.
"""

import os
from pathlib import Path

import torch

import mor


def _load_library() -> None:
    if library := os.environ.get("MOR_OPS_LIBRARY"):
        torch.ops.load_library(library)
        return
    # In an editable install the library and the sources lie in different folders, both in __path__.
    for folder in mor.__path__:
        path = Path(folder) / "_ops.so"
        if path.exists():
            torch.ops.load_library(path)
            return
    raise ImportError(
        "mor: _ops.so is missing; reinstall mor with a C++ compiler on PATH (pip install .)"
    )


_load_library()

from mor.ops.bipartite_match import bipartite_match  # noqa: E402
from mor.ops.depth_attention import depth_attention  # noqa: E402
from mor.ops.gather_tokens import gather_tokens  # noqa: E402
from mor.ops.group_rows import group_rows  # noqa: E402
from mor.ops.kv_append import kv_append  # noqa: E402
from mor.ops.kv_gather import kv_gather  # noqa: E402
from mor.ops.packed_linear import packed_linear  # noqa: E402
from mor.ops.paged_depth_attention import paged_depth_attention  # noqa: E402
from mor.ops.route_threshold import route_threshold  # noqa: E402
from mor.ops.route_topk import route_topk  # noqa: E402
from mor.ops.scatter_tokens import scatter_tokens, scatter_tokens_  # noqa: E402
from mor.ops.segment_reduce import segment_reduce  # noqa: E402

__all__ = [
    "bipartite_match",
    "depth_attention",
    "gather_tokens",
    "group_rows",
    "kv_append",
    "kv_gather",
    "packed_linear",
    "paged_depth_attention",
    "route_threshold",
    "route_topk",
    "scatter_tokens",
    "scatter_tokens_",
    "segment_reduce",
]
