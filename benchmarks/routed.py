"""What the benchmarks of routed tokens share: shapes and inputs."""

import argparse

import torch
from harness import generator
from torch import Tensor

__all__ = ["SHAPES", "ascending_rows", "packed", "shares"]

#: B, S, D.
SHAPES = {"small": (8, 1024, 576), "large": (8, 2048, 960), "smoke": (2, 36, 65)}


def shares(parser: argparse.ArgumentParser) -> None:
    """The option --shares: how many tokens of a sequence are kept."""
    parser.add_argument(
        "--shares", type=int, nargs="+", default=[2, 3], help="k is S over each (default 2 3)"
    )


def ascending_rows(batch: int, length: int, k: int) -> Tensor:
    """Random k rows of every sequence, ascending, as route_topk returns them: [B, k] in [0, S)."""
    chosen = torch.rand(batch, length, generator=generator()).topk(k, dim=1).indices
    return chosen.sort(dim=1).values


def packed(rows: Tensor, length: int) -> Tensor:
    """Rows of [B, S, D] as rows of [B * S, D]."""
    return (rows + torch.arange(rows.shape[0])[:, None] * length).flatten()
