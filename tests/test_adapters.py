"""Whatever is added to a model to train it, encoder and reference are the base model, and share its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from models import batch, encoder_of, small
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftMixedModel,
    VeraConfig,
    get_peft_model,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from users import AT, RANKS, Build, Seen, add_lora, block_output, features, full, same, storages

from ncp_loss import NoiseConditionedPerceptualLoss as NCP
from ncp_loss import frozen_view, ncp_dpo_loss

ATTENTION = {"target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
INITS = {"init_lora_weights": False}


def stir(*modules: nn.Module) -> None:
    """No adapter left where it begins, at no effect."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in [p for module in modules for p in module.parameters() if p.requires_grad]:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def peft(config: Any) -> Build:
    def build(unet: nn.Module) -> nn.Module:
        model = get_peft_model(unet, config).to(unet.dtype)
        stir(model)
        return model

    return build


def mixed(unet: nn.Module) -> nn.Module:
    """LoRA and LoHa on one model, both active."""
    model = get_peft_model(unet, LoraConfig(**RANKS), adapter_name="a", mixed=True)
    assert isinstance(model, PeftMixedModel)
    model.add_adapter("b", LoHaConfig(**RANKS))
    model.set_adapter(["a", "b"])
    stir(model.to(unet.dtype))
    return model


def two(unet: nn.Module) -> nn.Module:
    """The user trains "b" on top of a frozen "a"; both are active."""
    unet.add_adapter(LoraConfig(**RANKS, **INITS), "a")
    unet.add_adapter(LoraConfig(**ATTENTION, r=3, **INITS), "b")
    unet.set_adapters(["a", "b"], [0.7, 1.0])
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(".b." in name)
    return unet


PEFT: dict[str, Build] = {
    "LoRA": peft(LoraConfig(**RANKS)),
    "rsLoRA": peft(LoraConfig(**RANKS, use_rslora=True)),
    "DoRA": peft(LoraConfig(**RANKS, use_dora=True)),
    "LoHa": peft(LoHaConfig(**RANKS)),
    "LoKr": peft(LoKrConfig(**RANKS)),
    "OFT": peft(OFTConfig(r=0, oft_block_size=4, **ATTENTION)),
    "BOFT": peft(BOFTConfig(boft_block_size=4, **ATTENTION)),
    "IA3": peft(IA3Config(target_modules=["to_k", "to_v", "ff.net.2"], feedforward_modules=["ff.net.2"])),
    "VeRA": peft(VeraConfig(r=2, target_modules=["to_q"])),
    "AdaLoRA": peft(AdaLoraConfig(init_r=3, total_step=10, **ATTENTION)),
    "HRA": peft(HRAConfig(r=2, **ATTENTION)),
    "LoRA and LoHa": mixed,
    "LoRA on a frozen LoRA": two,
}


