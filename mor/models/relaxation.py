"""Relaxed recursion: a shared layer gets its own low-rank adapter for every recursion that uses it.

The adapters are `peft`'s LoRA and DoRA layers, injected in place under the names `recursion_0`,
`recursion_1`, ...; norms, which no product of two matrices can move cheaply, get a copy per use.
"""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mor.models.configuration_mor import MoRConfig
from mor.models.derived_class import Derived, derived_class

__all__ = ["initialise_adapters", "relax", "shared_part", "start_as_shared", "start_from_dense"]

_PREFIX = "recursion_"
#: What a later use computes nothing with where it reuses the keys and values of the first.
_OF_KEYS = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm")


def relax(layers: nn.ModuleList, config: MoRConfig) -> None:
    """Injects the adapters of `config.relaxation` into each layer that is used more than once.

    Args:
        layers: the unique layers, in place.
        config: whose options `relaxation`, `relaxation_rank`, `relaxation_alpha` and
            `relaxation_targets` count.

    Raises:
        ImportError: peft is not installed.
        ValueError: targets that no layer has.

    Reference: MoR paper, appendix (relaxation), after Relaxed Recursive Transformers
    (arXiv 2410.20672).
    """
    schedule = config.schedule
    for unique, layer in enumerate(layers):
        uses = len(schedule.depths_of(unique))
        if uses == 1:
            continue
        linears = _linears(layer, config.relaxation_targets)
        norms = [
            name
            for name, module in layer.named_modules()
            if not isinstance(module, nn.Linear)
            and next(module.parameters(False), None) is not None
        ]
        for use in range(uses):
            depth = schedule.depths_of(unique)[use]
            unread = () if schedule.computes_kv(depth) else _OF_KEYS
            names = [name for name in linears if name not in unread]
            # The first use keeps the layer's own norms.
            copies = [name for name in norms if use and name not in unread]
            _inject(layer, config, f"{_PREFIX}{use}", names, copies)
        layer.requires_grad_(True)  # peft freezes what is no adapter
        adapted: list[Any] = [m for m in layer.modules() if hasattr(m, "_active_adapter")]
        for module in adapted:
            module.__class__ = derived_class(_Adapted, type(module))
            # As a compiled forward leaves it, or the second one would compile anew.
            module.__dict__["_active_adapter"] = module.names_for(uses - 1)
        layer.__class__ = derived_class(_Relaxed, type(layer))


def _linears(layer: nn.Module, targets: Sequence[str] | None) -> list[str]:
    found = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    if targets is None:
        return found
    kinds = sorted({name.rpartition(".")[2] for name in found})
    if not targets or set(targets) - set(kinds):
        raise ValueError(
            f"MoRConfig.relaxation_targets: expected some of {kinds}, got {list(targets)}"
        )
    return [name for name in found if name.rpartition(".")[2] in targets]


def _inject(
    layer: nn.Module, config: MoRConfig, adapter: str, names: list[str], copies: list[str]
) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("MoRConfig.relaxation needs peft: pip install peft") from error
    dora = config.relaxation == "dora"
    alpha: Any = config.relaxation_alpha
    biased = [n for n in names if not dora and shared_part(layer.get_submodule(n)).bias is not None]
    for group, bias in ((biased, True), ([n for n in names if n not in biased], False)):
        if not group:
            continue
        options = LoraConfig(
            r=config.relaxation_rank,
            lora_alpha=alpha,
            target_modules=group,
            modules_to_save=copies or None,
            use_dora=dora,
            lora_bias=bias,
        )
        inject_adapter_in_model(options, layer, adapter)
        del layer.peft_config  # peft's note for its own next call, which would warn of it
        copies = []


def shared_part(module: nn.Module) -> Any:
    """The dense architecture's own module below the adapters, or the module itself."""
    return getattr(module, "base_layer", getattr(module, "original_module", module))


class _Call(threading.local):
    """The use of its layer that this thread is computing; None outside relaxed layers."""

    use: int | None = None


_call = _Call()


