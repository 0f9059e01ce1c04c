"""training: what the scripts share: all but a batch's question and its loss.

All that is random in a batch is a function of `--seed`: the order of the data of the seed and the epoch; an image's
crop and flip, and the noises and timestep it is trained with, of the seed, the epoch and the row. They depend neither
on the batch size nor on the number of processes, a resumed run finds them again without a record of them, and a
reference model that is asked before training (`--precompute_reference`) is asked the very same question.
"""

import argparse
import inspect
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from training_arguments import PARTS, Parser, checkpoints, new_parser, parse, step_of
from training_data import Data, Stream, collate, digest, load_data

from ncp_loss import NoiseConditionedPerceptualLoss, by_timestep, frozen_view, preference_metrics, relative_beta

BY_TIMESTEP = "/t"  # in the name of a metric of which a batch may hold nothing
# The projections of attention, and in a transformer with two streams those of the text's.
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


class Run(NamedTuple):
    """What a script's functions are given."""

    args: argparse.Namespace
    accelerator: Accelerator
    pipeline: DiffusionPipeline
    noise_scheduler: Any
    reference: nn.Module | None  # the base model, where the data are pairs
    ncp: NoiseConditionedPerceptualLoss | None  # unless --loss_space is latent

    def errors(
        self, model_pred: Tensor, target: Tensor, *inputs: Tensor, ref_pred: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As `ncp.errors`, of each sample, the model's and the reference's; on what --loss_space says."""
        error = ref_error = 0.0
        if self.ncp:
            error, ref_error = self.ncp.errors(model_pred, target, *inputs, ref_pred=ref_pred, **options)
        if self.args.loss_space != "perceptual":
            error = error + latent_error(model_pred, target)
            ref_error = None if ref_pred is None else ref_error + latent_error(ref_pred, target)
        return error, ref_error

    def beta(self, ref: tuple[Tensor, Tensor]) -> float | Tensor:
        """One for each pair, by the reference's errors on winners and losers, or what --beta_dpo says."""
        return relative_beta(*ref, self.args.kappa) if self.args.beta_dpo is None else self.args.beta_dpo


def latent_error(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


LossStep = Callable[[Run, nn.Module, dict[str, Any]], tuple[Tensor, dict[str, Tensor]]]
Ask = Callable[[Run, dict[str, Any]], tuple[tuple[Tensor, Tensor], dict[str, Any], Tensor, Tensor]]


def main(
    doc: str, kind: type, loss_step: LossStep, question: Ask | None = None, *, lora: bool = True,
    add_arguments: Callable[[Parser], None] | None = None, **defaults: Any,
) -> None:  # fmt: skip
    """A whole run: arguments, data, models, training, weights saved.

    Args:
        doc: the script's docstring.
        kind: its pipelines' class, which tells a U-Net from a transformer that matches a flow.
        loss_step: (run, the model in training, a batch) -> the loss, and what to log.
        question: (run, a batch) -> what model and reference are asked, ``(noisy latents, timesteps)`` and the rest by
            name; the right answer; and z of the reverse step that the perceptual error takes. Without it the data are
            winners alone, and there is no reference.
        lora: whether it trains adapters, or all weights.
        add_arguments: adds the script's own.
        **defaults: of arguments.
    """
    pairs = question is not None
    parts = [part for part in PARTS if part in inspect.signature(kind).parameters]
    parser = new_parser(doc, pairs=pairs, lora=lora, **defaults)
    if add_arguments:
        add_arguments(parser)
    args = parse(parser, parts)
    data = load_data(parser, args, pairs)
    accelerator = new_accelerator(args)

    pipeline = load_pipeline(kind, args, accelerator, lora)
    model, is_flow = getattr(pipeline, parts[0]), parts[0] == "transformer"
    scheduler = FlowMatchEulerDiscreteScheduler if is_flow else DDPMScheduler
    noise_scheduler = scheduler.from_config(pipeline.scheduler.config)
    if lora:
        add_lora(model, args, accelerator)
    else:
        model.requires_grad_(True)
    reference = frozen_view(model) if pairs else None  # shares what is frozen, and copies what will train
    base = reference if pairs and not lora else model
    run = Run(args, accelerator, pipeline, noise_scheduler, reference, new_ncp(base, args, noise_scheduler))
    ref_preds = reference_predictions(run, data, question)

    def save(model: nn.Module) -> None:
        if not lora:
            kind.from_pretrained(**source_of(args), **{parts[0]: model}).save_pretrained(args.output_dir)
            return
        layers = get_peft_model_state_dict(model)
        layers = layers if is_flow else convert_state_dict_to_diffusers(layers)
        kind.save_lora_weights(args.output_dir, **{f"{parts[0]}_lora_layers": layers})

    train(run, model, data, loss_step, save, ref_preds)


def new_accelerator(args: argparse.Namespace) -> Accelerator:
    """Seeds this process too, for what is drawn outside the batches: adapters' first weights, dropout."""
    set_seed(args.seed)
    diffusers.utils.logging.set_verbosity_error()  # else it tells of each caption that is too long
    return Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=Path(args.output_dir, args.logging_dir)),
    )


