"""schedule: the reverse step x_t -> x_t', which is affine in the prediction: x_t'(o) = A x_t + B o + s z."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from .checks import bad, check_choice, check_positive, check_timesteps

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
Step = int | Literal["uniform", "clean"]
F = TypeVar("F", bound=Callable[..., Any])


def constant_to_compilers(function: F) -> F:
    """``torch.compiler.assume_constant_result``, which would import the compiler with the library."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def per_sample(coefficient: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1), so that one number per sample multiplies a batch shaped like ``like``."""
    return coefficient.reshape(-1, *[1] * (like.ndim - 1))


class ReverseStep(NamedTuple):
    """The coefficients of ``x_t'(o) = A x_t + B o + s z`` and the timestep t' at which features are taken, all (B,)."""

    A: Tensor
    B: Tensor
    s: Tensor
    timesteps: Tensor

    def latents(self, noisy_latents: Tensor, output: Tensor, variance_noise: Tensor | None) -> Tensor:
        """x_t'(output), in the precision of the coefficients; ``variance_noise=None`` is z = 0."""
        x = per_sample(self.A, noisy_latents) * noisy_latents + per_sample(self.B, output) * output
        return x if variance_noise is None else x + per_sample(self.s, variance_noise) * variance_noise

    def displacement(self, output: Tensor, target: Tensor) -> Tensor:
        """x_t'(output) - x_t'(target) = B (output - target), free of the cancellation of taking the difference."""
        return per_sample(self.B, output) * (output.to(self.B.dtype) - target)


