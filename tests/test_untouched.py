"""Nothing of the user's is changed, moved or lost: the model, its adapters, the arguments, the random state."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from models import batch, encoder_of, sd15, sdxl, small
from torch import Tensor, nn
from users import (
    AT,
    Build,
    Seen,
    add_lora,
    attention_only,
    block_output,
    dora,
    features,
    full,
    loha,
    lora_and_biases,
    peft_lora,
    same,
    storages,
)

from ncp_loss import NoiseConditionedPerceptualLoss as NCP
from ncp_loss import frozen_view, ncp_dpo_loss

ADAPTERS = pytest.mark.parametrize("build", [add_lora, peft_lora, dora, loha])


def in_training(unet: nn.Module) -> nn.Module:
    """As a trainer has it: LoRA, train mode, gradient checkpointing, someone's hooks, accelerate around it."""
    unet = add_lora(unet).train()
    unet.enable_gradient_checkpointing()
    unet.down_blocks[0].register_forward_hook(lambda module, args, output: None)
    unet.conv_in.register_forward_pre_hook(lambda module, args: None)
    return Accelerator(mixed_precision="bf16", cpu=True).prepare(unet)


@pytest.mark.parametrize("build", [same, full, attention_only, in_training, add_lora, peft_lora, dora, loha])
def test_nothing_of_the_model_is_touched(build: Build) -> None:
    unet = small(torch.float32)
    arguments = batch(unet, size=1, pairs=True)
    model = build(unet)
    before = Seen(model)
    ncp = NCP(model, checkpoint=True)
    before.assert_same(model)
    only_model = {name: value for name, value in arguments.items() if name != "ref_pred"}
    for use in (
        lambda: ncp(**only_model).backward(),
        lambda: ncp.errors(**arguments),
        lambda: features(ncp, arguments),
        lambda: ncp_dpo_loss(ncp, **arguments).loss.backward(),
        lambda: frozen_view(model).train(),
        lambda: ncp.train().requires_grad_(True).zero_grad(),
        lambda: ncp.to(torch.bfloat16).half().double().apply(lambda module: None),
    ):
        use()
        before.assert_same(model)


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_arguments_are_left_as_they_were(layout: str) -> None:
    unet = {"sd15": sd15, "sdxl": sdxl}[layout](dtype=torch.float32)
    arguments = batch(unet, pairs=True, size=1)
    arguments["cross_attention_kwargs"] = {"scale": 0.5}
    if layout == "sd15":  # diffusers pops these, one after another
        arguments["down_intrablock_additional_residuals"] = intrablock_residuals(2, torch.float32)
    before = copy.deepcopy(arguments)
    leaves = [value for value in arguments.values() if isinstance(value, Tensor)]
    versions = [leaf._version for leaf in leaves]
    ncp = NCP(unet)
    ncp.errors(**arguments)
    ncp_dpo_loss(ncp, **arguments)
    assert [leaf._version for leaf in leaves] == versions
    torch.testing.assert_close(arguments, before, rtol=0, atol=0)


def test_the_loss_owns_no_weights() -> None:
    for build in (add_lora, full):
        ncp = NCP(build(small()))
        assert not ncp.state_dict()
        assert not [*ncp.parameters(), *ncp.buffers()]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda ncp: pickle.loads(pickle.dumps(ncp))])
@pytest.mark.parametrize("build", [full, in_training, dora])
def test_a_copy_gives_the_same_errors_from_weights_of_its_own(build: Build, copied: Callable[[NCP], NCP]) -> None:
    unet = small(torch.float32)
    arguments = batch(unet)
    model = build(unet)
    ncp = NCP(model)
    error, _ = ncp.errors(**arguments)
    twin = copied(ncp)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert torch.equal(twin.errors(**arguments)[0], error)
    assert not storages(encoder_of(twin).view).keys() & storages(model).keys()


def test_gradients_reach_the_prediction_alone() -> None:
    unet = sdxl()
    arguments = batch(unet)
    tensors = arguments | arguments["added_cond_kwargs"]
    inputs = {k: v.requires_grad_() for k, v in tensors.items() if torch.is_tensor(v) and v.is_floating_point()}
    error, ref_error = NCP(unet).errors(**arguments)
    grads = torch.autograd.grad(error.sum(), list(inputs.values()), allow_unused=True)
    assert not ref_error.requires_grad
    assert [name for name, grad in zip(inputs, grads, strict=True) if grad is not None] == ["model_pred"]