class Overriding(nn.Module):
    """kohya's LoRAModule: it puts its own `forward` on the layer it adapts, and is no part of the model's tree."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int = 2) -> None:
        super().__init__()
        if isinstance(layer, nn.Conv2d):
            shape: dict[str, Any] = {"kernel_size": layer.kernel_size, "stride": layer.stride, "padding": layer.padding}
            self.lora_down = nn.Conv2d(layer.in_channels, rank, **shape, bias=False)
            self.lora_up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.lora_down = nn.Linear(layer.in_features, rank, bias=False)
            self.lora_up = nn.Linear(rank, layer.out_features, bias=False)
        self.multiplier = 1.0
        self.org_module: Any = layer

    def apply_to(self) -> None:
        self.org_forward = self.org_module.forward
        self.org_module.forward = self.forward
        del self.org_module

    def forward(self, x: Tensor) -> Tensor:
        return self.org_forward(x) + self.multiplier * self.lora_up(self.lora_down(x))


def adaptable(unet: nn.Module) -> list[tuple[str, Any]]:
    wanted = ("attn1.to", "attn2.to", "conv1")
    layers = [(n, m) for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return [(n, m) for n, m in layers if any(name in n for name in wanted)]


def kohya(unet: nn.Module) -> nn.ModuleList:
    network = nn.ModuleList(Overriding(layer) for _, layer in adaptable(unet)).to(unet.dtype)
    for module in network:
        module.apply_to()
    stir(network)
    return network


def lycoris(algorithm: str, unet: nn.Module, **options: Any) -> nn.Module:
    package = pytest.importorskip("lycoris", reason="lycoris-lora is not installed")
    blocks = ["Attention", "ResnetBlock2D", "Transformer2DModel"]
    package.LycorisNetwork.apply_preset({"target_module": blocks, "target_name": []})
    ranks = {"linear_dim": 4, "linear_alpha": 1, "conv_dim": 4, "conv_alpha": 1, "block_size": 2}
    network = package.create_lycoris(unet, 1.0, algo=algorithm, **ranks, **options).to(unet.dtype)
    network.apply_to()
    stir(network)
    return network


NETWORKS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "kohya's LoRA": kohya,
    **{f"LyCORIS {name}": partial(lycoris, name) for name in ("locon", "loha", "lokr", "ia3", "diag-oft", "boft")},
    **{f"LyCORIS {name}": partial(lycoris, name) for name in ("glora", "dylora")},
    "LyCORIS DoRA": lambda unet: lycoris("locon", unet, dora_wd=True),
    "LyCORIS with norms": lambda unet: lycoris("locon", unet, train_norm=True),
}
IN_FLOAT32 = ("LyCORIS glora", "LyCORIS with norms")  # their own forward leaves float64


def assert_the_base_model(model: nn.Module, pristine: nn.Module, arguments: dict[str, Any]) -> None:
    at = [arguments[name] for name in AT]
    view, ncp = frozen_view(model), NCP(model)
    expected = pristine(*at).sample
    assert not torch.allclose(model(*at).sample, expected)
    assert type(view) is UNet2DConditionModel
    assert torch.equal(view(*at).sample, expected)
    assert torch.equal(features(ncp, arguments), block_output(pristine, "down_blocks.1", arguments))
    assert all(map(torch.equal, ncp.errors(**arguments), NCP(pristine).errors(**arguments)))
    assert storages(view, encoder_of(ncp).view).keys() <= storages(model).keys()


@pytest.mark.parametrize("build", PEFT.values(), ids=PEFT)
def test_peft_adapters_are_seen_through_bit_for_bit_and_share_every_weight(build: Build) -> None:
    unet = small()
    pristine = copy.deepcopy(unet)
    model = build(unet)
    before = Seen(model)
    frozen_view(model), NCP(model)
    before.assert_same(model)
    assert_the_base_model(model, pristine, batch(pristine))


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_modules_that_override_forward_are_seen_through_bit_for_bit(build: Callable[[nn.Module], nn.Module]) -> None:
    names = [name for name, each in NETWORKS.items() if each is build]
    unet = small(torch.float32 if names[0] in IN_FLOAT32 else torch.float64)
    pristine = copy.deepcopy(unet)
    arguments = batch(unet)
    earlier = NCP(unet)
    network = build(unet)  # kept: the layers' forward is a method of its modules
    before = Seen(unet)
    assert_the_base_model(unet, pristine, arguments)
    before.assert_same(unet)
    assert torch.equal(features(earlier, arguments), block_output(pristine, "down_blocks.1", arguments))
    assert network is not None


TRAINED = {
    name: PEFT[name] for name in ("LoKr", "OFT", "BOFT", "IA3", "VeRA", "LoRA and LoHa", "LoRA on a frozen LoRA")
}


@pytest.mark.parametrize("build", [*TRAINED.values(), kohya], ids=[*TRAINED, "kohya's LoRA"])
def test_adapters_train_and_the_base_stays(build: Callable[[nn.Module], nn.Module]) -> None:
    unet = small()
    arguments = batch(unet, size=1, pairs=True)
    at = [arguments[name] for name in AT]
    expected, expected_ref = block_output(unet, "down_blocks.1", arguments), unet(*at).sample
    base = {id(p) for p in unet.parameters()}
    built = build(unet)
    model = unet if build is kohya else built
    trained = [p for p in {*model.parameters(), *built.parameters()} if p.requires_grad]
    ncp, reference = NCP(model), frozen_view(model)
    assert trained
    assert not base & set(map(id, trained))
    arguments["model_pred"], arguments["ref_pred"] = model(*at).sample, reference(*at).sample
    (1e6 * ncp_dpo_loss(ncp, **arguments, loss_type="ipo").loss).backward()  # "ipo" never saturates
    assert all(p.grad is not None and p.grad.any() for p in trained)
    assert not [p for p in (*reference.parameters(), *encoder_of(ncp).view.parameters()) if p.grad is not None]
    torch.optim.AdamW(trained, lr=1e-2).step()
    assert not torch.allclose(model(*at).sample, arguments["model_pred"])
    assert torch.equal(features(ncp, arguments), expected)
    assert torch.equal(reference(*at).sample, expected_ref)


def test_an_adapter_that_is_the_reference_is_merged_into_the_base_first() -> None:
    """The rule is that a view has no adapters; what the reference has to have is made part of the base."""
    unet = small()
    arguments = batch(unet)
    at = [arguments[name] for name in AT]
    model = get_peft_model(unet, LoraConfig(**RANKS, **INITS))
    with_a = copy.deepcopy(model)(*at).sample
    merged = add_lora(model.merge_and_unload())
    torch.testing.assert_close(frozen_view(merged)(*at).sample, with_a)
    assert not torch.allclose(merged(*at).sample, with_a)


def test_an_adapter_that_is_the_reference_may_be_switched_to_for_its_prediction() -> None:
    """The encoder has neither adapter, whichever is active; only ``ref_pred`` is the user's to make."""
    unet = small()
    arguments = batch(unet)
    at = [arguments[name] for name in AT]
    model = two(unet)
    ncp = NCP(model)
    truth = features(ncp, arguments)
    found = []
    for active in (["a"], ["a", "b"], ["b"]):
        model.set_adapters(active)
        arguments["ref_pred"] = model(*at).sample.detach()
        assert torch.equal(features(ncp, arguments), truth)
        found.append(ncp.errors(**arguments)[1])
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found[1], found[2])


