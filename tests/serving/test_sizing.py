"""Sizing: by hand where passes take one time each, and the command `mor analyze`."""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
)
from typer.testing import CliRunner

from mor import MoRConfig, MoRForCausalLM, swap
from mor.cli import app
from mor.serving import Engine, SamplingParams, sizing
from mor.serving.curves import measure_curves
from mor.serving.forward import PackedModel
from mor.serving.sizing import Load, Timing
from mor.serving.timing import model_shape

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 8,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
BASE = LlamaConfig(**SHAPE)


def shape_of(config) -> dict:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model_shape(PackedModel(model.eval()))


#: A block pass takes 1 s, an enter pass 0.25 s, an exit pass 0.75 s; each key adds 0.001 s.
FLAT = Timing(
    shape_of(MoRConfig(base_config=BASE, num_recursions=3)), "cpu", "float32", 1,
    {name: [(1, s), (1000, s)] for name, s in (("block", 1.0), ("enter", 0.25), ("ends", 1.0))},
    {"block": 0.001, "enter": 0.0, "ends": 0.0},
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of a configuration alone: sizing needs no weights."""
    folder = tmp_path_factory.mktemp("model")
    MoRConfig(base_config=BASE, num_recursions=3).save_pretrained(folder)
    return folder


def test_one_row_at_a_time_is_computed_by_hand(folder):
    engine = sizing.sizing_engine(folder, 1, timing=FLAT)
    found = sizing.size_server(engine, FLAT, Load(4, 2, (0, 0, 1, 0)), 1, policy="lock-step")
    # Enter, two recursions, exit; then the same of the token that was sampled. Keys: rows of the
    # prompt see 1 to 4 of them, the next token 5, in each recursion.
    seconds = 2 * (0.25 + 2 * 1.0 + 0.75) + 0.001 * 2 * (1 + 2 + 3 + 4 + 5)
    assert found.requests_per_second == pytest.approx(1 / seconds, rel=0.01)
    assert found.tokens_per_second == pytest.approx(2 / seconds, rel=0.01)
    assert found.inter_token[0] == pytest.approx(3.0 + 0.001 * 2 * 5)
    assert found.first_token[0] >= 3.0
    # Blocks of 16 tokens for two recursions, and one of the ends.
    assert found.kv_bytes == 3 * engine.pool.block_bytes
    assert (found.replicas, found.preemptions) == (None, 0)


@pytest.mark.parametrize("policy", ["auto", "lock-step", 0.5])
def test_a_simulation_had_curves_that_its_engine_has_not(folder, monkeypatch, policy):
    """They bound the prompts beside sequences that decode, so lock-step seemed slower."""
    given: list[dict] = []

    def simulate(*arguments, **options):
        given.append(options)
        return real(*arguments, **options)

    real = sizing.simulate
    monkeypatch.setattr(sizing, "simulate", simulate)
    engine = sizing.sizing_engine(folder, 2, timing=FLAT)
    sizing.size_server(engine, FLAT, Load(4, 2, (0, 0, 1, 0)), 2, policy=policy)
    model = MoRForCausalLM(AutoConfig.from_pretrained(folder)).eval()
    served = Engine(model, kv_memory="256KiB", max_rows=2, policy=policy).scheduler_options
    for options in given:
        assert options["policy"] == served["policy"]
        for name in ("block_seconds", "ends_seconds"):
            assert bool(options[name]) == bool(served[name]) == (policy == "auto")


def test_replicas_are_as_many_as_keep_each_below_four_fifths(folder):
    engine = sizing.sizing_engine(folder, 8, timing=FLAT)
    load = Load(4, 2, (0, 0.5, 0.25, 0.25))
    one = sizing.size_server(engine, FLAT, load, 8)
    rate = 2.5 * one.requests_per_second
    found = sizing.size_server(engine, FLAT, load, 8, rate=rate)
    assert found.replicas == 4  # three would be loaded with 0.83
    assert found.rate == pytest.approx(rate / 4)
    assert found.requests_per_second == one.requests_per_second


def test_scarce_memory_costs_preemptions_and_throughput(folder):
    free = sizing.sizing_engine(folder, 8, timing=FLAT)
    blocks = free.pool.block_bytes * 20  # a request of 60 tokens takes up to 16
    scarce = sizing.sizing_engine(folder, 8, timing=FLAT, kv_memory=f"{blocks / 1024}KiB")
    load = Load(20, 40, (0, 1 / 3, 1 / 3, 1 / 3))
    best = sizing.size_server(free, FLAT, load, 8)
    found = sizing.size_server(scarce, FLAT, load, 8, limited=True)
    assert found.kv_bytes <= blocks < best.kv_bytes
    assert found.tokens_per_second < 0.5 * best.tokens_per_second
    tiny = sizing.sizing_engine(folder, 8, timing=FLAT, kv_memory=free.pool.block_bytes * 3)
    with pytest.raises(ValueError, match=r"kv_memory: .* got 3 of its 16 blocks"):
        sizing.size_server(tiny, FLAT, load, 8, limited=True)
    with pytest.raises(ValueError, match="at most 64 tokens of prompt and answer"):
        sizing.size_server(free, FLAT, Load(40, 40, load.depths), 8)


class Peak(Engine):
    """Keeps the most blocks that were in use at once."""

    blocks = 0

    def _prepare_blocks(self, plan):
        stats = self.scheduler.stats()
        self.blocks = max(self.blocks, stats.blocks - stats.blocks_free)
        super()._prepare_blocks(plan)


#: A dense model all of whose layers see the last 8 tokens.
WINDOWED = MistralConfig(**SHAPE, sliding_window=8)


@pytest.mark.usefixtures("one_thread")
def test_keys_and_values_outside_of_a_window_were_thought_freed(tmp_path):
    """The engine keeps them; what is predicted is what it has in use, to the block."""
    WINDOWED.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(WINDOWED).eval()
    options = {"max_rows": 4, "policy": "lock-step", "prefix_cache": False, "chunk": 128}
    engine = Peak(model, kv_memory="1MiB", **options)
    prompts = torch.randint(1, 64, (4 * 4 + 40, 40)).tolist()
    engine.generate(prompts, SamplingParams(max_tokens=20, temperature=0, ignore_eos=True))
    timing = replace(FLAT, model=shape_of(WINDOWED))
    sizing_only = sizing.sizing_engine(tmp_path, 4, timing=timing)
    load = Load(40, 20, (0, 1))
    found = sizing.size_server(sizing_only, timing, load, 4, policy="lock-step")
    assert found.kv_bytes == engine.blocks * engine.pool.block_bytes
    # 59 tokens in 6 layers, in blocks of 16; and in the two of the ends, in blocks of 48.
    assert engine.blocks == 4 * (4 + 2)


def test_attention_took_time_for_keys_outside_of_a_window(tmp_path):
    WINDOWED.save_pretrained(tmp_path)
    seconds = {"block": 0.001, "enter": 0.001, "ends": 0.002}
    timing = replace(FLAT, model=shape_of(WINDOWED), key_seconds=seconds)
    engine = sizing.sizing_engine(tmp_path, 1, timing=timing)
    found = sizing.size_server(engine, timing, Load(40, 2, (0, 1)), 1, policy="lock-step")
    # Enter, block and exit of the second token, each with 8 keys.
    assert found.inter_token[0] == pytest.approx(0.25 + 1.0 + 0.75 + 3 * 0.001 * 8)


@pytest.mark.parametrize(
    ("config", "depths"),
    [
        (MoRConfig(base_config=BASE, num_recursions=3, capacities=[0.8, 0.5, 0.1]),
         (0.2, 0.3, 0.4, 0.1)),
        (MoRConfig(base_config=BASE, num_recursions=3, router="token"), (0, 1 / 3, 1 / 3, 1 / 3)),
        (MoRConfig(base_config=BASE, num_recursions=3, router=None), (0, 1)),
        (BASE, (0, 1)),
    ],
    ids=["expert", "token", "recursive", "dense"],
)  # fmt: skip
def test_depths_are_what_the_configuration_plans(config, depths):
    assert sizing.expected_depths(config) == pytest.approx(depths)


def test_counts_of_tokens_make_shares():
    assert sizing.depth_shares([0, 6, 2, 0], 3) == (0, 0.75, 0.25, 0)
    for wrong in ([1, 1], [0, 0, 0, 0], [0, -1, 1, 1], [0, float("inf"), 0, 0]):
        with pytest.raises(ValueError, match="depths: expected shares or counts"):
            sizing.depth_shares(wrong, 3)


def test_curves_are_measured_with_context_in_and_out_of_a_window():
    for base in (BASE, WINDOWED):
        model = MoRForCausalLM(MoRConfig(base_config=base, num_recursions=3)).eval()
        engine = Engine(model, kv_memory="64KiB", policy="lock-step", max_rows=3, chunk=10)
        timing = Timing.measure(engine)
        for curve in timing.curves.values():
            assert [rows for rows, _ in curve] == [1, 2, 4, 8, 13]
        assert min(timing.key_seconds.values()) >= 0
        far = measure_curves(engine.packed, engine.pool, engine.states, 2, context=40)
        assert all(seconds > 0 for curve in far.values() for _, seconds in curve)
        engine.check()


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["analyze", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_measures_once_and_predicts_from_that(folder, tmp_path, monkeypatch):
    load = ["--serving", "--rows", "2", "--prompt-tokens", 8, "--new-tokens", 4]
    code, output, _ = run(folder, *load, "--json")
    assert code == 0
    found = json.loads(output)
    assert found["timing"]["dtype"] == "float32"
    assert found["timing"]["model"] == FLAT.model
    assert found["timing"]["threads"] == torch.get_num_threads()
    assert found["servers"][0]["tokens_per_second"] > 0
    saved = tmp_path / "timing.json"
    saved.write_text(output)
    monkeypatch.setattr(sizing.Timing, "measure", None)
    again = json.loads(run(folder, *load, "--json", "--timing", saved)[1])
    assert again == found
    options = ["--timing", saved, "--rate", 1e4, "--depths", "0,5,3,2", "--kv-memory", "1MiB"]
    code, table, _ = run(folder, *load, *options)
    assert code == 0
    assert "50% at 1, 30% at 2, 20% at 3" in table
    assert "replicas" in table
    code, costs, _ = run(folder)
    assert code == 0
    assert "MFLOP" in costs
    assert "server" not in costs


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rows", "2,x"], "--rows: expected numbers"),
        (["--rows", "0"], "--rows: expected numbers >= 1"),
        (["--rate", "-1"], "--rate: expected requests per second > 0"),
        (["--device", "tpu"], "--device: expected cpu or cuda"),
        (["--policy", "best"], "--policy: expected auto"),
        (["--dtype", "int8"], "dtype: expected auto or one of float32"),
        (["--depths", "1,2"], "depths: expected shares or counts"),
        (["--timing", "README.md"], "README.md: expected what mor analyze"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_is_one_sentence(folder, tmp_path, options, words):
    (tmp_path / "timing.json").write_text(json.dumps({"timing": asdict(FLAT)}))
    timing = ["--timing", tmp_path / "timing.json"] if "--dtype" not in options else []
    code, _, error = run(folder, "--serving", *timing, *options)
    assert code == 2
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("timing", "options", "words"),
    [
        (replace(FLAT, model=FLAT.model | {"hidden_size": 64, "router": "token"}), [],
         "timing: expected times of this model, with hidden_size 32, router expert, got those of "
         "one with hidden_size 64, router token"),
        (FLAT, ["--dtype", "bfloat16"], "dtype: expected float32, of which the times are"),
        (FLAT, ["--device", "cuda"], "--device: expected cpu, on which"),
        ({name: value for name, value in asdict(FLAT).items() if name != "model"}, [],
         "expected what mor analyze --serving --json printed"),
    ],
    ids=["model", "dtype", "device", "nameless"],
)  # fmt: skip
def test_times_of_another_model_were_taken(folder, tmp_path, timing, options, words):
    path = tmp_path / "timing.json"
    path.write_text(json.dumps({"timing": timing if isinstance(timing, dict) else asdict(timing)}))
    code, _, error = run(folder, "--serving", "--timing", path, *options)
    assert code == 2
    assert words in error


@pytest.mark.parametrize("options", [[], ["--serving"]], ids=["costs", "serving"])
def test_a_swapped_model_was_of_an_unknown_architecture(tmp_path, options):
    swap(LlamaForCausalLM(LlamaConfig(**SHAPE)), (1, 7), num_recursions=3).save_pretrained(tmp_path)
    code, _, error = run(tmp_path, *options)
    assert code == 2
    assert error == (
        f"mor: expected a MoR or a dense model, got one that swap changed in {tmp_path}; analyzed "
        "and served is what mor convert makes of the dense model\n"
    )


@pytest.mark.parametrize(
    "option",
    ["--dtype float32", "--depths 0,1,1,1", "--rows 2", "--rate 5", "--policy lock-step",
     "--kv-memory 1GiB", "--device cpu", "--timing timing.json"],
)  # fmt: skip
def test_an_option_of_serving_was_swallowed_without_it(folder, option):
    code, _, error = run(folder, *option.split())
    assert code == 2
    assert error == f"mor: {option.split()[0]}: expected --serving beside it, got none\n"


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_prediction_is_near_what_the_engine_takes(monkeypatch):
    """Prompts and answers, in the processor's time of one thread."""
    monkeypatch.setattr(time, "perf_counter", time.thread_time)
    base = LlamaConfig(
        vocab_size=8192, hidden_size=576, intermediate_size=1536, num_hidden_layers=8,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MoRForCausalLM(MoRConfig(base_config=base, num_recursions=3, router="token")).eval()
    engine = Engine(model, kv_memory="256MiB", max_rows=8, policy="lock-step")
    prompts = torch.randint(1, 8192, (24, 128)).tolist()
    params = SamplingParams(max_tokens=24, temperature=0)
    timing = Timing.measure(engine)
    begin = time.thread_time()
    outputs = engine.generate(prompts, params)
    taken = time.thread_time() - begin
    depths = [depth for output in outputs for depth in output.depths]
    load = Load(128, 24, sizing.depth_shares([depths.count(d) for d in range(4)], 3))
    found = sizing.size_server(engine, timing, load, 8, limited=True, policy="lock-step")
    ratio = found.tokens_per_second * taken / (24 * 24)
    assert 0.7 < ratio < 1.4
