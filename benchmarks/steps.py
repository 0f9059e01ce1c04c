"""Training steps to compare, on one model and one batch: latent DPO, the published NCP algorithm, this library's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

from ncp_loss import NoiseConditionedPerceptualLoss, dpo_loss, frozen_view, ncp_dpo_loss
from ncp_loss.encoder import linearized

SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}  # diffusers' defaults are the rest of it
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# A narrow model has fewer heads, not narrower ones: SD 1.5's are 40 to 160 wide. With heads 4 wide attention's kernels
# would be four fifths of the encoder's time; at SD 1.5's own size they are an eighth.
MODELS = {
    "tiny": {
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 16,
    },
    "small": {
        "block_out_channels": (32, 64, 128, 128),
        "cross_attention_dim": 256,
        "attention_head_dim": (1, 2, 4, 4),  # diffusers' name for the number of heads
    },
    "sd15": SD15,
    "sdxl": SDXL,
}
LATENTS = {"tiny": 8, "small": 32, "sd15": 32, "sdxl": 32}  # what a CPU can do; theirs are 64 and 128
BETA = 2500.0


class Steps:
    """A LoRA model, a batch of pairs, and what may be done with them; each step leaves gradients in the adapters.

    ``layer`` is where all perceptual losses take their features: "down_blocks" or "mid_block".
    """

    def __init__(
        self,
        model: str,
        latents: int,
        pairs: int,
        layer: str,
        dtype: torch.dtype,
        device: torch.device,
        difference: str = "auto",
    ) -> None:
        self.before_backward = lambda: None
        torch.manual_seed(0)
        with torch.device(device):
            unet = UNet2DConditionModel(**MODELS[model])
        self.unet = unet.requires_grad_(False).to(dtype).eval()
        self.layer, self.scheduler = layer, DDPMScheduler(0, 1).from_config(_SCHEDULER)
        self.published = Published(self.unet, self.scheduler, layer)
        self.unet.add_adapter(LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        self.parameters = [p for p in self.unet.parameters() if p.requires_grad]
        with torch.no_grad():  # adapters that do something already
            for parameter in self.parameters:
                parameter.add_(0.01 * torch.randn_like(parameter))
        self.reference = frozen_view(self.unet)
        self.ncp = self.new_loss(difference=difference)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=dtype)

        config, rows = self.unet.config, 2 * pairs
        shape = (config.in_channels, latents, latents)
        self.noise = normal(pairs, *shape).repeat(2, 1, 1, 1)
        self.variance_noise = normal(pairs, *shape).repeat(2, 1, 1, 1)
        self.timesteps = torch.randint(20, 1000, (pairs,), device=device).repeat(2)
        self.noisy = self.scheduler.add_noise(normal(rows, *shape), self.noise, self.timesteps)
        self.text = normal(rows, 77, config.cross_attention_dim)
        self.extra: dict[str, Any] = {}
        if config.addition_embed_type == "text_time":
            sizes = torch.tensor([1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0], device=device).expand(rows, 6)
            self.extra["added_cond_kwargs"] = {"text_embeds": normal(rows, 1280), "time_ids": sizes}
        with torch.no_grad():
            self.fixed_ref_pred = self.predict_reference()
            inputs = self.noise, self.noisy, self.timesteps, self.text
            _, ref_error = self.ncp.errors(self.fixed_ref_pred, *inputs, **self.shared, ref_pred=self.fixed_ref_pred)
            self.ref_error = ref_error

    @property
    def shared(self) -> dict[str, Any]:
        return {"variance_noise": self.variance_noise, **self.extra}

    def new_loss(self, layer: str | None = None, **options: Any) -> NoiseConditionedPerceptualLoss:
        return NoiseConditionedPerceptualLoss(self.unet, layer or self.layer, schedule=self.scheduler, **options)

    def evaluations(self, step: Callable[[], Any]) -> int:
        """How often a step evaluates an encoder; a pass that has a graph goes backward too, and counts as two."""
        passes: list[bool] = []
        first_layers = self.ncp._encoder.view.conv_in, self.published.encoder.conv_in

        def count(layer: nn.Module, args: tuple[Tensor]) -> None:
            passes.append(torch.is_grad_enabled() and args[0].requires_grad)

        handles = [layer.register_forward_pre_hook(count) for layer in first_layers]
        try:
            step()
        finally:
            for handle in handles:
                handle.remove()
        return len(passes) + sum(passes)

    # The parts of a step.

    def predict(self) -> Tensor:
        return self.unet(self.noisy, self.timesteps, self.text, **self.extra).sample

    @torch.no_grad()
    def predict_reference(self) -> Tensor:
        return self.reference(self.noisy, self.timesteps, self.text, **self.extra).sample

    def train(self, loss: Tensor) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        self.before_backward()
        loss.backward()

    def model_part(self) -> None:
        """The model's forward and backward pass."""
        self.train(self.predict().float().square().mean())

    def encode(self, latents: Tensor) -> dict[str, Tensor]:
        conditioning = {"encoder_hidden_states": self.text, **self.extra}
        return self.ncp._encoder(latents, self.timesteps, conditioning, latents.dtype)

    @torch.no_grad()
    def fixed_encoder_part(self, points: int) -> None:
        """What the perceptual loss evaluates without a graph, one point after another."""
        for _ in range(points):
            self.encode(self.noisy)

    def trained_encoder_part(self) -> None:
        """The encoder's forward pass at one point, and its backward pass to the latents."""
        features, pull_back = linearized(self.encode, self.noisy)
        pull_back({layer: torch.ones_like(f) for layer, f in features.items()})

    # Whole steps.

    def latent(self) -> None:
        self.train(self.latent_loss(*self._predictions()))

    def latent_loss(self, *predictions: Tensor) -> Tensor:
        errors = [(p.float() - self.noise.float()).square().mean((1, 2, 3)).chunk(2) for p in predictions]
        return dpo_loss(*errors[0], *errors[1], beta=BETA)

    def perceptual(self, ncp: nn.Module | None = None, dpo: Callable[..., Any] = ncp_dpo_loss) -> None:
        model_pred, ref_pred = self._predictions()
        self.train(self.dpo(self.ncp if ncp is None else ncp, model_pred, dpo, ref_pred=ref_pred))

    def kept_prediction(self) -> None:
        """With the reference's prediction kept from earlier."""
        self.train(self.dpo(self.ncp, self.predict(), ref_pred=self.fixed_ref_pred))

    def kept_error(self) -> None:
        """With the reference's error kept from earlier, whose margins are worth less."""
        self.train(self.dpo(self.ncp, self.predict(), ref_error=self.ref_error))

    def published_step(self) -> None:
        model_pred, ref_pred = self._predictions()
        self.train(self.published(model_pred, ref_pred, self))

    def hooked(self) -> None:
        """Features by a hook on the whole frozen U-Net: what one writes first."""
        model_pred, ref_pred = self._predictions()
        self.train(self.published(model_pred, ref_pred, self, whole=True))

    def _predictions(self) -> tuple[Tensor, Tensor]:
        return self.predict(), self.predict_reference()

    def dpo(
        self, ncp: nn.Module, model_pred: Tensor, loss: Callable[..., Any] = ncp_dpo_loss, **reference: Any
    ) -> Tensor:
        inputs = model_pred, self.noise, self.noisy, self.timesteps, self.text
        return loss(ncp, *inputs, beta=BETA, **reference, **self.shared).loss


