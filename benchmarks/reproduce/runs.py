"""Train the variants of an experiment and measure them."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    TrainerState,
    default_data_collator,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from benchmarks.machine import machine
from benchmarks.reproduce.design import Experiment, Variant
from benchmarks.reproduce.measures import unigram_loss
from benchmarks.reproduce.presets import Preset, recipe_name, unrolled_depth
from mor import MoRConfig
from mor.analysis import flops_per_token
from mor.data.corpus import Corpus, open_corpus
from mor.data.tokens import (
    TokenBlocks,
    load_tokenizer,
    prepare_tokens,
    train_tokenizer,
    vocabulary_size,
)
from mor.training.arguments import training_arguments
from mor.training.callbacks import PrinterLine
from mor.training.race import Entrant, finished, race
from mor.training.race_results import ModelResult, curve_of, result_of
from mor.training.trainer import MoRTrainer

__all__ = ["config_of", "run", "split_rows", "steps_of"]


def config_of(
    variant: Variant, preset: Preset, vocab_size: int, eos: int = 0, accumulation: int = 1
) -> PreTrainedConfig:
    """The model's configuration.

    Args:
        variant: of an experiment.
        preset: its size.
        vocab_size: entries of the tokenizer.
        eos: its end-of-text token.
        accumulation: forwards of an optimiser step, in each process.
    """
    size = preset.sizes[variant.size]
    if variant.options is None:
        return size.dense(size.layers, vocab_size, preset.seq_len, eos)
    options = dict(variant.options)
    sharing = options.get("sharing", "middle_cycle")
    depth = unrolled_depth(size.layers, options["num_recursions"], sharing)
    dense = size.dense(depth, vocab_size, preset.seq_len, eos)
    if options.get("router") == "token":
        options.setdefault("router_z_coef", 1e-5)
    if "capacity_warmup_steps" in options:
        options["capacity_warmup_steps"] *= accumulation  # the router counts its forwards
    return MoRConfig(base_config=dense, **options)


def steps_of(
    experiment: Experiment, variant: Variant, preset: Preset, config: PreTrainedConfig
) -> int:
    """Optimiser steps of a variant's training.

    At equal FLOPs all variants are counted by `mor.analysis.flops_per_token`. The authors leave out
    the language-model head, so the steps that they published (appendix B) are not equal by our
    count: at 360M they are up to 8% more (12% with shared keys and values), at 135M 17% more.
    """
    tokens_per_step = preset.rows_per_step * preset.seq_len
    if experiment.equal == "tokens":
        return max(1, round(preset.tokens / tokens_per_step))
    flops = flops_per_token(config, preset.seq_len) * tokens_per_step
    return max(1, round(preset.flops[variant.budget] / flops))


def split_rows(preset: Preset, processes: int) -> tuple[int, int]:
    """How the rows of an optimiser step are divided: rows of a forward, forwards in each process.

    Raises:
        ValueError: processes that cannot have equal shares of the rows.
    """
    rows, rest = divmod(preset.rows_per_step, processes)
    if rest:
        raise ValueError(
            f"torchrun --nproc-per-node: preset {preset.name} has {preset.rows_per_step} rows an "
            f"optimiser step; expected a number of processes that divides them, got {processes}"
        )
    accumulation = next(
        n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= preset.batch_size
    )
    return rows // accumulation, accumulation


def run(
    experiment: Experiment,
    preset: Preset,
    seed: int,
    output: Path,
    *,
    corpus: Corpus | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Trains every variant that is not trained yet, and measures them all.

    A killed run goes on where it was. The folder of a training has a name made from everything
    that decides its outcome, so experiments share what they have in common.

    Args:
        experiment: what to compare.
        preset: at which size.
        seed: of the weights and the order of the data.
        output: folder for tokens and checkpoints.
        corpus: the text, where it is not the preset's.
        say: gets a line after every turn.

    Returns:
        What the JSON file holds: the settings, the machine, a result for each variant.

    Raises:
        ValueError: processes that do not divide the rows of a step; or times of different races.
    """
    disable_progress_bar()
    batch, accumulation = split_rows(preset, int(os.environ.get("WORLD_SIZE", "1")))
    folder = output / "runs" / f"{preset.name}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    # Of several processes the first makes the tokens, then the others find them.
    first_process = training_arguments(folder, steps=1)
    with first_process.main_process_first(local=False):
        train_rows, held_out_rows, tokenizer, text = _data(experiment, preset, corpus, output)

    def entrant(variant: Variant) -> Entrant:
        vocab_size, eos = vocabulary_size(tokenizer), tokenizer.eos_token_id
        config = config_of(variant, preset, vocab_size, eos, accumulation)
        steps = steps_of(experiment, variant, preset, config)
        options = {
            **_optimisation(experiment, variant, preset, steps),
            "batch_size": batch,
            "gradient_accumulation": accumulation,
            "seed": seed,
        }
        decisive = {
            "model": {**config.to_dict(), "transformers_version": None},
            "options": options,
            "text": [text, len(held_out_rows), preset.seq_len, preset.turns],
        }
        digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:10]
        of_checkpoints = folder / f"{recipe_name(variant.options)}-{digest}"

        def build() -> MoRTrainer:
            set_seed(seed)
            trainer = MoRTrainer(
                AutoModelForCausalLM.from_config(config),
                training_arguments(of_checkpoints, **options),
                train_dataset=train_rows,
                eval_dataset=held_out_rows,
                data_collator=default_data_collator,
                processing_class=tokenizer,
            )
            trainer.remove_callback(PrinterLine)
            return trainer

        return Entrant(variant.name, of_checkpoints, steps, build)

    def tell(one: Entrant, state: TrainerState) -> None:
        loss = curve_of(state, preset.rows_per_step * preset.seq_len)[-1].loss
        say(f"{one.name}: step {state.global_step} of {one.steps}, validation loss {loss:.4f}")

    variants = experiment.variants(preset)
    entrants = [entrant(variant) for variant in variants]
    with first_process.main_process_first(local=False):
        races = {one.name: _race_of(one, experiment.name) for one in entrants}
    if experiment.timed and len(set(races.values())) > 1:
        raise ValueError(
            f"{experiment.name}: times compare within one race, but the trainings in {folder} are "
            f"of several ({races}): give --output a new folder, or run {experiment.name} first"
        )
    race(entrants, preset.turns, after_turn=tell)
    trained: list[ModelResult] = []
    measured: list[dict[str, float]] = []
    for one in entrants:
        trainer = finished(one)
        trained.append(result_of(one.name, trainer, preset.seq_len))
        measured.append(experiment.measure(trainer))
    results = [
        {
            **asdict(result),
            "measured": own | compared,
            "size": preset.sizes[variant.size].name,
            "budget": preset.flops[variant.budget],
        }
        for variant, result, own, compared in zip(
            variants, trained, measured, experiment.compare(trained), strict=True
        )
    ]
    settings = {
        "experiment": experiment.name,
        "seed": seed,
        **asdict(preset),
        "schedule": _schedule(experiment, preset),
        "text": text,
        "equal": experiment.equal,
        "unigram_loss": unigram_loss(train_rows, held_out_rows, vocabulary_size(tokenizer)),
    }
    with first_process.device:
        values = {"settings": settings, "machine": machine(), "results": results}
    return json.loads(json.dumps(values))  # tuples become lists, as in the file


