"""The configuration of the model that a run trains: from sizes and routing options, or a file."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from mor.analysis.costs import count_parameters
from mor.models import MoRConfig
from mor.training.options import (
    RunOptions,
    check_recursions,
    in_words_of_the_shell,
    refuse_routing,
)
from mor.training.run_record import read_json

__all__ = ["describe", "model_config"]


def model_config(
    options: RunOptions, given: Collection[str], vocab_size: int, end_of_text: int
) -> MoRConfig:
    """The configuration that the options describe.

    Args:
        options: of the run.
        given: names of those that somebody chose.
        vocab_size: rows of the embedding that the tokenizer needs.
        end_of_text: the tokenizer's.

    Raises:
        ValueError: options or a file that describe no model, or not the tokenizer's.
    """
    if options.model or options.config:
        source = options.model / "config.json" if options.model else options.config
        assert source is not None
        config = _config_of(source, options, given)
        if config.vocab_size < vocab_size:
            raise ValueError(
                f"{source} has a vocab_size of {config.vocab_size}, the tokenizer needs "
                f"{vocab_size}; give another --tokenizer"
                + ("" if options.model else ", or a larger vocab_size in the file")
            )
        return config
    kv_heads = options.kv_heads or options.heads
    if options.heads % kv_heads:
        raise ValueError(
            f"--heads must be a multiple of --kv-heads, got {options.heads} and {kv_heads}"
        )
    if options.hidden_size % options.heads:
        raise ValueError(
            f"--hidden-size {options.hidden_size} is not a multiple of --heads {options.heads}"
        )
    check_recursions(options.num_recursions, options.sharing, options.layers)
    base = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size or -(-options.hidden_size * 8 // 3 // 64) * 64,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max(2048, options.seq_len),
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )
    return _recursive(base, options)


def _config_of(source: Path, options: RunOptions, given: Collection[str]) -> MoRConfig:
    """The configuration in a JSON file, which is a MoR one, or a dense one to be made recursive."""
    values = read_json(source)
    kind = values.get("model_type")
    own = {name for name in MoRConfig.__annotations__ if name in values}
    if "mor_swap" in values:
        raise ValueError(
            f"{source} is of a swapped model, which mor train does not take; train what "
            "mor.load_swapped returns with mor.training.MoRTrainer"
        )
    if kind == MoRConfig.model_type or own:
        if kind != MoRConfig.model_type and kind is not None:
            dense = {name: value for name, value in values.items() if name not in own}
            values = {name: values[name] for name in own}
            if values.setdefault("base_config", dense) is not dense:
                raise ValueError(
                    f'{source} has a base_config beside "model_type": "{kind}"; a MoR '
                    'configuration has "model_type": "mor"'
                )
        if not isinstance(values.get("base_config"), dict):
            raise ValueError(
                f"{source} has options of MoRConfig ({', '.join(sorted(own)) or 'model_type'}), "
                'but no "base_config" with the sizes of the dense model'
            )
        refuse_routing(given, source)
        return MoRConfig(**{**values, "model_type": MoRConfig.model_type})
    if options.model is not None:
        raise ValueError(
            f"{options.model} holds no MoR model (its model_type is {kind!r}); make one of a dense "
            f"model: mor convert {options.model} converted"
        )
    if kind is None:
        raise ValueError(
            f'{source} names no "model_type": expected "mor", or that of a dense model, as "llama"'
        )
    return _recursive(values, options)


def _recursive(base: Any, options: RunOptions) -> MoRConfig:
    try:
        return MoRConfig(base_config=base, **options.for_config())
    except ValueError as error:
        raise ValueError(in_words_of_the_shell(str(error))) from error


def describe(config: MoRConfig) -> str:
    """Depth, recursions, router and number of parameters, before anything is built."""
    how = {"expert": "expert-choice", "token": "token-choice", None: "no router"}[config.router]
    return (
        f"{config.base_config.model_type}, {config.num_hidden_layers} layers deep with the weights "
        f"of {config.num_unique_layers}, {config.num_recursions} recursions, {how}: "
        f"{count_parameters(config) / 1e6:,.2f}M parameters"
    )
