"""Trains small models of the sister systems on fixed data, alone or sharded over two processes.

torchrun --nproc-per-node 2 tests/distributed/sister_training.py FOLDER leaves in FOLDER what each
process got; the test runs the same in one process and compares. All in float64.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tests.systems.small_llava import IMAGE, VIDEO
from tests.systems.test_mod import mod_llama
from tests.systems.test_pmod import pmod_llava
from tests.systems.test_video_mod import FRAME, SIDE, video_llava

STEPS = 3
MODELS = {"mod": mod_llama, "pmod": pmod_llava, "video_mod": video_llava}


def batch_of(system: str) -> dict[str, Tensor]:
    """Four rows."""
    torch.manual_seed(1)
    text = torch.randint(3, 60, (4, 12))
    if system == "mod":
        return {"input_ids": text, "labels": text}
    pixels = torch.randn(4, 3, 24, 24) if system == "pmod" else torch.randn(4, 2, 3, SIDE, SIDE)
    vision = [IMAGE] * 16 if system == "pmod" else [VIDEO] * 2 * FRAME
    ids = torch.cat([text[:, :4], torch.tensor(vision).expand(4, -1), text[:, 4:]], dim=1)
    name = "pixel_values" if system == "pmod" else "pixel_values_videos"
    labels = ids.masked_fill(ids >= VIDEO, -100)
    return {"input_ids": ids, name: pixels.double(), "labels": labels}


def shard(model: nn.Module, **options) -> None:
    """As a user does: each layer of the decoder, then the rest."""
    for layer in decoder_layers(model):
        fully_shard(layer, **options)
    fully_shard(model, **options)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    body = model.model
    return body.language_model.layers if hasattr(body, "language_model") else body.layers


def train(system: str, rank: int = 0, world: int = 1) -> dict:
    """The mean loss of each step, and the weights behind the last."""
    model = MODELS[system]().double().train()
    if world > 1:
        shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows, losses = 4 // world, []
    batch = {k: v[rank * rows : (rank + 1) * rows] for k, v in batch_of(system).items()}
    for _ in range(STEPS):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().double()
        if world > 1:
            dist.all_reduce(total)
        losses.append(total.item() / world)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=whole) if world > 1 else model.state_dict()
    return {"losses": losses, "weights": weights}


def loss_in_half(system: str, rank: int) -> float:
    """The first loss, with parameters gathered in bfloat16."""
    model = MODELS[system]().train()
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    batch = {k: v[rank * 2 : rank * 2 + 2] for k, v in batch_of(system).items()}
    loss = model(**batch).loss
    loss.backward()
    dist.all_reduce(loss)
    return loss.item() / 2


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    results = {system: train(system, rank, world) for system in MODELS}
    for system in MODELS:
        results[system]["half"] = loss_in_half(system, rank)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
