"""Costs of a model, and pictures of its routing."""

from mor.analysis.costs import (
    active_shares,
    count_parameters,
    flops_breakdown,
    flops_per_token,
    kv_bytes_per_token,
    visible_pairs,
)
from mor.analysis.plots import (
    plot_depth_by_position,
    plot_loss_against_cost,
    plot_loss_against_flops,
    plot_router_scores,
    plot_text_by_depth,
    router_scores,
)

__all__ = [
    "active_shares",
    "count_parameters",
    "flops_breakdown",
    "flops_per_token",
    "kv_bytes_per_token",
    "plot_depth_by_position",
    "plot_loss_against_cost",
    "plot_loss_against_flops",
    "plot_router_scores",
    "plot_text_by_depth",
    "router_scores",
    "visible_pairs",
]
