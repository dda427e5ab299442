"""Find the checkpoint to resume a run from: the newest one that is complete.

The Trainer writes a checkpoint file by file, so a process killed meanwhile leaves a folder that
looks like a checkpoint and is none. It deletes older checkpoints only afterwards, so a complete one
is always there.
"""

import json
import logging
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import Trainer, TrainerState

__all__ = ["check_same_model", "checkpoint_to_resume", "find_problem", "load_finished"]

_logger = logging.getLogger(__name__)


def checkpoint_to_resume(output_dir: str | Path, model: nn.Module | None = None) -> Path | None:
    """Finds the newest complete checkpoint of a run; warns about each newer one that is not.

    Args:
        output_dir: the run's folder.
        model: the model to be resumed; the checkpoint must hold the same parameters.

    Returns:
        The folder `checkpoint-STEP`, or None if there is no complete one.

    Raises:
        ValueError: the newest complete checkpoint belongs to another model.
    """
    steps = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            steps[int(match[1])] = path
    for _, path in sorted(steps.items(), reverse=True):
        problem = find_problem(path)
        if problem is None:
            if model is not None:
                check_same_model(path, model)
            return path
        _logger.warning("skipping %s: %s", path, problem)
    return None


def find_problem(checkpoint: str | Path) -> str | None:
    """Says what is wrong with a checkpoint folder, or returns None for a complete one.

    Every file needed for an exact resume must be there and whole: the Trainer's state, the weights
    (safetensors header and length), optimizer, schedule and random state (checksums).
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return "no such folder"
    path = folder / "trainer_state.json"
    try:
        if not isinstance(json.loads(path.read_text(encoding="utf-8"))["global_step"], int):
            return f"{path.name} has no global_step"
        for path in _weight_files(folder):
            path.stat()  # a missing file, which safe_open would not name
            with safe_open(path, framework="pt"):  # checks the header against the file's length
                pass
        random_states = sorted(folder.glob("rng_state*.pth")) or [folder / "rng_state.pth"]
        for path in (folder / "optimizer.pt", folder / "scheduler.pt", *random_states):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    return f"{path.name} is damaged"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except (zipfile.BadZipFile, SafetensorError, ValueError, KeyError, TypeError):
        return f"{path.name} is damaged"
    except OSError as error:
        return f"{path.name} is unreadable ({error.strerror})"
    return None


def check_same_model(checkpoint: Path, model: nn.Module) -> None:
    """Compares the names and shapes of a checkpoint's weights with a model's.

    Raises:
        ValueError: they differ; names the first difference.
    """
    expected = {name: list(value.shape) for name, value in model.state_dict().items()}
    missing = set(expected) - set(getattr(model, "all_tied_weights_keys", None) or ())
    for path in _weight_files(checkpoint):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                missing.discard(name)
                shape = list(file.get_slice(name).get_shape())
                if expected.get(name) != shape:
                    wanted = expected.get(name, "no such parameter")
                    raise ValueError(
                        f"{checkpoint} holds another model: {name} is {shape} there, "
                        f"expected {wanted}"
                    )
    if missing:
        raise ValueError(f"{checkpoint} holds another model: it has no {min(missing)}")


def load_finished(trainer: Trainer, checkpoint: Path) -> None:
    """Loads the weights and the state of a checkpoint after which there is nothing left to train.

    The Trainer, told to resume from it, would take one more step.
    """
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [folder / name for name in sorted(names)]
