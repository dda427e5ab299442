"""Token merging against PyPI's tomesd, and a merging encoder against its executed token-layers.

tomesd call: match, merge, attention on half of the tokens, unmerge, of 2 images with 8 heads. A
ratio above 1 means that ours is faster. The encoder's `x limit` is the share reached of the
images/s that the plain encoder has per executed token-layer; `x limit bmm` of a match is the time
of the product of sources and destinations alone over ours.
"""

import resource
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from harness import generator, line, parse_args, report, wanted
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import ViTConfig, ViTModel

import mor
from mor.modules.token_merging import MergePlan, match, split_cells

try:
    from tomesd.merge import bipartite_soft_matching_random2d
except ImportError as error:
    raise SystemExit("bench_token_merging.py: pip install --no-deps tomesd") from error

BATCH, WIDTH, HEADS = 2, 320, 8
#: Layers, width, heads and r of the encoder; B/16 has 197 tokens.
ENCODERS = {"ViT-B/16": (12, 768, 12, 13), "smoke": (2, 64, 2, 13)}


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    return scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


def tomesd(side: int) -> None:
    """The call and its parts, at side * side tokens."""
    tokens, random = side * side, generator()
    what = {"what": "tomesd", "tokens": tokens}
    names = ("call", "match", "merge", "unmerge")
    if not any(wanted({**what, "part": name}) for name in names):
        return
    x = torch.randn(BATCH, tokens, WIDTH, generator=random)
    weights = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
    draw = torch.Generator().manual_seed(0)
    choice = torch.randint(4, (side // 2, side // 2), generator=draw)

    def our_match() -> MergePlan:
        return match(x, tokens // 2, *split_cells(side, side, (2, 2), choice))

    def their_match() -> Any:
        draw.manual_seed(0)
        return bipartite_soft_matching_random2d(x, side, side, 2, 2, tokens // 2, generator=draw)

    def ours() -> Tensor:
        plan = our_match()
        y = plan.merge(x).view(BATCH, -1, WIDTH)
        return plan.unmerge(attend(*weights(y).chunk(3, dim=-1)).flatten(0, 1))

    def theirs() -> Tensor:
        merge, unmerge = their_match()
        return unmerge(attend(*weights(merge(x)).chunk(3, dim=-1)))

    with torch.inference_mode():
        torch.testing.assert_close(ours(), theirs(), rtol=1e-5, atol=1e-5)
        plan, (merge, unmerge) = our_match(), their_match()
        short, packed = merge(x), plan.merge(x)
        forms: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "call": (ours, theirs),
            "match": (our_match, their_match),
            "merge": (lambda: plan.merge(x), lambda: merge(x)),
            "unmerge": (lambda: plan.unmerge(packed), lambda: unmerge(short)),
        }
        sources, destinations = split_cells(side, side, (2, 2), choice)
        a, b = x[:, sources], x[:, destinations]
        product = {"limit bmm": lambda: a @ b.mT}  # of the match: theirs has it too
        for name, (mine, authors) in forms.items():
            limit = product if name == "match" else {}
            line({**what, "part": name}, {"ours": mine, "authors": authors, **limit}, seconds=0.2)


def encoder(name: str) -> None:
    """Images/s of a merging encoder, of the bound by its executed token-layers."""
    what = {"what": name, "part": "8 images"}
    if not wanted(what):
        return
    layers, width, heads, r = ENCODERS[name]
    config = ViTConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads,
    )  # fmt: skip
    plain, merging = (ViTModel(config, add_pooling_layer=False).eval() for _ in range(2))
    mor.apply_token_merging(merging, r=r)
    images = torch.randn(8, 3, 224, 224, generator=generator())
    # Attention runs on the tokens that come into a layer, the MLP, two thirds of it, on those left.
    counts = [197 - r * layer for layer in range(layers + 1)]
    executed = sum(before + 2 * after for before, after in pairwise(counts)) / 3
    with torch.inference_mode():
        line(
            what,
            {"ours": lambda: merging(images), "limit token-layers": lambda: plain(images)},
            seconds=0.5,
            work={"limit token-layers": executed / (layers * 197)},
        )


def match_memory(side: int) -> None:
    """Prints how much a match adds to the peak of the process: ours first, then theirs."""
    x = torch.randn(BATCH, side * side, WIDTH, generator=generator())
    choice = torch.zeros(side // 2, side // 2, dtype=torch.int64)
    split = split_cells(side, side, (2, 2), choice)
    with torch.inference_mode():
        half = side * side // 2
        for name, form in (
            ("ours", lambda: match(x, half, *split)),
            ("tomesd", lambda: bipartite_soft_matching_random2d(
                x, side, side, 2, 2, half, no_rand=True)),
        ):  # fmt: skip
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            form()
            added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            print(f"match of {side * side} tokens, {name}: peak memory + {added / 1024:.1f} MiB")


if __name__ == "__main__":
    args = parse_args(__doc__)
    match_memory(8 if args.smoke else 64)
    for side in [8] if args.smoke else [32, 64]:
        tomesd(side)
    encoder("smoke" if args.smoke else "ViT-B/16")
    report("token_merging")
