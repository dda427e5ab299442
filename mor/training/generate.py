"""Load a saved model and continue a text: the work of `mor generate`."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, TextStreamer, set_seed

from mor.data.corpus import clean_text
from mor.data.tokens import load_tokenizer
from mor.models import load_swapped
from mor.training.checkpoints import checkpoint_to_resume

__all__ = ["continue_text", "find_model", "load_model", "trained_length"]

logger = logging.getLogger(__name__)


def find_model(folder: str | Path) -> Path:
    """The folder that holds the model: this one, a run's `model`, or a run's newest checkpoint.

    A checkpoint is taken, with a warning, where a run has not written its model yet, or has gone on
    since.

    Raises:
        ValueError: no model there.
    """
    path = Path(folder)
    if path.is_file():
        raise ValueError(f"expected the folder of a model, got a file; try {path.parent}")
    if (path / "config.json").exists():
        return path
    finished = path / "model" / "config.json"
    newest = checkpoint_to_resume(path)
    if newest is not None and not (finished.exists() and _step(finished.parent) >= _step(newest)):
        logger.warning("the run in %s is not finished: this is %s", path, newest.name)
        return newest
    if not finished.exists():
        raise ValueError(f"no model in {folder}: config.json is missing")
    return finished.parent


def _step(folder: Path) -> int:
    """The step at which `mor train` saved a checkpoint or a model; of other models the last one."""
    state = folder / "trainer_state.json"
    if not state.exists():
        return sys.maxsize
    return int(json.loads(state.read_text(encoding="utf-8"))["global_step"])


def load_model(folder: str | Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """Loads a model and its tokenizer, for evaluation, on the GPU if there is one.

    Args:
        folder: where `save_pretrained` put them (a swapped model's too), or the folder of a run of
            `mor train`.

    Raises:
        ValueError: no model there, or one that cannot be loaded.
    """
    path = find_model(folder)
    tokenizer = load_tokenizer(path)
    try:
        swapped = "mor_swap" in json.loads((path / "config.json").read_text(encoding="utf-8"))
        load = load_swapped if swapped else AutoModelForCausalLM.from_pretrained
        model: Any = load(path)
    except Exception as error:  # safetensors, JSON, configuration: whatever the damage raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"cannot load the model in {path}: {reason}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def trained_length(folder: str | Path) -> int | None:
    """Tokens of the rows that a run of `mor train` trained on; None where no run is known."""
    path = Path(folder)
    for run in (path, path.parent):
        try:
            values = json.loads((run / "run.json").read_text(encoding="utf-8"))
            return int(values["options"]["seq_len"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def continue_text(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 0.95,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    trained_length: int | None = None,
    write: Callable[[str], object] | None = None,
) -> str:
    """Returns the prompt with the model's continuation.

    Args:
        model: for evaluation.
        tokenizer: the model's.
        prompt: an empty one starts a new document.
        max_new_tokens: how many to add at most.
        temperature: 0 takes the likeliest token each time.
        top_k: likeliest tokens kept; 0 keeps all.
        top_p: share of the probability kept.
        repetition_penalty: above 1 makes tokens that were there less likely.
        seed: of the sampling.
        trained_length: longest row the model saw; a longer text is warned about.
        write: gets prompt and continuation word by word, as they are made.
    """
    set_seed(seed)
    ids = tokenizer(clean_text(prompt), add_special_tokens=False, verbose=False)["input_ids"]
    ids = ids or [tokenizer.eos_token_id]
    longest = trained_length or getattr(model.config, "max_position_embeddings", None)
    if longest is not None and len(ids) + max_new_tokens > longest:
        logger.warning(
            "%d tokens of the prompt and %d new ones are more than the %d that the model was made "
            "for: expect worse text beyond",
            len(ids),
            max_new_tokens,
            longest,
        )
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    input_ids = torch.tensor([ids], device=model.device)
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        repetition_penalty=repetition_penalty,
        pad_token_id=tokenizer.pad_token_id
        if tokenizer.pad_token_id is not None
        else tokenizer.eos_token_id,
        streamer=None if write is None else _Words(tokenizer, write),
        **(sampling if temperature > 0 else {}),
    )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


class _Words(TextStreamer):
    """Hands over each word when it is complete."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by Transformers."""
        if text:
            self.write(text)
