"""The weights of a model as the passes of `mor.serving.forward` use them: merged, read once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mor.models.relaxation import shared_part
from mor.ops.packed_linear import pack_linear, packed_linear

__all__ = ["LayerWeights", "Norm", "Product", "RotaryTable", "in_tiles", "read_layer", "read_norm"]

#: Rows of a tile where a row's result must not depend on how many rows are beside it.
_TILE = 16

#: Up to so many rows `packed_linear` is as fast as PyTorch's product, or faster.
_FEW_ROWS = 64


class Product:
    """A linear layer, as fast as there is one for few rows: `x W^T + bias`.

    On a CPU float32 and bfloat16 weights are packed for `packed_linear`, in which a row's result
    depends on nothing beside it; where there are many rows, PyTorch's product of the model's own
    weights may be faster.

    Args:
        weights: [out_i, in] each, in one dtype; their products are computed as one.
        biases: [out_i] each or None, one for each weight; missing ones are zeros if any is given.
        deterministic: the result of a row does not depend on how many rows are beside it.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        deterministic: bool = False,
    ) -> None:
        self.weights, first = [w.detach() for w in weights], weights[0]
        self.bias: Tensor | None = None
        if any(bias is not None for bias in biases):
            self.bias = torch.cat(
                [
                    w.new_zeros(w.shape[0]) if b is None else b.detach()
                    for w, b in zip(weights, biases, strict=True)
                ]
            )
        self.deterministic = deterministic
        self.packed: Tensor | None = None
        merged = torch.cat(self.weights)
        self.num_outputs = merged.shape[0]
        if first.device.type == "cpu" and first.dtype in (torch.float32, torch.bfloat16):
            self.packed = pack_linear(merged)
            many = not deterministic and _multiplies(first.dtype)
            self.most_rows = _FEW_ROWS if many else None
        else:
            self.weights = [merged]

    def __call__(self, x: Tensor) -> Tensor:
        """[N, in] to [N, out]."""
        if self.packed is None:
            return in_tiles(self._product, x) if self.deterministic else self._product(x)
        if self.most_rows is None or x.shape[0] <= self.most_rows:
            return packed_linear(x, self.packed, self.num_outputs, self.bias)
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        if len(self.weights) == 1:
            return functional.linear(x, self.weights[0], self.bias)
        y = torch.cat([functional.linear(x, weight) for weight in self.weights], dim=1)
        return y if self.bias is None else y.add_(self.bias)


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether the CPU has fast products of many rows in this dtype."""
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def in_tiles(compute: Callable[..., Any], *rows: Tensor | None) -> Any:
    """`compute` of tiles of 16 rows, the last one padded: the same for a row in any company.

    Args:
        compute: from tensors [n, ...], one or several, to one such tensor or a tuple of them.
        *rows: [N, ...] each; None is handed on.
    """
    count = next(x.shape[0] for x in rows if x is not None)

    def tiles_of(x: Tensor | None) -> Sequence[Tensor | None]:
        if x is None:
            return [None] * -(-count // _TILE)
        padding = x.new_zeros(-count % _TILE, *x.shape[1:])
        return torch.cat([x, padding]).split(_TILE)

    results = [compute(*tile) for tile in zip(*map(tiles_of, rows), strict=True)]
    if isinstance(results[0], tuple):
        return tuple(torch.cat(parts)[:count] for parts in zip(*results, strict=True))
    return torch.cat(results)[:count]


class Norm:
    """RMS norm over the last dimension: `x / rms(x) * weight`.

    Args:
        weight: broadcasts to x. In a wider dtype than x, the product is rounded once.
        eps: added to the mean of squares.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight.detach(), eps

    def __call__(self, x: Tensor) -> Tensor:
        """The shape and dtype of x."""
        shape = (x.shape[-1],)
        if self.weight.dim() == 1 and self.weight.dtype == x.dtype:
            return functional.rms_norm(x, shape, self.weight, self.eps)
        y = functional.rms_norm(x.to(self.weight.dtype), shape, None, self.eps) * self.weight
        return y.to(x.dtype)


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer.

    Attributes:
        before_attention, before_mlp: norms of the input of each half.
        after_attention, after_mlp: norms of their output (Gemma), or None.
        qkv: queries, keys and values in one product; None where some rows need only some of them.
        q, kv: the same in two products; None where `qkv` is there.
        qk_norm: norm of the heads of queries and keys, its weight [H + Hkv, head_dim]; or None.
        q_norm, k_norm: the same in two; or None.
        output: of attention.
        gate_up, down: of the MLP.
        activation: of the gate.
        scale: factor of the attention scores.
        rotary: kind of the layer's rotary angles; see `RotaryTable`.
        rotates: queries and keys are rotated at all.
    """

    before_attention: Norm
    before_mlp: Norm
    after_attention: Norm | None
    after_mlp: Norm | None
    qkv: Product | None
    q: Product | None
    kv: Product | None
    qk_norm: Norm | None
    q_norm: Norm | None
    k_norm: Norm | None
    output: Product
    gate_up: Product
    down: Product
    activation: Callable[[Tensor], Tensor]
    scale: float
    rotary: str | None
    rotates: bool


def read_layer(
    layer: Any, use: int, *, rotary: str | None, splits_kv: bool, deterministic: bool
) -> LayerWeights:
    """Reads a decoder layer of Transformers.

    Args:
        layer: the module, as the architectures `PackedModel` takes have it.
        use: how many earlier depths used the layer; relaxed layers differ by it.
        rotary: see `LayerWeights`.
        splits_kv: some rows need queries without keys and values, or the other way round.
        deterministic: see `Product`.

    Raises:
        ValueError: a linear layer or a norm of another kind.
    """
    attention, mlp = layer.self_attn, layer.mlp

    def product(*modules: nn.Module) -> Product:
        parts = [_linear(module, use) for module in modules]
        return Product([w for w, _ in parts], [b for _, b in parts], deterministic)

    projections = attention.q_proj, attention.k_proj, attention.v_proj
    norms = _head_norms(attention, use)
    sandwich = hasattr(layer, "pre_feedforward_layernorm")
    before_mlp = layer.pre_feedforward_layernorm if sandwich else layer.post_attention_layernorm
    return LayerWeights(
        before_attention=read_norm(layer.input_layernorm, use),
        before_mlp=read_norm(before_mlp, use),
        after_attention=read_norm(layer.post_attention_layernorm, use) if sandwich else None,
        after_mlp=read_norm(layer.post_feedforward_layernorm, use) if sandwich else None,
        qkv=None if splits_kv else product(*projections),
        q=product(projections[0]) if splits_kv else None,
        kv=product(*projections[1:]) if splits_kv else None,
        qk_norm=norms[0],
        q_norm=norms[1],
        k_norm=norms[2],
        output=product(attention.o_proj),
        gate_up=product(mlp.gate_proj, mlp.up_proj),
        down=product(mlp.down_proj),
        activation=mlp.act_fn,
        scale=attention.scaling,
        rotary=rotary,
        rotates=bool(getattr(attention, "use_rope", True)),
    )


def read_norm(module: Any, use: int = 0) -> Norm:
    """An RMS norm of Transformers, of the `use`-th use of its layer where each has its own."""
    copies = getattr(module, "modules_to_save", {})
    name = f"recursion_{use}"
    module = copies[name] if name in copies else shared_part(module)
    kind = type(module).__name__
    if not kind.endswith("RMSNorm"):
        raise ValueError(f"PackedModel: expected RMS norms, got {kind}")
    if kind.startswith("Gemma"):  # its weights are kept as what they are more than 1
        widest = torch.promote_types(module.weight.dtype, torch.float32)
        return Norm(1 + module.weight.detach().to(widest), module.eps)
    return Norm(module.weight, module.variance_epsilon)


def _head_norms(attention: Any, use: int) -> tuple[Norm | None, Norm | None, Norm | None]:
    """Norms of the heads of queries and keys together, of queries, of keys."""
    if not hasattr(attention, "q_norm"):
        return None, None, None
    head_dim, norms = attention.head_dim, []
    for name in ("q", "k"):
        norm = read_norm(getattr(attention, f"{name}_norm"), use)
        heads = _linear(getattr(attention, f"{name}_proj"), use)[0].shape[0] // head_dim
        norms.append(Norm(norm.weight.expand(heads, head_dim), norm.eps))
    q, k = norms
    return Norm(torch.cat([q.weight, k.weight]), q.eps), q, k


@torch.no_grad()
def _linear(module: Any, use: int) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer, the adapter of its `use`-th use merged into them."""
    name = f"recursion_{use}"
    if type(module) is nn.Linear:
        return module.weight, module.bias
    base = getattr(module, "base_layer", None)
    adapters = list(getattr(module, "lora_A", {}))
    if type(base) is not nn.Linear or any(not a.startswith("recursion_") for a in adapters):
        raise ValueError(
            f"PackedModel: expected linear layers without adapters, got {type(module).__name__}; "
            "merge adapters into the model first (peft: merge_and_unload)"
        )
    if name not in adapters:
        return base.weight, base.bias
    down, up, scaling = module.lora_A[name], module.lora_B[name], module.scaling[name]
    weight = base.weight + scaling * (up.weight @ down.weight)
    if name in module.lora_magnitude_vector:  # DoRA
        magnitude = module.lora_magnitude_vector[name].weight
        weight = weight * (magnitude / weight.norm(dim=1)).unsqueeze(1)
    bias = base.bias
    if up.bias is not None:
        bias = scaling * up.bias if bias is None else bias + scaling * up.bias
    return weight, bias


