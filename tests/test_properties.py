"""Properties of the perceptual error, drawn by hypothesis over seeds, sizes, steps and dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batch, encoder_of, sd15, sdxl, small

from ncp_loss import NoiseConditionedPerceptualLoss, ncp_cpo_loss, ncp_dpo_loss

UNET = small()
HALVES = {dtype: small(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)}
SETTINGS = settings(max_examples=20)

seeds = st.integers(0, 10_000)
timesteps = st.lists(st.integers(0, 999), min_size=1, max_size=4)
steps = st.sampled_from([1, 20, "clean"])
differences = st.sampled_from(["literal", "scaled"])


def loss(unet=UNET, **options) -> NoiseConditionedPerceptualLoss:
    return NoiseConditionedPerceptualLoss(unet, ["down_blocks", "mid_block"], **options)


def gradient(error: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(error.sum(), prediction)[0]


@SETTINGS
@given(seed=seeds, t=timesteps, step=steps, difference=differences, normalize=st.booleans())
def test_errors_are_never_negative(seed, t, step, difference, normalize):
    error, ref_error = loss(step=step, difference=difference, normalize=normalize).errors(
        **batch(UNET, len(t), timesteps=t, seed=seed, height=4, width=4)
    )
    assert (error > 0).all()
    assert (ref_error > 0).all()


@SETTINGS
@given(
    seed=seeds,
    t=timesteps,
    difference=differences,
    weighting=st.sampled_from([None, "noise"]),
    dtype=st.sampled_from([torch.float64, *HALVES]),
    one=st.booleans(),
)
def test_a_perfect_prediction_has_error_and_gradient_exactly_zero(seed, t, difference, weighting, dtype, one):
    unet = UNET if dtype == torch.float64 else HALVES[dtype]
    arguments = batch(unet, len(t), timesteps=t, seed=seed, height=4, width=4)
    with torch.no_grad():
        rows = slice(0, 1) if one else slice(None)
        arguments["model_pred"][rows] = arguments["target"][rows]
    error, _ = loss(unet, difference=difference, weighting=weighting).errors(**arguments)
    slope = gradient(error, arguments["model_pred"])
    assert torch.equal(error[rows], torch.zeros_like(error[rows]))
    assert torch.equal(slope[rows], torch.zeros_like(slope[rows]))
    assert torch.isfinite(slope).all()
    if one and len(t) > 1 and dtype == torch.float64:
        assert (error[1:] > 0).all()


def test_errors_of_samples_may_be_written_to_as_those_of_an_mse_may():
    """Some loops weigh or mask per-sample errors in place."""
    arguments = batch(UNET, 2, height=4, width=4)
    prediction, weights = arguments["model_pred"], torch.tensor([2.0, 0.0], dtype=torch.float64)
    found = []
    for in_place in (True, False):
        error = loss(reduction="none")(**{key: value for key, value in arguments.items() if key != "ref_pred"})
        found.append(gradient(error.mul_(weights) if in_place else error * weights, prediction))
    assert torch.equal(*found)
    assert found[0][0].any()


@SETTINGS
@given(seed=seeds, poison=st.sampled_from([float("nan"), float("inf"), 1e30]), difference=differences)
def test_a_poisoned_sample_changes_no_other(seed, poison, difference):
    ncp = loss(difference=difference)
    arguments = batch(UNET, 3, seed=seed, height=4, width=4)
    error, ref_error = ncp.errors(**arguments)
    slope = gradient(error, arguments["model_pred"])
    with torch.no_grad():
        arguments["model_pred"][1, 0, 0, 0] = poison
        arguments["ref_pred"][1] = poison
    poisoned, poisoned_ref = ncp.errors(**arguments)
    keep = [0, 2]
    torch.testing.assert_close(poisoned[keep], error[keep], rtol=1e-12, atol=0)
    torch.testing.assert_close(poisoned_ref[keep], ref_error[keep], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(poisoned, arguments["model_pred"])[keep], slope[keep], rtol=1e-9, atol=1e-18)


@SETTINGS
@given(seed=seeds, order=st.permutations(range(4)), difference=differences)
def test_errors_follow_a_permutation_of_the_batch(seed, order, difference):
    ncp = loss(difference=difference)
    arguments = batch(UNET, 4, seed=seed, height=4, width=4)
    error, ref_error = ncp.errors(**arguments)
    permuted = {name: value[list(order)] for name, value in arguments.items()}
    moved, moved_ref = ncp.errors(**permuted)
    torch.testing.assert_close(moved, error[list(order)], rtol=1e-10, atol=0)
    torch.testing.assert_close(moved_ref, ref_error[list(order)], rtol=1e-10, atol=0)


@SETTINGS
@given(seed=seeds, size=st.integers(1, 3), height=st.integers(3, 11), width=st.integers(3, 11))
def test_any_batch_and_latent_size_works_and_samples_do_not_interact(seed, size, height, width):
    ncp = loss()
    arguments = batch(UNET, size, seed=seed, height=height, width=width)
    error, _ = ncp.errors(**arguments)
    alone = [ncp.errors(**{name: value[i : i + 1] for name, value in arguments.items()})[0] for i in range(size)]
    torch.testing.assert_close(error, torch.cat(alone), rtol=1e-10, atol=0)
    for reduction, value in (("mean", error.mean()), ("sum", error.sum()), ("none", error)):
        del arguments["ref_pred"]
        torch.testing.assert_close(loss(reduction=reduction)(**arguments), value)
        arguments["ref_pred"] = None
    assert error.shape == (size,)


@pytest.mark.parametrize("layer", ["down_blocks", "mid_block", "up_blocks.0", "up_blocks.1.resnets.0"])
def test_sizes_that_are_no_multiple_of_the_networks_factor_give_the_whole_models_features(layer):
    unet, seen = sd15(), {}
    arguments = batch(unet, 1, height=11, width=7)
    latents, t, text = (arguments[k] for k in ("noisy_latents", "timesteps", "encoder_hidden_states"))
    features = NoiseConditionedPerceptualLoss(unet, layer).features(latents, t, text)[layer]
    path = "down_blocks.3" if layer == "down_blocks" else layer
    unet.get_submodule(path).register_forward_hook(lambda m, a, out: seen.update(out=out))
    unet(latents, t, text)
    assert torch.equal(features, seen["out"][0] if isinstance(seen["out"], tuple) else seen["out"])


@SETTINGS
@given(seed=seeds, h=st.sampled_from([1e-6, 1e-4]))
def test_scaled_and_literal_agree_in_the_limit(seed, h):
    """Value and gradient, as the displacement, of both, goes to zero."""
    arguments = batch(UNET, 2, seed=seed, error=h, height=4, width=4)
    values = [loss(difference=difference) for difference in ("literal", "scaled")]
    literal, scaled = ((e := ncp.errors(**arguments)[0], gradient(e, arguments["model_pred"])) for ncp in values)
    torch.testing.assert_close(scaled[0], literal[0], rtol=0.2, atol=0)  # curvature over the scaled step's 2%
    a, b = (g.flatten(1) / g.flatten(1).norm(dim=1, keepdim=True) for g in (scaled[1], literal[1]))
    assert ((a * b).sum(1) > 0.95).all()


@SETTINGS
@given(seed=seeds)
def test_the_order_of_the_reference_does_not_matter_to_the_model(seed):
    ncp = loss()
    arguments = batch(UNET, 2, seed=seed, height=4, width=4)
    with_ref, _ = ncp.errors(**arguments)
    del arguments["ref_pred"]
    without, none = ncp.errors(**arguments)
    assert none is None
    torch.testing.assert_close(with_ref, without, rtol=1e-10, atol=0)


@SETTINGS
@given(seed=seeds, beta=st.sampled_from([1.0, 2500.0, 1e8]))
def test_swapping_winners_and_losers_negates_the_margin(seed, beta):
    ncp = loss()
    arguments = batch(UNET, 2, pairs=True, seed=seed, height=4, width=4)
    swapped = {name: torch.cat(value.chunk(2)[::-1]) for name, value in arguments.items()}
    one, two = (ncp_dpo_loss(ncp, **a, beta=beta).metrics["rewards/margins"] for a in (arguments, swapped))
    torch.testing.assert_close(one, -two, rtol=1e-6, atol=0)


@SETTINGS
@given(seed=seeds)
def test_ncp_dpo_is_log_2_when_the_model_is_the_reference(seed):
    ncp = loss()
    arguments = batch(UNET, 2, pairs=True, seed=seed, height=4, width=4)
    arguments["ref_pred"] = arguments["model_pred"].detach()
    out = ncp_dpo_loss(ncp, **arguments, reduction="none")
    torch.testing.assert_close(out.loss, torch.full((2,), 2.0, dtype=torch.float64).log(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("beta", [1e-3, 2500.0, 1e12])
def test_losses_and_gradients_are_finite_at_extreme_beta_in_half_precision(dtype, beta):
    unet = HALVES[dtype]
    arguments = batch(unet, 2, pairs=True, height=4, width=4)
    assert arguments["model_pred"].dtype == dtype
    dpo = ncp_dpo_loss(loss(unet), **arguments, beta=beta).loss
    del arguments["ref_pred"]
    cpo = ncp_cpo_loss(loss(unet), **arguments, beta=beta).loss
    assert torch.isfinite(dpo)
    assert torch.isfinite(cpo)


@SETTINGS
@given(seed=seeds, scale=st.floats(0.1, 10))
def test_variance_noise_shared_by_both_sides_leaves_the_error_of_a_linear_encoder_alone(seed, scale):
    """conv_in is affine, so its feature difference depends on the latents' difference alone."""
    ncp = NoiseConditionedPerceptualLoss(UNET, "conv_in")
    arguments = batch(UNET, 2, seed=seed, height=4, width=4)
    error, _ = ncp.errors(**arguments)
    arguments["variance_noise"] = scale * arguments["variance_noise"]
    torch.testing.assert_close(ncp.errors(**arguments)[0], error, rtol=1e-9, atol=0)