class Lora(nn.Module):
    """LoRA as a parametrization of a weight, as LyCORIS's `parametrize` and minLoRA have it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, weight[0].numel(), dtype=weight.dtype))
        self.up = nn.Parameter(torch.randn(len(weight), 2, dtype=weight.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).reshape(weight.shape)


def parametrized(unet: nn.Module) -> nn.Module:
    for _, layer in adaptable(unet):
        parametrize.register_parametrization(layer, "weight", Lora(layer.weight))
    return unet


def taken_over(unet: nn.Module) -> nn.Module:
    """LyCORIS's algorithm "full": the layer's weight is taken from it, and lives in the adapter."""
    for _, layer in adaptable(unet):
        network = Overriding(layer)
        network.apply_to()
        del layer.weight
    return unet


def stored_in_float8(unet: nn.Module) -> nn.Module:
    if not hasattr(unet, "enable_layerwise_casting"):
        pytest.skip("this version of diffusers has no layerwise casting")
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return unet


def upcast_by_hand(unet: nn.Module) -> nn.Module:
    """As kohya's fp8 linear layers: the weight in float8, and a `forward` on the instance that casts it."""
    layer = unet.time_embedding.linear_1
    layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)
    layer.forward = lambda x: F.linear(x, layer.weight.to(x.dtype), layer.bias)
    return unet


REFUSED: dict[str, tuple[Build, str]] = {
    "parametrized": (parametrized, r"not: '\S+' is parametrized by an adapter"),
    "taken over": (taken_over, r"not: '\S+' has no weight of its own"),
    "float8": (stored_in_float8, r"not: '\S+' has weights in the hands of diffusers' layerwise_casting"),
    "float8 by hand": (upcast_by_hand, r"not: '\S+' has a weight in torch.float8_e4m3fn"),
}


@pytest.mark.parametrize("use", [NCP, frozen_view])
@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_seen_through_is_refused_by_name(build: Build, message: str, use: Any) -> None:
    model = build(small(torch.float32))
    with pytest.raises(ValueError, match=r"^(unet|model) must .*" + message):
        use(model)


@pytest.mark.parametrize("build", [parametrized, taken_over])
def test_what_takes_a_shared_weight_away_later_is_named(build: Build) -> None:
    unet = small()
    arguments = batch(unet)
    ncp = NCP(unet)
    build(unet)
    with pytest.raises(RuntimeError, match=r"attn1\.to_q\.weight was removed"):
        ncp.errors(**arguments)


@pytest.mark.parametrize("trained", [same, full])
def test_a_parametrization_of_the_models_own_is_kept(trained: Build) -> None:
    unet = small()
    for resnet in (block.resnets[0] for block in unet.down_blocks):
        parametrizations.weight_norm(resnet.conv1)
    trained(unet.requires_grad_(False))
    arguments = batch(unet)
    ncp = NCP(unet)
    expected = block_output(unet, "down_blocks.1", arguments)
    assert torch.equal(features(ncp, arguments), expected)
    if trained is full:
        with torch.no_grad():
            unet.down_blocks[0].resnets[0].conv1.parametrizations.weight.original0.mul_(2)
        assert torch.equal(features(ncp, arguments), expected)


