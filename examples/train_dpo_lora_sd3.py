"""Align Stable Diffusion 3 or 3.5 with preferences: NCP-DPO on LoRA adapters, for a transformer that matches a flow.

    accelerate launch train_dpo_lora_sd3.py --pretrained_model_name_or_path MODEL --dataset_name TABLE

Writes `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(output_dir)` loads. Features are taken
after half of the transformer's blocks unless `--layer` names another, and errors are divided by the features' mean
square: a transformer's activations are large, and grow with depth.
"""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
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
    train,
)

from ncp_loss import dpo_loss, frozen_view


def main() -> None:
    """Load, add adapters, train, save."""
    # One step of a thousand moves latents by a thousandth, and errors by its square; "noise" takes that factor out.
    defaults = {"resolution": 1024, "learning_rate": 1e-4, "weighting": "noise"}
    parser = new_parser(__doc__, output_dir="ncp-dpo-lora-sd3", **defaults)
    parser.add_argument("--max_sequence_length", type=int, default=256, help="tokens that the third text encoder reads")
    parser.add_argument("--weighting_scheme", default="logit_normal", choices=["logit_normal", "none"],
        help="the density of timesteps: most in the middle, or uniform")  # fmt: skip
    parser.add_argument("--logit_mean", type=float, default=0.0, help="of the logit-normal density")
    parser.add_argument("--logit_std", type=float, default=1.0, help="of the logit-normal density")
    parser.add_argument("--no_text_encoder_3", action="store_true", help="leave the third, largest text encoder out")
    args, pairs = parse(parser, "transformer", "text_encoder", "text_encoder_2", multiple=16)
    accelerator = new_accelerator(args)

    parts = {"text_encoder_3": None, "tokenizer_3": None} if args.no_text_encoder_3 else {}
    pipeline = load_pipeline(StableDiffusion3Pipeline, args, accelerator, **parts)
    noise_scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    transformer = pipeline.transformer
    args.layer = args.layer or f"transformer_blocks.{transformer.config.num_layers // 2 - 1}"
    add_lora(transformer, args, accelerator, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    ncp = new_ncp(transformer, args, schedule=noise_scheduler, normalize=True)
    reference = frozen_view(transformer)  # the base model: the same weights, without the adapters

    @torch.no_grad()
    def question(batch):
        """What model and reference are asked, and the right answer; winners first, then losers."""
        latents, noise, variance_noise, u = draw(pipeline.vae, batch, args.vae_encode_batch_size)
        if args.weighting_scheme == "logit_normal":
            u = torch.sigmoid(args.logit_mean + args.logit_std * torch.special.ndtri(u))
        steps = noise_scheduler.config.num_train_timesteps
        indices = (u * steps).long().clamp(max=steps - 1).cpu()
        timesteps = noise_scheduler.timesteps[indices].to(latents.device)  # sigma x 1000, as the transformer wants it
        sigmas = noise_scheduler.sigmas[indices].to(latents.device)[:, None, None, None]
        noisy_latents = (1 - sigmas) * latents + sigmas * noise
        prompt_embeds, _, pooled_prompt_embeds, _ = pipeline.encode_prompt(
            batch["captions"], None, None, device=accelerator.device, do_classifier_free_guidance=False,
            max_sequence_length=args.max_sequence_length,
        )  # fmt: skip
        condition = {
            "encoder_hidden_states": prompt_embeds.repeat(2, 1, 1),
            "pooled_projections": pooled_prompt_embeds.repeat(2, 1),
        }
        options = condition | {"variance_noise": variance_noise, "pairs": True}
        return (noisy_latents, timesteps), condition, noise - latents, options

    def predict(model, noisy_latents, timesteps, condition):
        return model(noisy_latents, timestep=timesteps, **condition).sample

    def compute_loss(transformer, batch):
        inputs, condition, target, options = question(batch)
        model_pred = predict(transformer, *inputs, condition)
        with torch.no_grad():
            ref_pred = batch["ref_preds"] if "ref_preds" in batch else predict(reference, *inputs, condition)
        error, ref_error = measure(args.loss_space, ncp, model_pred, target, *inputs, ref_pred=ref_pred, **options)
        ref = ref_error.chunk(2)
        beta = beta_of(args, ref)
        loss = dpo_loss(*error.chunk(2), *ref, beta=beta)
        return loss, metrics_of(loss, error, ref, beta, inputs[1])

    def reference_prediction(batch):
        inputs, condition, *_ = question(batch)
        return predict(reference, *inputs, condition)

    def save(transformer):
        layers = get_peft_model_state_dict(transformer)
        StableDiffusion3Pipeline.save_lora_weights(args.output_dir, transformer_lora_layers=layers)

    ref_preds = reference_predictions(args, accelerator, pairs, reference_prediction)
    train(args, accelerator, transformer, pairs, compute_loss, save, ref_preds=ref_preds)


if __name__ == "__main__":
    main()
