"""Align Stable Diffusion 1.5 or 2 with preferences: NCP-DPO on LoRA adapters.

    accelerate launch train_dpo_lora_sd.py --pretrained_model_name_or_path MODEL --dataset_name TABLE

Writes `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(output_dir)` loads. Models that predict
noise and models that predict velocity both work: the pipeline's scheduler says which it is.
"""

import torch
from diffusers import StableDiffusionPipeline
from training import main, metrics_of, noised

from ncp_loss import dpo_loss


@torch.no_grad()
def question(run, batch):
    """What model and reference are asked, and the right answer; winners first, then losers."""
    inputs, target, variance_noise = noised(run, batch)
    prompt_embeds, _ = run.pipeline.encode_prompt(batch["captions"], run.accelerator.device, 1, False)
    return inputs, {"encoder_hidden_states": prompt_embeds.repeat(2, 1, 1)}, target, variance_noise


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
    defaults = {"resolution": 512, "learning_rate": 1e-4, "layer": "down_blocks"}
    main(__doc__, StableDiffusionPipeline, loss_step, question, output_dir="ncp-dpo-lora-sd", **defaults)
