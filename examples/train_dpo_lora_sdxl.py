"""Align Stable Diffusion XL with preferences: NCP-DPO on LoRA adapters.

    accelerate launch train_dpo_lora_sdxl.py --pretrained_model_name_or_path MODEL --dataset_name TABLE

Writes `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(output_dir)` loads. The U-Net is told the
size and the crop of each image by itself: the winner's and the loser's differ where their files do. In float16 the VAE
that came with SDXL overflows; it runs in float32 here, whatever `--mixed_precision` is.
"""

import torch
from diffusers import StableDiffusionXLPipeline
from training import main, metrics_of, noised

from ncp_loss import dpo_loss


@torch.no_grad()
def question(run, batch):
    """What model and reference are asked, and the right answer; winners first, then losers."""
    inputs, target, variance_noise = noised(run, batch)
    prompt_embeds, _, pooled_prompt_embeds, _ = run.pipeline.encode_prompt(
        batch["captions"], device=run.accelerator.device, do_classifier_free_guidance=False
    )
    # A number for each row, as it is: in half precision the sizes of two images could read the same.
    added = {"text_embeds": pooled_prompt_embeds.repeat(2, 1), "time_ids": batch["time_ids"].float()}
    condition = {"encoder_hidden_states": prompt_embeds.repeat(2, 1, 1), "added_cond_kwargs": added}
    return inputs, condition, target, variance_noise


def loss_step(run, unet, batch):
    """NCP-DPO on a batch of pairs: the loss, and what to log."""
    inputs, condition, target, variance_noise = question(run, batch)
    model_pred = unet(*inputs, **condition).sample
    ref_pred = batch.get("ref_preds")
    if ref_pred is None:  # the reference was not asked before training
        with torch.no_grad():
            ref_pred = run.reference(*inputs, **condition).sample
    options = condition | {"variance_noise": variance_noise, "pairs": True}
    error, ref_error = run.errors(model_pred, target, *inputs, ref_pred=ref_pred, **options)
    chosen, rejected = error.chunk(2)
    ref = ref_error.chunk(2)
    beta = run.beta(ref)
    loss = dpo_loss(chosen, rejected, *ref, beta=beta)
    return loss, metrics_of(loss, error, ref, beta, inputs[1])


if __name__ == "__main__":
    defaults = {"resolution": 1024, "learning_rate": 1e-4, "layer": "down_blocks"}
    main(__doc__, StableDiffusionXLPipeline, loss_step, question, output_dir="ncp-dpo-lora-sdxl", **defaults)
