"""The demo: MoR against a dense model of the same unrolled depth, same text, same training FLOPs.

Minutes on two cores. The result is reported whatever it is; models this small and trained this
briefly show how the parts work, not which architecture wins at scale.
"""

import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from mor import MoRConfig
from mor._extras import extra
from mor.analysis.costs import count_parameters, flops_per_token, kv_bytes_per_token
from mor.analysis.look import look_at
from mor.analysis.plots import plot_depth_by_position, plot_loss_against_flops
from mor.data.corpus import open_corpus, split_documents
from mor.data.tokens import TokenBlocks, prepare_tokens, train_tokenizer, vocabulary_size
from mor.training.arguments import training_arguments
from mor.training.generate import continue_text
from mor.training.trainer import MoRTrainer

__all__ = ["DemoSizes", "ModelResult", "run_demo"]

PROMPT = "def main():\n"
_PASSAGE_TOKENS = 600
_INTRO = (
    "A passage of held-out text. The router decided how often the shared block was applied to each "
    "token, without looking at later tokens."
)


@dataclass(frozen=True)
class DemoSizes:
    """Sizes of the demo.

    Attributes:
        dense_steps: optimiser steps of the dense model; MoR gets those that cost the same FLOPs.
    """

    dense_steps: int = 1500
    batch_size: int = 2
    seq_len: int = 256
    vocab_size: int = 4096
    hidden_size: int = 128
    intermediate_size: int = 384
    heads: int = 4
    layers: int = 8
    num_recursions: int = 3
    learning_rate: float = 4e-3
    decay_share: float = 0.3
    evaluations: int = 10
    eval_rows: int = 64


@dataclass(frozen=True)
class ModelResult:
    """A row of the table; the losses are in nats per token, of held-out text."""

    name: str
    parameters: int
    flops_per_token: float
    kv_bytes_per_token: float
    train_tokens: int
    train_flops: float
    tokens_per_second: float
    validation_loss: float
    curve: list[tuple[float, float]]


