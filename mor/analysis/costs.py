"""Costs of a model before it is built: parameters, FLOPs and key/value bytes per token.

FLOPs are counted as in the paper (section 4.1): two per multiply-add of every matrix product and of
attention over the visible (query, key) pairs; norms, activations and softmax are left out. The
language-model head and the routers are included, the embedding lookup costs nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula
from transformers import AutoModelForCausalLM, PreTrainedConfig

from mor.models import MoRConfig, MoRForCausalLM
from mor.models.attention import windows
from mor.modules.recursion import default_capacities

__all__ = [
    "active_shares",
    "count_parameters",
    "flops_breakdown",
    "flops_per_token",
    "kv_bytes_per_token",
    "visible_pairs",
]

#: A training step is a forward and a backward of twice its matrix products.
_TRAINING = 3


def active_shares(
    config: PreTrainedConfig, recursion_shares: Sequence[float] | None = None
) -> list[float]:
    """Share of the tokens that each unrolled layer computes, [L] values in [0, 1].

    Args:
        config: a `MoRConfig`, or the config of a dense model (all ones).
        recursion_shares: share of the tokens that takes each recursion, as measured. Default: the
            capacities for expert-choice; (R - r) / R for token-choice, what balance gives.
    """
    _check_llama_like(config)
    shares = [1.0] * config.num_hidden_layers
    if not isinstance(config, MoRConfig) or config.router is None:
        return shares
    if recursion_shares is not None and len(recursion_shares) != config.num_recursions:
        raise ValueError(
            f"active_shares: expected one share for each of the {config.num_recursions} "
            f"recursions, got {list(recursion_shares)}"
        )
    if recursion_shares is not None and not all(
        0 <= later <= before
        for before, later in zip([1.0, *recursion_shares], recursion_shares, strict=False)
    ):
        raise ValueError(
            "active_shares: expected non-increasing shares in [0, 1], as a token that exited does "
            f"not return, got {list(recursion_shares)}"
        )
    capacities = recursion_shares or config.capacities or default_capacities(config.num_recursions)
    schedule = config.schedule
    for step, capacity in enumerate(capacities):
        for depth in schedule.step(step):
            shares[depth] = float(capacity)
    return shares


def _check_llama_like(config: PreTrainedConfig) -> None:
    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    missing = [name for name in needed if getattr(config, name, None) is None]
    if missing:
        raise ValueError(
            "mor.analysis: expected the configuration of a Llama-like model, got a "
            f"{type(config).__name__} without {', '.join(missing)}"
        )


def _reuses_kv(config: PreTrainedConfig) -> list[bool]:
    """Whether each unrolled layer attends over keys and values of an earlier use of its weights."""
    if not isinstance(config, MoRConfig):
        return [False] * config.num_hidden_layers
    return [config.schedule.reuses_kv(depth) for depth in range(config.num_hidden_layers)]


def flops_breakdown(
    config: PreTrainedConfig, seq_len: int, shares: Sequence[float] | None = None
) -> dict[str, float]:
    """Forward FLOPs per token of a sequence of `seq_len` tokens, by part.

    Args:
        config: a `MoRConfig`, or the config of a dense Llama-like model.
        seq_len: S, tokens of a sequence.
        shares: [R] share of the tokens that takes each recursion; see `active_shares`.

    Returns:
        "projections" (Q, K, V, O), "attention", "mlp", "router" and "head".
    """
    _check_llama_like(config)
    d, heads = config.hidden_size, config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or d // heads
    parts = dict.fromkeys(("projections", "attention", "mlp", "router"), 0.0)
    strategy = config.kv_strategy if isinstance(config, MoRConfig) else "recursion"
    dense = config.base_config if isinstance(config, MoRConfig) else config
    layers = zip(active_shares(config, shares), _reuses_kv(config), windows(dense), strict=True)
    for share, reuses, window in layers:
        queries = share * seq_len
        projected = 2 * d * heads * head_dim
        if not (reuses and strategy == "shared"):
            projected += 2 * d * kv_heads * head_dim
        parts["projections"] += 2 * projected * share
        # Active queries see the active keys before them, or with shared keys every key before them.
        pairs = queries * (seq_len + 1) / 2 if reuses else queries * (queries + 1) / 2
        if window is not None and window < seq_len:
            # In the window, of which those at the start of the sequence see only a part.
            keys = window - window * (window - 1) / 2 / seq_len
            pairs = queries * (keys if reuses else 1 + share * (keys - 1))
        parts["attention"] += 4 * heads * head_dim * pairs / seq_len
        parts["mlp"] += 2 * 3 * d * config.intermediate_size * share
    parts["router"] = _router_flops(config, shares)
    parts["head"] = 2.0 * d * config.vocab_size
    return parts


def _router_flops(config: PreTrainedConfig, shares: Sequence[float] | None) -> float:
    if not isinstance(config, MoRConfig) or config.router is None or config.router_type == "random":
        return 0.0
    d = config.hidden_size
    outputs = 1 if config.router == "expert" else config.num_recursions
    width = {"linear": 0, "mlp": 2 * d, "wide_mlp": 4 * d}[config.router_type]
    each = 2 * (d * width + width * outputs) if width else 2 * d * outputs
    if config.router == "token":
        return float(each)
    assert config.capacities is not None
    # A recursion's candidates are the tokens that took the one before it.
    candidates = 1 + sum((shares or config.capacities)[:-1])
    return float(each * candidates * (2 if config.router_aux == "router" else 1))


def flops_per_token(
    config: PreTrainedConfig,
    seq_len: int,
    training: bool = False,
    shares: Sequence[float] | None = None,
) -> float:
    """FLOPs per token: forward, or three times that for a training step; see `flops_breakdown`."""
    forward = sum(flops_breakdown(config, seq_len, shares).values())
    return _TRAINING * forward if training else forward


def kv_bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> float:
    """Bytes of keys and values a cache keeps per token, on average over the tokens."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = 0.0
    strategy = config.kv_strategy if isinstance(config, MoRConfig) else "recursion"
    for share, reuses in zip(active_shares(config), _reuses_kv(config), strict=True):
        if not reuses:
            kept += share
        elif strategy == "hybrid":
            kept += 1.0  # every token, the active ones with their own keys
    return kept * 2 * kv_heads * head_dim * dtype.itemsize


