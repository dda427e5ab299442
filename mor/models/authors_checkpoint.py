"""Checkpoints of the authors' code as models of this package.

Their directories hold a Llama configuration of the unrolled depth, the options of the run as YAML,
and a state dict with every copy of a shared layer, or with one where duplicates were removed.
"""

import functools
import json
import logging
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mor.models.authors_options import mor_options, read_options
from mor.models.configuration_mor import MoRConfig
from mor.models.modeling_mor import MoRForCausalLM

__all__ = ["load_authors_checkpoint"]

logger = logging.getLogger(__name__)

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_NAMES_SHOWN = 16


def load_authors_checkpoint(
    path: str | Path,
    config: str | Path | None = None,
    *,
    eval_routing: str = "threshold",
    dtype: torch.dtype | None = None,
) -> MoRForCausalLM | LlamaForCausalLM:
    """Loads a checkpoint that the authors' code saved.

    Every tensor of it is used, or is a copy of one that is, or is named in the log with the reason
    why it is not needed. Warm-ups are not continued: their counters are not in such checkpoints.

    Args:
        path: directory with config.json and the weights, pytorch_model.bin or model.safetensors,
            whole or in parts with an index.
        config: YAML file with the options of the run; default the one in the directory.
        eval_routing: expert-choice in evaluation: "threshold" is causal; "topk" is what the
            authors' evaluation did, and looks at later tokens.
        dtype: of the weights; default the checkpoint's.

    Returns:
        The model in evaluation mode: a plain Llama if it was trained without recursion.

    Raises:
        ValueError: options or weights that are missing, unknown, of another shape, or differ
            between the copies of a shared layer; the message names them.

    Reference: MoR paper, section 3 (the published models).
    """
    folder = Path(path)
    if eval_routing not in ("threshold", "topk"):
        raise ValueError(f"eval_routing: expected threshold or topk, got {eval_routing!r}")
    if not folder.is_dir():
        raise ValueError(f"load_authors_checkpoint: expected a directory, got {folder}")
    options = read_options(folder, config)
    ours = mor_options(options)
    base = _base_config(folder, options)
    # The authors' recursive models without a router say they tie their heads, and do not.
    recursive = (options.get("recursive") or {}).get("enable") is True
    if recursive and (ours is None or ours["router"] is None):
        base.tie_word_embeddings = False
    model_config: Any = base
    model_class: type[PreTrainedModel] = LlamaForCausalLM
    if ours is not None:
        model_config = MoRConfig(base_config=base, eval_routing=eval_routing, **ours)
        model_class = MoRForCausalLM
    with torch.device("meta"):
        wanted = model_class(model_config).state_dict()
    # Neither is in a checkpoint: the counter of warm-ups, and a head that is the embedding.
    counter = wanted.pop("model.recursion.warmup_step", None)
    if base.tie_word_embeddings:
        wanted.pop(_HEAD)
    found = _assign(
        wanted, _source_names(model_config), _read_weights(folder), folder, model_config
    )
    if counter is not None:
        found["model.recursion.warmup_step"] = torch.zeros((), dtype=torch.int64)
    model: Any = model_class.from_pretrained(
        None, config=model_config, state_dict=found, dtype=dtype or _widest_dtype(found)
    )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _widest_dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype that holds every weight; routing's own tensors have theirs."""
    dtypes = {t.dtype for name, t in state.items() if not name.startswith("model.recursion.")}
    return functools.reduce(torch.promote_types, dtypes)


