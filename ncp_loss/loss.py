"""loss: the module a trainer calls in place of F.mse_loss; it leads the data through the rooms and holds no maths."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .checks import bad, check_choice, check_floating, check_latents, check_pairs, check_rows, expand_timesteps
from .difference import DIFFERENCES, Estimator, choose, feature_differences
from .encoder import FrozenEncoder, Layers
from .error import feature_error
from .objectives import REDUCTIONS, reduce_batch
from .schedule import NoiseSchedule, Step


class NoiseConditionedPerceptualLoss(nn.Module):
    r"""How wrong a denoiser's prediction is, in the features of its own frozen encoder one reverse step later.

    ``error_b = mean |f(x_t'(model_pred), c, t') - f(x_t'(target), c, t')|^2`` (paper, eq. 13), where
    ``x_t'(o) = A x_t + B o + s z`` is the reverse step with the prediction o (eq. 2, 12) and f the encoder of the base
    model: without adapters, without gradients to its weights, up to ``layer``. It replaces
    ``F.mse_loss(model_pred, target)`` in a training loop; the loss owns no parameters, and ``unet`` is not touched.

    The weights are shared with ``unet`` where they are frozen (LoRA training) and copied, as far as ``layer``, where
    they are trainable (full fine-tuning), as they are when the loss is built: freeze and load first, then build it.

    Args:
        unet: the model in training, or its DDP, ``torch.compile``, PEFT or accelerate wrapper.
        layer: where features are taken: "down_blocks" (end of the down stack, the paper's f), "mid_block" or any module
            path ("down_blocks.1", "down_blocks.-1.resnets.0"); several in a sequence, their errors summed, or in a
            mapping from path to weight.
        schedule: a NoiseSchedule, a diffusers scheduler, or None for Stable Diffusion's own with epsilon prediction.
        step: t' = t - step; "uniform" draws t' at random; "clean" compares the estimates of x_0, at t' = 0. A step
            past the last one ends at x_0 too.
        difference: how the difference of features is taken: "literal", the definition; over a longer displacement and
            scaled back, from one end ("scaled") or about the middle ("central"); "tangent", by forward-mode
            differentiation; "auto", by the dtype the model computes in: "literal" in float64, "scaled" in float32,
            "central" in half precision.
        normalize: divide each layer's error by the mean square of its target features.
        weighting: None, the paper's; "noise" divides by B^2, the part of an error's scale that is the step's: errors,
            and with them beta, come near the scale of latent MSE. What remains is the network's gain.
        checkpoint: recompute the encoder's activations in backward: less memory, about one more encoder forward.
        call: how the trainer calls the model, where that is not ``model(latents, timestep=timesteps,
            encoder_hidden_states=..., **model_kwargs)``: a function of just these, of which the first is the encoder,
            as in ``lambda model, x, t, **kw: model(pack(x), timestep=t / 1000, **kw)`` for Flux.
        impl: of the error's passes over features: "eager"; "triton", kernels that make no float32 copies; "auto", the
            kernels on a GPU where triton is installed.
        reduction: "mean", "sum" or "none" (per sample).

    Raises:
        ValueError, TypeError: an unknown option, a layer the model does not have, an adapter merged into its weights.
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
        call: Callable[..., Any] | None = None,
        impl: str = "auto",
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if not isinstance(unet, nn.Module):
            raise bad("unet", "a torch.nn.Module", type(unet).__name__, TypeError)
        if step not in ("uniform", "clean") and (isinstance(step, bool) or not isinstance(step, int) or step < 1):
            raise bad("step", "a positive int, 'uniform' or 'clean'", repr(step))
        check_choice("difference", difference, DIFFERENCES)
        check_choice("weighting", weighting, (None, "noise"))
        check_choice("impl", impl, ("auto", "eager", "triton"))
        if impl == "triton":
            importlib.import_module("ncp_loss.fused")  # what was asked for by name and is not there is an error, now
        check_choice("reduction", reduction, REDUCTIONS)
        self.schedule = NoiseSchedule.from_scheduler(schedule)
        self.step, self.difference, self.reduction = step, difference, reduction
        self.normalize, self.weighting, self.impl = normalize, weighting, impl
        self._encoder = FrozenEncoder(unet, layer, checkpoint=checkpoint, call=call)

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
        per_sample: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """The batch's error; arguments as in :meth:`errors`.

        Args:
            per_sample: return what :meth:`errors` returns, by way of the call, which is what ``torch.compile(ncp)``
                compiles.

        Returns:
            0-dim, or (B,) with ``reduction="none"``; float32 or better.
        """
        inputs = model_pred, target, noisy_latents, timesteps, encoder_hidden_states
        errors = self.errors(*inputs, variance_noise=variance_noise, generator=generator, **model_kwargs)
        return errors if per_sample else reduce_batch(errors[0], self.reduction)

    def errors(
        self,
        model_pred: Tensor,
        target: Tensor,
        noisy_latents: Tensor,
        timesteps: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        ref_pred: Tensor | None = None,
        target_features: dict[str, Tensor] | None = None,
        variance_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        pairs: bool = False,
        **model_kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Per-sample errors of the model and, from the same evaluation at the target, of a reference.

        Args:
            model_pred: what the model predicted, (B, C, H, W); gradients flow through it alone.
            target: what it should have, which the trainer's MSE takes: noise, velocity, sample or flow, (B, C, H, W).
            noisy_latents: x_t, (B, C, H, W).
            timesteps: t, int64 or whole floats in [0, T), 0-dim or (B,); for a flow sigma * T, any float in [0, T].
            encoder_hidden_states: the text condition, (B, L, D).
            ref_pred: the reference model's prediction, (B, C, H, W).
            target_features: kept from :meth:`target_features` of these very inputs.
            variance_noise: z of the reverse step, (B, C, H, W). Without it z is drawn from ``generator``, and without
                that it is 0: it moves the point where features are compared, never the difference of the latents.
            generator: draws z, and t' for ``step="uniform"`` (the global one draws t' where this is None).
            pairs: the batch holds winners, then their losers, which share timestep and noise, and what is drawn here.
            **model_kwargs: passed to the model's forward (``added_cond_kwargs``, ``class_labels``, masks, ...).

        Returns:
            error (B,), ref_error (B,) or None; float32 or better; ref_error carries no gradient.

        Raises:
            ValueError, TypeError: an argument of the wrong shape, dtype, device or value.
            RuntimeError: the weights shared with ``unet`` have changed, or become trainable, since its first call.
        """
        given = {"target": target, "model_pred": model_pred, "ref_pred": ref_pred, "variance_noise": variance_noise}
        timesteps = self._checked(noisy_latents, timesteps, encoder_hidden_states, model_kwargs, given, pairs=pairs)
        if pairs:
            noise = target if self.schedule.prediction_type == "epsilon" else None
            check_pairs({"timesteps": timesteps, "variance_noise": variance_noise, "target (the noise)": noise})
        encoder = self._encoder
        estimator = choose(self.difference, encoder.compute_dtype(noisy_latents.device), noisy_latents.device)
        if target_features is not None:
            draws = generator is not None and variance_noise is None
            self._check_target_features(target_features, noisy_latents, estimator, draws)

        # From here to the encoder's door in float32 at least, whatever the model's dtype.
        dtype = torch.promote_types(torch.promote_types(noisy_latents.dtype, model_pred.dtype), torch.float32)
        x, truth = noisy_latents.detach().to(dtype), target.detach().to(dtype)
        back = self.schedule.reverse_step(timesteps, self.step, dtype=dtype, generator=generator, pairs=pairs)
        z = None if variance_noise is None else variance_noise.detach()
        if z is None and generator is not None and isinstance(self.step, int):
            drawn = x[: len(x) // 2] if pairs else x
            z = torch.randn(drawn.shape, generator=generator, device=generator.device, dtype=dtype).to(x.device)
            z = torch.cat([z, z]) if pairs else z

        differences = feature_differences(
            lambda x: encoder(x, back.timesteps, encoder_hidden_states, model_kwargs, noisy_latents.dtype),
            back.latents(x, truth, z),
            [back.displacement(prediction, truth) for prediction in (model_pred, ref_pred) if prediction is not None],
            estimator,
            target_features,
        )
        unit = back.B if self.weighting == "noise" else None
        error_of = partial(feature_error, weights=encoder.weights, normalize=self.normalize, unit=unit, impl=self.impl)
        error, *ref_error = map(error_of, differences)
        return error, ref_error[0] if ref_error else None

    def features(
        self, latents: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor | None = None, **model_kwargs: Any
    ) -> dict[str, Tensor]:
        """What the frozen encoder sees: {layer: features}, in the dtype it computes in.

        Args:
            latents: at the noise level of ``timesteps``, (B, C, H, W).
            timesteps: int64 or float, 0-dim or (B,).
            encoder_hidden_states: the text condition, (B, L, D).
            **model_kwargs: passed to the model's forward.

        Raises:
            ValueError, TypeError, RuntimeError: as in :meth:`errors`.
        """
        timesteps = self._checked(latents, timesteps, encoder_hidden_states, model_kwargs, {}, name="latents")
        return self._encoder(latents, timesteps, encoder_hidden_states, model_kwargs, latents.dtype)

    @torch.inference_mode(False)  # whose tensors cannot be saved for backward
    @torch.no_grad()
    def target_features(
        self,
        target: Tensor,
        noisy_latents: Tensor,
        timesteps: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        variance_noise: Tensor | None = None,
        **model_kwargs: Any,
    ) -> dict[str, Tensor]:
        """f(x*): what to keep, and pass to :meth:`errors`, where a sample is trained on with the same noise each time.

        With it and a kept ``ref_error`` a training step evaluates the encoder once. For the estimators that take
        f(x*), "literal" and "scaled", thus for float32, in which "auto" is one of them; not for ``step="uniform"``.

        Args:
            target, noisy_latents, timesteps, encoder_hidden_states, variance_noise, **model_kwargs: as in
                :meth:`errors`, with ``variance_noise=None`` for z = 0.

        Returns:
            {layer: (B, ...)}, in the dtype that the encoder computes in.

        Raises:
            ValueError, TypeError, RuntimeError: as in :meth:`errors`.
        """
        given = {"target": target, "variance_noise": variance_noise}
        timesteps = self._checked(noisy_latents, timesteps, encoder_hidden_states, model_kwargs, given)
        dtype = torch.promote_types(torch.promote_types(noisy_latents.dtype, target.dtype), torch.float32)
        back = self.schedule.reverse_step(timesteps, self.step, dtype=dtype)
        base = back.latents(noisy_latents.to(dtype), target.to(dtype), variance_noise)
        return self._encoder(base, back.timesteps, encoder_hidden_states, model_kwargs, noisy_latents.dtype)

    def _checked(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor | None,
        model_kwargs: dict[str, Any],
        like_latents: Mapping[str, Tensor | None],
        name: str = "noisy_latents",
        pairs: bool = False,
    ) -> Tensor:
        """What every method is given, looked over; the timesteps, one for each sample."""
        given = {key: value for key, value in like_latents.items() if value is not None}
        check_latents(name, latents, self._encoder.channels, pairs, **given)
        timesteps = expand_timesteps(timesteps, latents)
        self._encoder.check_conditioning(latents, text, model_kwargs)
        return timesteps

    def _check_target_features(
        self, kept: dict[str, Tensor], latents: Tensor, estimator: Estimator, draws: bool
    ) -> None:
        dtype = self._encoder.compute_dtype(latents.device)
        if estimator.kind not in ("literal", "scaled") or self.step == "uniform":
            why = f"difference {estimator.kind!r} in {dtype}, step={self.step!r}"
            must_be = "None unless differences start at the target ('literal', 'scaled')"
            raise bad("target_features", f"{must_be}, with a step that is not random", f"given, with {why}")
        if draws:
            raise bad("target_features", "None where variance_noise is drawn from a generator", "given")
        if kept.keys() != self._encoder.weights.keys():
            raise bad("target_features", f"of the layers {sorted(self._encoder.weights)}", f"of {sorted(kept)}")
        for layer, features in kept.items():
            name = f"target_features[{layer!r}]"
            check_rows(name, check_floating(name, features), latents)
            if features.dtype != dtype:
                raise bad(name, f"in the dtype that the encoder computes in, {dtype}", features.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoiseConditionedPerceptualLoss:
        """``ncp.to(...)`` converts the encoder's own copies (full fine-tuning), never the user's weights."""
        self._encoder.apply(fn)
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        return f"layer={self._encoder.weights}, {self.schedule}, step={self.step!r}, difference={self.difference!r}"
