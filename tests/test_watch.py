"""Loss and reference notice when the weights that they share are no longer the base model's, and only then."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import re
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from models import batch, encoder_of, small
from peft import LoraConfig, get_peft_model
from test_adapters import lycoris
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from users import AT, Build, add_lora, block_output, features, full, peft_lora, same

from ncp_loss import NoiseConditionedPerceptualLoss as NCP
from ncp_loss import frozen_view

LAYER = "down_blocks.1"
CONV1 = "down_blocks.1.resnets.0.conv1"
ATTENTION = {"target_modules": ["to_q", "to_k"]}


def use_loss(made: NCP, arguments: dict[str, Any]) -> Tensor:
    return features(made, arguments)


def use_view(made: nn.Module, arguments: dict[str, Any]) -> Tensor:
    return made(*[arguments[name] for name in AT]).sample


def truth(use: Any, unet: nn.Module, arguments: dict[str, Any]) -> Tensor:
    return block_output(unet, LAYER if use is use_loss else "conv_out", arguments)


BOTH = pytest.mark.parametrize(("make", "use"), [(NCP, use_loss), (frozen_view, use_view)], ids=["loss", "view"])


def unsettled(unet: nn.Module) -> nn.Module:
    """With a learning rate's worth of training gone into the adapter, so that merging it changes weights."""
    return add_lora(unet)


def fused_and_unloaded(unet: nn.Module) -> None:
    add_lora(unet)
    unet.fuse_lora()
    unet.unload_lora()


def one_after_the_other(unet: nn.Module) -> None:
    unet.fuse_lora()
    unet.unload_lora()
    add_lora(unet)


def peft_merged(unet: nn.Module) -> None:
    peft_lora(unet).merge_and_unload()


def stepped(unet: nn.Module) -> None:
    weight = unet.get_parameter(f"{CONV1}.weight").requires_grad_(True)
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=1e-3).step()
    weight.requires_grad_(False)


def columns_turned(unet: nn.Module) -> None:
    with torch.no_grad():  # each row keeps its sum
        weight = unet.get_parameter(f"{CONV1}.weight")
        weight.copy_(weight.flip(1))


def other_storage(unet: nn.Module) -> None:
    weight = unet.get_parameter(f"{CONV1}.weight")
    weight.data = 1.5 * weight.data


def fewer_rows(unet: nn.Module) -> None:
    weight = unet.get_parameter(f"{CONV1}.weight")
    weight.data = weight.data[:-1].clone()


def more_rows(unet: nn.Module) -> None:
    weight = unet.get_parameter(f"{CONV1}.weight")
    weight.data = torch.cat([weight.data, weight.data])


def merged_under_an_adapter(unet: nn.Module) -> None:
    """As LyCORIS merges: it restores a layer's forward, and writes through ``.data``, which counts no version."""
    base = unet.get_submodule(CONV1).base_layer
    base.forward = base.forward
    base.weight.data.add_(0.1)


def offloaded_under_an_adapter(unet: nn.Module) -> None:
    base = unet.get_submodule(CONV1).base_layer
    base._hf_hook = SimpleNamespace(offload=True)
    base.weight.data = base.weight.data.clone()


CHANGES: dict[str, tuple[Build, Callable[[nn.Module], Any], str]] = {
    "loaded": (same, lambda unet: unet.load_state_dict(small(seed=1).state_dict()), "conv_in.weight was changed"),
    "assigned": (
        same,
        lambda unet: unet.load_state_dict(small(seed=1).state_dict(), assign=True),
        "conv_in.weight was changed",
    ),
    "one row": (same, lambda unet: nn.init.zeros_(unet.get_parameter(f"{CONV1}.weight")[1]), f"{CONV1}.weight was ch"),
    "unfrozen": (same, full, "conv_in.weight became trainable"),
    "trained": (same, stepped, f"{CONV1}.weight was changed"),
    "columns in another order": (same, columns_turned, f"{CONV1}.weight was changed"),
    "given other storage": (same, other_storage, f"{CONV1}.weight was changed"),
    "given fewer rows": (same, fewer_rows, f"{CONV1}.weight was changed"),
    "given more rows": (same, more_rows, f"{CONV1}.weight was changed"),
    "merged under an adapter": (unsettled, merged_under_an_adapter, "weight was changed"),
    "offloaded under an adapter": (unsettled, offloaded_under_an_adapter, "is offloaded by accelerate"),
    "removed": (same, lambda unet: delattr(unet.conv_in, "weight"), "conv_in.weight was removed"),
    "fused": (unsettled, lambda unet: unet.fuse_lora(), "must have no merged adapter"),
    "fused and unloaded": (same, fused_and_unloaded, "was changed"),
    "merged and unloaded": (same, peft_merged, "was changed"),
    "fused, unloaded and another added": (unsettled, one_after_the_other, "was changed"),
}


