"""On CUDA an operator says nothing to the host and stays on its stream: a graph can hold it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mor import ops
from mor.ops.packed_linear import pack_linear

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def calls(device: str) -> dict[str, Callable[[Tensor], Any]]:
    """Every operator on the rows of two sequences, [40, 16]."""
    cu = torch.tensor([0, 25, 40], dtype=torch.int32, device=device)
    rows = torch.arange(40, device=device)
    table = torch.arange(6, dtype=torch.int32, device=device).view(2, 3)
    lens = torch.tensor([20, 17], dtype=torch.int32, device=device)
    cu_two = torch.arange(3, dtype=torch.int32, device=device)

    def heads(x: Tensor) -> Tensor:
        return x.view(40, 2, 8)

    def cache(x: Tensor) -> Tensor:
        return x.repeat(2, 1)[:48].view(6, 8, 2, 8)

    def appended(x: Tensor) -> Tensor:
        k, v = torch.zeros(2, 6, 8, 2, 8, device=device)
        ops.kv_append(k, v, heads(x), heads(x), rows)
        return k + v

    return {
        "gather_tokens": lambda x: ops.gather_tokens(x, rows[:20]),
        "scatter_tokens": lambda x: ops.scatter_tokens(x, x[:20], rows[:20] * 2, x[:20, 0]),
        "scatter_tokens_": lambda x: ops.scatter_tokens_(x.clone(), x[:20], rows[:20] * 2),
        "route_topk": lambda x: ops.route_topk(x[:, 0].contiguous(), 7, cu),
        "route_threshold": lambda x: ops.route_threshold(
            x[:, 0].contiguous(), 0.0, cu, max_rows=40
        ),
        "group_rows": lambda x: ops.group_rows((x[:, 0] > 0).long(), 2, cu),
        "segment_reduce": lambda x: ops.segment_reduce(x, rows // 2, 20, "mean"),
        "bipartite_match": lambda x: ops.bipartite_match(x, x.flip(0), cu, cu),
        "depth_attention": lambda x: ops.depth_attention(*[heads(x)] * 3, rows, rows, cu, cu),
        "paged_depth_attention": lambda x: ops.paged_depth_attention(
            heads(x)[:2], cache(x), cache(x), table, lens, cu_two
        ),
        "packed_linear": lambda x: ops.packed_linear(x[:5], pack_linear(x[5:25]), 20),
        "kv_append": appended,
        "kv_gather": lambda x: ops.kv_gather(cache(x), cache(x), table, lens, 37),
    }


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.parametrize("name", calls("cpu"))
def test_a_graph_replays_with_other_contents(name: str) -> None:
    call, x = calls("cuda")[name], torch.randn(40, 16, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        call(x)  # on another stream, and what a first call sets up
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = tensors(call(x))
    x.normal_()
    graph.replay()
    with torch.no_grad():
        want = tensors(call(x))
    assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))
