"""The options of a training run, written once for Python (`RunOptions`) and the shell."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Option

__all__ = ["RunOptions"]

_DATA, _MODEL, _TRAINING, _RUN = "Data", "Model", "Training", "Run"


def _option(help: str, panel: str, name: str | None = None) -> Any:
    names = [name] if name else []
    return Option(*names, help=help, rich_help_panel=panel)


@dataclass
class RunOptions:
    """Options of a training run; each is an option of `mor train` with the same name."""

    output_dir: Annotated[Path, _option("Folder for everything the run writes.", _RUN)] = Path(
        "runs/train"
    )

    data: Annotated[
        str | None,
        _option(
            "A .txt, .md, .rst, .py, .jsonl, .json or .parquet file, a directory of them, or the "
            "name of a Hugging Face dataset. Default: the Python standard library's own sources.",
            _DATA,
        ),
    ] = None
    data_config: Annotated[
        str | None, _option("Configuration of the Hugging Face dataset.", _DATA)
    ] = None
    data_split: Annotated[str, _option("Split of the Hugging Face dataset.", _DATA)] = "train"
    text_field: Annotated[
        str, _option("Field of the text in JSON, parquet and dataset records.", _DATA)
    ] = "text"
    max_tokens: Annotated[
        int | None,
        _option(
            "Tokens to make at most. Default: all; of a Hugging Face dataset what the run needs.",
            _DATA,
        ),
    ] = None
    tokenizer: Annotated[
        str | None,
        _option(
            "Folder or Hugging Face name of a tokenizer. Default: one is trained on the data.",
            _DATA,
        ),
    ] = None
    vocab_size: Annotated[int, _option("Size of the tokenizer that is trained.", _DATA)] = 4096
    seq_len: Annotated[int, _option("Tokens in a training row.", _DATA)] = 256
    separate_documents: Annotated[
        bool, _option("Keep attention inside each document of a row.", _DATA)
    ] = False

    model: Annotated[
        Path | None,
        _option(
            "Folder of a MoR model to go on from (of mor convert, say), with its tokenizer; "
            "replaces all that follows here.",
            _MODEL,
        ),
    ] = None
    config: Annotated[
        Path | None,
        _option(
            "JSON file with a MoR configuration, or with that of a dense model to make recursive; "
            "replaces the sizes below.",
            _MODEL,
        ),
    ] = None
    layers: Annotated[int, _option("Layers a token passes at full depth (unrolled).", _MODEL)] = 8
    hidden_size: Annotated[int, _option("Width of the model.", _MODEL)] = 256
    intermediate_size: Annotated[
        int | None,
        _option("Width of the MLP. Default: 8/3 of the hidden size, in steps of 64.", _MODEL),
    ] = None
    heads: Annotated[int, _option("Attention heads.", _MODEL)] = 4
    kv_heads: Annotated[
        int | None, _option("Key and value heads. Default: as many as heads.", _MODEL)
    ] = None
    num_recursions: Annotated[int, _option("Times the shared block is applied.", _MODEL)] = 3
    sharing: Annotated[str, _option("Which layers are shared.", _MODEL)] = "middle_cycle"
    router: Annotated[
        Literal["expert", "token", "none"],
        _option("Who chooses: experts choose tokens or tokens their depth.", _MODEL),
    ] = "expert"
    kv_strategy: Annotated[str, _option("Which keys and values a recursion sees.", _MODEL)] = (
        "recursion"
    )
    capacities: Annotated[
        str | None,
        _option(
            "Share of the tokens in each recursion, e.g. 1,2/3,1/3 (expert routing's default).",
            _MODEL,
        ),
    ] = None

    steps: Annotated[int, _option("Optimiser steps.", _TRAINING)] = 1000
    batch_size: Annotated[int, _option("Rows in a forward pass.", _TRAINING)] = 8
    gradient_accumulation: Annotated[
        int, _option("Forward passes in an optimiser step.", _TRAINING)
    ] = 1
    lr: Annotated[float, _option("Peak learning rate.", _TRAINING, "--lr")] = 3e-3
    aux_router_lr: Annotated[
        float | None,
        _option("Peak learning rate of auxiliary routers. Default: --lr.", _TRAINING),
    ] = None
    schedule: Annotated[
        Literal["wsd", "cosine"], _option("Warmup-stable-decay or cosine.", _TRAINING)
    ] = "wsd"
    warmup_share: Annotated[float, _option("Share of the steps that warm up.", _TRAINING)] = 0.05
    decay_share: Annotated[float, _option("Share of the steps in which wsd decays.", _TRAINING)] = (
        0.2
    )
    weight_decay: Annotated[float, _option("AdamW's weight decay.", _TRAINING)] = 0.1
    bf16: Annotated[
        bool, _option("Compute in bfloat16 (weights stay float32).", _TRAINING, "--bf16/--float32")
    ] = False
    gradient_checkpointing: Annotated[
        bool, _option("Recompute activations in the backward pass.", _TRAINING)
    ] = False
    seed: Annotated[int, _option("Seed of the weights and the order of the data.", _TRAINING)] = 0

    resume: Annotated[
        bool,
        _option(
            "Go on from the newest complete checkpoint in the output folder; options not given are "
            "those of the run.",
            _RUN,
            "--resume",
        ),
    ] = False
    resume_from: Annotated[Path | None, _option("Go on from this checkpoint.", _RUN)] = None
    log_every: Annotated[int, _option("Steps between log lines.", _RUN)] = 10
    eval_every: Annotated[int, _option("Steps between evaluations; 0: never.", _RUN)] = 100
    eval_rows: Annotated[int, _option("Held-out rows to evaluate on.", _RUN)] = 64
    save_every: Annotated[int, _option("Steps between checkpoints; 0: never.", _RUN)] = 200
    report_to: Annotated[
        str,
        _option("Where to log besides the screen: tensorboard, wandb, ...; none: nowhere.", _RUN),
    ] = "tensorboard"
    progress: Annotated[bool, _option("Show a progress bar, on a terminal.", _RUN)] = True
