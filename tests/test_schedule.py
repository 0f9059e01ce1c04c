"""The schedule: float64 coefficients for every prediction type, scheduler and step."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import diffusers
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import batch, small
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ncp_loss import FlowSchedule, NoiseSchedule
from ncp_loss import NoiseConditionedPerceptualLoss as NCP
from ncp_loss.checks import check_generator, check_latents, check_number, check_pairs
from ncp_loss.schedule import check_noisy, draw_noise
from ncp_loss.tensors import widest

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


@pytest.mark.parametrize("kind", TYPES)
@given(t=st.integers(0, 999), step=st.integers(1, 1200))
def test_the_true_prediction_lands_on_the_forward_process(kind, t, step):
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


def test_the_tables_are_moved_once_to_a_device_whatever_the_dtype_of_the_step():
    schedule = NoiseSchedule(BETAS)
    t = torch.zeros(2, dtype=torch.int64, device="meta")
    assert moved(lambda: schedule.reverse_step(t)) == 3  # A, B and s
    assert moved(lambda: schedule.reverse_step(t)) == 0
    assert moved(lambda: schedule.alpha(t)) == 2  # alpha and sigma, in float64
    assert moved(lambda: schedule.sigma(t)) == 0
    assert moved(lambda: schedule.reverse_step(t, dtype=torch.bfloat16)) == 0
    assert moved(lambda: schedule.reverse_step(t, "clean")) == 3


class Wide(TorchDispatchMode):
    """What was put in float64 on the device that stands for one without float64."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.found += [func for x in tensors if x.device.type == "meta" and x.dtype == torch.float64]
        return out


@pytest.mark.parametrize("make", [lambda: NoiseSchedule(BETAS), lambda: FlowSchedule(3.0)], ids=["noise", "flow"])
@pytest.mark.parametrize("step", [1, "clean", "uniform"])
def test_a_device_without_float64_is_given_none(monkeypatch: pytest.MonkeyPatch, make: Any, step: Any) -> None:
    assert widest(torch.device("mps")) == torch.float32
    assert widest(torch.device("cpu")) == torch.float64
    as_if = {"meta": torch.device("mps")}
    monkeypatch.setattr("ncp_loss.schedule.widest", lambda device: widest(as_if.get(device.type, device)))
    schedule, t = make(), torch.empty(2, dtype=torch.int64, device="meta")
    with Wide() as mode:
        values = [*schedule.reverse_step(t, step), schedule.alpha(t), schedule.sigma(t)]
    assert {x.device.type for x in values} == {"meta"}
    assert not mode.found


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
        schedules = [NoiseSchedule(BETAS), NoiseSchedule.from_scheduler(None), FlowSchedule(3.0)]
        steps = [schedule.reverse_step(torch.tensor([1, 500], device="cpu"), step) for schedule in schedules]
    assert all(x.device.type == "cpu" for back in steps for x in back)


# Schedulers whose settings change after the schedule was made of them.


def zero_snr_by_hand(scheduler: Any) -> None:
    """As kohya's `fix_noise_scheduler_betas_for_zero_terminal_snr`."""
    alphas = (1 - scheduler.betas).cumprod(0).sqrt()
    alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
    squared = alphas.square()
    scheduler.betas = 1 - torch.cat([squared[:1], squared[1:] / squared[:-1]])
    scheduler.alphas_cumprod = (1 - scheduler.betas).cumprod(0)


def only_the_product(scheduler: Any) -> None:
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**1.5


RESET: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "prediction type": (
        diffusers.DDPMScheduler(**SD),
        lambda scheduler: scheduler.register_to_config(prediction_type="v_prediction"),
    ),
    "betas": (diffusers.DDPMScheduler(**SD, prediction_type="v_prediction"), zero_snr_by_hand),
    "betas in place": (diffusers.DDPMScheduler(**SD), lambda scheduler: scheduler.betas.mul_(0.5)),
    "alphas_cumprod": (diffusers.DDPMScheduler(**SD), only_the_product),
    "shift": (diffusers.FlowMatchEulerDiscreteScheduler(), lambda scheduler: scheduler.set_shift(3.0)),
}


