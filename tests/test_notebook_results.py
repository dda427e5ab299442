"""The notebooks behind the first one show what they say, when they are run for seconds."""

import pytest

import mor.ops
from mor.schedules import shifted_cosine
from tests.support.notebooks import FOLDER, executed, outputs

pytestmark = pytest.mark.notebook


@pytest.fixture
def report_of(tmp_path):
    """Executes a notebook in an empty folder: the notebook and a value of its own process."""

    def run(name, report, budget=None):
        return executed(FOLDER / f"{name}.ipynb", tmp_path, report, budget)

    return run


def has_figure(notebook, cell_id):
    return any("image/png" in output.get("data", {}) for output in outputs(notebook, cell_id))


def test_router_notebook_shows_the_leak_of_ranking(report_of):
    notebook, report = report_of(
        "what_the_router_does",
        """{
        "losses": {router: [line["loss"] for line in lines] for router, lines in history.items()},
        "metrics": metrics, "changes": changes, "own_depths": own_depths, "by_kind": by_kind,
        "pieces": "".join(pieces), "text": TEXT,
        "leak": {name: values.mean().item() for name, values in leak.items()},
        "difference": difference.mean().item(),
        }""",
        budget=0.1,
    )
    for losses in report["losses"].values():
        assert losses[-1] < losses[0] - 1
    for metrics in report["metrics"].values():
        assert metrics["selected_share_1"] == 1
        shares = [metrics[f"selected_share_{r}"] for r in (1, 2, 3)]
        assert metrics["mean depth"] == pytest.approx(sum(shares), abs=1e-3)
    for name in ("expert-choice, threshold", "token-choice"):
        change, moved = report["changes"][name]
        assert change < 1e-3, name
        assert moved == 0, name
    change, moved = report["changes"]["expert-choice, top-k"]
    assert change > 0.01
    assert moved > 0.01
    leak = report["leak"]
    parts = leak["top-k of what was written"] - leak["top-k of the row"]
    assert report["difference"] == pytest.approx(parts, abs=1e-4)
    assert report["pieces"] == report["text"]
    for depths in report["own_depths"].values():
        assert set(depths) <= {1, 2, 3}
    assert len(report["by_kind"]) > 3
    for cell_id in ("plot", "classes-plot", "positions", "leak-plot", "own-text"):
        assert has_figure(notebook, cell_id)


def test_conversion_notebook_recovers_what_the_conversion_lost(report_of, tmp_path):
    notebook, report = report_of(
        "convert_smollm2",
        """{
        "identity_error": identity_error, "load_error": load_error, "savings": savings,
        "curves": curves, "dense_curve": dense_curve, "dense": dense_perplexity,
        "candidates": list(candidates), "routing": routing,
        }""",
        budget=0.4,
    )
    assert report["identity_error"] < 1e-3
    assert report["load_error"] == 0
    assert all(0.3 < ratio < 1 for ratio in report["savings"].values())
    assert report["dense"] < report["dense_curve"][0][1] / 2
    assert len(report["candidates"]) == 6
    for name in report["candidates"]:
        curve = report["curves"][name]
        assert curve[0][1] > report["dense"], name  # something was lost
        assert curve[-1][1] < curve[0][1], name
    assert report["routing"]["selected_share_1"] == 1
    assert has_figure(notebook, "curves")
    saved = tmp_path / "runs" / "convert_smollm2" / "converted"
    assert (saved / "model.safetensors").exists()


