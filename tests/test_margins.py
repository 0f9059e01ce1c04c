"""Margins: the difference between the model's and the reference's error keeps its digits, however alike the two are.

Truth is the literal definition in float64, on the same network and the same predictions.
"""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batch, sd15, sdxl
from test_precision import in_float64, rounded
from torch import Tensor, nn

from ncp_loss import NoiseConditionedPerceptualLoss, ncp_dpo_loss

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DIFFERENCES = ["literal", "scaled", "central", "auto"]
TIMESTEPS = [1, 5, 20, 100, 500, 900, 999]


def moved(unet: nn.Module, fraction: float, seed: int, timesteps: list[int] = TIMESTEPS, error: float = 0.1) -> dict:
    """A batch whose prediction is the reference's, moved by a fraction of its error's size, in any direction."""
    arguments = batch(unet, len(timesteps), timesteps=timesteps, error=error, seed=seed, dtype=torch.float32)
    move = fraction * error * torch.randn(arguments["target"].shape, generator=torch.Generator().manual_seed(seed))
    arguments["model_pred"] = (arguments["ref_pred"] + move).requires_grad_()
    return arguments


def margins(unet: nn.Module, arguments: dict[str, Any], difference: str = "auto", layer: str = "down_blocks") -> Tensor:
    error, ref_error = NoiseConditionedPerceptualLoss(unet, layer, difference=difference).errors(**arguments)
    return (error - ref_error).detach().double()


@settings(max_examples=8)
@given(
    make=st.sampled_from([sd15, sdxl]),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from(DTYPES),
    fraction=st.sampled_from([0.1, 0.01, 0.001]),
)
def test_margins_are_signal_in_every_precision(make, seed, dtype, fraction):
    """A median over the timesteps; benchmarks/precision.py has the narrow bounds."""
    half, exact = rounded(make(seed), dtype)
    arguments = moved(half, fraction, seed)
    truth = margins(exact, in_float64(arguments), "literal")
    errors = ((margins(half, arguments) - truth).abs() / truth.abs()).tolist()
    assert statistics.median(errors) <= {torch.float32: 0.01, torch.float16: 0.16, torch.bfloat16: 0.4}[dtype]


