"""generate() of MoR models and of the recursive model against the dense model of the same depth.

Prompt of 64 tokens, 64 new ones, greedy, shaped like SmolLM2-135M. `exit` is the recursion after
which every token exits; `mixed`: token depths spread evenly by the random router; with --model, as
the router of that checkpoint decides. `x Llama` is Transformers' Llama's time over ours; `x limit
bound` the share that is reached of its time scaled by the weights that our layers and head execute.

--prefill has one line for each length of prompt and way to share keys and values instead: the first
token, the bytes that the cache takes, and their share of a dense model's.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from harness import DTYPES, dtype_name, line, parse_args, report, wanted
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mor import MoRConfig, MoRForCausalLM, analysis

PROMPT = NEW_TOKENS = 64
#: Layers of the shared block, so that models of R recursions have about as many unrolled layers.
BLOCK_DEPTH = {2: 14, 3: 9, 4: 7}
VARIANTS: dict[str, dict[str, Any]] = {
    "recursive": {"router": None},
    "recursion": {},
    "shared": {"kv_strategy": "shared"},
    "hybrid": {"kv_strategy": "hybrid"},
}


class Forced(nn.Module):
    """A router by which every token takes the same `exits` recursions, at no cost."""

    def __init__(self, num_outputs: int, step: int, exits: int) -> None:
        super().__init__()
        expert = torch.full((1,), 1.0 if step < exits else -1.0)
        token = nn.functional.one_hot(torch.tensor(exits - 1), max(num_outputs, exits)).float()
        self.register_buffer("logits", expert if num_outputs == 1 else token)

    def forward(self, hidden: Tensor, positions: Tensor, learns: bool = False) -> Tensor:
        return self.logits.expand(hidden.shape[0], -1)


def dense_config(num_recursions: int, smoke: bool) -> LlamaConfig:
    block = 1 if smoke else BLOCK_DEPTH[num_recursions]
    return LlamaConfig(
        hidden_size=192 if smoke else 576,
        intermediate_size=256 if smoke else 1536,
        num_attention_heads=3 if smoke else 9,
        num_key_value_heads=1 if smoke else 3,
        num_hidden_layers=num_recursions * block + 2,
        vocab_size=512 if smoke else 49152,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )


def mor_model(base: LlamaConfig, num_recursions: int, **options: Any) -> MoRForCausalLM:
    torch.manual_seed(0)
    config = MoRConfig(base_config=base, num_recursions=num_recursions, **options)
    return MoRForCausalLM(config).eval()


def force(model: MoRForCausalLM, router: str, exits: int) -> None:
    """Makes every token take `exits` recursions."""
    count = model.config.num_recursions
    if router == "expert":
        for step in range(count):
            model.model.recursion.routers[step] = Forced(1, step, exits)
    else:
        model.model.recursion.router = Forced(count, 0, exits)


def generation(model: PreTrainedModel, batch: int, args: argparse.Namespace) -> Callable[[], Any]:
    prompt, new = (8, 4) if args.smoke else (PROMPT, NEW_TOKENS)
    generator = torch.Generator(model.device).manual_seed(0)
    shape = (batch, prompt)
    tokens = torch.randint(1, model.config.vocab_size, shape, generator=generator)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    return lambda: model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)


def executed(config: Any, shares: list[float] | None) -> float:
    """FLOPs of the products with weights, per token."""
    parts = analysis.flops_breakdown(config, PROMPT, shares)
    return parts["projections"] + parts["mlp"] + parts["head"]


def measure(
    what: dict[str, Any], model: MoRForCausalLM, dense: LlamaForCausalLM, args: argparse.Namespace
) -> None:
    ours = generation(model, what["batch"], args)
    shares = None
    if model.config.router is not None:
        with torch.no_grad():
            depths = model(ours(), use_cache=False).token_depths
        shares = [float((depths > r).double().mean()) for r in range(model.config.num_recursions)]
    llama = generation(dense, what["batch"], args)
    share = executed(model.config, shares) / executed(dense.config, None)
    calls = {"ours": ours, "Llama": llama, "limit bound": llama}
    if row := line(what, calls, seconds=0.01, work={"limit bound": share}):
        new = 4 if args.smoke else NEW_TOKENS
        row["ms a token"] = row["ours ms"] / new
        row["tokens/s"] = what["batch"] * new / row["ours ms"] * 1e3


def decoding(args: argparse.Namespace) -> None:
    counts = (3,) if args.smoke else tuple(args.recursions)
    batches = (2,) if args.smoke else (1, 8, 32)
    for count, dtype in product(counts, DTYPES):
        base = dense_config(count, args.smoke)
        dense = LlamaForCausalLM(base).eval().to(dtype)
        for router in (None, "expert", "token"):
            exits = [None] if router is None else [*range(1, count + 1), "mixed"]
            for exit, batch in product(exits, batches):
                name = f"MoR-{count} {router}" if router else f"recursive-{count}"
                what = {"model": name, "exit": str(exit or count), "batch": batch}
                what["dtype"] = dtype_name(dtype)
                if not wanted(what):
                    continue
                mixed = {"router_type": "random"} if exit == "mixed" else {}
                model = mor_model(base, count, router=router, **mixed)
                if router is not None and not mixed:
                    force(model, router, exit)
                measure(what, model.to(dtype), dense, args)
    if args.model is not None:
        model = MoRForCausalLM.from_pretrained(args.model).eval()
        dense = LlamaForCausalLM(model.config.base_config).eval()
        for batch, dtype in product(batches, DTYPES):
            what = {"model": args.model, "exit": "as trained", "batch": batch}
            what["dtype"] = dtype_name(dtype)
            if wanted(what):
                measure(what, model.to(dtype), dense.to(dtype), args)


def first_token(model: PreTrainedModel, tokens: Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(tokens, past_key_values=cache, logits_to_keep=1)
    return cache


def prefill(args: argparse.Namespace) -> None:
    lengths = (64,) if args.smoke else (512, 2048, 8192)
    base = dense_config(3, args.smoke)
    for length, dtype in product(lengths, DTYPES):
        tokens = torch.randint(1, base.vocab_size, (1, length))
        dense = LlamaForCausalLM(base).eval().to(dtype)
        for name, options in VARIANTS.items():
            what = {"prompt": length, "kv": name, "dtype": dtype_name(dtype)}
            if not wanted(what):
                continue
            mixed = {} if name == "recursive" else {"router_type": "random"}
            model = mor_model(base, 3, **options, **mixed).to(dtype)
            calls = {
                "ours": partial(first_token, model, tokens),
                "Llama": partial(first_token, dense, tokens),
            }
            if not (row := line(what, calls, seconds=0.01)):
                continue
            cache = first_token(model, tokens)
            with torch.no_grad():
                depths = model(tokens, use_cache=False).token_depths
            shares = None
            if model.config.router is not None:
                shares = [float((depths > r).double().mean()) for r in range(3)]
            row |= cache_bytes(model, cache, length, dtype)
            flops, all_flops = (
                sum(analysis.flops_breakdown(config, length, share).values())
                - parts_without(config, length)
                for config, share in ((model.config, shares), (base, None))
            )
            row["FLOPs"] = flops / all_flops
            row["time / FLOPs"] = (1 / row["x best"]) / row["FLOPs"]


def parts_without(config: Any, length: int) -> float:
    """FLOPs of the head but for one token."""
    return 2.0 * config.hidden_size * config.vocab_size * (1 - 1 / length)


def cache_bytes(
    model: PreTrainedModel, cache: DynamicCache, length: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Bytes of the slots in use, and of a dense model's cache, per layer and token."""
    config = model.config
    slot = 2 * config.base_config.num_key_value_heads * 64 * torch.finfo(dtype).bits // 8
    used = sum(int(layer.lengths.sum()) for layer in cache.layers if layer.lengths is not None)
    everything = length * config.num_hidden_layers
    return {"cache MB": used * slot / 1e6, "of dense": used / everything}


if __name__ == "__main__":

    def options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--prefill", action="store_true", help="prompts instead of new tokens")
        parser.add_argument("--recursions", type=int, nargs="+", default=[2, 3, 4])
        parser.add_argument("--model", help="a trained MoR checkpoint, too")

    args = parse_args(__doc__, options)
    (prefill if args.prefill else decoding)(args)
    report("generate_prefill" if args.prefill else "generate")
