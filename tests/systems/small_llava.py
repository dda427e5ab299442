"""Small LLaVAs' configurations, padded prompts, and a decoder layer: for tests of two systems."""

import copy

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaAttention

from mor.models.attention import AttentionContext
from tests.support.host_reads import host_reads

IMAGE, VIDEO, PAD = 99, 98, 0
TEXT = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}


def text_config(kind="llama", num_layers=8, **options):
    return TEXT[kind](
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=num_layers,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        pad_token_id=PAD, bos_token_id=1, eos_token_id=None, **options,
    )  # fmt: skip


def vision_config(size=24):
    return CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        image_size=size, patch_size=6, projection_dim=32,
    )  # fmt: skip


def left_padded(rows):
    """Ids and mask of prompts [(ids, pixels), ...], and all pixels."""
    longest = max(ids.shape[1] for ids, _ in rows)
    padded = [nn.functional.pad(ids, (longest - ids.shape[1], 0), value=PAD) for ids, _ in rows]
    ids = torch.cat(padded)
    return ids, (ids != PAD).long(), torch.cat([pixels for _, pixels in rows])


class PlainLayer(nn.Module):
    """A pre-norm layer whose parts all compute in the dtype they are given."""

    def __init__(self):
        super().__init__()
        config = text_config()
        config._attn_implementation = "mor"
        self.self_attn = LlamaAttention(config, 0)
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(32), nn.LayerNorm(32)
        self.mlp = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))


# One layer: made by a test's own `one_layer` with states of some sequences, tokens and angles.


def call(layer, x, tokens, angles):
    return layer.run(x, tokens, angles, AttentionContext(tokens.batch.packing))


def masked_attention(layer, h, kept, angles):
    """What attention adds to the states [n, D] of a sequence, with a mask in place of a gather."""
    attention = copy.deepcopy(layer.layer.self_attn)
    attention.config._attn_implementation = "eager"
    mask = torch.full((len(h), len(h)), -torch.inf).triu(1)
    mask = mask.masked_fill(~kept, -torch.inf).masked_fill(~kept[:, None], 0.0).to(h.dtype)
    attended, _ = attention(
        hidden_states=layer.layer.input_layernorm(h)[None],
        position_embeddings=tuple(part[None] for part in angles),
        attention_mask=mask[None, None],
    )
    return attended[0]


def check_gradients(layer, x, tokens, angles):
    names, parameters = zip(*layer.named_parameters(), strict=True)

    class Run(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = layer

        def forward(self, x):
            return call(self.inner, x, tokens, angles)[0]

    def run(x, *parameters):
        named = {f"inner.{n}": p for n, p in zip(names, parameters, strict=True)}
        return torch.func.functional_call(Run(), named, (x,))

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *parameters), fast_mode=True)


def check_never_waits_for_the_device(layer, x, tokens, angles):
    with host_reads() as reads:
        call(layer, x, tokens, angles)[0].sum().backward()
    assert reads == []
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        call(layer, fake.from_tensor(x), tokens, angles)[0].sum()


def check_is_one_graph(layer, x, tokens, angles):
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got = compiled(layer, x, tokens, angles)
    torch.testing.assert_close(got, call(layer, x, tokens, angles))
    got[0].sum().backward()
    torch._dynamo.reset()
