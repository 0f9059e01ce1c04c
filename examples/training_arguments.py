"""training_arguments: the options of the scripts, named as diffusers' own scripts name them, and what is refused."""

import argparse
import re
from pathlib import Path
from typing import Any

import training_data
from accelerate.utils import is_tensorboard_available
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.optimization import SchedulerType
from training_data import Parser

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")  # what tells one family of pipelines from another


def new_parser(doc: str, *, pairs: bool = True, lora: bool = True, **defaults: Any) -> Parser:
    """The arguments of every script, named as diffusers' own scripts name them.

    Args:
        doc: the script's docstring.
        pairs: whether it learns from preference pairs.
        lora: whether it trains adapters, or all weights.
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
    kinds = [kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT]  # which needs its rules
    add("--lr_scheduler", default="constant", choices=kinds)
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
    add("--step", type=length, default=1,
        help='the length of the reverse step before features are compared, or "clean", to its end')  # fmt: skip
    add("--weighting", choices=["none", "noise"],
        help="of perceptual errors: the paper's, or the scale of latent ones (default for both)")  # fmt: skip
    if lora:
        add("--rank", type=int, default=8, help="of the LoRA matrices")
    else:
        add("--use_ema", action="store_true", help="save a moving average of the weights")
        add("--ema_decay", type=float, default=0.9999, help="of the average, once it has warmed up")
    if pairs:
        scale = parser.add_mutually_exclusive_group().add_argument
        scale("--kappa", type=float, default=2.0,
            help="each pair's beta is kappa over the reference's mean error on it, whose scale need not be "
            "known")  # fmt: skip
        scale("--beta_dpo", type=float,
            help="one beta for all pairs instead, which multiplies the margin of mean errors once; published: 2500 "
            "(diffusers' SDXL script halves its 5000). Watch rewards/margins, which should reach order "
            "one")  # fmt: skip
        add("--precompute_reference", action="store_true",
            help="ask the reference once for each pair, before training, and store its predictions beside the data, as "
            "large as the latents; every epoch then repeats a pair's noise, timestep and crop")  # fmt: skip
    parser.set_defaults(**defaults)
    return parser


def length(given: str) -> int | str:
    """Of the reverse step."""
    return given if given == "clean" else int(given)


def parse(parser: Parser, parts: list[str]) -> argparse.Namespace:
    """The arguments, or a refusal in one line, before any model is loaded.

    Args:
        parser: from `new_parser`, with the script's own arguments added.
        parts: of PARTS, those that the script's pipelines have.
    """
    args = parser.parse_args()
    positive = ["resolution", "train_batch_size", "vae_encode_batch_size", "num_train_epochs", "max_train_steps"]
    positive += ["gradient_accumulation_steps", "checkpointing_steps", "checkpoints_total_limit", "max_train_samples"]
    positive += ["learning_rate", "max_grad_norm", "rank", "beta_dpo", "kappa", "ema_decay"]
    for name in positive:
        value = getattr(args, name, None)
        if value is not None and not value > 0:
            parser.refuse(f"--{name}", "a positive number", value)
    if args.step != "clean" and args.step < 1:
        parser.refuse("--step", "a positive whole number or 'clean'", args.step)
    for name in ("seed", "dataloader_num_workers", "lr_warmup_steps", "adam_weight_decay", "adam_epsilon"):
        if not getattr(args, name) >= 0:
            parser.refuse(f"--{name}", "a number, not negative", getattr(args, name))
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            parser.refuse(f"--{name}", "in [0, 1)", getattr(args, name))
    multiple = 16 if "transformer" in parts else 8  # of the VAE's steps, and of the transformer's patches
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
    return args


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


def checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints in a folder, the oldest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])
