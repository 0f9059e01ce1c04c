"""U-Nets as their owners condition them: errors equal those of a hook on a copy that is called the same way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    T2IAdapter,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import (
    AttnProcessor,
    CustomDiffusionAttnProcessor,
    PAGIdentitySelfAttnProcessor2_0,
    SlicedAttnProcessor,
)
from models import batch, encoder_of, sd15, sdxl
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from users import AT, add_lora, block_output

from ncp_loss import NoiseConditionedPerceptualLoss as NCP
from ncp_loss import frozen_view

ROWS = 2


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random(model: nn.Module) -> nn.Module:
    """No weight left at zero, where an adapter would say nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.eval().requires_grad_(False)


def refiner(**overrides: Any) -> UNet2DConditionModel:
    """SDXL's second model: four levels, attention in the middle two, one text encoder, five ids for six."""
    levels: dict[str, Any] = {
        "block_out_channels": (16, 16, 32, 32),
        "attention_head_dim": (2, 4, 4, 4),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": 2,
        "projection_class_embeddings_input_dim": 8 + 5 * 4,
    }
    return sdxl(**levels | overrides)


def of_zero_snr(**options: Any) -> DDPMScheduler:
    return DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, **options)


def constants(value: Any) -> Any:
    """Without gradients, in containers of its own: diffusers takes residuals out of the list that it is given."""
    return tree_map_only(Tensor, Tensor.detach, value)


