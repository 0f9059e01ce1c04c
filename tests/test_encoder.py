"""The encoder: which layer, what runs, what is held."""

from __future__ import annotations

import copy
import gc
import random
import weakref

import pytest
import torch
import torch.utils.checkpoint
from diffusers import AudioLDM2UNet2DConditionModel, AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from models import LAYOUTS, batch, encoder_of, sd15, sdxl, small
from torch.utils.flop_counter import FlopCounterMode

from ncp_loss import NoiseConditionedPerceptualLoss, frozen_view, ncp_dpo_loss


def inputs(unet, rows: int = 1) -> tuple:
    arguments = batch(unet, rows)
    extra = {k: arguments[k] for k in ("added_cond_kwargs",) if k in arguments}
    return (arguments["noisy_latents"], arguments["timesteps"], arguments["encoder_hidden_states"]), extra


def flops_of(call) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def flops_until(unet, last: str) -> int:
    """Block by block, with hooks on the whole model: everything from the start until ``last`` has returned."""
    args, extra = inputs(unet)
    counter, seen = FlopCounterMode(display=False), {}
    handle = unet.get_submodule(last).register_forward_hook(
        lambda m, a, out: seen.update(flops=counter.get_total_flops())
    )
    with counter, torch.no_grad():
        unet(*args, **extra)
    handle.remove()
    return seen["flops"]


PATHS = {
    "down_blocks": "down_blocks.-1",
    "mid_block": "mid_block",
    "down_blocks.1": "down_blocks.1",
    "down_blocks.-2.attentions.0": "down_blocks.-2.attentions.0",
    "up_blocks.0": "up_blocks.0",
}


@pytest.mark.parametrize("layer", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_are_the_whole_models_own_and_nothing_past_the_layer_runs(layout, layer):
    unet = LAYOUTS[layout](dtype=torch.float32)
    count = len(unet.down_blocks)
    path = PATHS[layer].replace("-1", str(count - 1)).replace("-2", str(count - 2))
    args, extra = inputs(unet)
    ncp = NoiseConditionedPerceptualLoss(unet, layer)
    kept = {}
    handle = unet.get_submodule(path).register_forward_hook(lambda m, a, out: kept.update(out=out))
    unet(*args, **extra)
    handle.remove()
    truth = kept["out"][0] if isinstance(kept["out"], tuple) else kept["out"]
    assert torch.equal(ncp.features(*args, **extra)[layer], truth)
    flops, bound = flops_of(lambda: ncp.features(*args, **extra)), flops_until(unet, path)
    assert 0.99 * bound <= flops <= 1.01 * bound


def test_features_may_be_taken_between_timesteps():
    unet = sd15(dtype=torch.float32)
    (x, _, text), _ = inputs(unet)
    t = torch.full((len(x),), 10.5)
    kept = {}
    handle = unet.down_blocks[-1].register_forward_hook(lambda m, a, out: kept.update(out=out[0]))
    unet(x, t, text)
    handle.remove()
    features = NoiseConditionedPerceptualLoss(unet).features
    assert torch.equal(features(x, t, text)["down_blocks"], kept["out"])
    assert not torch.equal(features(x, t.floor(), text)["down_blocks"], kept["out"])


def test_several_layers_cost_one_pass_to_the_last_of_them():
    unet = sd15(dtype=torch.float32)
    args, _ = inputs(unet)
    both = NoiseConditionedPerceptualLoss(unet, ["mid_block", "down_blocks.1"])
    mid = NoiseConditionedPerceptualLoss(unet, "mid_block")
    features = both.features(*args)
    assert list(features) == ["mid_block", "down_blocks.1"]
    assert torch.equal(features["mid_block"], mid.features(*args)["mid_block"])
    assert flops_of(lambda: both.features(*args)) == flops_of(lambda: mid.features(*args))


@pytest.mark.parametrize("difference", ["literal", "scaled", "central"])
@pytest.mark.parametrize("with_reference", [True, False])
def test_each_point_is_one_call_with_the_trainers_own_batch_and_one_of_them_has_a_graph(difference, with_reference):
    unet = sd15()
    ncp = NoiseConditionedPerceptualLoss(unet, difference=difference)
    calls = calls_of(ncp)
    ncp.errors(**batch(unet, 3) | ({} if with_reference else {"ref_pred": None}))
    points = {"literal": 3, "scaled": 3, "central": 4}[difference] if with_reference else 2
    assert calls == [(3, False)] * (points - 1) + [(3, True)]


def calls_of(ncp):
    """(rows, whether a graph is recorded) of every call of the encoder."""
    calls = []
    encoder_of(ncp).view.register_forward_pre_hook(lambda m, a: calls.append((len(a[0]), torch.is_grad_enabled())))
    return calls


def test_an_errors_calls_flops_are_three_encoder_forwards_and_one_backward_and_the_trainers_backward_has_none():
    unet = sd15(dtype=torch.float32)
    ncp = NoiseConditionedPerceptualLoss(unet)
    arguments = batch(unet, 1)
    one = flops_until(unet, "down_blocks.3")
    with FlopCounterMode(display=False) as counter:
        error, _ = ncp.errors(**arguments)
    # To the latents only: a linear layer's backward costs its forward, attention's two and a half of them.
    assert one * 3.9 < counter.get_total_flops() < one * 4.7
    with FlopCounterMode(display=False) as counter:
        error.sum().backward()
    assert counter.get_total_flops() == 0


class Held:
    """A tensor that autograd saved, for as long as a graph holds it."""

    def __init__(self, tensor):
        self.tensor = tensor


def held(make) -> int:
    """Bytes that autograd still holds of what it saved while ``make`` ran, after that has returned."""
    saved = weakref.WeakSet()

    def pack(tensor):
        saved.add(one := Held(tensor))
        return one

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
        result = make()
    gc.collect()
    storages = {one.tensor.untyped_storage()._cdata: one.tensor.untyped_storage().nbytes() for one in saved}
    assert result.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"normalize": True, "weighting": "noise"}])
