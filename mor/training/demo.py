"""The demo: MoR against a dense model of the same unrolled depth, same text, same training FLOPs.

The models train in alternating turns, so that a busy machine slows both alike; a demo that was
killed goes on where it was when it is started again. Minutes on two cores. The result is reported
whatever it is; models this small and trained this briefly show how the parts work, not which
architecture wins at scale.
"""

import json
import shutil
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
    TrainerState,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from mor import MoRConfig
from mor._extras import extra
from mor.analysis.costs import flops_per_token
from mor.analysis.look import look_at
from mor.analysis.plots import plot_depth_by_position, plot_loss_against_cost
from mor.data.corpus import open_corpus, split_documents
from mor.data.tokens import TokenBlocks, prepare_tokens, train_tokenizer, vocabulary_size
from mor.training.arguments import training_arguments
from mor.training.callbacks import PrinterLine
from mor.training.generate import continue_text
from mor.training.race import Entrant, check_same_race, finished, race
from mor.training.race_results import ModelResult, at_median_speed, curve_of, result_of, table
from mor.training.trainer import MoRTrainer

__all__ = ["DemoSizes", "run_demo"]

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
        turns: in how many turns each model trains; an evaluation ends each.
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
    turns: int = 20
    eval_rows: int = 64


def run_demo(
    output_dir: Path, *, budget: float = 1.0, seed: int = 0, sizes: DemoSizes | None = None
) -> list[ModelResult]:
    """Trains both models, compares them, and writes pictures, a page, a table and a sample.

    Args:
        output_dir: an existing folder; if it holds an unfinished demo, that goes on.
        budget: multiplies the training FLOPs.
        seed: of the weights and the order of the data.
        sizes: of the models and the run.

    Returns:
        One result for each model, MoR first.

    Raises:
        ValueError: the folder holds an unfinished demo of other settings.
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
    settings = {"budget": budget, "seed": seed, **asdict(sizes), "text": files.identity}
    check_same_race(output_dir, settings)
    train_rows = TokenBlocks(files, sizes.seq_len)
    held_out_rows = TokenBlocks(files, sizes.seq_len, "validation", max_blocks=sizes.eval_rows)

    dense, mor = _configs(sizes, vocabulary_size(tokenizer), tokenizer.eos_token_id)
    dense_steps = max(sizes.turns, round(sizes.dense_steps * budget))
    flops = [flops_per_token(config, sizes.seq_len, training=True) for config in (mor, dense)]
    mor_steps = round(dense_steps * flops[1] / flops[0])

    def entrant(name: str, config: PreTrainedConfig, steps: int) -> Entrant:
        folder = output_dir / config.model_type

        def build() -> MoRTrainer:
            set_seed(seed)
            trainer = MoRTrainer(
                AutoModelForCausalLM.from_config(config),
                training_arguments(
                    folder,
                    steps=steps,
                    batch_size=sizes.batch_size,
                    learning_rate=sizes.learning_rate,
                    decay_share=sizes.decay_share,
                    log_every=steps,  # and at the end of each turn, as evaluations and checkpoints
                    eval_every=steps,
                    save_every=steps,
                    seed=seed,
                    disable_tqdm=True,
                ),
                train_dataset=train_rows,
                eval_dataset=held_out_rows,
                processing_class=tokenizer,
            )
            trainer.remove_callback(PrinterLine)  # `tell` prints a line for each turn
            return trainer

        return Entrant(name, folder, steps, build)

    def tell(entrant: Entrant, state: TrainerState) -> None:
        last = curve_of(state, sizes.batch_size * sizes.seq_len)[-1]
        console.print(
            f"{entrant.name}: step {state.global_step} of {entrant.steps}, {last.seconds:.0f} s, "
            f"validation loss {last.loss:.3f}",
            highlight=False,
        )

    entrants = [
        entrant(f"MoR, {sizes.num_recursions} recursions", mor, mor_steps),
        entrant("dense", dense, dense_steps),
    ]
    console.print(f"\nTraining both in {sizes.turns} turns each", style="bold")
    race(entrants, sizes.turns, after_turn=tell)
    trainers = [finished(one) for one in entrants]
    for trainer, one in zip(trainers, entrants, strict=True):
        trainer.save_model(str(one.folder))
    results = [
        result_of(one.name, trainer, sizes.seq_len)
        for trainer, one in zip(trainers, entrants, strict=True)
    ]

    routed = trainers[0].model.eval()
    passage = _held_out_passage(corpus, tokenizer)
    written = [
        _write_comparison(output_dir, results, sizes),
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
    _forget(output_dir, entrants)
    console.print()
    console.print(Markdown(table(results)))
    console.print(Markdown((output_dir / "sample.md").read_text()))
    console.print("\nWritten:")
    for path in written:
        console.print(f"  {path}", highlight=False)
    return results


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


def _forget(output_dir: Path, entrants: list[Entrant]) -> None:
    """Deletes what a killed race is resumed from: after the results are written, nothing is."""
    for entrant in entrants:
        for checkpoint in entrant.folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    (output_dir / "race.json").unlink()  # last: checkpoints without it would suit any settings


def _held_out_passage(corpus: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """The start of the first held-out text that is long enough to show."""
    texts = (text for text, held_out in split_documents(corpus) if held_out)
    return next(text for text in texts if len(text) > 10 * _PASSAGE_TOKENS)


def _write_comparison(output_dir: Path, results: list[ModelResult], sizes: DemoSizes) -> Path:
    path = output_dir / "loss.png"
    plot_loss_against_cost(
        {result.name: at_median_speed(result) for result in results}, path, note=held_equal(sizes)
    )
    return path


def held_equal(sizes: DemoSizes) -> str:
    """Says in one sentence what the two trainings have in common."""
    return (
        f"Held equal: training FLOPs, depth ({sizes.layers} layers) and width, text and its order, "
        "batch, optimiser, learning-rate schedule and machine, on which the models trained in "
        f"{sizes.turns} alternating turns (time is that at the median speed of the turns); "
        "parameters and training tokens differ."
    )


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