def source_of(args: argparse.Namespace) -> dict[str, Any]:
    """Where the pretrained pipeline comes from."""
    source = {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}
    return {"pretrained_model_name_or_path": args.pretrained_model_name_or_path, **source}


def load_pipeline(kind: type, args: argparse.Namespace, accelerator: Accelerator, lora: bool) -> DiffusionPipeline:
    """The pretrained pipeline, frozen, on the device, in the dtype of mixed precision.

    The VAE stays in float32, since SDXL's overflows in float16, and so do weights that will train.
    """
    parts = {"safety_checker": None} if "safety_checker" in inspect.signature(kind).parameters else {}
    if getattr(args, "no_text_encoder_3", False):
        parts |= {"text_encoder_3": None, "tokenizer_3": None}
    if args.pretrained_vae_model_name_or_path:
        vae = args.pretrained_vae_model_name_or_path
        parts["vae"] = AutoencoderKL.from_pretrained(vae, cache_dir=args.cache_dir)
    pipeline = kind.from_pretrained(**source_of(args), **parts)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    float32 = ("vae",) if lora else ("vae", "unet", "transformer")
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).to(accelerator.device, torch.float32 if name in float32 else half)
    return pipeline


def add_lora(model: nn.Module, args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Adapters on the attention's projections, in float32; a checkpoint holds them, no frozen weight."""
    options = {"init_lora_weights": "gaussian", "target_modules": LORA_TARGETS}
    model.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, **options))
    cast_training_params(model, torch.float32)

    def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        weights.clear()  # tells accelerate that there is nothing left to save
        if accelerator.is_main_process:
            state = get_peft_model_state_dict(accelerator.unwrap_model(models[0]))
            save_file(state, Path(folder, "adapter.safetensors"))

    def load(models: list[nn.Module], folder: str) -> None:
        model = accelerator.unwrap_model(models.pop())
        set_peft_model_state_dict(model, load_file(Path(folder, "adapter.safetensors")))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


class Draws(NamedTuple):
    """A batch's latents and what is drawn for it; the members of a pair share all but the latents."""

    latents: Tensor  # winners, then losers
    noise: Tensor
    variance_noise: Tensor  # z of the reverse step that the perceptual error takes
    u: Tensor  # where in the noise schedule, uniform in [0, 1), one for each row


@torch.no_grad()
def draw(run: Run, batch: dict[str, Any]) -> Draws:
    """Encode the batch's images; draw its noises and places in the schedule, each from its own sample's seed."""
    vae, chunk = run.pipeline.vae, run.args.vae_encode_batch_size
    images = batch["images"].to(vae.device, vae.dtype)
    with torch.autocast(vae.device.type, enabled=False):  # the VAEs of SD overflow in float16
        posteriors = [vae.encode(part).latent_dist for part in images.split(chunk)]
    mean, std = (torch.cat([getattr(p, name) for p in posteriors]) for name in ("mean", "std"))
    generators = [torch.Generator().manual_seed(seed) for seed in batch["seeds"].tolist()]
    members = len(images) // len(generators)

    def normal(count: int) -> Tensor:
        drawn = [torch.randn(count, *mean.shape[1:], generator=generator) for generator in generators]
        return torch.stack(drawn, dim=1).flatten(0, 1).to(mean.device)

    u = torch.cat([torch.rand(1, generator=generator) for generator in generators]).to(mean.device)
    noise, variance_noise = (normal(1).repeat(members, 1, 1, 1) for _ in range(2))
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    latents = (mean + std * normal(members) - shift) * vae.config.scaling_factor
    return Draws(latents, noise, variance_noise, u.repeat(members))


def noised(run: Run, batch: dict[str, Any]) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """For a U-Net and its noise schedule: noisy latents and their timesteps, the right prediction, and z."""
    latents, noise, variance_noise, u = draw(run, batch)
    scheduler = run.noise_scheduler
    timesteps = (u * scheduler.config.num_train_timesteps).long()
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timesteps)
    else:
        target = {"epsilon": noise, "sample": latents}[scheduler.config.prediction_type]
    return (scheduler.add_noise(latents, noise, timesteps), timesteps), target, variance_noise