@BOTH
@pytest.mark.parametrize(("before", "change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_base_that_is_no_longer_the_base_is_told_at_the_next_call_and_every_one_after(
    before: Build, change: Callable[[nn.Module], Any], message: str, make: Any, use: Any
) -> None:
    unet = small()
    arguments = batch(unet)
    expected = truth(use, unet, arguments)
    made = make(before(unet))
    for _ in range(2):
        assert torch.equal(use(made, arguments), expected)
    change(unet)
    for _ in range(2):
        with pytest.raises((RuntimeError, ValueError), match="^(unet|model).*" + re.escape(message)):
            use(made, arguments)


@BOTH
def test_weights_that_come_back_from_meta_are_compared_with_what_they_were(make: Any, use: Any) -> None:
    unet = small(torch.float32)
    arguments = batch(unet)
    made = make(unet)
    expected = use(made, arguments)
    kept, other = copy.deepcopy(unet.state_dict()), small(torch.float32, seed=1).state_dict()
    for state in (kept, other):
        unet.to("meta")
        with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
            use(made, arguments)
        unet.to_empty(device="cpu").load_state_dict(state)
        if state is kept:
            assert torch.equal(use(made, arguments), expected)
    with pytest.raises(RuntimeError, match="was changed"):
        use(made, arguments)


@BOTH
@pytest.mark.parametrize(("share", "told"), [(0.75, False), (1.5, True)])
def test_a_change_counts_where_it_is_larger_than_a_rounding(share: float, told: bool, make: Any, use: Any) -> None:
    unet = small(torch.bfloat16)
    made = make(unet)
    use(made, batch(unet))
    weight = unet.get_parameter(f"{CONV1}.weight")
    exactly = weight.data.float() * (1 + share * torch.finfo(torch.bfloat16).eps / 2)
    noise = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) - 0.5  # rounds half of it up
    weight.data = (exactly * (1 + noise * torch.finfo(torch.bfloat16).eps)).bfloat16()
    with pytest.raises(RuntimeError, match="was changed") if told else contextlib.nullcontext():
        use(made, batch(unet))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("cast", [False, True], ids=["", "after a call in bf16"])
@pytest.mark.parametrize("added", ["before", "between"])
def test_a_merge_below_the_rounding_of_the_weights_is_told_once_its_adapter_is_gone(
    added: str, cast: bool, dtype: torch.dtype, make: Any, use: Any
) -> None:
    unet = small(dtype)
    if added == "before":
        add_lora(unet)
    made = make(unet)
    use(made, batch(unet))
    if cast:
        use(made, batch(unet.to(torch.bfloat16)))
        unet.to(dtype)
        use(made, batch(unet))
    if added == "between":
        add_lora(unet)
    before = copy.deepcopy({name: p for name, p in unet.named_parameters() if "lora" not in name})
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if "lora_B" in name:
                p.mul_(1e-4)
    unet.fuse_lora()
    unet.unload_lora()
    after = dict(unet.named_parameters())
    moved = {name: after[name.replace(".base_layer", "")] - p for name, p in before.items()}
    share = max(((d.float().norm() / before[name].float().norm()).item() for name, d in moved.items()))
    assert 0 < share < 1e-3  # an adapter's usual size
    for _ in range(2):
        with pytest.raises(RuntimeError, match="was changed"):
            use(made, batch(unet))


@BOTH
def test_a_lycoris_network_that_is_merged_is_told(make: Any, use: Any) -> None:
    unet = small(torch.float32)
    arguments = batch(unet)
    expected = truth(use, unet, arguments)
    made = make(unet)
    network = lycoris("locon", unet)
    assert torch.equal(use(made, arguments), expected)
    network.restore()
    assert torch.equal(use(made, arguments), expected)
    network.apply_to()
    assert torch.equal(use(made, arguments), expected)
    network.restore()
    network.merge_to(1.0)
    with pytest.raises(RuntimeError, match="was changed"):
        use(made, arguments)