def test_after_the_loss_autograd_holds_at_most_four_arrays_of_the_predictions_size(dtype, options):
    unet = sd15(dtype=dtype)
    arguments = batch(unet, 2, pairs=True, dtype=torch.float32)
    ncp = NoiseConditionedPerceptualLoss(unet, **options)
    bytes_held = held(lambda: ncp_dpo_loss(ncp, **arguments).loss)
    assert 0 < bytes_held <= 4 * arguments["model_pred"].nbytes


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("make", [sd15, sdxl])
def test_chunks_change_no_value_and_bound_the_rows_that_are_evaluated_at_a_time(make, pairs, chunk_size):
    unet = make()
    arguments = batch(unet, 3 if pairs else 5, pairs=pairs) | {"pairs": pairs}
    whole, chunked = (NoiseConditionedPerceptualLoss(unet, chunk_size=c) for c in (None, chunk_size))
    calls = calls_of(chunked)
    found = [ncp.errors(**arguments) for ncp in (whole, chunked)]
    gradients = [torch.autograd.grad(e.error.sum(), arguments["model_pred"])[0] for e in found]
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12 * float(gradients[0].abs().max()))
    assert max(rows for rows, _ in calls) <= (max(chunk_size, 2) if pairs else chunk_size)


def test_chunks_keep_the_members_of_a_pair_together():
    unet = sd15()
    arguments = batch(unet, 3, pairs=True)
    arguments["noisy_latents"] = torch.arange(6.0, dtype=torch.float64).reshape(-1, 1, 1, 1).expand(6, 4, 16, 16)
    ncp, seen = NoiseConditionedPerceptualLoss(unet, chunk_size=2), []
    encoder_of(ncp).view.register_forward_pre_hook(lambda m, a: seen.append(a[0].mean((1, 2, 3)).round().tolist()))
    ncp.errors(**arguments, pairs=True)
    assert {tuple(rows) for rows in seen} == {(0.0, 3.0), (1.0, 4.0), (2.0, 5.0)}


