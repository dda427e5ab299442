"""TRL under DDP: parameters that only a router loss reaches are no unused ones."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.launch import torchrun

trl = pytest.importorskip("trl")


def train(folder: Path, batch_size: int) -> list[float]:
    """The auxiliary routers after two steps."""
    from datasets import Dataset

    from mor.training.trl import RouterLossMixin
    from tests.distributed.training import VOCAB, model_of

    rows = torch.randint(1, VOCAB, (8, 12), generator=torch.Generator().manual_seed(0))
    dataset = Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()})
    arguments = trl.SFTConfig(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=batch_size,
        dataset_kwargs={"skip_prepare_dataset": True},
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        learning_rate=1e-2,
        max_grad_norm=0.0,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    model = model_of({"router": "expert", "router_aux": "router", "router_aux_coef": 0.5}).float()
    mine = type("Mine", (RouterLossMixin, trl.SFTTrainer), {})
    mine(model, args=arguments, train_dataset=dataset, processing_class=tokenizer()).train()
    found = [p for name, p in model.named_parameters() if "aux" in name]
    return torch.cat([parameter.detach().flatten() for parameter in found]).tolist()


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="<eos>"
    )


def test_auxiliary_routers_were_marked_ready_twice(tmp_path):
    assert torchrun(__file__, tmp_path).returncode == 0
    together = json.loads((tmp_path / "aux.json").read_text())
    assert together == pytest.approx(train(tmp_path, batch_size=4), abs=1e-5)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    result = train(folder, batch_size=2)
    if torch.distributed.get_rank() == 0:
        (folder / "aux.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
