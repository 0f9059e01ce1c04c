"""schedule: the reverse step x_t -> x_t', which is affine in the prediction o: x_t'(o) = A x_t + B o + s z."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .checks import (
    bad,
    check_choice,
    check_count,
    check_flag,
    check_floating,
    check_generator,
    check_number,
    check_timesteps,
    values_are_free,
)
from .tensors import constant_to_compilers, per_sample, widest

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
FLOW_PREDICTION_TYPES = ("flow", "sample")
Step = int | Literal["uniform", "clean"]
Tensors = tuple[Tensor, ...]


def check_step(step: object) -> None:
    check_count("step", step, "a positive int, 'uniform' or 'clean'", "uniform", "clean")


class ReverseStep(NamedTuple):
    """The coefficients of ``x_t'(o) = A x_t + B o + s z``, and the timestep t' at which features are taken.

    Each is (B,), one number for each sample. o is a prediction and z the step's random noise.
    """

    A: Tensor
    B: Tensor
    s: Tensor
    timesteps: Tensor

    def latents(self, noisy_latents: Tensor, output: Tensor, variance_noise: Tensor | None) -> Tensor:
        """``x_t'(output)``, in the precision of the coefficients. ``variance_noise`` is z; None stands for z = 0."""
        x = per_sample(self.A, noisy_latents) * noisy_latents + per_sample(self.B, output) * output
        return x if variance_noise is None else x + per_sample(self.s, variance_noise) * variance_noise

    def displacement(self, output: Tensor, target: Tensor) -> Tensor:
        """``x_t'(output) - x_t'(target) = B (output - target)``, which loses no digits to cancellation."""
        return per_sample(self.B, output) * (output.to(self.B.dtype) - target)


class _Settings(NamedTuple):
    """What a schedule reads of a diffusers scheduler. Two readings are compared to see if the scheduler changed."""

    betas: Any
    alphas_cumprod: Tensor | None  # None while it is on another device: the scheduler's add_noise moves it there
    versions: tuple[int, int]  # of the two tensors, which count what is written into them in place
    prediction_type: str
    flows: bool
    shift: float | None
    steps: int | None

    @classmethod
    def of(cls, scheduler: Any) -> _Settings:
        config: Any = getattr(scheduler, "config", None)
        betas, product = getattr(scheduler, "betas", None), getattr(scheduler, "alphas_cumprod", None)
        product = product if isinstance(product, Tensor) and product.device.type == "cpu" else None
        versions = _version(betas), _version(product)
        prediction_type = getattr(config, "prediction_type", None)
        of_flow = isinstance(prediction_type, str) and prediction_type == "flow_prediction"
        # UniPC, DPM++ and their like have betas too, and say by an option that they run along a flow.
        flows = getattr(config, "use_flow_sigmas", False) or of_flow
        # `set_shift` writes to `_shift`, and leaves the configuration as it was.
        given = getattr(scheduler, "_shift", getattr(config, "shift", None))
        shift = getattr(config, "flow_shift", None) if flows else given
        if shift is not None and getattr(config, "use_dynamic_shifting", False):
            shift = 1.0  # the shift then depends on the image's size, and is used in sampling only
        if getattr(config, "invert_sigmas", False):
            shift = None  # from_scheduler refuses it: time runs from data to noise
        flows = flows or not isinstance(betas, Tensor)
        if of_flow or prediction_type is None:
            prediction_type = "flow" if flows else "epsilon"
        return cls(
            betas, product, versions, prediction_type, flows, shift, getattr(config, "num_train_timesteps", None)
        )

    def differ(self, now: _Settings) -> bool:
        """Whether the scheduler's settings have changed. A product that is on a device now is not compared."""
        of_betas = self.betas is not now.betas or self.versions[0] != now.versions[0]
        same_product = self.alphas_cumprod is now.alphas_cumprod and self.versions[1] == now.versions[1]
        return of_betas or self[3:] != now[3:] or not (same_product or now.alphas_cumprod is None)


