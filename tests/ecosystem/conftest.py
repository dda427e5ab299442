"""A model and a tokenizer small enough that each tool runs for real in a second or so."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from mor import MoRConfig, MoRForCausalLM

VOCAB = 64
TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "the lazy dog sleeps",
    "a fox jumps over a dog and the dog sleeps",
    "the brown dog jumps",
    "over and over the quick fox jumps",
    "a lazy fox sleeps over the dog",
]

#: The kinds of routing that every tool is tried with.
ROUTING = {
    "expert": {"router": "expert", "router_z_coef": 1e-3},
    "token": {"router": "token", "router_z_coef": 1e-3},
    "recursive": {"router": None},
}


def tiny_model(seed: int = 0, **options) -> MoRForCausalLM:
    """A MoR model of 5 layers with 3 recursions, in training mode."""
    base = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    return MoRForCausalLM(MoRConfig(base_config=base, num_recursions=3, **options)).train()


def random_tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=ROUTING)
def routing(request: pytest.FixtureRequest) -> dict:
    return ROUTING[request.param]


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread: None) -> None:
    """Every test here."""


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A BPE tokenizer trained on `TEXTS`, with at most `VOCAB` tokens."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
