"""Align Stable Diffusion 3 or 3.5 with preferences: NCP-DPO on LoRA adapters, for a transformer that matches a flow.

    accelerate launch train_dpo_lora_sd3.py --pretrained_model_name_or_path MODEL --dataset_name TABLE

Writes `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(output_dir)` loads. Features are taken
after half of the transformer's blocks unless `--layer` names another, and errors are divided by the features' mean
square: a transformer's activations are large, and grow with depth.
"""

import torch
from diffusers import StableDiffusion3Pipeline
from training import draw, main, metrics_of

from ncp_loss import dpo_loss


def add_arguments(parser):
    """Those that the other scripts do not have."""
    add = parser.add_argument
    add("--max_sequence_length", type=int, default=256, help="tokens that the third text encoder reads")
    add("--weighting_scheme", default="logit_normal", choices=["logit_normal", "none"],
        help="the density of timesteps: most in the middle, or uniform")  # fmt: skip
    add("--logit_mean", type=float, default=0.0, help="of the logit-normal density")
    add("--logit_std", type=float, default=1.0, help="of the logit-normal density")
    add("--no_text_encoder_3", action="store_true", help="leave the third, largest text encoder out")


@torch.no_grad()
def question(run, batch):
    """What model and reference are asked, and the right answer; winners first, then losers."""
    args, scheduler = run.args, run.noise_scheduler
    latents, noise, variance_noise, u = draw(run, batch)
    if args.weighting_scheme == "logit_normal":
        u = torch.sigmoid(args.logit_mean + args.logit_std * torch.special.ndtri(u))
    steps = scheduler.config.num_train_timesteps
    indices = (u * steps).long().clamp(max=steps - 1).cpu()
    timesteps = scheduler.timesteps[indices].to(latents.device)  # sigma x 1000, as the transformer wants it
    sigmas = scheduler.sigmas[indices].to(latents.device)[:, None, None, None]
    noisy_latents = (1 - sigmas) * latents + sigmas * noise
    prompt_embeds, _, pooled_prompt_embeds, _ = run.pipeline.encode_prompt(
        batch["captions"], None, None, device=run.accelerator.device, do_classifier_free_guidance=False,
        max_sequence_length=args.max_sequence_length,
    )  # fmt: skip
    condition = {
        "encoder_hidden_states": prompt_embeds.repeat(2, 1, 1),
        "pooled_projections": pooled_prompt_embeds.repeat(2, 1),
    }
    return (noisy_latents, timesteps), condition, noise - latents, variance_noise


def loss_step(run, transformer, batch):
    """NCP-DPO on a batch of pairs: the loss, and what to log."""
    (noisy_latents, timesteps), condition, target, variance_noise = question(run, batch)
    model_pred = transformer(noisy_latents, timestep=timesteps, **condition).sample
    ref_pred = batch.get("ref_preds")
    if ref_pred is None:  # the reference was not asked before training
        with torch.no_grad():
            ref_pred = run.reference(noisy_latents, timestep=timesteps, **condition).sample
    options = condition | {"variance_noise": variance_noise, "pairs": True}
    error, ref_error = run.errors(model_pred, target, noisy_latents, timesteps, ref_pred=ref_pred, **options)
    chosen, rejected = error.chunk(2)
    ref = ref_error.chunk(2)
    beta = run.beta(ref)
    loss = dpo_loss(chosen, rejected, *ref, beta=beta)
    return loss, metrics_of(loss, error, ref, beta, timesteps)


if __name__ == "__main__":
    # One step of a thousand moves latents by a thousandth, and errors by its square; "noise" takes that factor out.
    defaults = {"resolution": 1024, "learning_rate": 1e-4, "weighting": "noise", "output_dir": "ncp-dpo-lora-sd3"}
    main(__doc__, StableDiffusion3Pipeline, loss_step, question, add_arguments=add_arguments, **defaults)
