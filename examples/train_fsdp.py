"""Train a Mixture-of-Recursions model on many processes with FSDP2; resume on any number of them.

torchrun --nproc-per-node 8 examples/train_fsdp.py --output-dir runs/fsdp --steps 1000
torchrun --nproc-per-node 4 examples/train_fsdp.py --output-dir runs/fsdp --steps 1000 --resume

A plain PyTorch loop. The batch is that of all processes together, and which rows it holds depends
on the step alone: a run that goes on with fewer processes sees the same data. Documents are packed
into rows without attending to each other. docs/distributed.md explains what is communicated.
"""

import argparse
import os
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import default_collate
from transformers import LlamaConfig

from mor import MoRConfig, MoRForCausalLM
from mor.data import TokenBlocks, prepare_tokens, train_tokenizer
from mor.data.corpus import open_corpus
from mor.training.distributed import save_consolidated, shard


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/fsdp"))
    parser.add_argument("--data", help="text file or directory (default: Python's own sources)")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8, help="rows, of all processes")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--resume", action="store_true", help="from the newest checkpoint")
    return parser.parse_args()


def make_model(vocab_size: int) -> MoRForCausalLM:
    """Eight layers deep, four layers of weights."""
    dense = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=3,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    config = MoRConfig(
        base_config=dense, num_recursions=3, router="token", router_balancing="loss_free"
    )
    return MoRForCausalLM(config)


def newest_checkpoint(folder: Path) -> Path | None:
    """The last step whose checkpoint is complete: `.metadata` is written last."""
    complete = [path.parent for path in folder.glob("step-*/.metadata")]
    return max(complete, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def main(args: argparse.Namespace) -> None:
    """Trains on all processes that torchrun started."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group()
    rank, world = dist.get_rank(), dist.get_world_size()
    if args.batch_size % world:
        raise ValueError(f"{world} processes must divide the batch of {args.batch_size} rows")

    corpus = open_corpus(args.data)
    tokenizer = train_tokenizer(corpus)
    if rank == 0:
        prepare_tokens(corpus, tokenizer, args.output_dir)
    dist.barrier()
    files = prepare_tokens(corpus, tokenizer, args.output_dir)  # finds what the first one made
    rows = TokenBlocks(files, args.seq_len, separate_documents=True)

    torch.manual_seed(0)  # the same weights everywhere, before they are sharded
    model = make_model(len(tokenizer)).to(device)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(model, **({"mp_policy": half} if args.bf16 else {}))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1
    )
    step = load(model, optimizer, newest_checkpoint(args.output_dir)) if args.resume else 0

    model.train()
    while step < args.steps:
        batch = {key: value.to(device) for key, value in batch_of(rows, step, args, rank).items()}
        # The loss of a target counts the same in every process, however many it has.
        targets = (batch["labels"][:, 1:] != -100).sum()
        dist.all_reduce(targets)
        output = model(**batch, num_items_in_batch=targets)
        (output.loss * world).backward()  # FSDP takes the mean over the processes
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.model.recursion.update_bias()  # sums the loads of all processes
        step += 1

        loss = output.loss.detach()
        dist.all_reduce(loss)
        if rank == 0:
            print(f"step {step}: loss {loss.item():.6f}", flush=True)
        if step % args.save_every == 0 or step == args.steps:
            save(model, optimizer, step, args.output_dir / f"step-{step}")
    save_consolidated(model, args.output_dir / "model")
    if rank == 0:
        tokenizer.save_pretrained(args.output_dir / "model")
    dist.destroy_process_group()


def batch_of(
    rows: TokenBlocks, step: int, args: argparse.Namespace, rank: int
) -> dict[str, torch.Tensor]:
    """This process's share of the rows of a step: each epoch is a permutation of its own."""
    own = args.batch_size // dist.get_world_size()
    first = step * args.batch_size + rank * own
    picked = []
    for place in range(first, first + own):
        epoch, index = divmod(place, len(rows))
        picked.append(rows[int(order_of(epoch, len(rows))[index])])
    return default_collate(picked)


@lru_cache(maxsize=2)  # a batch may end one epoch and begin the next
def order_of(epoch: int, count: int) -> torch.Tensor:
    """The rows of an epoch in its order."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(epoch))


def save(model: MoRForCausalLM, optimizer: torch.optim.Optimizer, step: int, folder: Path) -> None:
    """Every process writes its shards."""
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments, "step": step}, checkpoint_id=folder)


def load(model: MoRForCausalLM, optimizer: torch.optim.Optimizer, folder: Path | None) -> int:
    """Every process reads what its shards need, whoever wrote it; returns the step."""
    if folder is None:
        return 0
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "step": 0}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return int(state["step"])


if __name__ == "__main__":
    main(parse())