@ADAPTERS
def test_every_adapter_weight_gets_a_gradient_and_the_base_none(build: Build) -> None:
    unet = small()
    arguments = batch(unet, size=1, pairs=True)
    base = list(unet.parameters())
    model = build(unet)
    ncp, reference = NCP(model), frozen_view(model)
    at = [arguments[name] for name in AT]
    arguments["model_pred"], arguments["ref_pred"] = model(*at).sample, reference(*at).sample
    ncp_dpo_loss(ncp, **arguments, loss_type="ipo").loss.backward()  # which never saturates
    adapter = {name: p for name, p in model.named_parameters() if not any(p is b for b in base)}
    assert adapter
    assert [name for name, p in adapter.items() if p.grad is None or not p.grad.any()] == []
    assert [p for p in (*base, *reference.parameters(), *encoder_of(ncp).view.parameters()) if p.grad is not None] == []


@ADAPTERS
def test_under_adapters_encoder_and_reference_add_no_bytes(build: Build) -> None:
    model = build(small())
    assert storages(encoder_of(NCP(model)).view, frozen_view(model)).keys() <= storages(model).keys()


@pytest.mark.parametrize(
    ("layer", "needed"),
    [
        ("down_blocks.1", ["conv_in", "time_embedding", "down_blocks.0", "down_blocks.1"]),
        ("down_blocks", ["conv_in", "time_embedding", "down_blocks"]),
        ("mid_block", ["conv_in", "time_embedding", "down_blocks", "mid_block"]),
    ],
)
def test_full_fine_tuning_copies_what_leads_to_the_layer_and_nothing_past_it(layer: str, needed: list[str]) -> None:
    unet = full(sd15())
    held, users = storages(encoder_of(NCP(unet, layer)).view), storages(unet)
    owned = {address: size for address, size in held.items() if address not in users}
    assert sum(owned.values()) == sum(storages(*[unet.get_submodule(name) for name in needed]).values())


BEFORE = [(build, same) for build in (add_lora, peft_lora, dora, lora_and_biases, full, attention_only)]
LATER = [(same, add_lora), (same, peft_lora), (full, add_lora)]


@pytest.mark.parametrize(("before", "after"), BEFORE + LATER)
def test_features_stay_the_base_models_while_the_model_trains(before: Build, after: Build) -> None:
    unet = small()
    arguments = batch(unet)
    expected = block_output(unet, "down_blocks.1", arguments)
    model = before(unet)
    ncp = NCP(model)
    assert torch.equal(features(ncp, arguments), expected)
    model = after(model)
    at = [arguments[name] for name in AT]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    first = model(*at).sample.detach()
    for _ in range(2):
        optimizer.zero_grad()
        ncp(model(*at).sample, arguments["target"], *at).backward()
        optimizer.step()
    assert not torch.allclose(model(*at).sample, first)
    assert torch.equal(features(ncp, arguments), expected)


def intrablock_residuals(rows: int, dtype: torch.dtype) -> list[Tensor]:
    """What a T2I-Adapter hands to a model of `sd15`'s layout."""
    return [torch.ones(rows, c, side, side, dtype=dtype) for c, side in ((16, 16), (16, 8), (32, 4), (32, 2))]


@pytest.mark.parametrize("layers", [("down_blocks",), ("down_blocks.0", "down_blocks.3", "mid_block")])
def test_features_are_the_blocks_own_output_whatever_the_model_adds_to_it_later(layers: tuple[str, ...]) -> None:
    unet = sd15()
    arguments = batch(unet)
    residuals = {"down_intrablock_additional_residuals": intrablock_residuals(2, torch.float64)}
    got = NCP(unet, layers).features(*[arguments[name] for name in AT], **residuals)
    for layer in layers:
        path = "down_blocks.3" if layer == "down_blocks" else layer
        assert torch.equal(got[layer], block_output(unet, path, arguments, **residuals)), layer


def optimizer_step(unet: nn.Module) -> None:
    weight = unet.get_parameter(CONV1).requires_grad_(True)
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight]).step()
    weight.requires_grad_(False)


