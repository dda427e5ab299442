"""TRL's trainers, which compute their losses on the decoder's output."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import mor
from mor.training.trl import RouterLossMixin

from .conftest import ROUTING, TEXTS, VOCAB, tiny_model

trl = pytest.importorskip("trl")

TRAINERS = ["SFT", "DPO", "KTO", "GRPO", "RLOO"]

#: A weight at which the balancing loss is nearly all of a router's gradient.
BALANCED = {"router": "token", "router_balance_coef": 100.0}


def swapped_model(**options) -> LlamaForCausalLM:
    base = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return mor.swap(LlamaForCausalLM(base), (1, 4), num_recursions=3, **options)


def balanced_model(kind: str):
    if kind == "mor":
        return tiny_model(**BALANCED)
    model = swapped_model(router="token", loss_coefficients={"balancing_loss": 100.0})
    return copy.deepcopy(model) if kind == "copy" else model


def rows_for(kind: str) -> Dataset:
    prompts, answers = TEXTS[:4], [f" {text}" for text in TEXTS[2:]]
    return Dataset.from_dict(
        {
            "SFT": {"text": TEXTS * 4},
            "DPO": {"prompt": prompts, "chosen": answers, "rejected": answers[::-1]},
            "KTO": {"prompt": prompts, "completion": answers, "label": [True, False] * 2},
        }.get(kind, {"prompt": prompts})
    )


def trainer_for(kind, model, tokenizer, folder, mixin=RouterLossMixin, rows=None, **options):
    """A trainer of one step; `mixin` stands before TRL's class."""
    base = getattr(trl, f"{kind}Trainer")
    more = {}
    if kind in ("GRPO", "RLOO"):
        options = {"num_generations": 4, "max_completion_length": 6, "beta": 0.0, **options}
        more["reward_funcs"] = lambda completions, **_: [float(len(c)) for c in completions]
    if kind in ("DPO", "KTO") and not hasattr(model, "peft_config"):
        more["ref_model"] = copy.deepcopy(model).eval()
    settings = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    arguments = getattr(trl, f"{kind}Config")(str(folder), **{**settings, **options})
    return type(f"Mine{kind}", (mixin, base) if mixin else (base,), {})(
        model,
        args=arguments,
        train_dataset=rows_for(kind) if rows is None else rows,
        processing_class=tokenizer,
        **more,
    )


def router_gradient(trainer) -> torch.Tensor:
    """The routers' gradient at the optimizer step of a training run of one."""
    seen = {}
    for name, parameter in trainer.model.named_parameters():
        if ".router" in name and parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: seen.__setitem__(name, p.grad.clone())
            )
    trainer.train()
    return torch.cat([gradient.flatten() for gradient in seen.values()])


