"""What belongs to a call leaves nothing in the model: threads, interrupts, copies, modes."""

import copy
import gc
import io
import signal
import sys
import threading
import weakref

import pytest
import torch

from .conftest import MODELS, small_model, small_swapped
from .test_generation import padded, prompts


def greedily(model, tokens, mask=None, **options):
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    return model.generate(tokens, attention_mask=mask, **options)


@pytest.fixture
def busy_threads():
    """Threads take turns after every few bytecodes."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def adapted(model):
    """A user's own LoRA on top, with weights that count."""
    from peft import LoraConfig, inject_adapter_in_model

    options = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return inject_adapter_in_model(options, model, "mine")


THREADED = {
    **{kind: MODELS[kind] for kind in ("token", "shared", "swap-expert", "swap-one")},
    "dora": lambda: small_model(relaxation="dora", relaxation_rank=2),
    "lora-and-a-users": lambda: adapted(small_model(relaxation="lora", relaxation_rank=2)),
}


@pytest.mark.parametrize("kind", THREADED)
def test_threads_can_share_one_model(kind, busy_threads):
    """One model gives each of several threads its own answers, and is whole afterwards."""
    model = start_adapters(THREADED[kind]()).eval()
    requests = [prompts(1, n, seed=n) for n in (5, 9)]
    want = [greedily(model, tokens) for tokens in requests]
    names, wrong, start = set(model.state_dict()), [], threading.Barrier(len(requests))

    def client(tokens, answer):
        torch.set_num_threads(1)
        start.wait()
        try:
            for _ in range(2):
                if not torch.equal(greedily(model, tokens), answer):
                    wrong.append(tokens)
        except Exception as error:  # a thread's would be lost
            wrong.append(error)

    clients = [
        threading.Thread(target=client, args=pair) for pair in zip(requests, want, strict=True)
    ]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    assert not wrong
    assert set(model.state_dict()) == names
    assert torch.equal(greedily(model, requests[0]), want[0])


