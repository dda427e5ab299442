"""A Mixture-of-Depths layer against the same in plain PyTorch, on an eighth of the tokens.

Both wrap a Llama decoder layer and train: forward and backward, or forward alone without gradients.
The plain form is a good one: top-k and sort of the logits, gather of the states and the rotary
embeddings, the layer, and index_add of the gated difference, without a loop over the sequences.
`authors` is PyPI's mixture-of-depth, which loops over them and takes one token fewer of each (left
out where it is not installed). `limit layer` is the layer alone on as many tokens, which no routing
can beat. A ratio above 1 means that ours is faster.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from harness import DTYPES, dtype_name, line, parse_args, report, wanted
from published_mod import WithAngles, published_layer
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from mor.modules import MixtureOfDepths

# batch, length, hidden size
SHAPES = [(8, 512, 192), (4, 2048, 384), (1, 2048, 768)]


class Plain(nn.Module):
    """x + w * (layer(x) - x) of the k best tokens of every sequence."""

    def __init__(self, mixture: MixtureOfDepths) -> None:
        super().__init__()
        self.layer, self.capacity = mixture.block, mixture.recursion.capacities[0]
        self.weight = mixture.recursion.routers[0].layers[0].weight

    def forward(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, width = x.shape
        logits = x.float() @ self.weight[0].float()
        k = max(1, int(self.capacity * length))
        columns = logits.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
        rows = (columns + torch.arange(batch, device=x.device)[:, None] * length).flatten()
        picked = x.view(-1, width).index_select(0, rows).view(batch, k, width)
        angles = tuple(part[0][columns] for part in position_embeddings)
        y = self.layer(picked, position_embeddings=angles)
        gate = logits.flatten().index_select(0, rows)[:, None].to(x.dtype)
        update = gate * (y - picked).view(-1, width)
        return x.reshape(-1, width).index_add(0, rows, update).view_as(x)


def measure(shape: tuple[int, int, int], dtype: torch.dtype, training: bool) -> None:
    batch, length, width = shape
    what = {"layer": "MixtureOfDepths", "shape": f"{batch}x{length}x{width}"}
    what |= {"dtype": dtype_name(dtype), "pass": "train" if training else "forward"}
    if not wanted(what):
        return
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 8 // 3, num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    # Without its loss, which the plain form has not either.
    mixture = MixtureOfDepths(LlamaDecoderLayer(config, 0), width, 0.125, aux=None).to(dtype)
    plain = Plain(mixture)
    x = torch.randn(batch, length, width, dtype=dtype, requires_grad=training)
    angles = LlamaRotaryEmbedding(config)(x, torch.arange(length)[None])
    k = max(1, length // 8)
    fewer, fewer_angles = x[:, :k].detach().clone(), tuple(part[:, :k] for part in angles)
    torch.testing.assert_close(
        mixture(x, position_embeddings=angles), plain(x, angles), atol=0.05, rtol=0.05
    )

    published = {}
    if (theirs := published_layer()) is not None:
        block = WithAngles(mixture.block, LlamaRotaryEmbedding(config), width)
        layer = theirs(0.125, block).to(dtype).train(False)  # else it sets its capacity itself
        layer.router.weight_predictor.weight = plain.weight
        positions = torch.arange(length).expand(batch, -1)
        published["authors"] = lambda: layer(x, None, positions, None, False, False)[0]

    def timed(run: Callable[[], Any]) -> Callable[[], Any]:
        def train() -> None:
            run().sum().backward()

        return train if training else torch.no_grad()(run)

    line(
        what,
        {
            "ours": timed(lambda: mixture(x, position_embeddings=angles)),
            **{name: timed(run) for name, run in published.items()},
            "eager": timed(lambda: plain(x, angles)),
            "limit layer": timed(lambda: mixture.block(fewer, position_embeddings=fewer_angles)),
        },
    )


if __name__ == "__main__":
    args = parse_args(__doc__)
    torch.manual_seed(0)
    for what in product([(2, 64, 64)] if args.smoke else SHAPES, DTYPES, [False, True]):
        measure(*what)
    report("mixture_of_depths")