def new_ncp(model: nn.Module, args: argparse.Namespace, schedule: Any) -> NoiseConditionedPerceptualLoss | None:
    """The perceptual loss, where it is asked for.

    A transformer has no layer of its own by default: it is half of its blocks. Its activations are large, and grow with
    depth, so that its errors are divided by the features' mean square.
    """
    if args.loss_space == "latent":
        return None
    weighting = args.weighting or ("noise" if args.loss_space == "both" else "none")
    options = {
        "weighting": None if weighting == "none" else weighting,
        "checkpoint": args.gradient_checkpointing,
        "step": args.step,
    }
    if isinstance(schedule, FlowMatchEulerDiscreteScheduler):
        options["normalize"] = True
    layer = args.layer or f"transformer_blocks.{model.config.num_layers // 2 - 1}"
    return NoiseConditionedPerceptualLoss(model, layer, schedule=schedule, **options)


def metrics_of(
    loss: Tensor, error: Tensor, ref: tuple[Tensor, Tensor], beta: float | Tensor, timesteps: Tensor
) -> dict[str, Tensor]:
    """What there is to log of pairs: their metrics, and their mean margin by timestep, NaN where no pair was.

    Args:
        loss: of the batch.
        error: the model's, (2B,), winners first.
        ref: the reference's, (B,) of winners and (B,) of losers.
        beta: as in the loss.
        timesteps: (2B,).
    """
    chosen, rejected = error.detach().chunk(2)
    margins = beta * ((rejected - ref[1]) - (chosen - ref[0]))
    metrics = preference_metrics(loss, chosen, rejected, ref, beta)
    return metrics | split("rewards/margins", margins, timesteps.chunk(2)[0])


def split(name: str, values: Tensor, timesteps: Tensor) -> dict[str, Tensor]:
    """By the range of timesteps, the mean of what there is one of for each sample or pair, NaN where there is none."""
    return {f"{name}{BY_TIMESTEP}{part}": mean for part, mean in by_timestep(values, timesteps).items()}


def new_loader(args: argparse.Namespace, accelerator: Accelerator, stream: Stream) -> DataLoader:
    """Batches of a stream, in its order; a generator of its own leaves the process's for the model's draws."""
    options = {"num_workers": args.dataloader_num_workers, "generator": torch.Generator()}
    return accelerator.prepare(DataLoader(stream, args.train_batch_size, collate_fn=collate, **options))


@torch.no_grad()
def reference_predictions(run: Run, data: Data, question: Ask) -> Tensor | None:
    """With `--precompute_reference`, the reference's predictions for every row's winner and loser, (rows, 2, C, H, W).

    Predictions and not errors: the margin of two errors that were computed apart is rounding in half precision. They
    are kept beside the data if that is a folder, else in the output folder, under a name that tells the settings apart
    that they depend on; weights that were changed in place under the same path are not noticed.
    """
    args, accelerator = run.args, run.accelerator
    if not getattr(args, "precompute_reference", False):
        return None
    names = ["pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "revision", "variant", "seed"]
    names += ["caption_column", "absolute_winners", "resolution", "random_crop", "no_hflip"]
    names += ["no_text_encoder_3", "max_sequence_length", "weighting_scheme", "logit_mean", "logit_std"]
    settings = {name: str(getattr(args, name, None)) for name in names}
    settings |= {"data": data.identity, "rows": str(len(data)), "mixed_precision": accelerator.mixed_precision}
    folder = next((f for f in (args.train_data_dir, args.dataset_name) if f and Path(f).is_dir()), args.output_dir)
    path = Path(folder, f"reference-{digest(settings)}.safetensors")
    if not path.is_file():
        kept = None
        loader = new_loader(args, accelerator, Stream(data, args, 0, len(data)))
        for batch in tqdm(loader, desc="reference", disable=not accelerator.is_main_process):
            with accelerator.autocast():
                (noisy_latents, timesteps), condition, *_ = question(run, batch)
                ref_pred = run.reference(noisy_latents, timestep=timesteps, **condition).sample
            pairs = accelerator.gather(torch.stack(ref_pred.chunk(2), dim=1)).cpu()
            kept = pairs.new_zeros(len(data), *pairs.shape[1:]) if kept is None else kept
            kept[accelerator.gather(batch["rows"]).cpu()] = pairs
        if accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"ref_preds": kept}, path.with_suffix(".partial"), metadata=settings)
            path.with_suffix(".partial").replace(path)
        accelerator.wait_for_everyone()
    return load_file(path)["ref_preds"]