@pytest.mark.parametrize("ref_size", [-0.3, 0.02, 0.28, 0.5])
@pytest.mark.parametrize("step", [100, "clean"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_of_long_steps_error_margin_and_gradient_are_the_definitions_however_good_the_reference_is(
    dtype, step, ref_size
):
    """There the encoder's response is curved between model, reference and target: each is looked at where it is."""
    half, exact = rounded(sd15(), dtype)
    arguments = batch(half, 4, timesteps=[300, 500, 700, 900], error=0.3, dtype=torch.float32)
    noise = torch.randn(arguments["target"].shape, generator=torch.Generator().manual_seed(1))
    if ref_size < 0:  # on the other side of the target
        noise = (arguments["model_pred"] - arguments["target"]).detach() / 0.3
    arguments["ref_pred"] = arguments["target"] + ref_size * noise

    def found(unet: nn.Module, difference: str, arguments: dict) -> tuple[Tensor, Tensor, Tensor]:
        errors = NoiseConditionedPerceptualLoss(unet, step=step, difference=difference).errors(**arguments)
        (gradient,) = torch.autograd.grad(errors.error.sum(), arguments["model_pred"])
        return errors.error.detach().double(), errors.ref_error.double(), gradient.double().flatten(1)

    error, ref_error, gradient = found(half, "auto", arguments)
    true_error, true_ref_error, true_gradient = found(exact, "literal", in_float64(arguments))
    rtol = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(error, true_error, rtol=rtol, atol=0)
    margin, true_margin = ref_error - error, true_ref_error - true_error
    torch.testing.assert_close(margin, true_margin, rtol=rtol, atol=rtol * true_error.max().item())
    assert torch.cosine_similarity(gradient, true_gradient).min() > 1 - rtol


def test_the_definitions_own_margin_is_rounding_in_bf16():
    """What all this is for: without it the test before this one would measure nothing."""
    half, exact = rounded(sd15(), torch.bfloat16)
    arguments = moved(half, 0.01, 0)
    truth = margins(exact, in_float64(arguments), "literal")
    assert ((margins(half, arguments, "literal") - truth).abs() / truth.abs()).median() > 2


@pytest.mark.parametrize("difference", DIFFERENCES)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_a_model_that_predicts_what_its_reference_does_has_a_margin_of_exactly_zero(dtype, difference):
    unet = sd15(dtype=dtype)
    arguments = batch(unet, 2, pairs=True, dtype=torch.float32)
    arguments["model_pred"] = arguments["ref_pred"].clone().requires_grad_()
    ncp = NoiseConditionedPerceptualLoss(unet, difference=difference)
    error, ref_error = ncp.errors(**arguments)
    assert torch.equal(error, ref_error)
    assert (error > 0).all()
    out = ncp_dpo_loss(ncp, **arguments, reduction="none")
    assert torch.equal(out.loss, torch.full_like(out.loss, 2).log())
    assert out.metrics["rewards/margins"] == 0


@pytest.mark.parametrize("difference", DIFFERENCES)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_a_right_prediction_has_an_error_of_exactly_zero_whatever_the_other_ones(dtype, difference):
    unet = sd15(dtype=dtype)
    ncp = NoiseConditionedPerceptualLoss(unet, difference=difference)
    arguments = batch(unet, 2, dtype=torch.float32)
    right = {"model_pred": arguments["target"].clone().requires_grad_()}
    error, ref_error = ncp.errors(**arguments | right)
    assert not error.any()
    assert (ref_error > 0).all()
    assert not torch.autograd.grad(error.sum(), right["model_pred"])[0].any()
    error, ref_error = ncp.errors(**arguments | {"ref_pred": arguments["target"]})
    assert (error > 0).all()
    assert not ref_error.any()


@pytest.mark.parametrize("difference", ["literal", "scaled", "central"])
def test_margins_of_every_estimator_agree_with_the_definitions_in_float64(difference):
    unet = sdxl()
    arguments = in_float64(moved(unet, 0.05, 3, error=0.01))
    torch.testing.assert_close(
        margins(unet, arguments, difference), margins(unet, arguments, "literal"), rtol=0.01, atol=0
    )


@pytest.mark.parametrize("difference", ["literal", "scaled", "central"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_model_and_reference_exchanged_exchange_their_errors(dtype, difference):
    unet = sd15(dtype=dtype)
    ncp = NoiseConditionedPerceptualLoss(unet, difference=difference)
    arguments = batch(unet, 3, dtype=torch.float32)
    other = {"model_pred": arguments["ref_pred"], "ref_pred": arguments["model_pred"].detach()}
    there, back = ncp.errors(**arguments), ncp.errors(**arguments | other)
    rtol = 1e-4 if dtype == torch.float64 else 0.05  # the arms stand the other way round
    torch.testing.assert_close((there.error, there.ref_error), (back.ref_error, back.error), rtol=rtol, atol=0)


@given(seed=st.integers(0, 99), size=st.floats(-8, 2), part=st.floats(-8, 2))
@settings(max_examples=20)
def test_errors_are_never_negative_and_always_finite(seed, size, part):
    """Predictions whose errors differ by orders of magnitude: the smaller one is not what is left of the larger."""
    unet = sd15(dtype=torch.bfloat16)
    arguments = batch(unet, 1, seed=seed, error=10**size, dtype=torch.float32)
    arguments["ref_pred"] = arguments["target"] + 10**part * torch.randn_like(arguments["target"])
    error, ref_error = NoiseConditionedPerceptualLoss(unet, "down_blocks.0").errors(**arguments)
    for value in (error, ref_error):
        assert value.isfinite().all()
        assert (value >= 0).all()


def test_a_kept_reference_error_gives_the_margin_of_two_errors_and_a_kept_prediction_the_exact_one():
    half, exact = rounded(sd15(), torch.bfloat16)
    arguments = moved(half, 0.01, 1)
    truth = margins(exact, in_float64(arguments), "literal")
    ncp = NoiseConditionedPerceptualLoss(copy.deepcopy(half))
    kept, _ = ncp.errors(**arguments | {"model_pred": arguments["ref_pred"], "ref_pred": None})
    alone, _ = ncp.errors(**arguments | {"ref_pred": None})
    of_errors = ((alone.detach().double() - kept.double() - truth).abs() / truth.abs()).median()
    of_prediction = ((margins(half, arguments) - truth).abs() / truth.abs()).median()
    assert of_prediction < 0.4 < of_errors
