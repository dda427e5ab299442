"""A whole training run from one set of options: what `mor train` does."""

import json
import logging
import sys
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mor.training.options import (
    NEW_WEIGHTS_LR,
    RunOptions,
    given_options,
    refuse,
)
from mor.training.run_model import describe, model_config, read_json
from mor.training.signals import Stopped, on_signal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from mor.data.corpus import Corpus
    from mor.training.trainer import MoRTrainer

__all__ = ["options_of_run", "prepare_run", "train"]

logger = logging.getLogger(__name__)


def prepare_run(
    options: RunOptions,
    *,
    given: Collection[str] | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> "tuple[MoRTrainer, Path | None]":
    """Checks everything that can be checked and builds the trainer.

    Args:
        options: of the run.
        given: names of the options that somebody chose; default those that differ from their
            default. Such an option is an error where another makes it meaningless.
        say: gets, in the first process, what is found as soon as it is: text, model and its size
            (before it is built), tokens, steps, device.

    Returns:
        The trainer, and the checkpoint to resume from or None.

    Raises:
        ValueError: whatever is wrong with the options, the data or the checkpoint.
    """
    from transformers import default_data_collator, set_seed

    from mor import MoRForCausalLM
    from mor.data.corpus import open_corpus
    from mor.data.tokens import TokenBlocks, prepare_tokens, vocabulary_size
    from mor.training.checkpoints import check_same_model
    from mor.training.generate import find_model
    from mor.training.trainer import MoRTrainer

    given = given_options(options) if given is None else given
    options.check(given)
    if options.model is not None:
        options = replace(options, model=find_model(options.model))
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot write to --output-dir {options.output_dir}: {error.strerror}"
        ) from error
    model_config(options, given, vocab_size=1, end_of_text=0)  # before any text is read
    arguments = _arguments(options)
    if arguments.process_index != 0:
        say = lambda line: None  # noqa: E731
    checkpoint = _checkpoint(options)
    # Of several processes the first makes the tokens, then the others find them.
    with arguments.main_process_first(local=False):
        corpus = open_corpus(
            options.data,
            text_field=options.text_field,
            config=options.data_config,
            split=options.data_split,
        )
        say(f"Text:   {corpus.describe()}")
        hub = corpus.name.startswith("dataset ")
        if not hub:
            refuse(
                given, ["data_config", "data_split"], f"{corpus.name} is no Hugging Face dataset"
            )
        tokenizer = _tokenizer(options, corpus, checkpoint)
        vocab_size = vocabulary_size(tokenizer)
        config = model_config(options, given, vocab_size, tokenizer.eos_token_id)
        say(f"Model:  {describe(config)}")
        max_tokens = options.max_tokens
        if max_tokens is None and hub:
            max_tokens = options.steps * _tokens_a_step(options, arguments.world_size)
        files = prepare_tokens(corpus, tokenizer, options.output_dir, max_tokens)
    say(f"Tokens: {files.describe()}")
    separate = options.separate_documents
    train_rows = TokenBlocks(files, options.seq_len, separate_documents=separate)
    held_out_rows = None
    if options.eval_every > 0:
        held_out_rows = TokenBlocks(
            files,
            options.seq_len,
            "validation",
            separate_documents=separate,
            max_blocks=options.eval_rows,
        )
    say(f"Steps:  {_describe_steps(options, arguments.world_size, len(train_rows))}")
    device = f"{arguments.device}, {'bfloat16' if options.bf16 else 'float32'}"
    others = f", {arguments.world_size} processes" if arguments.world_size > 1 else ""
    say(f"Device: {device}{others}; logs and checkpoints in {options.output_dir}")
    set_seed(options.seed)
    if options.model is None:
        model = MoRForCausalLM(config)
    else:
        model = MoRForCausalLM.from_pretrained(options.model, dtype="float32")
    if checkpoint is not None:
        check_same_model(checkpoint, model)
    if arguments.process_index == 0:
        _remember(options, files.identity)
    trainer = MoRTrainer(
        model,
        arguments,
        train_dataset=train_rows,
        eval_dataset=held_out_rows,
        data_collator=default_data_collator,  # rows are of one length: no pad token is needed
        processing_class=tokenizer,
        aux_router_learning_rate=options.aux_router_lr,
    )
    return trainer, checkpoint