@pytest.mark.parametrize(("scheduler", "reset"), RESET.values(), ids=RESET)
@pytest.mark.parametrize("copied", [lambda s: s, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_schedule_follows_the_scheduler_it_was_made_of(scheduler: Any, reset: Any, copied: Any) -> None:
    t = torch.tensor([1, 500, 998])
    for use in (
        lambda schedule: schedule.reverse_step(t, dtype=torch.float64)[:3],
        lambda schedule: (schedule.alpha(t), schedule.sigma(t)),
        lambda schedule: (torch.tensor(schedule.prediction_type == "epsilon"),),
        lambda schedule: schedule.reverse_step(t, 7, dtype=torch.float64),
    ):
        original = copy.deepcopy(scheduler)
        mine, schedule = copied((original, NoiseSchedule.from_scheduler(original)))
        before = schedule.reverse_step(t, dtype=torch.float64)
        reset(mine)
        assert all(map(torch.equal, use(schedule), use(NoiseSchedule.from_scheduler(mine))))
        assert not torch.equal(schedule.reverse_step(t, dtype=torch.float64).B, before.B)


@pytest.mark.parametrize("t", [500, 999])
def test_errors_are_right_when_a_script_sets_the_prediction_type_inside_its_loop(t: int) -> None:
    unet, scheduler = small(), diffusers.DDPMScheduler(**SD)
    arguments = batch(unet, size=1, timesteps=[t])
    ncp = NCP(unet, schedule=scheduler)
    ncp.errors(**arguments)
    abar = oracle.cumulative_alphas((1 - (1 - scheduler.betas.double())).tolist())
    for _ in range(2):
        scheduler.register_to_config(prediction_type="v_prediction")
        names = ("model_pred", "target", "noisy_latents", "timesteps", "variance_noise")
        given = [arguments[name] for name in names]
        text = arguments["encoder_hidden_states"]
        truth = oracle.batch_errors(unet, "down_blocks.1", *given, abar, "v_prediction", text)
        torch.testing.assert_close(ncp.errors(**arguments)[0], truth, rtol=1e-6, atol=0)


def test_a_scheduler_whose_settings_stay_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = diffusers.DDPMScheduler(**SD)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    t = torch.tensor([3])
    schedule.reverse_step(t)
    tables = schedule._tables
    scheduler.register_to_config(prediction_type="epsilon", clip_sample=False)
    scheduler.set_timesteps(20)
    x = torch.empty(1, device="meta")
    scheduler.add_noise(x, x, torch.zeros(1, dtype=torch.int64, device="meta"))
    schedule.reverse_step(t)
    assert schedule._tables is tables


@pytest.mark.parametrize(("first", "then"), [("epsilon", "sample"), ("sample", "epsilon")])
def test_any_other_prediction_type_is_followed(first: str, then: str) -> None:
    scheduler = diffusers.DDPMScheduler(**SD, prediction_type=first)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    scheduler.register_to_config(prediction_type=then)
    assert schedule.prediction_type == then


def test_a_scheduler_that_was_made_in_inference_mode_is_read_like_any_other() -> None:
    with torch.inference_mode():
        scheduler = diffusers.DDPMScheduler(**SD)
    of_it, usual = (NoiseSchedule.from_scheduler(s) for s in (scheduler, diffusers.DDPMScheduler(**SD)))
    for _ in range(2):
        assert torch.equal(of_it.reverse_step(torch.tensor([3])).B, usual.reverse_step(torch.tensor([3])).B)


def test_a_scheduler_that_becomes_another_kind_of_schedule_is_refused() -> None:
    scheduler = diffusers.UniPCMultistepScheduler(**SD)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    scheduler.register_to_config(prediction_type="flow_prediction", flow_shift=3.0)
    with pytest.raises(ValueError, match=r"^schedule must be what it was, a NoiseSchedule; .* a FlowSchedule"):
        schedule.reverse_step(torch.tensor([3]))


def test_flow_schedulers_are_told_by_either_of_their_marks_and_without_the_option_of_dynamic_shifting() -> None:
    of = NoiseSchedule.from_scheduler
    heun = diffusers.FlowMatchHeunDiscreteScheduler(shift=2.0)
    assert not hasattr(heun.config, "use_dynamic_shifting")
    assert (of(heun).prediction_type, of(heun).shift) == ("flow", 2.0)
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    assert of(dynamic).shift == 1.0
    marked = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", flow_shift=3.0)
    assert isinstance(of(marked), FlowSchedule)
    x_0 = diffusers.UniPCMultistepScheduler(prediction_type="sample", use_flow_sigmas=True, flow_shift=3.0)
    assert (of(x_0).prediction_type, of(x_0).shift) == ("sample", 3.0)
    with pytest.raises(ValueError, match=r"^prediction_type must be one of 'flow', 'sample'; it was 'epsilon'"):
        of(diffusers.UniPCMultistepScheduler(use_flow_sigmas=True))


def test_a_flow_is_taken_wherever_a_noise_schedule_is() -> None:
    assert isinstance(FlowSchedule(), NoiseSchedule)
    assert issubclass(FlowSchedule, NoiseSchedule)
    for schedule in (FLOW, NOISE):
        assert NoiseSchedule.from_scheduler(schedule) is FlowSchedule.from_scheduler(schedule) is schedule


def test_a_product_of_alphas_that_is_not_the_betas_is_taken_though_it_is_float32() -> None:
    scheduler = diffusers.DDPMScheduler(**SD)
    assert scheduler.alphas_cumprod.dtype == torch.float32
    fine = NoiseSchedule.from_scheduler(scheduler)
    torch.testing.assert_close(
        fine.alpha(500).square(), (1 - scheduler.betas.double()).cumprod(0)[500], rtol=1e-14, atol=0
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
    squared = NoiseSchedule.from_scheduler(scheduler).alpha(torch.arange(1000)).square()
    torch.testing.assert_close(squared, scheduler.alphas_cumprod.double(), rtol=1e-12, atol=0)


# Flows of models that predict x_0.


@pytest.mark.parametrize("step", [1, 30, 1200, "clean"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_that_predicts_x_0_takes_the_step_of_the_flow_that_it_stands_for(step: Any, shift: float) -> None:
    t = torch.tensor([1000.0, 999.5, 640.0, 3.0], dtype=torch.float64)
    sigma = (t / 1000)[:, None]
    x, flow, target = (normal(4, 6, seed=i) for i in range(3))
    of_flow = FlowSchedule(shift).reverse_step(t, step, dtype=torch.float64)
    of_x_0 = FlowSchedule(shift, prediction_type="sample").reverse_step(t, step, dtype=torch.float64)
    # What trainers call preconditioning: x_0 = x_t - sigma o.
    torch.testing.assert_close(
        of_x_0.latents(x, x - sigma * flow, None), of_flow.latents(x, flow, None), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(
        of_x_0.displacement(x - sigma * flow, x - sigma * target),
        of_flow.displacement(flow, target),
        rtol=1e-9,
        atol=1e-12,
    )


def test_a_flow_that_predicts_x_0_ends_at_it() -> None:
    back = FlowSchedule(prediction_type="sample").reverse_step(torch.tensor([0.0, 500.0]), "clean", dtype=torch.float64)
    x, o = normal(2, 3), normal(2, 3, seed=1)
    assert torch.equal(back.latents(x, o, None), o)


def test_uniform_steps_of_a_flow_draw_the_same_whatever_the_default_dtype() -> None:
    t, draws = torch.full((64,), 900.0), []
    for dtype in (torch.float32, torch.float64, torch.float16):
        torch.set_default_dtype(dtype)
        try:
            generator = torch.Generator().manual_seed(0)
            draws.append(FlowSchedule(3.0).reverse_step(t, "uniform", generator=generator).timesteps)
        finally:
            torch.set_default_dtype(torch.float32)
    assert len(draws[0].unique()) == 64
    assert all(torch.equal(drawn, draws[0]) for drawn in draws)


def test_sigmas_given_for_a_flows_timesteps_are_told_and_small_timesteps_are_not() -> None:
    for sigmas in (torch.tensor([0.25, 1.0]), torch.tensor([0.999])):
        with pytest.raises(ValueError, match=r"^timesteps must be sigma \* 1000, in \[0, 1000\]; .* sigma itself"):
            FlowSchedule().reverse_step(sigmas)
    schedule = FlowSchedule()
    for usual in (torch.tensor([0.25, 3.0]), torch.tensor([0.25]), torch.tensor([0.0, 1.0])):
        schedule.reverse_step(usual)
    for edge in (torch.tensor([0.0]), torch.tensor([1.0])):
        FlowSchedule().reverse_step(edge)
    FlowSchedule(steps=1).reverse_step(torch.tensor([0.25]))


# Latents that are not the model's input.

EULER_LIKE = ["EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "LMSDiscrete"]


@pytest.mark.parametrize("name", EULER_LIKE)
def test_the_add_noise_of_euler_like_schedulers_is_told_until_it_is_scaled(name: str) -> None:
    scheduler = getattr(diffusers, f"{name}Scheduler")(**SD)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    t = scheduler.timesteps[:1]
    x = scheduler.add_noise(2 * normal(1, 4, 8, 8), normal(1, 4, 8, 8, seed=1), t)
    with pytest.raises(ValueError, match=r"^noisy_latents must be as the model gets them.*scale_model_input"):
        check_noisy(schedule, x, t)
    check_noisy(schedule, scheduler.scale_model_input(x, t[0]), t)


@pytest.mark.parametrize("schedule", [NoiseSchedule(BETAS), FlowSchedule()], ids=["noise", "flow"])
@given(scale=st.floats(0.0, 6.0), t=st.integers(0, 999), seed=st.integers(0, 99))
def test_latents_as_the_model_gets_them_are_never_told(schedule: Any, scale: float, t: int, seed: int) -> None:
    at = torch.tensor([t])
    x_0, noise = scale * normal(1, 4, 4, 4, seed=seed), normal(1, 4, 4, 4, seed=seed + 1)
    check_noisy(schedule, schedule.alpha(at) * x_0 + schedule.sigma(at) * noise, at)


@pytest.mark.parametrize("elements", [1, 2, 4, 16])
def test_noise_of_few_elements_is_never_told_and_scaled_by_a_sampler_it_is(elements: int) -> None:
    """The mean square of few elements is often above 4."""
    schedule, at, noise = NoiseSchedule(BETAS), torch.full((20_000,), 999), normal(20_000, elements)
    assert noise.square().mean(1).max() > 2
    check_noisy(schedule, noise, at)
    with pytest.raises(ValueError, match=r"^noisy_latents must be as the model gets them"):
        check_noisy(schedule, noise / schedule.alpha(at)[:, None], at)


# One sample that owns its batch.


def test_a_schedule_on_which_one_sample_owns_its_batch_says_so_with_the_number() -> None:
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    with pytest.warns(UserWarning, match=r"timestep 999 the reverse step's B is 7111 times the median\.") as told:
        NoiseSchedule.from_scheduler(scheduler)
    assert [warning.filename for warning in told] == [__file__]
    with pytest.warns(UserWarning, match=r"timestep 1 the reverse step's B is \d+ times the median"):
        FlowSchedule(prediction_type="sample")
    with pytest.warns(UserWarning, match=r"timestep 1000 the reverse step's B is \d+ times the median"):
        FlowSchedule(shift=0.001)  # the last timestep is the steepest, and the last that is looked at


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "sigmoid", "squaredcos_cap_v2"])
def test_usual_schedules_say_nothing(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("epsilon", "v_prediction")[name == "squaredcos_cap_v2" :]:
            NoiseSchedule.from_scheduler(diffusers.DDPMScheduler(beta_schedule=name, prediction_type=kind))
        for shift in (0.5, 1.0, 3.0, 7.0):
            FlowSchedule(shift)


# Wrong things, given directly.

INF, NAN, ONE = float("inf"), float("nan"), torch.tensor([1])
NOISE, FLOW = NoiseSchedule(BETAS), FlowSchedule()
NOT_NUMBERS = [True, "1", None, [1.0], torch.ones(2), torch.ones((), device="meta"), Decimal(1), 1j, object()]
NOT_FINITE = [INF, -INF, NAN, 10**400, torch.tensor(INF)]
WRONG_TIMES = [torch.tensor([True]), torch.ones(1) * 1j, torch.ones(1).to(torch.float8_e4m3fn)]
WRONG_TIMES += [torch.ones(1, dtype=torch.uint16), torch.ones(1).to_sparse(), "x", None, torch.tensor([NAN])]
WRONG_TIMES += [torch.tensor([INF]), torch.tensor([-2]), torch.tensor([1001])]


@pytest.mark.parametrize("method", ["alpha", "sigma", "reverse_step"])
@pytest.mark.parametrize("schedule", [NOISE, FLOW], ids=["noise", "flow"])
def test_timesteps_of_the_wrong_type_or_out_of_range_are_refused_by_every_method(schedule: Any, method: str) -> None:
    for t in WRONG_TIMES:
        with pytest.raises((ValueError, TypeError), match=r"^timesteps must be .*; it was "):
            getattr(schedule, method)(t)


@pytest.mark.parametrize("t", [torch.tensor([[1, 2]]), torch.tensor(1), torch.tensor([1, 2, 3])])
def test_a_batch_of_pairs_is_one_dimensional_and_even(t: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"^timesteps must be an even batch, \(2B,\): winners .*; it was shaped"):
        NOISE.reverse_step(t, "uniform", pairs=True)
    if t.ndim != 1:
        with pytest.raises(ValueError, match=r"^timesteps must be of shape \(B,\); it was shaped \("):
            NOISE.reverse_step(t)


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_a_flow_is_not_shifted_by_nothing_or_less(shift: float) -> None:
    with pytest.raises(ValueError, match=rf"^shift must be a positive number; it was {shift}$"):
        FlowSchedule(shift)


def test_betas_so_small_that_they_do_nothing_are_refused() -> None:
    for betas in ([1e-20], [0.1, 1e-17]):
        with pytest.raises(ValueError, match=r"^betas must be .* none so small that 1 - beta = 1; it was of shape"):
            NoiseSchedule(betas)


@pytest.mark.parametrize(
    "product", [torch.full((1000,), NAN), torch.full((1000,), INF), torch.ones(999), torch.ones(())]
)
def test_a_schedulers_product_of_alphas_that_is_none_is_refused_by_name(product: torch.Tensor) -> None:
    scheduler = diffusers.DDPMScheduler(**SD)
    scheduler.alphas_cumprod = product
    with pytest.raises(ValueError, match=r"^schedule must be a scheduler with 1000 finite `alphas_cumprod`"):
        NoiseSchedule.from_scheduler(scheduler)


def test_timesteps_may_be_numbers_and_lists_where_values_are_asked_for() -> None:
    t = torch.tensor([0, 500, 999])
    assert torch.equal(NOISE.sigma(500), NOISE.sigma(t)[1])
    assert torch.equal(NOISE.alpha([0, 500, 999]), NOISE.alpha(t))
    assert NOISE.alpha(-1) == 1
    assert NOISE.sigma(-1) == 0
    assert FLOW.sigma(500) == FLOW.alpha(500.0) == 0.5
    with torch.device("meta"):
        assert NOISE.sigma(500).device.type == FLOW.sigma(500).device.type == "cpu"


def test_the_clean_end_is_below_the_first_timestep_and_of_a_flow_at_0() -> None:
    for schedule, end in ((NOISE, -1), (FLOW, 0)):
        assert (schedule.alpha(end), schedule.sigma(end)) == (1, 0)
        for values in (schedule.alpha, schedule.sigma):
            with pytest.raises(ValueError, match=rf"^timesteps must be in \[{end}, 1000[)\]]; it was in \[{end - 1}, "):
                values(torch.tensor([end - 1]))


@pytest.mark.parametrize("step", [1, 7, "uniform", "clean"])
@pytest.mark.parametrize("pairs", [False, True])
def test_z_is_drawn_once_for_each_pair_and_only_for_a_step_that_has_a_random_part(step: Any, pairs: bool) -> None:
    latents, generator = normal(4, 3, 2), torch.Generator().manual_seed(5)
    assert draw_noise(FLOW, step, latents, generator, pairs) is None
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(5).get_state())
    z, state = draw_noise(NOISE, step, latents, generator, pairs), generator.get_state()
    assert draw_noise(NOISE, step, latents, None, pairs) is None
    if isinstance(step, str):
        assert z is None
        assert torch.equal(state, torch.Generator().manual_seed(5).get_state())
    elif pairs:
        assert torch.equal(z, normal(2, 3, 2, seed=5).repeat(2, 1, 1))
    else:
        assert torch.equal(z, normal(4, 3, 2, seed=5))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16])
def test_small_dtypes_of_timesteps_neither_wrap_around_nor_round_the_next_timestep(dtype: torch.dtype) -> None:
    large = torch.tensor([800, 512]) if dtype.itemsize > 1 else torch.tensor([127, 64])  # bf16 holds no 799 and no 511
    t = torch.cat([torch.tensor([0, 1, 100]), large])
    for schedule in (NOISE, FLOW):
        for step in (1, 7, "clean", "uniform"):
            torch.manual_seed(0)
            narrow = schedule.reverse_step(t.to(dtype), step)
            torch.manual_seed(0)
            wide = schedule.reverse_step(t.to(torch.float64 if dtype.is_floating_point else torch.int64), step)
            assert torch.equal(narrow.B, wide.B)
            torch.testing.assert_close(narrow.timesteps.double(), wide.timesteps.double(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("schedule", [NOISE, FLOW], ids=["noise", "flow"])
def test_three_pairs_draw_three_steps(schedule: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = schedule.reverse_step(torch.full((6,), 900), "uniform", generator=generator, pairs=True).timesteps
    assert torch.equal(drawn[:3], drawn[3:])
    assert len(drawn.unique()) == 3


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.int64, "float32"])
def test_coefficients_have_sixteen_bits_or_more(dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"^dtype must be a floating-point torch.dtype of 16 bits or more; it was"):
        NOISE.reverse_step(ONE, dtype=dtype)


def test_a_schedule_shows_what_it_was_made_of() -> None:
    assert repr(NOISE) == "NoiseSchedule(1000 steps, prediction_type='epsilon')"
    assert repr(FlowSchedule(3.0, 50)) == "FlowSchedule(shift=3.0, steps=50)"
    of_x_0 = FlowSchedule(steps=50, prediction_type="sample")
    assert repr(of_x_0) == "FlowSchedule(shift=1.0, steps=50, prediction_type='sample')"


# The checks that every file uses.


@pytest.mark.parametrize(
    "value", [*NOT_NUMBERS, *NOT_FINITE, 0, -1.0], ids=lambda value: repr(value).partition(" at 0x")[0]
)
def test_what_is_no_finite_number_that_fits_is_refused_by_name(value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"^beta must be a positive number; it was \S"):
        check_number("beta", value)


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int64(2), Fraction(2), torch.tensor(2), torch.tensor(2.0)])
def test_a_finite_number_of_any_make_is_taken_for_what_it_is(value: Any) -> None:
    assert type(check_number("beta", value)) is float
    assert check_number("beta", value) == 2.0
    with pytest.raises(ValueError, match=r"^x must be less than one; it was "):
        check_number("x", value, "less than one", lambda x: x < 1)


def test_a_number_is_checked_under_a_compiler_too() -> None:
    def doubled(x: torch.Tensor, beta: float) -> torch.Tensor:
        return x * check_number("beta", beta)

    whole = torch.compile(doubled, fullgraph=True, backend="eager")
    for beta in (2.0, 3.0, 4):
        assert torch.equal(whole(torch.ones(2), beta), torch.full((2,), float(beta)))
    torch.compiler.reset()


def test_what_both_members_of_a_pair_share_may_be_nan_in_both_but_not_in_one() -> None:
    shared = torch.tensor([NAN, 1.0, INF, NAN, 1.0, INF])
    check_pairs({"target": shared, "timesteps": torch.tensor([5, 6, 5, 6]), "nothing": None})
    for other in (torch.tensor([NAN, 1.0, 0.0, 1.0]), torch.tensor([INF, 1.0, NAN, 1.0]), torch.tensor([1, 2])):
        with pytest.raises(ValueError, match=r"^target must be the same for both members of a pair"):
            check_pairs({"target": other})


@pytest.mark.parametrize("shape", [(2, 4, 8), (2, 4, 8, 8, 8), (2, 4), (2,)])
def test_latents_of_another_rank_are_refused_though_channels_agree(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape("noisy_latents must be shaped (B, 4, H, W)")):
        check_latents("noisy_latents", torch.ones(shape), 4, False)


STRANGE = {
    "sparse": torch.ones(2, 4, 4, 4).to_sparse(),
    "nested": torch.nested.nested_tensor([torch.ones(4, 4, 4)] * 2, layout=torch.jagged),
    "nested, strided": torch.nested.nested_tensor([torch.ones(4, 4, 4)] * 2),
    "float8": torch.ones(2, 4, 4, 4).to(torch.float8_e5m2),
    "quantized": torch.quantize_per_tensor(torch.ones(2, 4, 4, 4), 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize("value", STRANGE.values(), ids=STRANGE)
def test_tensors_that_are_not_dense_or_have_too_few_bits_are_refused_by_name(value: torch.Tensor) -> None:
    with pytest.raises(TypeError, match=r"^noisy_latents must be a (dense|floating-point) tensor"):
        check_latents("noisy_latents", value, 4, False)


def test_a_generator_is_one_or_none() -> None:
    check_generator(None), check_generator(torch.Generator())
    with pytest.raises(TypeError, match=r"^generator must be a torch.Generator or None; it was 5$"):
        check_generator(5)


def test_a_product_that_was_edited_where_it_is_small_counts() -> None:
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    product = scheduler.alphas_cumprod
    product.mul_(torch.linspace(1, 0.9, len(product)))
    schedule = NoiseSchedule.from_scheduler(scheduler)
    torch.testing.assert_close(schedule.alpha(torch.arange(1000)).square().float(), product, rtol=1e-5, atol=0)
    scheduler.alphas_cumprod[-1] = 1e-3  # more signal than a step before
    with pytest.raises(
        ValueError, match=r"^schedule must be a scheduler with good betas; it was DDPMScheduler: betas must"
    ):
        NoiseSchedule.from_scheduler(scheduler)


def test_a_last_product_that_samplers_write_in_place_of_0_is_no_edit() -> None:
    options = SD | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    for kind in (diffusers.EulerDiscreteScheduler, diffusers.DDIMScheduler):
        assert NoiseSchedule.from_scheduler(kind(**options)).alpha(torch.tensor([999])) == 0


def test_betas_of_two_dimensions_are_refused_whatever_a_schedulers_product_is() -> None:
    scheduler = diffusers.DDPMScheduler(**SD)
    scheduler.betas = scheduler.betas.reshape(2, 500)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.reshape(2, 500)
    wrong = (
        r"^schedule must be a scheduler with good betas; it was DDPMScheduler: betas must be a 1-D .*shape \(2, 500\)"
    )
    with pytest.raises(ValueError, match=wrong):
        NoiseSchedule.from_scheduler(scheduler)
