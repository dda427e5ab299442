"""torchrun tests/distributed/interrupted_run.py OPTIONS WHOLE KILLED KILL_STEP

Trains a whole run in the folder WHOLE, then the same in KILLED until, after KILL_STEP steps, the
second process is killed.
"""

import json
import os
import signal
import sys
from pathlib import Path

from mor.training.options import RunOptions
from mor.training.run import prepare_run, train


def main(options: dict, whole: Path, killed: Path, kill_step: int) -> None:
    trainer, checkpoint = prepare_run(RunOptions(output_dir=whole, **options))
    train(trainer, checkpoint)
    trainer, checkpoint = prepare_run(RunOptions(output_dir=killed, **options))
    step = trainer.training_step

    def last_step(*args, **kwargs):
        if trainer.state.global_step == kill_step and trainer.args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*args, **kwargs)

    trainer.training_step = last_step
    train(trainer, checkpoint)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
