"""training: what the scripts beside it share: arguments, what is drawn for a batch, checkpoints and the loop.

All that is random in a batch is a function of `--seed`: the order of the data of the seed and the epoch; an image's
crop and flip, and the noises and timestep it is trained with, of the seed, the epoch and the row. They depend neither
on the batch size nor on the number of processes, a resumed run finds them again without a record of them, and a
reference model that is asked before training (`--precompute_reference`) is asked the very same question.
"""

import argparse
import math
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import training_data
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, is_tensorboard_available, set_seed
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from training_data import Data, Parser, Stream, collate, digest, load_data

from ncp_loss import NoiseConditionedPerceptualLoss, by_timestep, preference_metrics, relative_beta

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")  # what tells one family of pipelines from another
BY_TIMESTEP = "/t"  # in the name of a metric of which a batch may hold nothing
Step = Callable[[nn.Module, dict[str, Any]], tuple[Tensor, dict[str, Tensor]]]


def new_parser(doc: str, *, pairs: bool = True, lora: bool = True, **defaults: Any) -> Parser:
    """The arguments of every script, named as diffusers' own scripts name them.

    Args:
        doc: the script's docstring.
        pairs: whether it learns from preference pairs.
        lora: whether it trains adapters.
        **defaults: of `output_dir`, `resolution`, `learning_rate` and `layer`, and of others that are to differ.
    """
    data = training_data.__doc__.partition("\n\n")[2]
    parser = Parser(description=doc, epilog=data, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, metavar="MODEL", help="a pipeline's folder or hub id")
    add("--pretrained_vae_model_name_or_path", metavar="VAE", help="another VAE than the pipeline's")
    add("--revision", help="of the pipeline on the hub")
    add("--variant", help="of the weight files, such as fp16")
    add("--dataset_name", help="a table on the hub, or a folder that save_to_disk wrote")
    add("--dataset_config_name", help="the table's configuration, where it has several")
    add("--dataset_split_name", default="train", help="the split to train on")
    add("--train_data_dir", help="a folder of images with metadata.jsonl, instead of a table")
    add("--caption_column", default="caption", help="the column, or the key in metadata.jsonl, that holds captions")
    add("--max_train_samples", type=int, help="use no more than the first so many rows")
    add("--absolute_winners", action="store_true",
        help="of each prompt, only images that neither lost nor drew, each with the one it beat last")  # fmt: skip
    add("--cache_dir", help="where downloads are kept")
    add("--output_dir", help="where weights and checkpoints go")
    add("--logging_dir", default="logs", help="where logs go, inside --output_dir")
    add("--report_to", default="tensorboard", choices=["tensorboard", "wandb", "comet_ml", "none"], help="a tracker")
    add("--seed", type=int, default=0, help="of everything random")
    add("--resolution", type=int, help="images are scaled and cropped to this square")
    add("--random_crop", action="store_true", help="crop at random, not at the centre")
    add("--no_hflip", action="store_true", help="do not mirror half of the samples")
    add("--train_batch_size", type=int, default=4, help=f"{'pairs' if pairs else 'images'} per process")
    add("--vae_encode_batch_size", type=int, default=8, help="images that the VAE encodes at once")
    add("--num_train_epochs", type=int, default=1, help="passes over the data, unless --max_train_steps is given")
    add("--max_train_steps", type=int, help="optimizer steps")
    add("--gradient_accumulation_steps", type=int, default=1, help="batches per optimizer step")
    add("--gradient_checkpointing", action="store_true", help="less memory, slower backward")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: as accelerate is configured")
    add("--learning_rate", type=float, help=f"default: {defaults['learning_rate']:g}")
    add("--lr_scheduler", default="constant", choices=[kind.value for kind in SchedulerType])
    add("--lr_warmup_steps", type=int, default=0, help="optimizer steps of warm-up")
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=1e-2)
    add("--adam_epsilon", type=float, default=1e-8)
    add("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this norm")
    add("--dataloader_num_workers", type=int, default=0, help="processes that load data; 0: none but this one")
    add("--checkpointing_steps", type=int, default=500, help="optimizer steps between checkpoints")
    add("--checkpoints_total_limit", type=int, help="keep no more than the newest so many")
    add("--resume_from_checkpoint", help='a checkpoint\'s folder, or "latest"')
    add("--loss_space", default="perceptual", choices=["latent", "perceptual", "both"],
        help="what errors are measured on: predictions, the frozen encoder's features, or both, added")  # fmt: skip
    add("--layer", help="where in the denoiser features are taken; a module's path")
    add("--weighting", choices=["none", "noise"],
        help="of perceptual errors: the paper's, or the scale of latent ones (default for both)")  # fmt: skip
    if lora:
        add("--rank", type=int, default=8, help="of the LoRA matrices")
    if pairs:
        add("--beta_dpo", type=float, default=2500.0,
            help="multiplies the margin of mean errors, once; diffusers' SDXL script halves its own, whose 5000 is "
            "2500 here. Watch rewards/margins, which should reach order one")  # fmt: skip
        add("--kappa", type=float,
            help="in place of --beta_dpo: each pair's beta is kappa over the reference's mean error on it, whose scale "
            "then need not be known; 2 is a place to begin")  # fmt: skip
        add("--precompute_reference", action="store_true",
            help="ask the reference once for each pair, before training, and store its predictions beside the data, as "
            "large as the latents; every epoch then repeats a pair's noise, timestep and crop")  # fmt: skip
    parser.set_defaults(**defaults)
    return parser


