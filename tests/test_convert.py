"""`mor convert`: a dense checkpoint in, a MoR checkpoint with its tokenizer out."""

import shutil

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import mor
from mor.training.convert import convert_checkpoint

from .models.conftest import small_config
from .test_cli import _mor

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = torch.arange(1, 21).view(2, 10)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A tiny dense checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    LlamaForCausalLM(small_config().base_config).save_pretrained(folder)
    words = {f"w{i}": i for i in range(97)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "w0")), unk_token="w0", eos_token="w2"
    )
    tokenizer.save_pretrained(folder)
    return folder


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model, model(TOKENS).logits


def test_one_recursion_gives_the_dense_models_logits(dense, tmp_path):
    code, output, error = _mor(
        "convert", dense, tmp_path / "mor", "--num-recursions", 1, "--router", "none"
    )
    assert (code, error) == (0, "")
    assert str(tmp_path / "mor") in output
    model, got = logits(tmp_path / "mor")
    assert isinstance(model, mor.MoRForCausalLM)
    torch.testing.assert_close(got, logits(dense)[1], atol=1e-5, rtol=1e-5)
    ids = AutoTokenizer.from_pretrained(tmp_path / "mor")("w5").input_ids
    assert ids == AutoTokenizer.from_pretrained(dense)("w5").input_ids == [5]


def test_every_option_arrives(dense, tmp_path):
    code, _, error = _mor(
        *("convert", dense, tmp_path, "--num-recursions", 2, "--layers", 6, "--sharing", "cycle"),
        *("--router", "token", "--gating", "residual", "--kv-strategy", "shared"),
        *("--init", "random", "--seed", 3, "--dtype", "bfloat16"),
        *("--router-type", "mlp", "--recursion-encoding"),
    )
    assert (code, error) == (0, "")
    model, _ = logits(tmp_path)
    config = model.config
    assert (config.num_recursions, config.num_hidden_layers) == (2, 6)
    assert (config.sharing, config.router, config.kv_strategy) == ("cycle", "token", "shared")
    assert (config.router_gating, config.router_alpha) == ("residual", 2.0)
    assert (config.router_type, config.recursion_encoding) == ("mlp", True)
    want = mor.MoRForCausalLM.from_dense(dense, config, init="random", seed=3, dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, want.state_dict()[name]), name
    assert model.dtype == torch.bfloat16
    code, output, _ = _mor("generate", tmp_path, "w5", "--max-new-tokens", 3)
    assert code == 0
    assert output.startswith("w5")


def test_the_default_gating_starts_nearest_and_the_next_command_is_printed(dense, tmp_path):
    for options, gating in (((), "residual"), (("--gating", "weighted"), "weighted")):
        folder = tmp_path / gating
        code, output, _ = _mor("convert", dense, folder, *options)
        assert code == 0
        assert logits(folder)[0].config.router_gating == gating
        assert f"mor train --model {folder} --data TEXT --output-dir runs/{gating}" in output
        assert ("perplexity 6e12, with --gating residual 9e4" in output) == (gating == "weighted")


def test_a_name_that_is_no_folder_goes_to_the_hub(dense, tmp_path, monkeypatch):
    asked = []

    def local(kind):
        original = kind.from_pretrained

        def from_pretrained(name, *args, **kwargs):
            asked.append(name)
            name = dense if name == "owner/name" else name
            return original(name, *args, **kwargs)

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)

    for kind in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
        local(kind)
    code, _, error = _mor("convert", "owner/name", tmp_path / "mor")
    assert (code, error) == (0, "")
    assert asked.count("owner/name") == 3
    assert (tmp_path / "mor" / "tokenizer.json").exists()


def test_capacities_are_written_as_fractions(dense, tmp_path):
    options = ("--num-recursions", 2, "--capacities", "1,1/4")
    assert _mor("convert", dense, tmp_path / "mor", *options)[0] == 0
    assert logits(tmp_path / "mor")[0].config.capacities == [1.0, 0.25]
    code, _, error = _mor("convert", dense, tmp_path / "two", "--capacities", "all")
    assert (code, error) == (2, "mor: expected capacities such as 1,2/3,1/3, got 'all'\n")