def test_the_reference_is_guarded_past_the_layer_of_the_loss_too() -> None:
    unet = small()
    arguments = batch(unet)
    ncp, view = NCP(unet), frozen_view(unet)
    expected = use_loss(ncp, arguments)
    use_view(view, arguments)
    nn.init.ones_(unet.conv_out.weight)
    assert torch.equal(use_loss(ncp, arguments), expected)
    with pytest.raises(RuntimeError, match=r"^model's base weights .*: conv_out.weight was changed. Call frozen_view"):
        use_view(view, arguments)


@BOTH
def test_an_adapter_that_left_before_the_first_call_may_have_been_merged(make: Any, use: Any) -> None:
    unet = add_lora(small())
    made = make(unet)
    unet.fuse_lora()
    unet.unload_lora()
    with pytest.raises(RuntimeError, match="lost its adapter"):
        use(made, batch(unet))


# What is not a change.


def loaded_again(unet: nn.Module) -> None:
    unet.load_state_dict(copy.deepcopy(unet.state_dict()))


def assigned_again(unet: nn.Module) -> None:
    unet.load_state_dict(copy.deepcopy(unet.state_dict()), assign=True)
    unet.requires_grad_(False)


def swapped_and_restored(unet: nn.Module) -> None:
    """As an EMA of the weights is, around sampling."""
    kept = copy.deepcopy(unet.state_dict())
    unet.load_state_dict(small(seed=1).state_dict())
    unet.load_state_dict(kept)


def merged_in_and_out(unet: nn.Module) -> None:
    """As ai-toolkit does around sampling; in float32, which does not give the weights back to the last bit."""
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(noise := 0.01 * torch.randn(p.shape, dtype=p.dtype)).sub_(noise)


def unloaded(unet: nn.Module) -> None:
    peft_lora(unet).unload()


def moved(unet: nn.Module) -> None:
    unet.to(memory_format=torch.channels_last)


NO_CHANGES = [loaded_again, assigned_again, swapped_and_restored, merged_in_and_out, unloaded, moved]


@BOTH
@pytest.mark.parametrize("what", NO_CHANGES)
def test_what_leaves_the_weights_as_they_were_is_no_alarm(
    what: Callable[[nn.Module], Any], make: Any, use: Any
) -> None:
    unet = small(torch.float32)
    arguments = batch(unet)
    expected = truth(use, unet, arguments)
    made = make(unet)
    use(made, arguments)
    versions = {p._version for p in unet.parameters()}
    what(unet)
    assert {p._version for p in unet.parameters()} != versions or what in (unloaded, moved, assigned_again)
    for _ in range(2):
        torch.testing.assert_close(use(made, arguments), expected, rtol=1e-4, atol=1e-5)


@BOTH
def test_unloading_without_a_merge_is_no_alarm(make: Any, use: Any) -> None:
    unet = small()
    arguments = batch(unet)
    expected = truth(use, unet, arguments)
    model = peft_lora(unet)
    made = make(model)
    assert torch.equal(use(made, arguments), expected)
    model.unload()
    assert torch.equal(use(made, arguments), expected)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_adapter_merged_around_sampling_and_unmerged_again_is_no_alarm(
    dtype: torch.dtype, make: Any, use: Any
) -> None:
    unet = small(dtype)
    arguments = batch(unet)
    model = peft_lora(unet)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.05)  # what is trained changes a weight by little
    made = make(model)
    expected = use(made, arguments)
    before = copy.deepcopy(dict(unet.named_parameters()))
    for _ in range(20 if dtype == torch.float32 else 1):
        model.merge_adapter()
        with pytest.raises(ValueError, match="merged adapter"):
            use(made, arguments)
        model.unmerge_adapter()
        rtol, atol = (1e-3, 1e-4) if dtype == torch.float32 else (0.1, 0.1)
        torch.testing.assert_close(use(made, arguments), expected, rtol=rtol, atol=atol)
    assert any(not torch.equal(p, before[name]) for name, p in unet.named_parameters())


