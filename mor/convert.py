"""Dense checkpoint to MoR checkpoint on disk: what `mor convert` does."""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, LlamaForCausalLM

from mor.models import MoRForCausalLM, load_authors_checkpoint
from mor.models.authors_options import is_authors_checkpoint

__all__ = ["convert_checkpoint"]

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def convert_checkpoint(
    source: str | Path,
    output_dir: str | Path,
    *,
    init: str = "stepwise",
    seed: int = 0,
    dtype: str = "auto",
    authors_config: str | Path | None = None,
    **options: Any,
) -> MoRForCausalLM | LlamaForCausalLM:
    """Converts a dense checkpoint to a MoR one with its tokenizer; nothing is downloaded.

    A checkpoint of the authors becomes one of this package: see `load_authors_checkpoint`.

    Args:
        source: a directory in Transformers' format, or a GGUF file.
        output_dir: a directory without a model; made if it is not there.
        init: see `MoRForCausalLM.from_dense`.
        seed: of the routers, and of init "random".
        dtype: "auto" (the checkpoint's), "float32", "bfloat16", "float16" or "float64".
        authors_config: YAML file of a checkpoint of the authors; default the one beside it, by
            which it is recognised. `init`, `seed` and the options are not used.
        **options: of `MoRForCausalLM.from_dense` and `MoRConfig`.

    Returns:
        The model.

    Raises:
        ValueError: no model at source, one that cannot be read or made recursive with these
            options, an output directory that holds a model.
    """
    path, folder = Path(source), Path(output_dir)
    gguf_file = None
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"expected a directory or a .gguf file, got the file {path}")
        path, gguf_file = path.parent, path.name
    elif not (path / "config.json").exists():
        raise ValueError(f"no model in {path}: config.json is missing")
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} already holds a model: choose another directory")
    dtypes = {"auto": None} | {
        name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")
    }
    if dtype not in dtypes:
        raise ValueError(f"expected dtype to be one of {list(dtypes)}, got {dtype!r}")
    try:
        model: MoRForCausalLM | LlamaForCausalLM
        if gguf_file is None and (authors_config is not None or is_authors_checkpoint(path)):
            model = load_authors_checkpoint(path, authors_config, dtype=dtypes[dtype])
        else:
            model = MoRForCausalLM.from_dense(
                path, init=init, seed=seed, gguf_file=gguf_file, dtype=dtypes[dtype], **options
            )
        tokenizer = None
        if gguf_file or any((path / name).exists() for name in _TOKENIZER_FILES):
            tokenizer = AutoTokenizer.from_pretrained(path, gguf_file=gguf_file)
    except (SafetensorError, KeyError, IndexError, RuntimeError) as error:  # of damaged files
        raise ValueError(f"cannot read the model in {source}: {error}") from error
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    else:
        logger.warning("there is no tokenizer in %s, so there is none in %s", path, folder)
    return model