class Published:
    """The published algorithm, written anew: a copy of the whole U-Net, three evaluations, float32 copies.

    Its encoder runs the blocks as far as ``layer``; ``whole`` runs all of the U-Net and takes features by a hook.
    """

    def __init__(self, unet: UNet2DConditionModel, scheduler: DDPMScheduler, layer: str) -> None:
        self.encoder, self.scheduler, self.layer = copy.deepcopy(unet), scheduler, layer

    def __call__(self, model_pred: Tensor, ref_pred: Tensor, steps: Steps, whole: bool = False) -> Tensor:
        features = self._whole if whole else self._truncated
        before = (steps.timesteps - 1).clamp(min=0)

        def reverse(prediction: Tensor) -> Tensor:
            abar = self.scheduler.alphas_cumprod.to(prediction.device)[:, None, None, None]
            now, prev = abar[steps.timesteps], abar[before]
            alpha = now / prev
            mean = (steps.noisy - (1 - alpha) / (1 - now).sqrt() * prediction) / alpha.sqrt()
            return (mean + ((1 - prev) / (1 - now) * (1 - alpha)).sqrt() * steps.variance_noise).to(prediction.dtype)

        with torch.no_grad():
            reference = features(reverse(ref_pred), before, steps).float()
            target = features(reverse(steps.noise), before, steps).float()
        model = features(reverse(model_pred), before, steps).float()
        error, ref_error = ((f - target).pow(2).mean((1, 2, 3)).chunk(2) for f in (model, reference))
        return -F.logsigmoid(-BETA * ((error[0] - ref_error[0]) - (error[1] - ref_error[1]))).mean()

    def _truncated(self, latents: Tensor, timesteps: Tensor, steps: Steps) -> Tensor:
        unet, text = self.encoder, steps.text
        emb = unet.time_embedding(unet.time_proj(timesteps).to(latents.dtype))
        if steps.extra:
            emb = emb + unet.get_aug_embed(emb, text, **steps.extra)
        x = unet.conv_in(latents)
        for block in unet.down_blocks:
            more = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
            x, _ = block(x, emb, **more)
        return unet.mid_block(x, emb, encoder_hidden_states=text) if self.layer == "mid_block" else x

    def _whole(self, latents: Tensor, timesteps: Tensor, steps: Steps) -> Tensor:
        with Hooked(self.encoder, self.layer) as hooked:
            self.encoder(latents, timesteps, steps.text, **steps.extra)
        return hooked.features


class Hooked:
    """Keeps what a block of a U-Net returns for as long as the context lasts."""

    features: Tensor

    def __init__(self, unet: UNet2DConditionModel, layer: str) -> None:
        self.block = unet.mid_block if layer == "mid_block" else unet.down_blocks[-1]

    def __enter__(self) -> Hooked:
        self.handle = self.block.register_forward_hook(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def _keep(self, block: nn.Module, args: Any, output: Any) -> None:
        self.features = output[0] if isinstance(output, tuple) else output


_SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
