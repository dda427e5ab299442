"""What works with PyTorch and Transformers alone, and what the rest says of what it misses."""

import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPTIONAL = ("accelerate", "datasets", "matplotlib", "pyarrow", "tensorboard", "peft", "trl")
OPTIONAL += ("fastapi", "uvicorn", "prometheus_client", "llguidance", "diffusers", "timm")


def _without(*packages: str, code: str) -> str:
    """What a process prints in which these packages cannot be imported."""
    start = f"import sys\nsys.modules.update(dict.fromkeys({packages!r}))\n"
    command = [sys.executable, "-c", start + code]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_operators_models_costs_and_text_need_pytorch_and_transformers_alone(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "a b c"}\n')
    code = f"""
import torch
from transformers import LlamaConfig
import mor, mor.serving, mor.systems
from mor.training import parameter_groups
scores = torch.tensor([0.1, 0.9, 0.5])
assert mor.ops.route_topk(scores, 2, torch.tensor([0, 3], dtype=torch.int32)).tolist() == [1, 2]
base = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=8,
                   num_attention_heads=4)
model = mor.MoRForCausalLM(mor.MoRConfig(base_config=base, num_recursions=3))
tokens = torch.randint(3, 64, (2, 8))
model(tokens, labels=tokens).loss.backward()
torch.optim.AdamW(parameter_groups(model)).step()
model.eval().generate(tokens, max_new_tokens=2, do_sample=False, pad_token_id=0)
assert mor.analysis.flops_per_token(model.config, 8) > 0
assert mor.analysis.depth_page
assert [text for _, text in mor.data.open_corpus({str(tmp_path)!r}).documents()] == ["a b c"]
print("fine")
"""
    assert _without(*OPTIONAL, code=code) == "fine"


def test_a_missing_package_is_named_with_its_extra(tmp_path):
    code = f"""
from pathlib import Path
import mor
from mor.training.arguments import arguments_of, training_arguments
from mor.training.options import RunOptions
folder = Path({str(tmp_path)!r})
for call in (
    lambda: training_arguments(folder, steps=1),
    lambda: mor.data.open_corpus("somebody/some-dataset"),
    lambda: list(mor.text_files.read_records(folder / "a.parquet", "text")),
    lambda: mor.analysis.plot_loss_against_flops({{}}, "a.png"),
    lambda: mor.analysis.plot_text_by_depth(["a"], [1], "a.png"),
    lambda: mor.demo.run_demo(folder),
    lambda: arguments_of(RunOptions(output_dir=folder)),
):
    try:
        call()
    except (ImportError, ValueError) as error:
        print(error)
"""
    boards = ("tensorboardX", "torch.utils.tensorboard")
    said = [line.rpartition("; ") for line in _without(*OPTIONAL, *boards, code=code).splitlines()]
    missing = ["accelerate", "datasets", "pyarrow", *["matplotlib"] * 3, "tensorboard"]
    for (what, _, advice), package in zip(said, missing, strict=True):
        extra = "plots" if package == "matplotlib" else "train"
        named = "tensorboard" if package == "tensorboard" else "it"
        assert package in what
        assert advice == f"pip install 'mor[{extra}]' brings {named}"


def test_the_pinned_environment_has_every_extra():
    """requirements.txt is what `make` installs, and the tests run with.

    All but timm: its torchvision must be of the build of torch that tools/bootstrap.py chooses.
    """
    text = (ROOT / "requirements.txt").read_text().lower()
    pinned = set(re.findall(r"^([a-z0-9_.-]+)==", text, re.MULTILINE))
    project = (ROOT / "pyproject.toml").read_text()
    listed = re.findall(r'^ *(?:\w+ = \[)?"([A-Za-z_-]+)>=', project, re.MULTILINE)
    assert {"torch", "accelerate", "matplotlib"} <= set(listed)
    assert set(listed) - {"scikit-build-core", "timm"} <= pinned


def test_transformers_brings_what_the_command_needs():
    brought = {re.split(r"[<>=; ]", line)[0] for line in requires("transformers") or []}
    assert {"pyyaml", "typer", "safetensors", "tokenizers"} <= brought
