"""Properties of the preference objectives on per-sample errors."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from models import batch, sd15

from ncp_loss import (
    NoiseConditionedPerceptualLoss,
    by_timestep,
    cpo_loss,
    dpo_loss,
    kto_loss,
    mapo_loss,
    ncp_cpo_loss,
    ncp_dpo_loss,
    ncp_sft_loss,
    preference_metrics,
    relative_beta,
    sft_loss,
)
from ncp_loss.objectives import LOSS_TYPES

SMOOTHED = ("sigmoid", "robust")
numbers = st.floats(0, 10, allow_subnormal=False)
quads = st.lists(st.tuples(numbers, numbers, numbers, numbers), min_size=1, max_size=5)
betas = st.floats(1e-2, 1e6)
# Each by itself: a property that drew the type would draw some of them rarely, or never.
each_loss_type = pytest.mark.parametrize("loss_type", LOSS_TYPES)
beta_lists = st.lists(betas, min_size=5, max_size=5)


def columns(rows: list[tuple[float, ...]], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(rows, dtype=dtype).T.unbind())


@given(rows=quads, beta=betas, smoothing=st.floats(0, 0.49), anchor=st.floats(0, 10))
def test_dpo_equals_the_oracle(rows, beta, smoothing, anchor):
    errors = columns(rows)
    for loss_type in LOSS_TYPES:
        smoothed = smoothing if loss_type in SMOOTHED else 0.0
        options = {"loss_type": loss_type, "label_smoothing": smoothed, "sft_weight": anchor}
        loss = dpo_loss(*errors, beta=beta, **options, reduction="none")
        truth = torch.tensor(oracle.dpo(*errors, beta, **options), dtype=torch.float64)
        torch.testing.assert_close(loss, truth, rtol=1e-9, atol=1e-9)


@given(rows=quads, beta=betas, weight=st.floats(0, 10))
def test_cpo_equals_the_oracle(rows, beta, weight):
    chosen, rejected, *_ = columns(rows)
    loss = cpo_loss(chosen, rejected, beta=beta, sft_weight=weight, reduction="none")
    truth = torch.tensor(oracle.cpo(chosen, rejected, beta, weight), dtype=torch.float64)
    torch.testing.assert_close(loss, truth, rtol=1e-9, atol=1e-12)


@given(rows=quads, beta=betas, scale=st.floats(1e-3, 10), steps=st.integers(1, 4000))
def test_mapo_equals_the_oracle(rows, beta, scale, steps):
    chosen, rejected, *_ = columns(rows)
    loss = mapo_loss(chosen, rejected, beta=beta, scale=scale, steps=steps, reduction="none")
    truth = torch.tensor(oracle.mapo(chosen, rejected, beta, scale, steps), dtype=torch.float64)
    torch.testing.assert_close(loss, truth, rtol=1e-9, atol=1e-9)


@given(
    rows=quads,
    beta=betas,
    seed=st.integers(0, 31),
    kl=st.none() | st.floats(-5, 5),
    weights=st.tuples(numbers, numbers),
)
def test_kto_equals_the_oracle(rows, beta, seed, kl, weights):
    error, ref_error, *_ = columns(rows)
    liked = [bool(seed >> i & 1) for i in range(len(rows))]
    given_kl = torch.tensor(kl) if kl and seed % 2 else kl
    options = {"desirable_weight": weights[0], "undesirable_weight": weights[1]}
    loss = kto_loss(error, ref_error, torch.tensor(liked), beta=beta, kl=given_kl, **options, reduction="none")
    kl = given_kl if given_kl is None else float(given_kl)
    truth = torch.tensor(oracle.kto(error, ref_error, liked, beta, kl, *weights), dtype=torch.float64)
    torch.testing.assert_close(loss, truth, rtol=1e-7, atol=1e-9)


@each_loss_type
@given(rows=quads, each=beta_lists)
def test_a_beta_for_each_pair_is_that_of_each_pair(rows, each, loss_type):
    each = each[: len(rows)]
    a, b, c, d = columns(rows)
    beta, liked = torch.tensor(each, dtype=torch.float64), a > b
    for loss in (
        lambda beta: dpo_loss(a, b, c, d, beta=beta, loss_type=loss_type, reduction="none"),
        lambda beta: cpo_loss(a, b, beta=beta, reduction="none"),
        lambda beta: mapo_loss(a, b, beta=beta, reduction="none"),
        lambda beta: kto_loss(a, b, liked, beta=beta, reduction="none"),
    ):
        alone = torch.stack([loss(number)[i] for i, number in enumerate(each)])
        torch.testing.assert_close(loss(beta), alone, rtol=1e-12, atol=0)
    rewards = preference_metrics(a, a, b, (c, d), beta)
    for name, gain in (("chosen", c - a), ("rejected", d - b), ("margins", (b - d) - (a - c))):
        torch.testing.assert_close(rewards[f"rewards/{name}"], (beta * gain).mean(), rtol=1e-12, atol=1e-12)


@given(rows=quads, beta=betas)
def test_dpo_is_log_2_when_the_model_equals_the_reference(rows, beta):
    chosen, rejected, *_ = columns(rows)
    loss = dpo_loss(chosen, rejected, chosen, rejected, beta=beta, reduction="none")
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)), rtol=1e-15, atol=0)


@given(rows=quads, beta=betas)
def test_swapping_winners_and_losers_negates_the_margin(rows, beta):
    a, b, c, d = columns(rows)
    one = preference_metrics(torch.zeros(()), a, b, (c, d), beta)["rewards/margins"]
    two = preference_metrics(torch.zeros(()), b, a, (d, c), beta)["rewards/margins"]
    assert one == -two


@pytest.mark.parametrize("loss_type", [name for name in LOSS_TYPES if name != "linear"])
@given(rows=quads, beta=st.floats(1e-2, 1e2), step=st.floats(1e-3, 1))
def test_dpo_is_monotone_in_each_error(rows, beta, loss_type, step):
    errors = columns(rows)
    margin = (errors[1] - errors[3]) - (errors[0] - errors[2])
    if loss_type == "ipo":  # a parabola: monotone on either side of its target margin, 1 / (2 beta)
        assume(bool((margin + 2 * step < 1 / (2 * beta)).all()))
    if loss_type == "dmpo":  # least where sigmoid(beta margin) is its target, 0.99
        assume(bool((beta * (margin + 2 * step) < math.log(99)).all()))
    base = dpo_loss(*errors, beta=beta, loss_type=loss_type, reduction="none")
    for i, worse in enumerate((True, False, False, True)):
        moved = [e + step if i == j else e for j, e in enumerate(errors)]
        loss = dpo_loss(*moved, beta=beta, loss_type=loss_type, reduction="none")
        assert (loss >= base).all() if worse else (loss <= base).all()


@given(rows=quads, beta=betas)
def test_cpo_without_sft_weight_is_dpo_with_a_reference_of_zero(rows, beta):
    chosen, rejected, *_ = columns(rows)
    zero = torch.zeros_like(chosen)
    a = cpo_loss(chosen, rejected, beta=beta, sft_weight=0.0, reduction="none")
    b = dpo_loss(chosen, rejected, zero, zero, beta=beta, reduction="none")
    assert torch.equal(a, b)


@given(rows=quads)
def test_reductions_agree(rows):
    errors = columns(rows)
    losses = {
        "dpo": lambda r: dpo_loss(*errors, beta=3.0, reduction=r),
        "cpo": lambda r: cpo_loss(*errors[:2], beta=3.0, reduction=r),
        "sft": lambda r: sft_loss(errors[0], reduction=r),
        "mapo": lambda r: mapo_loss(*errors[:2], reduction=r),
        "kto": lambda r: kto_loss(*errors[:2], errors[2] > 5, beta=3.0, reduction=r),
    }
    for loss in losses.values():
        each = loss("none")
        assert each.shape == errors[0].shape
        torch.testing.assert_close(loss("sum"), each.sum())
        torch.testing.assert_close(loss("mean"), each.mean())


def gradients(loss, errors):
    """Of the loss's sum in each error, 0 where it does not depend on one."""
    leaves = [e.detach().requires_grad_() for e in errors]
    found = torch.autograd.grad(loss(*leaves).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(e) if g is None else g for e, g in zip(leaves, found, strict=True)]


