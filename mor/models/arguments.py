"""Arguments of Transformers' models and of `generate`: used, or refused by name."""

from collections.abc import Sequence
from typing import Any

__all__ = ["REDUNDANT", "refuse_generation_options", "refuse_unused", "wants_tuple"]

#: Arguments by which collators describe documents a second time, beside position_ids.
REDUNDANT = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def wants_tuple(return_dict: bool | None, config: Any) -> bool:
    """Whether a call asks for a tuple, itself or by the configuration."""
    return not (config.return_dict if return_dict is None else return_dict)


def refuse_generation_options(default: Any, args: Sequence[Any], options: dict[str, Any]) -> None:
    """Refuses what `generate` cannot do with a cache that differs between tokens.

    Args:
        default: the model's generation configuration, which fills in what another does not say.
        args: of `generate`, by position.
        options: of `generate`, by name.

    Raises:
        ValueError: names the option.
    """
    given = options.get("generation_config") or next(iter(args[1:2]), None)
    for name in ("cache_implementation", "assistant_early_exit"):
        told = options.get(name) or getattr(given, name, None)
        wanted = told or getattr(default, name, None)
        if wanted in (None, "dynamic", "dynamic_full"):
            continue
        if name == "cache_implementation":
            raise ValueError(f"MoR: expected a dynamic cache, got cache_implementation={wanted!r}")
        raise ValueError(
            f"MoR: assistant_early_exit={wanted!r} is not supported: tokens exit by their own "
            "router; pass an assistant_model to speculate"
        )


def refuse_unused(kwargs: dict[str, Any], config: Any, where: str, documents: bool = False) -> None:
    """Refuses arguments that nothing would read.

    Args:
        kwargs: what no parameter took.
        config: whose output_attentions is the default.
        where: begins the message.
        documents: documents are described already, so that `REDUNDANT` arguments add nothing.

    Raises:
        ValueError: names the argument.
    """
    asked = {k: v for k, v in kwargs.items() if not (documents and k in REDUNDANT)}
    if asked.get("output_attentions") is None:
        asked["output_attentions"] = getattr(config, "output_attentions", False)
    for name, value in asked.items():
        if value is None or value is False:
            continue
        if name == "output_attentions":
            raise ValueError(f"{where}: output_attentions: depth_attention keeps no weights")
        raise ValueError(f"{where}: no use for the argument {name!r}: expected none of that name")
