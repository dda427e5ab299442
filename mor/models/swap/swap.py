"""mor.swap: replaces a range of decoder layers of a loaded model by one routed, shared block."""

import importlib
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from mor.models.swap.saved_model import saved_config
from mor.models.swap.settings import span_of
from mor.models.swap.swapped_model import install, swapped_class
from mor.modules.routers import RouterScore
from mor.version import __version__

__all__ = ["SWAPPABLE", "check_swappable", "load_swapped", "put_in", "swap"]

#: Architectures whose dense logits an identity swap reproduces, padded and cached (a test runs
#: each). Others keep state outside the cache, mix in attention of another kind, hand their layers
#: further arguments or add losses of their own layers.
SWAPPABLE = (
    "cohere",
    "gemma",
    "glm4",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
    "starcoder2",
)

_REASONS = {
    "gemma3_text": "its layers are of two attention types, which one block cannot mix; "
    "MoRForCausalLM.from_dense converts it",
    "mor": "it has recursions already",
}


def swap(
    model: PreTrainedModel,
    layers: int | range | tuple[int, int],
    num_recursions: int,
    router: str = "expert",
    *,
    loss_coefficients: dict[str, float] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Replaces decoder layers of a loaded model, in place, by a Mixture-of-Recursions block.

    Of a range, which stays as deep as before when unrolled, the first (end - first) / R layers are
    kept and used up to R times. One layer, given by its index, is kept and used up to R times: the
    model becomes R - 1 layers deeper for the tokens that go all the way.

    Args:
        model: a causal language model of one of the architectures `SWAPPABLE`; it stays in the
            mode it is in.
        layers: range, or (first, end), the end not included, or the index of one layer.
        num_recursions: R; divides the number of layers of a range. With 1 the layers run as before
            on the tokens the router takes: the identity, if it takes all with a gate of 1.
        router: "expert" or "token".
        loss_coefficients: weights of the router's losses in `output.loss`; default 0.001 for
            "aux_loss", 0.1 for "balancing_loss" and 1e-5 for "z_loss".
        **options: of `mor.modules.ExpertChoice` or `TokenChoice`; `score` also as a dict of
            `RouterScore`'s fields.

    Returns:
        The same model. It trains (the router's losses are part of `output.loss`, and its outputs
        are `MoRCausalLMOutput`), generates, and saves with `save_pretrained`; `mor.load_swapped`
        loads it.

    Raises:
        ValueError: layers outside the model, a count that R does not divide, an architecture that
            cannot be swapped.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4,
        ...     num_hidden_layers=8, vocab_size=64)
        >>> model = swap(LlamaForCausalLM(config), (1, 7), num_recursions=3)
        >>> len(model.model.layers)
        3
    """
    check_swappable(model, "swap")
    if isinstance(options.get("score"), RouterScore):
        options["score"] = asdict(options["score"])
    span = span_of(layers)
    if span.step != 1:
        raise ValueError(f"swap: expected a range of adjacent layers, got {layers}")
    settings = {
        "layers": layers if isinstance(layers, int) else [span.start, span.stop],
        "num_recursions": num_recursions,
        "router": router,
        "loss_coefficients": loss_coefficients,
        **options,
    }
    return put_in(model, settings)


def check_swappable(model: Any, where: str) -> None:
    """Refuses a model that routed layers cannot be put into; `where` begins the error.

    Raises:
        ValueError: the model's architecture, or its class.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in SWAPPABLE:
        raise ValueError(
            f"{where}: expected a model of one of {list(SWAPPABLE)}, got {kind!r}; "
            + _REASONS.get(kind, "what its model does between layers a routed block would skip")
        )
    causal = MODEL_FOR_CAUSAL_LM_MAPPING[type(model.config)]
    if not isinstance(model, causal):
        raise ValueError(f"{where}: expected a {causal.__name__}, got {type(model).__name__}")


def put_in(model: PreTrainedModel, settings: dict[str, Any]) -> PreTrainedModel:
    """Makes a dense model one with the routed blocks that `settings` describe, in place."""
    for routed in install(model, settings):
        routed.to(device=model.device, dtype=model.dtype)
    model.config.mor_swap = settings
    model.config._name_or_path = ""  # of the dense model, which trainers would take as reference
    model.__class__ = swapped_class(type(model))
    return model


def load_swapped(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Loads a saved model that `swap` or an `apply_` function changed, in evaluation mode.

    Args:
        path: the directory, or a name on the hub.
        **kwargs: those of `from_pretrained` (dtype, device_map, quantization_config, ...).

    Raises:
        ValueError: a model that was not swapped, or by a system that this version does not have.
        OSError: no model there.
    """
    try:
        config = saved_config(path, **kwargs)
    except OSError as error:
        raise OSError(
            f"load_swapped: no model in {path}: expected a folder that save_pretrained wrote, or "
            "a name on the hub"
        ) from error
    return _class_for(config).from_pretrained(path, config=config, **kwargs)


def _class_for(config: Any) -> Any:
    """The class of a saved model: of this package, or of the module that its settings name.

    A system in `mor.systems.NAME` saves NAME, and has a function `class_for`: this package knows
    none of them, and a configuration can name no module outside of `mor.systems`.
    """
    system = config.mor_swap.get("system")
    if system in (None, "mod"):
        return swapped_class(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    name = f"mor.systems.{system}"
    known = isinstance(system, str) and system.isidentifier() and find_spec(name) is not None
    make = getattr(importlib.import_module(name), "class_for", None) if known else None
    if make is None:
        raise ValueError(
            f"load_swapped: expected a model that a system of mor {__version__} changed, got one "
            f"of {system!r}"
        )
    return make(config)
