"""Pages and plots: what they show, and that any text is shown as text."""

from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from mor.viz import depth_page, plot_depth_by_position, plot_loss_against_flops, token_pieces


class _Spans(HTMLParser):
    """Collects the tags of a page and, for each token's span, its classes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.tokens: list[list[str]] = []
        self.in_text = self.in_token = False

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        attributes = dict(attributes)
        assert not {"src", "href", "onclick", "onload", "onerror"} & attributes.keys()
        self.in_text |= tag == "pre"
        if tag == "span" and self.in_text:
            self.in_token = True
            self.tokens.append([attributes["class"], attributes["title"], ""])

    def handle_endtag(self, tag):
        self.in_text &= tag != "pre"
        self.in_token &= tag != "span"

    def handle_data(self, data):
        if self.in_token:
            self.tokens[-1][2] += data


def _parse(page: str) -> _Spans:
    parser = _Spans()
    parser.feed(page)
    return parser


def test_page_shows_each_token_with_its_depth():
    parser = _parse(depth_page(["def", " f", "():\n"], [1, 3, 2]))
    assert parser.tokens == [["t d1", "1", "def"], ["t d3", "3", " f"], ["t d2", "2", "():\n"]]


def test_page_escapes_text_title_and_intro():
    nasty = "<script>alert('x')</script>&\""
    page = depth_page([nasty, "</pre><img src=x>"], [1, 2], title=nasty, intro=nasty)
    parser = _parse(page)
    assert not {"script", "img"} & parser.tags
    assert [text for _, _, text in parser.tokens] == [nasty, "</pre><img src=x>"]


def test_page_legend_counts_the_depths():
    page = depth_page(list("abcd"), [1, 1, 1, 3])
    assert "1 (75%)" in page
    assert "2 (0%)" in page
    assert "3 (25%)" in page


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_are_readable_and_ordered():
    from mor.viz import _COLOURS

    backgrounds = [_luminance(background) for background, _ in _COLOURS]
    assert backgrounds == sorted(backgrounds, reverse=True)
    for background, foreground in _COLOURS:
        light, dark = sorted((_luminance(background), _luminance(foreground)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 7


@pytest.mark.parametrize(
    ("pieces", "depths", "message"),
    [
        (["a"], [1, 2], "one depth for each of 1 tokens, got 2"),
        (["a"], [6], "from 0 to 5, got 6"),
        (["a"], [-1], "from 0 to 5, got -1"),
    ],
)
def test_page_refuses_depths_that_do_not_fit(pieces, depths, message):
    with pytest.raises(ValueError, match=message):
        depth_page(pieces, depths)


def test_empty_page():
    assert _parse(depth_page([], [])).tokens == []


def test_pieces_of_tokens_that_share_a_character_join_to_the_text():
    # "é" split into its two bytes: both tokens have the offsets of the whole character.
    assert token_pieces("aéb", [(0, 1), (1, 2), (1, 2), (2, 3)]) == ["a", "é", "", "b"]


def test_loss_plot_is_a_picture_with_both_curves(tmp_path):
    path = tmp_path / "loss.png"
    plot_loss_against_flops({"MoR": ([1e12, 2e12], [5.0, 4.0]), "dense": ([1e12], [4.5])}, path)
    with Image.open(path) as image:
        assert image.size == (1200, 675)
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10


def test_depth_plot_takes_padding_and_any_length(tmp_path):
    for length in (1, 3, 200):
        depths = torch.randint(1, 4, (2, length))
        depths[1, length // 2 + 1 :] = 0
        plot_depth_by_position(depths, tmp_path / f"{length}.png")
        assert (tmp_path / f"{length}.png").stat().st_size > 5000


@pytest.mark.parametrize("depths", [torch.ones(3, dtype=torch.int64), torch.zeros(1, 2).long()])
def test_depth_plot_refuses_what_has_no_tokens(depths, tmp_path):
    with pytest.raises(ValueError, match="expected depths of shape"):
        plot_depth_by_position(depths, tmp_path / "x.png")
