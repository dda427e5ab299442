"""A small model behind `mor.serving.server.serve`, for the tests of the server: `PORT [KEY]`."""

import sys

import torch
from transformers import LlamaConfig

from mor import MoRConfig, MoRForCausalLM
from mor.serving import Engine
from mor.serving.server import serve

from .small_tokenizers import byte_level


def model() -> MoRForCausalLM:
    torch.manual_seed(0)
    base = LlamaConfig(
        vocab_size=len(byte_level()),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=True,
    )
    return MoRForCausalLM(MoRConfig(base_config=base, num_recursions=3)).eval()


def engine() -> Engine:
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    )
    return Engine(model(), tokenizer, kv_memory="4MiB", policy=0.5, block_size=8, chunk=32)


if __name__ == "__main__":
    torch.set_num_threads(1)
    key = sys.argv[2] if len(sys.argv) > 2 else None
    serve(engine, "small", port=int(sys.argv[1]), drain=20, api_key=key, max_requests=80)
