"""DynaMoE in plain PyTorch, one token and one expert at a time: slow, and to be read."""

import math

import torch
from torch import Tensor

from mor.modules import DynaMoE


def passes(gates: Tensor, gate: str, threshold: float, of_batch: Tensor) -> list[int]:
    """Experts of one token, best first, that pass; gates [E], of_batch all gates of the batch."""
    best_first = sorted(range(len(gates)), key=lambda e: (-gates[e].item(), e))
    if gate == "mass":
        chosen, mass = [], 0.0
        for expert in best_first:
            if mass >= threshold * gates.sum().item():
                break
            chosen.append(expert)
            mass += gates[expert].item()
        return chosen
    if gate == "row_quantile":
        threshold = torch.quantile(gates, threshold).item()
    elif gate == "batch_quantile":
        threshold = torch.quantile(of_batch.flatten(), threshold).item()
    return [expert for expert in best_first if gates[expert].item() > threshold]


def expert_mlp(layer: DynaMoE, expert: int, x: Tensor) -> Tensor:
    """One expert on one token [D]."""
    experts = layer.experts
    hidden = experts.up_proj[expert] @ x
    if experts.up_bias is not None:
        hidden = hidden + experts.up_bias[expert]
    if experts.gated:
        half = len(hidden) // 2
        hidden = experts.activation(hidden[:half]) * hidden[half:]
    else:
        hidden = experts.activation(hidden)
    out = experts.down_proj[expert] @ hidden
    return out if experts.down_bias is None else out + experts.down_bias[expert]


def dynamoe(layer: DynaMoE, x: Tensor) -> tuple[Tensor, list[int]]:
    """The output [N, D] of tokens [N, D] without noise, and each one's number of experts."""
    gate = layer.gate
    logits = x @ gate.router.layers[0].weight.T / gate.temperature
    gates = torch.stack([row.exp() / row.exp().sum() for row in logits])
    outputs, counts = [], []
    for token in range(len(x)):
        chosen = passes(gates[token], gate.gate, gate.threshold, gates)
        if len(chosen) < gate.min_k:
            order = sorted(range(layer.num_experts), key=lambda e: (-gates[token, e].item(), e))
            chosen = order[: gate.min_k]
        chosen = chosen[: gate.max_k]
        mixed = gates[token, chosen]
        mixed = mixed.softmax(dim=0) if layer.second_softmax else mixed / mixed.sum()
        out = torch.zeros_like(x[token])
        for weight, expert in zip(mixed, chosen, strict=True):
            out = out + weight * expert_mlp(layer, expert, x[token])
        outputs.append(out)
        counts.append(len(chosen))
    assert all(math.isfinite(out.sum().item()) for out in outputs)
    return torch.stack(outputs), counts
