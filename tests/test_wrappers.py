"""Whatever the user's model is wrapped in, the encoder and the reference are the bare base model inside."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from models import batch, encoder_of, small
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from users import AT, add_lora, block_output, features, full, peft_lora

from ncp_loss import NoiseConditionedPerceptualLoss as NCP
from ncp_loss import frozen_view, ncp_dpo_loss


@pytest.fixture(scope="module")
def gloo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one."""
    store = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def no_compiled_code_is_left() -> Iterator[None]:
    yield
    torch.compiler.reset()


def prepared(model: nn.Module) -> nn.Module:
    """By accelerate, which puts a bound `forward` on the instance."""
    return Accelerator(mixed_precision="bf16", cpu=True).prepare(model)


def prepared_and_unwrapped(model: nn.Module, keep: bool = False) -> nn.Module:
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    return accelerator.unwrap_model(accelerator.prepare(model), keep_fp32_wrapper=keep)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_by_block(model: nn.Module) -> nn.Module:
    """The blocks that repeat in place, as diffusers does, and one by replacement, as people do."""
    for block in [module for module in model.modules() if type(module).__name__ == "BasicTransformerBlock"]:
        block.compile(backend="eager")
    model.down_blocks[0] = torch.compile(model.down_blocks[0], backend="eager")
    return model


def hooked(model: nn.Module) -> nn.Module:
    """Hooks that would change every block's output, in the model and around it."""
    for module in (model, *model.down_blocks, model.conv_in):
        module.register_forward_pre_hook(spoil)
        module.register_forward_hook(spoil)
        module.register_forward_hook(spoil, with_kwargs=True)
        module.register_full_backward_hook(spoil)
    return model


def spoil(*args: Any) -> None:
    raise AssertionError("a hook of the user's model fired")