class RotaryTable:
    """Rotary cos and sin by position, in the model's dtype.

    Args:
        rotary: the module of Transformers.
        kinds: kinds of angles that layers have (Gemma's by type of layer); None names the only one.
        length: positions of the table.
        like: a tensor of the dtype and on the device of the states.
        head_dim: of the heads.

    Raises:
        ValueError: angles that depend on more than the position, or are not of the whole head.
    """

    @torch.no_grad()
    def __init__(
        self, rotary: Any, kinds: Sequence[str | None], length: int, like: Tensor, head_dim: int
    ) -> None:
        types = rotary.rope_type
        for kind in set(types.values()) if isinstance(types, dict) else {types}:
            if kind in ("dynamic", "longrope"):
                raise ValueError(
                    f"PackedModel: rotary embeddings of type {kind!r} change with the length of "
                    "the sequence, and cached keys do not: not supported"
                )
        self.tables: dict[str | None, tuple[Tensor, Tensor]] = {}
        positions = torch.arange(length, device=like.device).unsqueeze(0)
        for kind in dict.fromkeys(kinds):
            cos, sin = rotary(like, positions, *([] if kind is None else [kind]))
            if cos.shape[-1] != head_dim:
                raise ValueError(
                    f"PackedModel: expected rotary angles of all {head_dim} dimensions of a head, "
                    f"got {cos.shape[-1]}"
                )
            cos, sin = cos[0].contiguous(), sin[0].clone()
            sin[:, : head_dim // 2].neg_()
            self.tables[kind] = cos, sin

    def __call__(self, positions: Tensor) -> dict[str | None, tuple[Tensor, Tensor]]:
        """Cos and sin [N, 1, head_dim] of positions [N].

        The first half of the sines is negated: `x * cos + x.roll(head_dim / 2) * sin` rotates x.
        """
        return {
            kind: (cos[positions].unsqueeze(1), sin[positions].unsqueeze(1))
            for kind, (cos, sin) in self.tables.items()
        }
