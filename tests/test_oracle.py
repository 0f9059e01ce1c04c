"""Errors, losses and gradients equal a float64 oracle written from the paper's equations, one sample at a time."""

from __future__ import annotations

import oracle
import pytest
import torch
from models import LAYOUTS, batch
from torch import Tensor

from ncp_loss import (
    NoiseConditionedPerceptualLoss,
    NoiseSchedule,
    ncp_cpo_loss,
    ncp_dpo_loss,
    ncp_sft_loss,
)

BETAS = oracle.scaled_linear_betas()
ABAR = oracle.cumulative_alphas(BETAS)
UNETS = {name: make() for name, make in LAYOUTS.items()}
TIMESTEPS = [0, 1, 500, 999]


def oracle_path(unet, layer: str) -> str:
    return f"down_blocks.{len(unet.down_blocks) - 1}" if layer == "down_blocks" else layer


def oracle_errors(
    unet, layer: str, prediction_type: str, arguments: dict, prediction: str = "model_pred", **options
) -> Tensor:
    extra = {"added_cond_kwargs": arguments["added_cond_kwargs"]} if "added_cond_kwargs" in arguments else {}
    return oracle.batch_errors(
        unet,
        oracle_path(unet, layer),
        arguments[prediction],
        arguments["target"],
        arguments["noisy_latents"],
        arguments["timesteps"],
        arguments["variance_noise"],
        ABAR,
        prediction_type,
        arguments["encoder_hidden_states"],
        **options,
        **extra,
    )


