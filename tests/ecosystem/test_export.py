"""torch.export: exported, saved, loaded and run on other tokens, routed otherwise."""

import pytest
import torch

from .conftest import ROUTING, random_tokens, tiny_model

CASES = [
    pytest.param("expert", True),
    pytest.param("expert", False),
    pytest.param("token", False),
    pytest.param("recursive", False),
    pytest.param("token", True, marks=pytest.mark.slow),
    pytest.param("recursive", True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "training"), CASES)
def test_exported_program_gives_the_same_logits(name, training, tmp_path):
    model = tiny_model(**ROUTING[name]).train(training)
    inputs = (random_tokens(2, 16),)
    with torch.no_grad():
        program = torch.export.export(model, inputs, {"use_cache": False}, strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    depths = set()
    for seed in range(3):
        tokens = random_tokens(2, 16, seed)
        with torch.no_grad():
            want = model(tokens, use_cache=False)
        for run in (program, loaded):
            got = run.module()(tokens, use_cache=False)
            torch.testing.assert_close(got.logits, want.logits, atol=2e-6, rtol=1e-5)
            assert torch.equal(got.token_depths, want.token_depths)
        depths.add(tuple(want.token_depths.flatten().tolist()))
    assert len(depths) == (1 if name == "recursive" else 3)
