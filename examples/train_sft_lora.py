"""Fine-tune Stable Diffusion 1.5 or 2 on chosen images: NCP-SFT on LoRA adapters.

    accelerate launch train_sft_lora.py --pretrained_model_name_or_path MODEL --dataset_name TABLE

The data are images and captions, or the winners of preference pairs; nothing is compared, and there is no reference.
Writes `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(output_dir)` loads.
"""

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import get_peft_model_state_dict
from training import (
    add_lora,
    draw,
    load_pipeline,
    measure,
    new_accelerator,
    new_ncp,
    new_parser,
    parse,
    split,
    target_of,
    train,
)

from ncp_loss import sft_loss


def main() -> None:
    """Load, add adapters, train, save."""
    # Without a beta before it, the gradient at the paper's own scale is smaller than AdamW's epsilon.
    defaults = {"resolution": 512, "learning_rate": 1e-4, "layer": "down_blocks", "weighting": "noise"}
    parser = new_parser(__doc__, pairs=False, output_dir="ncp-sft-lora", **defaults)
    args, images = parse(parser, "unet", "text_encoder", pairs=False)
    accelerator = new_accelerator(args)

    pipeline = load_pipeline(StableDiffusionPipeline, args, accelerator, safety_checker=None)
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    unet = pipeline.unet
    add_lora(unet, args, accelerator)
    ncp = new_ncp(unet, args, schedule=noise_scheduler)

    def compute_loss(unet, batch):
        with torch.no_grad():
            latents, noise, variance_noise, u = draw(pipeline.vae, batch, args.vae_encode_batch_size)
            timesteps = (u * noise_scheduler.config.num_train_timesteps).long()
            noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
            target = target_of(noise_scheduler, latents, noise, timesteps)
            prompt_embeds, _ = pipeline.encode_prompt(batch["captions"], accelerator.device, 1, False)
        inputs = noisy_latents, timesteps, prompt_embeds
        model_pred = unet(*inputs).sample
        error, _ = measure(args.loss_space, ncp, model_pred, target, *inputs, variance_noise=variance_noise)
        loss = sft_loss(error)
        metrics = {"loss": loss.detach(), "raw_model_loss": error.detach().mean()}
        return loss, metrics | split("raw_model_loss", error, timesteps)

    def save(unet):
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
        StableDiffusionPipeline.save_lora_weights(args.output_dir, unet_lora_layers=layers)

    train(args, accelerator, unet, images, compute_loss, save)


if __name__ == "__main__":
    main()
