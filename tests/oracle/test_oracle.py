"""Our models against tensors of the authors' implementation (format: README of the folder).

Tolerances are those of that README. A case whose variant is not implemented is skipped by name.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from mor import MoRConfig, MoRForCausalLM
from mor.models.configuration_mor import KV_STRATEGIES

FOLDER = Path(os.environ.get("MOR_ORACLE", Path(__file__).parents[2] / ".." / "shared" / "oracle"))
CASES = sorted(path.stem for path in FOLDER.glob("*.json"))
if not CASES:
    pytest.skip(f"no oracle cases in {FOLDER} (set MOR_ORACLE)", allow_module_level=True)

HIDDEN, LOGIT, GATE, LOSS, GRADIENT = 2e-4, 5e-5, 1e-5, 5e-5, 5e-5


def build(case: dict, tensors: dict) -> MoRForCausalLM:
    c = case["config"]
    base = LlamaConfig(
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_hidden_layers=c["num_hidden_layers"],
        num_attention_heads=c["num_attention_heads"],
        num_key_value_heads=c["num_key_value_heads"],
        head_dim=c["head_dim"],
        rms_norm_eps=c["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": c["rope_theta"]},
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    options = {"router": None, "kv_strategy": c["kv_strategy"] or "recursion"}
    if r := c["router"]:
        options |= {
            "router": r["kind"],
            "router_type": r["arch"],
            "router_func": r["func"],
            "router_alpha": r["alpha"],
            "router_temperature": r["temp"],
            "router_gating": r["gating"],
            "router_z_coef": r["z_coeff"] or 0.0,
        }
        if r["kind"] == "expert":
            aux = {"aux_loss": "loss", "aux_router": "router"}[r["sampling"]]
            options |= {
                "capacities": r["capacities"],
                "router_aux": aux,
                "router_aux_coef": r["aux_coeff"],
            }
        else:
            options |= {
                "router_balancing": r["balancing"],
                "router_balance_coef": r["aux_coeff"] or 0.0,
                "router_bias_update_rate": r["bias_update_rate"] or 0.0,
            }
    config = MoRConfig(
        base_config=base,
        num_recursions=c["num_recursions"],
        sharing=c["sharing"] or "cycle",
        **options,
    )
    assert config.layer_schedule == [unique_layer(n, config) for n in c["layer_schedule"]]
    model = MoRForCausalLM(config)
    names = {n: ours(n[2:], config) for n in tensors if n.startswith("w.")}
    missing, unexpected = model.load_state_dict(
        {names[n]: t for n, t in tensors.items() if n.startswith("w.")}, strict=False
    )
    assert not unexpected
    assert set(missing) <= {"lm_head.weight", "model.recursion.warmup_step"}
    return model


def unique_layer(name: str, config: MoRConfig) -> int:
    """Our index of the layer that the oracle calls first, last, shared.<j> or layers.<l>."""
    if name == "first":
        return 0
    if name == "last":
        return config.num_unique_layers - 1
    return int(name.split(".")[1]) + (1 if config.sharing.startswith("middle") else 0)


def ours(name: str, config: MoRConfig) -> str:
    """Our parameter for the oracle's `name` (without its w. or g.)."""
    parts = name.split(".")
    if name == "embed_tokens":
        return "model.embed_tokens.weight"
    if name == "norm":
        return "model.norm.weight"
    if name == "router_bias":
        return "model.recursion.bias"
    if parts[0] in ("router", "aux_router"):
        layer = {"weight": 0, "fc1": 0, "fc2": 1}[parts[-1]]
        if config.router == "expert":
            return f"model.recursion.{parts[0]}s.{parts[1]}.layers.{layer}.weight"
        return f"model.recursion.router.layers.{layer}.weight"
    layer, weight = ".".join(parts[:-1]), parts[-1]
    group = {"q": "self_attn.", "k": "self_attn.", "v": "self_attn.", "o": "self_attn."}
    group |= {"gate": "mlp.", "up": "mlp.", "down": "mlp."}
    prefix = group.get(weight.split("_")[0], "") if weight.endswith("_proj") else ""
    return f"model.layers.{unique_layer(layer, config)}.{prefix}{weight}.weight"


def close(name: str, got: torch.Tensor, want: torch.Tensor, bound: float) -> None:
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, expected {list(want.shape)}"
    error = (got - want).abs().max().item()
    assert error <= bound, f"{name}: error {error:.3g}, allowed {bound:.3g}"


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in CASES],
)
def run(request: pytest.FixtureRequest):
    """Case, tensors, model and its training output after backward."""
    case = json.loads((FOLDER / f"{request.param}.json").read_text())
    strategy = case["config"]["kv_strategy"] or "recursion"
    if strategy not in KV_STRATEGIES:
        pytest.skip(f"{request.param}: kv_strategy {strategy} is not implemented yet")
    tensors = load_file(FOLDER / f"{request.param}.safetensors")
    model = build(case, tensors).train()
    output = model(
        input_ids=tensors["input_ids"], labels=tensors["labels"], output_hidden_states=True
    )
    output.loss.backward()
    return case, tensors, model, output