@each_loss_type
@given(
    rows=st.lists(st.tuples(*[st.floats(0, 65504, width=16)] * 4), min_size=1, max_size=4),
    beta=st.sampled_from([1e-6, 2500.0, 1e9, 1e20]),
)
def test_losses_and_gradients_are_finite_at_extreme_beta_and_extreme_errors_in_fp16(rows, beta, loss_type):
    errors = columns(rows, torch.float16)
    losses = {
        4: lambda *e: dpo_loss(*e, beta=beta, loss_type=loss_type, sft_weight=1.0, reduction="none"),
        2: lambda *e: cpo_loss(*e, beta=beta, reduction="none"),
        -2: lambda *e: kto_loss(*e, errors[2] > errors[3], beta=beta, reduction="none"),
        -3: lambda *e: mapo_loss(*e, beta=beta, reduction="none"),
    }
    for count, loss in losses.items():
        mine = errors[: 4 if count == 4 else 2]
        value = loss(*mine)
        assert value.dtype == torch.float32
        assert value.isfinite().all()
        # In float32, for hinge's and ipo's own slopes, beta and the margin, are beyond float16.
        assert all(g.isfinite().all() for g in gradients(loss, [e.float() for e in mine]))


@pytest.mark.parametrize("loss_type", [name for name in LOSS_TYPES if name != "linear"])
def test_objectives_pass_gradcheck(loss_type):
    errors = [e.requires_grad_() for e in columns([(0.3, 0.7, 0.35, 0.6), (0.9, 0.1, 0.5, 0.4)])]
    for smoothing in (0.0, 0.2) if loss_type in SMOOTHED else (0.0,):
        options = {"beta": 2.0, "loss_type": loss_type, "label_smoothing": smoothing, "sft_weight": 0.3}
        assert torch.autograd.gradcheck(lambda *e, o=options: dpo_loss(*e, **o, reduction="none"), errors)
    assert torch.autograd.gradcheck(lambda *e: cpo_loss(*e, beta=2.0, sft_weight=0.3, reduction="none"), errors[:2])
    assert torch.autograd.gradcheck(lambda e: sft_loss(e, reduction="none"), errors[:1])
    assert torch.autograd.gradcheck(lambda *e: mapo_loss(*e, scale=3.0, steps=2, reduction="none"), errors[:2])
    liked = torch.tensor([True, False])
    assert torch.autograd.gradcheck(lambda *e: kto_loss(*e, liked, beta=2.0, kl=0.1, reduction="none"), errors[:2])


