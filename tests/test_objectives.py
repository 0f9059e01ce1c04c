"""Properties of the preference objectives on per-sample errors."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from ncp_loss import cpo_loss, dpo_loss, sft_loss
from ncp_loss.objectives import preference_metrics

LOSS_TYPES = ["sigmoid", "hinge", "ipo"]
numbers = st.floats(0, 10, allow_subnormal=False)
quads = st.lists(st.tuples(numbers, numbers, numbers, numbers), min_size=1, max_size=5)
betas = st.floats(1e-2, 1e6)


def columns(rows: list[tuple[float, ...]], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(rows, dtype=dtype).T.unbind())


@given(rows=quads, beta=betas, loss_type=st.sampled_from(LOSS_TYPES), smoothing=st.floats(0, 0.49))
def test_dpo_equals_the_oracle(rows, beta, loss_type, smoothing):
    smoothing = smoothing if loss_type == "sigmoid" else 0.0
    errors = columns(rows)
    loss = dpo_loss(*errors, beta=beta, loss_type=loss_type, label_smoothing=smoothing, reduction="none")
    truth = torch.tensor(oracle.dpo(*errors, beta, loss_type, smoothing), dtype=torch.float64)
    torch.testing.assert_close(loss, truth, rtol=1e-9, atol=1e-12)


@given(rows=quads, beta=betas, weight=st.floats(0, 10))
def test_cpo_equals_the_oracle(rows, beta, weight):
    chosen, rejected, *_ = columns(rows)
    loss = cpo_loss(chosen, rejected, beta=beta, sft_weight=weight, reduction="none")
    truth = torch.tensor(oracle.cpo(chosen, rejected, beta, weight), dtype=torch.float64)
    torch.testing.assert_close(loss, truth, rtol=1e-9, atol=1e-12)


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


@given(rows=quads, beta=st.floats(1e-2, 1e2), loss_type=st.sampled_from(LOSS_TYPES), step=st.floats(1e-3, 1))
def test_dpo_is_monotone_in_each_error(rows, beta, loss_type, step):
    errors = columns(rows)
    margin = (errors[1] - errors[3]) - (errors[0] - errors[2])
    if loss_type == "ipo":  # a parabola: monotone on either side of its target margin, 1 / (2 beta)
        assume(bool((margin + 2 * step < 1 / (2 * beta)).all()))
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
    }
    for loss in losses.values():
        each = loss("none")
        assert each.shape == errors[0].shape
        torch.testing.assert_close(loss("sum"), each.sum())
        torch.testing.assert_close(loss("mean"), each.mean())


@given(rows=quads, beta=st.sampled_from([1e-6, 2500.0, 1e9, 1e20]), loss_type=st.sampled_from(["sigmoid", "hinge"]))
def test_losses_and_gradients_are_finite_at_extreme_beta_in_fp16(rows, beta, loss_type):
    errors = [e.half().requires_grad_() for e in columns(rows)]
    for loss in (dpo_loss(*errors, beta=beta, loss_type=loss_type), cpo_loss(*errors[:2], beta=beta)):
        assert loss.dtype == torch.float32
        assert torch.isfinite(loss)
    loss = dpo_loss(*(e.detach().float().requires_grad_() for e in errors), beta=beta, loss_type=loss_type)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_objectives_pass_gradcheck(loss_type):
    errors = [e.requires_grad_() for e in columns([(0.3, 0.7, 0.35, 0.6), (0.9, 0.1, 0.5, 0.4)])]
    for smoothing in (0.0, 0.2) if loss_type == "sigmoid" else (0.0,):
        assert torch.autograd.gradcheck(
            lambda *e, s=smoothing: dpo_loss(*e, beta=2.0, loss_type=loss_type, label_smoothing=s, reduction="none"),
            errors,
        )
    assert torch.autograd.gradcheck(lambda *e: cpo_loss(*e, beta=2.0, sft_weight=0.3, reduction="none"), errors[:2])
    assert torch.autograd.gradcheck(lambda e: sft_loss(e, reduction="none"), errors[:1])


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
