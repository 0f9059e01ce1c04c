"""Fine-tune Stable Diffusion 1.5 or 2 on chosen images: NCP-SFT on LoRA adapters.

    accelerate launch train_sft_lora.py --pretrained_model_name_or_path MODEL --dataset_name TABLE

The data are images and captions, or the winners of preference pairs; nothing is compared, and there is no reference.
Writes `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(output_dir)` loads.
"""

import torch
from diffusers import StableDiffusionPipeline
from training import main, noised, split

from ncp_loss import sft_loss


def loss_step(run, unet, batch):
    """NCP-SFT on a batch of winners: the loss, and what to log."""
    with torch.no_grad():
        inputs, target, variance_noise = noised(run, batch)
        prompt_embeds, _ = run.pipeline.encode_prompt(batch["captions"], run.accelerator.device, 1, False)
    model_pred = unet(*inputs, prompt_embeds).sample
    error, _ = run.errors(model_pred, target, *inputs, prompt_embeds, variance_noise=variance_noise)
    loss = sft_loss(error)
    metrics = {"loss": loss.detach(), "raw_model_loss": error.detach().mean()}
    return loss, metrics | split("raw_model_loss", error, inputs[1])


if __name__ == "__main__":
    # Without a beta before it, the gradient at the paper's own scale is smaller than AdamW's epsilon.
    defaults = {"resolution": 512, "learning_rate": 1e-4, "layer": "down_blocks", "weighting": "noise"}
    main(__doc__, StableDiffusionPipeline, loss_step, output_dir="ncp-sft-lora", **defaults)