CONV1 = "down_blocks.1.resnets.0.conv1.weight"
CHANGES: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "trainable": (full, "conv_in.weight became trainable"),
    "partly trainable": (attention_only, "attn1.to_q.weight became trainable"),
    "in place": (lambda unet: nn.init.zeros_(unet.get_parameter(CONV1)), f"{CONV1} was changed"),
    "optimizer": (optimizer_step, f"{CONV1} was changed"),
    "load": (lambda unet: unet.load_state_dict(small(seed=1).state_dict()), "conv_in.weight was changed"),
    "assign": (
        lambda unet: unet.load_state_dict(small(seed=1).state_dict(), assign=True),
        "conv_in.weight was changed",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES.keys())
def test_a_shared_weight_that_changes_is_named(change: Callable[[nn.Module], Any], message: str) -> None:
    unet = small()
    arguments = batch(unet)
    ncp = NCP(unet)
    ncp.errors(**arguments)
    change(unet)
    for use in (lambda: ncp.errors(**arguments), lambda: features(ncp, arguments)):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            use()


MERGES = [(build, same, "merge_adapter") for build in (peft_lora, dora, loha)]
MERGES += [(add_lora, same, "fuse_lora"), (peft_lora, same, "merge_and_unload")]
MERGES += [(same, add_lora, "fuse_lora"), (same, peft_lora, "merge_adapter")]


@pytest.mark.parametrize(("before", "after", "merge"), MERGES)
def test_an_adapter_merged_after_the_loss_was_built_is_named(before: Build, after: Build, merge: str) -> None:
    unet = small()
    arguments = batch(unet)
    model = before(unet)
    ncp = NCP(model)
    model = after(model)
    ncp.errors(**arguments)
    getattr(model, merge)()
    with pytest.raises((RuntimeError, ValueError), match=r"down_blocks\.0\.\S+"):
        ncp.errors(**arguments)


def test_an_adapter_merged_and_unmerged_between_two_calls_is_no_error() -> None:
    unet = small()
    arguments = batch(unet)
    model = peft_lora(unet)
    ncp = NCP(model)
    before = features(ncp, arguments)
    model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(features(ncp, arguments), before)


@pytest.mark.parametrize("use", [NCP, frozen_view])
def test_a_merged_adapter_is_refused_at_construction(use: Callable[[nn.Module], Any]) -> None:
    model = peft_lora(small())
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged adapter: one is merged into '\w+\.\S+'"):
        use(model)


@pytest.mark.parametrize("build", [same, add_lora, peft_lora])
def test_a_model_converted_after_the_loss_was_built_is_followed(build: Build) -> None:
    unet = small()
    arguments = batch(unet, dtype=torch.float32)
    unet.down_blocks[0].register_buffer("of_no_use", torch.ones(3, dtype=torch.float64))  # .to() replaces buffers
    dtypes = (torch.float32, torch.float64)
    expected = {dtype: block_output(unet.to(dtype), "down_blocks.1", batch(unet)) for dtype in dtypes}
    model = build(unet)
    ncp = NCP(model)
    for dtype in (*dtypes, torch.float32):
        model.to(dtype)
        assert torch.equal(features(ncp, batch(unet)), expected[dtype])
    assert ncp.errors(**arguments)[0].isfinite().all()


def test_a_partly_trainable_model_converted_later_needs_autocast_or_a_loss_that_is_converted_too() -> None:
    unet = attention_only(small(torch.float32))
    ncp = NCP(unet)
    unet.to(torch.bfloat16)
    arguments = batch(unet)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ncp.errors(**arguments).error, NCP(unet).errors(**arguments).error)
    with pytest.raises(RuntimeError, match="dtype"):
        ncp.errors(**arguments)
    ncp.to(torch.bfloat16)
    assert torch.equal(ncp.errors(**arguments).error, NCP(unet).errors(**arguments).error)


def test_copies_are_parameters_where_the_models_are_and_plain_tensors_where_they_are_not() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)).double()
    view = frozen_view(model)
    assert [type(p) for p in view.parameters()] == [type(p) for p in model.parameters()] == [nn.Parameter] * 4
    assert [type(b) for b in view.buffers()] == [type(b) for b in model.buffers()] == [Tensor] * 3
    assert not {t.data_ptr() for t in view.state_dict().values()} & {t.data_ptr() for t in model.state_dict().values()}
    assert not any(p.requires_grad for p in view.parameters())