class NoiseSchedule:
    r"""A variance-preserving noise schedule: ``x_t = alpha(t) x_0 + sigma(t) eps`` (paper, eq. 1).

    ``alpha(t) = sqrt(prod_{i<=t} (1 - beta_i))`` and ``sigma(t) = sqrt(1 - alpha(t)^2)``, in float64.

    Args:
        betas: T variances, each in (0, 1]; the last may be 1 (zero terminal SNR) unless the model predicts epsilon.
        prediction_type: what the model outputs: "epsilon" (noise), "v_prediction" (velocity) or "sample" (x_0).

    Raises:
        ValueError: betas out of range, an unknown prediction type, or epsilon with zero terminal SNR.

    >>> schedule = NoiseSchedule.from_scheduler(None)  # Stable Diffusion's own
    >>> len(schedule), round(schedule.alpha(torch.tensor(999)).item(), 4)
    (1000, 0.0683)
    """

    _whole = True  # timesteps are whole numbers, for which coefficients can stand in tables

    def __init__(self, betas: Tensor | Sequence[float], prediction_type: str = "epsilon") -> None:
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        b = torch.as_tensor(betas, dtype=torch.float64, device="cpu").detach()
        if b.ndim != 1 or len(b) == 0 or not bool(((b > 0) & (b <= 1)).all()):
            raise bad("betas", "a 1-D sequence of values in (0, 1]", f"of shape {tuple(b.shape)}, {b}")
        squared = torch.cumprod(1 - b, 0)
        if prediction_type == "epsilon" and squared[-1] == 0:
            must_be = "'v_prediction' or 'sample' for a schedule with zero terminal SNR"
            raise bad("prediction_type", f"{must_be} (where alpha = 0, noise tells no x_0)", "'epsilon'")
        self.prediction_type = prediction_type
        # The extra last row is the clean end, alpha = 1 and sigma = 0: the place of every t' < 0, index -1.
        self._alpha = torch.cat([squared.sqrt(), squared.new_ones(1)])
        self._sigma = torch.cat([(1 - squared).sqrt(), squared.new_zeros(1)])
        # What has been moved to a device: alpha and sigma, and the coefficients of a step.
        self._moved: dict[Any, tuple[Tensor, ...]] = {}

    @classmethod
    def from_scheduler(cls, scheduler: Any = None) -> NoiseSchedule:
        """The schedule of a diffusers scheduler (DDPM, DDIM, PNDM, Euler, DPM++, ...): its betas and prediction type.

        The betas are accumulated anew in float64: a scheduler's own ``alphas_cumprod`` is float32, and B, a small
        difference of such numbers, would keep three or four digits of it. That is taken only where it is not the betas'
        product (CogVideoX). None is Stable Diffusion's schedule: 1000 steps,
        ``beta = linspace(sqrt(0.00085), sqrt(0.012))^2``, epsilon. A flow-matching scheduler gives a
        :class:`FlowSchedule` with its shift.

        Raises:
            TypeError: the scheduler has neither betas nor a shift, or runs from data to noise.
        """
        if scheduler is None:
            return cls(torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64, device="cpu").square())
        if isinstance(scheduler, NoiseSchedule):
            return scheduler
        config: Any = getattr(scheduler, "config", None)
        betas = getattr(scheduler, "betas", None)
        flows = getattr(config, "use_flow_sigmas", False) or getattr(config, "prediction_type", "") == "flow_prediction"
        if isinstance(betas, Tensor) and not flows:
            betas, product = betas.to("cpu", torch.float64), getattr(scheduler, "alphas_cumprod", None)
            if isinstance(product, Tensor) and not product.is_meta:  # add_noise moves it to where the samples are
                product = product.to("cpu", torch.float64)
                if (torch.cumprod(1 - betas, 0) - product).abs().max() > 1e-5:
                    betas = 1 - product / torch.cat([product.new_ones(1), product[:-1]])
            return cls(betas, getattr(config, "prediction_type", "epsilon"))
        given = getattr(scheduler, "_shift", getattr(config, "shift", None))  # by set_shift, or at construction
        shift = getattr(config, "flow_shift", None) if flows else given
        inverted = getattr(config, "invert_sigmas", False)
        if shift is None or inverted or not hasattr(config, "num_train_timesteps"):
            must_be = "a NoiseSchedule, a diffusers scheduler that has `betas` or a flow's `shift`, or None"
            raise bad("schedule", must_be, type(scheduler).__name__, TypeError)
        dynamic = getattr(config, "use_dynamic_shifting", False)  # by the image's size, and only in sampling
        return FlowSchedule(1.0 if dynamic else shift, config.num_train_timesteps)

    def __len__(self) -> int:
        return len(self._alpha) - 1

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} steps, prediction_type={self.prediction_type!r})"

    def alpha(self, timesteps: Tensor) -> Tensor:
        """The signal's scale at ``timesteps``, any shape, float64."""
        return self._at(0, timesteps)

    def sigma(self, timesteps: Tensor) -> Tensor:
        """The noise's scale at ``timesteps``, any shape, float64."""
        return self._at(1, timesteps)

    def next_timesteps(self, timesteps: Tensor, step: Step, generator: torch.Generator | None = None) -> Tensor:
        """t' for t: ``t - step``; -1, the clean end, past the last step and for "clean"; one of T for "uniform"."""
        if step == "clean":
            return torch.full_like(timesteps, -1)
        if step == "uniform":
            device = timesteps.device if generator is None else generator.device
            drawn = torch.randint(len(self), timesteps.shape, generator=generator, device=device)
            return drawn.to(timesteps.device)
        return (timesteps - step).clamp(min=-1)

    def reverse_step(
        self,
        timesteps: Tensor,
        step: Step = 1,
        *,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
        pairs: bool = False,
    ) -> ReverseStep:
        r"""The coefficients of one reverse step from t to t', in ``dtype``.

        With ``x_0`` and ``eps`` the affine estimates that the prediction gives,
        ``x_t' = alpha' x_0 + sqrt(sigma'^2 - s^2) eps + s z`` and
        ``s = eta (sigma'/sigma) sqrt(1 - alpha^2/alpha'^2)``:
        eta = 1, the DDPM posterior, for ``step=k`` (paper, eq. 2 and 12); eta = 0, DDIM, for "uniform" and "clean".

        Args:
            timesteps: (B,) integers in [0, T), int64 or float; of a flow, any number in [0, T].
            step: k >= 1, "uniform" or "clean".
            dtype: of the coefficients, which are computed in float64 whatever it is.
            generator: draws t' for "uniform".
            pairs: the second half of the batch shares its draws of t' with the first.
        """
        check_timesteps(timesteps, len(self), self._whole)
        t = timesteps.long() if self._whole else timesteps
        if step == "uniform" and pairs:
            after = self.next_timesteps(t[: len(t) // 2], step, generator).repeat(2)
        else:
            after = self.next_timesteps(t, step, generator)
        if self._whole and step != "uniform":
            A, B, s = (table[t] for table in _tables(self, step, t.device, dtype))
        else:
            A, B, s = (c.to(dtype) for c in self._coefficients(t, after, step))
        kept = timesteps.dtype if self._whole or timesteps.is_floating_point() else torch.float32
        return ReverseStep(A, B, s, after.clamp(min=0).to(kept))

    def _at(self, which: int, timesteps: Tensor) -> Tensor:
        """alpha or sigma, moved to a device once; float32 on the one backend that has no float64."""
        t = timesteps if isinstance(timesteps, Tensor) else torch.as_tensor(timesteps)
        dtype = torch.float32 if t.device.type == "mps" else torch.float64
        return _tables(self, None, t.device, dtype)[which][t.long()]

    def _coefficients(self, t: Tensor, after: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """A, B and s of the step from ``t`` to ``after``, in float64."""
        alpha, sigma, alpha_, sigma_ = self.alpha(t), self.sigma(t), self.alpha(after), self.sigma(after)
        one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
        posterior = isinstance(step, int)  # eta = 1
        s = (sigma_ / sigma) * (1 - (alpha / alpha_).square()).clamp(min=0).sqrt() if posterior else zero
        noise = (sigma_.square() - s.square()).clamp(min=0).sqrt()
        # The estimates of x_0 and eps, each as (factor of x_t, factor of the prediction).
        x_0, eps = {
            "epsilon": ((1 / alpha, -sigma / alpha), (zero, one)),
            "v_prediction": ((alpha, -sigma), (sigma, alpha)),
            "sample": ((zero, one), (1 / sigma, -alpha / sigma)),
        }[self.prediction_type]
        A, B = (alpha_ * of_signal + noise * of_noise for of_signal, of_noise in zip(x_0, eps, strict=True))
        return A, B, s


# A compiler takes the tables as constants, so that filling the cache on the first call is no reason to compile a second
# time. It watches for another schedule by this function's argument; of a method it would not watch the owner.
@constant_to_compilers
def _tables(schedule: NoiseSchedule, step: Step | None, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """A, B and s of ``step``, or alpha and sigma, for every t: from float64 on the host, once per device and dtype."""
    key = (step, device, dtype)
    if key in schedule._moved:
        return schedule._moved[key]
    tables: tuple[Tensor, ...] = (schedule._alpha, schedule._sigma)
    if step is not None:
        t = torch.arange(len(schedule), device="cpu")
        tables = schedule._coefficients(t, schedule.next_timesteps(t, step), step)
    tables = tuple(table.to(device, dtype) for table in tables)
    if all(type(table) is Tensor for table in tables):  # what a tracer made belongs to its trace
        schedule._moved[key] = tables
    return tables


class FlowSchedule(NoiseSchedule):
    r"""A flow-matching schedule: ``x_t = (1 - sigma) x_0 + sigma eps``; the model predicts ``eps - x_0``, "flow".

    A timestep is ``sigma * steps``, a float in (0, steps], on the grid or between its points, as trainers of SD 3, Flux
    and their kin hold it. The grid is uniform in u, ``sigma = shift u / (1 + (shift - 1) u)``; step=k goes from u to
    ``u - k / steps``: ``x_t' = x_t + (sigma' - sigma) o``, the Euler step, with nothing random in it (eta = 0).

    Args:
        shift: of the sigmas, as in FlowMatchEulerDiscreteScheduler; 1 where shifting is dynamic.
        steps: T, the scale of the timesteps.

    Raises:
        ValueError: a shift that is not positive, no steps.

    >>> schedule = FlowSchedule(shift=3.0)
    >>> schedule.reverse_step(torch.tensor([750.0])).timesteps  # u = 0.5, then 0.499
    tensor([749.2493])
    """

    _whole = False

    def __init__(self, shift: float = 1.0, steps: int = 1000) -> None:
        check_positive("shift", shift)
        check_positive("steps", steps)
        self.prediction_type = "flow"
        self.shift, self.steps = float(shift), int(steps)

    def __len__(self) -> int:
        return self.steps

    def __repr__(self) -> str:
        return f"FlowSchedule(shift={self.shift}, steps={self.steps})"

    def alpha(self, timesteps: Tensor) -> Tensor:
        """The signal's scale, 1 - sigma."""
        return 1 - self.sigma(timesteps)

    def sigma(self, timesteps: Tensor) -> Tensor:
        """The noise's scale at ``timesteps``, any shape, float64."""
        t = timesteps if isinstance(timesteps, Tensor) else torch.as_tensor(timesteps)
        return t.to(torch.float32 if t.device.type == "mps" else torch.float64) / self.steps

    def next_timesteps(self, timesteps: Tensor, step: Step, generator: torch.Generator | None = None) -> Tensor:
        """t' for t: ``step`` grid points below; 0, the clean end, past the last and at "clean"; drawn for "uniform"."""
        sigma = self.sigma(timesteps)
        if step == "clean":
            return torch.zeros_like(sigma)
        if step == "uniform":
            device = sigma.device if generator is None else generator.device
            u = torch.rand(sigma.shape, generator=generator, device=device).to(sigma)
        else:
            u = (sigma / (self.shift - (self.shift - 1) * sigma) - step / self.steps).clamp(min=0)
        return self.steps * self.shift * u / (1 + (self.shift - 1) * u)

    def _coefficients(self, t: Tensor, after: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """A = 1, ``B = sigma' - sigma``, s = 0."""
        B = self.sigma(after) - self.sigma(t)
        return torch.ones_like(B), B, torch.zeros_like(B)