def count_parameters(config: PreTrainedConfig) -> int:
    """Parameters of the language model, shared ones counted once."""
    with torch.device("meta"):
        model: nn.Module
        if isinstance(config, MoRConfig):
            model = MoRForCausalLM(config)
        else:
            model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


def visible_pairs(
    q_positions: Tensor,
    k_positions: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool = True,
    window: int | None = None,
) -> int:
    """(query, key) pairs that depth_attention computes, depths aside; see its arguments."""
    pairs = 0
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(q_ends) - 1):
        q = q_positions[q_ends[b] : q_ends[b + 1]]
        k = k_positions[k_ends[b] : k_ends[b + 1]]
        if causal:
            pairs += int(torch.searchsorted(k.contiguous(), q.contiguous(), right=True).sum())
            if window is not None:
                passed = torch.searchsorted(k.contiguous(), q.contiguous() - window, right=True)
                pairs -= int(passed.sum())
        else:
            pairs += q.shape[0] * k.shape[0]
    return pairs


def _attention_pairs(
    q: Tensor,
    q_positions: Tensor,
    k_positions: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    window: int | None,
) -> int:
    pairs = visible_pairs(q_positions, k_positions, cu_seqlens_q, cu_seqlens_k, causal, window)
    return pairs * q.shape[1] * q.shape[2]


# torch.utils.flop_counter.FlopCounterMode counts mor's attention like any matrix product.
@register_flop_formula(torch.ops.mor.depth_attention, get_raw=True)
def _forward_flops(
    q: Tensor, k: Tensor, v: Tensor, qp: Tensor, kp: Tensor, cq: Tensor, ck: Tensor,
    q_depths: Any, k_depths: Any, key_bias: Any, causal: bool, scale: float,
    window: int | None = None, **kwargs: Any,
) -> int:  # fmt: skip
    return 4 * _attention_pairs(q, qp, kp, cq, ck, causal, window)


@register_flop_formula(torch.ops.mor.depth_attention_backward, get_raw=True)
def _backward_flops(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    qp: Tensor, kp: Tensor, cq: Tensor, ck: Tensor,
    q_depths: Any, k_depths: Any, key_bias: Any, causal: bool, scale: float,
    window: int | None = None, **kwargs: Any,
) -> int:  # fmt: skip
    return 8 * _attention_pairs(q, qp, kp, cq, ck, causal, window)