def _base_config(folder: Path, options: Mapping[str, Any]) -> LlamaConfig:
    """The Llama configuration; its depth is the unrolled one."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"load_authors_checkpoint: no config.json in {folder}")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"load_authors_checkpoint: {path} is not JSON: {error}") from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != "llama":
        raise ValueError(
            f"load_authors_checkpoint: {path}: expected model_type 'llama', got {kind!r}"
        )
    for name, value in (options.get("model_config") or {}).items():
        # The depth is rounded to what the recursions divide before it is saved.
        if name in values and name != "num_hidden_layers" and values[name] != value:
            raise ValueError(
                f"load_authors_checkpoint: model_config.{name} of the options is {value!r}, but "
                f"{path} has {values[name]!r}: they are not of the same run"
            )
    for name in ("architectures", "kv_sharing"):  # of their classes
        values.pop(name, None)
    try:
        config: LlamaConfig = LlamaConfig.from_dict(values)
    except StrictDataclassError as error:
        raise ValueError(f"load_authors_checkpoint: {path}: {error}") from error
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """The state dict, from one file or from the parts an index names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return _read_file(folder / name)
        index = folder / f"{name}.index.json"
        if not index.is_file():
            continue
        try:
            parts = json.loads(index.read_text())["weight_map"]
            files = sorted(set(parts.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"load_authors_checkpoint: {index} has no weight_map of files: {error}"
            ) from error
        if missing := [file for file in files if not (folder / file).is_file()]:
            raise ValueError(
                f"load_authors_checkpoint: {folder} lacks {_few(missing)}, which {index.name} names"
            )
        tensors: dict[str, Tensor] = {}
        for file in files:
            tensors |= _read_file(folder / file)
        if lost := [key for key in parts if key not in tensors]:
            raise ValueError(
                f"load_authors_checkpoint: {_few(lost)} of {index.name} are in none of its files"
            )
        return tensors
    raise ValueError(
        f"load_authors_checkpoint: no weights in {folder}: expected model.safetensors or "
        "pytorch_model.bin, or parts of one with an index (.index.json)"
    )


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"load_authors_checkpoint: cannot read {path}: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"load_authors_checkpoint: {path}: expected a state dict of tensors")
    return state


def _source_names(config: MoRConfig | LlamaConfig) -> Callable[[str], list[str]]:
    """Maps one of our names to those of the authors; a shared layer stands at every depth."""
    if not isinstance(config, MoRConfig):
        return lambda name: [name, _HEAD] if _is_tied(name, config) else [name]
    schedule = config.schedule
    first, block, shared = schedule.num_ends, schedule.block_depth, schedule.shared_depths
    wrappers = {"expert": config.num_recursions, "token": 1}.get(config.router or "", len(shared))

    def layer(at: int) -> str:
        """The authors' module at an unrolled depth."""
        if at >= shared.stop:
            return f"model.layers.{first + wrappers}"
        if config.router is None or at < first:
            return f"model.layers.{at}"
        r, j = divmod(at - first, block)
        if config.router == "expert":
            return f"model.layers.{first + r}.block.{j}"
        return f"model.layers.{first}.block_list.{r}.{j}"

    def names(name: str) -> list[str]:
        parts = name.split(".")
        if parts[1] == "layers":
            rest = ".".join(parts[3:])
            return [f"{layer(at)}.{rest}" for at in schedule.depths_of(int(parts[2]))]
        if name == "model.recursion.bias":
            return [f"model.layers.{first}.router_bias"]
        if parts[1] == "recursion":
            # routers.R.layers.I.weight, aux_routers.R.layers.I.weight or router.layers.I.weight
            wrapper = first + (int(parts[3]) if config.router == "expert" else 0)
            kind = "mlp_router" if parts[2] == "aux_routers" else "mor_router"
            at = f".{2 * int(parts[-2])}" if config.router_type == "mlp" else ""
            return [f"model.layers.{wrapper}.{kind}.router{at}.weight"]
        return [name, _HEAD] if _is_tied(name, config) else [name]

    return names


def _is_tied(name: str, config: Any) -> bool:
    return name == _EMBEDDING and bool(config.tie_word_embeddings)


def _assign(
    wanted: Mapping[str, Tensor],
    names: Callable[[str], list[str]],
    tensors: dict[str, Tensor],
    folder: Path,
    config: Any,
) -> dict[str, Tensor]:
    """A tensor of the file for each of ours; empties `tensors` to spare memory."""
    found: dict[str, Tensor] = {}
    missing, wrong, apart = [], [], []
    for ours, like in wanted.items():
        sources = names(ours)
        there = [name for name in sources if name in tensors]
        # With duplicates removed one copy is left, whichever; some without the others is damage.
        if len(there) != 1:
            missing += [name for name in sources if name not in tensors]
        for name in there:
            tensor = tensors[name]
            if tensor.shape != like.shape or not tensor.is_floating_point():
                got = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
                wrong.append(f"{name} ({got}, expected {list(like.shape)})")
            elif name != there[0] and not torch.equal(tensor, tensors[there[0]]):
                apart.append(name)
        if there:
            found[ours] = tensors[there[0]].clone()  # not a view of a file
        for name in there:
            del tensors[name]
    ignored = {name: reason for name in tensors if (reason := _not_needed(name, config))}
    unexpected = [name for name in tensors if name not in ignored]
    problems = [("missing", missing), ("unexpected", unexpected), ("of another shape", wrong)]
    if told := [f"{problem} {_few(listed)}" for problem, listed in problems if listed]:
        raise ValueError(
            f"load_authors_checkpoint: the weights in {folder} do not fit its config.json and "
            f"options: {'; '.join(told)}"
        )
    if _HEAD in apart:
        raise ValueError(
            f"load_authors_checkpoint: {_HEAD} differs from {_EMBEDDING} in {folder}, though "
            "config.json and the options say they are one: for a head of its own set "
            "tie_word_embeddings to false in config.json"
        )
    if apart:
        raise ValueError(
            f"load_authors_checkpoint: {_few(apart)} in {folder} differ from their copies in other "
            "recursions, which no shared layer can hold: the checkpoint was trained before the "
            "authors fixed their weight tying (only their code runs it), or the options are of "
            "another run"
        )
    for name, reason in ignored.items():
        logger.warning("load_authors_checkpoint: %s is not used: %s", name, reason)
    return found


def _not_needed(name: str, config: Any) -> str | None:
    """Why a tensor of the file is not part of the model."""
    if name.endswith("rotary_emb.inv_freq"):
        return "rotary frequencies are computed from config.json"
    if getattr(config, "router_type", None) == "random" and ".mlp_router." in name:
        return "with random routing the auxiliary router was not trained"
    return None


def _few(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
