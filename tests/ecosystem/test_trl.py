"""TRL's SFTTrainer, with and without packing; its loss must be that of the model's own forward."""

import pytest
import torch
from datasets import Dataset

from mor.trl import RouterLossMixin

from .conftest import ROUTING, TEXTS, tiny_model

trl = pytest.importorskip("trl")


class Compared(RouterLossMixin, trl.SFTTrainer):
    """Computes each training loss a second time, by `MoRForCausalLM.forward`."""

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


def trainer(model, tokenizer, folder, **options) -> Compared:
    arguments = trl.SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_length=64,
        learning_rate=1e-2,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )
    rows = Dataset.from_dict({"text": TEXTS * 4})
    return Compared(model, args=arguments, train_dataset=rows, processing_class=tokenizer)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", ROUTING)
def test_sft(name, packing, tokenizer, tmp_path):
    options = dict(ROUTING[name])
    if name == "expert":
        options |= {"router_aux_coef": 0.5}  # large enough to be seen in the loss
    model = tiny_model(**options)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sft = trainer(model, tokenizer, tmp_path, packing=packing, max_steps=12)
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


def test_without_a_mor_model_it_is_an_error(tokenizer, tmp_path):
    sft = trainer(tiny_model(), tokenizer, tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="RouterLossMixin: expected a MoR model, got Linear"):
        sft.compute_loss(torch.nn.Linear(1, 1), {})