class Packed(nn.Module):
    """A linear layer in 4 bits, two to a byte, each row with a scale of its own; dequantised in forward."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 7
        codes = ((weight / scale).round() + 8).to(torch.uint8)
        self.register_buffer("packed", codes[:, ::2] << 4 | codes[:, 1::2])
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.stack([self.packed >> 4, self.packed & 15], -1).flatten(1)
        return F.linear(x, (codes.to(x.dtype) - 8) * self.scale.to(x.dtype), self.bias)


def quantised(unet: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for name, layer in [(n, m) for n, m in unet.named_modules() if type(m) is nn.Linear]:
        parent, _, key = name.rpartition(".")
        setattr(unet.get_submodule(parent), key, make(layer))
    return unet.requires_grad_(False)


def packed(unet: nn.Module) -> nn.Module:
    return quantised(unet, Packed)


def four_bits(unet: nn.Module) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def make(linear: nn.Linear) -> nn.Module:
        shape = linear.in_features, linear.out_features, linear.bias is not None
        made = bnb.nn.Linear4bit(*shape, compute_dtype=torch.float32, quant_type="nf4")
        made.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        made.bias = linear.bias
        return made.to("cpu")

    return quantised(unet, make)


def eight_bits(unet: nn.Module) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def make(linear: nn.Linear) -> nn.Module:
        shape = linear.in_features, linear.out_features, linear.bias is not None
        made = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
        made.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        made.bias = linear.bias
        return made.to("cpu")

    return quantised(unet, make)


def torchao(config: str, unet: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantization.quantize_(unet, getattr(quantization, config)())
    return unet.requires_grad_(False)


WEIGHTS = {
    "packed": packed,
    "bitsandbytes NF4": four_bits,
    "bitsandbytes LLM.int8": eight_bits,
    "torchao int8": partial(torchao, "Int8WeightOnlyConfig"),
    "torchao float8": partial(torchao, "Float8WeightOnlyConfig"),
}


@pytest.mark.parametrize("quantise", WEIGHTS.values(), ids=WEIGHTS)
def test_quantised_weights_are_shared_never_copied_and_lead_gradients_to_the_latents(quantise: Build) -> None:
    unet = quantise(small(torch.float32)).eval()
    arguments = batch(unet)
    at = [arguments[name] for name in AT]
    kept: list[Tensor] = []
    handle = unet.down_blocks[1].register_forward_hook(lambda _, args, out: kept.append(out[0]))
    expected = unet(*at).sample
    handle.remove()
    unet.add_adapter(LoraConfig(r=2, target_modules=["conv1", "conv2"], **INITS))
    assert not torch.allclose(unet(*at).sample, expected)
    ncp, view = NCP(unet), frozen_view(unet)
    assert torch.equal(view(*at).sample, expected)
    assert torch.equal(features(ncp, arguments), kept[0])
    error, _ = ncp.errors(**arguments)
    (gradient,) = torch.autograd.grad(error.sum(), arguments["model_pred"])
    assert (error > 0).all()
    assert gradient.isfinite().all()
    assert gradient.any()
    users = {id(t) for t in (*unet.parameters(), *unet.buffers())}
    for ours in (view, encoder_of(ncp).view):
        assert {id(t) for t in (*ours.parameters(), *ours.buffers())} <= users


# LLM.int8 rounds what goes into a layer too, to 8 bits: a step of the latents is below its resolution.
EXACT = {name: quantise for name, quantise in WEIGHTS.items() if quantise is not eight_bits}


@pytest.mark.parametrize("quantise", EXACT.values(), ids=EXACT)
def test_every_estimator_agrees_on_quantised_weights(quantise: Build) -> None:
    unet = quantise(small(torch.float32)).eval()
    arguments = batch(unet)
    literal, *others = (NCP(unet, difference=d).errors(**arguments)[0] for d in ("literal", "scaled", "central"))
    for error in others:
        torch.testing.assert_close(error, literal, rtol=0.01, atol=0)


def test_weights_stored_in_float8_compute_under_autocast() -> None:
    """As kohya's `--fp8_base` has them."""
    unet = small(torch.float32)
    for module in unet.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(torch.float8_e4m3fn)
    arguments = batch(unet, dtype=torch.float32)
    at = [arguments[name] for name in AT]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen_view(unet)(*at).sample, unet(*at).sample)
        error, ref_error = NCP(unet).errors(**arguments)
    (gradient,) = torch.autograd.grad(error.sum(), arguments["model_pred"])
    upcast, _ = NCP(copy.deepcopy(unet).to(torch.float32)).errors(**arguments)
    torch.testing.assert_close(error, upcast, rtol=0.1, atol=0)
    assert gradient.any()
    assert (ref_error > 0).all()