@BOTH
def test_a_lycoris_network_merged_around_sampling_and_restored_is_no_alarm(make: Any, use: Any) -> None:
    unet = small(torch.float32)
    arguments = batch(unet)
    network = lycoris("locon", unet)
    made = make(unet)
    expected = use(made, arguments)
    kept = copy.deepcopy(unet.state_dict())
    for _ in range(3):
        network.restore()
        network.merge_to(1.0)
        with pytest.raises(RuntimeError, match="was changed"):
            use(made, arguments)
        unet.load_state_dict(kept)
        network.apply_to()
        assert torch.equal(use(made, arguments), expected)


def swapped_by_blocks(unet: nn.Module) -> None:
    """As kohya's models are; their offloader counts the forward passes of model and view together."""
    unet.blocks_to_swap = 2


def test_roundings_do_not_add_up_unseen() -> None:
    unet = small(torch.bfloat16)
    arguments = batch(unet)
    ncp = NCP(unet)
    use_loss(ncp, arguments)
    merged_in_and_out(unet)
    use_loss(ncp, arguments)
    for _ in range(50):
        merged_in_and_out(unet)
    with pytest.raises(RuntimeError, match="was changed"):
        use_loss(ncp, arguments)


@BOTH
def test_targeted_parameters_of_peft_are_no_alarm_however_long_they_train(make: Any, use: Any) -> None:
    unet = small(torch.float32)
    arguments = batch(unet)
    at = [arguments[name] for name in AT]
    expected = truth(use, unet, arguments)
    targets = [name for name, _ in unet.named_parameters() if name.endswith("attn1.to_q.weight")]
    model = get_peft_model(unet, LoraConfig(r=2, target_modules=[], target_parameters=targets, init_lora_weights=False))
    made = make(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    reads = Reads()
    for _ in range(4):
        before = model(*at).sample
        before.square().mean().backward()
        optimizer.step()
        assert not torch.equal(model(*at).sample, before)
        with reads:
            assert torch.equal(use(made, arguments), expected)
    assert reads.count == 0
    model.base_model.merge_adapter()
    with pytest.raises(ValueError, match="merged adapter"):
        use(made, arguments)


class Experts(nn.Module):
    """A layer with two weights of its own, as those of a mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Parameter(torch.randn(4, 4, dtype=torch.float64)) for _ in range(2))

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return (x @ self.one).sin() @ self.two


def test_two_targeted_parameters_of_one_layer_are_no_alarm() -> None:
    """PEFT's layer for the second wraps that for the first."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"c": Experts()}).requires_grad_(False)
    model = Called(base)
    x, t = torch.randn(2, 4, dtype=torch.float64), torch.tensor([300, 700])
    expected = model(x, t)
    targets = ["base.c.one", "base.c.two"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=targets))
    ncp, reads = NCP(adapted, "base.c", call=lambda model, x, t: model(x, t)), Reads()
    for _ in range(3):
        adapted(x, t)
        with reads:
            assert torch.equal(ncp.features(x, t)["base.c"], expected)
    assert reads.count == 0


class Called(nn.Module):
    def __init__(self, base: nn.ModuleDict) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.base["c"](x, timestep)


def with_batch_norm(unet: nn.Module) -> None:
    unet.down_blocks[0].resnets[0].norm1 = nn.BatchNorm2d(8, dtype=unet.dtype)


def with_spectral_norm(unet: nn.Module) -> None:
    parametrizations.spectral_norm(unet.down_blocks[0].resnets[0].conv1)


@BOTH
@pytest.mark.parametrize("add", [with_batch_norm, with_spectral_norm])
def test_buffers_that_training_updates_stay_the_base_models_in_the_view(add: Any, make: Any, use: Any) -> None:
    unet = small()
    add(unet)
    unet.eval().requires_grad_(False)
    arguments = batch(unet)
    at = [arguments[name] for name in AT]
    expected = truth(use, unet, arguments)
    model = add_lora(unet).train()
    before = copy.deepcopy(dict(model.named_buffers()))
    made = make(model)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    for _ in range(3):
        assert torch.equal(use(made, arguments), expected)
        model(*at)
    model.unload_lora()
    assert not torch.equal(truth(use, model, arguments), expected)


def test_a_buffer_that_is_written_to_before_every_call_is_looked_at_three_times() -> None:
    """DDP writes the first process's buffers into the others' at every step."""
    unet = small()
    unet.conv_in.register_buffer("positions", torch.arange(3.0))
    arguments = batch(unet)
    ncp = NCP(unet)
    counts = []
    for _ in range(6):
        with Reads() as reads:
            use_loss(ncp, arguments)
        counts.append(reads.count)
        unet.conv_in.positions.copy_(torch.arange(3.0))
    assert counts == [0, 1, 1, 1, 0, 0]