REFUSED_IN_CHUNKS = {
    "a list": [torch.ones(4, 2)],
    "a table": torch.ones(7, 2),
    "an object": torch.nn.Identity(),
}


@pytest.mark.parametrize("given", REFUSED_IN_CHUNKS.values(), ids=REFUSED_IN_CHUNKS)
def test_conditioning_that_has_no_batch_first_is_refused_by_name_in_chunks(given):
    unet = sd15()
    ncp = NoiseConditionedPerceptualLoss(unet, chunk_size=2, call=lambda model, x, t, text, **_: model(x, t, text))
    arguments = batch(unet, 4)
    text = {"text": arguments.pop("encoder_hidden_states")}
    ncp.errors(**arguments, **text, scale=0.5, flag=None)
    with pytest.raises(ValueError, match=r"model_kwargs\['extra'\] must be a tensor with the batch first, 4 rows"):
        ncp.errors(**arguments, **text, extra=given)


def owned_bytes(ncp, unet) -> int:
    theirs = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    ours = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in encoder_of(ncp).view.parameters()}
    return sum(size for pointer, size in ours.items() if pointer not in theirs)


@pytest.mark.parametrize(
    "layer", ["down_blocks", "mid_block", "down_blocks.1", "down_blocks.1.attentions.0", "up_blocks.1"]
)
@pytest.mark.parametrize("make", [sd15, sdxl])
def test_a_frozen_model_is_shared_and_a_trainable_one_copied_as_far_as_the_layer(make, layer):
    unet = make(dtype=torch.float32)
    assert owned_bytes(NoiseConditionedPerceptualLoss(unet, layer), unet) == 0
    unet.requires_grad_(True)
    ncp = NoiseConditionedPerceptualLoss(unet, layer)
    args, extra = inputs(unet)
    ran = set()
    path = f"down_blocks.{len(unet.down_blocks) - 1}" if layer == "down_blocks" else layer
    for name, module in encoder_of(ncp).view.named_modules():
        module.register_forward_pre_hook(lambda m, a, name=name: ran.add(name))
    ncp.features(*args, **extra)
    block = ".".join(path.split(".")[:2])  # whose modules' order is the block's own affair

    def size(wanted):
        found = [m for name, m in unet.named_modules() if wanted(name)]
        return sum(p.nbytes for m in found for p in m._parameters.values() if p is not None)

    assert size(lambda name: name in ran) <= owned_bytes(ncp, unet)
    assert owned_bytes(ncp, unet) == size(lambda name: name in ran or name.startswith(f"{block}."))
    assert path in ran


def test_a_trainable_part_that_the_layer_does_not_need_costs_no_copy():
    unet = sd15()
    unet.up_blocks.requires_grad_(True)
    assert owned_bytes(NoiseConditionedPerceptualLoss(unet), unet) == 0
    unet.down_blocks[0].requires_grad_(True)
    ncp = NoiseConditionedPerceptualLoss(unet)
    assert 0 < owned_bytes(ncp, unet) <= sum(p.nbytes for p in unet.down_blocks[0].parameters())


def test_moving_the_loss_converts_its_own_copies_and_never_the_users_weights():
    unet = sd15(dtype=torch.float32).requires_grad_(True)
    ncp = NoiseConditionedPerceptualLoss(unet)
    ncp.to(torch.bfloat16)
    assert encoder_of(ncp).view.down_blocks[0].resnets[0].conv1.weight.dtype == torch.bfloat16
    assert {p.dtype for p in unet.parameters()} == {torch.float32}
    assert ncp.features(*inputs(unet)[0])["down_blocks"].dtype == torch.bfloat16


