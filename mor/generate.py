"""Load a saved model and continue a text: what `mor generate` does."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, set_seed

import mor.models  # noqa: F401  (registers the model type)
from mor.data import load_tokenizer

__all__ = ["continue_text", "load_model"]


def load_model(folder: str | Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """Loads a model and its tokenizer, for evaluation, on the GPU if there is one.

    Args:
        folder: where `save_pretrained` put them, or the folder of a run of `mor train`.

    Raises:
        ValueError: no model there, or one that cannot be loaded.
    """
    path = Path(folder)
    if not (path / "config.json").exists() and (path / "model" / "config.json").exists():
        path = path / "model"
    if not (path / "config.json").exists():
        raise ValueError(f"no model in {folder}: config.json is missing")
    tokenizer = load_tokenizer(path)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path)
    except Exception as error:  # safetensors, JSON, configuration: whatever the damage raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"cannot load the model in {path}: {reason}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def continue_text(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> str:
    """Returns the prompt with the model's continuation.

    Temperature 0 takes the likeliest token each time; an empty prompt starts a new document.
    """
    set_seed(seed)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    sampling = {"temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    input_ids = torch.tensor([ids], device=model.device)
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        pad_token_id=tokenizer.pad_token_id
        if tokenizer.pad_token_id is not None
        else tokenizer.eos_token_id,
        **sampling,
    )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
