"""The options of the commands, written once for Python (`RunOptions`) and the shell.

Over 300 lines in one file: most of them are the options and what they say of themselves.
"""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from mor.training.argument_names import OURS, WITHOUT_EFFECT, argument_names, nearest

__all__ = [
    "NEW_WEIGHTS_LR",
    "TRAINED_WEIGHTS_LR",
    "RoutingOptions",
    "RunOptions",
    "Shown",
    "check_recursions",
    "flag",
    "given_options",
    "in_words_of_the_shell",
    "parse_capacities",
    "refuse",
    "refuse_routing",
]

_RUN, _DATA, _MODEL, _TRAINING = "Run", "Data", "Model", "Training"

#: Peak learning rate of new weights, and of weights that are trained already.
NEW_WEIGHTS_LR, TRAINED_WEIGHTS_LR = 3e-3, 3e-4


@dataclass(frozen=True)
class Shown:
    """Form of an option in the shell.

    Attributes:
        help: what it says of itself.
        panel: under which heading it stands.
        flags: what is typed; None for the field's name, with a `--no-` form if it is a bool.
    """

    help: str
    panel: str
    flags: str | None = None


@dataclass
class RoutingOptions:
    """Options of recursion and routing: those of `mor train` and of `mor convert`."""

    num_recursions: Annotated[int, Shown("Times the shared block is applied.", _MODEL)] = 3
    sharing: Annotated[
        str,
        Shown("Which layers are shared: middle_cycle, cycle, middle_sequence, sequence.", _MODEL),
    ] = "middle_cycle"
    router: Annotated[
        Literal["expert", "token", "none"],
        Shown("Who chooses: experts choose tokens or tokens their depth.", _MODEL),
    ] = "expert"
    capacities: Annotated[
        str | None,
        Shown(
            "Expert routing: share of the tokens in each recursion, e.g. 1,2/3,1/3 (the default "
            "for three).",
            _MODEL,
        ),
    ] = None
    router_type: Annotated[
        str, Shown("The router network: linear, mlp, wide_mlp, random.", _MODEL)
    ] = "linear"
    gating: Annotated[
        str | None,
        Shown(
            "weighted (the paper's), additive, or residual (starts nearest to a dense model). "
            "Default: weighted for new weights, residual for a converted model.",
            _MODEL,
        ),
    ] = None
    kv_strategy: Annotated[
        str,
        Shown("Keys and values a recursion sees: recursion, shared, hybrid.", _MODEL),
    ] = "recursion"
    relaxation: Annotated[
        Literal["lora", "dora", "none"],
        Shown("Adapters of each recursion's own; a conversion starts them by an SVD.", _MODEL),
    ] = "none"
    relaxation_rank: Annotated[int, Shown("Rank of the adapters.", _MODEL)] = 16
    recursion_encoding: Annotated[
        bool,
        Shown("A learnt vector of each recursion's own.", _MODEL, "--recursion-encoding"),
    ] = False

    def check(self, given: Collection[str]) -> None:
        """Checks what needs neither the text nor PyTorch.

        Args:
            given: names of the options that somebody chose (`given_options`).

        Raises:
            ValueError: a value out of range, or an option that another makes meaningless; names
                both as the shell does.
        """
        self._at_least({"num_recursions": 1, "relaxation_rank": 1})
        if self.relaxation == "none":
            refuse(given, ["relaxation_rank"], "without --relaxation there are no adapters")
        if self.router == "none":
            refuse(given, ["router_type", "gating"], "--router none trains no router")

    def _at_least(self, bounds: dict[str, int]) -> None:
        for name, bound in bounds.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:
                raise ValueError(f"{flag(name)} must be at least {bound}, got {value}")

    def for_config(self) -> dict[str, Any]:
        """The options as `MoRConfig` takes them; the gating only where it was named.

        Raises:
            ValueError: capacities that are no numbers.
        """
        named = {} if self.gating is None else {"router_gating": self.gating}
        return named | {
            "num_recursions": self.num_recursions,
            "sharing": self.sharing,
            "router": None if self.router == "none" else self.router,
            "capacities": parse_capacities(self.capacities),
            "router_type": self.router_type,
            "kv_strategy": self.kv_strategy,
            "relaxation": None if self.relaxation == "none" else self.relaxation,
            "relaxation_rank": self.relaxation_rank,
            "recursion_encoding": self.recursion_encoding,
        }


