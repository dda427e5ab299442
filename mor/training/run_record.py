"""Record of a run's options, with which it is resumed; imports no PyTorch."""

import json
import logging
from collections.abc import Collection
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from mor.training.options import RunOptions

__all__ = ["options_of_run", "read_json", "remember", "resumed_options"]

logger = logging.getLogger(__name__)


def options_of_run(output_dir: Path) -> dict[str, Any]:
    """Reads the options that a run was started with; empty if there is no run.

    Raises:
        ValueError: the run's record cannot be read.
    """
    path = output_dir / "run.json"
    if not path.exists():
        return {}
    values = read_json(path).get("options")
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no record of a run: expected a JSON object with options")
    return values


def resumed_options(options: RunOptions, given: Collection[str]) -> RunOptions:
    """The options of the run to be resumed, but for those that were given again.

    Raises:
        ValueError: the run's record cannot be read.
    """
    stored = options_of_run(options.output_dir)
    if not stored and options.resume_from is not None:
        stored = options_of_run(options.resume_from.parent)
    paths = ("output_dir", "model", "config", "resume_from")
    known = {field.name for field in fields(options)}
    kept: dict[str, Any] = {
        name: Path(value) if name in paths and value is not None else value
        for name, value in stored.items()
        if name in known and name not in given
    }
    if kept.get("training_arguments"):
        kept["training_arguments"] |= options.training_arguments or {}
    else:
        kept.pop("training_arguments", None)
    return replace(options, **kept)


def remember(options: RunOptions, tokens: str) -> None:
    """Writes the options of a run, and what identifies its tokens, into the run's folder."""
    path = options.output_dir / "run.json"
    if path.exists() and read_json(path).get("tokens") != tokens:
        logger.warning(
            "the text or the tokenizer is not what %s was started with: the run goes on with "
            "other data",
            options.output_dir,
        )
    values: dict[str, Any] = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in asdict(options).items()
    }
    values = {key: value for key, value in values.items() if key not in ("resume", "resume_from")}
    for name in ("data", "tokenizer", "model", "config"):  # --resume may be said elsewhere
        if values[name] and Path(values[name]).exists():
            values[name] = str(Path(values[name]).resolve())
    arguments = values["training_arguments"] or {}
    values["training_arguments"] = {k: v for k, v in arguments.items() if k != "hub_token"} or None
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"options": values, "tokens": tokens}, indent=2) + "\n")
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ValueError: there is none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"cannot read {path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"cannot read {path}: expected a JSON object")
    return values