@pytest.mark.parametrize(("of_model", "of_loss"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
@pytest.mark.parametrize("converted", ["the loss", "the model"])
def test_copies_in_another_dtype_than_the_trainers_latents_get_latents_in_their_own(of_model, of_loss, converted):
    """The weights past the layer, which never run, say nothing about what the layers take."""
    unet = small(of_model if converted == "the loss" else of_loss).requires_grad_(True)
    ncp = NoiseConditionedPerceptualLoss(unet)
    if converted == "the loss":
        ncp.to(of_loss)
    else:
        unet.to(of_model)
    arguments = batch(unet, dtype=of_model)
    wide = copy.deepcopy(unet).to(of_loss) if converted == "the loss" else small(of_loss)
    expected = NoiseConditionedPerceptualLoss(wide).errors(**arguments).error
    torch.testing.assert_close(ncp.errors(**arguments).error, expected, rtol=0, atol=0)


@pytest.mark.parametrize("layer", ["down_blocks.1.attentions.0", ["down_blocks.1.resnets.0", "up_blocks.1.resnets.1"]])
def test_checkpointing_may_end_inside_a_block(layer):
    """The pass ends, and is recomputed, within what diffusers checkpoints."""
    unet = sd15()
    arguments = batch(unet, 1)
    found = []
    for checkpoint in (False, True):
        error, _ = NoiseConditionedPerceptualLoss(unet, layer, checkpoint=checkpoint).errors(**arguments)
        found.append(torch.autograd.grad(error.sum(), arguments["model_pred"])[0])
    assert torch.equal(*found)


def test_a_layer_that_runs_several_times_gives_its_first_output_whatever_is_asked_beside_it():
    unet = sd15()
    args, extra = inputs(unet)
    layer = "down_blocks.0.resnets.0.nonlinearity"
    alone, beside = (NoiseConditionedPerceptualLoss(unet, which) for which in (layer, [layer, "mid_block"]))
    assert torch.equal(alone.features(*args, **extra)[layer], beside.features(*args, **extra)[layer])


@pytest.mark.parametrize("stops_early", [True, False])
def test_recomputation_in_backward_keeps_no_features_and_ends_no_pass(stops_early):
    unet = sd15()
    arguments = batch(unet, 1)
    ncp = NoiseConditionedPerceptualLoss(unet, ["down_blocks.0.resnets.0", "down_blocks"], checkpoint=True)
    with torch.utils.checkpoint.set_checkpoint_early_stop(stops_early):
        ncp.errors(**arguments)[0].sum().backward()
    assert not encoder_of(ncp)._pass.kept
    wanted = NoiseConditionedPerceptualLoss(unet, ["down_blocks.0.resnets.0", "down_blocks"]).errors(**arguments)[0]
    assert torch.equal(arguments["model_pred"].grad, torch.autograd.grad(wanted.sum(), arguments["model_pred"])[0])


def test_checkpointing_changes_no_value_and_no_flag_of_the_users():
    unet = sd15()
    arguments = batch(unet, 2)
    plain, saved = (NoiseConditionedPerceptualLoss(unet, "mid_block", checkpoint=c) for c in (False, True))
    results, kept = [], []
    for ncp in (plain, saved):
        sizes = []

        def pack(x, sizes=sizes):
            sizes.append(x.nbytes)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            error, _ = ncp.errors(**arguments)
        results.append((error, torch.autograd.grad(error.sum(), arguments["model_pred"])[0]))
        kept.append(sum(sizes))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert kept[1] < 0.5 * kept[0]
    assert not unet.is_gradient_checkpointing


def test_a_frozen_view_is_the_base_model_and_stays_it():
    unet = sd15()
    args, _ = inputs(unet)
    truth = unet(*args).sample
    view = frozen_view(unet)
    assert torch.equal(view(*args).sample, truth)
    assert not view.training
    assert {p.data_ptr() for p in view.parameters()} == {p.data_ptr() for p in unet.parameters()}
    unet.requires_grad_(True)
    copied = frozen_view(unet)
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(1)
    assert torch.equal(copied(*args).sample, truth)


# The order of modules, and modules with several names.


def audioldm2():
    """Two attentions after each resnet, each with a text of its own."""
    torch.manual_seed(0)
    return AudioLDM2UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=2, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=((None, 12, 6), (None, 12, 6)),
    ).double()  # fmt: skip


def shuffled(model):
    """The same modules, registered in another order."""
    order = random.Random(0)
    for module in model.modules():
        if not isinstance(module, torch.nn.ModuleList):
            children = list(module._modules.items())
            order.shuffle(children)
            module._modules.clear()
            module._modules.update(children)
    return model


@pytest.mark.parametrize("again", [lambda model: model, shuffled])
@pytest.mark.parametrize(
    "layer",
    ["down_blocks.0.resnets.1", "down_blocks.0.attentions.2", "mid_block.attentions.1", "up_blocks.1.attentions.3"],
)
def test_full_fine_tuning_of_several_attentions_a_resnet_leaves_the_encoder_where_it_was(layer, again):
    unet = again(audioldm2())
    x, texts = torch.randn(2, 4, 8, 8).double(), [torch.randn(2, 5, width).double() for width in (12, 6)]

    def call(model, x, t, first, second):
        return model(x, t, first, encoder_hidden_states_1=second)

    pristine, kept = copy.deepcopy(unet), []
    pristine.get_submodule(layer).register_forward_hook(
        lambda _, args, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    t = torch.tensor([100, 900])
    with torch.no_grad():
        call(pristine, x, t, *texts)
    ncp = NoiseConditionedPerceptualLoss(unet, layer, call=call)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    found = ncp.features(x, t, first=texts[0], second=texts[1])[layer]
    assert torch.equal(found, kept[0])


class Backwards(UNet2DConditionModel):
    """Of diffusers by name, and with an order of its own."""

    def forward(self, x, timestep, encoder_hidden_states=None):
        return self.down_blocks[0](self.down_blocks[1](x))


def test_a_model_that_runs_in_another_order_than_diffusers_is_refused_and_one_of_ones_own_is_copied_whole(monkeypatch):
    blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4, dtype=torch.float64) for _ in range(2)])
    unet = sd15()
    unet.down_blocks, x = blocks.requires_grad_(True), torch.randn(2, 4).double()
    own = Backwards.__new__(Backwards)
    vars(own).update(vars(unet))
    expected = blocks[0](blocks[1](x)).detach()
    ncp = NoiseConditionedPerceptualLoss(own, "down_blocks.0", call=lambda model, x, t: model(x, t))
    with torch.no_grad():
        for parameter in blocks.parameters():
            parameter.add_(1)
    assert torch.equal(ncp.features(x, torch.tensor(1))["down_blocks.0"], expected)
    monkeypatch.setattr(Backwards, "__module__", "diffusers.models.backwards")
    ncp = NoiseConditionedPerceptualLoss(own, "down_blocks.0", call=lambda model, x, t: model(x, t))
    with pytest.raises(ValueError, match=r"^layer must be a module that has run when 'down_blocks.1' begins"):
        ncp.features(x, torch.tensor(1))