@dataclass
class RunOptions(RoutingOptions):
    """Options of a training run; each is an option of `mor train` with the same name."""

    output_dir: Annotated[Path, Shown("Folder for everything the run writes.", _RUN)] = Path(
        "runs/train"
    )

    data: Annotated[
        str | None,
        Shown(
            "A .txt, .md, .rst, .py, .jsonl, .json or .parquet file, a directory of them, or the "
            "name of a Hugging Face dataset. Default: the Python standard library's own sources.",
            _DATA,
        ),
    ] = None
    data_config: Annotated[
        str | None, Shown("Configuration of the Hugging Face dataset.", _DATA)
    ] = None
    data_split: Annotated[str, Shown("Split of the Hugging Face dataset.", _DATA)] = "train"
    text_field: Annotated[
        str, Shown("Field of the text in JSON, parquet and dataset records.", _DATA)
    ] = "text"
    max_tokens: Annotated[
        int | None,
        Shown(
            "Tokens to make at most. Default: all; of a Hugging Face dataset what the run needs.",
            _DATA,
        ),
    ] = None
    tokenizer: Annotated[
        str | None,
        Shown(
            "Folder or Hugging Face name of a tokenizer. Default: the model's, or one is trained "
            "on the data.",
            _DATA,
        ),
    ] = None
    vocab_size: Annotated[int, Shown("Size of the tokenizer that is trained.", _DATA)] = 4096
    seq_len: Annotated[int, Shown("Tokens in a training row.", _DATA)] = 256
    separate_documents: Annotated[
        bool, Shown("Keep attention inside each document of a row.", _DATA)
    ] = False

    model: Annotated[
        Path | None,
        Shown(
            "Folder of a MoR model to go on from (of mor convert, say, or of a run), with its "
            "tokenizer; it has sizes and routing already.",
            _MODEL,
        ),
    ] = None
    config: Annotated[
        Path | None,
        Shown(
            "JSON file with a MoR configuration, which has sizes and routing, or with that of a "
            "dense model to make recursive, which has sizes.",
            _MODEL,
        ),
    ] = None
    layers: Annotated[int, Shown("Layers a token passes at full depth (unrolled).", _MODEL)] = 8
    hidden_size: Annotated[int, Shown("Width of the model.", _MODEL)] = 256
    intermediate_size: Annotated[
        int | None,
        Shown("Width of the MLP. Default: 8/3 of the hidden size, in steps of 64.", _MODEL),
    ] = None
    heads: Annotated[int, Shown("Attention heads.", _MODEL)] = 4
    kv_heads: Annotated[
        int | None, Shown("Key and value heads. Default: as many as heads.", _MODEL)
    ] = None

    steps: Annotated[int, Shown("Optimiser steps.", _TRAINING)] = 1000
    batch_size: Annotated[int, Shown("Rows in a forward pass.", _TRAINING)] = 8
    gradient_accumulation: Annotated[
        int, Shown("Forward passes in an optimiser step.", _TRAINING)
    ] = 1
    lr: Annotated[
        float | None,
        Shown(
            f"Peak learning rate. Default: {NEW_WEIGHTS_LR:g}, with --model "
            f"{TRAINED_WEIGHTS_LR:g}.",
            _TRAINING,
            "--lr",
        ),
    ] = None
    aux_router_lr: Annotated[
        float | None,
        Shown("Peak learning rate of auxiliary routers. Default: --lr.", _TRAINING),
    ] = None
    schedule: Annotated[
        Literal["wsd", "cosine"], Shown("Warmup-stable-decay or cosine.", _TRAINING)
    ] = "wsd"
    warmup_share: Annotated[float, Shown("Share of the steps that warm up.", _TRAINING)] = 0.05
    decay_share: Annotated[float, Shown("Share of the steps in which wsd decays.", _TRAINING)] = 0.2
    weight_decay: Annotated[float, Shown("AdamW's weight decay.", _TRAINING)] = 0.1
    bf16: Annotated[
        bool, Shown("Compute in bfloat16 (weights stay float32).", _TRAINING, "--bf16/--float32")
    ] = False
    gradient_checkpointing: Annotated[
        bool, Shown("Recompute activations in the backward pass.", _TRAINING)
    ] = False
    seed: Annotated[int, Shown("Seed of the weights and the order of the data.", _TRAINING)] = 0

    resume: Annotated[
        bool,
        Shown(
            "Go on from the newest complete checkpoint in the output folder; options not given are "
            "those of the run.",
            _RUN,
            "--resume",
        ),
    ] = False
    resume_from: Annotated[Path | None, Shown("Go on from this checkpoint.", _RUN)] = None
    log_every: Annotated[int, Shown("Steps between log lines.", _RUN)] = 10
    eval_every: Annotated[int, Shown("Steps between evaluations; 0: never.", _RUN)] = 100
    eval_rows: Annotated[int, Shown("Held-out rows to evaluate on.", _RUN)] = 64
    save_every: Annotated[int, Shown("Steps between checkpoints; 0: never.", _RUN)] = 200
    report_to: Annotated[
        str,
        Shown("Where to log besides the screen: tensorboard, wandb, ...; none: nowhere.", _RUN),
    ] = "tensorboard"
    progress: Annotated[bool, Shown("Show a progress bar, on a terminal.", _RUN)] = True
    #: Other fields of `transformers.TrainingArguments`, by their names; the shell takes each as an
    #: option. A string is read as the field's type.
    training_arguments: dict[str, Any] | None = None

    @property
    def peak_lr(self) -> float:
        """The learning rate, or the default that fits where the weights come from."""
        if self.lr is not None:
            return self.lr
        return NEW_WEIGHTS_LR if self.model is None else TRAINED_WEIGHTS_LR

    def check(self, given: Collection[str]) -> None:
        """See `RoutingOptions.check`."""
        super().check(given)
        counts = ("steps", "batch_size", "gradient_accumulation", "log_every", "eval_rows")
        sizes = ("max_tokens", "layers", "hidden_size", "intermediate_size", "heads", "kv_heads")
        self._at_least(dict.fromkeys(counts + sizes, 1) | {"seq_len": 2})
        self._at_least(dict.fromkeys(("eval_every", "save_every", "weight_decay"), 0))
        for name in ("lr", "aux_router_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{flag(name)} must be a positive number, got {value}")
        self._check_training_arguments(given)
        warmup, decay = self.warmup_share, self.decay_share
        if not (warmup >= 0 and decay >= 0 and warmup + decay <= 1):
            raise ValueError(
                "--warmup-share and --decay-share must be at least 0 and at most 1 together, got "
                f"{warmup} and {decay}"
            )
        if self.schedule == "cosine":
            refuse(given, ["decay_share"], "--schedule cosine decays from the warm-up to the end")
        if self.model is not None:
            if self.config is not None:
                raise ValueError("--model and --config both say what to train; give one of them")
            refuse(given, [*_SIZES, *_ROUTING], f"--model {self.model} has its own")
        if self.config is not None:
            refuse(given, _SIZES, f"--config {self.config} has its own")
        source = "--tokenizer" if self.tokenizer else "--model" if self.model else None
        if source is not None:
            refuse(given, ["vocab_size"], f"{source} brings a tokenizer that has its own")

    def _check_training_arguments(self, given: Collection[str]) -> None:
        own = {field.name for field in fields(self)}
        for name in self.training_arguments or {}:
            ours = OURS.get(name, name)
            if ours in own:
                raise ValueError(f"TrainingArguments' {name} is the option {ours} of a run")
            if name not in argument_names():
                raise ValueError(f"TrainingArguments has no {name!r}{nearest(name, own)}")
            if reason := WITHOUT_EFFECT.get(name):
                raise ValueError(f"{flag(name)} would be ignored: {reason}; leave it out")
            replaced = {"lr_scheduler_type": ["schedule", "decay_share"]}
            replaced["warmup_steps"] = ["warmup_share"]
            refuse(given, replaced.get(name, []), f"{flag(name)} says it")


