"""Models outside diffusers: the snippets of their page give the definition, by a plain hook on the model itself."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn

import ncp_loss

PAGE = (Path(__file__).parents[1] / "docs" / "recipes" / "own-models.md").read_text()
BLOCKS = dict(re.findall(r'^```python(?: title="([^\n]+)")?\n(.*?)^```$', PAGE, re.M | re.S))
TIMESTEPS = [0, 1, 400, 999]
Predict = Callable[[Tensor, Tensor], Tensor]


def run(title: str, **scope: Any) -> dict[str, Any]:
    """What a block of the page leaves behind; a fragment finds the package's names there."""
    scope = {name: getattr(ncp_loss, name) for name in ncp_loss.__all__} | scope
    exec(compile(BLOCKS[title], f"own-models.md, {title or 'whole program'}", "exec"), scope)
    return scope


def seeded(model: nn.Module) -> nn.Module:
    """Random weights in all of it: some models begin with layers of zeros."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / (math.sqrt(p[0].numel()) if p.ndim > 1 else 4))
    return model.double().requires_grad_(False).eval()


def inputs(channels: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prediction, target, noisy latents and timesteps."""
    draw = torch.randn(3, len(TIMESTEPS), channels, size, size, generator=torch.Generator().manual_seed(1)).double()
    return (draw[0].requires_grad_(), draw[1], draw[2], torch.tensor(TIMESTEPS))


def assert_is_the_definition(
    ncp: nn.Module, layer: nn.Module, predict: Predict, kind: str, betas: Any, given: Any, **conditioning: Any
) -> None:
    """Error and gradient are those of eq. 13; ``predict`` calls the model as its own project does."""
    model_pred, target, noisy, timesteps = given
    error = ncp.errors(*given, **conditioning).error
    (gradient,) = torch.autograd.grad(error.sum(), model_pred)
    abar = oracle.cumulative_alphas([float(beta) for beta in betas])

    def features(output: Tensor) -> Tensor:
        steps = zip(output, noisy, timesteps.tolist(), strict=True)
        latents = [oracle.reverse_step(kind, o, x, t, torch.zeros_like(x), abar) for o, x, t in steps]
        kept: list[Tensor] = []
        handle = layer.register_forward_hook(lambda _module, _args, out: kept.append(out))
        predict(torch.stack(latents), (timesteps - 1).clamp(min=0))
        handle.remove()
        return kept[0]

    wanted = (features(model_pred) - features(target)).square().flatten(1).mean(1)
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), model_pred)
    torch.testing.assert_close(error, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-6, atol=1e-6 * float(wanted_gradient.abs().max()))


@pytest.fixture
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_a_u_net_of_ones_own_gives_the_definition_and_log_2_at_the_first_step(in_float64):
    torch.manual_seed(0)
    page = run("")
    unet, out, cond = page["unet"], page["out"], torch.randn(4, 6)
    assert out.loss.item() == pytest.approx(math.log(2), abs=1e-12)
    assert out.metrics["rewards/margins"].item() == 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in unet.parameters())
    given = inputs(4, 8)
    assert_is_the_definition(
        page["ncp"], unet.down[-1], lambda x, t: unet(x, t / 1000, cond), "epsilon", page["betas"], given, cond=cond
    )


def test_betas_from_alphas_cumprod_are_the_betas():
    (expression,) = re.findall(r"`NoiseSchedule\((1 - abar .+)\)`", PAGE)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    found = eval(expression, {"torch": torch, "abar": (1 - betas).cumprod(0)})
    torch.testing.assert_close(found, betas, rtol=1e-10, atol=0)


def test_a_flow_in_the_other_direction_is_one_with_everything_negated():
    """x_t = (1 - s) noise + s x_0 and a target of x_0 - noise, as some projects have it."""
    (call,) = re.findall(r"`(ncp\(-model_pred, .+?)`", PAGE)
    unet = seeded(nn.Sequential(nn.Conv2d(2, 3, 3), nn.SiLU(), nn.Conv2d(3, 4, 3)))
    options: dict[str, Any] = {"schedule": ncp_loss.FlowSchedule(), "call": lambda model, x, t: model(x)}
    ncp = ncp_loss.NoiseConditionedPerceptualLoss(unet, "2", reduction="none", **options)
    model_pred, target, x_t, _ = inputs(2, 8)
    s = torch.tensor([0.1, 0.5, 0.9, 0.998], dtype=torch.float64)
    error = eval(call, {"ncp": ncp, "model_pred": model_pred, "target": target, "x_t": x_t, "s": s})
    step = 1e-3  # towards the image, which is where s = 1
    wanted = (unet(x_t + step * model_pred) - unet(x_t + step * target)).square().flatten(1).mean(1)
    torch.testing.assert_close(error, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("objective", "kind"), [("pred_noise", "epsilon"), ("pred_v", "v_prediction"), ("pred_x0", "sample")]
)
@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.filterwarnings("ignore:.*one sample there owns its batch")
def test_denoising_diffusion_pytorch(objective, kind, self_condition, in_float64):
    package = pytest.importorskip("denoising_diffusion_pytorch")
    unet = package.Unet(8, dim_mults=(1, 2), attn_dim_head=4, attn_heads=2, self_condition=self_condition)
    diffusion = package.GaussianDiffusion(unet, image_size=8, objective=objective, beta_schedule="linear")
    unet, diffusion = seeded(unet), diffusion.double()
    betas = diffusion.betas.double()
    page = run("Fragment: a loop with denoising-diffusion-pytorch", unet=unet, diffusion=diffusion)
    given = inputs(3, 8)
    more = {"x_self_cond": torch.randn_like(given[1])} if self_condition else {}
    predict = lambda x, t: unet(x, t, **more)  # noqa: E731
    assert_is_the_definition(page["ncp"], unet.downs[1][3], predict, kind, betas, given, **more)

    images, noise = given[1].clamp(-1, 1), given[2]
    scope = {"ncp": page["ncp"], "unet": unet, "diffusion": diffusion, "images": images, "noise": noise}
    page = run("Fragment: its step, with denoising-diffusion-pytorch", timesteps=given[3], **scope)
    mse = (page["model_pred"] - page["target"]).square().flatten(1).mean(1)
    weighted = mse * diffusion.loss_weight[given[3]]
    if not self_condition:  # its own loss draws whether to condition, and is of the same prediction and target
        torch.testing.assert_close(weighted.mean(), diffusion.p_losses(images, given[3], noise))
    assert page["loss"] > 0