def run_demo(
    output_dir: Path, *, budget: float = 1.0, seed: int = 0, sizes: DemoSizes | None = None
) -> list[ModelResult]:
    """Trains both models, compares them, and writes pictures, a page, a table and a sample.

    Args:
        output_dir: an existing folder.
        budget: multiplies the training FLOPs.
        seed: of the weights and the order of the data.
        sizes: of the models and the run.

    Returns:
        One result for each model, MoR first.
    """
    with extra("plots"):
        import matplotlib  # noqa: F401  (here and not after minutes of training)
    sizes = sizes or DemoSizes()
    disable_progress_bar()  # of saving, which takes no time here
    console = Console()
    console.print("Reading the standard library's sources and training a tokenizer ...")
    corpus = open_corpus()
    tokenizer = train_tokenizer(corpus, sizes.vocab_size)
    files = prepare_tokens(corpus, tokenizer, output_dir)
    train_rows = TokenBlocks(files, sizes.seq_len)
    held_out_rows = TokenBlocks(files, sizes.seq_len, "validation", max_blocks=sizes.eval_rows)

    dense, mor = _configs(sizes, vocabulary_size(tokenizer), tokenizer.eos_token_id)
    dense_steps = max(sizes.evaluations, round(sizes.dense_steps * budget))
    flops = [flops_per_token(config, sizes.seq_len, training=True) for config in (mor, dense)]
    results, models = [], []
    for name, config, steps in (
        (f"MoR, {sizes.num_recursions} recursions", mor, round(dense_steps * flops[1] / flops[0])),
        ("dense", dense, dense_steps),
    ):
        console.print(f"\nTraining {name}: {steps} steps", style="bold")
        set_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        arguments = training_arguments(
            output_dir / config.model_type,
            steps=steps,
            batch_size=sizes.batch_size,
            learning_rate=sizes.learning_rate,
            decay_share=sizes.decay_share,
            log_every=max(1, steps // (2 * sizes.evaluations)),
            eval_every=-(-steps // sizes.evaluations),
            save_every=0,
            report_to=["tensorboard"],
            seed=seed,
            disable_tqdm=not sys.stderr.isatty(),  # no bars into a log
        )
        trainer = MoRTrainer(
            model,
            arguments,
            train_dataset=train_rows,
            eval_dataset=held_out_rows,
            processing_class=tokenizer,
        )
        trainer.train()
        trainer.save_model(str(output_dir / config.model_type))
        models.append(model.eval())
        results.append(_result(name, config, trainer, sizes))

    routed = models[0]
    passage = _held_out_passage(corpus, tokenizer)
    written = [
        _write_comparison(output_dir, results),
        *_write_table(output_dir, results),
        *look_at(
            routed,
            tokenizer,
            passage,
            output_dir,
            max_tokens=_PASSAGE_TOKENS,
            window=sizes.seq_len,  # the length seen in training
            intro=_INTRO,
        ),
        _write_heat_map(output_dir, routed, held_out_rows, sizes.batch_size),
        _write_sample(output_dir, routed, tokenizer, seed),
    ]
    console.print()
    console.print(Markdown(table(results)))
    console.print(Markdown((output_dir / "sample.md").read_text()))
    console.print("\nWritten:")
    for path in written:
        console.print(f"  {path}", highlight=False)
    return results


def table(results: list[ModelResult]) -> str:
    """The results as a Markdown table."""
    rows = {
        "parameters": [f"{r.parameters / 1e6:.2f} M" for r in results],
        "FLOPs per token, forward": [f"{r.flops_per_token / 1e6:.2f} M" for r in results],
        "KV cache per token (float32)": [f"{r.kv_bytes_per_token / 1024:.2f} KiB" for r in results],
        "training tokens": [f"{r.train_tokens / 1e3:.0f} k" for r in results],
        "training FLOPs": [f"{r.train_flops:.3g}" for r in results],
        "training speed": [f"{r.tokens_per_second:.0f} tokens/s" for r in results],
        "validation loss": [f"{r.validation_loss:.3f} nats/token" for r in results],
    }
    lines = ["| | " + " | ".join(r.name for r in results) + " |"]
    lines += ["| --- |" + " ---: |" * len(results)]
    lines += [f"| {name} | " + " | ".join(values) + " |" for name, values in rows.items()]
    return "\n".join(lines) + "\n"


def _configs(
    sizes: DemoSizes, vocab_size: int, end_of_text: int
) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    dense = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )
    return dense, MoRConfig(base_config=dense, num_recursions=sizes.num_recursions)


def _result(
    name: str, config: PreTrainedConfig, trainer: MoRTrainer, sizes: DemoSizes
) -> ModelResult:
    history = trainer.state.log_history
    # Each evaluation follows a log line of the same step.
    flops = {line["step"]: line["total_flos"] for line in history if "loss" in line}
    curve = [(flops[line["step"]], line["eval_loss"]) for line in history if "eval_loss" in line]
    # The first window holds the start-up.
    speeds = [line["tokens_per_second"] for line in history if "tokens_per_second" in line]
    return ModelResult(
        name=name,
        parameters=count_parameters(config),
        flops_per_token=flops_per_token(config, sizes.seq_len),
        kv_bytes_per_token=kv_bytes_per_token(config),
        train_tokens=trainer.state.global_step * sizes.batch_size * sizes.seq_len,
        train_flops=curve[-1][0],
        tokens_per_second=statistics.median(speeds[1:] or speeds),
        validation_loss=curve[-1][1],
        curve=curve,
    )


def _held_out_passage(corpus: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """The start of the first held-out text that is long enough to show."""
    texts = (text for text, held_out in split_documents(corpus) if held_out)
    return next(text for text in texts if len(text) > 10 * _PASSAGE_TOKENS)


def _write_comparison(output_dir: Path, results: list[ModelResult]) -> Path:
    path = output_dir / "loss_against_flops.png"
    curves = {
        result.name: ([flops for flops, _ in result.curve], [loss for _, loss in result.curve])
        for result in results
    }
    plot_loss_against_flops(curves, path)
    return path


def _write_table(output_dir: Path, results: list[ModelResult]) -> list[Path]:
    markdown, values = output_dir / "results.md", output_dir / "results.json"
    markdown.write_text(table(results))
    values.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    return [markdown, values]


@torch.no_grad()
def _write_heat_map(output_dir: Path, model: Any, rows: TokenBlocks, batch_size: int) -> Path:
    ids = torch.stack([rows[index]["input_ids"] for index in range(len(rows))]).to(model.device)
    depths = torch.cat([model(batch).token_depths for batch in ids.split(batch_size)])
    path = output_dir / "depth_by_position.png"
    plot_depth_by_position(depths, path)
    return path


def _write_sample(
    output_dir: Path, model: Any, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Path:
    text = continue_text(model, tokenizer, PROMPT, max_new_tokens=120, seed=seed)
    path = output_dir / "sample.md"
    path.write_text(f"Sample of the MoR model, after `{PROMPT.strip()}`\n\n~~~text\n{text}\n~~~\n")
    return path
