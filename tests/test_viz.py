"""Pages and plots: what they show, and that any text is shown as text."""

from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from mor.analysis.depth_page import COLOURS
from mor.analysis.plots import (
    depth_page,
    plot_depth_by_position,
    plot_loss_against_cost,
    plot_loss_against_flops,
    plot_router_scores,
    plot_text_by_depth,
    router_scores,
    token_pieces,
)
from tests.models.conftest import small_model


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
    backgrounds = [_luminance(background) for background, _ in COLOURS]
    assert backgrounds == sorted(backgrounds, reverse=True)
    for background, foreground in COLOURS:
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


def test_page_without_an_intro_has_no_empty_paragraph():
    assert "<p></p>" not in depth_page(["a"], [1])
    assert "<p>so</p>" in depth_page(["a"], [1], intro="so")


def test_pictures_make_their_folder(tmp_path):
    path = tmp_path / "new" / "folder" / "x.png"
    plot_text_by_depth(["a"], [1], path)
    assert path.exists()


def test_a_word_of_several_tokens_has_no_gaps(tmp_path):
    """A column was wider than a character: each token began behind a small gap."""
    plot_text_by_depth(["m" * 60], [1], tmp_path / "one.png", columns=60)
    plot_text_by_depth(["m" * 3] * 20, [1] * 20, tmp_path / "many.png", columns=60)
    dark = []
    for name in ("one.png", "many.png"):
        with Image.open(tmp_path / name) as image:
            text = image.convert("L").crop((0, 0, image.width, image.height // 3))
            columns = torch.from_numpy(np.array(text)).amin(0)
        dark.append(columns < 128)
    first, last = dark[0].nonzero()[[0, -1], 0].tolist()
    assert abs(dark[1].nonzero()[-1].item() - last) <= 2
    assert last - first > 0.9 * dark[0].numel()


def test_score_histogram_of_several_windows_counts_them_all(tmp_path):
    model = small_model().eval()
    with torch.no_grad():
        routings = [model(torch.arange(3, 23).reshape(1, 20)).routing for _ in range(2)]
    plot_router_scores(routings, tmp_path / "two.png")
    plot_router_scores(routings[0], tmp_path / "one.png")
    assert (tmp_path / "two.png").read_bytes() != (tmp_path / "one.png").read_bytes()


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


def test_cost_plot_has_two_panels_and_room_for_its_note(tmp_path):
    curves = {"MoR": [(1e12, 5.0, 5.0), (2e12, 9.0, 4.0)], "dense": [(1e12, 6.0, 4.5)]}
    plot_loss_against_cost(curves, tmp_path / "bare.png")
    plot_loss_against_cost(curves, tmp_path / "noted.png", note="Held equal: " + "the text, " * 20)
    pictures = [Image.open(tmp_path / name).convert("L") for name in ("bare.png", "noted.png")]
    assert [picture.size for picture in pictures] == [(1200, 750)] * 2
    assert len({picture.crop((0, 690, 1200, 750)).tobytes() for picture in pictures}) == 2


def test_svg_carried_the_date_it_was_drawn(tmp_path):
    """So that the committed figures changed whenever their page was written."""
    plot_loss_against_cost({"dense": [(1.0, 1.0, 3.0), (2.0, 2.0, 2.0)]}, tmp_path / "loss.svg")
    assert "<dc:date>" not in (tmp_path / "loss.svg").read_text(encoding="utf-8")


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


def _colours(path) -> dict[tuple[int, int, int], int]:
    with Image.open(path) as image:
        return {colour: count for count, colour in image.convert("RGB").getcolors(1 << 24)}


def _rgb(colour: str) -> tuple[int, int, int]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def test_text_figure_has_an_area_of_colour_for_each_token(tmp_path):
    pieces, depths = ["def", " f():\n", "\t$x^2$", " é_{"], [1, 3, 2, 1]
    plot_text_by_depth(pieces, depths, tmp_path / "a.png", columns=20)
    plot_text_by_depth(pieces, [1, 1, 1, 1], tmp_path / "b.png", columns=20)
    mixed, plain = _colours(tmp_path / "a.png"), _colours(tmp_path / "b.png")
    for depth in (2, 3):
        assert mixed[_rgb(COLOURS[depth][0])] > 1000
        assert _rgb(COLOURS[depth][0]) not in plain
    assert plain[_rgb(COLOURS[1][0])] > 1.3 * mixed[_rgb(COLOURS[1][0])] > 1000
    # A depth has as much area as its tokens have characters; the text itself covers some of it.
    area = {depth: mixed[_rgb(COLOURS[depth][0])] for depth in (2, 3)}
    assert area[2] / area[3] == pytest.approx(9 / 5, rel=0.4)


def test_text_figure_breaks_lines():
    from mor.analysis.plots import _text_boxes

    boxes, rows = _text_boxes(["abc", "de\n", "", "\nfghij", "k"], [1, 2, 1, 3, 2], 4)
    assert boxes == [
        (0, 0, "abc", 1),
        (0, 3, "d", 2),
        (1, 0, "e", 2),
        (3, 0, "fghi", 3),
        (4, 0, "j", 3),
        (4, 1, "k", 2),
    ]
    assert rows == 5


@pytest.mark.parametrize(
    ("depths", "columns", "message"),
    [([1, 2], 80, "one depth for each"), ([7], 80, "from 0 to 5"), ([1], 0, "at least one column")],
)
def test_text_figure_refuses(depths, columns, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plot_text_by_depth(["a"], depths, tmp_path / "x.png", columns=columns)


@pytest.mark.parametrize("options", [{"router": "expert"}, {"router_aux": "router"}], ids=str)
def test_expert_scores_above_the_threshold_are_those_taken(options):
    model = small_model(**options).eval()
    with torch.no_grad():
        routing = model(torch.arange(3, 83).reshape(2, 40)).routing
    scores = router_scores(routing)
    assert [len(values) for values, _ in scores] == [80, 80, int(scores[1][1].sum())]
    assert scores[0][1].all()  # capacity 1
    for r, (values, taken) in enumerate(scores):
        assert int(taken.sum()) == int((routing.depths > r).sum()) > 0
        if r:
            assert torch.equal(values > 0.5, taken)
            assert not taken.all()


def test_token_scores_are_shares_and_the_largest_is_taken():
    model = small_model(router="token").eval()
    with torch.no_grad():
        routing = model(torch.arange(3, 83).reshape(2, 40)).routing
    values = torch.stack([values for values, _ in router_scores(routing)])
    taken = torch.stack([taken for _, taken in router_scores(routing)])
    torch.testing.assert_close(values.sum(0), torch.ones(80))
    assert (taken.sum(0) == 1).all()
    assert torch.equal(values.argmax(0), taken.long().argmax(0))


@pytest.mark.parametrize("router", ["expert", "token"])
def test_score_histogram_is_a_picture_with_both_groups(router, tmp_path):
    model = small_model(router=router)  # in training too, where gradients are attached
    plot_router_scores(model(torch.arange(3, 83).reshape(2, 40)).routing, tmp_path / "x.png")
    colours = _colours(tmp_path / "x.png")
    assert min(colours[_rgb(COLOURS[4][0])], colours[_rgb(COLOURS[2][0])]) > 1000


def test_score_histogram_needs_a_router(tmp_path):
    model = small_model(router=None)
    with pytest.raises(ValueError, match="with a router, got one without"):
        plot_router_scores(model(torch.arange(3, 23).reshape(1, 20)).routing, tmp_path / "x.png")
