"""The engine's passes give the logits and depths of the model's own forward.

Models, sequences and schedules are drawn by hypothesis: few in the default run, hundreds in the
slow run. Keys and values of freed blocks, and states of freed slots, are NaN. Transformers' norms
compute in float32, whatever the model's dtype, which would hide errors in rounding: in these tests
they compute in the model's.
"""

import random

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.smollm3.modeling_smollm3 import SmolLM3RMSNorm

import mor
from mor import MoRConfig, MoRForCausalLM
from mor.modules import expert_choice
from mor.serving.forward import PackedModel, Rows
from mor.serving.weights import Product

from ..models.conftest import small_llama
from .planner import Planner, Sequence

few = settings(
    max_examples=40,
    derandomize=True,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
many = settings(few, max_examples=600, derandomize=False)
pytestmark = pytest.mark.usefixtures("one_thread")

NORMS = [
    LlamaRMSNorm,
    MistralRMSNorm,
    Qwen2RMSNorm,
    Qwen3RMSNorm,
    SmolLM3RMSNorm,
]


@pytest.fixture(autouse=True)
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    def norm(self, x):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)

    def gemma_norm(self, x):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], 1 + self.weight, self.eps)

    for kind in NORMS:
        monkeypatch.setattr(kind, "forward", norm)
    monkeypatch.setattr(Gemma3RMSNorm, "forward", gemma_norm)