def relative(actual: Tensor, truth: Tensor) -> float:
    """The worst sample's relative error."""
    flat = (actual - truth).reshape(len(truth), -1).norm(dim=1) / truth.reshape(len(truth), -1).norm(dim=1)
    return flat.max().item()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("layer", ["down_blocks", "mid_block"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_errors_and_gradients_equal_the_published_definition(layout, layer, prediction_type):
    unet = UNETS[layout]
    arguments = batch(unet, 4, timesteps=TIMESTEPS, seed=1)
    ncp = NoiseConditionedPerceptualLoss(unet, layer, schedule=NoiseSchedule(BETAS, prediction_type))
    error, ref_error = ncp.errors(**arguments)
    truth = oracle_errors(unet, layer, prediction_type, arguments)
    assert relative(error, truth) < 1e-9
    assert relative(ref_error, oracle_errors(unet, layer, prediction_type, arguments, "ref_pred")) < 1e-9

    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    gradient, true_gradient = (
        torch.autograd.grad((e * weights).sum(), arguments["model_pred"])[0] for e in (error, truth)
    )
    assert relative(gradient, true_gradient) < 1e-7


@pytest.mark.parametrize("step", [1, 7, 300])
def test_longer_steps_use_the_posterior_further_back(step):
    unet = UNETS["sd15"]
    arguments = batch(unet, 4, timesteps=TIMESTEPS)
    ncp = NoiseConditionedPerceptualLoss(unet, step=step)
    assert (
        relative(ncp.errors(**arguments)[0], oracle_errors(unet, "down_blocks", "epsilon", arguments, step=step)) < 1e-9
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_clean_step_compares_estimates_of_x0_at_timestep_zero(prediction_type):
    unet = UNETS["sd15"]
    arguments = batch(unet, 3, timesteps=[0, 400, 999])
    ncp = NoiseConditionedPerceptualLoss(unet, step="clean", schedule=NoiseSchedule(BETAS, prediction_type))
    error, _ = ncp.errors(**arguments)
    for i, t in enumerate([0, 400, 999]):
        ends = [
            oracle.features(
                unet,
                "down_blocks.3",
                oracle.clean(
                    prediction_type, arguments[name][i : i + 1], arguments["noisy_latents"][i : i + 1], t, ABAR
                ),
                0,
                arguments["encoder_hidden_states"][i : i + 1],
            )
            for name in ("model_pred", "target")
        ]
        torch.testing.assert_close(error[i], (ends[0] - ends[1]).square().mean(), rtol=1e-9, atol=0)


def test_the_uniform_step_renoises_at_a_timestep_drawn_from_the_generator():
    unet = UNETS["sd15"]
    arguments = batch(unet, 3, timesteps=[10, 400, 999])
    ncp = NoiseConditionedPerceptualLoss(unet, step="uniform")
    error, _ = ncp.errors(**arguments, generator=torch.Generator().manual_seed(5))
    drawn = torch.randint(1000, (3,), generator=torch.Generator().manual_seed(5)).tolist()
    for i, (t, after) in enumerate(zip([10, 400, 999], drawn, strict=True)):
        ends = [
            oracle.features(
                unet,
                "down_blocks.3",
                oracle.renoise(
                    "epsilon", arguments[name][i : i + 1], arguments["noisy_latents"][i : i + 1], t, after, ABAR
                ),
                after,
                arguments["encoder_hidden_states"][i : i + 1],
            )
            for name in ("model_pred", "target")
        ]
        torch.testing.assert_close(error[i], (ends[0] - ends[1]).square().mean(), rtol=1e-9, atol=0)


def test_layers_add_up_by_weight_and_normalize_divides_by_the_targets_energy():
    unet = UNETS["sdxl"]
    arguments = batch(unet, 2, timesteps=[3, 800])
    layers = {"down_blocks.1": 0.5, "mid_block": 2.0}
    ncp = NoiseConditionedPerceptualLoss(unet, layers, normalize=True)
    truth = sum(w * oracle_errors(unet, layer, "epsilon", arguments, normalize=True) for layer, w in layers.items())
    assert relative(ncp.errors(**arguments)[0], truth) < 1e-9


def test_noise_weighting_divides_the_error_by_the_square_of_B():
    unet = UNETS["sd15"]
    arguments = batch(unet, 4, timesteps=TIMESTEPS)
    ncp = NoiseConditionedPerceptualLoss(unet, weighting="noise")
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    B = torch.stack([oracle.reverse_step("epsilon", one, zero, t, zero, ABAR) for t in TIMESTEPS])
    truth = oracle_errors(unet, "down_blocks", "epsilon", arguments) / B.square()
    assert relative(ncp.errors(**arguments)[0], truth) < 1e-9


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_dpo_loss_and_gradient_on_pairs_equal_equation_18(loss_type):
    unet, beta = UNETS["sd15"], 4e4
    arguments = batch(unet, 2, pairs=True, timesteps=[1, 600])
    smoothing = 0.1 if loss_type == "sigmoid" else 0.0
    ncp = NoiseConditionedPerceptualLoss(unet)
    out = ncp_dpo_loss(ncp, **arguments, beta=beta, loss_type=loss_type, label_smoothing=smoothing, reduction="none")
    error = oracle_errors(unet, "down_blocks", "epsilon", arguments)
    ref = oracle_errors(unet, "down_blocks", "epsilon", arguments, "ref_pred").detach()
    truth = oracle.dpo(*error.detach().chunk(2), *ref.chunk(2), beta, loss_type, smoothing)
    torch.testing.assert_close(out.loss, torch.tensor(truth, dtype=torch.float64), rtol=1e-9, atol=1e-15)

    # The chain rule by hand: dL/d error from difference quotients of the oracle, d error/d pred from its graph.
    (gradient,) = torch.autograd.grad(out.loss.sum(), arguments["model_pred"])
    slopes = []
    for i in range(4):
        h = 1e-5 * error[i].item()
        moved = [
            error.detach().index_add(0, torch.tensor([i]), torch.tensor([s * h], dtype=torch.float64)) for s in (1, -1)
        ]
        up, down = (sum(oracle.dpo(*m.chunk(2), *ref.chunk(2), beta, loss_type, smoothing)) for m in moved)
        slopes.append((up - down) / (2 * h))
    (true_gradient,) = torch.autograd.grad(
        (error * torch.tensor(slopes, dtype=torch.float64)).sum(), arguments["model_pred"]
    )
    assert relative(gradient, true_gradient) < 1e-5
    expected = {
        "raw_model_loss": error.mean(),
        "ref_loss": ref.mean(),
        "rewards/chosen": beta * (ref - error)[:2].mean(),
        "rewards/rejected": beta * (ref - error)[2:].mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(out.metrics[name], value.detach(), rtol=1e-8, atol=0)


def test_an_anchor_and_a_beta_for_each_pair_reach_the_objective():
    unet = UNETS["sd15"]
    arguments = batch(unet, 2, pairs=True)
    ncp, beta = NoiseConditionedPerceptualLoss(unet), torch.tensor([1e4, 3e5], dtype=torch.float64)
    out = ncp_dpo_loss(ncp, **arguments, beta=beta, sft_weight=0.7, reduction="none")
    error, ref_error = (e.detach().chunk(2) for e in ncp.errors(**arguments, pairs=True))
    margin = (error[1] - ref_error[1]) - (error[0] - ref_error[0])
    truth = (1 + (-beta * margin).exp()).log() + 0.7 * error[0]
    torch.testing.assert_close(out.loss.detach(), truth, rtol=1e-9, atol=0)
    torch.testing.assert_close(out.metrics["rewards/margins"], (beta * margin).mean(), rtol=1e-9, atol=0)


def test_a_reference_error_computed_earlier_gives_the_same_loss_and_gradient():
    unet = UNETS["sd15"]
    arguments = batch(unet, 2, pairs=True)
    ncp = NoiseConditionedPerceptualLoss(unet)
    with_pred = ncp_dpo_loss(ncp, **arguments)
    ref_pred = arguments.pop("ref_pred")
    kept, _ = ncp.errors(**(arguments | {"model_pred": ref_pred}))
    with_error = ncp_dpo_loss(ncp, **arguments, ref_error=kept)
    torch.testing.assert_close(with_pred.loss, with_error.loss, rtol=1e-10, atol=0)
    a, b = (torch.autograd.grad(out.loss, arguments["model_pred"])[0] for out in (with_pred, with_error))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10 * float(b.abs().max()))


def test_cpo_and_sft_losses_equal_equation_19_and_the_winners_error():
    unet = UNETS["sd15"]
    arguments = batch(unet, 2, pairs=True)
    del arguments["ref_pred"]
    ncp = NoiseConditionedPerceptualLoss(unet)
    error = oracle_errors(unet, "down_blocks", "epsilon", arguments).detach()
    out = ncp_cpo_loss(ncp, **arguments, beta=3e4, sft_weight=0.7, reduction="none")
    truth = torch.tensor(oracle.cpo(*error.chunk(2), 3e4, 0.7), dtype=torch.float64)
    torch.testing.assert_close(out.loss, truth, rtol=1e-9, atol=0)
    torch.testing.assert_close(out.metrics["rewards/margins"], 3e4 * (error[2:] - error[:2]).mean(), rtol=1e-8, atol=0)
    winners = {name: value[:2] for name, value in arguments.items()}
    out = ncp_sft_loss(ncp, **winners, reduction="none")
    torch.testing.assert_close(out.loss, torch.tensor(oracle.sft(error[:2]), dtype=torch.float64), rtol=1e-9, atol=0)
    torch.testing.assert_close(out.metrics["raw_model_loss"], error[:2].mean(), rtol=1e-9, atol=0)


def test_random_draws_are_shared_by_the_members_of_a_pair():
    unet = UNETS["sd15"]
    arguments = batch(unet, 2, pairs=True)
    for name in ("variance_noise", "encoder_hidden_states", "noisy_latents", "model_pred", "ref_pred"):
        if arguments[name].shape[0] == 4:  # a pair of twins: everything equal but what is drawn
            arguments[name] = arguments[name].detach()[:2].repeat(2, *[1] * (arguments[name].ndim - 1))
    del arguments["variance_noise"]
    for step in (1, "uniform"):
        ncp = NoiseConditionedPerceptualLoss(unet, step=step)
        out = ncp_dpo_loss(ncp, **arguments, reduction="none", generator=torch.Generator().manual_seed(0))
        assert out.metrics["rewards/margins"].abs() < 1e-12
        drawn, _ = ncp.errors(**arguments, generator=torch.Generator().manual_seed(0))
        assert not torch.allclose(drawn[:2], drawn[2:], rtol=1e-6)  # without pairs, each row draws its own


@pytest.mark.slow
def test_the_whole_loss_passes_gradcheck():
    unet = LAYOUTS["sd15"](block_out_channels=(8, 8), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                           up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=4)  # fmt: skip
    arguments = batch(unet, 1, pairs=True, height=4, width=4, timesteps=[300])
    ncp = NoiseConditionedPerceptualLoss(unet, ["down_blocks", "mid_block"])
    prediction = arguments.pop("model_pred")
    assert torch.autograd.gradcheck(
        lambda p: 1e3 * ncp_dpo_loss(ncp, p, beta=1e4, **arguments).loss, prediction, eps=1e-5, atol=1e-6, rtol=1e-5
    )
