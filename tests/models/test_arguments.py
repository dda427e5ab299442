"""Arguments of Transformers' models: used as Llama uses them, or refused by name.

Over 300 lines in one file: one test for each argument, all over the same kinds of models.
"""

import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache, GenerationConfig, Trainer, TrainingArguments

from mor import MoRModel

from .conftest import MODELS, small_config, small_llama, small_model, small_swapped
from .test_generation import generate_greedily, padded, prompts

KINDS = ["expert", "swap-expert", "swap-one"]


@pytest.fixture(params=KINDS)
def model(request):
    return MODELS[request.param]().eval()


def depth(model) -> int:
    """Unrolled layers: one swapped by its index is used three times."""
    layers = getattr(model.config, "mor_swap", {}).get("layers")
    return 10 if isinstance(layers, int) else 8


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32])
def test_masks_of_any_dtype_mean_the_same(model, dtype):
    tokens, mask = padded([9, 4], "left")
    with torch.no_grad():
        want = model(tokens, attention_mask=mask, use_cache=False).logits
        got = model(tokens, attention_mask=mask.to(dtype), use_cache=False).logits
    assert torch.equal(got[mask.bool()], want[mask.bool()])


def test_masks_that_are_not_read_are_refused(model):
    """Masks of four dimensions, and masks added to scores, were taken for masks of ones."""
    tokens = prompts(2, 6)
    seen = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    added = torch.zeros(2, 1, 6, 6).masked_fill(~seen, torch.finfo(torch.float32).min)
    for mask in (seen, added):
        with pytest.raises(
            ValueError, match=r"attention_mask: expected .*position_ids that restart"
        ):
            model(tokens, attention_mask=mask)
    with pytest.raises(ValueError, match="attention_mask"):
        model(tokens, attention_mask=torch.zeros(2, 6).masked_fill(torch.ones(2, 6) == 0, -1e9) - 1)


@pytest.mark.parametrize("router", ["expert", "token"])
@pytest.mark.parametrize("training", [False, True])
def test_document_numbers_in_the_mask_keep_documents_apart(router, training):
    """As LLaMA-Factory's packing writes them; every number but 0 was a token of one text."""
    model = small_model(router=router).train(training)
    tokens = prompts(2, 8)
    mask = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0], [0, 7, 7, 7, 3, 3, 9, 0]])
    got = model(tokens, attention_mask=mask).logits
    for row, start, end in ((0, 0, 3), (0, 3, 7), (1, 1, 4), (1, 4, 6), (1, 6, 7)):
        want = model(tokens[row : row + 1, start:end]).logits[0]
        torch.testing.assert_close(got[row, start:end], want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(2, 5), (2, 9), (1, 6), (6,)])
def test_masks_of_other_sizes_are_refused(model, shape):
    tokens, cache = prompts(2, 6), DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens[:, :4], past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask: expected"):
        model(tokens[:, 4:], attention_mask=torch.ones(shape), past_key_values=cache)


def test_masks_of_a_swapped_model_name_the_past():
    """Its dense layers took a mask of this call's columns for one of the first columns."""
    model, tokens = small_swapped().eval(), prompts(2, 6)
    cache = DynamicCache(config=model.config)
    model(tokens[:, :4], past_key_values=cache)
    with pytest.raises(ValueError, match=r"expected shape \[2, 6\] \(past columns among them\)"):
        model(tokens[:, 4:], attention_mask=torch.ones(2, 2), past_key_values=cache)


def test_document_numbers_are_refused_where_they_cannot_be_used():
    tokens, mask = prompts(1, 6), torch.tensor([[1, 1, 1, 2, 2, 2]])
    with pytest.raises(ValueError, match="swap: documents packed in a row"):
        small_swapped().eval()(tokens, attention_mask=mask, use_cache=False)
    model = small_model().eval()
    cache = model(prompts(1, 2), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="a row holds several documents"):
        model(tokens, attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("pads", ["documents-of-one-token", "masked"])
@pytest.mark.parametrize("kind", ["expert", "token", "shared", "swap-expert"])
def test_documents_beside_pads_do_not_see_each_other(kind, pads):
    """Positions that restart beside a mask with zeros ended in an operator's message."""
    model, tokens = MODELS[kind]().eval(), prompts(1, 9)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 0]])
    mask = {} if pads != "masked" else {"attention_mask": torch.tensor([[1] * 7 + [0, 0]])}
    if mask and kind.startswith("swap"):
        with pytest.raises(ValueError, match=r"position_ids alone: expected no attention_mask"):
            model(tokens, position_ids=positions, use_cache=False, **mask)
        return
    with torch.no_grad():
        got = model(tokens, position_ids=positions, use_cache=False, **mask).logits[0]
        for start, end in ((0, 3), (3, 7)):
            want = model(tokens[:, start:end], use_cache=False).logits[0]
            torch.testing.assert_close(got[start:end], want, atol=1e-4, rtol=0)