def dense_config(kind, layers: int, heads: int, kv_heads: int, head_dim: int, window: int | None):
    common = {
        "vocab_size": 53,
        "hidden_size": heads * head_dim,
        "head_dim": head_dim,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    if kind is LlamaConfig:
        return kind(**common, attention_bias=True, mlp_bias=True)
    if kind is MistralConfig:
        return kind(**common, sliding_window=window)
    types = ["sliding_attention" if window else "full_attention"] * layers
    if kind is Qwen3Config or kind is Qwen2Config:
        return kind(
            **common, sliding_window=window, use_sliding_window=bool(window), layer_types=types
        )
    if kind is SmolLM3Config:
        return kind(**common, no_rope_layers=[i % 2 for i in range(layers)])
    if layers > 2 and window:  # Gemma's two kinds of layers have rotary angles of their own
        types[0] = types[-1] = "full_attention"
    return kind(
        **common, sliding_window=window or 64, layer_types=types, query_pre_attn_scalar=head_dim + 1
    )


@st.composite
def mor_models(draw: st.DrawFn) -> MoRForCausalLM:
    """A small random model of any variant."""
    choose = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    recursions, block = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    options = {
        "num_recursions": recursions,
        "sharing": choose(
            "middle_cycle", "middle_cycle", "cycle", "cycle", "middle_sequence", "sequence"
        ),
        "router": choose("expert", "expert", "token", "token", None),
        "kv_strategy": choose("recursion", "shared", "hybrid"),
        "router_type": choose("linear", "linear", "mlp", "random"),
        "router_gating": choose("weighted", "additive", "residual"),
        "router_alpha": choose(0.1, 1.0),
        "router_temperature": choose(1.0, 1.0, 3.0),
        "recursion_encoding": recursions > 1 and choose(True, False),
        "relaxation": choose(None, None, None, "lora", "dora") if recursions > 1 else None,
        "relaxation_rank": 2,
    }
    random_router = options["router_type"] == "random"
    if options["router"] is not None:
        assume(not options["sharing"].endswith("sequence"))
    if options["router"] == "expert":
        options["router_func"] = "none" if random_router else choose("sigmoid", "tanh", "none")
        options["router_aux"] = choose("loss", "router", None)
        if options["kv_strategy"] == "recursion":
            shares = draw(st.lists(st.floats(0.1, 1), min_size=recursions, max_size=recursions))
            options["capacities"] = sorted(shares, reverse=True)
    if options["router"] == "token":
        options["router_func"] = "none" if random_router else choose("softmax", "sigmoid", "tanh")
        options["router_balancing"] = choose("loss", "loss_free", None)
    if options["router_gating"] == "additive":
        options["router_z_coef"] = 0.001  # or nothing trains the router
    ends = 2 if options["sharing"].startswith("middle") else 0
    kv_heads = choose(1, 2)
    base = dense_config(
        choose(LlamaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Gemma3TextConfig),
        recursions * block + ends,
        kv_heads * choose(1, 3),
        kv_heads,
        choose(4, 8),
        choose(None, None, 2, 3, 5),
    )
    if base.model_type == "gemma3_text" and not ends:
        base.layer_types = [base.layer_types[-1]] * base.num_hidden_layers
    torch.manual_seed(draw(st.integers(0, 2**31)))
    model = MoRForCausalLM(MoRConfig(base_config=base, **options)).double().eval()
    randomise(model)
    return model


@torch.no_grad()
def randomise(model) -> None:
    """Moves what starts at a constant: norms, biases, encodings, adapters, balancing."""
    for parameter in model.parameters():
        if parameter.dim() == 1 or parameter.flatten()[:-1].eq(parameter.flatten()[1:]).all():
            parameter.add_(0.2 * torch.randn_like(parameter))
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.copy_(0.3 * torch.randn_like(parameter))
    recursion = getattr(model.model, "recursion", None)
    if recursion is not None and "bias" in dict(recursion.named_buffers()):
        recursion.bias.copy_(0.05 * torch.randn_like(recursion.bias))


@st.composite
def workloads(draw: st.DrawFn) -> tuple[list[Sequence], dict]:
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    seed = draw(st.integers(0, 2**16))
    rng = random.Random(seed)
    sequences = [
        Sequence(
            [rng.randrange(53) for _ in range(length)],
            [rng.randint(1, 5) for _ in range(rng.randint(0, 3))],
            max_recursions=9,
            threshold=0.0,
        )
        for length in lengths
    ]
    options = {
        "all_logits": draw(st.booleans()),
        "together": draw(st.booleans()),
        "block_size": draw(st.sampled_from([2, 4])),
        "seed": seed,
    }
    return sequences, options


def check_equals_forward(model, sequences: list[Sequence], options: dict, **packed_options) -> None:
    packed = PackedModel(model, **packed_options)
    Planner(packed, sequences, **options).run()
    for s in sequences:
        with torch.no_grad():
            full = model(torch.tensor([s.tokens]), use_cache=False)
        if isinstance(model.config, MoRConfig):
            assert s.depths == full.token_depths[0].tolist()
        for position, logits in s.logits.items():
            torch.testing.assert_close(logits, full.logits[0, position], atol=1e-10, rtol=1e-10)
        assert len(s.tokens) - 1 in s.logits


@few
@given(mor_models(), workloads(), st.booleans())
def test_passes_equal_the_full_forward(model, workload, deterministic):
    check_equals_forward(model, *workload, deterministic=deterministic)


@pytest.mark.slow
@many
@given(mor_models(), workloads(), st.booleans())
def test_passes_equal_the_full_forward_in_many_models(model, workload, deterministic):
    check_equals_forward(model, *workload, deterministic=deterministic)


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(
    "kind",
    [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Gemma3TextConfig, SmolLM3Config],
    ids=lambda kind: kind.model_type,
)
def test_passes_equal_a_dense_model(kind, window, layers):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(dense_config(kind, layers, 4, 2, 8, window))
    model = model.double().eval()
    randomise(model)
    rng = random.Random(1)
    sequences = [
        Sequence([rng.randrange(53) for _ in range(n)], [4, 2], max_recursions=1, threshold=0.0)
        for n in (9, 1, 6)
    ]
    check_equals_forward(model, sequences, {"seed": 3})


def small(**options) -> MoRForCausalLM:
    """A model of three recursions whose untrained routers send tokens to different depths."""
    torch.manual_seed(0)
    layers = options.pop("num_hidden_layers", 8)
    base = dense_config(LlamaConfig, layers, 4, 2, 8, None)
    model = MoRForCausalLM(MoRConfig(base_config=base, **options)).eval()
    randomise(model)
    return model


def sequences_of(*lengths: int, **limits) -> list[Sequence]:
    rng = random.Random(7)
    limits = {"max_recursions": 3, "threshold": 0.0, **limits}
    return [
        Sequence([rng.randrange(53) for _ in range(n)], [n // 2] if n > 3 else [], **limits)
        for n in lengths
    ]


KINDS = {
    "expert": {},
    "token": {"router": "token"},
    "shared": {"kv_strategy": "shared"},
    "hybrid": {"kv_strategy": "hybrid", "router": "token"},
    "residual": {"router": "token", "router_gating": "residual"},
    "recursive": {"router": None},
}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "recursive"])
def test_rows_of_different_recursions_share_passes(kind):
    planner = Planner(PackedModel(small(**KINDS[kind])), sequences_of(12, 9, 11, 3, 8))
    planner.run()
    assert planner.num_mixed > 5
    assert len({depth for s in planner.sequences for depth in s.depths}) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_equals_generate_alone(kind):
    model = small(**KINDS[kind]).double()
    prompts = sequences_of(5, 1, 9)
    new = 6
    expected = []
    for s in prompts:
        out = model.generate(torch.tensor([s.tokens]), max_new_tokens=new, do_sample=False)
        expected.append(out[0].tolist())
    # Each token is planned once the one before it has logits.
    planner = Planner(PackedModel(model), prompts)
    for _ in range(new):
        planner.run(free=False)
        for s in prompts:
            s.tokens.append(int(s.logits[len(s.tokens) - 1].argmax()))
    assert [s.tokens for s in prompts] == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_near(kind, dtype):
    """Depths are those of the model unless a logit is within rounding of the threshold."""
    exact = small(**KINDS[kind])
    model = small(**KINDS[kind]).to(dtype)
    exact.load_state_dict({k: v.to(exact.dtype) for k, v in model.state_dict().items()})
    sequences = sequences_of(12, 9, 11)
    Planner(PackedModel(model), sequences).run()
    same = total = 0
    for s in sequences:
        with torch.no_grad():
            truth = exact.double()(torch.tensor([s.tokens]), use_cache=False)
            own = model(torch.tensor([s.tokens]), use_cache=False)
        got = torch.stack([s.logits[p] for p in range(len(s.tokens))]).double()
        changed = (torch.tensor(s.depths) != truth.token_depths[0]).long().cumsum(0) > 0
        total, same = total + len(changed), same + int((~changed).sum())
        scale = truth.logits.abs().max()
        error = (got - truth.logits[0]).abs().amax(1) / scale
        theirs = (own.logits[0].double() - truth.logits[0]).abs().amax(1) / scale
        bound = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
        assert error[~changed].lt(bound + 2 * theirs[~changed]).all()
    assert same >= total * (1 if dtype == torch.float32 else 0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_rows_depend_on_nothing_beside_them(kind, dtype):
    """To the bit: whatever the chunks, the rows beside, and their place in a tile."""
    packed = PackedModel(small(**KINDS[kind]).to(dtype), deterministic=True)
    alone = sequences_of(12, 9, 11)
    together = sequences_of(12, 9, 11)
    for s in alone:
        Planner(packed, [s], seed=1).run()
        s.chunk_sizes = []
    for s in together:
        s.chunk_sizes = [1, 2, 3]
    Planner(packed, together + sequences_of(20, 13), seed=2).run()
    for s, other in zip(alone, together, strict=True):
        assert s.depths == other.depths
        for position, logits in s.logits.items():
            assert torch.equal(logits, other.logits[position])


@pytest.mark.parametrize("kind", ["expert", "shared", "token"])
def test_max_recursions_of_a_row_is_the_depth_of_a_shorter_model(kind):
    """Two recursions of three are the model of two: its cycle, its first two routers."""
    options = {"router_balancing": None} if kind == "token" else {"capacities": [1, 0.6, 0.3]}
    model = small(**KINDS[kind], **options).double()
    if kind == "token":
        model.model.recursion.score = type(model.model.recursion.score)("sigmoid", 0.1)
    shorter_options = dict(options, num_recursions=2, num_hidden_layers=6)
    if "capacities" in options:
        shorter_options["capacities"] = options["capacities"][:2]
    shorter = small(**KINDS[kind], **shorter_options).double()
    weights = model.state_dict()
    if kind == "token":
        name = "model.recursion.router.layers.0.weight"
        weights[name] = weights[name][:2]
        shorter.model.recursion.score = model.model.recursion.score
    shorter.load_state_dict({k: weights[k] for k in shorter.state_dict()})
    sequences = sequences_of(12, 9, 11, max_recursions=2)
    Planner(PackedModel(model), sequences).run()
    for s in sequences:
        with torch.no_grad():
            full = shorter(torch.tensor([s.tokens]), use_cache=False)
        assert s.depths == full.token_depths[0].tolist()
        got = torch.stack([s.logits[p] for p in range(len(s.tokens))])
        torch.testing.assert_close(got, full.logits[0], atol=1e-10, rtol=1e-10)


def test_threshold_of_a_row_moves_its_exits(monkeypatch):
    model = small().double()
    select = expert_choice._select_above_threshold
    found = []
    for threshold in (-2.0, 1.0):
        sequences = sequences_of(12, 9, 11, threshold=threshold)
        Planner(PackedModel(model), sequences).run()
        monkeypatch.setattr(
            expert_choice,
            "_select_above_threshold",
            lambda logits, packing, t=threshold: select(logits - t, packing),
        )
        for s in sequences:
            with torch.no_grad():
                full = model(torch.tensor([s.tokens]), use_cache=False)
            assert s.depths == full.token_depths[0].tolist()
        found.append(sum(sum(s.depths) for s in sequences))
    assert found[0] > found[1]


def test_prompt_rows_whose_logits_are_not_wanted_run_norm_keys_and_values_alone(monkeypatch):
    packed = PackedModel(small())
    rows = []
    weights = packed.last.weights[0]
    original = Product.__call__

    def counted(self, x):
        if self in (weights.q, weights.kv, weights.output, packed.head):
            rows.append(x.shape[0])
        return original(self, x)

    monkeypatch.setattr(Product, "__call__", counted)
    sequences = sequences_of(8)
    sequences[0].chunk_sizes = [8]
    Planner(packed, sequences, all_logits=False).run()
    assert rows == [8, 1, 1, 1]  # keys and values, queries, output, head


def test_relaxed_rows_of_several_recursions_are_refused():
    packed = PackedModel(small(relaxation="lora", relaxation_rank=2))
    assert not packed.mixes_recursions
    two = torch.zeros(2, dtype=torch.int64)
    rows = Rows(
        *(two, two, two, two.int()[:, None], two.int(), torch.arange(3).int()),
        recursions=torch.tensor([1, 2]),
        recursion_offsets=[0, 1, 2, 2],
    )
    with pytest.raises(ValueError, match="rows of one recursion"):
        packed.run_block(rows, packed.new_states(2), packed.new_pool(1, 2))


def with_dynamic_rope() -> MoRForCausalLM:
    base = dense_config(LlamaConfig, 8, 4, 2, 8, None)
    base.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    return MoRForCausalLM(MoRConfig(base_config=base))


def with_adapters():
    return get_peft_model(small(), LoraConfig(r=2, target_modules=["q_proj"])).base_model.model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: small(eval_routing="topk"), "eval_routing"),
        (lambda: mor.swap(small_llama(), (1, 7), num_recursions=3), "that swap changed"),
        (lambda: mor.apply_mod(small_llama()), "that apply_mod changed"),
        (lambda: mor.apply_dynamoe(small_llama(), 2), "served is what MoRForCausalLM.from_dense"),
        (lambda: torch.nn.Linear(2, 2), "causal language model"),
        (lambda: small().model, "causal language model"),
        (with_dynamic_rope, "dynamic"),
        (with_adapters, "merge"),
    ],
    ids=["topk", "swapped", "mod", "dynamoe", "linear", "headless", "rope", "adapters"],
)
def test_what_cannot_be_served_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        PackedModel(make())


def test_a_block_that_splits_a_token_of_the_ends_is_refused():
    packed = PackedModel(small(num_hidden_layers=5))
    assert packed.num_kv_layers == 1
    with pytest.raises(ValueError, match="even"):
        packed.new_pool(4, 3)


def test_pool_bytes_serve_every_group_and_blocks_are_copied():
    packed = PackedModel(small())
    pool = packed.new_pool(5, 4)
    assert (pool.block_size, pool.end_block_size) == (4, 4)
    assert pool.block_bytes == 4 * 2 * 2 * 2 * 8 * 4
    pool.data.copy_(torch.arange(pool.data.numel()).view_as(pool.data))
    pool.copy_blocks(torch.tensor([1]), torch.tensor([3]))
    for keys, values in pool.middle + pool.ends:
        assert torch.equal(keys[3], keys[1])
        assert torch.equal(values[3], values[1])
