"""Align all weights of Stable Diffusion 1.5 or 2 with preferences: NCP-DPO, full fine-tuning.

    accelerate launch train_dpo_full_sd.py --pretrained_model_name_or_path MODEL --dataset_name TABLE --use_ema

Writes a whole pipeline, which `StableDiffusionPipeline.from_pretrained(output_dir)` loads. The weights that train are
kept in float32, and so is the one copy of them that stays behind: it is the reference, and part of it the encoder.
"""

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.training_utils import EMAModel
from training import (
    beta_of,
    draw,
    load_pipeline,
    measure,
    metrics_of,
    new_accelerator,
    new_ncp,
    new_parser,
    parse,
    reference_predictions,
    target_of,
    train,
)

from ncp_loss import dpo_loss, frozen_view


def main() -> None:
    """Load, add adapters, train, save."""
    defaults = {"resolution": 512, "learning_rate": 1e-6, "layer": "down_blocks"}
    parser = new_parser(__doc__, lora=False, output_dir="ncp-dpo-full-sd", **defaults)
    parser.add_argument("--use_ema", action="store_true", help="save a moving average of the weights")
    parser.add_argument("--ema_decay", type=float, default=0.9999, help="of the average, once it has warmed up")
    args, pairs = parse(parser, "unet", "text_encoder")
    accelerator = new_accelerator(args)

    parts = {"safety_checker": None, "float32": ("vae", "unet")}
    pipeline = load_pipeline(StableDiffusionPipeline, args, accelerator, **parts)
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    unet = pipeline.unet.requires_grad_(True)
    reference = frozen_view(unet)  # trainable weights are copied, so that it stays where it is
    ncp = new_ncp(reference, args, schedule=noise_scheduler)  # shares the reference's weights
    ema = EMAModel(unet.parameters(), decay=args.ema_decay) if args.use_ema else None
    if ema:
        accelerator.register_for_checkpointing(ema)

    @torch.no_grad()
    def question(batch):
        """What model and reference are asked, and the right answer; winners first, then losers."""
        latents, noise, variance_noise, u = draw(pipeline.vae, batch, args.vae_encode_batch_size)
        timesteps = (u * noise_scheduler.config.num_train_timesteps).long()
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
        target = target_of(noise_scheduler, latents, noise, timesteps)
        prompt_embeds, _ = pipeline.encode_prompt(batch["captions"], accelerator.device, 1, False)
        inputs = noisy_latents, timesteps, prompt_embeds.repeat(2, 1, 1)
        return inputs, target, {"variance_noise": variance_noise, "pairs": True}

    def compute_loss(unet, batch):
        inputs, target, options = question(batch)
        model_pred = unet(*inputs).sample
        with torch.no_grad():
            ref_pred = batch["ref_preds"] if "ref_preds" in batch else reference(*inputs).sample
        error, ref_error = measure(args.loss_space, ncp, model_pred, target, *inputs, ref_pred=ref_pred, **options)
        ref = ref_error.chunk(2)
        beta = beta_of(args, ref)
        loss = dpo_loss(*error.chunk(2), *ref, beta=beta)
        return loss, metrics_of(loss, error, ref, beta, inputs[1])

    def reference_prediction(batch):
        inputs, *_ = question(batch)
        return reference(*inputs).sample

    def average(unet):
        ema.to(accelerator.device)  # a resumed average comes back on the host
        ema.step(unet.parameters())

    def save(unet):
        if ema:
            ema.copy_to(unet.parameters())
        source = {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}
        trained = StableDiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path, unet=unet, **source)
        trained.save_pretrained(args.output_dir)

    ref_preds = reference_predictions(args, accelerator, pairs, reference_prediction)
    after_step = average if ema else None
    train(args, accelerator, unet, pairs, compute_loss, save, ref_preds=ref_preds, after_step=after_step)


if __name__ == "__main__":
    main()