def test_positions_of_one_row_are_those_of_all(model):
    tokens, positions = prompts(3, 7), torch.arange(7)[None]
    with torch.no_grad():
        want = model(tokens).logits
        assert torch.equal(model(tokens, position_ids=positions).logits, want)
        cache = DynamicCache(config=model.config)
        model(tokens[:, :4], position_ids=positions[:, :4], past_key_values=cache)
        rest = model(tokens[:, 4:], position_ids=positions[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(rest, want[:, 4:], atol=1e-4, rtol=0)


def test_what_collators_say_twice_is_taken():
    """Flattening collators give boundaries beside positions."""
    model, tokens = small_model().eval(), prompts(1, 8)
    ends = torch.tensor([0, 3, 8], dtype=torch.int32)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    more = {"cu_seq_lens_k": ends, "max_length_q": 5, "max_length_k": 5, "seq_idx": positions}
    with torch.no_grad():
        want = model(tokens, cu_seq_lens_q=ends).logits
        for given in ({"cu_seq_lens_q": ends}, {}):
            got = model(tokens, position_ids=positions, **given, **more).logits
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("how", ["argument", "config"])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_hidden_states_of_all_layers(model, how, side):
    """The configuration's output_hidden_states was not read."""
    tokens, mask = (prompts(2, 9), None) if side is None else padded([9, 4], side)
    if how == "config":
        model.config.output_hidden_states = True
    asked = {"output_hidden_states": True} if how == "argument" else {}
    with torch.no_grad():
        states = model(tokens, attention_mask=mask, use_cache=False, **asked).hidden_states
        assert [tuple(s.shape) for s in states] == [(2, 9, 64)] * (depth(model) + 1)
        if side is not None:
            short = tokens[1][mask[1].bool()][None]
            alone = model(short, use_cache=False, **asked).hidden_states
            for state, want in zip(states, alone, strict=True):
                kept = state[1][mask[1].bool()]
                torch.testing.assert_close(kept, want[0], atol=1e-4, rtol=0)


def test_hidden_states_of_cached_calls(model):
    tokens, cache = prompts(2, 9), DynamicCache(config=model.config)
    with torch.no_grad():
        want = model(tokens, use_cache=False, output_hidden_states=True).hidden_states
        parts = [
            model(t, past_key_values=cache, output_hidden_states=True).hidden_states
            for t in tokens.split([5, 1, 3], dim=1)
        ]
    for got, state in zip(zip(*parts, strict=True), want, strict=True):
        torch.testing.assert_close(torch.cat(got, 1), state, atol=1e-4, rtol=0)


def test_models_without_a_head_read_the_configuration_too():
    model = MoRModel(small_config(output_hidden_states=True, return_dict=False)).eval()
    out = model(prompts(2, 9))
    assert isinstance(out, tuple)
    assert len(out[2]) == 9


def plain(value):
    """A cache by its kind: it grows with each call."""
    return type(value).__name__ if isinstance(value, DynamicCache) else value


@pytest.mark.parametrize("how", ["argument", "config"])
def test_tuples_hold_what_llamas_do_first(model, how):
    """return_dict=False was ignored, and lost the router's losses."""
    tokens, llama = prompts(2, 6), small_llama().eval()
    for options in ({}, {"labels": tokens}, {"use_cache": False}, {"output_hidden_states": True}):
        kinds = [plain(x) for x in llama(tokens, return_dict=False, **options)]
        model.config.return_dict = True
        named = model(tokens, **options)
        model.config.return_dict = how == "argument"
        asked = {"return_dict": False} if how == "argument" else {}
        got = model(tokens, **asked, **options)
        assert type(got) is tuple
        assert [type(plain(x)) for x in got[: len(kinds)]] == [type(x) for x in kinds]
        if "labels" in options:
            assert torch.equal(got[0], named.loss)
            assert named.loss != named.lm_loss or named.router_loss is None
        assert torch.equal(got["labels" in options], named.logits)


def test_shifted_labels_are_the_targets_as_they_are(model):
    tokens = prompts(2, 8)
    targets = tokens.roll(-1, 1)
    targets[1, 4:] = -100
    for labels in ({"labels": tokens}, {}):
        if not labels and hasattr(model.config, "mor_swap"):
            continue  # as Transformers' models, which compute a loss where there are labels
        out = model(tokens, shift_labels=targets, **labels)
        want = functional.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
        torch.testing.assert_close(out.lm_loss, want)
        torch.testing.assert_close(out.loss, want + out.router_loss)


@pytest.mark.parametrize("items", [None, 0, 7, torch.tensor(0)])
@pytest.mark.parametrize("kind", ["expert", "token", "swap-expert", "swap-token"])
def test_a_batch_without_targets_adds_nothing(kind, items):
    """0 / 0 made weights NaN."""
    model, tokens = MODELS[kind]().train(), prompts(2, 8)
    labels = torch.full_like(tokens, -100)
    given = {} if items is None else {"num_items_in_batch": items}
    out = model(tokens, labels=labels, **given)
    out.loss.backward()
    assert out.loss == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_attention_weights_are_refused(model):
    with pytest.raises(ValueError, match="output_attentions: depth_attention keeps no weights"):
        model(prompts(1, 4), output_attentions=True)
    model(prompts(1, 4), output_attentions=False)
    model.config._output_attentions = True  # as loaded; the setter of most models refuses it
    for call in (model, model.model):
        with pytest.raises(ValueError, match="output_attentions: depth_attention keeps no weights"):
            call(prompts(1, 4))


@pytest.mark.parametrize(
    "given", ["argument", "model", "model-beside-config", "config", "position"]
)
def test_early_exit_is_refused_and_leaves_the_configuration(model, given):
    """The number of layers in the configuration stayed at the draft's."""
    tokens, options = prompts(1, 6), {"max_new_tokens": 4, "do_sample": False}
    want, more, config = model.generate(tokens, **options), {}, []
    if given == "argument":
        more = {"assistant_early_exit": 2}
    elif given == "config":
        more = {"generation_config": GenerationConfig(assistant_early_exit=2)}
    elif given == "position":
        config = [GenerationConfig(assistant_early_exit=2)]
    else:
        model.generation_config.assistant_early_exit = 2
        more = {} if given == "model" else {"generation_config": GenerationConfig()}
    with pytest.raises(ValueError, match="assistant_early_exit=2 is not supported"):
        model.generate(tokens, *config, **options, **more)
    assert model.config.num_hidden_layers == 8
    model.generation_config.assistant_early_exit = None
    assert torch.equal(model.generate(tokens, **options), want)


@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize("kind", ["expert", "token", "recursive", "swap-expert"])
def test_embeddings_generate_what_their_tokens_do(kind, side):
    """`generate` took no inputs_embeds at all."""
    if kind.startswith("swap") and side == "right":
        pytest.skip("Transformers' own layers do not promise right padding")
    model = MODELS[kind]().eval()
    tokens, mask = (prompts(3, 9), None) if side is None else padded([9, 5, 8], side)
    states = model.get_input_embeddings()(tokens).detach()
    for more in ({}, {"num_beams": 2}, {"use_cache": False}):
        options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, **more}
        want = model.generate(tokens, **options)[:, 9:]
        assert torch.equal(model.generate(inputs_embeds=states, **options), want)


@pytest.mark.parametrize(
    ("name", "value"),
    [("token_type_ids", torch.zeros(1, 4)), ("head_mask", torch.ones(4)), ("attention_maks", 1)],
)
def test_arguments_that_nothing_reads_are_refused(name, value):
    model = small_model()
    with pytest.raises(ValueError, match=f"MoRModel: no use for the argument '{name}'"):
        model(prompts(1, 4), **{name: value})
    model(prompts(1, 4), **{name: None})


def test_losses_of_other_layouts(model):
    """`logits_to_keep` with labels, and more labels than logits, are refused or right."""
    tokens = prompts(2, 8)
    with torch.no_grad():
        full = model(tokens).logits
        torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, full[:, -2:])
        kept = torch.tensor([1, 3])
        torch.testing.assert_close(model(tokens, logits_to_keep=kept).logits, full[:, kept])


def test_hidden_states_and_logits_of_generation(model):
    tokens, mask = padded([7, 4], "left")
    out = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=3,
        do_sample=False,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    assert len(out.hidden_states) == 3
    assert all(len(step) == depth(model) + 1 for step in out.hidden_states)
    assert out.hidden_states[1][-1].shape == (2, 1, 64)
    sequences, _ = generate_greedily(model, tokens, mask, steps=3)
    assert torch.equal(out.sequences, sequences)


def test_the_trainer_evaluates_with_metrics(make, tmp_path):
    """It waited for shift_labels, and gave no loss; or could not gather the routing."""
    rows = [{"input_ids": t, "labels": t} for t in prompts(6, 8)]
    arguments = TrainingArguments(
        tmp_path, report_to="none", use_cpu=True, per_device_eval_batch_size=4, disable_tqdm=True
    )
    shapes = []

    def metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return {"seen": 1.0}

    found = Trainer(make(), arguments, eval_dataset=rows, compute_metrics=metrics).evaluate()
    assert found["eval_seen"] == 1.0
    assert found["eval_loss"] > 0
    assert shapes == [(6, 8, 97)]
