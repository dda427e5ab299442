"""mor.apply_token_merging on vision encoders built small from their configurations."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
)

import mor
from tests.support.host_reads import host_reads

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip


def timm_vit(**options: object) -> nn.Module:
    timm = pytest.importorskip("timm", reason="timm needs torchvision", exc_type=ImportError)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    return timm.models.vision_transformer.VisionTransformer(**sizes, **options)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**SIZES)),
    "deit": lambda: DeiTModel(DeiTConfig(**SIZES)),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES)),
    "timm": timm_vit,
    "timm with registers": lambda: timm_vit(
        reg_tokens=2, qk_norm=True, init_values=0.1, class_token=False, global_pool="avg"
    ),
}
PROTECTED = {
    "vit": 1, "deit": 2, "clip": 1, "siglip": 0, "timm": 1, "timm with registers": 2,
}  # fmt: skip


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def call(model: nn.Module, images: Tensor) -> Tensor:
    output = model(images)
    return output if isinstance(output, Tensor) else output[0]


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
class TestEachEncoder:
    def test_r_0_changes_no_bit_and_remove_restores(self, name: str, images: Tensor) -> None:
        model = build(name)
        classes, names = [type(m) for m in model.modules()], list(model.state_dict())
        before = call(model, images)
        assert mor.apply_token_merging(model, r=0) is model
        assert torch.equal(call(model, images), before)
        mor.remove(model)
        mor.apply_token_merging(model, r=3)
        merged = call(model, images)
        assert merged.shape == before.shape
        assert not torch.equal(merged, before)
        assert list(model.state_dict()) == names
        assert mor.remove(model) is model
        assert torch.equal(call(model, images), before)
        assert [type(m) for m in model.modules()] == classes
        assert not hasattr(model, "token_merging")

    def test_leading_tokens_never_merge(self, name: str, images: Tensor) -> None:
        model = mor.apply_token_merging(build(name), r=100)
        call(model, images)
        size, first = model.token_merging.size, PROTECTED[name]
        assert (size[:, :first] == 1).all()
        assert size.sum(1).tolist() == [16 + first] * 2
        assert size.shape == (2, 2 + first)  # 16, 8, 4, 2

    def test_merging_equal_tokens_changes_nothing(self, name: str) -> None:
        """Size-weighted averages, attention by size and the unmerge at the end, all at once."""
        model = build(name)
        for parameter_name, parameter in model.named_parameters():
            if "pos" in parameter_name:
                parameter.data.zero_()
        images = torch.full((2, 3, 32, 32), 0.3)
        before = call(model, images)
        mor.apply_token_merging(model, r=[1, 5, 2])
        torch.testing.assert_close(call(model, images), before, rtol=1e-4, atol=1e-5)
        assert model.token_merging.size.shape[1] == 16 + PROTECTED[name] - 8

    def test_trains_with_checkpointing_as_without(self, name: str, images: Tensor) -> None:
        model = mor.apply_token_merging(build(name), r=3)
        call(model.train(), images).square().sum().backward()
        want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        assert any("q_proj" in n or "qkv" in n for n in want)
        model.zero_grad()
        if hasattr(model, "gradient_checkpointing_enable"):
            model.gradient_checkpointing_enable()
        else:
            model.set_grad_checkpointing()
        call(model, images).square().sum().backward()
        for n, grad in want.items():
            torch.testing.assert_close(dict(model.named_parameters())[n].grad, grad)

    def test_compiles_in_one_graph(self, name: str, images: Tensor) -> None:
        model = mor.apply_token_merging(build(name), r=3)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            torch.testing.assert_close(call(compiled, images), call(model, images))

    def test_copies_pickles_and_then_comes_off(self, name: str, images: Tensor) -> None:
        model = build(name)
        before = call(model, images)
        merged = call(mor.apply_token_merging(model, r=3), images)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        mor.remove(model)
        for other in copies:
            assert torch.equal(call(other, images), merged)
            assert torch.equal(call(mor.remove(other), images), before)

    def test_reads_nothing_back_from_the_device(self, name: str, images: Tensor) -> None:
        model = mor.apply_token_merging(build(name), r=3)
        with torch.no_grad(), host_reads() as reads:
            call(model, images)
        assert reads == []

    def test_autocast(self, name: str, images: Tensor) -> None:
        model = mor.apply_token_merging(build(name), r=3)
        with torch.no_grad():
            want = call(model, images)
            with torch.autocast("cpu", torch.bfloat16):
                got = call(model, images)
        assert got.isfinite().all()
        assert got.shape == want.shape


def test_saved_weights_are_those_of_the_plain_model(tmp_path: Path, images: Tensor) -> None:
    model = mor.apply_token_merging(build("vit"), r=3)
    merged = call(model, images)
    model.save_pretrained(tmp_path)
    loaded = ViTForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(call(mor.apply_token_merging(loaded, r=3), images), merged)
    assert torch.equal(call(mor.remove(loaded), images), call(mor.remove(model), images))


def test_attention_without_sizes_differs(images: Tensor) -> None:
    model = mor.apply_token_merging(build("clip"), r=3)
    proportional = call(model, images)
    mor.apply_token_merging(mor.remove(model), r=3, proportional=False)
    assert not torch.allclose(call(model, images), proportional)


def test_one_r_for_each_layer(images: Tensor) -> None:
    model = mor.apply_token_merging(build("clip"), r=(5, 0, 2))
    call(model, images)
    assert [layer.size.shape[1] for layer in model.token_merging.layers] == [12, 12, 10]
    assert model.token_merging.r == [5, 0, 2]


def test_bad_options_are_named() -> None:
    model = build("vit")
    with pytest.raises(ValueError, match="r: expected one value for each of 3 layers, got 2"):
        mor.apply_token_merging(model, r=[1, 2])
    with pytest.raises(ValueError, match="TokenMerging: r: expected an integer from 0, got -1"):
        mor.apply_token_merging(model, r=-1)
    assert not hasattr(model, "token_merging"), "a refused call left something behind"
    with pytest.raises(ValueError, match="remove: expected a model that mor changed"):
        mor.remove(model)
    mor.apply_token_merging(model, r=1)
    with pytest.raises(ValueError, match="expected a model without token merging"):
        mor.apply_token_merging(model, r=1)
    with pytest.raises(ValueError, match=r"expected a ViT, DeiT, CLIP .* got a Linear"):
        mor.apply_token_merging(nn.Linear(2, 2), r=1)
    dropout = ViTForImageClassification(ViTConfig(**SIZES, attention_probs_dropout_prob=0.5))
    with pytest.raises(ValueError, match=r"expected attention dropout 0, got 0\.5"):
        mor.apply_token_merging(dropout, r=1)


def test_adapters_are_trained_and_used(images: Tensor) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = mor.apply_token_merging(build("vit"), r=3)
    merged = call(model, images)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "k_proj"]))
    assert torch.equal(call(adapted, images), merged)
    call(adapted, images).square().sum().backward()
    gradients = [p.grad for n, p in adapted.named_parameters() if "lora_B" in n and "q_proj" in n]
    assert all(grad.abs().sum() > 0 for grad in gradients)
    assert len(gradients) == SIZES["num_hidden_layers"]
