"""The schedule: float64 coefficients for every prediction type, scheduler and step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ncp_loss import NoiseSchedule

BETAS = oracle.scaled_linear_betas()
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TYPES = ["epsilon", "v_prediction", "sample"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    "name", ["DDPM", "DDIM", "PNDM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "LMSDiscrete"]
)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_every_scheduler_gives_stable_diffusions_schedule_in_float64(name, prediction_type):
    scheduler = getattr(diffusers, f"{name}Scheduler")(**SD, prediction_type=prediction_type)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    t = torch.arange(1000)
    truth = torch.tensor(oracle.cumulative_alphas(BETAS), dtype=torch.float64)
    assert schedule.prediction_type == prediction_type
    assert schedule.alpha(t).dtype == torch.float64
    torch.testing.assert_close(
        schedule.alpha(t).square(), truth, rtol=1e-6, atol=0
    )  # the scheduler's betas are float32
    torch.testing.assert_close(
        schedule.alpha(t).square() + schedule.sigma(t).square(), torch.ones_like(truth), rtol=1e-15, atol=0
    )


def test_the_default_is_stable_diffusions_own_to_the_last_digit():
    schedule = NoiseSchedule.from_scheduler(None)
    truth = torch.tensor(oracle.cumulative_alphas(BETAS), dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha(torch.arange(1000)), truth.sqrt(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_the_coefficients_reproduce_the_ddpm_schedulers_own_step(beta_schedule):
    scheduler = diffusers.DDPMScheduler(beta_schedule=beta_schedule, clip_sample=False, variance_type="fixed_small")
    schedule = NoiseSchedule.from_scheduler(scheduler)
    scheduler.alphas = 1 - scheduler.betas.double()
    scheduler.alphas_cumprod, scheduler.one = scheduler.alphas.cumprod(0), scheduler.one.double()
    x, o = normal(1, 4, 8, 8), normal(1, 4, 8, 8, seed=1)
    for t in (1, 2, 500, 998):
        generator = torch.Generator().manual_seed(t)
        truth = scheduler.step(o, t, x, generator=generator).prev_sample
        z = torch.randn(x.shape, generator=torch.Generator().manual_seed(t), dtype=x.dtype)
        step = schedule.reverse_step(torch.tensor([t]), dtype=torch.float64)
        torch.testing.assert_close(step.latents(x, o, z), truth, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("step", [1, 10, "clean"])
def test_latents_differ_by_B_times_the_difference_of_predictions_whatever_the_variance_noise(prediction_type, step):
    schedule = NoiseSchedule(BETAS, prediction_type)
    t = torch.tensor([0, 1, 9, 10, 500, 999])
    x, o, target, z = (normal(6, 4, 4, 4, seed=i) for i in range(4))
    back = schedule.reverse_step(t, step, dtype=torch.float64)
    for noise in (z, 100 * z, None):
        difference = back.latents(x, o, noise) - back.latents(x, target, noise)
        torch.testing.assert_close(back.displacement(o, target), difference, rtol=1e-9, atol=1e-12)


@given(t=st.integers(0, 999), step=st.integers(1, 1200), kind=st.sampled_from(TYPES))
def test_the_true_prediction_lands_on_the_forward_process(t, step, kind):
    """With x_0 and eps known, x_t' has the signal alpha(t') x_0, and noise of variance sigma(t')^2."""
    schedule = NoiseSchedule(BETAS, kind)
    tt = torch.tensor([t])
    alpha, sigma = schedule.alpha(tt), schedule.sigma(tt)
    x_0, eps = normal(1, 3), normal(1, 3, seed=1)
    o = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x_0, "sample": x_0}[kind]
    back = schedule.reverse_step(tt, step, dtype=torch.float64)
    after = max(t - step, 0)
    if t - step < 0:
        torch.testing.assert_close(back.latents(alpha * x_0 + sigma * eps, o, eps), x_0, rtol=1e-9, atol=1e-12)
    else:
        mean = back.latents(alpha * x_0 + sigma * eps, o, None)
        noise = (schedule.sigma(torch.tensor([after])).square() - back.s.square()).sqrt()
        torch.testing.assert_close(
            mean, schedule.alpha(torch.tensor([after])) * x_0 + noise * eps, rtol=1e-9, atol=1e-12
        )
    assert back.timesteps.item() == after


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("step", [1, 7, "clean"])
def test_zero_terminal_snr_is_right_for_velocity_and_sample(kind, step):
    scheduler = diffusers.DDPMScheduler(**SD, rescale_betas_zero_snr=True, prediction_type=kind)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    t = torch.tensor([999])
    assert schedule.alpha(t) == 0
    assert schedule.sigma(t) == 1
    x_0, eps = normal(1, 5), normal(1, 5, seed=1)
    o = -x_0 if kind == "v_prediction" else x_0
    back = schedule.reverse_step(t, step, dtype=torch.float64)
    z = normal(1, 5, seed=2)
    after = torch.tensor([998 if step == 1 else 992])
    # From pure noise nothing of eps is kept: the posterior is the forward process from x_0.
    truth = x_0 if step == "clean" else schedule.alpha(after) * x_0 + schedule.sigma(after) * z
    torch.testing.assert_close(back.latents(eps, o, z), truth, rtol=1e-9, atol=1e-12)


