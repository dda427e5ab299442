"""Token merging inside the layers of loaded vision encoders: Transformers and timm."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mor.models.derived_class import Derived, derived_class
from mor.modules.packing import even_lengths
from mor.modules.token_merging import MergedTokens, TokenMerging
from mor.ops.depth_attention import depth_attention

__all__ = ["VisionMerging", "find_encoder", "merge_encoder"]


@dataclass(frozen=True)
class Family:
    """Paths of an encoder's modules, by the name of the encoder's class.

    Attributes:
        layers: the list of layers.
        attention: in a layer, the branch from the residual stream back to it; the second module is
            the attention.
        mlp: in a layer, the other branch.
        protected: leading tokens that never merge, or the attribute of the encoder that says it.
    """

    layers: str
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    protected: int | str


_VIT = (("layernorm_before", "attention", "dropout"), ("layernorm_after", "mlp", "dropout"))
_CLIP = (("layer_norm1", "self_attn"), ("layer_norm2", "mlp"))
_TIMM = (("norm1", "attn", "ls1", "drop_path1"), ("norm2", "mlp", "ls2", "drop_path2"))
FAMILIES = {
    "ViTModel": Family("layers", *_VIT, protected=1),
    "DeiTModel": Family("layers", *_VIT, protected=2),
    "CLIPVisionModel": Family("encoder.layers", *_CLIP, protected=1),
    "SiglipVisionModel": Family("encoder.layers", *_CLIP, protected=0),
    "VisionTransformer": Family("blocks", *_TIMM, protected="num_prefix_tokens"),
}


class LayerMerging:
    """State of merging that a layer and its attention share: options, and the last call."""

    def __init__(
        self,
        family: Family,
        merging: TokenMerging,
        proportional: bool,
        previous: "LayerMerging | None",
        last: bool,
    ) -> None:
        self.family, self.merging, self.proportional = family, merging, proportional
        self.previous, self.last = previous, last
        # Of the last call. Each layer keeps its own, so that one recomputed in the backward pass
        # (gradient checkpointing) finds the sizes that it was computed with.
        self.size: Tensor | None = None
        self.sources: Tensor | None = None

    @property
    def incoming(self) -> tuple[Tensor | None, Tensor | None]:
        """Size and sources of the tokens that come in; None as long as nothing has merged."""
        return (
            (None, None) if self.previous is None else (self.previous.size, self.previous.sources)
        )


class VisionMerging:
    """`model.token_merging`: what the last call of a model merged, and how to take merging off.

    Attributes:
        layers: of each layer its `r`, and after a call `size` [B, M] and `sources` [B, N], which
            are None as long as nothing has merged; see `MergedTokens`.
    """

    def __init__(self, encoder: str, layers: list[LayerMerging]) -> None:
        self.encoder, self.layers = encoder, layers

    @property
    def r(self) -> list[int]:
        """Pairs that each layer merges, at most."""
        return [layer.merging.r for layer in self.layers]

    @property
    def sources(self) -> Tensor | None:
        """[B, N] int64 of the last layer: tokens with the same number were merged."""
        return self.layers[-1].sources

    @property
    def size(self) -> Tensor | None:
        """[B, M] float32 of the last layer: how many tokens each of those left stands for."""
        return self.layers[-1].size

    def undo(self, model: Any) -> None:
        """Gives the layers their own classes back."""
        encoder = model.get_submodule(self.encoder)
        for layer in encoder.get_submodule(self.layers[0].family.layers).children():
            for module in (layer, layer.get_submodule(self.layers[0].family.attention[1])):
                module.__class__ = module.dense_class
                del module.token_merging
        del model.token_merging


def find_encoder(model: nn.Module) -> tuple[str, Family] | None:
    """Path and family of the vision encoder in a model; None if there is none."""
    for path, module in model.named_modules():
        for parent in type(module).__mro__:
            if parent.__name__ in FAMILIES and parent.__module__.startswith(
                ("transformers", "timm")
            ):
                return path, FAMILIES[parent.__name__]
    return None


def merge_encoder(
    model: nn.Module, path: str, family: Family, r: int | Sequence[int], proportional: bool
) -> VisionMerging:
    """Puts merging into every layer of the encoder at `path`."""
    encoder = model.get_submodule(path)
    layers = list(encoder.get_submodule(family.layers).children())
    each = [r] * len(layers) if isinstance(r, int) else [int(value) for value in r]
    if len(each) != len(layers):
        raise ValueError(
            f"apply_token_merging: r: expected one value for each of {len(layers)} layers, got "
            f"{len(each)}"
        )
    for index, layer in enumerate(layers):
        _check_layer(layer, family, index)
    prefix = family.protected
    protected = prefix if isinstance(prefix, int) else int(getattr(encoder, prefix))
    states: list[LayerMerging] = []
    for index, pairs in enumerate(each):
        previous, last = states[-1] if states else None, index == len(each) - 1
        merging = TokenMerging(pairs, protected)
        states.append(LayerMerging(family, merging, proportional, previous, last))
    for layer, state in zip(layers, states, strict=True):
        for module, behaviour in (
            (layer, MergingLayer),
            (layer.get_submodule(family.attention[1]), MergingAttention),
        ):
            module.__class__ = derived_class(behaviour, type(module))
            module.__dict__["token_merging"] = state
    return VisionMerging(path, states)


def _check_layer(layer: nn.Module, family: Family, index: int) -> None:
    names = {name for name, _ in layer.named_children()}
    missing = [name for name in family.attention + family.mlp if name not in names]
    if missing:
        raise ValueError(
            f"apply_token_merging: layer {index}: expected submodules "
            f"{', '.join(family.attention + family.mlp)}, got a {type(layer).__name__} without "
            f"{', '.join(missing)}"
        )
    attention = layer.get_submodule(family.attention[1])
    names = {name for name, _ in attention.named_children()}
    if "qkv" not in names and not {"q_proj", "k_proj", "v_proj"} <= names:
        raise ValueError(
            f"apply_token_merging: layer {index}: expected an attention with qkv or q_proj, k_proj "
            f"and v_proj, got a {type(attention).__name__}"
        )
    dropout = _dropout(attention)
    if dropout:
        raise ValueError(
            f"apply_token_merging: layer {index}: expected attention dropout 0, got {dropout}; "
            "set it to 0 in the configuration"
        )


def _dropout(attention: nn.Module) -> float:
    if isinstance(module := getattr(attention, "attn_drop", None), nn.Dropout):
        return module.p
    value: float = getattr(attention, "attention_dropout", getattr(attention, "dropout", 0.0))
    return value


class MergingLayer(Derived):
    """Goes before the class of a layer: merges between its attention and its MLP."""

    token_merging: LayerMerging

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, M, D] in, fewer tokens out; of the last layer as many as came into the first."""
        state = self.token_merging
        size, sources = state.incoming
        if size is None and state.merging.r == 0:
            state.size = state.sources = None
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        _refuse_masks(args, kwargs)
        norm, attention, *rest = (getattr(self, name) for name in state.family.attention)
        x, metric = attention.attend(norm(hidden_states))
        for module in rest:
            x = module(x)
        merged = state.merging(hidden_states + x, metric, size, sources)
        x = merged.x
        for name in state.family.mlp:
            x = getattr(self, name)(x)
        x = merged.x + x
        state.size, state.sources = merged.size, merged.sources
        return MergedTokens(x, *merged[1:]).unmerge() if state.last else x


