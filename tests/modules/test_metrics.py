"""Routing metrics of routings small enough to count by hand."""

import copy
import math

import pytest
import torch

from mor.modules.metrics import RoutingMetrics

#: Two sequences, of three tokens and of one.
POSITIONS = torch.tensor([0, 1, 2, 0])
#: Of mean selection probabilities 3/4 and 1/4.
ENTROPY = 2 * math.log(2) - 0.75 * math.log(3)


def test_expert_choice_by_hand():
    metrics = RoutingMetrics(2)
    rows, logits = torch.arange(4), torch.full((4,), math.log(3))  # sigmoid 3/4: 3 in all
    local = torch.tensor([1, 3])
    metrics.update(0, logits, local, rows, POSITIONS, by_rank=True)
    # Sigmoid 1/2: 1 in all. Of the rows 1 and 3 the second goes on, at position 0.
    metrics.update(1, torch.zeros(2), torch.tensor([1]), rows[local], POSITIONS, by_rank=True)
    assert metrics.compute() == pytest.approx(
        {
            "selected_share_1": 2 / 4,
            "selected_share_2": 1 / 4,
            "sampling_accuracy": (2 + 1) / (4 + 2),
            "entropy": ENTROPY,
            "dead_tokens": 2 / 3,  # positions 1 and 2, not 0, which one sequence took to the end
        }
    )


def test_token_choice_by_hand():
    metrics = RoutingMetrics(2)
    scores = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.8, 0.2]])  # 3 and 1 in all
    metrics.update_choice(scores, torch.tensor([3, 1]), torch.tensor([0, 0, 0, 1]), POSITIONS)
    expected = {
        "selected_share_1": 1,
        "selected_share_2": 1 / 4,
        "entropy": ENTROPY,
        "dead_tokens": 2 / 3,
        "max_vio": (3 - 2) / 2,
    }
    assert metrics.compute() == pytest.approx(expected)
    # A second batch evens out the scores and loads, and leaves only position 2 dead.
    metrics.update_choice(
        scores.flip(1), torch.tensor([1, 3]), torch.tensor([1, 1, 0, 1]), POSITIONS
    )
    expected |= {"selected_share_2": 1 / 2, "entropy": math.log(2), "dead_tokens": 1 / 3}
    assert metrics.compute() == pytest.approx(expected | {"max_vio": 0})


def choose(metrics, device):
    rows = torch.arange(8, device=device)
    counts = torch.tensor([4, 4], device=device)
    metrics.update_choice(torch.ones(8, 2, device=device), counts, rows % 2, rows)


def select(metrics, device):
    rows = torch.arange(8, device=device)
    for step in range(2):
        logits = torch.ones(8, device=device)
        metrics.update(step, logits, rows[: 4 - 2 * step], rows, rows, by_rank=True)


@pytest.mark.parametrize("update", [choose, select])
def test_metrics_follow_a_model_that_is_moved(update):
    """Sums stayed where the first call was. The meta device checks devices as CUDA does."""
    for first, second in (("cpu", "meta"), ("meta", "cpu")):
        metrics = RoutingMetrics(2)
        update(metrics, first)
        update(metrics, second)
    metrics.compute()


def test_metrics_of_inference_mode_go_on_outside_it():
    metrics = RoutingMetrics(2)
    with torch.inference_mode():
        select(metrics, "cpu")
    select(metrics, "cpu")
    assert metrics.compute()["selected_share_1"] == 4 / 8


def test_copies_of_metrics_begin_anew():
    metrics = RoutingMetrics(2)
    select(metrics, "cpu")
    twin = copy.deepcopy(metrics)
    assert twin.compute() == {}
    select(twin, "cpu")
    assert twin.compute() == metrics.compute()