def _schedule(experiment: Experiment, preset: Preset) -> str:
    """Of the learning rate: the one that stops at any budget, where budgets are compared."""
    return "wsd" if experiment.equal == "FLOPs" else preset.schedule


def _optimisation(
    experiment: Experiment, variant: Variant, preset: Preset, steps: int
) -> dict[str, Any]:
    """Arguments of `training_arguments` that follow from the recipe."""
    # The warm-up is that of the smallest budget, so that runs differ in what follows.
    budgets = experiment.equal == "FLOPs"
    shorter = preset.flops[0] / preset.flops[variant.budget] if budgets else 1.0
    return {
        "steps": steps,
        "learning_rate": preset.learning_rate,
        "schedule": _schedule(experiment, preset),
        "warmup_share": preset.warmup_share * shorter,
        "decay_share": preset.decay_share,
        "log_every": steps,
        "eval_every": steps,
        "save_every": preset.save_every or steps,
        "bf16": preset.bf16,
        "train_sampling_strategy": "random" if preset.shuffled else "sequential",
        "disable_tqdm": True,
    }


def _race_of(one: Entrant, experiment: str) -> str:
    """The experiment in whose race a model trains, which the first one writes down."""
    path = one.folder / "race_of.txt"
    if not path.exists():
        one.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(experiment)
    return path.read_text()


def _data(
    experiment: Experiment, preset: Preset, corpus: Corpus | None, output: Path
) -> tuple[TokenBlocks, TokenBlocks, PreTrainedTokenizerBase, str]:
    most = None
    if corpus is None and preset.dataset is not None:
        name, configuration = preset.dataset
        corpus = open_corpus(name, config=configuration)
        steps = [
            steps_of(experiment, variant, preset, config_of(variant, preset, preset.vocab_size))
            for variant in experiment.variants(preset)
        ]
        most = max(steps) * preset.rows_per_step * preset.seq_len
    corpus = open_corpus() if corpus is None else corpus
    if preset.tokenizer is None:
        tokenizer: PreTrainedTokenizerBase = train_tokenizer(corpus, preset.vocab_size)
    else:
        tokenizer = load_tokenizer(preset.tokenizer)
    files = prepare_tokens(corpus, tokenizer, output, most)
    train_rows = TokenBlocks(files, preset.seq_len)
    held_out = TokenBlocks(files, preset.seq_len, "validation", max_blocks=preset.eval_rows)
    return train_rows, held_out, tokenizer, files.identity
