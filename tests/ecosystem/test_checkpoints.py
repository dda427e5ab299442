"""Sharded safetensors; one file: `test_save_and_load` in tests/models."""

import json

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from .conftest import random_tokens, tiny_model


def test_sharded_checkpoint(routing, tmp_path):
    model = tiny_model(**routing).eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    stored = {}
    for shard in shards:
        with safe_open(shard, "pt") as file:
            for name in file.keys():
                assert index["weight_map"][name] == shard.name
                stored[name] = file.get_tensor(name)
    assert stored.keys() == index["weight_map"].keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for name, value in model.state_dict().items():
        assert torch.equal(stored[name], value), name
        assert torch.equal(loaded.state_dict()[name], value), name
    tokens = random_tokens(2, 9)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