@given(rows=quads, beta=betas)
def test_linear_has_dpos_gradient_with_its_weight_in_place_of_the_sigmoid_and_none_for_the_reference(rows, beta):
    errors = columns(rows)
    found = gradients(lambda *e: dpo_loss(*e, beta=beta, loss_type="linear", reduction="none"), errors)
    margin = (errors[1] - errors[3]) - (errors[0] - errors[2])
    truth = torch.tensor([beta * oracle.linear_weight(beta * float(m)) for m in margin], dtype=torch.float64)
    for gradient, sign in zip(found, (1, -1, 0, 0), strict=True):
        torch.testing.assert_close(gradient, sign * truth, rtol=1e-9, atol=0)


@given(rows=quads, beta=betas)
def test_linear_has_dpos_slope_where_the_model_equals_the_reference(rows, beta):
    a, b, *_ = columns(rows)
    linear, dpo = (
        gradients(lambda *e, t=t: dpo_loss(*e, a, b, beta=beta, loss_type=t, reduction="none"), (a, b))
        for t in ("linear", "sigmoid")
    )
    torch.testing.assert_close(linear, dpo, rtol=1e-12, atol=0)


@each_loss_type
@given(rows=quads, beta=betas)
def test_a_better_winner_and_a_worse_loser_lower_the_loss(rows, beta, loss_type):
    errors = columns(rows)
    z = beta * ((errors[1] - errors[3]) - (errors[0] - errors[2]))
    if loss_type in ("ipo", "dmpo"):  # which have a target, and pull back what is past it
        assume(bool((z < (0.5 if loss_type == "ipo" else math.log(99))).all()))
    winner, loser, *_ = gradients(lambda *e: dpo_loss(*e, beta=beta, loss_type=loss_type, reduction="none"), errors)
    assert (winner >= 0).all()
    assert (loser <= 0).all()
    winner, loser = gradients(lambda *e: mapo_loss(*e, beta=beta, reduction="none"), errors[:2])
    assert (winner >= 1).all()
    assert (loser <= 0).all()
    liked = errors[2] > errors[3]
    (error,) = gradients(lambda e: kto_loss(e, errors[1], liked, beta=beta, kl=0.0, reduction="none"), errors[:1])
    assert (error.where(liked, -error) >= 0).all()


