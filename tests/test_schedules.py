"""Schedules over layers: the published ones, their means, and what they refuse."""

import math

import pytest

from mor.schedules import (
    Schedule,
    constant,
    cosine,
    interleave,
    linear,
    shifted_cosine,
    token_removals,
)

#: p-MoD's published ratios of the layers 8 to 23 of 32; those before are 1, those after 0.15.
PUBLISHED = (
    ".844 .806 .764 .720 .674 .625 .576 .525 .475 .424 .375 .326 .280 .236 .194 .156".split()
)


def test_the_published_p_mod_setting():
    schedule = shifted_cosine(32)
    assert schedule.values[:8] == (1.0,) * 8
    assert schedule.values[24:] == (0.15,) * 8
    assert [f"{value:.3f}".lstrip("0") for value in schedule.values[8:24]] == PUBLISHED
    assert schedule.mean == 0.5375
    assert schedule.budget == 17.2


def test_shapes():
    assert constant(3, 0.25).values == (0.25,) * 3
    assert linear(5, 1.0, 0.2).values == pytest.approx((1.0, 0.8, 0.6, 0.4, 0.2))
    halfway = cosine(5, 1.0, 0.2)
    assert halfway.values == pytest.approx(
        [0.6 + 0.4 * math.cos(math.pi * i / 4) for i in range(5)]
    )
    assert (halfway[0], halfway[4]) == (1.0, 0.2)
    assert interleave(5, 0.125).values == (1.0, 0.125, 1.0, 0.125, 1.0)
    assert interleave(6, 0.2, every=3, offset=0).values == (0.2, 1.0, 1.0, 0.2, 1.0, 1.0)
    assert linear(1, 0.5, 0.2).values == cosine(1, 0.5, 0.2).values == (0.5,)
    assert Schedule([1.0, 0.5]).values == (1.0, 0.5)
    assert Schedule([1.0, 0.5]) == Schedule((1.0, 0.5))
    assert hash(Schedule([1.0]))


def test_clamping_is_what_shifts_the_shifted_cosine():
    by_hand = linear(32, 0.99, 0.01).clamped(0.15, 0.85)
    assert by_hand[0] == 1.0
    assert by_hand[31] == 0.15
    assert by_hand[16] == linear(32, 0.99, 0.01)[16]


def test_tokens_that_tome_removes():
    assert token_removals(12, 13, -1).values == (26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0)
    assert token_removals(4, 8).values == (8,) * 4
    assert token_removals(3, 8, 1).values == (0, 8, 16)
    assert token_removals(12, 8).budget == 96


def test_it_prints_itself_its_mean_and_its_budget():
    lines = str(interleave(4, 0.2)).splitlines()
    assert lines[0] == "interleave(0.2, every=2, offset=1), share of the tokens"
    assert lines[1:5] == ["layer 0: 1", "layer 1: 0.2", "layer 2: 1", "layer 3: 0.2"]
    assert lines[5] == "mean 0.6, budget 2.4"
    assert str(token_removals(2, 3)).startswith("token_removals(3, inflect=0), tokens merged")


def test_it_plots_itself(tmp_path):
    pytest.importorskip("matplotlib")
    shifted_cosine(32).plot(tmp_path / "schedule.png")
    assert (tmp_path / "schedule.png").read_bytes().startswith(b"\x89PNG")


def test_bad_schedules():
    for wrong, words in (
        (lambda: Schedule([]), "values: expected one for each layer, got none"),
        (lambda: Schedule([1.0, 0.0]), r"ratios in \(0, 1\], got 0.0 for layer 1"),
        (lambda: Schedule([math.nan]), r"ratios in \(0, 1\], got nan for layer 0"),
        (lambda: Schedule([1.0], unit="share"), "unit: expected 'share of the tokens', 'tokens"),
        (lambda: Schedule([1.5], unit="tokens merged"), "integers from 0, got 1.5 for layer 0"),
        (lambda: constant(2, 1.5), r"ratios in \(0, 1\], got 1.5"),
        (lambda: constant(0, 0.5), "got none"),
        (lambda: shifted_cosine(8, lowest=0.9), "shifted_cosine: expected 0 < lowest <= highest"),
        (lambda: constant(2, 0.5).clamped(0, 1), "clamped: expected 0 < lowest"),
        (lambda: interleave(4, 0.5, every=0), "got every=0, offset=1"),
        (lambda: interleave(4, 0.5, offset=2), "0 <= offset < every, got every=2, offset=2"),
        (lambda: token_removals(4, -1), "token_removals: expected r >= 0"),
        (lambda: token_removals(4, 2, 1.5), "inflect=1.5"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()