_SHARINGS = ("middle_cycle", "cycle", "middle_sequence", "sequence")
_SIZES = ("layers", "hidden_size", "intermediate_size", "heads", "kv_heads")
_ROUTING = tuple(field.name for field in fields(RoutingOptions))


def flag(name: str) -> str:
    """The option of a field, as it is typed: `seq_len` is `--seq-len`."""
    return "--" + name.replace("_", "-")


def given_options(options: RunOptions) -> set[str]:
    """Names of the options that differ from their default: of a Python caller's, those he chose."""
    return {f.name for f in fields(options) if getattr(options, f.name) != f.default}


def refuse(given: Collection[str], names: Collection[str], reason: str) -> None:
    """Refuses options that would be ignored.

    Raises:
        ValueError: one of the names was given; names all that were.
    """
    ignored = [flag(name) for name in names if name in given]
    if ignored:
        raise ValueError(f"{', '.join(ignored)} would be ignored: {reason}; leave it out")


def refuse_routing(given: Collection[str], source: Path) -> None:
    """Refuses routing options beside a MoR configuration."""
    refuse(given, _ROUTING, f"{source} is a MoR configuration and says how to route")


def check_recursions(num_recursions: int, sharing: str, layers: int) -> None:
    """Checks that the recursions divide the shared layers, and says which would.

    Raises:
        ValueError: they do not.
    """
    ends = 2 if sharing.startswith("middle") else 0
    shared = layers - ends
    if num_recursions < 1 or sharing not in _SHARINGS:
        return  # which MoRConfig refuses
    if shared >= num_recursions and shared % num_recursions == 0:
        return
    fitting = [str(n) for n in range(1, shared + 1) if shared % n == 0]
    below = shared // num_recursions * num_recursions + ends
    depths = [str(n) for n in (below, below + num_recursions) if n >= num_recursions + ends]
    ways = [f"--num-recursions {_either(fitting)}"] if fitting else []
    ways.append(f"--layers {_either(depths)}")
    raise ValueError(
        f"--num-recursions: {num_recursions} recursions must divide the {max(0, shared)} layers "
        f"that {sharing} shares of {layers}; use {', or '.join(ways)}"
    )


def _either(values: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(values[:-1]), values[-1]]))


def in_words_of_the_shell(message: str) -> str:
    """A sentence of MoRConfig or from_dense about an option, as `mor train` calls the option."""
    message = message.removeprefix("from_dense: ")
    match = re.match(r"MoRConfig\.(?:router_(?=gating:))?(\w+):", message)
    if match and match[1] in _ROUTING:
        return flag(match[1]) + message[match.end() - 1 :]
    return message


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