@each_loss_type
@given(rows=quads, beta=betas, weight=st.floats(0, 100))
def test_the_anchor_adds_its_weight_to_the_winners_gradient_and_nothing_else(rows, beta, loss_type, weight):
    errors = columns(rows)
    plain, anchored = (
        gradients(lambda *e, w=w: dpo_loss(*e, beta=beta, loss_type=loss_type, sft_weight=w, reduction="none"), errors)
        for w in (0.0, weight)
    )
    torch.testing.assert_close(anchored[0], plain[0] + weight, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(one, other) for one, other in zip(plain[1:], anchored[1:], strict=True))


@given(rows=quads, beta=betas, loss_type=st.sampled_from(SMOOTHED))
def test_labels_that_are_never_flipped_make_robust_and_smoothed_the_plain_loss(rows, beta, loss_type):
    errors = columns(rows)
    losses = [dpo_loss(*errors, beta=beta, loss_type=name, reduction="none") for name in ("sigmoid", loss_type)]
    assert torch.equal(*losses)


@given(rows=quads, beta=st.floats(1e-2, 1e2), flips=st.floats(0, 0.45))
def test_robust_is_the_plain_loss_on_average_over_flipped_labels(rows, beta, flips):
    a, b, c, d = columns(rows)
    options = {"beta": beta, "loss_type": "robust", "label_smoothing": flips, "reduction": "none"}
    kept, flipped = dpo_loss(a, b, c, d, **options), dpo_loss(b, a, d, c, **options)
    plain = dpo_loss(a, b, c, d, beta=beta, reduction="none")
    torch.testing.assert_close((1 - flips) * kept + flips * flipped, plain, rtol=1e-9, atol=1e-9)


@given(rows=quads, beta=betas)
def test_mapo_of_equal_errors_is_the_error_and_beta_log_2(rows, beta):
    error, *_ = columns(rows)
    loss = mapo_loss(error, error, beta=beta, reduction="none")
    torch.testing.assert_close(loss, error + beta * math.log(2), rtol=1e-14, atol=0)


@given(rows=quads, beta=betas, weights=st.tuples(numbers, numbers))
def test_kto_of_a_model_that_is_its_reference_is_half_of_each_weight(rows, beta, weights):
    error, first, second, _ = columns(rows)
    liked = first > second
    options = {"desirable_weight": weights[0], "undesirable_weight": weights[1]}
    loss = kto_loss(error, error, liked, beta=beta, **options, reduction="none")
    truth = torch.tensor([weights[0] if x else weights[1] for x in liked.tolist()], dtype=torch.float64) / 2
    torch.testing.assert_close(loss, truth, rtol=1e-14, atol=0)


def test_kto_takes_no_gradient_through_its_estimate_and_a_given_mean_is_the_default():
    error, ref_error = (e.requires_grad_() for e in columns([(0.1, 0.5), (0.2, 0.4), (0.4, 0.5)]))
    liked, mean = torch.tensor([True, False, True]), (ref_error - error).mean()
    both = [kto_loss(error, ref_error, liked, beta=3.0, kl=kl) for kl in (None, mean, mean.item())]
    slopes = [torch.autograd.grad(loss, error)[0] for loss in both]
    for loss, slope in zip(both, slopes, strict=True):
        assert torch.equal(loss, both[0])
        assert torch.equal(slope, slopes[0])


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-8, 1e-5, 1e-3, 0.19, 0.21, 1.0, 30.0, 200.0, 6e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mapos_gradient_keeps_its_digits_from_nothing_to_the_largest_error(size, dtype):
    leaves = [torch.tensor([e], dtype=dtype, requires_grad=True) for e in (size, size)]
    winner, loser = torch.autograd.grad(mapo_loss(*leaves, beta=0.1).sum(), leaves)
    slope = 0.1 * 0.5 * 1000 * 0.5 * oracle.mapo_ratio_slope(0.5 * size)  # beta sigmoid(0) T s f'
    tolerance = {"rtol": 1e-4 if dtype == torch.float32 else 1e-10, "atol": 1e-30}
    torch.testing.assert_close(loser.double(), torch.tensor([slope], dtype=torch.float64), **tolerance)
    torch.testing.assert_close(winner.double(), torch.tensor([1 - slope], dtype=torch.float64), **tolerance)


