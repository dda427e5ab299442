"""A whole training run from one set of options: what `mor train` does."""

import json
import logging
import sys
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mor.options import RunOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mor import MoRConfig
    from mor.corpus import Corpus
    from mor.training import MoRTrainer

__all__ = ["options_of_run", "parse_capacities", "prepare_run", "train"]

logger = logging.getLogger(__name__)


def prepare_run(options: RunOptions) -> "tuple[MoRTrainer, Path | None]":
    """Checks everything that can be checked and builds the trainer.

    Returns:
        The trainer, and the checkpoint to resume from or None.

    Raises:
        ValueError: whatever is wrong with the options, the data or the checkpoint.
    """
    from transformers import set_seed

    from mor import MoRForCausalLM
    from mor.checkpoints import check_same_model
    from mor.corpus import open_corpus
    from mor.data import TokenBlocks, prepare_tokens
    from mor.training import MoRTrainer, training_arguments

    for name in ("max_tokens", "eval_rows"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if options.model is not None and not (options.model / "config.json").exists():
        raise ValueError(f"no model in {options.model}: config.json is missing")
    arguments = training_arguments(
        options.output_dir,
        steps=options.steps,
        batch_size=options.batch_size,
        gradient_accumulation=options.gradient_accumulation,
        learning_rate=options.lr,
        schedule=options.schedule,
        warmup_share=options.warmup_share,
        decay_share=options.decay_share,
        weight_decay=options.weight_decay,
        log_every=options.log_every,
        eval_every=options.eval_every,
        save_every=options.save_every,
        report_to=[] if options.report_to == "none" else options.report_to.split(","),
        bf16=options.bf16,
        activation_checkpointing=options.gradient_checkpointing or None,
        seed=options.seed,
        disable_tqdm=not (options.progress and sys.stderr.isatty()),  # no bars into a log
    )
    checkpoint = _checkpoint(options)
    # Of several processes the first makes the tokens, then the others find them.
    with arguments.main_process_first(local=False):
        corpus = open_corpus(
            options.data,
            text_field=options.text_field,
            config=options.data_config,
            split=options.data_split,
        )
        tokenizer = _tokenizer(options, corpus, checkpoint)
        config = _model_config(options, len(tokenizer), tokenizer.eos_token_id)
        max_tokens = options.max_tokens
        if max_tokens is None and corpus.name.startswith("dataset "):
            max_tokens = (
                options.steps
                * options.batch_size
                * options.gradient_accumulation
                * arguments.world_size
                * options.seq_len
            )
        files = prepare_tokens(corpus, tokenizer, options.output_dir, max_tokens)
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

    A checkpoint of the last step, or of a later one, is only saved as the model.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of saving; training has its own
    folder, steps = Path(str(trainer.args.output_dir)) / "model", trainer.args.max_steps
    done = _read_json(checkpoint / "trainer_state.json")["global_step"] if checkpoint else 0
    if done >= steps:  # the Trainer would take one more
        logger.warning("%s is at step %d of %d: nothing left to train", checkpoint, done, steps)
        trainer._load_from_checkpoint(str(checkpoint))
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_model(str(folder))
    return folder


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


def _model_config(options: RunOptions, vocab_size: int, end_of_text: int) -> "MoRConfig":
    from transformers import LlamaConfig

    from mor import MoRConfig

    routing: dict[str, Any] = {
        "num_recursions": options.num_recursions,
        "sharing": options.sharing,
        "router": None if options.router == "none" else options.router,
        "kv_strategy": options.kv_strategy,
        "capacities": parse_capacities(options.capacities),
    }
    source = options.model / "config.json" if options.model else options.config
    if source is not None:
        values = _read_json(source)
        if values.get("model_type") == MoRConfig.model_type:
            names = [*routing, *(["config"] if options.model else [])]
            given = [name for name in names if getattr(options, name) != getattr(RunOptions, name)]
            if given:
                raise ValueError(
                    f"{source} is a MoR configuration and says how to route: expected no "
                    f"{', '.join(given)} beside it"
                )
            config = MoRConfig(**values)
        elif options.model is not None:
            raise ValueError(
                f"{options.model} holds no MoR model (its model_type is "
                f"{values.get('model_type')!r}); mor convert makes one of a dense model"
            )
        else:
            config = MoRConfig(base_config=values, **routing)
        if config.vocab_size < vocab_size:
            raise ValueError(
                f"{source} has a vocab_size of {config.vocab_size}, the tokenizer needs "
                f"{vocab_size}"
            )
        return config
    kv_heads = options.kv_heads or options.heads
    if options.heads < 1 or options.heads % kv_heads:
        raise ValueError(
            f"heads must be a positive multiple of kv_heads, got {options.heads} and {kv_heads}"
        )
    if options.hidden_size % options.heads:
        raise ValueError(
            f"hidden_size {options.hidden_size} is not a multiple of heads {options.heads}"
        )
    base = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size or -(-options.hidden_size * 8 // 3 // 64) * 64,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads or options.heads,
        max_position_embeddings=max(2048, options.seq_len),
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )
    return MoRConfig(base_config=base, **routing)


def parse_capacities(text: str | None) -> list[float] | None:
    """Reads capacities as a user writes them, "1,2/3,1/3".

    Raises:
        ValueError: anything else.
    """
    if text is None:
        return None
    try:
        return [float(Fraction(part.strip())) for part in text.split(",")]
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"expected capacities such as 1,2/3,1/3, got {text!r}") from error


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
