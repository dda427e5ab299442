"""A whole training run from one set of options: what `mor train` does."""

import json
import logging
import sys
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mor_cli.options import (
    RunOptions,
    check_recursions,
    given_options,
    in_words_of_the_shell,
    refuse,
    refuse_routing,
)
from mor_cli.stopping import Stopped, on_signal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from mor import MoRConfig
    from mor.corpus import Corpus
    from mor.training import MoRTrainer

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
    from transformers import set_seed

    from mor import MoRForCausalLM
    from mor.checkpoints import check_same_model
    from mor.corpus import open_corpus
    from mor.data import TokenBlocks, prepare_tokens, vocabulary_size
    from mor.training import MoRTrainer

    given = given_options(options) if given is None else given
    options.check(given)
    if options.model is not None and not (options.model / "config.json").exists():
        raise ValueError(f"no model in {options.model}: config.json is missing")
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot write to --output-dir {options.output_dir}: {error.strerror}"
        ) from error
    _model_config(options, given, vocab_size=1, end_of_text=0)  # before any text is read
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
        config = _model_config(options, given, vocab_size, tokenizer.eos_token_id)
        say(f"Model:  {_describe(config)}")
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
        processing_class=tokenizer,
        aux_router_learning_rate=options.aux_router_lr,
    )
    return trainer, checkpoint


def train(trainer: "MoRTrainer", checkpoint: Path | None) -> Path:
    """Trains and saves the model with its tokenizer; returns their folder.

    A checkpoint of the last step, or of a later one, is only saved as the model. SIGINT and SIGTERM
    end the training after the step in progress, with a checkpoint; a second one ends it at once.

    Raises:
        Stopped: by a signal.
        FloatingPointError: the training diverged.
    """
    from transformers.utils.logging import disable_progress_bar

    from mor.stopping import StopOnSignal
    from mor.training import Diverged

    disable_progress_bar()  # of saving; training has its own
    output_dir = Path(str(trainer.args.output_dir))
    folder, steps = output_dir / "model", trainer.args.max_steps
    resume = f"mor train --resume --output-dir {output_dir}"
    done = _read_json(checkpoint / "trainer_state.json")["global_step"] if checkpoint else 0
    if done >= steps:  # the Trainer would take one more
        logger.warning("%s is at step %d of %d: nothing left to train", checkpoint, done, steps)
        trainer._load_from_checkpoint(str(checkpoint))
    else:
        stopping = StopOnSignal()
        trainer.add_callback(stopping)
        try:
            with on_signal(stopping.ask):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            trainer.refuse_nan()
        except Diverged as error:
            smaller = f"{resume} --lr {trainer.args.learning_rate / 3:.1g}"
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
    return folder


def _arguments(options: RunOptions) -> "TrainingArguments":
    from transformers.integrations import get_reporting_integration_callbacks

    from mor.training import training_arguments

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


def _describe(config: "MoRConfig") -> str:
    from mor.analysis import count_parameters

    how = {"expert": "expert-choice", "token": "token-choice", None: "no router"}[config.router]
    return (
        f"{config.base_config.model_type}, {config.num_hidden_layers} layers deep with the weights "
        f"of {config.num_unique_layers}, {config.num_recursions} recursions, {how}: "
        f"{count_parameters(config) / 1e6:,.2f}M parameters"
    )


def options_of_run(output_dir: Path) -> dict[str, Any]:
    """Reads the options that a run was started with; empty if there is no run.

    Raises:
        ValueError: the run's record cannot be read.
    """
    path = output_dir / "run.json"
    if not path.exists():
        return {}
    values = _read_json(path).get("options")
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no record of a run: expected a JSON object with options")
    return values


def _remember(options: RunOptions, tokens: str) -> None:
    path = options.output_dir / "run.json"
    if path.exists() and _read_json(path).get("tokens") != tokens:
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
    from mor.checkpoints import checkpoint_to_resume, find_problem

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
    from mor.data import load_tokenizer, train_tokenizer

    source = options.tokenizer or checkpoint or options.model
    return load_tokenizer(source) if source else train_tokenizer(corpus, options.vocab_size)


def _model_config(
    options: RunOptions, given: Collection[str], vocab_size: int, end_of_text: int
) -> "MoRConfig":
    from transformers import LlamaConfig

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


def _config_of(source: Path, options: RunOptions, given: Collection[str]) -> "MoRConfig":
    """The configuration in a JSON file, which is a MoR one, or a dense one to be made recursive."""
    from mor import MoRConfig

    values = _read_json(source)
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


def _recursive(base: Any, options: RunOptions) -> "MoRConfig":
    from mor import MoRConfig

    try:
        return MoRConfig(base_config=base, **options.for_config())
    except ValueError as error:
        raise ValueError(in_words_of_the_shell(str(error))) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"cannot read {path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"cannot read {path}: expected a JSON object")
    return values