@pytest.mark.parametrize("layer", ["up_blocks.0.resnets.0", "down_blocks.1.resnets.0"])
def test_a_module_under_two_names_is_copied_wherever_it_runs_first(layer):
    """Registered past the layer before it is registered in front of it."""
    unet = sd15()
    unet.up_blocks[0].resnets[0] = unet.down_blocks[1].resnets[0]
    unet._modules = {"up_blocks": unet.up_blocks, **unet._modules}
    args, _ = inputs(unet)

    def call(model, x, t, encoder_hidden_states):
        time = model.time_embedding(model.time_proj(t).to(x.dtype))
        return model.down_blocks[1].resnets[0](model.conv_in(x), time)

    ncp = NoiseConditionedPerceptualLoss(unet.requires_grad_(True), layer, call=call)
    expected = call(unet, *args).detach()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(1)
    assert torch.equal(ncp.features(*args)[layer], expected)
    with pytest.raises(ValueError, match=r"^layer must be different modules"):
        NoiseConditionedPerceptualLoss(unet, ["up_blocks.0.resnets.0", "down_blocks.1.resnets.0"])


# Pieces.


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("inner", ["ff", "ff.net.0", "ff.net.2", "attn1.to_out.0"])
def test_a_layer_inside_chunked_feed_forward_is_seen_whole(inner, dim):
    unet = sd15()
    args, _ = inputs(unet, 2)
    layer = f"down_blocks.1.attentions.0.transformer_blocks.0.{inner}"
    whole = NoiseConditionedPerceptualLoss(unet, layer).features(*args)[layer]
    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock):
            block.set_chunk_feed_forward(1 + dim, dim)
    found = NoiseConditionedPerceptualLoss(unet, layer).features(*args)[layer]
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    assert unet.down_blocks[1].attentions[0].transformer_blocks[0]._chunk_size == 1 + dim


