"""A race: models that train in turns, so that a busy machine slows all of them alike.

Every turn goes on from the checkpoint of the one before, exactly as a killed run is resumed. So a
race that was killed and started again ends with the weights and losses of one that was not.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mor.training.checkpoints import checkpoint_to_resume, load_finished
from mor.training.run_record import read_json
from mor.training.trainer import MoRTrainer

__all__ = ["Entrant", "check_same_race", "finished", "race"]


@dataclass(frozen=True)
class Entrant:
    """One model of a race.

    Attributes:
        name: for messages, tables and figures.
        folder: for the checkpoints of this model alone.
        steps: optimiser steps of its whole training.
        build: makes the trainer of that many steps with `folder` as its output; called once a turn.
    """

    name: str
    folder: Path
    steps: int
    build: Callable[[], MoRTrainer]


def race(
    entrants: Sequence[Entrant],
    turns: int,
    *,
    after_turn: Callable[[Entrant, TrainerState], object] = lambda entrant, state: None,
) -> None:
    """Trains every entrant to its last step, in turns of equal shares of its steps.

    A turn ends with a log line, an evaluation (where the trainer has evaluations) and a checkpoint.
    The entrant that has had the fewest turns is next; the order of the list decides between equals.

    Args:
        entrants: the models.
        turns: of each entrant, at least 1; an entrant of fewer steps has a turn for each step.
        after_turn: called with the entrant and its trainer's state.

    Raises:
        ValueError: no turn, or two entrants with one folder.
        Diverged: a loss was not finite.
    """
    if turns < 1:
        raise ValueError(f"race: expected at least 1 turn, got {turns}")
    if len({entrant.folder for entrant in entrants}) < len(entrants):
        raise ValueError("race: expected a folder for each entrant, got one twice")
    done = [_steps_done(entrant) for entrant in entrants]
    while waiting := [i for i, entrant in enumerate(entrants) if done[i] < entrant.steps]:
        chosen = min(waiting, key=lambda i: done[i] * turns // entrants[i].steps)
        entrant = entrants[chosen]
        turn = done[chosen] * turns // entrant.steps + 1
        end = -(-entrant.steps * turn // turns)
        state = _take_turn(entrant, end)
        done[chosen] = state.global_step
        after_turn(entrant, state)


def finished(entrant: Entrant) -> MoRTrainer:
    """A trainer that holds the model after its last step, and the whole log history.

    Raises:
        ValueError: the entrant has not been trained to its last step.
    """
    checkpoint = checkpoint_to_resume(entrant.folder)
    if checkpoint is None or _steps_done(entrant) < entrant.steps:
        raise ValueError(
            f"finished: expected a trained {entrant.name}, got none in {entrant.folder}"
        )
    trainer = entrant.build()
    load_finished(trainer, checkpoint)
    return trainer


def check_same_race(folder: Path, settings: Mapping[str, Any]) -> None:
    """Records the settings of a race in its folder, or compares them with those recorded.

    Args:
        folder: an existing folder.
        settings: what JSON can hold; with the same values the race would go the same way.

    Raises:
        ValueError: the folder holds a race of other settings; names the first that differs.
    """
    path = folder / "race.json"
    given = json.loads(json.dumps(settings))
    if path.exists():
        recorded = read_json(path)
        for name in sorted({*given, *recorded}):
            if recorded.get(name) != given.get(name):
                raise ValueError(
                    f"{folder} holds an unfinished race with {name} {recorded.get(name)}, not "
                    f"{given.get(name)}: go on with that, choose another folder, or delete {folder}"
                )
        return
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(given, indent=2) + "\n")
    partial.replace(path)


def _steps_done(entrant: Entrant) -> int:
    checkpoint = checkpoint_to_resume(entrant.folder)
    if checkpoint is None:
        return 0
    return int(read_json(checkpoint / "trainer_state.json")["global_step"])


def _take_turn(entrant: Entrant, end: int) -> TrainerState:
    trainer = entrant.build()
    trainer.add_callback(_EndOfTurn(end))
    checkpoint = checkpoint_to_resume(entrant.folder)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.refuse_nan()
    trainer.accelerator.wait_for_everyone()  # all processes look for the checkpoint next
    return trainer.state


class _EndOfTurn(TrainerCallback):
    """Stops the Trainer after a step, with a log line, an evaluation and a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step >= self.step:
            control.should_log = control.should_save = control.should_training_stop = True
            control.should_evaluate = args.eval_strategy != "no"
        return control