def test_mapo_tells_errors_apart_that_are_as_small_as_perceptual_ones():
    chosen, rejected = torch.tensor([1.00e-6]), torch.tensor([1.01e-6])
    loss = mapo_loss(chosen.double(), rejected.double(), steps=10**8, reduction="none")
    torch.testing.assert_close(mapo_loss(chosen, rejected, steps=10**8).double(), loss.squeeze(), rtol=1e-5, atol=0)


timesteps_of = st.lists(st.integers(-100, 1100), min_size=1, max_size=20)


@given(timesteps=timesteps_of, seed=st.integers(0, 99), edges=st.sets(st.integers(0, 1000), min_size=2, max_size=6))
@example(timesteps=[0, 250, 500, 1000, 1001], seed=0, edges={0, 500, 1000})  # the edges themselves
def test_by_timestep_takes_the_mean_of_each_range_and_nan_where_there_is_none(timesteps, seed, edges):
    edges = sorted(edges)
    values = torch.randn(len(timesteps), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = by_timestep(values.requires_grad_(), torch.tensor(timesteps), edges)
    ranges = list(pairwise(edges))
    assert list(found) == [f"{low}-{high}" for low, high in ranges]
    for (low, high), mean in zip(ranges, found.values(), strict=True):
        mine = [v.item() for v, t in zip(values, timesteps, strict=True) if low <= t < high or t == high == edges[-1]]
        assert mean.shape == ()
        assert not mean.requires_grad
        assert mean.item() == pytest.approx(math.fsum(mine) / len(mine) if mine else math.nan, nan_ok=True)


def test_by_timestep_keeps_what_is_not_finite_in_its_own_range_and_sums_halves_in_float32():
    values = torch.tensor([math.nan, 1.0, math.inf, 3.0])
    found = by_timestep(values, torch.tensor([10.0, 300.0, 600.0, 300.0]))
    assert [found[name].item() for name in ("250-500", "500-750")] == [2.0, math.inf]
    assert found["0-250"].isnan()
    halves = by_timestep(torch.full((4,), 60000.0).half(), torch.zeros(4))["0-250"]
    assert halves.dtype == torch.float32
    assert halves.item() == pytest.approx(60000, rel=1e-3)


def test_nothing_reads_a_value_of_an_error_beta_or_timestep():
    """On "meta" there is no value to read."""
    e = torch.ones(4, device="meta")
    for loss_type in LOSS_TYPES:
        assert dpo_loss(e, e, e, e, beta=e, loss_type=loss_type, sft_weight=1.0).shape == ()
    assert cpo_loss(e, e, beta=e).shape == mapo_loss(e, e, beta=e).shape == ()
    assert kto_loss(e, e, e.bool(), beta=e).shape == kto_loss(e, e, e.bool(), kl=0.1).shape == ()
    assert preference_metrics(e, e, e, (e, e), e)["loss"].shape == ()
    assert by_timestep(e, e)["0-250"].shape == ()
    assert relative_beta(e, e).shape == (4,)


positive = st.floats(1e-12, 1e6)
positive_quads = st.lists(st.tuples(positive, positive, positive, positive), min_size=1, max_size=5)


@given(rows=positive_quads, kappa=st.floats(1e-3, 1e3))
def test_a_relative_beta_times_the_margin_is_kappa_times_the_margin_over_the_references_error(rows, kappa):
    errors = columns(rows)
    beta = relative_beta(*errors[2:], kappa)
    for found, (chosen, rejected, ref_chosen, ref_rejected) in zip(beta.tolist(), rows, strict=True):
        margin = (rejected - ref_rejected) - (chosen - ref_chosen)
        assert found * margin == pytest.approx(kappa * margin / (0.5 * (ref_chosen + ref_rejected)), rel=1e-12)


@given(rows=positive_quads, exponents=st.lists(st.integers(-40, 40), min_size=5, max_size=5))
def test_with_a_relative_beta_the_scale_of_no_pairs_errors_matters(rows, exponents):
    errors = columns(rows)
    scaled = [e * torch.tensor([2.0**n for n in exponents[: len(rows)]], dtype=torch.float64) for e in errors]
    losses = [dpo_loss(*e, beta=relative_beta(*e[2:]), reduction="none") for e in (errors, scaled)]
    torch.testing.assert_close(*losses, rtol=0, atol=0)  # powers of two: to the bit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_relative_beta_is_finite_for_every_error_and_no_pair_changes_another(dtype):
    least, most = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    ref = torch.tensor([0.5, 0.0, least, most, math.inf, math.nan], dtype=dtype)
    beta = relative_beta(ref, ref, kappa=2.0)
    assert beta.dtype == torch.float32
    assert (beta.isfinite() & (beta > 0)).all()
    assert beta[0] == 4
    loss = dpo_loss(ref[:4], ref[:4], ref[:4], ref[:4], beta=beta[:4], reduction="none")
    torch.testing.assert_close(loss, torch.full((4,), math.log(2)))
    assert preference_metrics(loss, ref[:4], ref[:4], (ref[:4], ref[:4]), beta[:4])["rewards/margins"] == 0


def test_kappa_is_beta_by_the_references_errors_and_a_batch_in_parts_is_the_whole_batch():
    """As in gradient accumulation, or over several processes: nothing is shared between pairs."""
    unet = sd15(dtype=torch.float64)
    ncp, arguments = NoiseConditionedPerceptualLoss(unet), batch(unet, 4, pairs=True, height=8, width=8)
    whole, metrics = ncp_dpo_loss(ncp, **arguments, kappa=3.0, reduction="none")
    error, ref = ncp.errors(**arguments, pairs=True)
    beta = 6.0 / (ref[:4] + ref[4:])
    torch.testing.assert_close(whole, dpo_loss(*error.chunk(2), *ref.chunk(2), beta=beta, reduction="none"))
    margins = beta * ((error[4:] - ref[4:]) - (error[:4] - ref[:4]))
    torch.testing.assert_close(metrics["rewards/margins"], margins.mean().detach())
    for rows in ([0, 1, 4, 5], [2, 3, 6, 7]):
        part = {name: value[rows] for name, value in arguments.items()}
        alone = ncp_dpo_loss(ncp, **part, kappa=3.0, reduction="none").loss
        torch.testing.assert_close(alone, whole[rows[:2]], rtol=1e-9, atol=0)


@pytest.mark.parametrize("kappa", [1e-300, 1e10, 1e300])
def test_a_relative_beta_is_positive_and_finite_for_every_error_and_kappa(kappa):
    for error in (0.0, 1e-45, 1.0, 3e38, math.inf, math.nan):
        beta = relative_beta(torch.tensor([error]), torch.tensor([error]), kappa)
        assert beta.isfinite()
        assert beta > 0


@pytest.mark.parametrize("beta", [1e-300, 1e300])
def test_a_beta_that_float32_cannot_hold_is_refused_where_errors_are_float32(beta):
    e = torch.ones(2)
    with pytest.raises(ValueError, match="beta must be a positive number"):
        dpo_loss(e, e, e, e, beta=beta)
    assert dpo_loss(*[e.double()] * 4, beta=beta).isfinite()
    each = torch.tensor([1.0, beta], dtype=torch.float64)
    with pytest.raises(ValueError, match=re.escape(f"one for each pair, (B,); it was [1.0, {beta}]")):
        kto_loss(e, e, torch.tensor([True, False]), beta=each)
    assert cpo_loss(e.double(), e.double(), beta=each).isfinite()


@pytest.mark.parametrize("beta", [2500, 1.0, torch.ones(2)])
def test_a_beta_beside_kappa_is_refused_unless_it_is_the_default(beta):
    unet = sd15(dtype=torch.float64)
    ncp, arguments = NoiseConditionedPerceptualLoss(unet), batch(unet, 2, pairs=True, height=8, width=8)
    assert ncp_dpo_loss(ncp, **arguments, kappa=2.0).loss.isfinite()
    with pytest.raises(ValueError, match=r"^beta must be left out where kappa is given"):
        ncp_dpo_loss(ncp, **arguments, kappa=2.0, beta=beta)


@pytest.mark.parametrize("objective", [ncp_dpo_loss, ncp_cpo_loss, ncp_sft_loss])
def test_the_metrics_are_the_same_whatever_the_reduction(objective):
    """So a batch that is reduced by "sum" still logs the mean loss."""
    unet = sd15(dtype=torch.float64)
    ncp, arguments = NoiseConditionedPerceptualLoss(unet), batch(unet, 2, pairs=True, height=8, width=8)
    if objective is not ncp_dpo_loss:
        del arguments["ref_pred"]
    found = {reduction: objective(ncp, **arguments, reduction=reduction) for reduction in ("mean", "sum", "none")}
    assert found["mean"].metrics == found["sum"].metrics == found["none"].metrics
    assert found["mean"].metrics["loss"] == found["mean"].loss
    torch.testing.assert_close(found["sum"].loss, found["none"].loss.sum())


@pytest.mark.parametrize("kappa", [0, -1.0, math.nan, math.inf])
def test_a_kappa_that_is_not_positive_and_finite_is_refused_by_name(kappa):
    e = torch.ones(2)
    with pytest.raises(ValueError, match="kappa must be a positive number"):
        relative_beta(e, e, kappa)


def test_metrics_have_everyone_elses_names_signs_and_ties():
    e = [torch.tensor(v) for v in ([0.1, 0.2, 0.3], [0.4, 0.2, 0.1], [0.2, 0.2, 0.2], [0.2, 0.2, 0.2])]
    metrics = preference_metrics(torch.tensor([1.0, 2.0, 6.0]), e[0], e[1], (e[2], e[3]), beta=10.0)
    expected = {
        "loss": 3.0,
        "raw_model_loss": 1.3 / 6,
        "ref_loss": 0.2,
        "implicit_acc": 0.5,  # right, tie, wrong
        "rewards/chosen": 0.0,
        "rewards/rejected": -1 / 3,
        "rewards/margins": 1 / 3,
        "rewards/accuracies": 0.5,
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name].shape == ()
        assert metrics[name].item() == pytest.approx(value, abs=1e-6)
    assert "ref_loss" not in preference_metrics(torch.zeros(()), e[0], e[1], None, beta=1.0)


def test_metrics_of_a_learned_beta_carry_no_gradient_and_halves_do_not_overflow():
    e, beta = torch.tensor([60.0, 30.0]).half(), torch.tensor([2500.0, 2500.0], requires_grad=True)
    metrics = preference_metrics(e.mean(), e, e / 2, (e, e), beta)
    assert all(not value.requires_grad and value.isfinite() for value in metrics.values())
    assert metrics["rewards/rejected"].item() == 2500 * 22.5


def test_losses_and_rewards_of_halves_are_those_of_the_same_numbers_in_float64():
    """Of each of the four errors: 1000 - 0.1 is 1000 in half precision."""
    big, small = torch.tensor([1000.0, 300.0]).half(), torch.tensor([0.1, 0.01]).half()
    for errors in ([big, small, small, big], [small, big, big, small], [big, big, small, small]):
        exact = [e.double() for e in errors]
        for loss_type in LOSS_TYPES:
            of_halves, truth = (dpo_loss(*e, beta=0.01, loss_type=loss_type, sft_weight=1.0) for e in (errors, exact))
            assert of_halves.item() == pytest.approx(truth.item(), rel=1e-5)
        pairs = [(cpo_loss, {"beta": 0.01}), (mapo_loss, {"scale": 0.01})]
        for loss, options in pairs:
            assert loss(*errors[:2], **options).item() == pytest.approx(loss(*exact[:2], **options).item(), rel=1e-5)
        liked = torch.tensor([True, False])
        of_halves, truth = (kto_loss(e[0], e[1], liked, beta=0.01, reduction="none") for e in (errors, exact))
        torch.testing.assert_close(of_halves.double(), truth, rtol=1e-5, atol=0)
        of_halves, truth = (preference_metrics(e[0], e[0], e[1], (e[2], e[3]), 1.0) for e in (errors, exact))
        for name in truth.keys() - {"loss"}:
            assert of_halves[name].item() == pytest.approx(truth[name].item(), rel=1e-6), name


def test_a_kept_error_of_the_reference_gets_no_gradient():
    unet = sd15(dtype=torch.float32)
    arguments = batch(unet, 1, pairs=True, height=4, width=4)
    del arguments["ref_pred"]
    kept = torch.ones(2, requires_grad=True)
    loss = ncp_dpo_loss(NoiseConditionedPerceptualLoss(unet, "conv_in"), **arguments, ref_error=kept, beta=1.0).loss
    of_kept, of_model = torch.autograd.grad(loss, [kept, arguments["model_pred"]], allow_unused=True)
    assert of_kept is None
    assert of_model.any()


def safeguard_of_the_page() -> str:
    page = (Path(__file__).parents[1] / "docs" / "objectives.md").read_text()
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "autograd.grad" in block]
    return block