@pytest.mark.parametrize("by", ["enable_slicing", "enable_tiling"])
def test_a_decoder_that_works_by_slices_or_tiles_is_seen_whole(by):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16, latent_channels=4,
    ).double().eval().requires_grad_(False)  # fmt: skip
    x, layer = torch.randn(2, 4, 16, 16).double(), "decoder.up_blocks.0"

    def features():
        ncp = NoiseConditionedPerceptualLoss(vae, layer, call=lambda model, x, t: model.decode(x))
        return ncp.features(x, torch.tensor(0))[layer]

    whole = features()
    getattr(vae, by)()
    assert torch.equal(features(), whole)
    assert vae.use_slicing or vae.use_tiling


# Layers and derivatives that say nothing.


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("beside", [[], ["mid_block"]])
@pytest.mark.parametrize("layer", ["time_embedding", "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"])
def test_a_layer_that_latents_do_not_reach_is_refused_with_and_without_gradients(layer, beside, trains):
    unet = sd15()
    ncp = NoiseConditionedPerceptualLoss(unet, [layer, *beside])
    with torch.set_grad_enabled(trains), pytest.raises(ValueError, match=f"^layer must be .*latents; it was '{layer}'"):
        ncp.errors(**batch(unet))


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_loss_without_gradients_looks_once_at_what_latents_reach_and_holds_nothing(chunk_size):
    unet = sd15()
    arguments = batch(unet)
    ncp, expected = (NoiseConditionedPerceptualLoss(unet, chunk_size=chunk_size) for _ in range(2))
    expected, calls = expected.errors(**arguments).error.detach(), calls_of(ncp)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(ncp.errors(**arguments).error, expected)
    assert [graph for _, graph in calls].count(True) == 1
    with torch.inference_mode():
        found = NoiseConditionedPerceptualLoss(unet).errors(**arguments).error
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_what_inference_mode_could_not_tell_is_told_by_the_first_call_after_it():
    unet = sd15()
    ncp, arguments = NoiseConditionedPerceptualLoss(unet, "time_embedding"), batch(unet)
    with torch.inference_mode():
        assert torch.equal(ncp.errors(**arguments).error, torch.zeros(2, dtype=torch.float64))
    with torch.no_grad(), pytest.raises(ValueError, match="depends on the latents; it was 'time_embedding'"):
        ncp.errors(**arguments)