def test_logits_and_losses(run):
    case, t, _, out = run
    close("logits", out.logits, t["logits"], HIDDEN)
    close("lm_loss", out.lm_loss, t["lm_loss"], LOSS)
    close("total_loss", out.loss, t["total_loss"], LOSS)
    if "aux_loss" in t:
        expert = case["config"]["router"]["kind"] == "expert"
        close("aux_loss", out.aux_loss if expert else out.balancing_loss, t["aux_loss"], LOSS)
    if "z_loss" in t:
        close("z_loss", out.z_loss, t["z_loss"], LOSS)


def test_gradients(run):
    _, t, model, _ = run
    parameters = dict(model.named_parameters())
    checked = 0
    for name, want in t.items():
        if not name.startswith("g."):
            continue
        grad = parameters[ours(name[2:], model.config)].grad
        close(name, grad, want, GRADIENT * want.abs().max().item())
        checked += 1
    assert checked == sum(n.startswith("w.") and n != "w.router_bias" for n in t)


def test_hidden_states(run):
    case, t, model, out = run
    config = model.config
    ends = 1 if config.sharing.startswith("middle") else 0
    close("hidden.input", out.hidden_states[ends], t["hidden.input"], HIDDEN)
    steps = [int(n.split(".")[1]) for n in t if n.startswith("hidden.") and n[7:].isdigit()]
    per_step = config.num_recursions if config.sharing.endswith("sequence") else config.block_depth
    if case["config"]["sharing"] is None:
        per_step = 1
    for step in steps:
        index = ends + (step + 1) * per_step
        if index == len(out.hidden_states) - 1:
            continue  # the last entry is after the final norm, as in Transformers
        got, want = out.hidden_states[index], t[f"hidden.{step}"]
        if config.router == "token":
            got = torch.where((t["depth"] > step).unsqueeze(-1), got, 0)
        close(f"hidden.{step}", got, want, HIDDEN)


def test_routing(run):
    case, t, _, out = run
    if case["config"]["router"] is None:
        pytest.skip("no router")
    shape = t["input_ids"].shape
    if case["config"]["router"]["kind"] == "token":
        assert torch.equal(out.token_depths, t["depth"])
        close(
            "router_logits",
            out.routing.logits.reshape(t["router_logits"].shape),
            t["router_logits"],
            LOGIT,
        )
        close("gates", out.routing.gates.reshape(shape), t["gates"], GATE)
        return
    offsets = (torch.arange(shape[0]) * shape[1]).unsqueeze(1)
    for r, step in enumerate(out.routing.steps):
        rows = step.rows.reshape(shape[0], -1) - offsets
        assert torch.equal(rows, t[f"selected.{r}"]), f"selected.{r}"
        want = t[f"router_logits.{r}"]
        close(f"router_logits.{r}", step.logits.reshape(want.shape), want, LOGIT)
        close(f"gates.{r}", step.gates.reshape(shape[0], -1), t[f"gates.{r}"], GATE)
        if f"aux_router_logits.{r}" in t:
            want = t[f"aux_router_logits.{r}"]
            close(f"aux_router_logits.{r}", step.aux_logits.reshape(want.shape), want, LOGIT)


def test_loss_free_bias(run):
    _, t, model, _ = run
    if "router_bias_next" not in t:
        pytest.skip("no loss-free balancing")
    model.model.recursion.update_bias()
    close("router_bias_next", model.model.recursion.bias, t["router_bias_next"], 1e-7)


def test_cached_decoding(run):
    case, t, model, _ = run
    if "decode.prompt_ids" not in t:
        pytest.skip("no decoding in this case")
    model.eval()
    prompt = t["decode.prompt_ids"]
    steps = t["decode.generated_ids"].shape[1]
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences[:, prompt.shape[1] :], t["decode.generated_ids"])
    close("decode.step_logits", torch.stack(out.logits, dim=1), t["decode.step_logits"], HIDDEN)
    fed = out.sequences[:, :-1]
    with torch.no_grad():
        assert torch.equal(model(fed).token_depths, t["decode.depth"])
    # With KV sharing only the first use of a layer keeps anything; the cases list those layers, of
    # the first sequence only where all are alike.
    used = [layer.lengths for layer in out.past_key_values.layers if layer.lengths is not None]
    lengths = torch.stack(used, dim=1).tolist()
    want = case["decode"]["cache_lengths"]
    assert lengths == (want if len(want) == len(prompt) else want * len(prompt))
    model.train()