def _version(tensor: object) -> int:
    return tensor._version if isinstance(tensor, Tensor) and not tensor.is_inference() else 0


def _checked_betas(betas: Tensor | Sequence[float]) -> Tensor:
    """Betas in float64 on the host, of which a product can be made."""
    must_be = "a 1-D sequence of values in (0, 1], none so small that 1 - beta = 1"
    if isinstance(betas, Tensor):
        check_floating("betas", betas)
    try:
        b = torch.as_tensor(betas, dtype=torch.float64, device="cpu").detach()
        good = b.ndim == 1 and len(b) > 0 and bool(((1 - b < 1) & (b <= 1)).all())
    except (TypeError, ValueError, RuntimeError, OverflowError):  # text, a ragged list, values that are not there
        raise bad("betas", must_be, type(betas).__name__, TypeError) from None
    if not good:
        span = f" from {b.min().item():g} to {b.max().item():g}" if b.numel() else ""
        raise bad("betas", must_be, f"of shape {tuple(b.shape)}, with values{span}")
    return b


def _betas(scheduler: Any) -> Tensor:
    """A scheduler's betas, or those that belong to its ``alphas_cumprod`` where this is not the betas' product."""
    betas, product = check_floating("schedule.betas", scheduler.betas), getattr(scheduler, "alphas_cumprod", None)
    if betas.ndim == 1 and not betas.is_meta and product is not None and not getattr(product, "is_meta", False):
        product = check_floating("schedule.alphas_cumprod", product).to("cpu", torch.float64)
        betas = betas.to("cpu", torch.float64)
        if product.shape != betas.shape or not product.isfinite().all():
            must_be = f"a scheduler with {len(betas)} finite `alphas_cumprod`, one for each of its `betas`"
            raise bad("schedule", must_be, f"{type(scheduler).__name__} with {product}")
        # float32's rounding is no edit, and neither is the 2**-24 that samplers write in place of a last 0.
        if ((torch.cumprod(1 - betas, 0) - product).abs() > 1e-3 * product + 1e-7).any():
            betas = 1 - product / torch.cat([product.new_ones(1), product[:-1]])
    return betas