def step_of(scheduler: Any, output: Tensor, x: Tensor, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """x_t' and t', one sample at a time."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        shift = scheduler.config.shift
        u = t / (1000 * shift - (shift - 1) * t) - 0.001  # the grid before shifting is 0, 0.001, ..., 1
        after = 1000 * shift * u / (1 + (shift - 1) * u)
        return x + ((after - t) / 1000).reshape(-1, 1, 1, 1) * output, after
    abar = torch.cumprod(1 - scheduler.betas.double(), 0).tolist()
    kind = scheduler.config.prediction_type
    rows = [oracle.reverse_step(kind, output[i], x[i], int(t[i]), z[i], abar) for i in range(len(t))]
    return torch.stack(rows), t - 1


def hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def assert_the_definition(
    unet: nn.Module, pristine: nn.Module, layer: str, given: dict[str, Any], scheduler: Any
) -> None:
    """Errors, and the gradient, equal those of a hook on a deep copy, given the very same conditioning."""
    last = layer if layer != "down_blocks" else f"down_blocks.{len(pristine.down_blocks) - 1}"
    kept: list[Tensor] = []
    handle = pristine.get_submodule(last).register_forward_hook(lambda _, args, out: kept.append(hidden(out).clone()))
    conditioning = constants({k: v for k, v in given.items() if k not in DATA})
    before = copy.deepcopy(conditioning)

    def features(prediction: Tensor) -> Tensor:
        x, after = step_of(scheduler, prediction, given["noisy_latents"], given["timesteps"], given["variance_noise"])
        pristine(x, after, **constants(conditioning))
        return kept.pop()

    truth = features(given["target"])
    wanted, wanted_ref = ((features(given[k]) - truth).square().flatten(1).mean(1) for k in ("model_pred", "ref_pred"))
    handle.remove()
    error, ref_error = NCP(unet, layer, schedule=scheduler).errors(**given)
    assert (wanted > 0).all()
    torch.testing.assert_close(error, wanted, rtol=1e-8, atol=0)
    torch.testing.assert_close(ref_error, wanted_ref, rtol=1e-8, atol=0)
    got, gradient = (torch.autograd.grad(e.sum(), given["model_pred"])[0] for e in (error, wanted))
    torch.testing.assert_close(got, gradient, rtol=1e-6, atol=1e-7 * float(gradient.abs().max()))
    torch.testing.assert_close({k: given[k] for k in before}, before, rtol=0, atol=0)


DATA = ("model_pred", "ref_pred", "target", "noisy_latents", "timesteps", "variance_noise")

SDXL = {
    "v": (sdxl, DDPMScheduler(prediction_type="v_prediction"), [1, 700], "down_blocks"),
    "v, zero terminal SNR": (sdxl, of_zero_snr(timestep_spacing="trailing"), [1, 999], "down_blocks"),
    "v, Euler's scheduler": (sdxl, EulerDiscreteScheduler(prediction_type="v_prediction"), [400, 998], "mid_block"),
    "flow": (sdxl, FlowMatchEulerDiscreteScheduler(), [20, 999], "down_blocks"),
    "flow, shifted": (sdxl, FlowMatchEulerDiscreteScheduler(shift=2.5), [137.5, 1000.0], "mid_block"),
    "refiner": (refiner, DDPMScheduler(), [1, 199], "down_blocks"),
    "refiner, flow": (refiner, FlowMatchEulerDiscreteScheduler(shift=3.0), [5.5, 400.25], "mid_block"),
}


@pytest.mark.parametrize(("make", "scheduler", "timesteps", "layer"), SDXL.values(), ids=SDXL)
def test_fine_tunes_of_sdxl_and_its_refiner(
    make: Callable[..., Any], scheduler: Any, timesteps: list[float], layer: str
) -> None:
    unet = make()
    given = batch(unet, timesteps=timesteps)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        given["timesteps"] = given["timesteps"].double()  # t' lies between the whole numbers
    if make is refiner:
        given["added_cond_kwargs"]["time_ids"] = given["added_cond_kwargs"]["time_ids"][:, 1:]
    assert_the_definition(add_lora(copy.deepcopy(unet)), unet, layer, given, scheduler)


def test_a_refiner_given_the_base_models_six_ids_is_told_the_widths() -> None:
    unet = refiner()
    with pytest.raises(ValueError, match=r"text_embeds'\] must be shaped \(B, 4\); it was shaped \(2, 8\)"):
        NCP(unet).errors(**batch(unet))


class Case(NamedTuple):
    unet: nn.Module
    kwargs: dict[str, Any]
    layers: tuple[str, ...] = ("down_blocks", "up_blocks.0")
    rows: int = ROWS


def controlled(make: Callable[..., Any], tuple_of: type = list) -> Case:
    """Residuals of a ControlNet, with gradients of its own, as where the ControlNet is what is trained."""
    unet = make()
    control = random(ControlNetModel.from_unet(unet, conditioning_channels=3)).requires_grad_(True)
    at = batch(unet, ROWS)
    added = {k: at[k] for k in ("added_cond_kwargs",) if k in at}
    image = normal(ROWS, 3, 128, 128)
    down, mid = control(*[at[name] for name in AT], controlnet_cond=image, return_dict=False, **added)
    residuals = {"down_block_additional_residuals": tuple_of(down), "mid_block_additional_residual": mid}
    return Case(unet, residuals, ("down_blocks", "mid_block", "up_blocks.0"))


def t2i(make: Callable[..., Any], **options: Any) -> Case:
    unet = make()
    adapter = random(T2IAdapter(num_res_blocks=1, **options))
    residuals = adapter(normal(ROWS, 3, 128, 128))
    return Case(unet, {"down_intrablock_additional_residuals": residuals}, ("down_blocks", "mid_block", "up_blocks.0"))


def both() -> Case:
    sketch, control = t2i(sd15, channels=[16, 16, 32, 32]), controlled(sd15, tuple)
    return Case(sketch.unet, sketch.kwargs | control.kwargs, control.layers)


IMAGE = 6  # the width of an image encoder's embedding


def ip_weights(unet: nn.Module, seed: int) -> dict[str, dict[str, Tensor]]:
    """An IP-Adapter's file: the projection of the image, and keys and values for every cross-attention."""
    width = unet.config.cross_attention_dim
    crossings = [p.to_q.out_features for n, p in unet.named_modules() if n.endswith("attn2")]
    order = [n for n in unet.attn_processors if n.endswith("attn2.processor")]
    sizes = [unet.get_submodule(n.removesuffix(".processor")).to_q.out_features for n in order]
    assert sorted(sizes) == sorted(crossings)
    adapter = {
        f"{2 * i + 1}.to_{k}_ip.weight": normal(size, width, seed=seed + i)
        for i, size in enumerate(sizes)
        for k in "kv"
    }
    norm = {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    project = {"proj.weight": normal(4 * width, IMAGE, seed=seed), "proj.bias": normal(4 * width, seed=seed), **norm}
    return {"image_proj": project, "ip_adapter": adapter}


def load_ip_adapters(unet: nn.Module, count: int = 1) -> nn.Module:
    unet._load_ip_adapter_weights([ip_weights(unet, seed) for seed in range(count)], low_cpu_mem_usage=False)
    return unet.double().requires_grad_(False)


def ip_adapted(make: Callable[..., Any], count: int = 1, masks: bool = False, rows: int = ROWS) -> Case:
    unet = load_ip_adapters(make(), count)
    images = [normal(rows, 2, IMAGE, seed=i) for i in range(count)]  # two images each
    added = batch(unet, rows).get("added_cond_kwargs", {})
    kwargs: dict[str, Any] = {"added_cond_kwargs": added | {"image_embeds": images}}
    if masks:  # where on the picture an image has its say: one row, whatever the batch
        halves = torch.zeros(1, 2, 16, 16, dtype=torch.float64)
        halves[:, 0, :, :8] = halves[:, 1, :, 8:] = 1
        kwargs["cross_attention_kwargs"] = {"ip_adapter_masks": [halves] * count}
    return Case(unet, kwargs, rows=rows)


class Sharpened:
    """A processor of someone's own, with what it needs on the instance."""

    def __init__(self, power: float) -> None:
        self.power = power

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (attn.head_to_batch_dim(x) for x in (attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)))
        weights = (self.power * q @ k.mT * attn.scale).softmax(-1)
        return attn.to_out[0](attn.batch_to_head_dim(weights @ v))


def processed(make: Callable[..., Any], processor: Callable[[nn.Module], Any]) -> Case:
    unet = make()
    unet.set_attn_processor(processor(unet))
    return Case(unet.double().requires_grad_(False), {})


def custom_diffusion(unet: nn.Module) -> dict[str, Any]:
    """Its own keys and values in every cross-attention: processors that are modules."""
    made = {}
    for name in unet.attn_processors:
        attention = unet.get_submodule(name.removesuffix(".processor"))
        cross = "attn2" in name
        width = {"hidden_size": attention.to_q.in_features, "cross_attention_dim": attention.to_k.in_features}
        made[name] = random(CustomDiffusionAttnProcessor(cross, False, **width)) if cross else AttnProcessor()
    return made


def fused(unet: nn.Module) -> nn.Module:
    unet.fuse_qkv_projections()
    return unet


def free(unet: nn.Module) -> nn.Module:
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    return unet


def guided(**conditioning: Any) -> Case:
    """Embeddings that U-Nets of Stable Diffusion's layout can have besides: LCM's guidance, classes, masks."""
    unet = sd15(time_cond_proj_dim=6, num_class_embeds=5)
    return Case(unet, {"timestep_cond": normal(ROWS, 6), "class_labels": torch.tensor([0, 3]), **conditioning})


CASES: dict[str, Callable[[], Case]] = {
    "ControlNet, SD 1.5": lambda: controlled(sd15),
    "ControlNet, SDXL": lambda: controlled(sdxl, tuple),
    "T2I-Adapter, SD 1.5": lambda: t2i(sd15, channels=[16, 16, 32, 32]),
    "T2I-Adapter, SDXL": lambda: t2i(
        sdxl, channels=[16, 16, 32, 32], adapter_type="full_adapter_xl", downscale_factor=16
    ),
    "ControlNet and T2I-Adapter": both,
    "IP-Adapter, SD 1.5": lambda: ip_adapted(sd15),
    "IP-Adapter, SDXL": lambda: ip_adapted(sdxl),
    "two IP-Adapters": lambda: ip_adapted(sd15, 2),
    "IP-Adapter with masks": lambda: ip_adapted(sdxl, masks=True),
    "two IP-Adapters with masks, one sample": lambda: ip_adapted(sd15, 2, masks=True, rows=1),
    "processor of one's own": lambda: processed(sdxl, lambda unet: Sharpened(2.0)),
    "sliced attention": lambda: processed(sd15, lambda unet: SlicedAttnProcessor(1)),
    "Custom Diffusion": lambda: processed(sd15, custom_diffusion),
    "fused projections": lambda: Case(fused(sdxl()), {}),
    "FreeU": lambda: Case(free(sd15()), {}, ("up_blocks.0", "up_blocks.1")),
    "guidance and classes": guided,
    "masks of text and of attention": lambda: guided(
        encoder_attention_mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]), cross_attention_kwargs={"scale": 0.5}
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_conditioning_reaches_the_encoder_as_it_reaches_the_model(case: Callable[[], Case]) -> None:
    unet, kwargs, layers, rows = case()
    given = batch(unet, rows) | kwargs
    pristine = copy.deepcopy(unet)
    for layer in layers:
        assert_the_definition(unet, pristine, layer, given, DDPMScheduler(beta_schedule="scaled_linear"))


@pytest.mark.parametrize("case", ["ControlNet and T2I-Adapter", "IP-Adapter, SDXL"])
@pytest.mark.parametrize("difference", ["scaled", "central"])
def test_every_estimator_agrees_under_conditioning(case: str, difference: str) -> None:
    unet, kwargs, layers, rows = CASES[case]()
    given = batch(unet, rows, error=0.01) | kwargs
    literal, estimate = (NCP(unet, layers[-1], difference=d).errors(**given)[0] for d in ("literal", difference))
    torch.testing.assert_close(estimate, literal, rtol=0.05, atol=0)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_reference_under_lora_is_the_base_model_with_the_same_conditioning(case: Callable[[], Case]) -> None:
    unet, kwargs, _, rows = case()
    given = batch(unet, rows) | kwargs
    pristine, at = copy.deepcopy(unet), [given[name] for name in AT]
    extra = {k: v for k, v in given.items() if k not in (*DATA, "encoder_hidden_states")}
    view = frozen_view(add_lora(unet))
    got, wanted, trained = (model(*at, **constants(extra)).sample for model in (view, pristine, unet))
    assert torch.equal(got, wanted)
    assert not torch.allclose(trained, wanted)


def test_an_ip_adapter_in_training_is_kept_as_it_was() -> None:
    unet = load_ip_adapters(sd15())
    given = batch(unet) | {"added_cond_kwargs": {"image_embeds": [normal(ROWS, 1, IMAGE)]}}
    expected = block_output(unet, "down_blocks.3", given, added_cond_kwargs=given["added_cond_kwargs"])
    trained = [p for n, p in unet.named_parameters() if "_ip." in n or n.startswith("encoder_hid_proj")]
    for parameter in trained:
        parameter.requires_grad_(True)
    ncp = NCP(unet)
    with torch.no_grad():
        for parameter in trained:
            parameter.mul_(2)
    args = [given[name] for name in AT]
    got = ncp.features(*args, added_cond_kwargs=given["added_cond_kwargs"])["down_blocks"]
    assert torch.equal(got, expected)
    users = {p.data_ptr() for p in unet.parameters()}
    own = [n for n, p in encoder_of(ncp).view.named_parameters() if p.data_ptr() not in users]
    assert own
    assert all("_ip." in name or "encoder_hid_proj" in name for name in own)


def test_a_processor_that_pairs_the_rows_of_a_batch_is_left_in_place() -> None:
    """Perturbed-attention guidance: half of the rows are perturbed, so the two halves are one sample."""
    unet = sdxl()
    processors = {
        n: PAGIdentitySelfAttnProcessor2_0() if "attn1" in n else AttnProcessor() for n in unet.attn_processors
    }
    unet.set_attn_processor(processors)
    given = batch(unet, ROWS)
    args, added = [given[name] for name in AT], {"added_cond_kwargs": given["added_cond_kwargs"]}
    expected = block_output(unet, "down_blocks.2", given, **added)
    adapted = add_lora(unet)
    assert torch.equal(NCP(adapted).features(*args, **added)["down_blocks"], expected)
    assert {type(p) for p in frozen_view(adapted).attn_processors.values()} == {
        PAGIdentitySelfAttnProcessor2_0,
        AttnProcessor,
    }


def test_residuals_carry_no_gradient_out_of_the_encoder() -> None:
    case = controlled(sd15)
    residual = case.kwargs["mid_block_additional_residual"]
    error, _ = NCP(case.unet, "up_blocks.0").errors(**batch(case.unet), **case.kwargs)
    assert residual.requires_grad
    assert torch.autograd.grad(error.sum(), residual, allow_unused=True) == (None,)


def test_what_the_trainer_gives_in_float32_reaches_a_model_in_bfloat16_in_float32() -> None:
    """A class label of 251.0 would be another class in bfloat16's eight bits, and rotary tables other positions."""
    unet = sd15(class_embed_type="timestep", dtype=torch.float32).to(torch.bfloat16)
    given = batch(unet)
    x, t, text = (given[name] for name in AT)
    labels, kept = torch.tensor([251.0, 333.0]), list[Tensor]()
    handle = unet.down_blocks[-1].register_forward_hook(lambda _, args, out: kept.append(hidden(out)))
    unet(x, t, text, class_labels=labels)
    handle.remove()
    assert torch.equal(NCP(unet).features(x, t, text, class_labels=labels)["down_blocks"], kept[0])


def test_copies_in_another_dtype_take_conditioning_in_theirs() -> None:
    unet = sd15(class_embed_type="projection", projection_class_embeddings_input_dim=6, dtype=torch.float32)
    given = batch(unet.requires_grad_(True)) | {"class_labels": normal(ROWS, 6).float()}
    error, _ = NCP(unet).to(torch.bfloat16).errors(**given)
    torch.testing.assert_close(error, NCP(unet).errors(**given)[0], rtol=0.1, atol=0)


def test_a_call_of_ones_own_may_take_what_the_models_forward_does_not() -> None:
    """An inpainting model is given the mask and the picture beside the latents, and the text under any name."""
    unet = sd15(in_channels=9)
    beside, text, latents = normal(ROWS, 5, 16, 16), normal(ROWS, 3, 12), batch(sd15())
    del latents["encoder_hidden_states"]

    def call(model: nn.Module, x: Tensor, t: Tensor, beside: Tensor, words: Tensor) -> Any:
        return model(torch.cat([x, beside], 1), t, words)

    error, _ = NCP(unet, call=call).errors(**latents, beside=beside, words=text)
    ncp = NCP(unet)
    back = ncp.schedule.reverse_step(latents["timesteps"], dtype=torch.float64)
    ends = [
        ncp.features(
            torch.cat([back.latents(latents["noisy_latents"], latents[o], latents["variance_noise"]), beside], 1),
            back.timesteps,
            text,
        )["down_blocks"]
        for o in ("model_pred", "target")
    ]
    torch.testing.assert_close(error, (ends[0] - ends[1]).square().flatten(1).mean(1), rtol=1e-9, atol=0)
