"""FSDP2 for recursive models: shard what is used together, and save a whole model.

Everything else is PyTorch's own: `torchrun`, DDP, `torch.distributed.checkpoint`. The guide is
docs/distributed.md, a complete script examples/train_fsdp.py.
"""

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from mor.models.modeling_mor import MoRForCausalLM, MoRModel

__all__ = ["save_consolidated", "shard"]


def shard(model: MoRForCausalLM | MoRModel, **options: Any) -> MoRForCausalLM | MoRModel:
    """Applies `torch.distributed.fsdp.fully_shard` to a model, in place.

    Each layer that is used once is a unit of its own. The layers of the recursed block form one
    unit with the router, whose forward contains all their uses: their parameters are gathered once
    in a forward and once in a backward pass, instead of once for each of the R uses, and freed in
    between. Layers that recur without a router stay gathered between their uses instead. The rest
    (embedding, norm, head) is the root's.

    Args:
        model: on the device it trains on; before the optimizer is made.
        **options: of `fully_shard` (mesh, mp_policy, offload_policy, ...), for every unit.

    Returns:
        The same model; its parameters are DTensors.

    Example:
        >>> optimizer = torch.optim.AdamW(shard(model, mesh=mesh).parameters())  # doctest: +SKIP
    """
    body = model.model if isinstance(model, MoRForCausalLM) else model
    recursed = [i for i in range(len(body.layers)) if len(body.schedule.depths_of(i)) > 1]
    for i, layer in enumerate(body.layers):
        if i not in recursed:
            fully_shard(layer, **options)
        elif body.recursion is None:
            fully_shard(layer, **{**options, "reshard_after_forward": False})
    if body.recursion is not None:
        fully_shard([body.recursion, *(body.layers[i] for i in recursed)], **options)
    fully_shard(model, **options)
    return model


def save_consolidated(model: MoRForCausalLM | MoRModel, folder: str | Path) -> None:
    """Writes a sharded (or whole) model as `save_pretrained` does; all processes must call it.

    The weights are gathered into the main memory of the first process, which alone writes.
    """
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=whole)
    distributed = torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_rank() == 0:
        model.save_pretrained(folder, state_dict=weights)
    if distributed:
        torch.distributed.barrier()
