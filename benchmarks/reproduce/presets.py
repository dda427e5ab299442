"""Sizes and recipes of the experiments: two cores, and the paper's four models."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig

__all__ = ["PRESETS", "Preset", "Size", "recipe_name", "unrolled_depth"]


@dataclass(frozen=True)
class Size:
    """A dense model without its depth's rounding; see `unrolled_depth`.

    Attributes:
        layers: depth of the dense model.
    """

    name: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int

    def dense(self, layers: int, vocab_size: int, seq_len: int, end_of_text: int) -> LlamaConfig:
        """The dense configuration of a depth; embeddings are tied, as in SmolLM."""
        return LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=seq_len,
            tie_word_embeddings=True,
            bos_token_id=end_of_text,
            eos_token_id=end_of_text,
            pad_token_id=end_of_text,
        )


@dataclass(frozen=True)
class Preset:
    """A recipe.

    Attributes:
        sizes: the model of the experiments is the last one; isoFLOP compares all.
        seq_len: S, tokens of a row.
        rows_per_step: rows of an optimiser step, over all processes and accumulated batches.
        batch_size: rows of a forward pass in one process, at most.
        tokens: training tokens where variants are compared at equal tokens.
        flops: forward FLOPs of the training, as the paper counts its budgets: the three of isoFLOP,
            of which the last one is that of all comparisons at equal FLOPs.
        schedule: of comparisons at equal tokens; isoFLOP has "wsd".
        turns: in how many turns each variant trains (`mor.training.race`).
        dataset: Hugging Face name and configuration; None for the standard library's sources.
        tokenizer: Hugging Face name; None to train one of `vocab_size` entries.
        warmup_share: of the steps; with "wsd" of the steps of the smallest budget.
    """

    name: str
    sizes: tuple[Size, ...]
    seq_len: int
    rows_per_step: int
    batch_size: int
    tokens: float
    flops: tuple[float, float, float]
    vocab_size: int
    learning_rate: float = 3e-3
    schedule: str = "cosine"
    warmup_share: float = 0.05
    decay_share: float = 0.2
    bf16: bool = False
    shuffled: bool = True
    turns: int = 1
    eval_rows: int = 500
    save_every: int = 0
    dataset: tuple[str, str] | None = None
    tokenizer: str | None = None


def recipe_name(options: Mapping[str, Any] | None) -> str:
    """A short name of a model: dense, recursive-R, expert-R, token-R, expert-R-shared, ..."""
    if options is None:
        return "dense"
    shared = "-shared" if options.get("kv_strategy") == "shared" else ""
    router = options.get("router", "expert") or "recursive"
    return f"{router}-{options['num_recursions']}{shared}"


def unrolled_depth(layers: int, num_recursions: int, sharing: str) -> int:
    """The smallest depth of at least `layers` that the recursions divide.

    The paper adds layers in this way: 30 become 32 for three recursions of middle-cycle.
    """
    ends = 2 if sharing.startswith("middle") else 0
    return math.ceil((layers - ends) / num_recursions) * num_recursions + ends


def _paper(size: Size) -> Preset:
    return Preset(
        name=size.name,
        sizes=(size,),
        seq_len=2048,
        rows_per_step=1024,
        batch_size=16,
        tokens=10e9,
        flops=(2e18, 5e18, 16.5e18),
        vocab_size=49152,
        bf16=True,
        shuffled=False,
        save_every=200,
        dataset=("HuggingFaceTB/smollm-corpus", "fineweb-edu-dedup"),
        tokenizer="HuggingFaceTB/SmolLM-135M",
    )


# `tiny` is for three seeds of every experiment but isoFLOP: some 90 trainings in about half an hour
# of one core. So a model of width 64 has 128 steps of 512 tokens, 15 seconds. More tokens would
# leave fewer seeds; `--budget 10` asks for ten times as many.
_TINY_STEPS, _TINY_ROWS, _TINY_LENGTH = 128, 4, 128
_TINY_FLOPS = 7.3e10  # forward, of the dense model of width 64 in as many steps

#: `smoke` is for tests; `tiny` for two cores; the others are the paper's (its section 4.1, table 9
#: and appendix B).
PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="smoke",
            sizes=(Size("s16", 4, 16, 32, 2, 2), Size("s32", 4, 32, 64, 2, 2)),
            seq_len=32,
            rows_per_step=2,
            batch_size=2,
            tokens=256,
            flops=(2e7, 4e7, 6e7),
            vocab_size=300,
            turns=2,
            eval_rows=2,
        ),
        Preset(
            name="tiny",
            sizes=(
                Size("d32", 8, 32, 96, 2, 2),
                Size("d48", 8, 48, 144, 2, 2),
                Size("d64", 8, 64, 192, 2, 2),
            ),
            seq_len=_TINY_LENGTH,
            rows_per_step=_TINY_ROWS,
            batch_size=_TINY_ROWS,
            tokens=_TINY_STEPS * _TINY_ROWS * _TINY_LENGTH,
            flops=(_TINY_FLOPS / 8, _TINY_FLOPS / 3.3, _TINY_FLOPS),
            vocab_size=1024,
            learning_rate=4e-3,
            turns=4,
            eval_rows=128,
        ),
        _paper(Size("135m", 30, 576, 1536, 9, 3)),
        _paper(Size("360m", 32, 960, 2560, 15, 5)),
        _paper(Size("730m", 26, 1536, 4096, 24, 8)),
        _paper(Size("1.7b", 24, 2048, 8192, 32, 32)),
    )
}
