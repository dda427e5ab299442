"""The table of variants in docs/models.md: every combination works, or says why it cannot."""

from pathlib import Path

import pytest
import torch

from mor.models.configuration_mor import KV_STRATEGIES, SHARINGS

from .conftest import small_config, small_model
from .test_generation import prompts

EXTRAS = {
    "plain": {},
    "dora": {"relaxation": "dora", "relaxation_rank": 2, "recursion_encoding": True},
    "random": {"router_type": "random"},
    "residual": {"router_gating": "residual"},
}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("router", [None, "expert", "token"])
@pytest.mark.parametrize("kv_strategy", KV_STRATEGIES)
@pytest.mark.parametrize("sharing", SHARINGS)
def test_every_combination(sharing, kv_strategy, router, extra):
    if extra == "dora":
        pytest.importorskip("peft")
    if router is None and extra in ("random", "residual"):
        pytest.skip("options of a router")
    options = {"sharing": sharing, "kv_strategy": kv_strategy, "router": router, **EXTRAS[extra]}
    options |= {"num_recursions": 2, "num_hidden_layers": 6 if "middle" in sharing else 4}
    if router is not None and sharing.endswith("sequence"):
        with pytest.raises(ValueError, match="no recursion step after which a token could exit"):
            small_config(**options)
        return
    model = small_model(**options)
    tokens = prompts(2, 9)
    model.train()(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        full = model(tokens).logits
        cache = model(tokens[:, :6], use_cache=True)
        rest = model(tokens[:, 6:], past_key_values=cache.past_key_values).logits
    torch.testing.assert_close(rest, full[:, 6:], atol=1e-4, rtol=0)


def test_the_document_names_every_value():
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    section = text[text.index("## Which combinations") :]
    section = section[: section.index("\n## ", 1)]
    for value in (*SHARINGS, *KV_STRATEGIES, "expert", "token", "None"):
        assert f"`{value}`" in section, value