def start_adapters(model):
    """Relaxed models start as no change at all, and would show no mix-up of their adapters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.mark.parametrize("kind", THREADED)
def test_an_interrupted_call_leaves_the_model_whole(kind):
    """Ctrl-C in a later use of a layer took weights out of models with shared keys."""
    model = start_adapters(THREADED[kind]()).eval()
    tokens = prompts(2, 8)
    layers = [m for n, m in model.named_modules() if n.endswith("self_attn")]
    calls = []

    def interrupt(module, args, output):
        calls.append(1)
        if len(calls) == 6:
            signal.raise_signal(signal.SIGINT)

    with torch.no_grad():
        want, names = model(tokens).logits, set(model.state_dict())
        handles = [layer.register_forward_hook(interrupt) for layer in layers]
        # Shells have the jobs that they start in the background ignore it.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt):
            model(tokens)
        signal.signal(signal.SIGINT, before)
        for handle in handles:
            handle.remove()
        assert set(model.state_dict()) == names
        assert torch.equal(model(tokens).logits, want)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_a_copy_after_a_training_step_is_a_model_of_its_own(make, copied):
    """Copies failed, shared router losses with the original, and kept it alive."""
    tokens, other = prompts(2, 16), prompts(2, 16, seed=1)
    original = make().train()
    original(tokens, labels=tokens).loss.backward()
    twin = copied(original)
    assert type(twin) is type(original)
    want = original(tokens, labels=tokens).loss
    original(other, labels=other)
    got = twin(tokens, labels=tokens)
    torch.testing.assert_close(got.loss, want)
    got.loss.backward()
    assert all(p.grad is not None for p in twin.parameters())
    alive = weakref.ref(original)
    del original, want
    gc.collect()
    assert alive() is None
    greedily(twin.eval(), tokens)


def test_a_saved_model_holds_no_activations(make):
    model = make().eval()
    sizes = []
    for _ in range(2):
        file = io.BytesIO()
        torch.save(model, file)
        sizes.append(file.tell())
        with torch.no_grad():
            model(prompts(4, 200))
    assert sizes[1] < 1.01 * sizes[0]


def test_copies_of_a_swapped_model_save_and_load(tmp_path):
    import mor

    tokens = prompts(2, 8)
    model = copy.deepcopy(small_swapped()).eval()
    model.save_pretrained(tmp_path)
    loaded = mor.load_swapped(tmp_path)
    again = copy.deepcopy(saved_and_loaded(loaded))
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def counters(model):
    """Counters of training: warm-up steps, loads."""
    routing = next(
        (m for m in model.modules() if type(m).__name__ in ("ExpertChoice", "TokenChoice")), None
    )
    if routing is None:
        return None
    load = getattr(routing, "load", torch.zeros(()))
    return int(routing.warmup_step), load.tolist(), routing.metrics.compute()


WARM = {
    "expert-warm-up": lambda: small_model(capacity_warmup_steps=50),
    "token-warm-up": lambda: small_model(router="token", balance_warmup_steps=50),
    "token-loss-free": lambda: small_model(router="token", router_balancing="loss_free"),
    "swap-loss-free": lambda: small_swapped(router="token", balancing="loss_free"),
    "swap-warm-up": lambda: small_swapped(capacity_warmup_steps=50),
}
WAYS = {
    "greedy": {},
    "uncached": {"use_cache": False},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
    "chunked": {"prefill_chunk_size": 3},
    "lookup": {"prompt_lookup_num_tokens": 2},
    "guided": {"guidance_scale": 1.5},
}


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        *((kind, "greedy") for kind in [*MODELS, *WARM]),
        *((kind, way) for kind in ("shared", "swap-warm-up", "swap-loss-free") for way in WAYS),
    ],
)
def test_generation_in_training_mode_is_that_of_evaluation(kind, way):
    """A rollout of a model in training ran every recursion and moved its warm-up and loads."""
    model = {**MODELS, **WARM}[kind]()
    tokens, mask = (prompts(1, 9), None) if way == "lookup" else padded([9, 4], "left")
    torch.manual_seed(3)
    want = greedily(model.eval(), tokens, mask, **WAYS[way])
    before = counters(model.train())
    torch.manual_seed(3)
    assert torch.equal(greedily(model, tokens, mask, **WAYS[way]), want)
    assert counters(model) == before
    model(tokens, attention_mask=mask, labels=tokens).loss.backward()


def test_evaluation_counts_metrics_once_and_generation_not_at_all():
    for model in (small_model().eval(), small_swapped().eval()):
        metrics = next(m.metrics for m in model.modules() if hasattr(m, "metrics"))
        greedily(model, prompts(2, 7))
        assert metrics.compute() == {}
        model(prompts(2, 7))
        assert metrics._tokens == 14


def inference(model, tokens):
    with torch.inference_mode():
        model(tokens)
        greedily(model, tokens)


def test_inference_mode_leaves_nothing_behind(make):
    """Validation in inference mode, then anything else: no tensor of it is updated in place."""
    tokens = prompts(2, 8)
    model = make().eval()
    inference(model, tokens)
    with torch.no_grad():
        model(tokens)
    greedily(model, tokens)
    model.train()(tokens, labels=tokens).loss.backward()
    inference(model.eval(), tokens)
    model.train()(tokens, labels=tokens).loss.backward()
    with torch.inference_mode():
        model(tokens)  # in training mode
    model(tokens, labels=tokens).loss.backward()


def test_models_built_in_inference_mode_run_outside_it(make):
    with torch.inference_mode():
        model = make().eval()
    with torch.no_grad():
        model(prompts(2, 8))
    greedily(model, prompts(2, 8))


@pytest.mark.parametrize("kind", WARM)
def test_counters_of_inference_mode_go_on(kind):
    model, tokens = WARM[kind]().train(), prompts(2, 8)
    routing = next(m for m in model.modules() if hasattr(m, "warmup_step"))
    for calls in (1, 2):
        with torch.inference_mode(calls == 1):
            model(tokens)
        if "warm-up" in kind:
            assert routing.warmup_step == calls
        else:
            assert routing.load.sum() == calls * 16
    if "loss-free" in kind:
        routing.update_bias()
        assert routing.bias.any()