class Compared(RouterLossMixin):
    """Computes each training loss a second time, by the model's own forward."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pairs, self.documents, self.router_losses = [], [], []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with torch.no_grad():
            own = model(**inputs, num_items_in_batch=num_items_in_batch)
        self.pairs.append((loss.item(), own.loss.item()))
        self.router_losses.append(own.router_loss)
        self.documents.append(len(inputs.get("cu_seq_lens_q", [0])) - 1)
        return loss


SFT = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_length": 64,
    "learning_rate": 1e-2,
}


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", ROUTING)
def test_sft(name, packing, tokenizer, tmp_path):
    options = dict(ROUTING[name])
    if name == "expert":
        options |= {"router_aux_coef": 0.5}  # large enough to be seen in the loss
    model = tiny_model(**options)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sft = trainer_for(
        "SFT", model, tokenizer, tmp_path, Compared, packing=packing, **SFT | {"max_steps": 12}
    )
    sft.train()
    for loss, own in sft.pairs:
        assert loss == pytest.approx(own, rel=1e-5)
    if packing:
        assert max(sft.documents) > 2, "a packed batch has several documents"
    if options["router"] is not None:
        assert all(float(loss) > 0.05 for loss in sft.router_losses)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    losses = [line["loss"] for line in sft.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("kind", ["swap", "copy"])
def test_sft_of_a_swapped_model(kind, tokenizer, tmp_path):
    model = balanced_model(kind)
    sft = trainer_for("SFT", model, tokenizer, tmp_path, Compared, **SFT | {"max_steps": 3})
    sft.train()
    for loss, own in sft.pairs:
        assert loss == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize("model", ["mor", "swap", "copy"])
@pytest.mark.parametrize("kind", TRAINERS[1:])
def test_router_losses_were_a_key_error_or_lost(kind, model, tokenizer, tmp_path):
    got = [
        router_gradient(
            trainer_for(kind, balanced_model(model), tokenizer, tmp_path / str(mixin), mixin)
        )
        for mixin in (None, RouterLossMixin)
    ]
    assert got[1].abs().max() > 10 * got[0].abs().max()


@pytest.mark.parametrize("kind", TRAINERS)
def test_router_loss_counts_once_per_step_whatever_the_accumulation(kind, tokenizer, tmp_path):
    """The mean over the micro-batches of a step, which are all alike here."""
    rows = rows_for(kind)
    rows = Dataset.from_dict({name: [value[0]] * 8 for name, value in rows.to_dict().items()})
    got = []
    for batch_size, accumulation in ((8, 1), (4, 2)):
        options = {
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": accumulation,
            "shuffle_dataset": False,
        }
        if kind in ("GRPO", "RLOO"):
            # Completions of one length, and no advantage: what is left is the router's loss.
            options |= {"temperature": 1e-4, "num_generations": 4}
        else:
            del options["shuffle_dataset"]
        torch.manual_seed(0)
        model = balanced_model("mor")
        trainer = trainer_for(
            kind, model, tokenizer, tmp_path / str(accumulation), rows=rows, **options
        )
        got.append(router_gradient(trainer))
    torch.testing.assert_close(got[1], got[0], rtol=1e-2, atol=1e-2 * got[0].abs().max().item())


@pytest.mark.parametrize("kind", ["mor", "swap"])
def test_sft_without_the_mixin_left_router_losses_out(kind, tokenizer, tmp_path):
    model = balanced_model(kind)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sft = trainer_for("SFT", model, tokenizer, tmp_path, mixin=None)
    with pytest.raises(ValueError, match=r"SFTTrainer takes.*class Mine\(mor.trl.RouterLossMixin"):
        sft.train()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert sft.evaluate(sft.train_dataset.select(range(4)))["eval_loss"] > 0


@pytest.mark.parametrize("model", [{"router": None}, BALANCED | {"router_balance_coef": 0.0}])
def test_sft_without_the_mixin_is_fine_where_no_router_loss_is_lost(model, tokenizer, tmp_path):
    trainer_for("SFT", tiny_model(**model), tokenizer, tmp_path, mixin=None).train()


@pytest.mark.parametrize("how", ["label_smoothing", "compute_loss_func"])
def test_sft_with_a_loss_of_ones_own(how, tokenizer, tmp_path):
    def own_loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.sum() * 0

    options = {"label_smoothing_factor": 0.1} if how == "label_smoothing" else {}
    sft = trainer_for("SFT", balanced_model("mor"), tokenizer, tmp_path, **options)
    if how == "compute_loss_func":
        sft.compute_loss_func = own_loss
    assert router_gradient(sft).abs().max() > 1


def test_batch_without_targets_adds_no_router_loss(tokenizer, tmp_path):
    sft = trainer_for("SFT", balanced_model("mor"), tokenizer, tmp_path)
    batch = next(iter(sft.get_train_dataloader()))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for items in (None, torch.tensor(7)):
        assert float(sft.compute_loss(sft.model, batch, num_items_in_batch=items)) == 0


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_inside_peft(kind, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    got = []
    for coefficient in (0.0, 100.0):
        model = tiny_model(**BALANCED | {"router_balance_coef": coefficient})
        adapted = peft.get_peft_model(model, config)
        folder = tmp_path / str(coefficient)
        got.append(router_gradient(trainer_for(kind, adapted, tokenizer, folder)))
    assert got[1].abs().max() > 10 * got[0].abs().max()


def test_loss_that_the_model_added_itself_counts_once(tokenizer, tmp_path):
    class Mine(RouterLossMixin, Trainer):
        pass

    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    model = balanced_model("mor")
    tokens = torch.arange(4, 20).reshape(2, 8)
    trainer = Mine(model, arguments, train_dataset=[0])
    got = trainer.compute_loss(model, {"input_ids": tokens, "labels": tokens})
    assert float(got.detach()) == pytest.approx(model(tokens, labels=tokens).loss.item())


def test_nothing_stays_behind_when_the_trainer_fails(tokenizer, tmp_path):
    sft = trainer_for("SFT", balanced_model("mor"), tokenizer, tmp_path)
    batch = next(iter(sft.get_train_dataloader()))
    with pytest.raises(ValueError, match="input_ids: expected tokens"):
        sft.compute_loss(sft.model, {**batch, "input_ids": batch["input_ids"] + VOCAB})
    assert not any(module._forward_hooks for module in sft.model.modules())
    del sft.model.forward  # TRL's
    model = sft.model
    tokens = torch.arange(4, 12).unsqueeze(0)
    output = model(tokens, labels=tokens)
    assert torch.equal(output.loss, output.lm_loss + output.router_loss)


def test_without_a_mor_model_it_is_an_error(tokenizer, tmp_path):
    sft = trainer_for("SFT", tiny_model(), tokenizer, tmp_path)
    with pytest.raises(ValueError, match="RouterLossMixin: expected a MoR model, got Linear"):
        sft.compute_loss(torch.nn.Linear(1, 1), {})


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
@pytest.mark.parametrize("name", ["expert", "aux", "token", "swap", "swap token"])
def test_policy_and_reference_agree_at_the_start(kind, name, tokenizer, tmp_path):
    """Expert-choice ranks the batch in training, unless told to route as in evaluation."""
    options = {
        "expert": {"train_routing": "threshold"},
        "aux": {"train_routing": "threshold", "router_aux": "router"},
        "token": {"router": "token"},
        "swap": {"train_routing": "threshold"},
        "swap token": {"router": "token"},
    }[name]
    model = swapped_model(**options) if name.startswith("swap") else tiny_model(**options)
    trainer = trainer_for(kind, model, tokenizer, tmp_path)
    terms = []
    compute = trainer._compute_loss
    trainer._compute_loss = lambda *args: terms.append(compute(*args)) or terms[-1]
    trainer.train()
    # KTO's loss is 1 - sigmoid(0) of each answer.
    expected = 0.693147 if kind == "DPO" else 0.5
    assert float(terms[0].detach()) == pytest.approx(expected, abs=1e-5)
    log = trainer.state.log_history[0]
    assert log["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert log["rewards/rejected"] == pytest.approx(0, abs=1e-5)