def test_forward_mode_derivatives_are_refused():
    unet = sd15()
    arguments = batch(unet)
    x = arguments.pop("model_pred").detach()
    ncp = NoiseConditionedPerceptualLoss(unet)
    with pytest.raises(RuntimeError, match="reverse-mode derivatives only"):
        torch.func.jvp(lambda x: ncp.errors(x, **arguments).error, (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="model_pred must carry no tangent"):
        ncp.errors(torch.autograd.forward_ad.make_dual(x, x), **arguments)


# Models with a call of their own.


class OnesOwn(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(4, 4, 3)

    def forward(self, x, t, context=None):
        return self.layer(x) * t.reshape(-1, 1, 1, 1)


class OfOtherText(OnesOwn):
    def forward(self, x, timestep, context):
        return super().forward(x, timestep)


@pytest.mark.parametrize("make", [OnesOwn, OfOtherText])
def test_a_model_that_is_called_in_a_way_of_its_own_is_told_of_call(make):
    model = make().double().requires_grad_(False)
    x, text, t = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 3, 4).double(), torch.tensor([3, 5])
    with pytest.raises(
        TypeError, match=r"^call must be given.*own-models.*; it was None, and O\w+.forward, called with"
    ):
        NoiseConditionedPerceptualLoss(model, "layer").errors(x, x, x, t, text)
    ncp = NoiseConditionedPerceptualLoss(model, "layer", call=lambda m, x, t, encoder_hidden_states: m(x, t, text))
    assert torch.equal(ncp.features(x, t, text)["layer"], model.layer(x))


def test_a_misspelled_argument_is_refused_by_its_name():
    unet = sd15(dtype=torch.float32)
    arguments = batch(unet, 1, pairs=True)
    with pytest.raises(
        TypeError, match=r"^betta must be an argument of the loss or of UNet2DConditionModel.forward; it"
    ):
        ncp_dpo_loss(NoiseConditionedPerceptualLoss(unet), **arguments, betta=2.0)


def test_checkpointing_is_refused_where_the_model_has_none():
    with pytest.raises(
        ValueError, match=r"^checkpoint must be False: OnesOwn has no gradient checkpointing; it was True"
    ):
        NoiseConditionedPerceptualLoss(OnesOwn(), "layer", checkpoint=True)


def test_two_layers_of_a_block_count_by_their_weights():
    unet = sd15()
    layers = {"down_blocks.1.resnets.0": 2.0, "down_blocks.1.attentions.0": 0.5}
    both, *each = (
        NoiseConditionedPerceptualLoss(unet, layer).errors(**batch(unet)).error for layer in (layers, *layers)
    )
    torch.testing.assert_close(both, 2.0 * each[0] + 0.5 * each[1], rtol=1e-12, atol=0)
    assert not torch.allclose(each[0], each[1])


def test_a_default_device_of_meta_changes_nothing():
    unet = sd15()
    arguments = batch(unet)
    expected = NoiseConditionedPerceptualLoss(unet).errors(**arguments)
    with torch.device("meta"):
        found = NoiseConditionedPerceptualLoss(unet).errors(**arguments)
    assert torch.equal(found.error, expected.error)
    assert torch.equal(found.ref_error, expected.ref_error)


def test_a_loss_built_on_meta_computes_with_the_weights_that_are_assigned_later():
    unet = sd15()
    arguments = batch(unet)
    with torch.device("meta"):
        empty = sd15()
    ncp = NoiseConditionedPerceptualLoss(empty)
    empty.load_state_dict(unet.state_dict(), assign=True)
    empty.requires_grad_(False)
    expected = NoiseConditionedPerceptualLoss(unet).errors(**arguments)
    assert all(map(torch.equal, ncp.errors(**arguments), expected))


# U-Nets that need no text.


def kandinsky_decoder():
    """Kandinsky 2.2's: the image's embedding stands in the text's place."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, attention_head_dim=4,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), cross_attention_dim=12,
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), addition_embed_type="image",
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", encoder_hid_dim=6, encoder_hid_dim_type="image_proj",
        resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    return unet, {"added_cond_kwargs": {"image_embeds": torch.randn(2, 6).double()}}


def audioldm():
    """AudioLDM's: a class embedding, and cross-attention to itself."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=(8, 16), class_embed_type="simple_projection", class_embeddings_concat=True,
        projection_class_embeddings_input_dim=6,
    )  # fmt: skip
    return unet, {"class_labels": torch.randn(2, 6).double()}


@pytest.mark.parametrize("make", [kandinsky_decoder, audioldm])
def test_a_unet_that_needs_no_text_is_given_none(make):
    unet, conditioning = make()
    unet = unet.double().requires_grad_(False)
    x, t, kept = torch.randn(2, 4, 8, 8).double(), torch.tensor([30, 700]), []
    handle = unet.down_blocks[1].register_forward_hook(lambda _, args, out: kept.append(out[0]))
    unet(x, t, None, **conditioning)
    handle.remove()
    assert torch.equal(NoiseConditionedPerceptualLoss(unet).features(x, t, **conditioning)["down_blocks"], kept[0])
    with pytest.raises(ValueError, match="encoder_hidden_states must be given: the model attends to text"):
        NoiseConditionedPerceptualLoss(sd15()).features(x, t)
