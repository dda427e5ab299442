"""mor.apply_pmod: vision tokens that skip layers of a LLaVA, against a slow reference."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import (
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import mor
from mor.modules.packing import pack
from mor.schedules import Schedule, constant, shifted_cosine
from mor.systems import PMoD
from mor.systems.vision_tokens import VisionTokens
from tests.systems.small_llava import (
    IMAGE,
    PAD,
    TEXT,
    PlainLayer,
    call,
    check_gradients,
    check_is_one_graph,
    check_never_waits_for_the_device,
    left_padded,
    masked_attention,
    text_config,
    vision_config,
)

PATCHES = 16


def dense_llava(kind="llama", num_layers=8, seed=0):
    """Of an image of 16 patches."""
    config = LlavaConfig(
        vision_config=vision_config(),
        text_config=text_config(kind, num_layers),
        image_token_id=IMAGE,
        image_seq_length=PATCHES,
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config).eval()


def pmod_layers(model):
    return [m for m in model.model.language_model.layers if isinstance(m, PMoD)]


def train_routers(model, seed=0):
    """Routers as of a trained model: logits that differ."""
    torch.manual_seed(seed)
    for layer in pmod_layers(model):
        nn.init.normal_(layer.router.weight, std=0.3)
        nn.init.normal_(layer.router.bias)
    return model


def pmod_llava(schedule=None, **options):
    return train_routers(mor.apply_pmod(dense_llava(**options), schedule))


def prompt(images, text=6, seed=0):
    """Token ids of a text with some images in it, and the pixels."""
    torch.manual_seed(seed)
    ids = [torch.randint(3, 90, (text,))]
    for _ in range(images):
        ids += [torch.full((PATCHES,), IMAGE), torch.randint(3, 90, (2,))]
    return torch.cat(ids).unsqueeze(0), torch.randn(images, 3, 24, 24)


def one_layer(ratio=0.4, lengths=(11, 7), dtype=torch.float32):
    """A p-MoD layer, states of two sequences, which are vision tokens, and the rotary angles."""
    torch.manual_seed(0)
    layer = PMoD(PlainLayer(), 32, 0, 1, ratio).to(dtype)
    nn.init.normal_(layer.router.weight, std=0.3)
    nn.init.normal_(layer.router.bias)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    vision = torch.zeros_like(mask)
    vision[0, 2:8], vision[1, 1:6] = True, True
    batch = pack((2, max(lengths)), mask.device, mask)
    x = torch.randn(batch.packing.num_rows, 32, dtype=dtype)
    angles = LlamaRotaryEmbedding(text_config())(x.unsqueeze(0), batch.packing.positions[None])
    return layer, x, VisionTokens.of(batch, vision), tuple(part[0].to(dtype) for part in angles)


def reference(layer, x, tokens, angles):
    """Sequence by sequence, with a mask in place of a gather, as the definition reads."""
    outs, bounds = [], tokens.batch.packing.cu_seqlens.tolist()
    plain = layer.layer
    for begin, end in pairwise(bounds):
        h, vision = x[begin:end], tokens.is_vision[begin:end]
        z = (h @ layer.router.weight[0] + layer.router.bias).detach()
        w = 1 + layer.alpha * torch.tanh(h @ layer.router.weight[0] + layer.router.bias)
        order = sorted(vision.nonzero().flatten().tolist(), key=lambda i: (-z[i].item(), i))
        kept = ~vision
        kept[order[: int(layer.ratio * len(order))]] = True
        attended = masked_attention(layer, h, kept, [part[begin:end] for part in angles])
        a = h + attended
        update = plain.mlp(plain.post_attention_layernorm(a))
        w = w[:, None]
        taken = torch.where(vision[:, None], a + w * update, a + update)
        outs.append(torch.where(kept[:, None], taken, w * h))
    return torch.cat(outs)


@pytest.mark.parametrize("ratio", [0.05, 0.4, 0.99, 1.0])
def test_a_layer_computes_its_definition(ratio):
    layer, x, tokens, angles = one_layer(ratio)
    got, kept = call(layer, x, tokens, angles)
    torch.testing.assert_close(got, reference(layer, x, tokens, angles))
    assert len(kept) == 18 - 11 + int(6 * ratio) + int(5 * ratio)


def test_gradients():
    check_gradients(*one_layer(dtype=torch.float64))


def test_a_layer_never_waits_for_the_device():
    check_never_waits_for_the_device(*one_layer())


@pytest.mark.slow
def test_a_layer_is_one_graph():
    check_is_one_graph(*one_layer())


def test_the_logit_is_ranked_in_float32_where_the_weight_ties():
    layer, _, tokens, angles = one_layer(1 / 6, dtype=torch.bfloat16)
    nn.init.zeros_(layer.router.weight)
    nn.init.zeros_(layer.router.bias)
    layer.router.weight.data[0, 0] = 1.0
    x = torch.zeros(18, 32, dtype=torch.bfloat16)
    x[:, 0] = 4 + 0.125 * torch.arange(18)  # tanh is 1 to bfloat16 for all
    _, kept = call(layer, x, tokens, angles)
    assert [row for row in kept.tolist() if tokens.is_vision[row]] == [7]


def test_routers_begin_at_zero_and_ties_go_to_earlier_tokens():
    model = mor.apply_pmod(dense_llava(), constant(8, 0.5))
    ids, pixels = prompt(1)
    with torch.no_grad():
        model(ids, pixel_values=pixels)
    for layer in pmod_layers(model):
        assert layer.token_depths[0].tolist() == [1] * 6 + [1] * 8 + [0] * 8 + [1] * 2


def test_the_published_setting_keeps_its_share_of_keys():
    model = mor.apply_pmod(dense_llava(num_layers=32))
    schedule = shifted_cosine(32)
    assert schedule.mean == 0.5375
    ids, pixels = prompt(4)
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model(ids, pixel_values=pixels, past_key_values=cache)
    text = ids.shape[1] - 64
    lengths = [
        layer.lengths.item() if hasattr(layer, "lengths") else layer.get_seq_length()
        for layer in cache.layers
    ]
    assert lengths == [text + int(64 * ratio) for ratio in schedule]
    assert lengths[8:11] == [text + 54, text + 51, text + 48]
    assert sum(lengths) - 32 * text == pytest.approx(0.5375 * 64 * 32, abs=16)  # k is truncated


@pytest.mark.parametrize("kind", TEXT)
def test_cached_generation_equals_full_forward(kind):
    model = pmod_llava(kind=kind)
    rows = [prompt(1, 5), prompt(2, 3, seed=1), prompt(0, 7, seed=2)]
    ids, mask, pixels = left_padded(rows)
    out = model.generate(
        ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=5, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    logits = torch.stack(out.logits, dim=1)
    for row, (own, own_pixels) in enumerate(rows):
        n = own.shape[1]
        whole = out.sequences[row : row + 1, ids.shape[1] - n :]
        given = {"pixel_values": own_pixels} if len(own_pixels) else {}
        with torch.no_grad():
            full = model(whole, use_cache=False, **given).logits[0, n - 1 : -1]
        torch.testing.assert_close(logits[row], full, atol=1e-4, rtol=1e-4)


def test_text_sees_nothing_of_what_comes_later():
    model = pmod_llava()
    ids, pixels = prompt(1)
    changed = ids.clone()
    changed[0, -1] = 50
    with torch.no_grad():
        before, after = (
            model(t, pixel_values=pixels, use_cache=False).logits[:, :-1] for t in (ids, changed)
        )
    torch.testing.assert_close(before, after, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", TEXT)
def test_text_alone_runs_as_before_and_removing_restores_every_bit(kind):
    dense = dense_llava(kind)
    text, (ids, pixels) = torch.randint(3, 90, (2, 9)), prompt(2)
    before = type(dense), dense.config.to_dict()
    with torch.no_grad():
        want = dense(text).logits, dense(ids, pixel_values=pixels).logits
        model = train_routers(mor.apply_pmod(dense))
        torch.testing.assert_close(model(text).logits, want[0], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(model(ids, pixel_values=pixels).logits, want[1], atol=1e-2)
        assert mor.remove(model) is dense
        assert torch.equal(dense(text).logits, want[0])
        assert torch.equal(dense(ids, pixel_values=pixels).logits, want[1])
    assert (type(dense), dense.config.to_dict()) == before
    decoder = dense.model.language_model
    assert all(layer.self_attn.config is decoder.config for layer in decoder.layers)


def test_without_an_image_its_token_is_text():
    """A generated one was skipped, and a call with nothing but skipped tokens failed."""
    model = mor.apply_pmod(dense_llava(), constant(8, 0.5))
    with torch.no_grad():
        model(torch.tensor([[IMAGE]]))
    assert all(layer.token_depths.tolist() == [[1]] for layer in pmod_layers(model))
    layer, _, _, _ = one_layer(0.1)
    tokens = VisionTokens.of(pack((1, 4), torch.device("cpu")), torch.ones(1, 4).bool())
    x = torch.randn(4, 32)
    got, kept = call(layer, x, tokens, (torch.ones(4, 8), torch.zeros(4, 8)))
    assert kept.numel() == 0
    torch.testing.assert_close(got, x * (1 + 0.2 * layer.router(x).tanh()))


def test_full_ratios_and_zero_routers_change_nothing():
    dense = dense_llava()
    ids, pixels = prompt(2)
    with torch.no_grad():
        want = dense(ids, pixel_values=pixels).logits
        model = mor.apply_pmod(dense, Schedule([0.999] * 8))
        for layer in pmod_layers(model):
            layer.ratio = 1.0
        got = model(ids, pixel_values=pixels).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains_and_routers_learn_by_their_weights(checkpointing):
    model = pmod_llava().train()
    ids, mask, pixels = left_padded([prompt(1), prompt(2, seed=1)])
    labels = ids.masked_fill((ids == IMAGE) | (ids == PAD), -100)
    if checkpointing:
        model.gradient_checkpointing_enable()
    output = model(ids, attention_mask=mask, pixel_values=pixels, labels=labels)
    output.loss.backward()
    assert all(layer.router.weight.grad.abs().sum() > 0 for layer in pmod_layers(model))
    plain = pmod_llava().train()
    plain(ids, attention_mask=mask, pixel_values=pixels, labels=labels).loss.backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_saved_loaded_copied_and_in_half(tmp_path):
    model, (ids, pixels) = pmod_llava(), prompt(1)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        want = model(ids, pixel_values=pixels).logits
        model.save_pretrained(tmp_path)
        loaded = mor.load_swapped(tmp_path)
        assert [layer.ratio for layer in pmod_layers(loaded)] == list(shifted_cosine(8))[2:]
        for same in (loaded, *copies):
            assert torch.equal(same(ids, pixel_values=pixels).logits, want)
        half = mor.load_swapped(tmp_path, dtype=torch.bfloat16)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        assert half(ids, pixel_values=pixels).logits.dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert model(ids, pixel_values=pixels).logits.isfinite().all()


def test_hidden_states_are_those_of_all_layers():
    model, (ids, pixels) = pmod_llava(), prompt(1)
    with torch.no_grad():
        output = model(ids, pixel_values=pixels, output_hidden_states=True)
    assert [tuple(h.shape) for h in output.hidden_states] == [(1, ids.shape[1], 32)] * 9
    skipped = pmod_layers(model)[0].token_depths[0] == 0
    before, after = output.hidden_states[2][0, skipped], output.hidden_states[3][0, skipped]
    ratio = after / before
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))  # w * x
    assert ((ratio > 0.8) & (ratio < 1.2)).all()


def test_llava_next_on_a_photograph():
    """The real image processor, whose pictures have different numbers of tokens."""
    datasets = pytest.importorskip("sklearn.datasets")
    from transformers import LlavaNextImageProcessor

    photograph = datasets.load_sample_image("china.jpg")
    grid = [[24, 48], [48, 24], [48, 48]]
    processor = LlavaNextImageProcessor(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, image_grid_pinpoints=grid
    )
    config = LlavaNextConfig(
        vision_config=vision_config(), text_config=text_config(), image_token_id=IMAGE,
        image_grid_pinpoints=grid,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(config).eval()
    pictures = processor(images=[photograph], return_tensors="pt")
    with torch.no_grad():
        features = model.get_image_features(**pictures, return_dict=True).pooler_output
    count = features[0].shape[0]
    ids = torch.cat([torch.randint(3, 90, (4,)), torch.full((count,), IMAGE), torch.tensor([5, 6])])
    model = train_routers(mor.apply_pmod(model))
    out = model.generate(
        ids[None], **pictures, max_new_tokens=4, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    with torch.no_grad():
        full = model(out.sequences, **pictures, use_cache=False).logits[0, len(ids) - 1 : -1]
    torch.testing.assert_close(torch.cat(out.logits), full, atol=1e-4, rtol=1e-4)
    kept = [int(layer.token_depths.sum()) for layer in pmod_layers(model)]
    assert kept == [len(out.sequences[0]) - count + int(count * r) for r in shifted_cosine(8)][2:]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"schedule": constant(3, 0.5)}, "^apply_pmod: schedule: .* of 8 layers, got one of 3"),
        ({"schedule": 0.5}, "^apply_pmod: schedule: expected a Schedule of 8 layers, got 0.5"),
        ({"schedule": constant(8, 1.0)}, "^apply_pmod: schedule: expected ratios, some below 1"),
        ({"alpha": 1.0}, r"^apply_pmod: alpha: expected a number in \[0, 1\), got 1.0"),
        ({"alpha": "x"}, "^apply_pmod: alpha: .* got 'x'"),
    ],
    ids=str,
)
def test_bad_options_are_named_and_leave_the_model_alone(options, sentence):
    dense = dense_llava()
    before = type(dense), dense.config.to_dict(), [type(m) for m in dense.modules()]
    with pytest.raises(ValueError, match=sentence):
        mor.apply_pmod(dense, **options)
    assert (type(dense), dense.config.to_dict(), [type(m) for m in dense.modules()]) == before


def test_bad_models_and_calls():
    with pytest.raises(ValueError, match=r"expected a model of one of \['llava', 'llava_next'\]"):
        mor.apply_pmod(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="expected a LlavaForConditionalGeneration, got LlavaM"):
        mor.apply_pmod(dense_llava().model)
    model, (ids, pixels) = pmod_llava(), prompt(1)
    with pytest.raises(ValueError, match="the model has routed layers already"):
        mor.apply_pmod(model)
    with pytest.raises(ValueError, match="expected input_ids, by which vision tokens are known"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="expected a call of the model itself"):
        model.model(ids, pixel_values=pixels)
    with pytest.raises(ValueError, match="no use for the argument 'foo'"):
        model(ids, pixel_values=pixels, foo=1)
    with pytest.raises(ValueError, match="output_attentions: depth_attention keeps no weights"):
        model(ids, pixel_values=pixels, output_attentions=True)
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \[1, 24\]"):
        model(ids, pixel_values=pixels, attention_mask=torch.ones(1, 1, 24, 24))
    with pytest.raises(ValueError, match="expected one document in each row"):
        model(ids, pixel_values=pixels, position_ids=torch.arange(24)[None] % 12, use_cache=False)
