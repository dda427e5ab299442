"""Trains a tiny model on fixed data, alone or as one of several processes under torchrun.

torchrun --nproc-per-node 2 tests/distributed/training.py FOLDER runs CASES and leaves in FOLDER
what each gave; the tests run the same cases in one process and compare. All in float64, so that
little is excused by sums in another order.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from mor import MoRConfig, MoRForCausalLM
from mor.training.distributed import save_consolidated, shard

STEPS, SAVED_AFTER, LENGTH, VOCAB = 4, 2, 16, 97

#: The processes' rows of the global batch of four.
EVEN, UNEVEN = (slice(0, 2), slice(2, 4)), (slice(0, 3), slice(3, 4))

#: Options of the model; `data` is a function below, `rows` and `wrap` say how processes share it.
CASES = {
    "ddp-expert": {"router": "expert", "router_z_coef": 0.01},
    "ddp-expert-uneven": {"router": "expert", "router_aux_coef": 0.1, "rows": UNEVEN},
    "ddp-token-padded": {"router": "token", "router_balancing": "loss_free", "data": "padded"},
    "ddp-token-accumulated": {"router": "token", "router_balancing": "loss_free", "micro": 2},
    "ddp-token-no-rows": {"router": "token", "router_balancing": "loss_free", "data": "shallow"},
    "accelerate-token": {"router": "token", "router_balancing": "loss_free", "rows": UNEVEN},
    "fsdp-expert": {"router": "expert", "router_aux_coef": 0.1, "rows": UNEVEN},
    "fsdp-expert-shared": {"router": "expert", "kv_strategy": "shared"},
    "fsdp-expert-checkpointed": {"router": "expert", "activation_checkpointing": True},
    "fsdp-token-padded": {"router": "token", "router_balancing": "loss_free", "data": "padded"},
    "fsdp-token-no-rows": {"router": "token", "router_balancing": "loss_free", "data": "shallow"},
    "fsdp-recursive": {"router": None},
    "ddp-relaxed": {"router": "expert", "relaxation": "lora", "relaxation_rank": 2},
    "fsdp-relaxed": {
        "router": "token",
        "router_balancing": "loss_free",
        "relaxation": "dora",
        "relaxation_rank": 2,
    },
}


def model_of(case: dict) -> MoRForCausalLM:
    options = {k: v for k, v in case.items() if k.startswith(("router", "kv", "relaxation"))}
    # Cycle: the router then sees the embedding, by which `shallow` decides.
    options["sharing"] = "cycle" if case.get("data") == "shallow" else "middle_cycle"
    torch.manual_seed(0)
    base = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6 if options["sharing"] == "cycle" else 8,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.1,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    model = MoRForCausalLM(MoRConfig(base_config=base, router_bias_update_rate=0.05, **options))
    if options["sharing"] == "cycle":
        # Tokens below VOCAB // 2 leave after the first recursion, the others take all three.
        with torch.no_grad():
            model.model.embed_tokens.weight[:, 0] = torch.linspace(1, -1, VOCAB).sign()
            router = model.model.recursion.router.layers[0].weight
            router.zero_()
            router[0, 0], router[2, 0] = 3.0, -3.0
    if case.get("activation_checkpointing"):
        model.activation_checkpointing_enable()
    return model.double().train()


def batch_of(case: dict, step: int) -> dict[str, Tensor]:
    """The global batch of a step."""
    torch.manual_seed(100 + step)
    ids = torch.randint(1, VOCAB, (4, LENGTH))
    if case.get("data") == "shallow":
        half = VOCAB // 2
        ids = torch.cat([ids[:2] % half + half + 1, ids[2:] % half])
    mask = torch.ones_like(ids)
    if case.get("data") == "padded":
        mask[1, :5], mask[2, 4:], mask[3, 9:] = 0, 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def train(
    case: dict,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    rank: int = 0,
    world: int = 1,
) -> dict:
    """The global loss of each step, and how deep this process's tokens went."""
    losses, depths = [], []
    rows = case.get("rows", EVEN)[rank] if world > 1 else slice(0, 4)
    for step in steps:
        batch = batch_of(case, step)
        items = (batch["labels"][:, 1:] != -100).sum()
        parts = [value[rows].chunk(case.get("micro", 1)) for value in batch.values()]
        total = torch.zeros((), dtype=torch.float64)
        for micro in zip(*parts, strict=True):
            out = model(**dict(zip(batch, micro, strict=True)), num_items_in_batch=items)
            (out.loss * world).backward()  # DDP and FSDP average over the processes
            total += out.loss.detach()
            depths.append(out.token_depths[out.token_depths > 0])
        if world > 1:
            dist.all_reduce(total)
        losses.append(total.item())
        optimizer.step()
        optimizer.zero_grad()
        if case.get("router_balancing") == "loss_free":
            getattr(model, "module", model).model.recursion.update_bias()
    return {"losses": losses, "depths": torch.cat(depths)}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )


def run_case(name: str, folder: Path, rank: int, world: int) -> dict:
    case = CASES[name]
    model = model_of(case)
    if name.startswith("ddp"):
        wrapped = DistributedDataParallel(model)
        result = train(case, wrapped, optimizer_of(model), range(STEPS), rank, world)
        return {**result, "weights": model.state_dict()}
    if name.startswith("accelerate"):
        wrapped, optimizer = Accelerator(cpu=True).prepare(model, optimizer_of(model))
        assert isinstance(wrapped, DistributedDataParallel)
        result = train(case, wrapped, optimizer, range(STEPS), rank, world)
        return {**result, "weights": model.state_dict()}
    shard(model)
    optimizer = optimizer_of(model)
    result = train(case, model, optimizer, range(SAVED_AFTER), rank, world)
    save(folder / f"{name}.checkpoint", model, optimizer)
    rest = train(case, model, optimizer, range(SAVED_AFTER, STEPS), rank, world)
    save_consolidated(model, folder / f"{name}.model")
    return {"losses": result["losses"] + rest["losses"], "depths": result["depths"]}


def resume_sharded(name: str, folder: Path, rank: int, world: int) -> dict:
    """Goes on, sharded, from the checkpoint that one process wrote."""
    model = shard(model_of(CASES[name]))
    optimizer = optimizer_of(model)
    load(folder / f"{name}.alone", model, optimizer)
    return train(CASES[name], model, optimizer, range(SAVED_AFTER, STEPS), rank, world)


def collectives() -> tuple[dict[str, int], dict[str, int]]:
    """How often a sharded model communicates parameters and gradients, forward and backward."""
    case = CASES["fsdp-expert"]
    model = shard(model_of(case))
    batch = batch_of(case, 0)
    counts = []
    with profile(activities=[ProfilerActivity.CPU]) as forward:
        loss = model(**batch).loss
    with profile(activities=[ProfilerActivity.CPU]) as backward:
        loss.backward()
    for events in (forward.key_averages(), backward.key_averages()):
        counts.append({e.key: e.count for e in events if e.key.startswith("c10d::")})
    return counts[0], counts[1]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    results = {name: run_case(name, folder, rank, world) for name in CASES}
    for name in CASES:
        if (folder / f"{name}.alone").exists():
            results[f"{name}.resumed"] = resume_sharded(name, folder, rank, world)
    results["collectives"] = collectives()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
