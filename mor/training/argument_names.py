"""Names of the fields of `transformers.TrainingArguments`, and a run's own words for some."""

import ast
import difflib
from collections.abc import Collection
from functools import cache
from importlib.util import find_spec
from pathlib import Path

__all__ = ["OURS", "WITHOUT_EFFECT", "argument_names", "nearest"]

#: Fields that an option of `RunOptions` sets, with the option's name.
OURS = {
    "eval_steps": "eval_every",
    "gradient_accumulation_steps": "gradient_accumulation",
    "learning_rate": "lr",
    "logging_steps": "log_every",
    "max_steps": "steps",
    "per_device_train_batch_size": "batch_size",
    "resume_from_checkpoint": "resume_from",
    "save_steps": "save_every",
}

#: Fields that would be ignored in a run, with the reason.
WITHOUT_EFFECT = {
    "num_train_epochs": "--steps says how long a run is",
    "do_train": "a run always trains",
    "do_eval": "--eval-every says when a run evaluates",
    "do_predict": "a run predicts nothing",
}


@cache
def argument_names() -> frozenset[str]:
    """Names of the fields, read from the source: importing it would load PyTorch, for seconds."""
    spec = find_spec("transformers")
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).with_name("training_args.py").read_text(encoding="utf-8")
    (body,) = (
        node.body
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"
    )
    names = (
        node.target.id
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    )
    return frozenset(name for name in names if not name.startswith("_"))


def nearest(name: str, own: Collection[str]) -> str:
    """The end of an error about an unknown name: what may have been meant, or nothing."""
    close = difflib.get_close_matches(name, {*own, *argument_names()}, n=1)
    return f"; did you mean {close[0]}?" if close else ""
