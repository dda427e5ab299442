"""Small LLaVAs' configurations, padded prompts, and a decoder layer: for tests of two systems."""

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaAttention

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