def test_swap_notebook_changes_nothing_first_and_learns_then(report_of):
    notebook, report = report_of(
        "swap_one_layer",
        """{
        "swap_error": swap_error, "remove_error": remove_error, "load_error": load_error,
        "parameters": parameters, "losses": losses, "depths": depths.unique().tolist(),
        "results": results,
        }""",
        budget=0.15,
    )
    assert report["swap_error"] < 1e-3
    assert report["remove_error"] == 0
    assert report["load_error"] == 0
    before, after = report["parameters"]
    assert after == before + 2 * 96  # a linear router for each recursion
    losses = report["losses"]
    assert losses["swapped, trained"] < losses["swapped, before training"]
    assert set(report["depths"]) <= {1, 2}
    depths = {name: depth for name, (_, depth, _) in report["results"].items()}
    assert depths["no router, once"] == 1
    assert depths["no router, 3 times"] == 3
    assert all(1 <= depth <= 3 for depth in depths.values())
    assert has_figure(notebook, "variants")


def test_operator_notebook_calls_every_operator(report_of):
    notebook, report = report_of(
        "operators",
        '{"differences": differences, "gradients": gradients, "messages": messages, '
        '"medians": medians}',
    )
    assert set(report["differences"]) == set(mor.ops.__all__)
    assert max(report["differences"].values()) < 1e-5
    assert len(report["gradients"]) == 5
    assert all(report["gradients"].values())
    names = [message.partition(":")[0] for message in report["messages"]]
    assert names == ["packed_linear", "gather_tokens", "route_topk"]
    assert all(len(values) == 3 for values in report["medians"].values())
    assert has_figure(notebook, "timing")


def test_serving_notebook_answers_as_generate_does(report_of):
    notebook, report = report_of(
        "serving",
        """{
        "tokens": [list(one.token_ids) for one in outputs], "alone": alone,
        "mean_depths": list(mean_depths.values()), "streamed": streamed, "choice": choice,
        "greedy": outputs[0].text, "alive": thread.is_alive(), "buckets": depth_lines,
        "reasons": [one.finish_reason for one in several], "stopped": several[2].text,
        "speeds": {n: [p.tokens_per_second for p in made] for n, made in predictions.items()},
        }""",
        budget=0.1,
    )
    assert report["tokens"] == report["alone"]
    first, second, free = report["mean_depths"]
    assert first == 1
    assert first <= second <= free <= 3
    assert len(report["streamed"]["left early"]) == 4
    assert len(report["streamed"]["whole"]) >= 4
    assert report["reasons"][:2] == ["length", "length"]
    assert "\n" not in report["stopped"]
    assert len(report["choice"]["depths"]) == 12
    assert max(report["choice"]["depths"]) <= 2
    assert report["buckets"]
    assert not report["alive"]
    shallow, _, deep = report["speeds"].values()
    assert all(a > b for a, b in zip(shallow, deep, strict=True))
    assert shallow == sorted(shallow)
    for cell_id in ("depths-picture", "simulate"):
        assert has_figure(notebook, cell_id)


def test_sister_notebook_takes_every_system_off_again(report_of):
    notebook, report = report_of(
        "sister_systems",
        """{
        "summary": summary, "losses": losses, "start": start, "found": list(found.values()),
        "vision_shares": vision_shares.tolist(), "text": took[:, ~is_vision].min().item(),
        "experts": experts, "active": [x.max().item() for x in active],
        }""",
        budget=0.15,
    )
    assert len(report["summary"]) == 4
    for name, (share, error) in report["summary"].items():
        assert 0 < share < 1, name
        assert error == 0, name
    assert abs(report["start"]) < 1e-4  # experts begin as the MLP
    active = zip(report["active"], report["experts"], strict=True)
    assert all(most <= count for most, count in active)
    kept, accuracy = zip(*report["found"], strict=True)
    assert list(kept) == sorted(kept, reverse=True)
    assert kept[0] == 1
    assert accuracy[0] > 0.2
    ratios = [int(ratio * 36) / 36 for ratio in shifted_cosine(8)]
    assert report["vision_shares"] == pytest.approx(ratios)
    assert report["text"] == 1
    for cell_id in ("plot-schedules", "mod-picture", "apply-dynamoe", "merge", "pmod"):
        assert has_figure(notebook, cell_id)