class Schedule(ABC):
    """What all schedules share: alpha and sigma at a timestep, and the affine reverse step from t to an earlier t'.

    A kind of schedule says what alpha and sigma are, which timestep follows which, and what the step's coefficients
    are, all in float64.
    """

    steps: int  # T, the number of timesteps in training
    _whole: bool  # whether timesteps are whole numbers, in [0, T), or any number in [0, T]
    _clean_end: int  # the timestep at which alpha = 1 and sigma = 0
    # The diffusers scheduler that the schedule was read from, and what was read of it.
    _scheduler: Any = None
    _read: _Settings | None = None

    def __init__(self, prediction_type: str, choices: Sequence[str]) -> None:
        check_choice("prediction_type", prediction_type, choices)
        self._prediction_type = prediction_type

    @abstractmethod
    def _scales(self, t: Tensor) -> Tensors:
        """alpha and sigma at ``t``."""

    @abstractmethod
    def _after(self, t: Tensor, step: Step, generator: torch.Generator | None) -> Tensor:
        """t' for t: k steps before t for ``step=k``, and the clean end if there are fewer or for "clean"."""

    @abstractmethod
    def _coefficients(self, t: Tensor, after: Tensor, step: Step) -> Tensors:
        """A, B and s of the step from ``t`` to ``after``."""

    @staticmethod
    def from_scheduler(scheduler: Any = None) -> NoiseSchedule:
        """The schedule of a diffusers scheduler (DDPM, DDIM, PNDM, Euler, DPM++, ...).

        A scheduler with betas gives a :class:`NoiseSchedule` with these betas and its prediction type. A flow-matching
        scheduler gives a :class:`FlowSchedule` with its shift. None gives Stable Diffusion's schedule: 1000 steps,
        ``beta = linspace(sqrt(0.00085), sqrt(0.012))^2``, epsilon. A schedule is returned as it is.

        The product of ``1 - beta`` is computed in float64. A scheduler's own ``alphas_cumprod`` is float32, and B is a
        small difference of such numbers, which would have only three or four correct digits. ``alphas_cumprod`` is
        used only if it is not the product of the betas, as in CogVideoX.

        The schedule keeps the scheduler. If the scheduler's betas, prediction type or shift change, so do its own.

        Raises:
            TypeError: the scheduler has neither betas nor a shift, or runs from data to noise.
            ValueError: its ``alphas_cumprod`` is not finite, or its settings make no schedule.
        """
        if scheduler is None:
            betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64, device="cpu").square()
            return NoiseSchedule(betas)
        if isinstance(scheduler, NoiseSchedule):
            return scheduler
        read = _Settings.of(scheduler)
        if read.flows and (read.shift is None or read.steps is None):
            must_be = "a NoiseSchedule, a diffusers scheduler that has `betas` or a flow's `shift`, or None"
            raise bad("schedule", must_be, type(scheduler).__name__, TypeError)
        if read.flows:
            schedule: NoiseSchedule = FlowSchedule(read.shift, read.steps, read.prediction_type)  # type: ignore[assignment, arg-type]
        else:
            betas = _betas(scheduler)
            try:
                betas = _checked_betas(betas)
            except ValueError as error:
                raise bad("schedule", "a scheduler with good betas", f"{type(scheduler).__name__}: {error}") from None
            schedule = NoiseSchedule(betas, read.prediction_type)
        schedule._scheduler, schedule._read = scheduler, read
        return schedule

    def __len__(self) -> int:
        return self.steps

    @property
    def prediction_type(self) -> str:
        """What the model outputs. If the schedule was read from a scheduler, this is what the scheduler says now."""
        self._follow()
        return self._prediction_type

    def _follow(self) -> None:
        """Read the scheduler again if its settings have changed, as training scripts change them inside their loop."""
        if torch.compiler.is_compiling() or self._read is None:
            return
        if self._read.differ(_Settings.of(self._scheduler)):
            now = NoiseSchedule.from_scheduler(self._scheduler)
            if type(now) is not type(self):
                raise bad("schedule", f"what it was, a {type(self).__name__}", f"changed to a {type(now).__name__}")
            vars(self).update(vars(now))

    def alpha(self, timesteps: Tensor) -> Tensor:
        """The scale of the signal: alpha in ``x_t = alpha(t) x_0 + sigma(t) eps``.

        Args:
            timesteps: t, of any shape, whole numbers in [-1, T). -1 is the clean end, where alpha = 1 and sigma = 0.
                For a flow these are any numbers in [0, T], and 0 is the clean end.

        Returns:
            alpha, shaped like ``timesteps``, in float64.

        Raises:
            ValueError, TypeError: timesteps of the wrong dtype or out of range.
        """
        return self._scales(self._checked(timesteps, self._clean_end))[0]

    def sigma(self, timesteps: Tensor) -> Tensor:
        """The scale of the noise: sigma in ``x_t = alpha(t) x_0 + sigma(t) eps``. All else is as for :meth:`alpha`."""
        return self._scales(self._checked(timesteps, self._clean_end))[1]

    def reverse_step(
        self,
        timesteps: Tensor,
        step: Step = 1,
        *,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
        pairs: bool = False,
    ) -> ReverseStep:
        r"""The coefficients of one reverse step from t to t' (paper, eq. 2 and 12).

        A prediction o gives estimates of ``x_0`` and ``eps``, which are affine in o. The step takes these to
        ``x_t' = alpha' x_0 + sqrt(sigma'^2 - s^2) eps + s z`` with
        ``s = eta (sigma'/sigma) sqrt(1 - alpha^2/alpha'^2)``, and A, B and s of the result are returned.
        For ``step=k`` eta is 1, which is the DDPM posterior (arXiv 2006.11239). For "uniform" and "clean" eta is 0,
        which is DDIM (arXiv 2010.02502).

        Args:
            timesteps: t, (B,), whole numbers in [0, T), integers or floats; for a flow any numbers in [0, T].
            step: the number of timesteps to go back, 1 or more, or "uniform" for a t' drawn at random, or "clean" for
                the clean end.
            dtype: that of the coefficients. They are computed in float64 and then rounded.
            generator: draws t' for "uniform".
            pairs: whether the second half of the batch shares its drawn t' with the first.

        Returns:
            A, B and s in ``dtype``, and t', each (B,). t' has the dtype of t, or int32 or float32 where that is
            wider. For a flow it is a float.

        Raises:
            ValueError, TypeError: an argument of the wrong type, dtype, shape or value.
        """
        self._follow()
        check_step(step)
        check_generator(generator)
        timesteps = self._given(timesteps)
        check_flag("pairs", pairs)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize == 1:
            raise bad("dtype", "a floating-point torch.dtype of 16 bits or more", repr(dtype), TypeError)
        if timesteps.ndim != 1 or (pairs and len(timesteps) % 2):
            must_be = "an even batch, (2B,): winners first, then their losers" if pairs else "of shape (B,)"
            raise bad("timesteps", must_be, f"shaped {tuple(timesteps.shape)}")
        t = timesteps.long() if self._whole else timesteps  # an index, and no small integer, which would overflow
        if step == "uniform" and pairs:
            after = self._after(t[: len(t) // 2], step, generator).repeat(2)
        else:
            after = self._after(t, step, generator)
        A, B, s = (c.to(dtype) for c in self._coefficients(t, after, step))
        # A narrow dtype could hold t, but not t': uint8 no 845, and bf16 no 511.
        least = torch.int32 if self._whole and not timesteps.is_floating_point() else torch.float32
        kept = torch.promote_types(timesteps.dtype, least)
        return ReverseStep(A, B, s, after.clamp(min=0).to(kept))

    def _checked(self, timesteps: Tensor, low: int = 0) -> Tensor:
        self._follow()
        return check_timesteps(timesteps, len(self), self._whole, low)

    def _given(self, timesteps: Tensor) -> Tensor:
        """The timesteps of a reverse step, checked. A flow checks more of them here than elsewhere."""
        return self._checked(timesteps)

    def _warn(self, t: Tensor) -> None:
        """Warn if one timestep's B is so large that a sample there outweighs its batch: errors grow with B^2."""
        B = self._coefficients(t, self._after(t, 1, None), 1)[1].abs()
        times = B.max().item() / B.median().item()
        if times > 100:
            warnings.warn(
                f"{self}: at timestep {t[B.argmax()].item():g} the reverse step's B is {times:.0f} times the median. "
                "Errors grow with B^2, so one sample there owns its batch: pass weighting='noise', which divides by "
                "B^2, or leave such timesteps out",
                stacklevel=4,
            )


class NoiseSchedule(Schedule):
    r"""A variance-preserving noise schedule: ``x_t = alpha(t) x_0 + sigma(t) eps`` (paper, eq. 1).

    ``alpha(t) = sqrt(prod_{i<=t} (1 - beta_i))`` and ``sigma(t) = sqrt(1 - alpha(t)^2)``, in float64.

    Args:
        betas: T variances, each in (0, 1], and large enough that 1 - beta is less than 1 in float64. The last may be 1
            (zero terminal SNR) unless the model predicts epsilon.
        prediction_type: what the model outputs: "epsilon" (noise), "v_prediction" (velocity) or "sample" (x_0).

    Raises:
        ValueError, TypeError: betas out of range, an unknown prediction type, or epsilon with zero terminal SNR.

    Warns:
        UserWarning: B of one timestep is over a hundred times the median, so that a sample there outweighs its batch.

    >>> schedule = NoiseSchedule.from_scheduler(None)  # Stable Diffusion's own
    >>> len(schedule), round(schedule.alpha(torch.tensor(999)).item(), 4)
    (1000, 0.0683)
    """

    _whole = True
    _clean_end = -1  # as an index, this is the tables' extra last row

    def __init__(self, betas: Tensor | Sequence[float], prediction_type: str = "epsilon") -> None:
        super().__init__(prediction_type, PREDICTION_TYPES)
        squared = torch.cumprod(1 - _checked_betas(betas), 0)
        if prediction_type == "epsilon" and squared[-1] == 0:
            must_be = "'v_prediction' or 'sample' for a schedule with zero terminal SNR"
            raise bad("prediction_type", f"{must_be} (where alpha = 0, noise tells no x_0)", "'epsilon'")
        self.steps = len(squared)
        # The extra last row is the clean end, alpha = 1 and sigma = 0. Every t' < 0 is clamped to its index, -1.
        self._alpha = torch.cat([squared.sqrt(), squared.new_ones(1)])
        self._sigma = torch.cat([(1 - squared).sqrt(), squared.new_zeros(1)])
        # Tables on each device that has been used: alpha and sigma under None, and A, B and s under their step.
        self._tables: dict[tuple[Step | None, torch.device], Tensors] = {}
        self._warn(torch.arange(len(self), device="cpu"))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} steps, prediction_type={self.prediction_type!r})"

    def _scales(self, t: Tensor) -> Tensors:
        # An index of 0 dimensions would be read by the host, which would have to wait for the device.
        return tuple(table[t.long()[None]][0] for table in _scales_for_every_t(self, t.device))

    def _after(self, t: Tensor, step: Step, generator: torch.Generator | None) -> Tensor:
        if step == "clean":
            return torch.full_like(t, self._clean_end)
        if step == "uniform":
            device = t.device if generator is None else generator.device
            return torch.randint(len(self), t.shape, generator=generator, device=device).to(t.device)
        return (t - step).clamp(min=self._clean_end)

    def _coefficients(self, t: Tensor, after: Tensor, step: Step) -> Tensors:
        if step == "uniform":  # t' is drawn, so a table by t cannot hold the coefficients
            return self._computed(t, after, step)
        return tuple(table[t] for table in _coefficients_for_every_t(self, step, t.device))

    def _computed(self, t: Tensor, after: Tensor, step: Step) -> Tensors:
        """A, B and s of the step from ``t`` to ``after``, by their formulas."""
        (alpha, sigma), (alpha_, sigma_) = self._scales(t), self._scales(after)
        one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
        posterior = isinstance(step, int)  # eta = 1: s is the posterior's standard deviation
        s = (sigma_ / sigma) * (1 - (alpha / alpha_).square()).clamp(min=0).sqrt() if posterior else zero
        noise = (sigma_.square() - s.square()).clamp(min=0).sqrt()
        # The estimates of x_0 and eps, each as (factor of x_t, factor of the prediction).
        x_0, eps = {
            "epsilon": ((1 / alpha, -sigma / alpha), (zero, one)),
            "v_prediction": ((alpha, -sigma), (sigma, alpha)),
            "sample": ((zero, one), (1 / sigma, -alpha / sigma)),
        }[self._prediction_type]
        A, B = (alpha_ * of_signal + noise * of_noise for of_signal, of_noise in zip(x_0, eps, strict=True))
        return A, torch.where(after == t, zero, B), s  # a drawn t' may be t: no rounding is left of B then

    def _tables_on(self, key: Step | None, device: torch.device, compute: Callable[[], Tensors]) -> Tensors:
        """The tables that ``compute`` makes on the host in float64, on ``device``. Later calls return the same ones."""
        if (key, device) in self._tables:
            return self._tables[key, device]
        tables = tuple(table.to(device, widest(device)) for table in compute())
        if all(type(table) is Tensor for table in tables):  # a tracer's tensors are of no use outside its trace
            self._tables[key, device] = tables
        return tables


