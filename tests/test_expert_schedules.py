"""Expert schedules: their shapes, and equal totals."""

import pytest

import mor.modules
from mor.schedules import EXPERT_SCHEDULES, EXPERTS, Schedule, expert_schedule


def test_a_schedule_of_experts_was_a_bare_tuple() -> None:
    """Every other schedule prints itself with its mean and budget."""
    schedule = expert_schedule("descending", 3, 1, 5)
    assert str(schedule).splitlines() == [
        "descending(1, 5), experts", "layer 0: 5", "layer 1: 3", "layer 2: 1", "mean 3, budget 9",
    ]  # fmt: skip
    assert (schedule.unit, schedule.budget) == (EXPERTS, 9)
    assert mor.modules.expert_schedule is expert_schedule  # the earlier place
    with pytest.raises(ValueError, match="expected integers from 1, got 0 for layer 1"):
        Schedule((1, 0), unit=EXPERTS)


def test_shapes() -> None:
    got = {kind: expert_schedule(kind, 5, 1, 9).values for kind in EXPERT_SCHEDULES}
    assert got == {
        "descending": (9, 7, 5, 3, 1),
        "ascending": (1, 3, 5, 7, 9),
        "pyramid": (1, 5, 9, 5, 1),
        "valley": (9, 5, 1, 5, 9),
        "wave": (5, 9, 5, 1, 5),
        "uniform": (5, 5, 5, 5, 5),
    }


@pytest.mark.parametrize("kind", EXPERT_SCHEDULES)
def test_totals_are_met_with_at_least_one_expert_each(kind: str) -> None:
    for num_layers in (1, 2, 3, 12, 32):
        for total in (num_layers, num_layers + 1, 5 * num_layers):
            counts = expert_schedule(kind, num_layers, total=total)
            assert counts.budget == total
            assert min(counts) >= 1
    assert expert_schedule(kind, 3, total=3).values == (1, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quadratic", 4), "expert_schedule: kind: expected one of .*'wave'.*, got 'quadratic'"),
        (("wave", 0), "expert_schedule: num_layers: expected at least 1, got 0"),
        (("wave", 4, 3, 2), "expert_schedule: low, high: expected 1 <= low <= high, got 3 and 2"),
        (("wave", 4, 0, 2), "expert_schedule: low, high: expected 1 <= low <= high, got 0 and 2"),
    ],
)
def test_bad_options(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expert_schedule(*arguments)
    with pytest.raises(ValueError, match="total: expected at least one expert for each of the 4"):
        expert_schedule("wave", 4, total=3)
