"""mor.apply_video_mod: vision tokens of each frame skip layers, against a slow reference.

Over 300 lines in one file: all tests share one small model and its clip.
"""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import (
    DynamicCache,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import mor
from mor.modules.packing import pack
from mor.schedules import Schedule, constant, token_removals
from mor.systems import VideoMoD
from mor.systems.vision_tokens import FrameSizes, VisionTokens
from tests.systems.small_llava import (
    IMAGE,
    PAD,
    TEXT,
    VIDEO,
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

#: Pixels of a side, and vision tokens of a frame: 8 patches a side, pooled by 2.
SIDE, FRAME = 48, 16
KINDS = ("next", "onevision")


def dense_llava(kind="next", text="llama", num_layers=4, seed=0):
    configs = {"text_config": text_config(text, num_layers), "vision_config": vision_config(SIDE)}
    tokens = {"image_token_index": IMAGE, "video_token_index": VIDEO}
    torch.manual_seed(seed)
    if kind == "next":
        config = LlavaNextVideoConfig(**configs, **tokens)
        return LlavaNextVideoForConditionalGeneration(config).eval()
    config = LlavaOnevisionConfig(
        **configs, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config).eval()


def video_layers(model):
    return [m for m in model.model.language_model.layers if isinstance(m, VideoMoD)]


def train_routers(model, seed=0):
    """Routers as of a trained model: logits that differ."""
    torch.manual_seed(seed)
    for layer in video_layers(model):
        nn.init.normal_(layer.router.weight, std=0.3)
    return model


def video_llava(kind="next", ratio=0.2, **options):
    return train_routers(mor.apply_video_mod(dense_llava(kind, **options), ratio))


def clip(num_frames, name="china.jpg"):
    """A photograph panned and zoomed: [1, F, 3, SIDE, SIDE]."""
    datasets = pytest.importorskip("sklearn.datasets")
    photograph = torch.from_numpy(datasets.load_sample_image(name).copy()).permute(2, 0, 1)
    frames = []
    for i in range(num_frames):
        size, left, top = 400 - 20 * i, 15 * i, 5 * i
        window = photograph[None, :, top : top + size, left : left + size].float() / 255
        frames.append(nn.functional.interpolate(window, (SIDE, SIDE), mode="area"))
    return torch.stack(frames, dim=1)


def prompt(frames, text=5, seed=0, newlines=0):
    """Token ids of a text, a clip of some frames, and a text."""
    torch.manual_seed(seed)
    tokens = torch.full((frames * FRAME + newlines,), VIDEO)
    return torch.cat([torch.randint(3, 90, (text,)), tokens, torch.randint(3, 90, (3,))])[None]


def logits_of(model, ids, frames=None, **options):
    with torch.no_grad():
        return model(ids, pixel_values_videos=frames, **options).logits


def stream(model, ids, frames, cache, newlines=0):
    """A call for each frame and each text of a prompt: last logits of each call, depths of all."""
    step = FRAME + newlines
    first = (ids == VIDEO).int().argmax().item()
    last = first + frames.shape[1] * step
    begins = [0, *range(first, last, step), last, ids.shape[1]]
    logits, depths = [], [[] for _ in video_layers(model)]
    for begin, end in pairwise(begins):
        own = ids[:, begin:end]
        index = (begin - first) // step
        given = frames[:, index : index + 1] if (own == VIDEO).any() else None
        # The mask and the kept logits as generate has them.
        options = {"attention_mask": torch.ones(1, end).long(), "logits_to_keep": 1}
        logits.append(logits_of(model, own, given, past_key_values=cache, **options))
        for found, layer in zip(depths, video_layers(model), strict=True):
            found.append(layer.token_depths)
    return torch.cat(logits, dim=1), [torch.cat(found, dim=1) for found in depths]


# One layer


def one_layer(ratio=0.5, dtype=torch.float32):
    """A layer, states of two sequences (two frames of 4 with text between, one frame), angles."""
    torch.manual_seed(0)
    layer = VideoMoD(PlainLayer(), 32, 0, 1, ratio).to(dtype)
    nn.init.normal_(layer.router.weight, std=0.3)
    lengths = torch.tensor([13, 7])
    mask = torch.arange(13) < lengths.unsqueeze(1)
    video = torch.zeros_like(mask)
    video[0, 2:6], video[0, 7:11], video[1, 0:4] = True, True, True
    batch = pack((2, 13), mask.device, mask)
    x = torch.randn(batch.packing.num_rows, 32, dtype=dtype)
    angles = LlamaRotaryEmbedding(text_config())(x.unsqueeze(0), batch.packing.positions[None])
    tokens = VisionTokens.of_frames(batch, video, FrameSizes(4, 4), "test")
    return layer, x, tokens, tuple(part[0].to(dtype) for part in angles)


def reference(layer, x, tokens, angles):
    """Sequence by sequence and frame by frame, with a mask in place of a gather."""
    plain, outs = layer.layer, []
    for begin, end in pairwise(tokens.batch.packing.cu_seqlens.tolist()):
        h, vision = x[begin:end], tokens.is_vision[begin:end]
        mu = h @ layer.router.weight[0]
        places, kept = vision.nonzero().flatten().tolist(), ~vision
        for frame in (places[i : i + 4] for i in range(0, len(places), 4)):
            best = sorted(frame, key=lambda i: (-mu[i].item(), i))
            kept[best[: max(1, int(layer.ratio * 4))]] = True
        attended = masked_attention(layer, h, kept, [part[begin:end] for part in angles])
        f = attended + plain.mlp(plain.post_attention_layernorm(h + attended))
        weight = torch.where(vision, mu, 1)[:, None]
        outs.append(torch.where(kept[:, None], h + weight * f, h))
    return torch.cat(outs)


@pytest.mark.parametrize("ratio", [0.05, 0.5, 0.8, 1.0])
def test_a_layer_computes_its_definition(ratio):
    layer, x, tokens, angles = one_layer(ratio)
    got, kept = call(layer, x, tokens, angles)
    torch.testing.assert_close(got, reference(layer, x, tokens, angles))
    assert len(kept) == 20 - 12 + 3 * max(1, int(4 * ratio))


def test_every_frame_keeps_its_share_whatever_the_others_score():
    layer, x, tokens, angles = one_layer(0.25)
    x[2:6] = 100 * layer.router.weight.detach()  # all of the first frame above all of the others
    _, kept = call(layer, x, tokens, angles)
    kept = torch.isin(torch.arange(20), kept)
    assert [int(kept[begin : begin + 4].sum()) for begin in (2, 7, 13)] == [1, 1, 1]


def test_gradients():
    check_gradients(*one_layer(dtype=torch.float64))


def test_a_layer_never_waits_for_the_device():
    check_never_waits_for_the_device(*one_layer())


@pytest.mark.slow
def test_a_layer_is_one_graph():
    check_is_one_graph(*one_layer())


# Streams


def rows_of(layer):
    """Keys, values and the places of a cache's layer, without room to grow."""
    if not hasattr(layer, "lengths"):
        return layer.keys, layer.values
    n = int(layer.lengths)
    return layer.keys[:, :n], layer.values[:, :n], layer.positions[:, :n]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_equals_the_whole_clip_bit_for_bit_at_the_same_chunk_size(kind):
    """A call for each frame, and the clip as one prompt that Transformers prefills in chunks."""
    model, frames, newlines = video_llava(kind), clip(5), int(kind == "onevision")
    ids = prompt(5, text=FRAME + newlines, newlines=5 * newlines)
    whole = DynamicCache(config=model.config.text_config)
    out = model.generate(
        ids, pixel_values_videos=frames.transpose(0, 1) if newlines else frames,
        past_key_values=whole, prefill_chunk_size=FRAME + newlines, max_new_tokens=1,
        do_sample=False, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    streamed = DynamicCache(config=model.config.text_config)
    logits, _ = stream(model, ids, frames, streamed, newlines)
    assert torch.equal(logits[:, -1], out.logits[0])
    text = FRAME + 6 * newlines + 3
    assert [layer.get_seq_length() for layer in streamed.layers] == [text + 5 * FRAME] * 4
    for index, (one, other) in enumerate(zip(whole.layers, streamed.layers, strict=True)):
        found = rows_of(one)
        assert all(torch.equal(a, b) for a, b in zip(found, rows_of(other), strict=True))
        assert found[0].numel() // 16 == text + 5 * (3 if index % 2 else FRAME)


@pytest.mark.parametrize("text", TEXT)
def test_a_stream_keeps_the_tokens_of_the_whole_clip(text):
    model, frames, ids = video_llava(text=text), clip(5, "flower.jpg"), prompt(5)
    whole = logits_of(model, ids, frames)
    kept = [layer.token_depths for layer in video_layers(model)]
    logits, depths = stream(model, ids, frames, DynamicCache(config=model.config.text_config))
    ends = [4, *range(4 + FRAME, 5 + 5 * FRAME, FRAME), -1]
    torch.testing.assert_close(logits, whole[:, ends], atol=1e-4, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(depths, kept, strict=True))
    assert all(int(depth.sum()) == 8 + 5 * 3 for depth in kept)


def test_frames_see_nothing_of_later_ones():
    model, frames, ids = video_llava(), clip(4), prompt(4)
    before = logits_of(model, ids, frames)
    frames[:, 3] = 0
    after = logits_of(model, ids, frames)
    until = 5 + 3 * FRAME
    torch.testing.assert_close(before[:, :until], after[:, :until], atol=1e-5, rtol=0)
    assert not torch.allclose(before[:, until:], after[:, until:], atol=1e-2)


def test_chunks_of_a_prompt_hold_whole_frames():
    """Transformers' chunked prefill, at the size of a frame and at another."""
    model, frames, ids = video_llava(), clip(3), prompt(3, text=FRAME)
    options = {"max_new_tokens": 3, "do_sample": False}
    want = model.generate(ids, pixel_values_videos=frames, **options)
    got = model.generate(ids, pixel_values_videos=frames, prefill_chunk_size=FRAME, **options)
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match=r"a multiple of 16 video tokens .* got 4 in row 0"):
        model.generate(ids, pixel_values_videos=frames, prefill_chunk_size=FRAME + 4, **options)


# Whole models


@pytest.mark.parametrize("kind", KINDS)
def test_cached_generation_equals_full_forward(kind):
    model, newline = video_llava(kind), int(kind == "onevision")
    rows = [
        (prompt(2, 4, newlines=newline), clip(2)),
        (prompt(2, 7, seed=1, newlines=newline), clip(2, "flower.jpg")),
        (prompt(0, 9, seed=2), clip(2)[:0]),
    ]
    ids, mask, frames = left_padded(rows)
    out = model.generate(
        ids, attention_mask=mask, pixel_values_videos=frames, max_new_tokens=4, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    logits = torch.stack(out.logits, dim=1)
    for row, (own, own_frames) in enumerate(rows):
        n = own.shape[1]
        whole = out.sequences[row : row + 1, ids.shape[1] - n :]
        given = own_frames if len(own_frames) else None
        full = logits_of(model, whole, given, use_cache=False)[0, n - 1 : -1]
        torch.testing.assert_close(logits[row], full, atol=1e-4, rtol=1e-4)


def test_beams_share_a_clip():
    model = video_llava()
    out = model.generate(
        prompt(2), pixel_values_videos=clip(2), max_new_tokens=3, num_beams=2, do_sample=False
    )
    assert out.shape == (1, 5 + 2 * FRAME + 3 + 3)


@pytest.mark.parametrize("text", TEXT)
def test_text_alone_runs_as_before_and_removing_restores_every_bit(text):
    dense, ids, frames = dense_llava(text=text), prompt(2), clip(2)
    words = torch.randint(3, 90, (2, 9))
    before = type(dense), dense.config.to_dict()
    want = logits_of(dense, words), logits_of(dense, ids, frames)
    model = train_routers(mor.apply_video_mod(dense))
    torch.testing.assert_close(logits_of(model, words), want[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits_of(model, ids, frames), want[1], atol=1e-2)
    assert mor.remove(model) is dense
    assert torch.equal(logits_of(dense, words), want[0])
    assert torch.equal(logits_of(dense, ids, frames), want[1])
    assert (type(dense), dense.config.to_dict()) == before
    decoder = dense.model.language_model
    assert all(layer.self_attn.config is decoder.config for layer in decoder.layers)


def test_text_and_a_generated_video_token_take_every_layer():
    model = video_llava()
    logits_of(model, prompt(2), clip(2))
    for layer in video_layers(model):
        assert layer.token_depths[0, [*range(5), -3, -2, -1]].tolist() == [1] * 8
    logits_of(model, torch.tensor([[VIDEO]]))
    assert all(layer.token_depths.tolist() == [[1]] for layer in video_layers(model))


def test_a_schedule_and_every_name_the_layers():
    ratios = Schedule([1.0, 0.5, 1.0, 0.25])
    model = video_llava(ratio=ratios)
    logits_of(model, prompt(1), clip(1))
    assert [layer.slot for layer in video_layers(model)] == [1, 3]
    assert [int(layer.token_depths.sum()) - 8 for layer in video_layers(model)] == [8, 4]
    assert [m.slot for m in video_layers(mor.apply_video_mod(dense_llava(), every=1))] == [
        *range(4)
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains_and_routers_learn_by_their_weights(checkpointing):
    ids, mask, frames = left_padded([(prompt(2), clip(2)), (prompt(2, 7), clip(2, "flower.jpg"))])
    labels = ids.masked_fill((ids == VIDEO) | (ids == PAD), -100)
    given = {"attention_mask": mask, "pixel_values_videos": frames, "labels": labels}
    model, plain = video_llava().train(), video_llava().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    model(ids, **given).loss.backward()
    # What the last layer makes of a frame moves no label.
    assert all(layer.router.weight.grad.abs().sum() > 0 for layer in video_layers(model)[:-1])
    plain(ids, **given).loss.backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_loaded_copied_and_in_half(kind, tmp_path):
    model, frames = video_llava(kind), clip(2)
    ids = prompt(2, newlines=int(kind == "onevision"))
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    want = logits_of(model, ids, frames)
    model.save_pretrained(tmp_path)
    for same in (mor.load_swapped(tmp_path), *copies):
        assert [layer.ratio for layer in video_layers(same)] == [0.2] * 2
        assert torch.equal(logits_of(same, ids, frames), want)
    half = mor.load_swapped(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert logits_of(half, ids, frames.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert logits_of(model, ids, frames).isfinite().all()


def test_adapters_train_beside_the_routers():
    peft = pytest.importorskip("peft")
    model = video_llava()
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], modules_to_save=["router"])
    adapted = peft.get_peft_model(model, config).train()
    ids = prompt(2)
    adapted(ids, pixel_values_videos=clip(2), labels=ids).loss.backward()
    learned = [name for name, p in adapted.named_parameters() if p.grad is not None]
    assert sum("router" in name for name in learned) == 2
    assert sum("lora_B" in name for name in learned) >= 8


def test_hidden_states_are_those_of_all_layers():
    model, ids = video_llava(), prompt(2)
    with torch.no_grad():
        output = model(ids, pixel_values_videos=clip(2), output_hidden_states=True)
    assert [tuple(h.shape) for h in output.hidden_states] == [(1, ids.shape[1], 32)] * 5
    skipped = video_layers(model)[0].token_depths[0] == 0
    assert torch.equal(output.hidden_states[1][0, skipped], output.hidden_states[2][0, skipped])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ratio": 0.0}, r"^apply_video_mod: ratio: expected a share in \(0, 1\], got 0.0"),
        ({"ratio": "x"}, "^apply_video_mod: ratio: .* got 'x'"),
        ({"ratio": 1.0}, "^apply_video_mod: ratio: expected a ratio below 1, got 1 for every"),
        ({"ratio": constant(3, 0.5)}, "^apply_video_mod: ratio: .* of the 4 layers, got 3"),
        ({"ratio": token_removals(4, 2)}, "^apply_video_mod: ratio: expected ratios, got token_r"),
        ({"ratio": constant(4, 0.5), "every": 3}, "^apply_video_mod: every: a Schedule names"),
        ({"every": 5}, "^apply_video_mod: every: expected 1 to 4, the number of layers, got 5"),
        ({"every": True}, "^apply_video_mod: every: expected 1 to 4"),
    ],
    ids=str,
)
def test_bad_options_are_named_and_leave_the_model_alone(options, sentence):
    dense = dense_llava()
    before = type(dense), dense.config.to_dict(), [type(m) for m in dense.modules()]
    with pytest.raises(ValueError, match=sentence):
        mor.apply_video_mod(dense, **options)
    assert (type(dense), dense.config.to_dict(), [type(m) for m in dense.modules()]) == before


def test_bad_models_and_calls():
    with pytest.raises(ValueError, match=r"apply_video_mod: expected a model of one of \['llava_n"):
        mor.apply_video_mod(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="expected a LlavaNextVideoForConditionalGeneration, got"):
        mor.apply_video_mod(dense_llava().model)
    model, ids, frames = video_llava(), prompt(2), clip(2)
    with pytest.raises(ValueError, match="the model has routed layers already"):
        mor.apply_video_mod(model)
    with pytest.raises(ValueError, match=r"^apply_video_mod: expected input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match=r"^apply_video_mod: expected a call of the model itself"):
        model.model(ids, pixel_values_videos=frames)
    with pytest.raises(ValueError, match="no use for the argument 'foo'"):
        model(ids, pixel_values_videos=frames, foo=1)
    split = torch.tensor([[5] * 3 + [VIDEO] * 15, [5] + [VIDEO] * 17])
    with pytest.raises(ValueError, match=r"multiple of 16 video tokens .* got 15 in row 0"):
        model(split, pixel_values_videos=frames)
    positions = torch.arange(40)[None] % 20
    with pytest.raises(ValueError, match=r"^apply_video_mod: position_ids: expected one document"):
        model(ids, pixel_values_videos=frames, position_ids=positions, use_cache=False)
