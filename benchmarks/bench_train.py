"""One training step (forward and backward) of MoR against the dense model of the same depth.

`x best` is against the dense model, Transformers' Llama with SDPA, and stands beside the ratio of
the FLOPs that mor.analysis predicts; `x limit recursive` against the recursive model without a
router. All models run eagerly, or all compiled with --compile. Where the authors' ratios were
measured (their code is none of this repository's; docs/experiments/training_step.md has the
figures):
--hidden-size 384 --block-depth 4 --vocab-size 1024 --seq-len 512 --batch-size 4 --threads 1
"""

from collections.abc import Callable

import torch
from harness import line, parse_args, report
from transformers import LlamaConfig, LlamaForCausalLM

from mor import MoRConfig, MoRForCausalLM, analysis


def models(hidden_size: int, block_depth: int, vocab_size: int) -> dict[str, torch.nn.Module]:
    """MoR variants and the dense model of the same unrolled depth, shaped like SmolLM-135M."""
    base = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 192,
        num_hidden_layers=3 * block_depth + 2,
        vocab_size=vocab_size,
        tie_word_embeddings=True,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    return {
        "dense": LlamaForCausalLM(base),
        "recursive": MoRForCausalLM(MoRConfig(base_config=base, router=None)),
        "MoR expert": MoRForCausalLM(MoRConfig(base_config=base)),
        "MoR token": MoRForCausalLM(MoRConfig(base_config=base, router="token")),
        "MoR expert, shared KV": MoRForCausalLM(MoRConfig(base_config=base, kv_strategy="shared")),
        "MoR token, shared KV": MoRForCausalLM(
            MoRConfig(base_config=base, router="token", kv_strategy="shared")
        ),
    }


def main() -> None:
    def options(parser):
        parser.add_argument("--hidden-size", type=int, default=576, help="a multiple of 192")
        parser.add_argument("--vocab-size", type=int, default=49152)
        parser.add_argument("--block-depth", type=int, default=8, help="layers of the shared block")
        parser.add_argument("--seq-len", type=int, default=1024)
        parser.add_argument("--batch-size", type=int, default=1)
        parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
        parser.add_argument("--compile", action="store_true", help="torch.compile both models")

    args = parse_args(__doc__, options)
    length = 64 if args.smoke else args.seq_len
    if args.smoke:
        args.hidden_size, args.block_depth, args.vocab_size = 192, 2, 512
    found = models(args.hidden_size, args.block_depth, args.vocab_size)
    tokens = torch.randint(args.vocab_size, (args.batch_size, length))
    shares = {}

    def step(name: str) -> Callable[[], None]:
        model = found[name].to(tokens.device).train()
        call = torch.compile(model, dynamic=False) if args.compile else model

        def run() -> None:
            model.zero_grad(set_to_none=True)
            with torch.autocast(tokens.device.type, torch.bfloat16, enabled=args.bf16):
                output = call(input_ids=tokens, labels=tokens, use_cache=False)
            output.loss.backward()
            depths = getattr(output, "token_depths", None)
            if depths is not None:
                shares[name] = [float((depths > r).float().mean()) for r in range(3)]

        return run

    def flops(name: str) -> float:
        given = shares.get(name)
        return analysis.flops_per_token(found[name].config, length, training=True, shares=given)

    for name in [*found][1:]:
        what = {"model": name, "parameters": sum(p.numel() for p in found[name].parameters())}
        calls = {"ours": step(name), "dense": step("dense")}
        if name != "recursive":
            calls["limit recursive"] = step("recursive")
        if row := line(what, calls):
            row["FLOPs"] = flops("dense") / flops(name)
    name = "train" + ("_bf16" if args.bf16 else "") + ("_compiled" if args.compile else "")
    report(name)


if __name__ == "__main__":
    main()