@pytest.mark.parametrize("respacing", ["", "ddim250"])
@pytest.mark.parametrize("options", [{}, {"class_cond": True, "learn_sigma": True, "use_checkpoint": True}])
def test_guided_diffusion(options, respacing, monkeypatch):
    unets = pytest.importorskip("guided_diffusion.unet")
    scripts = pytest.importorskip("guided_diffusion.script_util")
    monkeypatch.setattr(unets, "checkpoint", unets.checkpoint)  # put back afterwards
    # Two parts compute in float32, whatever the weights are.
    table = unets.timestep_embedding
    monkeypatch.setattr(unets, "timestep_embedding", lambda *args: table(*args).double())
    monkeypatch.setattr(importlib.import_module("guided_diffusion.nn").GroupNorm32, "forward", nn.GroupNorm.forward)
    settings = scripts.model_and_diffusion_defaults() | options | {"timestep_respacing": respacing}
    small = {"image_size": 64, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "num_heads": 2}
    settings |= small | {"attention_resolutions": "32", "rescale_timesteps": bool(respacing)}
    unet, diffusion = scripts.create_model_and_diffusion(**settings)
    unet.dtype, unet = torch.float64, seeded(unet)
    given = inputs(3, 8)
    given = *given[:3], given[3].clamp(max=diffusion.num_timesteps - 1)
    more = {"y": torch.arange(4)} if options else {}

    page = run("Fragment: a loop with guided-diffusion", unet=unet, diffusion=diffusion)
    with pytest.raises(RuntimeError, match="does not require grad"):
        page["ncp"].errors(*given, **more)
    run("Fragment: a loop with guided-diffusion, imports")
    predict = lambda x, t: diffusion._wrap_model(unet)(x, t, **more)  # noqa: E731
    assert_is_the_definition(page["ncp"], unet.input_blocks[-1], predict, "epsilon", diffusion.betas, given, **more)

    scope = {"ncp": page["ncp"], "unet": unet, "diffusion": diffusion, "y": None} | more
    noise, images, timesteps = given[1], given[2], given[3]
    page = run("Fragment: its step, with guided-diffusion", images=images, noise=noise, timesteps=timesteps, **scope)
    mse = (page["model_pred"] - noise).square().flatten(1).mean(1)
    own = diffusion.training_losses(unet, images, timesteps, more, noise)
    torch.testing.assert_close(mse, own["mse"])
    assert page["loss"] > 0


def test_kohyas_sd_u_net(monkeypatch):
    unets = pytest.importorskip("library.original_unet")
    for name, value in {
        "BLOCK_OUT_CHANNELS": (32, 32, 64, 64),
        "TIMESTEP_INPUT_DIM": 32,
        "TIME_EMBED_DIM": 128,
    }.items():
        monkeypatch.setattr(unets, name, value)
    unet = seeded(unets.UNet2DConditionModel(sample_size=8, cross_attention_dim=16))
    betas, given, text = oracle.scaled_linear_betas(), inputs(4, 8), torch.randn(4, 5, 16).double()
    ncp = run("Fragment: a loop with kohya's SD U-Net", unet=unet, betas=betas)["ncp"]
    layer = unet.down_blocks[-1].resnets[-1]  # the block itself returns a tuple, which begins with this
    predict = lambda x, t: unet(x, t, text).sample  # noqa: E731
    assert_is_the_definition(ncp, layer, predict, "epsilon", betas, given, encoder_hidden_states=text)


def test_kohyas_sdxl_u_net(monkeypatch):
    unets = pytest.importorskip("library.sdxl_original_unet")
    for name, value in {"MODEL_CHANNELS": 32, "TIME_EMBED_DIM": 128}.items():
        monkeypatch.setattr(unets, name, value)
    unet = seeded(unets.SdxlUNet2DConditionModel())
    betas, given = oracle.scaled_linear_betas(), inputs(4, 8)
    text, vector = torch.randn(4, 5, 2048).double(), torch.randn(4, 2816).double()
    ncp = run("Fragment: a loop with kohya's SDXL U-Net", unet=unet, betas=betas)["ncp"]
    predict = lambda x, t: unet(x, t, text, vector)  # noqa: E731
    layer = unet.input_blocks[-1][-1]
    assert_is_the_definition(ncp, layer, predict, "epsilon", betas, given, encoder_hidden_states=text, y=vector)
