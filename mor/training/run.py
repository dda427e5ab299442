"""A whole training run from one set of options: the work of `mor train`."""

import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from transformers import (
    PreTrainedTokenizerBase,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from mor.data.corpus import Corpus, open_corpus
from mor.data.tokens import (
    TokenBlocks,
    TokenFiles,
    load_tokenizer,
    prepare_tokens,
    train_tokenizer,
    vocabulary_size,
)
from mor.models import MoRConfig, MoRForCausalLM
from mor.training.arguments import arguments_of
from mor.training.checkpoints import (
    check_same_model,
    checkpoint_to_resume,
    find_problem,
    load_finished,
)
from mor.training.generate import find_model
from mor.training.options import NEW_WEIGHTS_LR, RunOptions, given_options, refuse
from mor.training.run_model import describe, model_config
from mor.training.run_record import options_of_run, read_json, remember
from mor.training.signals import Stopped, on_signal
from mor.training.stopping import StopOnSignal
from mor.training.trainer import Diverged, MoRTrainer

__all__ = ["options_of_run", "prepare_run", "train"]

logger = logging.getLogger(__name__)


def prepare_run(
    options: RunOptions,
    *,
    given: Collection[str] | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> tuple[MoRTrainer, Path | None]:
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
    arguments = arguments_of(options)
    if arguments.process_index != 0:
        say = lambda line: None  # noqa: E731
    checkpoint = _checkpoint(options)
    # Of several processes the first makes the tokens, then the others find them.
    with arguments.main_process_first(local=False):
        corpus = _corpus(options, given)
        say(f"Text:   {corpus.describe()}")
        tokenizer = _tokenizer(options, corpus, checkpoint)
        config = model_config(options, given, vocabulary_size(tokenizer), tokenizer.eos_token_id)
        say(f"Model:  {describe(config)}")
        most = options.max_tokens
        if most is None and corpus.is_remote:
            most = options.steps * _tokens_a_step(options, arguments.world_size)
        files = prepare_tokens(corpus, tokenizer, options.output_dir, most)
    say(f"Tokens: {files.describe()}")
    train_rows, held_out_rows = _rows(options, files)
    say(f"Steps:  {_describe_steps(options, arguments.world_size, len(train_rows))}")
    say(f"Device: {_describe_device(arguments)}; logs and checkpoints in {options.output_dir}")
    set_seed(options.seed)
    model = _model(options, config, checkpoint)
    if arguments.process_index == 0:
        remember(options, files.identity)
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


def train(trainer: MoRTrainer, checkpoint: Path | None) -> Path:
    """Trains and saves the model with its tokenizer and the Trainer's state; returns their folder.

    A checkpoint of the last step, or of a later one, is only saved as the model. SIGINT and SIGTERM
    end the training after the step in progress, with a checkpoint; a second one ends it at once.

    Raises:
        Stopped: by a signal.
        FloatingPointError: the training diverged.
    """
    disable_progress_bar()  # of saving; training has its own
    output_dir = Path(str(trainer.args.output_dir))
    folder, steps = output_dir / "model", trainer.args.max_steps
    resume = f"mor train --resume --output-dir {output_dir}"
    done = read_json(checkpoint / "trainer_state.json")["global_step"] if checkpoint else 0
    if checkpoint is not None and done >= steps:
        logger.warning("%s is at step %d of %d: nothing left to train", checkpoint, done, steps)
        load_finished(trainer, checkpoint)
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


def _corpus(options: RunOptions, given: Collection[str]) -> Corpus:
    corpus = open_corpus(
        options.data,
        text_field=options.text_field,
        config=options.data_config,
        split=options.data_split,
    )
    if not corpus.is_remote:
        refuse(given, ["data_config", "data_split"], f"{corpus.name} is no Hugging Face dataset")
    return corpus


def _tokenizer(
    options: RunOptions, corpus: Corpus, checkpoint: Path | None
) -> PreTrainedTokenizerBase:
    source = options.tokenizer or checkpoint or options.model
    return load_tokenizer(source) if source else train_tokenizer(corpus, options.vocab_size)


def _rows(options: RunOptions, files: TokenFiles) -> tuple[TokenBlocks, TokenBlocks | None]:
    separate = options.separate_documents
    train_rows = TokenBlocks(files, options.seq_len, separate_documents=separate)
    if options.eval_every == 0:
        return train_rows, None
    held_out_rows = TokenBlocks(
        files,
        options.seq_len,
        "validation",
        separate_documents=separate,
        max_blocks=options.eval_rows,
    )
    return train_rows, held_out_rows


def _model(options: RunOptions, config: MoRConfig, checkpoint: Path | None) -> MoRForCausalLM:
    if options.model is None:
        model = MoRForCausalLM(config)
    else:
        model = MoRForCausalLM.from_pretrained(options.model, dtype="float32")
    if checkpoint is not None:
        check_same_model(checkpoint, model)
    return model


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


def _describe_device(arguments: TrainingArguments) -> str:
    number = "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else "float32"
    others = f", {arguments.world_size} processes" if arguments.world_size > 1 else ""
    return f"{arguments.device}, {number}{others}"


def _checkpoint(options: RunOptions) -> Path | None:
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
