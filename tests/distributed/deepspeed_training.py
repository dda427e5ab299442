"""Trains tiny models by transformers.Trainer under DeepSpeed ZeRO-2, or alone without it.

torchrun --nproc-per-node 2 tests/distributed/deepspeed_training.py FOLDER runs CASES and leaves the
losses in FOLDER; the test runs the same cases in one process and compares.
"""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from mor.training.callbacks import UpdateRouterBias
from tests.distributed.training import batch_of, model_of

STEPS, SAVED_AFTER = 4, 2

#: Options of the model.
CASES = {
    "expert": {"router": "expert", "router_aux_coef": 0.1},
    "token": {"router": "token", "router_balancing": "loss_free", "router_z_coef": 0.01},
    "shared": {"router": "expert", "kv_strategy": "shared"},
}

#: ZeRO-2 for torch's own optimiser: DeepSpeed's has to be compiled.
ZERO_2 = {
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


def run(
    name: str, folder: Path, deepspeed: dict | None, batch_size: int, resume: bool = False
) -> list[float]:
    """The losses of a run's steps; it writes a checkpoint in the middle, or goes on from there."""
    arguments = TrainingArguments(
        str(folder / name),
        max_steps=STEPS,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        logging_steps=1,
        save_steps=SAVED_AFTER,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        deepspeed=deepspeed,
    )
    batches = [batch_of({}, step) for step in range(2 * STEPS)]
    rows = [{k: v[i] for k, v in batch.items()} for batch in batches for i in range(4)]
    trainer = Trainer(
        model_of(CASES[name]).float(),
        arguments,
        train_dataset=rows,
        callbacks=[UpdateRouterBias()],
    )
    checkpoint = folder / name / f"checkpoint-{SAVED_AFTER}"
    trainer.train(resume_from_checkpoint=str(checkpoint) if resume else None)
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    results = {}
    for name in CASES:
        results[name] = run(name, folder, ZERO_2, batch_size=2)
        results[f"{name} resumed"] = run(name, folder, ZERO_2, batch_size=2, resume=True)
    if os.environ["RANK"] == "0":
        (folder / "losses.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