def means_of(names: Iterable[str], seen: Tensor) -> dict[str, float]:
    """Each metric's mean over the batches of a step and the processes; of those by timestep, over what there was.

    Args:
        names: of the metrics.
        seen: a row for each batch, a column for each metric.
    """
    lacking = [BY_TIMESTEP in name for name in names]
    means = torch.where(torch.tensor(lacking, device=seen.device), seen.nanmean(0), seen.mean(0)).tolist()
    found = zip(names, means, lacking, strict=True)
    return {name: mean for name, mean, may_lack in found if not (may_lack and math.isnan(mean))}


def save_checkpoint(args: argparse.Namespace, accelerator: Accelerator, step: int) -> None:
    """All of the run's state, under a checkpoint's name only once it is complete: a kill leaves none that is not."""
    path, partial = Path(args.output_dir, f"checkpoint-{step}"), Path(args.output_dir, "partial-checkpoint")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(partial)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(path, ignore_errors=True)  # of an earlier run that this one overtakes
        partial.rename(path)
        limit = args.checkpoints_total_limit
        for old in checkpoints(args.output_dir)[:-limit] if limit else []:
            shutil.rmtree(old)


def train(
    run: Run, model: nn.Module, data: Data, loss_step: LossStep, save: Callable[[nn.Module], None],
    ref_preds: Tensor | None,
) -> None:  # fmt: skip
    """The loop: from the first step, or the checkpoint's, to the last, and the trained weights saved.

    Args:
        model: in training; its trainable parameters are optimized.
        loss_step: as in `main`.
        save: writes the trained model's weights.
        ref_preds: from `reference_predictions`; a batch then has them as `batch["ref_preds"]`.
    """
    args, accelerator = run.args, run.accelerator
    ema = EMAModel(model.parameters(), decay=args.ema_decay) if getattr(args, "use_ema", False) else None
    if ema:
        accelerator.register_for_checkpointing(ema)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    betas = (args.adam_beta1, args.adam_beta2)
    decay, epsilon = args.adam_weight_decay, args.adam_epsilon
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, betas=betas, weight_decay=decay, eps=epsilon)
    processes = accelerator.num_processes
    per_step = args.train_batch_size * args.gradient_accumulation_steps * processes
    steps = args.max_train_steps or args.num_train_epochs * math.ceil(len(data) / per_step)
    # accelerate moves the schedule on once for each process.
    warmup, total = args.lr_warmup_steps * processes, steps * processes
    lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    model, optimizer, lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)

    step = 0
    if args.resume_from_checkpoint:
        accelerator.load_state(args.resume_from_checkpoint)
        step = step_of(args.resume_from_checkpoint)
        accelerator.print(f"resuming from {args.resume_from_checkpoint}")
    start = step * per_step
    loader = new_loader(args, accelerator, Stream(data, args, start, max(start, steps * per_step), ref_preds))
    if accelerator.is_main_process:
        plain = {name: value for name, value in vars(args).items() if isinstance(value, int | float | str)}
        accelerator.init_trackers("ncp", config=plain)

    model.train()
    progress = tqdm(total=steps, initial=step, desc="training", disable=not accelerator.is_main_process)
    seen: list[Tensor] = []
    for batch in loader:
        with accelerator.accumulate(model):
            with accelerator.autocast():
                loss, metrics = loss_step(run, model, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        seen.append(torch.stack(list(metrics.values())).float())
        if not accelerator.sync_gradients:
            continue
        step += 1
        logs = means_of(metrics, accelerator.gather(torch.stack(seen))) | {"lr": lr_scheduler.get_last_lr()[0]}
        seen.clear()
        accelerator.log(logs, step=step)
        shown = [name for name in ("loss", "rewards/margins", "rewards/accuracies") if name in logs]
        progress.set_postfix({name: f"{logs[name]:.4g}" for name in shown})
        progress.update()
        if ema:
            ema.to(accelerator.device)  # a resumed average comes back on the host
            ema.step(accelerator.unwrap_model(model).parameters())
        if step % args.checkpointing_steps == 0:
            save_checkpoint(args, accelerator, step)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        model = accelerator.unwrap_model(model)
        if ema:
            ema.copy_to(model.parameters())
        save(model)
    accelerator.end_training()