@BOTH
def test_a_buffer_that_was_loaded_again_is_still_watched(make: Any, use: Any) -> None:
    unet = small()
    unet.conv_in.register_buffer("positions", torch.arange(1.0, 4.0))
    arguments = batch(unet)
    made = make(unet)
    use(made, arguments)
    for _ in range(4):  # as accelerate's load_state does; calls between them change nothing
        unet.load_state_dict(copy.deepcopy(unet.state_dict()))
        use(made, arguments), use(made, arguments)
    unet.conv_in.positions *= 3
    with pytest.raises(RuntimeError, match=r"conv_in.positions was changed"):
        use(made, arguments)


def test_a_buffer_that_a_forward_of_ones_own_updates_is_named_with_the_way_out() -> None:
    unet = small()
    unet.conv_in.register_buffer("seen", torch.zeros(()))
    arguments = batch(unet)
    ncp, apart = NCP(unet), NCP(copy.deepcopy(unet))
    use_loss(ncp, arguments), use_loss(apart, arguments)
    unet.conv_in.seen += 1
    with pytest.raises(RuntimeError, match=r"conv_in.seen was changed .*copy.deepcopy\(model\)"):
        use_loss(ncp, arguments)
    use_loss(apart, arguments)


class Reads(TorchDispatchMode):
    """Counts values read of weights, for each of which an accelerator would be waited for; not those of timesteps."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default and args[0].dtype != torch.int64
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("build", [same, add_lora, full])
def test_no_value_is_read_where_nothing_changed(build: Build) -> None:
    unet = build(small())
    watch = encoder_of(NCP(unet))._watch
    with Reads() as reads:
        for _ in range(3):
            watch.check()
    assert reads.count == 0


class Quantised(nn.Parameter):
    """A parameter whose values are not what is computed with, as bitsandbytes' and torchao's."""


@BOTH
def test_a_quantised_weight_that_is_replaced_under_an_adapter_is_told_and_the_adapter_alone_is_not(
    make: Any, use: Any
) -> None:
    unet = small()
    weight = unet.get_parameter(f"{CONV1}.weight")
    conv(unet).weight = Quantised(weight.detach(), requires_grad=False)
    arguments = batch(unet)
    expected = truth(use, unet, arguments)
    made = make(unet)
    assert torch.equal(use(made, arguments), expected)
    add_lora(unet)
    for _ in range(2):
        assert torch.equal(use(made, arguments), expected)
    conv(unet).base_layer.weight = Quantised(2 * weight.detach(), requires_grad=False)
    peft_lora(unet.mid_block.attentions[0])
    with pytest.raises(RuntimeError, match=f"{CONV1}.weight was changed"):
        use(made, arguments)


def test_weights_are_watched_again_once_what_rewrote_them_has_left() -> None:
    unet = small(torch.float32)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    config = LoraConfig(r=2, target_modules=[], target_parameters=[name], init_lora_weights=False)
    arguments = batch(unet)
    ncp = NCP(unet)
    model = get_peft_model(unet, config)
    use_loss(ncp, arguments)
    model.unload()
    use_loss(ncp, arguments)
    nn.init.ones_(unet.get_parameter(name))
    with pytest.raises(RuntimeError, match=f"{name} was changed"):
        use_loss(ncp, arguments)


# Copies.


def pickled(things: Any) -> Any:
    return pickle.loads(pickle.dumps(things))


def saved(things: Any) -> Any:
    torch.save(things, stream := io.BytesIO())
    return torch.load(io.BytesIO(stream.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("order", [1, -1])
def test_copies_of_model_loss_and_reference_together_see_what_the_originals_see(
    copied: Callable[[Any], Any], called: bool, order: int
) -> None:
    unet = add_lora(small())
    arguments = batch(unet)
    originals = [unet, NCP(unet), frozen_view(unet)]
    if called:
        use_loss(originals[1], arguments), use_view(originals[2], arguments)
    twin, ncp, view = copied(originals[::order])[::order]
    assert torch.equal(use_loss(ncp, arguments), use_loss(originals[1], arguments))
    assert torch.equal(use_view(view, arguments), use_view(originals[2], arguments))
    twin.fuse_lora()
    for use, made in ((use_loss, ncp), (use_view, view)):
        with pytest.raises(ValueError, match="must have no merged adapter"):
            use(made, arguments)
    use_loss(originals[1], arguments), use_view(originals[2], arguments)
    twin.unfuse_lora()
    use_loss(ncp, arguments), use_view(view, arguments)
    twin.load_state_dict(add_lora(small(seed=1)).state_dict())
    for use, made in ((use_loss, ncp), (use_view, view)):
        with pytest.raises(RuntimeError, match=r"conv_in\.\w+ was changed"):
            use(made, arguments)


def test_a_loss_copied_alone_does_not_take_the_users_model_along() -> None:
    unet = add_lora(small())
    trained = {id(p) for p in unet.parameters() if p.requires_grad}
    seen: set[int] = set()

    class Counting(pickle.Pickler):
        def persistent_id(self, thing: Any) -> None:
            seen.add(id(thing))

    Counting(io.BytesIO()).dump([NCP(unet), frozen_view(unet)])
    assert trained
    assert not trained & seen


def test_a_view_compiles_whole() -> None:
    unet = add_lora(small())
    arguments = batch(unet)
    view = frozen_view(unet)
    expected = use_view(view, arguments)
    torch.testing.assert_close(
        use_view(torch.compile(view, fullgraph=True, backend="eager"), arguments), expected, rtol=1e-12, atol=1e-12
    )
    torch.compiler.reset()


def test_a_layer_under_two_names_is_one_layer_and_is_watched_under_both() -> None:
    unet = small()
    attention = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    attention.attn2.to_q = attention.attn1.to_q
    arguments = batch(unet)
    expected = truth(use_view, unet, arguments)
    view = frozen_view(unet)
    twins = view.down_blocks[0].attentions[0].transformer_blocks[0]
    assert twins.attn1.to_q is twins.attn2.to_q
    assert torch.equal(use_view(view, arguments), expected)
    attention.attn2.to_q = get_peft_model(
        nn.Sequential(attention.attn2.to_q), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    ).base_model.model[0]
    assert torch.equal(use_view(view, arguments), expected)
    attention.attn2.to_q.merge()
    with pytest.raises(ValueError, match=r"merged into '\S+attn2.to_q'"):
        use_view(view, arguments)


# What rewrites the base is refused.


@BOTH
@pytest.mark.parametrize("by", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("when", ["before", "before the first call", "between two calls"])
def test_initialisations_that_rewrite_base_weights_are_refused_by_name(by: str, when: str, make: Any, use: Any) -> None:
    def add() -> None:
        unet.add_adapter(LoraConfig(r=2, init_lora_weights=by, **ATTENTION))

    unet = small(torch.float32)
    arguments = batch(unet)
    refused = pytest.raises(ValueError, match=f"^(unet|model) must be .*'default', initialised by '{by}'")
    if when == "before":
        add()
        with refused:
            make(unet)
        return
    made = make(unet)
    if when == "between two calls":
        use(made, arguments)
    add()
    with refused:
        use(made, arguments)


@pytest.mark.parametrize("by", [True, False, "gaussian", "orthogonal", "eva"])
def test_initialisations_that_write_to_adapters_alone_are_not(by: Any) -> None:
    unet = small(torch.float32)
    arguments = batch(unet)
    expected = truth(use_loss, unet, arguments)
    unet.add_adapter(LoraConfig(r=2, init_lora_weights=by, **ATTENTION))
    assert torch.equal(use_loss(NCP(unet), arguments), expected)


def conv(unet: nn.Module) -> nn.Conv2d:
    return unet.get_submodule(CONV1)


def made_by_a_hook_of_ones_own(unet: nn.Module) -> None:
    layer = conv(unet)
    layer.weight_raw = nn.Parameter(layer.weight.detach())
    del layer.weight
    layer.weight = layer.weight_raw * 2
    layer.register_forward_pre_hook(lambda module, args: setattr(module, "weight", module.weight_raw * 2))


def emptied(unet: nn.Module) -> None:
    conv(unet).weight.data = torch.empty(0, dtype=unet.dtype)


def on_meta(unet: nn.Module) -> None:
    unet.down_blocks[1].to("meta")


def grouped(unet: nn.Module) -> None:
    cpu = torch.device("cpu")
    kinds = {"offload_type": "block_level", "num_blocks_per_group": 1}
    unet.enable_group_offload(onload_device=cpu, offload_device=cpu, **kinds)


def cast_by_layer(unet: nn.Module) -> None:
    unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


HOOKED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "weight_norm": (lambda unet: weight_norm(conv(unet)), f"'{CONV1}' has a weight made by a hook"),
    "spectral_norm": (lambda unet: spectral_norm(conv(unet)), f"'{CONV1}' has a weight made by a hook"),
    "prune": (lambda unet: prune.l1_unstructured(conv(unet), "bias", 0.5), f"'{CONV1}' has a bias made by a hook"),
    "one's own": (made_by_a_hook_of_ones_own, f"'{CONV1}' has a weight made by a hook"),
    "block swap": (swapped_by_blocks, "swaps blocks between devices"),
    "empty": (emptied, f"'{CONV1}' has an empty weight"),
    "offloaded": (lambda unet: cpu_offload(unet, torch.device("cpu")), "' is offloaded by accelerate"),
    "group offloading": (grouped, "' has weights in the hands of diffusers' group_offloading"),
    "layerwise casting": (cast_by_layer, "' has weights in the hands of diffusers' layerwise_casting"),
}


@BOTH
@pytest.mark.parametrize(("hook", "message"), HOOKED.values(), ids=HOOKED)
def test_weights_that_are_not_there_until_a_hook_makes_them_are_refused_by_name(
    hook: Callable[[nn.Module], Any], message: str, make: Any, use: Any
) -> None:
    unet = small(torch.float32)
    hook(unet)
    with pytest.raises(ValueError, match="^(unet|model) must be .*" + re.escape(message)):
        make(unet)
    unet = small(torch.float32)
    arguments = batch(unet)
    made = make(unet)
    hook(unet.requires_grad_(False))
    with pytest.raises((ValueError, RuntimeError), match=r"^(unet|model)('s base weights)? must"):
        use(made, arguments)


@BOTH
@pytest.mark.parametrize("called", [False, True])
def test_a_part_on_another_device_is_named(called: bool, make: Any, use: Any) -> None:
    unet = small()
    arguments = batch(unet)
    made = make(unet)
    if called:
        use(made, arguments)
    on_meta(unet)
    message = r"(unet|model) must be on one device, not offloaded in part; it was conv_in.weight on cpu, down_blocks.1"
    with pytest.raises(ValueError, match=message):
        use(made, arguments)


@BOTH
def test_a_script_module_is_refused_by_name(make: Any, use: Any) -> None:
    scripted = torch.jit.script(nn.Linear(2, 2).requires_grad_(False))
    for module in (scripted, nn.Sequential(nn.ReLU(), scripted)):
        with pytest.raises(ValueError, match=r"^(unet|model) must be .*is a ScriptModule"):
            make(module, *["0"] * (make is NCP))


@BOTH
def test_weights_loaded_in_inference_mode_are_shared_too(make: Any, use: Any) -> None:
    with torch.inference_mode():
        unet = small()
    arguments = batch(unet)
    with torch.no_grad():
        expected = use_view(unet, arguments) if use is use_view else None
        found = [use(make(unet), arguments) for _ in range(2)]
    assert torch.equal(*found)
    assert expected is None or torch.equal(found[0], expected)


def test_a_loss_that_is_gone_leaves_nothing_behind() -> None:
    ncp = NCP(small())
    gone = weakref.ref(encoder_of(ncp)._watch)
    del ncp
    gc.collect()
    assert gone() is None


@BOTH
def test_whole_numbers_that_change_are_told_however_little(make: Any, use: Any) -> None:
    unet = small()
    unet.register_buffer("table", torch.arange(1000, 1032))
    arguments = batch(unet)
    made = make(unet)
    use(made, arguments)
    unet.table[3] += 1
    with pytest.raises(RuntimeError, match=r"table was changed"):
        use(made, arguments)


@pytest.mark.parametrize(
    ("make", "use", "again"), [(NCP, use_loss, "Build the loss"), (frozen_view, use_view, "Call frozen_view")]
)
def test_the_message_says_what_to_make_again(make: Any, use: Any, again: str) -> None:
    unet = small()
    arguments = batch(unet)
    made = make(unet)
    use(made, arguments)
    stepped(unet)
    with pytest.raises(RuntimeError, match=rf"\. {again} again; where weights are trainable"):
        use(made, arguments)