def test_zero_terminal_snr_uniform_steps_are_finite():
    scheduler = diffusers.DDPMScheduler(**SD, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    schedule = NoiseSchedule.from_scheduler(scheduler)
    back = schedule.reverse_step(torch.full((4000,), 999), "uniform", generator=torch.Generator().manual_seed(0))
    assert all(torch.isfinite(c.double()).all() for c in back)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64])
def test_timesteps_may_be_integers_or_floats(dtype):
    schedule = NoiseSchedule(BETAS)
    t = torch.tensor([0, 1, 500, 999])
    a, b = schedule.reverse_step(t), schedule.reverse_step(t.to(dtype))
    assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
    assert b.timesteps.dtype == dtype


def test_coefficients_are_right_to_float32s_last_digits_in_float32():
    schedule = NoiseSchedule(BETAS)
    t = torch.arange(1000)
    fine, coarse = schedule.reverse_step(t, dtype=torch.float64), schedule.reverse_step(t, dtype=torch.float32)
    torch.testing.assert_close(coarse.B.double(), fine.B, rtol=1.2e-7, atol=0)


class Moved(TorchDispatchMode):
    """How many tensors went from the host to another device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" != out.device.type:
            self.count += 1
        return out


def moved(step: Callable[[], Any]) -> int:
    with Moved() as mode:
        step()
    return mode.count


def test_the_tables_are_moved_once_per_device_and_dtype():
    schedule = NoiseSchedule(BETAS)
    t = torch.zeros(2, dtype=torch.int64, device="meta")
    assert moved(lambda: schedule.reverse_step(t)) == 3  # A, B and s
    assert moved(lambda: schedule.reverse_step(t)) == 0
    assert moved(lambda: schedule.alpha(t)) == 2  # alpha and sigma, in float64
    assert moved(lambda: schedule.sigma(t)) == 0
    assert moved(lambda: schedule.reverse_step(t, dtype=torch.float64)) == 3


@pytest.mark.parametrize("name", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
def test_a_schedule_that_is_not_of_its_betas_is_taken_as_the_scheduler_has_it(name):
    """These shift the signal-to-noise ratio and rescale it to zero after the betas."""
    scheduler = getattr(diffusers, name)(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    alpha = NoiseSchedule.from_scheduler(scheduler).alpha(torch.arange(1000))
    torch.testing.assert_close(alpha, scheduler.alphas_cumprod.double().sqrt(), rtol=1e-6, atol=1e-7)


def test_a_flows_shift_is_the_one_that_was_set_last():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_shift(3.0)
    assert NoiseSchedule.from_scheduler(scheduler).shift == 3.0


def test_a_schedule_is_read_from_a_scheduler_that_has_noised_samples_without_values():
    scheduler = diffusers.DDPMScheduler(**SD)
    x = torch.empty(2, 4, 8, 8, device="meta")
    scheduler.add_noise(x, x, torch.zeros(2, dtype=torch.int64, device="meta"))
    fresh = NoiseSchedule.from_scheduler(diffusers.DDPMScheduler(**SD))
    assert torch.equal(NoiseSchedule.from_scheduler(scheduler)._alpha, fresh._alpha)


@pytest.mark.parametrize("step", [1, "clean", "uniform"])
def test_a_schedule_lives_on_the_host_whatever_the_default_device(step):
    with torch.device("meta"):
        schedules = [NoiseSchedule(BETAS), NoiseSchedule.from_scheduler(None)]
        steps = [schedule.reverse_step(torch.tensor([1, 500], device="cpu"), step) for schedule in schedules]
    assert all(x.device.type == "cpu" for back in steps for x in back)
