"""depth_attention and its backward, as fuzz_operators.py lists them."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from fuzzing import FLOATING, Draw, Inputs, Operator, in_double
from torch import Tensor

from mor.ops.depth_attention import depth_attention, reference
from tests.support.operators import EPSILON, packed

UNUSED = 2**63 - 1  # position of a cache slot that holds no key
HEADS = ((1, 1), (2, 2), (2, 1), (6, 2), (9, 3), (17, 1), (0, 1))
HEAD_DIMS = (1, 3, 8, 15, 16, 17, 24, 32, 33, 64, 96, 256)
QUERIES, KEYS = (0, 1, 2, 3, 5, 16, 17, 33), (0, 1, 2, 7, 16, 31, 33, 64, 70, 130, 290)
OPERANDS = (
    "q_positions", "k_positions", "cu_seqlens_q", "cu_seqlens_k", "q_depths", "k_depths",
    "key_bias", "causal", "scale", "window",
)  # fmt: skip


def draw_positions(d: Draw, queries: list[int], keys: list[int]) -> tuple[Tensor, Tensor]:
    q_positions, k_positions = [torch.zeros(0).long()], [torch.zeros(0).long()]
    for num_queries, num_keys in zip(queries, keys, strict=True):
        kind = d.pick("subset", "gaps", "equal", "unused", "negative", "late")
        key = torch.arange(num_keys)
        chosen = d.random(0, max(num_keys, 1), num_queries)
        if kind == "gaps":
            key, chosen = key.pow(2) + 3, d.random(0, num_keys**2 + 9, num_queries)
        if kind == "equal":
            key, chosen = key // 8 * 0, chosen * 0
        if kind == "unused":
            key[num_keys // 2 :] = UNUSED
        if kind == "negative":
            key, chosen = key - 40, chosen - 60
        if kind == "late":
            chosen = chosen + d.pick(2**31, 2**40)
        q_positions.append(chosen.sort().values)
        k_positions.append(key)
    return torch.cat(q_positions), torch.cat(k_positions)


def draw_attention(d: Draw) -> Inputs:
    dtype, head_dim, (heads, kv_heads) = d.pick(*FLOATING), d.pick(*HEAD_DIMS), d.pick(*HEADS)
    queries = d.lengths(3, QUERIES)
    keys = [d.pick(*KEYS) for _ in queries]
    num_queries, num_keys = sum(queries), sum(keys)
    q_positions, k_positions = draw_positions(d, queries, keys)
    total = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {
        "q": d.floats(dtype, num_queries, heads, head_dim),
        "k": d.floats(dtype, num_keys, kv_heads, head_dim),
        "v": d.floats(dtype, num_keys, kv_heads, head_dim),
        "q_positions": d.layout(q_positions, expand=False),
        "k_positions": d.layout(k_positions, expand=False),
        "cu_seqlens_q": packed(queries),
        "cu_seqlens_k": packed(keys),
        "q_depths": None,
        "k_depths": None,
        "key_bias": d.floats(total, num_keys) if d.flag() else None,
        "causal": d.flag(),
        "scale": d.pick(None, 1.0, 0.0, -0.7),
    }
    if d.flag():
        inputs["q_depths"] = d.layout(d.random(-1, 4, num_queries).int())
        inputs["k_depths"] = d.layout(d.random(-1, 4, num_keys).int())
    inputs["window"] = d.pick(None, 1, 2, 7, 33, 64, 2**40) if inputs["causal"] else None
    return inputs


def with_hidden_nan(call: Any) -> Any:
    """`call` with NaN in keys beyond every query of their sequence, as unused slots may hold."""

    def poisoned(**inputs: Any) -> tuple[Tensor, ...]:
        hidden = torch.ones(inputs["k"].shape[0], dtype=torch.bool)
        cu_q, cu_k = (inputs[n].tolist() for n in ("cu_seqlens_q", "cu_seqlens_k"))
        for b in range(len(cu_q) - 1):
            queries, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
            at, key = inputs["q_positions"][queries], inputs["k_positions"][keys]
            if at.numel() == 0:
                continue
            hidden[keys] = (key > at[-1]) & inputs["causal"]
            if inputs["window"] is not None:
                hidden[keys] |= key <= at[0] - inputs["window"]
            if inputs["q_depths"] is not None:
                hidden[keys] |= inputs["k_depths"][keys] < inputs["q_depths"][queries].min()
        nan = {n: inputs[n].masked_fill(hidden[:, None, None], torch.nan) for n in ("k", "v")}
        return call(**inputs | nan)

    return poisoned


def magnitudes(op: Operator, inputs: Inputs) -> tuple[Tensor, ...]:
    """Bounds of the sums of absolute terms, those of the scores in units of their precision."""
    exact = in_double(inputs)
    q, k, v, bias = exact["q"].abs(), exact["k"].abs(), exact["v"].abs(), exact["key_bias"]
    scale = abs(q.shape[2] ** -0.5 if exact["scale"] is None else exact["scale"])
    group = q.shape[1] // k.shape[1]
    products = torch.einsum("ihd,jhd->ijh", q, k.repeat_interleave(group, 1))
    score = products.max().item() * scale if products.numel() else 0.0
    if bias is not None and bias.numel():
        score += bias.abs().max().item()
    total = torch.float64 if inputs["q"].dtype == torch.float64 else torch.float32
    ratio = EPSILON[total] / EPSILON[inputs["q"].dtype]
    spread = 1 + score * ratio
    largest = v.max() if v.numel() else v.sum()
    if "grad_out" not in inputs:
        return largest * spread, torch.tensor(1 + score)
    grad = exact.pop("grad_out").abs()
    leaf = k.clone().requires_grad_()
    out, _ = reference(**exact | {"v": leaf})
    change = 2 * grad.sum(-1, keepdim=True) * largest

    def of_keys(t: Tensor) -> Tensor:
        return torch.autograd.grad(
            out, leaf, t.expand(out.shape), retain_graph=True, materialize_grads=True
        )[0]

    grad_bias = of_keys(change).sum(1) / ratio if bias is not None else leaf.new_zeros(0)
    grads = (change * out * scale, of_keys(change * q) * scale, of_keys(grad), grad_bias)
    return tuple(g.detach() * spread for g in grads)


def backward(grad_out: Tensor, **inputs: Any) -> tuple[Tensor, ...]:
    out, lse = depth_attention(**inputs)
    scale = inputs["q"].shape[-1] ** -0.5 if inputs["scale"] is None else inputs["scale"]
    tensors = (inputs[n] for n in ("q", "k", "v"))
    rest = (scale if n == "scale" else inputs[n] for n in OPERANDS)
    return torch.ops.mor.depth_attention_backward(grad_out, *tensors, out, lse, *rest)


def backward_reference(grad_out: Tensor, **inputs: Any) -> tuple[Tensor, ...]:
    leaves = {n: inputs[n] for n in ("q", "k", "v", "key_bias") if inputs[n] is not None}
    leaves = {n: t.detach().clone().requires_grad_() for n, t in leaves.items()}
    out, lse = reference(**inputs | leaves)
    grads = torch.autograd.grad(
        out, tuple(leaves.values()), grad_out.to(out), materialize_grads=True, allow_unused=True
    )
    return grads if "key_bias" in leaves else (*grads, lse.new_zeros(0))


def draw_backward(d: Draw) -> Inputs:
    inputs = draw_attention(d)
    return {"grad_out": d.floats(inputs["q"].dtype, *inputs["q"].shape), **inputs}


def falling(name: str, cu: str) -> Any:
    """Positions that fall inside a sequence."""

    def apply(d: Draw, inputs: Inputs) -> Inputs | None:
        bounds = inputs[cu].tolist()
        inner = [i for a, b in pairwise(bounds) for i in range(a + 1, b)]
        if not inner or inputs[name] is None:
            return None
        positions, at = inputs[name].clone(), d.pick(*inner)
        positions[at] = d.pick(positions[at - 1].item() - 1, torch.iinfo(positions.dtype).min)
        return {name: positions}

    return apply


def bad_window(d: Draw, inputs: Inputs) -> Inputs:
    return {"window": d.pick(0, -1, -(2**40)), "causal": True}


def lone_depths(d: Draw, inputs: Inputs) -> Inputs | None:
    return None if inputs["q_depths"] is None else {d.pick("q_depths", "k_depths"): None}


ATTENTION: dict[str, Any] = {
    "refused_as": "depth_attention(_backward)?",
    "magnitudes": magnitudes,
    "any_device": ("q",),
    "tied": {"q": (0, 2), "k": (0, 1, 2), "v": (0, 1, 2), "grad_out": (0, 1, 2)}
    | {n: (0,) for n in OPERANDS[:7]},
    "broken": {
        "q_positions fall": falling("q_positions", "cu_seqlens_q"),
        "k_positions fall": falling("k_positions", "cu_seqlens_k"),
        "window": bad_window,
        "window without causal": lambda d, _: {"window": 3, "causal": False},
        "depths": lone_depths,
    },
}
FORWARD = Operator(depth_attention, reference, draw_attention, **ATTENTION)
BACKWARD = Operator(backward, backward_reference, draw_backward, factor=3.0, **ATTENTION)
OPERATORS = {
    "depth_attention": FORWARD,
    "depth_attention_backward": BACKWARD,
    "hidden keys of depth_attention": replace(
        FORWARD, call=with_hidden_nan(depth_attention), refused_as=""
    ),
    "hidden keys of depth_attention_backward": replace(
        BACKWARD, call=with_hidden_nan(backward), refused_as=""
    ),
}