def dropping_out(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    return model.train()


def nested(*wrappers: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """The first is innermost."""

    def wrap(model: nn.Module) -> nn.Module:
        for wrapper in wrappers:
            model = wrapper(model)
        return model

    return wrap


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "PeftModel": peft_lora,
    "PeftModel with a module to save": lambda model: peft_lora(model, modules_to_save=["conv_in", "time_embedding"]),
    "accelerate": prepared,
    "accelerate, unwrapped": prepared_and_unwrapped,
    "accelerate, unwrapped in bf16": lambda model: prepared_and_unwrapped(model, keep=True),
    "compile": compiled,
    "compile in place": compiled_in_place,
    "compile by block": compiled_by_block,
    "hooks": hooked,
    "dropout": dropping_out,
    "DataParallel": nn.DataParallel,
    "DDP": nested(full, DDP),
    "DDP of LoRA": nested(add_lora, DDP),
    "DDP of accelerate of PeftModel": nested(peft_lora, prepared, DDP),
    "compile of DDP of PeftModel": nested(peft_lora, DDP, compiled),
    "DDP of compile of LoRA": nested(add_lora, compiled, DDP),
    "accelerate of compile of PeftModel": nested(peft_lora, compiled, prepared),
    "PeftModel of accelerate": nested(prepared, peft_lora),
    "PeftModel of compile by block": nested(compiled_by_block, peft_lora),
    "all of it": nested(hooked, dropping_out, compiled_by_block, peft_lora, compiled_in_place, prepared, DDP, compiled),
}


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_encoder_and_reference_are_the_base_model_bit_for_bit(wrap: Callable[[nn.Module], nn.Module]) -> None:
    unet = small(torch.float32)
    pristine = copy.deepcopy(unet)
    arguments = batch(unet)
    at = [arguments[name] for name in AT]
    model = wrap(unet)
    view = frozen_view(model)
    assert type(view) is type(pristine)
    assert torch.equal(view(*at).sample, pristine(*at).sample)
    assert torch.equal(features(NCP(model), arguments), block_output(pristine, "down_blocks.1", arguments))
    errors = NCP(model).errors(**arguments)
    assert all(map(torch.equal, errors, NCP(pristine).errors(**arguments)))


TRAINED = [
    "DDP of LoRA",
    "PeftModel",
    "DDP",
    pytest.param("accelerate of compile of PeftModel", marks=pytest.mark.slow),
]


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize("wrapper", TRAINED)
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_a_wrapped_model_trains_and_its_encoder_stays(wrapper: str) -> None:
    unet = small(torch.float32)
    arguments = batch(unet, size=1, pairs=True)
    at = [arguments[name] for name in AT]
    expected = block_output(unet, "down_blocks.1", arguments)
    expected_ref = copy.deepcopy(unet)(*at).sample
    model = WRAPPERS[wrapper](unet).train()
    ncp, reference = NCP(model), frozen_view(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(2):  # DDP complains in the second step of what went wrong in the first
        optimizer.zero_grad()
        with torch.no_grad():
            arguments["ref_pred"] = reference(*at).sample
        arguments["model_pred"] = model(*at).sample
        (1e6 * ncp_dpo_loss(ncp, **arguments, loss_type="ipo").loss).backward()  # "ipo" never saturates
        assert all(p.grad.isfinite().all() for p in trained)
        assert any(p.grad.any() for p in trained)
        optimizer.step()
    assert torch.equal(features(ncp, arguments), expected)
    assert torch.equal(reference(*at).sample, expected_ref)
    assert not torch.allclose(model(*at).sample, expected_ref)


def test_a_hook_on_the_view_is_not_on_the_model_nor_the_other_way_round() -> None:
    unet = small()
    arguments = batch(unet)
    view, ncp = frozen_view(unet), NCP(unet)
    view.down_blocks[0].register_forward_hook(spoil)
    hooked(unet)
    features(ncp, arguments)
    assert len(unet.down_blocks[0]._forward_hooks) == 2  # the two of `hooked`
    assert len(unet.down_blocks[1]._forward_hooks) == 2  # and not the encoder's own, at its last layer
    assert len(view.down_blocks[0]._forward_hooks) == 1
    with pytest.raises(AssertionError, match="a hook of the user's model fired"):
        unet(*[arguments[name] for name in AT])


def test_flags_of_the_view_and_of_the_model_are_their_own() -> None:
    unet = small().train()
    unet.enable_gradient_checkpointing()
    view, encoder = frozen_view(unet), encoder_of(NCP(unet, checkpoint=True)).view
    blocks = [[m for m in model.modules() if hasattr(m, "gradient_checkpointing")] for model in (unet, view, encoder)]
    assert [{b.gradient_checkpointing for b in each} for each in blocks] == [{True}, {False}, {True}]
    assert [{m.training for m in model.modules()} for model in (unet, view, encoder)] == [{True}, {False}, {False}]
    unet.disable_gradient_checkpointing()
    view.train()
    assert not unet.eval().training
    assert view.training
    assert [{b.gradient_checkpointing for b in each} for each in blocks] == [{False}, {False}, {True}]


@pytest.mark.parametrize(
    ("weights", "autocast", "latents"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float16),
        (torch.float16, None, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16, torch.float32),
    ],
)
def test_half_precision_gives_finite_float32_errors_and_gradients_in_the_predictions_dtype(
    weights: torch.dtype, autocast: torch.dtype | None, latents: torch.dtype
) -> None:
    unet = small(weights)
    ncp = NCP(add_lora(unet))
    arguments = batch(unet, size=1, pairs=True, dtype=latents)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        errors = ncp.errors(**arguments)
        loss = ncp_dpo_loss(ncp, **arguments, beta=1e7).loss
        seen = features(ncp, arguments).dtype
    (gradient,) = torch.autograd.grad(loss, arguments["model_pred"])
    assert seen == (autocast or weights)
    assert [error.dtype for error in errors] == [torch.float32] * 2
    assert all(error.isfinite().all() and (error > 0).all() for error in errors)
    assert gradient.dtype == latents
    assert gradient.isfinite().all()
    assert gradient.any()


def test_modes_of_a_view_do_not_go_through_what_an_instance_overrides() -> None:
    """OneTrainer's adapters put `train` and `eval` of their own on the layers they wrap."""
    unet = small()
    layer = next(module for module in unet.modules() if isinstance(module, nn.Linear))
    called = []
    layer.train, layer.eval = lambda mode=True: called.append(mode), lambda: called.append(False)
    frozen_view(unet).train().eval()
    assert called == []
