"""Without gradients recursion steps write into the states: only into their own."""

import pytest
import torch

from mor.modules import MixtureOfRecursions
from mor.modules.recursion import add_rows


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("step", [0, 1])
def test_states_are_written_to_once_they_are_the_recursions_own(step: int, keep: bool) -> None:
    states, updates, rows = torch.ones(4, 3), torch.ones(2, 3), torch.tensor([1, 3])
    with torch.no_grad():
        out = add_rows(step, states, updates, rows, None, keep)
    assert (out.data_ptr() == states.data_ptr()) == (step > 0 and not keep)
    assert out.sum(1).tolist() == [3, 6, 3, 6]
    assert add_rows(1, states.clone().requires_grad_(), updates, rows, None, False).requires_grad


@pytest.mark.parametrize("router", ["expert", "token"])
def test_no_grad_gives_the_same_and_leaves_the_input_alone(router: str) -> None:
    torch.manual_seed(0)
    layer = MixtureOfRecursions(torch.nn.Linear(8, 8), 8, num_recursions=3, router=router).eval()
    x = torch.randn(2, 12, 8)
    before = x.clone()
    want = layer(x)
    with torch.no_grad():
        got = layer(x)
    assert torch.equal(got, want)
    assert torch.equal(x, before)