def parse(parser: Parser, *parts: str, pairs: bool = True, multiple: int = 8) -> tuple[argparse.Namespace, Data]:
    """Arguments and data, or a refusal in one line, before any model is loaded.

    Args:
        parser: from `new_parser`, with the script's own arguments added.
        *parts: of PARTS, those that the script's pipelines have.
        pairs: whether the data holds pairs or winners alone.
        multiple: of what the resolution must be, for the VAE's and the denoiser's steps.
    """
    args = parser.parse_args()
    positive = ["resolution", "train_batch_size", "vae_encode_batch_size", "num_train_epochs", "max_train_steps"]
    positive += ["gradient_accumulation_steps", "checkpointing_steps", "checkpoints_total_limit", "max_train_samples"]
    positive += ["learning_rate", "max_grad_norm", "rank", "beta_dpo", "kappa", "ema_decay"]
    for name in positive:
        value = getattr(args, name, None)
        if value is not None and not value > 0:
            parser.refuse(f"--{name}", "a positive number", value)
    if args.resolution % multiple:
        parser.refuse("--resolution", f"a multiple of {multiple}", args.resolution)
    if args.report_to == "tensorboard" and not is_tensorboard_available():
        parser.refuse("--report_to", "'none' where tensorboard is not installed", repr(args.report_to))
    args.resume_from_checkpoint = _checkpoint(parser, args)
    if Path(args.output_dir).is_file():
        parser.refuse("--output_dir", "a folder", f"a file, {args.output_dir}")

    must_be = f"the folder or hub id of a pipeline with {', '.join(parts)} alone of {', '.join(PARTS)}"
    model = args.pretrained_model_name_or_path
    if not Path(model).is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        parser.refuse("--pretrained_model_name_or_path", must_be, f"{model}, where nothing is")
    try:
        config = DiffusionPipeline.load_config(model, revision=args.revision, cache_dir=args.cache_dir)
    except (OSError, ValueError) as error:
        parser.refuse("--pretrained_model_name_or_path", must_be, model, error)
    present = tuple(part for part in PARTS if part in config and config[part][0] is not None)
    if set(present) != set(parts):
        parser.refuse("--pretrained_model_name_or_path", must_be, f"{model}, with {', '.join(present)}")
    vae = args.pretrained_vae_model_name_or_path
    try:
        _ = vae and AutoencoderKL.load_config(vae, cache_dir=args.cache_dir)
    except (OSError, ValueError) as error:
        parser.refuse("--pretrained_vae_model_name_or_path", "the folder or hub id of a VAE", vae, error)
    return args, load_data(parser, args, pairs)


def _checkpoint(parser: Parser, args: argparse.Namespace) -> Path | None:
    """The checkpoint to resume from, if there is one."""
    if args.resume_from_checkpoint is None:
        return None
    if args.resume_from_checkpoint != "latest":
        path = Path(args.resume_from_checkpoint)
        if not path.is_dir() or not re.fullmatch(r"checkpoint-\d+", path.name):
            parser.refuse("--resume_from_checkpoint", "'latest' or a folder named checkpoint-STEP", path)
        return path
    found = checkpoints(args.output_dir)
    if not found:
        print(f"{args.output_dir} holds no checkpoint; training starts at the first step")
    return found[-1] if found else None


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


def load_pipeline(
    kind: type, args: argparse.Namespace, accelerator: Accelerator, *, float32: tuple[str, ...] = ("vae",), **parts: Any
) -> DiffusionPipeline:
    """The pretrained pipeline, frozen and on the device, in the dtype of mixed precision but for the parts named."""
    if args.pretrained_vae_model_name_or_path:
        vae = args.pretrained_vae_model_name_or_path
        parts["vae"] = AutoencoderKL.from_pretrained(vae, cache_dir=args.cache_dir)
    source = {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}
    pipeline = kind.from_pretrained(args.pretrained_model_name_or_path, **source, **parts)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).to(accelerator.device, torch.float32 if name in float32 else half)
    return pipeline