# A compiler takes these tables as constants. Otherwise it would compile a second time, since the first call fills the
# cache. They come from functions that take the schedule: if they were its methods, a compiled loss that is given a new
# schedule would go on with the first one's tables.


@constant_to_compilers
def _scales_for_every_t(schedule: NoiseSchedule, device: torch.device) -> Tensors:
    """alpha and sigma for every t, and for the clean end."""
    return schedule._tables_on(None, device, lambda: (schedule._alpha, schedule._sigma))


@constant_to_compilers
def _coefficients_for_every_t(schedule: NoiseSchedule, step: Step, device: torch.device) -> Tensors:
    """A, B and s of ``step`` for every t."""
    t = torch.arange(len(schedule), device="cpu")
    return schedule._tables_on(step, device, lambda: schedule._computed(t, schedule._after(t, step, None), step))


@NoiseSchedule.register  # whatever takes a NoiseSchedule takes a flow too, so isinstance says that it is one
class FlowSchedule(Schedule):
    r"""A flow-matching schedule: ``x_t = (1 - sigma) x_0 + sigma eps`` (as in SD 3, arXiv 2403.03206).

    A timestep is ``sigma * steps``, any number in [0, steps], as in trainers of SD 3 and Flux. Until a batch has one
    above 1, a batch with one between 0 and 1 is refused, since sigmas given as timesteps look like that. Steps are
    counted on a grid that is uniform in u, where ``sigma = shift u / (1 + (shift - 1) u)``, and ``step=k`` goes from u
    to ``u - k / steps``. A timestep may lie between the grid's points.

    A model that predicts "flow", ``eps - x_0``, takes the Euler step ``x_t' = x_t + (sigma' - sigma) o``. A model that
    predicts "sample", x_0, as with trainers' ``precondition_outputs``, takes the same step in the form
    ``x_t' = (sigma'/sigma) x_t + (1 - sigma'/sigma) o``. Neither has a random part: s is 0.

    Args:
        shift: the shift of the sigmas, as in FlowMatchEulerDiscreteScheduler; 1 if shifting is dynamic.
        steps: T, the scale of the timesteps.
        prediction_type: what the model outputs, "flow" or "sample" (x_0).

    Raises:
        ValueError, TypeError: a shift that is not a positive number, steps that are not a positive whole one, an
            unknown prediction type.

    >>> schedule = FlowSchedule(shift=3.0)
    >>> schedule.reverse_step(torch.tensor([750.0])).timesteps  # u = 0.5, then 0.499
    tensor([749.2493])
    """

    _whole = False
    _clean_end = 0
    _scale_seen = False  # a timestep above 1 has been given

    def __init__(self, shift: float = 1.0, steps: int = 1000, prediction_type: str = "flow") -> None:
        super().__init__(prediction_type, FLOW_PREDICTION_TYPES)
        self.shift = check_number("shift", shift)
        self.steps = int(check_number("steps", steps, "a positive whole number", lambda n: n >= 1 and n == int(n)))
        u = torch.arange(1, self.steps + 1, dtype=torch.float64, device="cpu") / self.steps
        self._warn(self._timesteps(u))

    def __repr__(self) -> str:
        kind = "" if self._prediction_type == "flow" else f", prediction_type={self._prediction_type!r}"
        return f"FlowSchedule(shift={self.shift}, steps={self.steps}{kind})"

    def _given(self, timesteps: Tensor) -> Tensor:
        """Refuse sigmas that are given as timesteps. Timesteps are rarely below 1, so one above 1 ends the search."""
        t = self._checked(timesteps)
        if self.steps > 1 and not self._scale_seen and values_are_free(t):
            self._scale_seen = bool((t > 1).any())
            if not self._scale_seen and bool(((t > 0) & (t < 1)).any()):
                was = f"in [{t.min().item():g}, {t.max().item():g}], which looks like sigma itself"
                raise bad("timesteps", f"sigma * {self.steps}, in [0, {self.steps}]", was)
        return t

    def _scales(self, t: Tensor) -> Tensors:
        sigma = t.to(widest(t.device)) / self.steps
        return 1 - sigma, sigma

    def _timesteps(self, u: Tensor) -> Tensor:
        return self.steps * self.shift * u / (1 + (self.shift - 1) * u)

    def _after(self, t: Tensor, step: Step, generator: torch.Generator | None) -> Tensor:
        _, sigma = self._scales(t)
        if step == "clean":
            return torch.zeros_like(sigma)
        if step == "uniform":
            device = sigma.device if generator is None else generator.device
            u = torch.rand(sigma.shape, generator=generator, device=device, dtype=torch.float32).to(sigma)
        else:
            # The inverse of the shift gives u of sigma. One step back is 1/T less.
            u = (sigma / (self.shift - (self.shift - 1) * sigma) - step / self.steps).clamp(min=0)
        return self._timesteps(u)

    def _coefficients(self, t: Tensor, after: Tensor, step: Step) -> Tensors:
        (_, sigma), (_, sigma_) = self._scales(t), self._scales(after)
        zero = torch.zeros_like(sigma)
        if self._prediction_type == "flow":
            return torch.ones_like(sigma), sigma_ - sigma, zero
        A = torch.where(sigma > 0, sigma_ / sigma, zero)  # at sigma = 0 the formula is 0/0, and the step ends at x_0
        return A, torch.where(sigma > 0, (sigma - sigma_) / sigma, torch.ones_like(sigma)), zero


