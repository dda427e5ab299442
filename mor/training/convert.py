"""Convert a dense checkpoint on disk to a MoR one: the work of `mor convert`."""

import logging
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from mor.data.tokens import has_tokenizer
from mor.models import MoRForCausalLM, load_authors_checkpoint
from mor.models.authors_options import is_authors_checkpoint
from mor.models.configuration_mor import ARCHITECTURES
from mor.training.options import check_recursions, in_words_of_the_shell

__all__ = ["convert_checkpoint"]

logger = logging.getLogger(__name__)


def convert_checkpoint(
    source: str | Path,
    output_dir: str | Path,
    *,
    init: str = "stepwise",
    seed: int = 0,
    dtype: str = "auto",
    authors_config: str | Path | None = None,
    router_gating: str = "residual",
    **options: Any,
) -> MoRForCausalLM | LlamaForCausalLM:
    """Converts a dense checkpoint to a MoR one with its tokenizer.

    A checkpoint of the authors becomes one of this package: see `load_authors_checkpoint`.

    Args:
        source: a directory in Transformers' format, a GGUF file, or a name on the Hugging Face hub.
        output_dir: an empty directory; made if it is not there.
        init: see `MoRForCausalLM.from_dense`.
        seed: of the routers, and of init "random".
        dtype: "auto" (the checkpoint's), "float32", "bfloat16", "float16" or "float64".
        authors_config: YAML file of a checkpoint of the authors; default the one beside it, by
            which it is recognised. `init`, `seed` and the options are not used.
        router_gating: as in `MoRConfig`, with the default that starts nearest to the dense model:
            the paper's gate, "weighted", multiplies what pretrained layers give each other.
        **options: of `MoRForCausalLM.from_dense` and `MoRConfig`.

    Returns:
        The model.

    Raises:
        ValueError: no model at source, one that cannot be read or made recursive with these
            options, an output directory with something in it.
    """
    folder = Path(output_dir)
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} already holds a model: choose another directory")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose a new directory")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose a new directory")
    dtypes = {"auto": None} | {
        name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")
    }
    if dtype not in dtypes:
        raise ValueError(f"expected dtype to be one of {list(dtypes)}, got {dtype!r}")
    path, gguf_file = _find(str(source))
    from_authors = authors_config is not None or is_authors_checkpoint(Path(path))
    options = {**options, "router_gating": router_gating}
    if not from_authors:
        _check_depth(path, gguf_file, options)
    try:
        model: MoRForCausalLM | LlamaForCausalLM
        if from_authors:
            model = load_authors_checkpoint(path, authors_config, dtype=dtypes[dtype])
        else:
            model = MoRForCausalLM.from_dense(
                path, init=init, seed=seed, gguf_file=gguf_file, dtype=dtypes[dtype], **options
            )
    except (SafetensorError, KeyError, IndexError, RuntimeError) as error:  # of damaged files
        raise ValueError(f"cannot read the model in {source}: {error}") from error
    except OSError as error:
        raise ValueError(_unreadable(str(source), error)) from error
    except ValueError as error:
        raise ValueError(in_words_of_the_shell(str(error))) from error
    tokenizer = _tokenizer(path, gguf_file)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    else:
        logger.warning("there is no tokenizer in %s, so there is none in %s", path, folder)
    return model


def _check_depth(path: str, gguf_file: str | None, options: dict[str, Any]) -> None:
    """Refuses recursions that do not divide the dense model's layers, before anything is loaded."""
    try:
        config = AutoConfig.from_pretrained(path, gguf_file=gguf_file)
    except Exception as error:  # of the hub as many types as there are ways to be wrong
        raise ValueError(_unreadable(path, error)) from error
    if config.model_type in ARCHITECTURES:
        check_recursions(
            options.get("num_recursions", 3),
            options.get("sharing", "middle_cycle"),
            options.get("num_hidden_layers", config.num_hidden_layers),
        )


def _find(source: str) -> tuple[str, str | None]:
    """The model as Transformers names it: a folder or a name on the hub, and a GGUF file in it."""
    path = Path(source)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"expected a directory or a .gguf file, got the file {path}")
        return str(path.parent), path.name
    if path.exists():
        if not (path / "config.json").exists():
            raise ValueError(f"no model in {path}: config.json is missing")
        return str(path), None
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source) or path.suffix == ".gguf":
        raise ValueError(
            f"no model in {path}: config.json is missing, as there is no such folder, and a name "
            "on the Hugging Face hub is OWNER/NAME"
        )
    return source, None


def _unreadable(path: str, error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if Path(path).exists():
        return f"cannot read the model in {path}: {lines[0]}"
    return f"{path} is no local folder, and getting it from the Hugging Face hub failed: {lines[0]}"


def _tokenizer(path: str, gguf_file: str | None) -> Any:
    """The dense model's tokenizer, or None where a folder has none."""
    folder = Path(path)
    if folder.exists() and not gguf_file and not has_tokenizer(folder):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, gguf_file=gguf_file)
    except Exception as error:  # as many types as there are kinds of tokenizers
        if folder.exists():
            raise ValueError(f"cannot read the tokenizer in {path}: {error}") from error
        return None
