"""Align Stable Diffusion 1.5 or 2 with preferences: NCP-DPO on LoRA adapters.

    accelerate launch train_dpo_lora_sd.py --pretrained_model_name_or_path MODEL --dataset_name TABLE

Writes `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(output_dir)` loads. Models that predict
noise and models that predict velocity both work: the pipeline's scheduler says which it is.
"""

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
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
    defaults = {"resolution": 512, "learning_rate": 1e-4, "layer": "down_blocks"}
    parser = new_parser(__doc__, output_dir="ncp-dpo-lora-sd", **defaults)
    args, pairs = parse(parser, "unet", "text_encoder")
    accelerator = new_accelerator(args)

    pipeline = load_pipeline(StableDiffusionPipeline, args, accelerator, safety_checker=None)
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

    def save(unet):
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
        StableDiffusionPipeline.save_lora_weights(args.output_dir, unet_lora_layers=layers)

    ref_preds = reference_predictions(args, accelerator, pairs, reference_prediction)
    train(args, accelerator, unet, pairs, compute_loss, save, ref_preds=ref_preds)


if __name__ == "__main__":
    main()