def train(trainer: "MoRTrainer", checkpoint: Path | None) -> Path:
    """Trains and saves the model with its tokenizer and the Trainer's state; returns their folder.

    A checkpoint of the last step, or of a later one, is only saved as the model. SIGINT and SIGTERM
    end the training after the step in progress, with a checkpoint; a second one ends it at once.

    Raises:
        Stopped: by a signal.
        FloatingPointError: the training diverged.
    """
    from transformers import TrainerState
    from transformers.utils.logging import disable_progress_bar

    from mor.training.stopping import StopOnSignal
    from mor.training.trainer import Diverged

    disable_progress_bar()  # of saving; training has its own
    output_dir = Path(str(trainer.args.output_dir))
    folder, steps = output_dir / "model", trainer.args.max_steps
    resume = f"mor train --resume --output-dir {output_dir}"
    done = read_json(checkpoint / "trainer_state.json")["global_step"] if checkpoint else 0
    if checkpoint is not None and done >= steps:  # the Trainer would take one more
        logger.warning("%s is at step %d of %d: nothing left to train", checkpoint, done, steps)
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    else:
        stopping = StopOnSignal()
        trainer.add_callback(stopping)
        try:
            with on_signal(stopping.ask):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            trainer.refuse_nan()
        except Diverged as error:
            rate = min(trainer.args.learning_rate / 3, NEW_WEIGHTS_LR)  # 1e30 was a typo
            smaller = f"{resume} --lr {rate:.1g}"
            if checkpoint is not None and error.step <= done + 1:
                smaller += " --resume-from AN_EARLIER_CHECKPOINT (this one goes on to NaN)"
            raise FloatingPointError(f"{error}: {smaller}") from error
        except Stopped as stopped:
            message = f"stopped at once; go on from the last checkpoint: {resume}"
            raise Stopped(stopped.number, message) from None
        step = trainer.state.global_step
        if stopping.number is not None and step < steps:
            raise Stopped(stopping.number, f"stopped at step {step} of {steps}; go on: {resume}")
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():  # tells `find_model` whether a run has gone on since
        trainer.state.save_to_json(str(folder / "trainer_state.json"))
    return folder


def _arguments(options: RunOptions) -> "TrainingArguments":
    from transformers.integrations import get_reporting_integration_callbacks

    from mor.training.trainer import training_arguments

    names = [name.strip() for name in options.report_to.split(",")]
    reporters = [] if names == ["none"] else names
    try:
        for reporter in get_reporting_integration_callbacks(
            "all" if names == ["all"] else reporters
        ):
            reporter()  # says here, and not after the text is read, what it needs to be installed
    except (RuntimeError, ImportError, ValueError) as error:
        raise ValueError(f"--report-to {options.report_to}: {error}") from error
    return training_arguments(
        options.output_dir,
        steps=options.steps,
        batch_size=options.batch_size,
        gradient_accumulation=options.gradient_accumulation,
        learning_rate=options.peak_lr,
        schedule=options.schedule,
        warmup_share=options.warmup_share,
        decay_share=options.decay_share,
        weight_decay=options.weight_decay,
        log_every=options.log_every,
        eval_every=options.eval_every,
        save_every=options.save_every,
        report_to=reporters,
        bf16=options.bf16,
        activation_checkpointing=options.gradient_checkpointing or None,
        seed=options.seed,
        disable_tqdm=not (options.progress and sys.stderr.isatty()),  # no bars into a log
    )


def _tokens_a_step(options: RunOptions, processes: int) -> int:
    rows = options.batch_size * options.gradient_accumulation * processes
    return rows * options.seq_len


def _describe_steps(options: RunOptions, processes: int, rows: int) -> str:
    tokens = _tokens_a_step(options, processes)
    total = options.steps * tokens
    return (
        f"{options.steps:,} of {tokens:,} tokens ({tokens // options.seq_len} rows of "
        f"{options.seq_len}): {total:,} tokens, {total / (rows * options.seq_len):.2g} times the "
        f"text; learning rate {options.peak_lr:g}"
    )


def options_of_run(output_dir: Path) -> dict[str, Any]:
    """Reads the options that a run was started with; empty if there is no run.

    Raises:
        ValueError: the run's record cannot be read.
    """
    path = output_dir / "run.json"
    if not path.exists():
        return {}
    values = read_json(path).get("options")
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no record of a run: expected a JSON object with options")
    return values


def _remember(options: RunOptions, tokens: str) -> None:
    path = options.output_dir / "run.json"
    if path.exists() and read_json(path).get("tokens") != tokens:
        logger.warning(
            "the text or the tokenizer is not what %s was started with: the run goes on with "
            "other data",
            options.output_dir,
        )
    values = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in asdict(options).items()
    }
    values = {key: value for key, value in values.items() if key not in ("resume", "resume_from")}
    for name in ("data", "tokenizer", "model", "config"):  # --resume may be said elsewhere
        if values[name] and Path(values[name]).exists():
            values[name] = str(Path(values[name]).resolve())
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"options": values, "tokens": tokens}, indent=2) + "\n")
    partial.replace(path)


def _checkpoint(options: RunOptions) -> Path | None:
    from mor.training.checkpoints import checkpoint_to_resume, find_problem

    if options.resume_from is not None:
        problem = find_problem(options.resume_from)
        if problem is not None:
            raise ValueError(f"cannot resume from {options.resume_from}: {problem}")
        return options.resume_from
    if not options.resume:
        old = next(iter(options.output_dir.glob("checkpoint-*")), None)
        if old is not None:
            raise ValueError(
                f"{options.output_dir} already holds {old.name}: add --resume to go on with that "
                "run, or choose another --output-dir"
            )
        return None
    checkpoint = checkpoint_to_resume(options.output_dir)
    if checkpoint is None:
        logger.warning(
            "no complete checkpoint in %s: starting from the beginning", options.output_dir
        )
    return checkpoint


def _tokenizer(
    options: RunOptions, corpus: "Corpus", checkpoint: Path | None
) -> "PreTrainedTokenizerBase":
    from mor.data.tokens import load_tokenizer, train_tokenizer

    source = options.tokenizer or checkpoint or options.model
    return load_tokenizer(source) if source else train_tokenizer(corpus, options.vocab_size)
