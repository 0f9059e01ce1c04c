"""loss: the module that a trainer calls in place of F.mse_loss. It leads data from file to file and holds no maths."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .checks import (
    bad,
    check_choice,
    check_count,
    check_flag,
    check_latents,
    check_no_reference,
    check_pairs,
    check_timesteps,
    expand_timesteps,
)
from .difference import DIFFERENCES, choose, stencil
from .encoder import FrozenEncoder
from .error import Errors, attach, check_reverse_mode, feature_errors
from .layers import Layers
from .objectives import REDUCTIONS, reduce_batch
from .schedule import NoiseSchedule, Schedule, Step, check_noisy, check_step, draw_noise
from .tensors import at_least_float32, chunks_of, joined, per_sample

_NOISE = "target (noise, for a schedule that predicts epsilon)"


class _Batch(NamedTuple):
    """What errors are computed from, for all samples or for a chunk of them. The batch comes first everywhere."""

    target_latents: Tensor  # x*
    d: Tensor  # the model's displacement from them
    reference: Tensor | None  # the reference's displacement
    gap: Tensor | None  # the model's displacement minus the reference's
    B: Tensor
    timesteps: Tensor  # t'
    model_kwargs: dict[str, Any]


class NoiseConditionedPerceptualLoss(nn.Module):
    r"""How wrong a denoiser's prediction is, measured in features of its own frozen encoder after one reverse step.

    ``error_b = mean |f(x_t'(model_pred), c, t') - f(x_t'(target), c, t')|^2`` (paper, eq. 13).

    ``x_t'(o) = A x_t + B o + s z`` is the reverse step with the prediction o (eq. 2, 12). f is the encoder of the base
    model up to ``layer``, without adapters and without gradients to its weights. c is the text condition. In a training
    loop the loss replaces ``F.mse_loss(model_pred, target)``. It owns no parameters, and never changes ``unet``.

    Weights that are frozen when the loss is built, as in LoRA training, are shared with ``unet``. Weights that are
    trainable then, as in full fine-tuning, are copied as far as ``layer``. So load and freeze before building the loss.

    Args:
        unet: the model in training, or its DDP, ``torch.compile``, PEFT or accelerate wrapper.
        layer: the module whose output is f: "down_blocks" (the end of the down stack, as in the paper), "mid_block", or
            any module path ("down_blocks.1", "down_blocks.-1.resnets.0"). A sequence of paths gives the sum of their
            errors, and a mapping from path to weight a weighted sum.
        schedule: a NoiseSchedule or FlowSchedule, a diffusers scheduler, or None for Stable Diffusion's own schedule
            with epsilon prediction.
        step: the number of timesteps from t back to t', or "uniform" for a t' drawn at random, or "clean" for the
            estimates of x_0, compared at timestep 0. A step past the last timestep ends at x_0 too.
        difference: how differences of features are taken. "literal" is the definition. "scaled" takes a longer
            displacement from the target's latents and divides by its length, and "central" does so about the middle.
            "auto" chooses by the dtype that the model computes in: "literal" in float64, "scaled" in float32, "central"
            in half precision.
        normalize: whether each layer's error is divided by the mean square of the target's features.
        weighting: None, as in the paper, or "noise". "noise" divides errors by B^2, since a step with a larger B moves
            the latents further. Errors, and the beta that suits them, then have a scale near that of latent MSE. They
            still differ from it by how much the network amplifies a displacement.
        checkpoint: whether the encoder's activations are recomputed in its backward pass. This lowers the peak of
            memory and costs about one more forward pass of the encoder. A compiled loss ignores it, since the compiler
            plans memory itself.
        chunk_size: how many samples are evaluated at a time, or None for all. It bounds the encoder's share of the peak
            of memory. In a batch of pairs a chunk holds whole pairs, and at least one. Conditioning must then be given
            as arguments that are tensors with the batch first, numbers or None, since nothing else can be split
            without a guess.
        call: a function that calls the model as the trainer does, if that is not ``model(latents, timestep=timesteps,
            encoder_hidden_states=..., **model_kwargs)``. It is given the encoder, latents, timesteps and the other
            arguments by name, as in ``lambda model, x, t, **kw: model(pack(x), timestep=t / 1000, **kw)`` for Flux.
        impl: how the error's passes over features run: "eager", or "triton" for kernels that make no float32 copies.
        reduction: "mean", "sum" or "none" (per sample), for ``ncp(...)``. The preference losses have one of their own.

    Raises:
        ValueError, TypeError: an unknown option, a layer that the model does not have, or an adapter merged into its
            weights.
        ImportError: ``impl="triton"`` without triton.

    >>> from diffusers import UNet2DModel
    >>> unet = UNet2DModel(block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    >>> ncp = NoiseConditionedPerceptualLoss(unet.requires_grad_(False))
    >>> x, noise = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    >>> ncp(noise, noise, x, torch.tensor([10, 500]))
    tensor(0.)
    """

    def __init__(
        self,
        unet: nn.Module,
        layer: Layers = "down_blocks",
        *,
        schedule: Any = None,
        step: Step = 1,
        difference: str = "auto",
        normalize: bool = False,
        weighting: str | None = None,
        checkpoint: bool = False,
        chunk_size: int | None = None,
        call: Callable[..., Any] | None = None,
        impl: str = "eager",
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if not isinstance(unet, nn.Module):
            raise bad("unet", "a torch.nn.Module", type(unet).__name__, TypeError)
        check_flag("checkpoint", checkpoint)
        if call is not None and not callable(call):
            raise bad("call", "None or a function that calls the model", type(call).__name__, TypeError)
        self.schedule = NoiseSchedule.from_scheduler(schedule)
        self.step, self.difference, self.reduction = step, difference, reduction
        self.normalize, self.weighting, self.impl, self.chunk_size = normalize, weighting, impl, chunk_size
        self._check_options()
        if impl == "triton":
            importlib.import_module("ncp_loss.fused")  # raises here, not at the first step, where triton is missing
        self._encoder = FrozenEncoder(unet, layer, checkpoint=checkpoint, call=call)

    def _check_options(self) -> None:
        """Check the options here and in each call, since they are attributes, which may be set later."""
        if torch.compiler.is_compiling():
            return
        check_step(self.step)
        check_choice("difference", self.difference, DIFFERENCES)
        check_choice("weighting", self.weighting, (None, "noise"))
        check_choice("impl", self.impl, ("eager", "triton"))
        check_choice("reduction", self.reduction, REDUCTIONS)
        check_count("chunk_size", self.chunk_size, "None or a positive int", None)
        check_flag("normalize", self.normalize)
        if not isinstance(self.schedule, Schedule):
            raise bad("schedule", "a NoiseSchedule once the loss is built", type(self.schedule).__name__, TypeError)

    def forward(
        self,
        model_pred: Tensor,
        target: Tensor,
        noisy_latents: Tensor,
        timesteps: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        variance_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """The batch's error, in place of ``F.mse_loss(model_pred, target)``. The arguments are those of :meth:`errors`.

        Returns:
            A 0-dim tensor, or (B,) with ``reduction="none"``, in float32 or better.
        """
        check_no_reference(model_kwargs)
        inputs = model_pred, target, noisy_latents, timesteps, encoder_hidden_states
        errors = self.errors(*inputs, variance_noise=variance_noise, generator=generator, **model_kwargs)
        return reduce_batch(errors.error, self.reduction)

    def errors(
        self,
        model_pred: Tensor,
        target: Tensor,
        noisy_latents: Tensor,
        timesteps: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        ref_pred: Tensor | None = None,
        variance_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        pairs: bool = False,
        **model_kwargs: Any,
    ) -> Errors:
        """Per-sample errors of the model and, evaluated at the same points, of a reference model.

        The margin ``ref_error - error`` is computed without cancellation. What is left is the rounding of the two
        returned numbers, 1e-7 of the error in float32. The gradient of ``error`` is computed here, so nothing of the
        encoder is kept for the trainer's backward pass. The encoder is called once for each point, with exactly the
        conditioning that is given. It runs in eval mode, and must draw no random numbers. The features of a sample must
        depend on this sample alone.

        Args:
            model_pred: the model's prediction, (B, C, H, W). Gradients flow through it alone.
            target: the true prediction, (B, C, H, W), as the trainer's MSE takes it: noise, velocity, sample or flow.
            noisy_latents: x_t, (B, C, H, W), as the model gets them. Latents from the ``add_noise`` of an Euler-like
                scheduler must have gone through its ``scale_model_input``.
            timesteps: t, 0-dim or (B,), whole numbers in [0, T), as integers or floats; for a flow ``sigma * T``, any
                numbers in [0, T], as :class:`FlowSchedule` has it.
            encoder_hidden_states: the text condition, (B, L, D).
            ref_pred: the reference model's prediction, (B, C, H, W).
            variance_noise: z of the reverse step, (B, C, H, W). If it is None, z is drawn from ``generator``, and if
                that is None too, z is 0. z moves the point at which features are compared. It does not change the
                difference of the latents.
            generator: draws z and, for ``step="uniform"``, t'. If it is None, the global generator draws t'.
            pairs: whether the batch holds winners and then their losers. The members of a pair share timestep, noise
                and what is drawn here.
            **model_kwargs: passed to the model's forward (``added_cond_kwargs``, ``class_labels``, masks, ...).

        Returns:
            ``error``, (B,), and ``ref_error``, (B,) or None, in float32 or better. ``ref_error`` has no gradient.

        Raises:
            ValueError, TypeError: an argument of the wrong shape, dtype, device or value.
            RuntimeError: weights shared with ``unet`` have changed or become trainable since the first call; a second
                thread or a hook uses the loss while a pass runs; or a second derivative is asked for.
        """
        # Each check relies on those before it.
        others = {"target": target, "model_pred": model_pred, "ref_pred": ref_pred, "variance_noise": variance_noise}
        self._check_options()
        check_flag("pairs", pairs)
        check_latents("noisy_latents", noisy_latents, self._encoder.channels, pairs, **others)
        check_reverse_mode(model_pred)
        timesteps = expand_timesteps(timesteps, noisy_latents)
        self._encoder.check_weights(noisy_latents)
        conditioning = self._encoder.conditioned(noisy_latents, encoder_hidden_states, model_kwargs)
        if pairs:
            # Of the targets only noise is the same for both members. A velocity or x_0 depends on the image.
            noise = target if self.schedule.prediction_type == "epsilon" else None
            check_pairs({"timesteps": timesteps, "variance_noise": variance_noise, _NOISE: noise})

        # Latents are computed in float32 or better, whatever the model's dtype. The encoder casts them to that.
        dtype = at_least_float32(noisy_latents, model_pred)
        x, truth, prediction = (t.detach().to(dtype) for t in (noisy_latents, target, model_pred))
        back = self.schedule.reverse_step(timesteps, self.step, dtype=dtype, generator=generator, pairs=pairs)
        check_noisy(self.schedule, noisy_latents, timesteps)  # reverse_step has checked the timesteps
        z = draw_noise(self.schedule, self.step, x, generator, pairs) if variance_noise is None else variance_noise
        reference = None if ref_pred is None else ref_pred.detach().to(dtype)
        # The gap is computed from the predictions, since the difference of the two displacements would lose digits.
        batch = _Batch(
            target_latents=back.latents(x, truth, None if z is None else z.detach().to(dtype)),
            d=back.displacement(prediction, truth),
            reference=None if reference is None else back.displacement(reference, truth),
            gap=None if reference is None else back.displacement(prediction, reference),
            B=back.B,
            timesteps=back.timesteps,
            model_kwargs=conditioning,
        )
        trains = torch.is_grad_enabled() and model_pred.requires_grad
        evaluate = partial(self._evaluate, trains=trains, trainer_dtype=noisy_latents.dtype)
        if self.chunk_size is None:
            error, ref_error, slope = evaluate(batch)
        else:
            takes = chunks_of(len(x), self.chunk_size, groups=1 + pairs)
            parts = zip(*(evaluate(_Batch(**take(batch._asdict()))) for take in takes), strict=True)
            error, ref_error, slope = (joined(part, groups=1 + pairs) for part in parts)
        return Errors(error if slope is None else attach(error, model_pred, slope), ref_error)

    @torch.no_grad()
    def _evaluate(
        self, batch: _Batch, *, trains: bool, trainer_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``error``, ``ref_error`` and, if it is wanted, the derivative of ``error`` by the prediction."""
        target_latents, d, reference, gap, B, timesteps, conditioning = batch
        encode = partial(self._encoder, timesteps=timesteps, conditioning=conditioning, trainer_dtype=trainer_dtype)
        dtype = self._encoder.compute_dtype(target_latents.device)
        points = stencil(target_latents, d, reference, gap, choose(self.difference, dtype, target_latents.device))
        # The evaluation with a graph comes last, so that its activations are not in memory during the others.
        at_point = trains and points.gradient_point is points.latents[0]
        first, *others = points.latents
        features = [] if at_point else [encode(first) if trains else self._encoder.checked_features(encode, first)]
        features += [encode(x) for x in others]
        if trains:
            graph, pull_back = self._encoder.linearized(encode, points.gradient_point)
            self._encoder.check_apart(graph, pull_back)
            features = [graph, *features] if at_point else features
        # The features may show another dtype than the weights. Then the estimator was the wrong one: start again.
        if self._encoder.compute_dtype(target_latents.device) != dtype:
            return self._evaluate(batch, trains=trains, trainer_dtype=trainer_dtype)
        options = self.normalize, B if self.weighting == "noise" else None, self.impl
        errors, cotangents, size = feature_errors(features, points, self._encoder.weights, *options)
        slope = pull_back(cotangents()) if trains else None
        # By the chain rule: the prediction moves the latents by B, and the cotangents lack the factor `size`.
        return *errors, slope if slope is None else per_sample(size * B, slope) * slope

    def features(
        self, latents: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor | None = None, **model_kwargs: Any
    ) -> dict[str, Tensor]:
        """The frozen encoder's features by layer, in the dtype that the model computes in.

        Args:
            latents: latents at the noise level of ``timesteps``, (B, C, H, W).
            timesteps: numbers in [0, T], integers or floats, 0-dim or (B,).
            encoder_hidden_states: the text condition, (B, L, D).
            **model_kwargs: passed to the model's forward.

        Returns:
            The features of each layer, with one row for each sample, (B, ...).

        Raises:
            ValueError, TypeError, RuntimeError: as in :meth:`errors`.
        """
        check_latents("latents", latents, self._encoder.channels)
        timesteps = check_timesteps(expand_timesteps(timesteps, latents), len(self.schedule), whole=False)
        self._encoder.check_weights(latents)
        conditioning = self._encoder.conditioned(latents, encoder_hidden_states, model_kwargs)
        return self._encoder(latents, timesteps, conditioning, latents.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoiseConditionedPerceptualLoss:
        """Let ``ncp.to(...)`` convert the encoder's own copies (full fine-tuning), and never the user's weights."""
        self._encoder.apply(fn)
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        return f"layer={self._encoder.weights}, {self.schedule}, step={self.step!r}, difference={self.difference!r}"
