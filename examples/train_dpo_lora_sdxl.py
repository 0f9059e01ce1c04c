"""Align Stable Diffusion XL with preferences: NCP-DPO on LoRA adapters.

    accelerate launch train_dpo_lora_sdxl.py --pretrained_model_name_or_path MODEL --dataset_name TABLE

Writes `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(output_dir)` loads. The U-Net is told the
size and the crop of each image by itself: the winner's and the loser's differ where their files do. In float16 the VAE
that came with SDXL overflows; it runs in float32 here, whatever `--mixed_precision` is.
"""

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import get_peft_model_state_dict
from training import (
    add_lora,
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
    defaults = {"resolution": 1024, "learning_rate": 1e-4, "layer": "down_blocks"}
    parser = new_parser(__doc__, output_dir="ncp-dpo-lora-sdxl", **defaults)
    args, pairs = parse(parser, "unet", "text_encoder", "text_encoder_2")
    accelerator = new_accelerator(args)

    pipeline = load_pipeline(StableDiffusionXLPipeline, args, accelerator)
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    unet = pipeline.unet
    add_lora(unet, args, accelerator)
    ncp = new_ncp(unet, args, schedule=noise_scheduler)
    reference = frozen_view(unet)  # the base model: the same weights, without the adapters

    @torch.no_grad()
    def question(batch):
        """What model and reference are asked, and the right answer; winners first, then losers."""
        latents, noise, variance_noise, u = draw(pipeline.vae, batch, args.vae_encode_batch_size)
        timesteps = (u * noise_scheduler.config.num_train_timesteps).long()
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
        target = target_of(noise_scheduler, latents, noise, timesteps)
        encoded = pipeline.encode_prompt(
            batch["captions"], device=accelerator.device, do_classifier_free_guidance=False
        )
        prompt_embeds, _, pooled_prompt_embeds, _ = encoded
        # A number for each row, as it is: in half precision the sizes of two images could read the same.
        added = {"text_embeds": pooled_prompt_embeds.repeat(2, 1), "time_ids": batch["time_ids"].float()}
        inputs = noisy_latents, timesteps, prompt_embeds.repeat(2, 1, 1)
        condition = {"added_cond_kwargs": added}
        return inputs, condition, target, condition | {"variance_noise": variance_noise, "pairs": True}

    def compute_loss(unet, batch):
        inputs, condition, target, options = question(batch)
        model_pred = unet(*inputs, **condition).sample
        with torch.no_grad():
            ref_pred = batch["ref_preds"] if "ref_preds" in batch else reference(*inputs, **condition).sample
        error, ref_error = measure(args.loss_space, ncp, model_pred, target, *inputs, ref_pred=ref_pred, **options)
        ref = ref_error.chunk(2)
        beta = beta_of(args, ref)
        loss = dpo_loss(*error.chunk(2), *ref, beta=beta)
        return loss, metrics_of(loss, error, ref, beta, inputs[1])

    def reference_prediction(batch):
        inputs, condition, *_ = question(batch)
        return reference(*inputs, **condition).sample

    def save(unet):
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
        StableDiffusionXLPipeline.save_lora_weights(args.output_dir, unet_lora_layers=layers)

    ref_preds = reference_predictions(args, accelerator, pairs, reference_prediction)
    train(args, accelerator, unet, pairs, compute_loss, save, ref_preds=ref_preds)


if __name__ == "__main__":
    main()