def test_sdxl_sizes_are_not_rounded_to_the_models_dtype():
    """1021 is no bf16 number; what the user passes in float32 reaches the time embedding as it is."""
    unet = sdxl(dtype=torch.bfloat16)
    arguments = batch(unet, 1)
    ids = arguments["added_cond_kwargs"]["time_ids"].float()
    ids[:, 4] = 1021.0
    seen = []
    ncp = NoiseConditionedPerceptualLoss(unet)
    encoder_of(ncp).view.add_time_proj.register_forward_hook(lambda m, a, out: seen.append(a[0].clone()))
    ncp.features(
        arguments["noisy_latents"].float(),
        arguments["timesteps"],
        arguments["encoder_hidden_states"].float(),
        added_cond_kwargs=arguments["added_cond_kwargs"] | {"time_ids": ids},
    )
    assert torch.equal(seen[0], ids.flatten())


@pytest.mark.parametrize("difference", ["literal", "scaled", "central"])
def test_a_second_derivative_is_refused_not_zero(difference):
    """The gradient comes with the error: what it was made of is in no graph."""
    arguments = batch(UNET, 1, height=4, width=4)
    convolutions = NoiseConditionedPerceptualLoss(UNET, "down_blocks.0.resnets.0", difference=difference)
    error, _ = convolutions.errors(**arguments)
    with pytest.raises(RuntimeError, match="ncp errors have first derivatives only"):
        torch.autograd.grad(error.sum(), arguments["model_pred"], create_graph=True)


def test_a_layer_that_is_silent_adds_nothing_to_a_normalized_error():
    unet = small()
    with torch.no_grad():
        for parameter in unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_out.parameters():
            parameter.zero_()
    silent = "mid_block.attentions.0.transformer_blocks.0.attn1"
    arguments = batch(unet, 2, height=4, width=4)
    both, one = (
        NoiseConditionedPerceptualLoss(unet, layers, normalize=True).errors(**arguments)[0]
        for layers in (["down_blocks", silent], ["down_blocks"])
    )
    torch.testing.assert_close(both, one, rtol=1e-12, atol=0)
    assert torch.isfinite(gradient(both, arguments["model_pred"])).all()