class _Relaxed(Derived):
    """Before the class of a decoder layer: its forward computes the use that it is called for.

    In the class's forward, because the choice must be made again inside gradient checkpointing's
    second forward, which repeats that and no hook of the layer.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        use = kwargs["mor_context"].use
        if torch.compiler.is_compiling():  # which knows no state of threads
            for module in self.modules():  # type: ignore[attr-defined]
                if isinstance(module, _Adapted):
                    module.__dict__["_active_adapter"] = module.names_for(use)
            return self.dense_class.forward(self, *args, **kwargs)
        before, _call.use = _call.use, use
        try:
            return self.dense_class.forward(self, *args, **kwargs)
        finally:
            _call.use = before


class _Adapted(Derived):
    """Before the class of one of peft's layers: its adapter is that of the use being computed.

    Not by peft's `set_adapter`, which changes the module, that other threads may be using, and
    stops the gradients of the adapters it switches off, those of the uses before among them.
    """

    def names_for(self, use: int) -> list[str]:
        """`recursion_USE`, and adapters of a user's own."""
        active = self.__dict__.get("_active_adapter", [])
        active = [active] if isinstance(active, str) else active
        others = [name for name in active if not name.startswith(_PREFIX)]
        return [f"{_PREFIX}{use}", *(others if "lora_A" in self.__dict__["_modules"] else [])]

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that this call applies."""
        use = None if torch.compiler.is_compiling() else _call.use
        stored = self.__dict__.get("_active_adapter", [])
        active: Any = stored if use is None else self.names_for(use)
        return [active] if isinstance(active, str) else active

    @property
    def active_adapter(self) -> list[str]:
        """Another name of `active_adapters`, which peft reads too."""
        return self.active_adapters


@torch.no_grad()
def initialise_adapters(model: Any) -> None:
    """Starts the adapters as no change at all: B = 0, DoRA's magnitudes the base's norms.

    By Transformers' initialisation, which leaves tensors alone that were loaded.
    """
    from transformers import initialization

    for module in model.modules():
        for name, up in getattr(module, "lora_B", {}).items():
            if not name.startswith(_PREFIX):
                continue
            for parameter in up.parameters():
                initialization.zeros_(parameter)
            if name in module.lora_magnitude_vector:
                magnitude = module.lora_magnitude_vector[name].weight
                initialization.copy_(magnitude, module.base_layer.weight.norm(dim=1))


@torch.no_grad()
def start_as_shared(layers: Any) -> None:
    """Starts all uses of each layer as the shared layer, after its weights were filled in."""
    for module in layers.modules():
        for own in getattr(module, "modules_to_save", {}).values():
            own.load_state_dict(module.original_module.state_dict())
        for magnitude in getattr(module, "lora_magnitude_vector", {}).values():
            magnitude.weight.copy_(module.base_layer.weight.norm(dim=1))


@torch.no_grad()
def start_from_dense(
    layers: nn.ModuleList, dense_layers: nn.ModuleList, config: MoRConfig, depths: Sequence[int]
) -> None:
    """Starts each adapter at the truncated SVD of what the dense layer is more than the shared one.

    With the full rank each use is its dense layer exactly (DoRA: but for biases, which stay
    shared). DoRA's magnitudes start at the dense weights'.

    Args:
        layers: the relaxed unique layers, their shared weights in place.
        dense_layers: of the dense model.
        config: the MoR configuration.
        depths: the dense layer of each unrolled depth.
    """
    schedule = config.schedule
    for unique, use, source_depth in zip(schedule.layers, schedule.uses, depths, strict=True):
        if len(schedule.depths_of(unique)) == 1:
            continue
        adapter = f"{_PREFIX}{use}"
        layer, dense = layers[unique], dense_layers[source_depth]
        for name, source in dense.named_modules():
            if next(source.parameters(False), None) is None:
                continue
            target: Any = layer.get_submodule(name)
            if adapter in getattr(target, "lora_A", {}):
                _svd_start(target, adapter, source)
            elif adapter in getattr(target, "modules_to_save", {}):
                target.modules_to_save[adapter].load_state_dict(source.state_dict())
            elif adapter == f"{_PREFIX}0" and hasattr(target, "original_module"):
                target.original_module.load_state_dict(source.state_dict())


def _svd_start(target: Any, adapter: str, source: Any) -> None:
    base, down, up = target.base_layer, target.lora_A[adapter], target.lora_B[adapter]
    residual = source.weight - base.weight
    residual = residual.to(torch.promote_types(residual.dtype, torch.float32))
    u, s, v = torch.linalg.svd(residual, full_matrices=False)
    rank = min(down.out_features, s.shape[0])
    root = (s[:rank] / target.scaling[adapter]).sqrt()
    _fill(up.weight, u[:, :rank] * root)
    _fill(down.weight.T, v[:rank].T * root)
    if up.bias is not None:
        # peft scales the bias with the product.
        up.bias.copy_((source.bias - base.bias) / target.scaling[adapter])
    if adapter in target.lora_magnitude_vector:
        target.lora_magnitude_vector[adapter].weight.copy_(source.weight.double().norm(dim=1))


def _fill(target: Tensor, columns: Tensor) -> None:
    """Columns into the first of target; the rest, of a rank above the matrix's own, are zeros."""
    target.zero_()
    target[:, : columns.shape[1]].copy_(columns)