def draw_noise(
    schedule: Schedule, step: Step, latents: Tensor, generator: torch.Generator | None, pairs: bool
) -> Tensor | None:
    """z of the reverse step, shaped like the latents. Both members of a pair get the same. None stands for z = 0.

    Nothing is drawn without a generator, or where s is 0 and z has no part: for "uniform", "clean" and flows.
    """
    if generator is None or not isinstance(step, int) or isinstance(schedule, FlowSchedule):
        return None
    groups = 2 if pairs else 1
    shape = (len(latents) // groups, *latents.shape[1:])
    z = torch.randn(shape, generator=generator, device=generator.device, dtype=latents.dtype).to(latents.device)
    return torch.cat([z] * groups)


def check_noisy(schedule: Schedule, noisy_latents: Tensor, timesteps: Tensor) -> None:
    """Refuse latents at high noise whose variance is far above 1: a sampler has scaled them as no model takes them.

    The Euler-like schedulers' ``add_noise`` makes ``x_0 + (sigma / alpha) eps``. Their ``scale_model_input`` multiplies
    it by alpha, which makes the model's input. At high noise x_0 has little part in it, so its variance is near 1.
    Values are read only where this costs no synchronisation.
    """
    if not values_are_free(noisy_latents) or not values_are_free(timesteps):
        return
    high = schedule.alpha(timesteps).square() < 0.05
    power = noisy_latents.detach().double().square().flatten(1).mean(1) * high
    # Noise of n elements exceeds this with a probability of exp(-25) (Laurent and Massart 2000, lemma 1).
    share = 25 / noisy_latents[0].numel()
    if (power > max(4.0, 1 + 2 * share**0.5 + 2 * share)).any():
        must_be = "as the model gets them, alpha x_0 + sigma noise (an Euler-like scheduler's scale_model_input makes"
        was = f"of mean square {power.max().item():.3g} at timestep {timesteps[power.argmax()].item():g}"
        raise bad("noisy_latents", f"{must_be} its add_noise that), near 1 at high noise", was)