def test_damaged_weights_are_one_sentence(dense, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(dense, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, _, error = _mor("convert", damaged, tmp_path / "mor", "--num-recursions", 2)
    assert code == 2
    assert error.startswith(f"mor: cannot read the model in {damaged}")
    assert error.count("\n") == 1


def test_a_full_rank_relaxation_gives_the_dense_models_logits(dense, tmp_path):
    pytest.importorskip("peft")
    code, _, _ = _mor(
        *("convert", dense, tmp_path, "--router", "none", "--relaxation", "lora"),
        *("--relaxation-rank", 64),
    )
    assert code == 0
    torch.testing.assert_close(logits(tmp_path)[1], logits(dense)[1], atol=1e-4, rtol=0)


def test_a_folder_without_a_tokenizer(tmp_path, caplog):
    LlamaForCausalLM(small_config().base_config).save_pretrained(tmp_path / "dense")
    convert_checkpoint(tmp_path / "dense", tmp_path / "mor")
    assert "there is no tokenizer" in caplog.text


def write_gguf(path, dense):
    """The dense Llama model as llama.cpp would write it, in float32."""
    gguf = pytest.importorskip("gguf")
    config = dense.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|endoftext|>", "w", *map(str, range(config.vocab_size - 3)), "w5"])
    writer.add_token_merges(["w 5"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in dense.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        kind = name.split(".")[-2]
        if kind in heads:  # llama.cpp interleaves the two halves of a head's rotation
            n = heads[kind]
            halves = tensor.view(n, 2, tensor.shape[0] // n // 2, -1)
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        base, _, suffix = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(base)}.{suffix}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file(dense, tmp_path):
    model = LlamaForCausalLM.from_pretrained(dense).eval()
    write_gguf(tmp_path / "tiny.gguf", model)
    code, _, error = _mor(
        *("convert", tmp_path / "tiny.gguf", tmp_path / "mor"),
        *("--num-recursions", 1, "--router", "none"),
    )
    assert code == 0, error
    torch.testing.assert_close(logits(tmp_path / "mor")[1], logits(dense)[1], atol=1e-5, rtol=1e-5)
    original = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    ids = AutoTokenizer.from_pretrained(tmp_path / "mor")("w5w7").input_ids
    assert ids == original("w5w7").input_ids
    assert ids[-2:] == [1, 9]


def test_bad_input_is_one_sentence(dense, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "text.txt").write_text("no model")
    (tmp_path / "broken.gguf").write_bytes(b"no model either")
    gpt2 = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_layer=5, n_embd=8, n_head=2, vocab_size=9)).save_pretrained(gpt2)
    out, full = tmp_path / "out", tmp_path / "full"
    full.mkdir()
    (full / "text.txt").write_text("some text, which mor train would read with the weights")
    cases = [
        ((tmp_path / "no-such", out), "config.json is missing"),
        ((tmp_path / "text.txt", out), "expected a directory or a .gguf file"),
        ((tmp_path / "broken.gguf", out), "broken.gguf"),
        ((dense, dense), "already holds a model"),
        ((gpt2, out), "expected an architecture of"),
        ((dense, out, "--num-recursions", 4), "4 recursions must divide the 6 layers"),
        (
            (dense, out, "--num-recursions", 4),
            "use --num-recursions 1, 2, 3 or 6, or --layers 6 or 10",
        ),
        ((dense, out, "--relaxation-rank", 4), "--relaxation-rank would be ignored"),
        (
            (dense, out, "--router", "none", "--router-type", "mlp"),
            "--router-type would be ignored: --router none",
        ),
        ((dense, out, "--router", "none", "--gating", "weighted"), "--gating would be ignored"),
        ((dense, full), "is not empty: choose a new directory"),
        ((dense, tmp_path / "text.txt"), "is a file: choose a new directory"),
        (
            ("nobody/no-such-model", out),
            "no local folder, and getting it from the Hugging Face hub",
        ),
        (("./no-such", out), "config.json is missing"),
        ((dense, out, "--init", "best"), "expected init to be one of"),
        ((dense, out, "--dtype", "int8"), "expected dtype to be one of"),
        ((dense, out, "--kv-strategy", "none"), "--kv-strategy: expected one of"),
        ((dense, out, "--sharing", "sequence", "--num-recursions", 2), "no recursion step"),
    ]
    for arguments, message in cases:
        code, output, error = _mor("convert", *arguments)
        assert code == 2, arguments
        assert message in error, (arguments, error)
        assert error.startswith("mor: ")
        assert error.count("\n") == 1
        assert output == ""
    assert not out.exists()
