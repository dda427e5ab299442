"""torch modules of mor: packing, routers and recursion, independent of any model library."""

from mor.modules.dynamoe import DynaMoE, ExpertRouting
from mor.modules.expert_choice import ExpertChoice
from mor.modules.expert_gates import GATES, ExpertGate
from mor.modules.experts import Experts
from mor.modules.metrics import RoutingMetrics
from mor.modules.mixture_of_depths import MixtureOfDepths
from mor.modules.mixture_of_recursions import MixtureOfRecursions
from mor.modules.packing import PackedBatch, Packing, pack
from mor.modules.recursion import RecursionOutput, RecursionStep
from mor.modules.routers import Router, RouterScore
from mor.modules.token_choice import TokenChoice
from mor.modules.token_merging import MergedTokens, TokenMerging
from mor.schedules import EXPERT_SCHEDULES, expert_schedule

__all__ = [
    "EXPERT_SCHEDULES",
    "GATES",
    "DynaMoE",
    "ExpertChoice",
    "ExpertGate",
    "ExpertRouting",
    "Experts",
    "MergedTokens",
    "MixtureOfDepths",
    "MixtureOfRecursions",
    "PackedBatch",
    "Packing",
    "RecursionOutput",
    "RecursionStep",
    "Router",
    "RouterScore",
    "RoutingMetrics",
    "TokenChoice",
    "TokenMerging",
    "expert_schedule",
    "pack",
]
