"""torch modules of mor: packing, routers and recursion, independent of any model library."""

from mor.modules.metrics import RoutingMetrics
from mor.modules.packing import PackedBatch, Packing, pack
from mor.modules.recursion import ExpertChoice, RecursionOutput, RecursionStep, TokenChoice
from mor.modules.routers import Router, RouterScore

__all__ = [
    "ExpertChoice",
    "PackedBatch",
    "Packing",
    "RecursionOutput",
    "RecursionStep",
    "Router",
    "RouterScore",
    "RoutingMetrics",
    "TokenChoice",
    "pack",
]