@pytest.mark.parametrize("shared", [-1.0, 0.0, 0.2, 1.0])
def test_the_pages_safeguard_scales_the_losers_gradient_by_its_formula_and_keeps_every_value(shared):
    """The model adds a trained array to winner and loser; ``shared`` is how far they then go the same way."""
    unet = sd15(dtype=torch.float32)
    arguments = batch(unet, 2, pairs=True, height=8, width=8)
    ncp, target, ref_pred = NoiseConditionedPerceptualLoss(unet), arguments["target"], arguments["ref_pred"]
    names = ("target", "noisy_latents", "timesteps", "encoder_hidden_states")
    inputs = [arguments[name] for name in names]
    noise = (arguments["model_pred"].detach() - target).chunk(2)
    start = target + torch.cat([noise[0], shared * noise[0] + (1 - abs(shared)) * noise[1]])
    trained = torch.zeros_like(start[:2], requires_grad=True)
    scope = {"torch": torch, "dpo_loss": dpo_loss, "ncp": NoDraws(ncp), "inputs": inputs, "ref_pred": ref_pred}
    scope["model_pred"] = start + trained.repeat(2, 1, 1, 1)
    exec(safeguard_of_the_page(), scope)
    scope["loss"].backward()

    leaf = start.clone().requires_grad_()
    error, ref_error = NoDraws(ncp).errors(leaf, *inputs, ref_pred=ref_pred, pairs=True)
    winner, loser = torch.autograd.grad(error.sum(), leaf)[0].double().chunk(2)
    pairs = list(zip(winner.flatten().tolist(), loser.flatten().tolist(), strict=True))
    overlap, size = math.fsum(a * b for a, b in pairs), math.fsum(a * a for a, _ in pairs)
    scale = min(0.1 * size / overlap, 1.0) if overlap > 0 else 1.0
    assert (overlap > 0) == (shared > 0.1) or shared == 0
    assert scope["scale"].item() == pytest.approx(scale, rel=1e-4)
    assert scale * overlap <= 0.1 * size * (1 + 1e-9) or overlap <= 0  # a step lowers the winners' error

    chosen, rejected, ref = *error.detach().double().chunk(2), ref_error.double()
    z = 2500 * ((rejected - ref[2:]) - (chosen - ref[:2]))
    factor = (2500 * torch.sigmoid(-z) / 2)[:, None, None, None]  # of the mean over two pairs
    torch.testing.assert_close(trained.grad.double(), factor * (winner - scale * loser), rtol=1e-3, atol=1e-9)
    plain = dpo_loss(*error.detach().chunk(2), *ref_error.chunk(2), beta=2500.0)
    torch.testing.assert_close(scope["loss"].detach(), plain)


