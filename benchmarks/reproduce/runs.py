"""Train the variants of an experiment and measure them."""

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
from benchmarks.reproduce.experiments import Experiment, Variant
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
from mor.training.race import Entrant, check_same_race, finished, race
from mor.training.race_results import curve_of, result_of
from mor.training.trainer import MoRTrainer

__all__ = ["config_of", "run", "steps_of"]


def config_of(variant: Variant, preset: Preset, vocab_size: int, eos: int = 0) -> PreTrainedConfig:
    """The model's configuration."""
    size = preset.sizes[variant.size]
    options = variant.options
    if options is None:
        return size.dense(size.layers, vocab_size, preset.seq_len, eos)
    sharing = options.get("sharing", "middle_cycle")
    depth = unrolled_depth(size.layers, options["num_recursions"], sharing)
    dense = size.dense(depth, vocab_size, preset.seq_len, eos)
    token_choice = {"router_z_coef": 1e-5} if options.get("router") == "token" else {}
    return MoRConfig(base_config=dense, **token_choice, **options)


def steps_of(
    experiment: Experiment, variant: Variant, preset: Preset, config: PreTrainedConfig
) -> int:
    """Optimiser steps of a variant's training."""
    tokens_per_step = preset.rows_per_step * preset.seq_len
    if experiment.equal == "tokens":
        return max(1, round(preset.tokens / tokens_per_step))
    published = preset.published_steps.get(recipe_name(variant.options))
    if published is not None:
        return max(1, round(published * preset.flops[variant.budget] / preset.flops[-1]))
    flops = flops_per_token(config, preset.seq_len) * tokens_per_step
    return max(1, round(preset.flops[variant.budget] / flops))


def run(
    experiment: Experiment,
    preset: Preset,
    seed: int,
    output: Path,
    *,
    corpus: Corpus | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Trains every variant, or goes on where a killed run was; measures them.

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
        ValueError: the folder holds a run of other settings.
    """
    disable_progress_bar()
    folder = output / "runs" / f"{experiment.name}-{preset.name}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    # Of several processes the first makes the tokens, then the others find them.
    with training_arguments(folder, steps=1).main_process_first(local=False):
        train_rows, held_out_rows, tokenizer, text = _data(experiment, preset, corpus, output)
        settings = {"experiment": experiment.name, "seed": seed, **asdict(preset), "text": text}
        check_same_race(folder, settings)

    def entrant(number: int, variant: Variant) -> Entrant:
        config = config_of(variant, preset, vocabulary_size(tokenizer), tokenizer.eos_token_id)
        steps = steps_of(experiment, variant, preset, config)
        batch = min(preset.batch_size, preset.rows_per_step // processes)
        wsd = experiment.equal == "FLOPs"
        # The warm-up is that of the smallest budget, so that runs differ in what follows.
        shorter = preset.flops[0] / preset.flops[variant.budget] if wsd else 1.0
        of_checkpoints = folder / f"{number:02}"

        def build() -> MoRTrainer:
            set_seed(seed)
            trainer = MoRTrainer(
                AutoModelForCausalLM.from_config(config),
                training_arguments(
                    of_checkpoints,
                    steps=steps,
                    batch_size=batch,
                    gradient_accumulation=preset.rows_per_step // (batch * processes),
                    learning_rate=preset.learning_rate,
                    schedule="wsd" if wsd else preset.schedule,
                    warmup_share=preset.warmup_share * shorter,
                    decay_share=preset.decay_share,
                    log_every=steps,
                    eval_every=steps,
                    save_every=preset.save_every or steps,
                    seed=seed,
                    bf16=preset.bf16,
                    train_sampling_strategy="random" if preset.shuffled else "sequential",
                    disable_tqdm=True,
                ),
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
    entrants = [entrant(number, variant) for number, variant in enumerate(variants)]
    race(entrants, preset.turns, after_turn=tell)
    results = []
    for one, variant in zip(entrants, variants, strict=True):
        trainer = finished(one)
        result = asdict(result_of(one.name, trainer, preset.seq_len))
        measured = experiment.measure(trainer)
        place = {"size": preset.sizes[variant.size].name, "budget": preset.flops[variant.budget]}
        results.append({**result, "measured": measured, **place})
    settings["equal"] = experiment.equal
    return {"settings": json.loads(json.dumps(settings)), "machine": machine(), "results": results}


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
