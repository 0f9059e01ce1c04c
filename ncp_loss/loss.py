"""loss: the module a trainer calls in place of F.mse_loss; it leads the data through the rooms and holds no maths."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .checks import bad, check_choice, check_device, check_latents, check_pairs, check_tensor
from .difference import DIFFERENCES, choose, feature_differences
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
    they are trainable (full fine-tuning): freeze first, then build the loss.

    Args:
        unet: the model in training, or its DDP, ``torch.compile``, PEFT or accelerate wrapper.
        layer: where features are taken: "down_blocks" (end of the down stack, the paper's f), "mid_block" or any module
            path ("down_blocks.1", "down_blocks.-1.resnets.0"); several in a sequence, their errors summed, or in a
            mapping from path to weight.
        schedule: a NoiseSchedule, a diffusers scheduler, or None for Stable Diffusion's own with epsilon prediction.
        step: t' = t - step; "uniform" draws t' at random; "clean" compares the estimates of x_0, at t' = 0. A step
            past the last one ends at x_0 too.
        difference: how the difference of features is taken: "literal", the definition; "scaled", over a longer
            displacement and scaled back, for half precision; "auto", by the dtype the model computes in.
        normalize: divide each layer's error by the mean square of its target features.
        weighting: None, the paper's; "noise" divides by B^2, so that errors, and beta, have the scale of latent MSE.
        checkpoint: recompute the encoder's activations in backward: less memory, about one more encoder forward.
        impl: "auto" or "eager".
        reduction: "mean", "sum" or "none" (per sample).

    Raises:
        ValueError, TypeError: an unknown option, a layer the model does not have, an adapter merged into its weights.

    >>> from diffusers import UNet2DConditionModel
    >>> unet = UNet2DConditionModel(
    ...     block_out_channels=(32, 32), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    ...     up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=8).requires_grad_(False)
    >>> ncp = NoiseConditionedPerceptualLoss(unet)
    >>> x, noise, text = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16), torch.randn(2, 5, 8)
    >>> ncp(noise, noise, x, torch.tensor([10, 500]), text)
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
        check_choice("impl", impl, ("auto", "eager"))
        check_choice("reduction", reduction, REDUCTIONS)
        self.schedule = NoiseSchedule.from_scheduler(schedule)
        self.step, self.difference, self.reduction = step, difference, reduction
        self.normalize, self.weighting = normalize, weighting
        self._encoder = FrozenEncoder(unet, layer, checkpoint=checkpoint)

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
        """The batch's error; arguments as in :meth:`errors`.

        Returns:
            0-dim, or (B,) with ``reduction="none"``; float32 or better.
        """
        inputs = model_pred, target, noisy_latents, timesteps, encoder_hidden_states
        error, _ = self.errors(*inputs, variance_noise=variance_noise, generator=generator, **model_kwargs)
        return reduce_batch(error, self.reduction)

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
    ) -> tuple[Tensor, Tensor | None]:
        """Per-sample errors of the model and, from the same evaluation at the target, of a reference.

        Args:
            model_pred: what the model predicted, (B, C, H, W); gradients flow through it alone.
            target: what it should have: what the trainer's own MSE takes (noise, velocity or sample), (B, C, H, W).
            noisy_latents: x_t, (B, C, H, W).
            timesteps: t, int64 or whole floats in [0, T), 0-dim or (B,).
            encoder_hidden_states: the text condition, (B, L, D).
            ref_pred: the reference model's prediction, (B, C, H, W).
            variance_noise: z of the reverse step, (B, C, H, W). Without it z is drawn from ``generator``, and without
                that it is 0: it moves the point where features are compared, never the difference of the latents.
            generator: draws z, and t' for ``step="uniform"`` (the global one draws t' where this is None).
            pairs: the batch holds winners, then their losers, which share timestep and noise, and what is drawn here.
            **model_kwargs: passed to the model's forward (``added_cond_kwargs``, ``class_labels``, masks, ...).

        Returns:
            error (B,), ref_error (B,) or None; float32 or better; ref_error carries no gradient.

        Raises:
            ValueError, TypeError: an argument of the wrong shape, dtype, device or value.
            RuntimeError: the weights shared with ``unet`` have changed, or become trainable, since the loss was built.
        """
        # What is asked and what is given, before any work is done.
        encoder, optional = self._encoder, {"ref_pred": ref_pred, "variance_noise": variance_noise}
        given = {name: value for name, value in optional.items() if value is not None}
        given = {"target": target, "model_pred": model_pred} | given
        check_latents("noisy_latents", noisy_latents, encoder.channels, pairs, **given)
        timesteps = self._batch_timesteps(timesteps, noisy_latents)
        if pairs:
            noise = target if self.schedule.prediction_type == "epsilon" else None
            check_pairs({"timesteps": timesteps, "variance_noise": variance_noise, "target (the noise)": noise})
        encoder.check_conditioning(noisy_latents, encoder_hidden_states, model_kwargs)

        # From here to the encoder's door in float32 at least, whatever the model's dtype.
        dtype = torch.promote_types(torch.promote_types(noisy_latents.dtype, model_pred.dtype), torch.float32)
        x, truth = noisy_latents.detach().to(dtype), target.detach().to(dtype)
        back = self.schedule.reverse_step(timesteps, self.step, dtype=dtype, generator=generator, pairs=pairs)
        z = None if variance_noise is None else variance_noise.detach()
        if z is None and generator is not None and isinstance(self.step, int):
            drawn = x[: len(x) // 2] if pairs else x
            z = torch.randn(drawn.shape, generator=generator, device=generator.device, dtype=dtype).to(x.device)
            z = torch.cat([z, z]) if pairs else z

        model, reference = feature_differences(
            partial(encoder, timesteps=back.timesteps, encoder_hidden_states=encoder_hidden_states, **model_kwargs),
            back.latents(x, truth, z),
            back.displacement(model_pred, truth),
            None if ref_pred is None else back.displacement(ref_pred.detach(), truth),
            choose(self.difference, encoder.compute_dtype(x.device), x.device),
        )
        unit = back.B if self.weighting == "noise" else None
        error = partial(feature_error, weights=encoder.weights, normalize=self.normalize, unit=unit)
        return error(model), None if reference is None else error(reference)

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
        check_latents("latents", latents, self._encoder.channels)
        self._encoder.check_conditioning(latents, encoder_hidden_states, model_kwargs)
        return self._encoder(latents, self._batch_timesteps(timesteps, latents), encoder_hidden_states, **model_kwargs)

    def _batch_timesteps(self, timesteps: Tensor, latents: Tensor) -> Tensor:
        check_device("timesteps", check_tensor("timesteps", timesteps), "noisy_latents", latents)
        if timesteps.ndim == 0:
            return timesteps.expand(len(latents))
        if timesteps.shape != (len(latents),):
            raise bad("timesteps", f"0-dimensional or of shape ({len(latents)},)", f"of shape {tuple(timesteps.shape)}")
        return timesteps

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoiseConditionedPerceptualLoss:
        """``ncp.to(...)`` converts the encoder's own copies (full fine-tuning), never the user's weights."""
        self._encoder.apply(fn)
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        return f"layer={self._encoder.weights}, {self.schedule}, step={self.step!r}, difference={self.difference!r}"
