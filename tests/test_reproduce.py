"""The paper's experiments at a size that takes seconds, and the recipes against its tables."""

import json
import math
from dataclasses import replace

import pytest
from PIL import Image

from benchmarks.reproduce.__main__ import main
from benchmarks.reproduce.experiments import EXPERIMENTS, Claim, Variant
from benchmarks.reproduce.figures import draw
from benchmarks.reproduce.intervals import interval, verdict
from benchmarks.reproduce.page import PAGE, RESULTS, page, read_runs
from benchmarks.reproduce.presets import PRESETS, unrolled_depth
from benchmarks.reproduce.runs import config_of, run, steps_of
from mor.analysis import count_parameters
from mor.data.corpus import open_corpus

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("reproduce")]

SMOKE = PRESETS["smoke"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    lines = (f"line {number} counts {number * number}\n" for number in range(2000))
    (folder / "text.txt").write_text("".join(lines))
    return open_corpus(folder / "text.txt")


def smoke(name, corpus, output, seed=0):
    return run(EXPERIMENTS[name], SMOKE, seed, output, corpus=corpus, say=lambda line: None)


@pytest.fixture(scope="module")
def leak(corpus, tmp_path_factory):
    return smoke("leak", corpus, tmp_path_factory.mktemp("leak"))


def test_leak_is_the_gap_between_two_evaluations_of_one_model(leak):
    dense, *routed = leak["results"]
    assert dense["measured"] == {}
    for result in routed:
        measured = result["measured"]
        gap = result["validation_loss"] - measured["topk_loss"]
        assert measured["leak"] == pytest.approx(gap, abs=1e-6)
        assert measured["recursions_topk"] == pytest.approx(2, abs=0.1)  # 1 + 2/3 + 1/3
        assert 1 <= measured["recursions_causal"] <= 3


def test_variants_of_equal_flops_differ_by_less_than_a_step(leak):
    spent = [result["train_flops"] for result in leak["results"]]
    # The budget is of forward FLOPs, a third of the training's.
    assert spent == pytest.approx([3 * SMOKE.flops[-1]] * len(spent), rel=0.2)


@pytest.mark.parametrize("name", ["kv", "sharing", "capacity"])
def test_experiment_at_equal_tokens(name, corpus, tmp_path):
    values = smoke(name, corpus, tmp_path)
    assert {result["train_tokens"] for result in values["results"]} == {256}
    text = page({(name, "smoke"): [values]})
    assert text.count("| too few seeds |") == len(EXPERIMENTS[name].claims)
    draw([values], tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.width == 1200


@pytest.mark.slow
def test_isoflop(corpus, tmp_path):
    values = smoke("isoflop", corpus, tmp_path)
    assert len(values["results"]) == 2 * 3 * 7
    draw([values], tmp_path / "figure.png")


def test_isoflop_has_every_model_at_every_size_and_budget():
    variants = EXPERIMENTS["isoflop"].variants(PRESETS["tiny"])
    assert len({variant.name for variant in variants}) == 3 * 3 * 7
    names = {variant.name for variant in variants}
    claims = [claim for claim in EXPERIMENTS["isoflop"].claims if claim.lower[0] in names]
    assert len(claims) == 2 * 3
    assert all(claim.higher[0] in names for claim in claims)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_variant_is_a_valid_model(name, preset):
    for variant in EXPERIMENTS[name].variants(PRESETS[preset]):
        config = config_of(variant, PRESETS[preset], 300)
        assert steps_of(EXPERIMENTS[name], variant, PRESETS[preset], config) > 0


def test_a_killed_run_goes_on_to_the_same_losses(leak, corpus, tmp_path):
    lines = []

    def stop_after_two_turns(line):
        lines.append(line)
        if len(lines) == 2:
            raise KeyboardInterrupt

    experiment = EXPERIMENTS["leak"]
    with pytest.raises(KeyboardInterrupt):
        run(experiment, SMOKE, 0, tmp_path, corpus=corpus, say=stop_after_two_turns)
    changed = replace(SMOKE, learning_rate=1.0)
    with pytest.raises(ValueError, match="unfinished race with learning_rate"):
        run(experiment, changed, 0, tmp_path, corpus=corpus, say=print)
    resumed = smoke("leak", corpus, tmp_path)
    for mine, whole in zip(resumed["results"], leak["results"], strict=True):
        assert mine["validation_loss"] == whole["validation_loss"]
        assert mine["measured"] == whole["measured"]


@pytest.mark.parametrize(
    ("layers", "recursions", "sharing", "depth"),
    # The 135M and 360M models of the paper's section 4 and table 1.
    [(30, 3, "middle_cycle", 32), (32, 4, "middle_cycle", 34), (32, 3, "middle_cycle", 32),
     (24, 3, "middle_cycle", 26), (30, 2, "cycle", 30), (8, 3, "cycle", 9)],
)  # fmt: skip
def test_depths_are_rounded_up_as_in_the_paper(layers, recursions, sharing, depth):
    assert unrolled_depth(layers, recursions, sharing) == depth


@pytest.mark.parametrize("budget", [0, 1, 2])
@pytest.mark.parametrize("name", PRESETS["360m"].published_steps)
def test_our_count_of_steps_is_near_the_published_one(name, budget):
    kind, _, rest = name.partition("-")
    count, _, shared = rest.partition("-")
    router = {"recursive": None}.get(kind, kind)
    options = {"num_recursions": int(count or 1), "router": router}
    options |= {"kv_strategy": "shared"} if shared else {}
    variant = Variant("model", None if kind == "dense" else options, budget=budget)
    preset = PRESETS["360m"]
    config = config_of(variant, preset, preset.vocab_size)
    published = steps_of(EXPERIMENTS["isoflop"], variant, preset, config)
    ours = replace(preset, published_steps={})
    counted = steps_of(EXPERIMENTS["isoflop"], variant, ours, config)
    # We count attention over all keys where they are shared; they seem to count the active ones.
    assert counted == pytest.approx(published, rel=0.12 if shared else 0.08)
    share = preset.flops[budget] / preset.flops[-1]
    assert published == round(preset.published_steps[name] * share)


@pytest.mark.parametrize(("preset", "millions"), [("135m", 134.5), ("360m", 361.8)])
def test_dense_models_have_the_published_sizes(preset, millions):
    config = config_of(Variant("dense", None), PRESETS[preset], PRESETS[preset].vocab_size)
    assert count_parameters(config) / 1e6 == pytest.approx(millions, rel=0.005)


def test_intervals_and_verdicts():
    assert math.isnan(interval([1.0]).half_width)
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.half_width == pytest.approx(4.303 / math.sqrt(3))
    with pytest.raises(ValueError, match="expected at least one value"):
        interval([])
    assert verdict([1.0, 1.0], [2.0, 2.0]) == "too few seeds"
    assert verdict([1.0, 1.1, 0.9], [2.0, 2.1, 1.95]) == "reproduced"
    assert verdict([2.0, 2.1, 1.95], [1.0, 1.1, 0.9]) == "contradicted"
    assert verdict([1.0, 2.0, 3.0], [1.1, 1.9, 3.05]) == "not at this size"


def test_claims_name_variants_and_what_is_measured():
    for name, experiment in EXPERIMENTS.items():
        known = {v.name for preset in PRESETS.values() for v in experiment.variants(preset)}
        for claim in experiment.claims:
            assert isinstance(claim, Claim)
            assert {claim.lower[0], claim.higher[0]} <= known, name


def test_command_writes_json_figure_and_page(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.reproduce.runs.open_corpus", lambda *_, **__: corpus)
    for seed in ("0", "1"):
        main(["leak", "--preset", "smoke", "--seed", seed, "--output", str(tmp_path)])
    values = json.loads((tmp_path / "leak-smoke-seed1.json").read_text())
    assert values["settings"]["seed"] == 1
    assert len(read_runs(tmp_path)["leak", "smoke"]) == 2
    assert (tmp_path / "leak-smoke.png").stat().st_size > 5000
    assert "seeds 0, 1" in (tmp_path / "results.md").read_text()


def test_results_page_is_what_the_json_files_say():
    assert PAGE.read_text() == page(read_runs(RESULTS))