class NoDraws(NamedTuple):
    """The loss with z = 0 in its reverse step, so that two calls see the same."""

    ncp: NoiseConditionedPerceptualLoss

    def errors(self, model_pred: torch.Tensor, *inputs: torch.Tensor, **options: Any) -> Any:
        return self.ncp.errors(model_pred, *inputs, variance_noise=torch.zeros_like(inputs[0]), **options)


def test_rewards_without_a_reference_are_minus_beta_times_the_errors() -> None:
    chosen, rejected = torch.tensor([0.5, 1.0]), torch.tensor([2.0, 3.0])
    found = preference_metrics(chosen, chosen, rejected, None, 2.0)
    expected = {"rewards/chosen": -1.5, "rewards/rejected": -5.0, "rewards/margins": 3.5}
    assert {name: found[name].item() for name in expected} == expected
    assert "ref_loss" not in found


def test_a_reference_that_is_nan_counts_as_an_error_of_one() -> None:
    found = relative_beta(torch.tensor([float("nan"), 1.0]), torch.tensor([1.0, 3.0]), kappa=3.0)
    assert found.tolist() == [3.0, 1.5]


def test_flows_timesteps_between_whole_numbers_have_their_range() -> None:
    found = by_timestep(torch.tensor([1.0, 3.0]), torch.tensor([249.5, 250.5]), edges=(0, 250, 1000))
    assert [value.item() for value in found.values()] == [1.0, 3.0]