def add_lora(model: nn.Module, args: argparse.Namespace, accelerator: Accelerator, *targets: str) -> None:
    """Adapters on the attention's projections and `targets`, in float32; a checkpoint holds them, no frozen weight."""
    names = ["to_q", "to_k", "to_v", "to_out.0", *targets]
    model.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian", target_modules=names))
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
def draw(vae: AutoencoderKL, batch: dict[str, Any], chunk: int) -> Draws:
    """Encode the batch's images; draw its noises and places in the schedule, each from its own sample's seed."""
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


def target_of(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What a model of the scheduler's prediction type should predict."""
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    return {"epsilon": noise, "sample": latents}[kind]


def new_ncp(model: nn.Module, args: argparse.Namespace, **options: Any) -> NoiseConditionedPerceptualLoss | None:
    """The perceptual loss, where it is asked for."""
    if args.loss_space == "latent":
        return None
    noise = (args.weighting or ("noise" if args.loss_space == "both" else "none")) == "noise"
    options |= {"weighting": "noise" if noise else None, "checkpoint": args.gradient_checkpointing}
    return NoiseConditionedPerceptualLoss(model, args.layer, **options)


def measure(
    space: str, ncp: NoiseConditionedPerceptualLoss | None, model_pred: Tensor, target: Tensor, *inputs: Tensor,
    ref_pred: Tensor | None = None, **options: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Errors per sample of a prediction, and of a reference's if one is given, in the space of `--loss_space`.

    Args:
        space: "latent", "perceptual" or "both".
        ncp: the perceptual loss, unless the space is latent.
        model_pred, target, *inputs, ref_pred, **options: as in `ncp.errors`.
    """

    def latent(prediction: Tensor) -> Tensor:
        return (prediction.float() - target.float()).square().flatten(1).mean(1)

    error = ref_error = 0.0
    if space != "latent":
        error, ref_error = ncp.errors(model_pred, target, *inputs, ref_pred=ref_pred, **options)
    if space != "perceptual":
        error, ref_error = error + latent(model_pred), None if ref_pred is None else ref_error + latent(ref_pred)
    return error, ref_error


def beta_of(args: argparse.Namespace, ref: tuple[Tensor, Tensor]) -> float | Tensor:
    """beta, or one for each pair, by the reference's errors on winners and losers, with `--kappa`."""
    return args.beta_dpo if args.kappa is None else relative_beta(*ref, args.kappa)


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
def reference_predictions(
    args: argparse.Namespace, accelerator: Accelerator, data: Data, predict: Callable[[dict[str, Any]], Tensor]
) -> Tensor | None:
    """With `--precompute_reference`, the reference's predictions for every row's winner and loser, (rows, 2, C, H, W).

    Predictions and not errors: the margin of two errors that were computed apart is rounding in half precision. They
    are kept beside the data if that is a folder, else in the output folder, under a name that tells the settings apart
    that they depend on; weights that were changed in place under the same path are not noticed.

    Args:
        predict: the reference's predictions for a batch, (2B, C, H, W), winners first.
    """
    if not args.precompute_reference:
        return None
    names = ["pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "revision", "variant", "seed"]
    names += ["absolute_winners", "resolution", "random_crop", "no_hflip"]
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
                pairs = accelerator.gather(torch.stack(predict(batch).chunk(2), dim=1)).cpu()
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


def checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints in a folder, the oldest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


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
    args: argparse.Namespace, accelerator: Accelerator, model: nn.Module, data: Data, compute_loss: Step,
    save: Callable[[nn.Module], None], *, ref_preds: Tensor | None = None, after_step: Callable | None = None,
) -> None:  # fmt: skip
    """The loop: from the first step, or the checkpoint's, to the last, and the trained weights saved.

    Args:
        model: in training; its trainable parameters are optimized.
        compute_loss: (the prepared model, a batch) -> the loss and what to log.
        save: writes the trained model's weights.
        ref_preds: from `reference_predictions`; a batch then has them as `batch["ref_preds"]`.
        after_step: called with the model after each optimizer step.
    """
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
                loss, metrics = compute_loss(model, batch)
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
        if after_step:
            after_step(accelerator.unwrap_model(model))
        if step % args.checkpointing_steps == 0:
            save_checkpoint(args, accelerator, step)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save(accelerator.unwrap_model(model))
    accelerator.end_training()
