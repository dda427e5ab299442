"""Checkpoints around a routed module: its second forward, in backward, changes no counter."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from mor.modules import MixtureOfRecursions

WAYS = {
    "not-reentrant": lambda m, x: checkpoint(m, x, use_reentrant=False),
    "reentrant": lambda m, x: checkpoint(m, x, use_reentrant=True),
    "wrapper": lambda m, x: checkpoint_wrapper(m)(x),
}
CASES = {
    "expert": ("expert", {}),
    "expert-warm-up": ("expert", {"capacity_warmup_steps": 4}),
    "expert-threshold": ("expert", {"train_routing": "threshold"}),
    "token": ("token", {}),
    "token-loss-free": ("token", {"balancing": "loss_free"}),
    "token-warm-up-ends": ("token", {"balance_warmup_steps": 1}),
    "token-warm-up": ("token", {"balance_warmup_steps": 4}),
    "recursive": (None, {}),
}


def two_steps(router, options, way):
    """Outputs, gradients and counters of two training steps."""
    torch.manual_seed(0)
    layer = MixtureOfRecursions(nn.Sequential(nn.Linear(8, 8), nn.GELU()), 8, 3, router, **options)
    found = []
    for seed in (1, 2):
        x = torch.randn(2, 24, 8, generator=torch.Generator().manual_seed(seed), requires_grad=True)
        y = way(layer, x)
        y.square().mean().backward()
        found += [y.detach(), x.grad]
    found += [p.grad for p in layer.block.parameters()]
    if router is None:
        return found, None
    load = getattr(layer.recursion, "load", torch.zeros(()))
    metrics = layer.recursion.metrics.compute()
    return found, (int(layer.recursion.warmup_step), load.tolist(), metrics)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_a_recomputation_is_the_forward_and_counts_nothing(case, way):
    """Warm-ups and loads moved twice a step, and the second forward routed by the next ones."""
    router, options = CASES[case]
    want, counted = two_steps(router, options, lambda m, x: m(x))
    got, again = two_steps(router, options, WAYS[way])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)
    assert again == counted