class MergingAttention(Derived):
    """Goes before the class of an attention: `attend` weights each key by its size."""

    token_merging: LayerMerging

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of every token to all.

        Args:
            x: [B, M, D].

        Returns:
            The output [B, M, D], and the mean of the keys over the heads [B, M, head_dim].
        """
        size, _ = self.token_merging.incoming
        q, k, v = self._heads(x)
        batch, tokens = x.shape[:2]
        bias = None
        if size is not None and self.token_merging.proportional:
            bias = size.log().flatten().to(torch.promote_types(q.dtype, torch.float32))
        positions = torch.arange(tokens, device=x.device).repeat(batch)
        lengths = even_lengths(batch, tokens, x.device)
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        y, _ = depth_attention(
            q, k, v, positions, positions, lengths, lengths, key_bias=bias, causal=False,
            scale=getattr(self, "scaling", getattr(self, "scale", None)),
        )  # fmt: skip
        metric = k.detach().mean(1).view(batch, tokens, -1)
        return self._project(y.reshape(batch, tokens, -1), x), metric

    def _heads(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values, each [B, M, H, head_dim]."""
        shape = (*x.shape[:2], -1, self.head_dim)  # type: ignore[attr-defined]
        if not hasattr(self, "qkv"):
            return [getattr(self, name)(x).view(shape) for name in ("q_proj", "k_proj", "v_proj")]
        q, k, v = (t.view(shape) for t in self.qkv(x).chunk(3, dim=-1))
        return [self.q_norm(q), self.k_norm(k), v]  # type: ignore[attr-defined]

    def _project(self, y: Tensor, x: Tensor) -> Tensor:
        for name in ("o_proj", "out_proj"):
            if hasattr(self, name):
                return getattr(self, name)(y)
        y = self.norm(y)  # type: ignore[attr-defined]
        if getattr(self, "gate", None) is not None:
            y = y * self.gate(x).sigmoid()  # type: ignore[attr-defined]
        return self.proj_drop(self.proj(y))  # type: ignore[attr-defined]


def _refuse_masks(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = [value for value in args if value is not None]
    given += [value for name, value in kwargs.items() if "mask" in name and value is not None]
    if given or kwargs.get("is_causal"):
        raise ValueError(
            "token merging: expected attention of every token to all, got an attention mask or "
            "is_causal"
        )
