"""The emoji testbed: trains its networks (`--train`), draws what they draw, and measures its judges.

Training goes on from the checkpoints in `--work`, a folder that git ignores and that holds the data too. The networks'
weights go to `--weights`, in half precision. Weights that are there already, and have no checkpoint, are taken as they
are; the U-Net's training goes on from them. Without `--train` the committed weights are used. Writes emoji.csv (a row
for each measure), emoji.json and emoji.png: samples beside the real drawings.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import report
from benchmarks.emoji_data import Emoji, Parts, load, parts, stand_in
from benchmarks.emoji_judges import Judges, accuracy, contrast, kernel_distance, load_judges, varied
from benchmarks.emoji_model import (
    WEIGHTS,
    Coder,
    Generator,
    load_coder,
    load_generator,
    note,
    sample,
    save,
    seeded_noise,
)
from examples.digits import new_scheduler

CHECKPOINT_SECONDS = 90
# What the loss's encoder needs, to the end of the down blocks, and the words it learned with.
ENCODER = ("unet.conv_in", "unet.time_embedding", "unet.down_blocks", "text")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train", action="store_true", help="train what is not trained yet; hours on a CPU core")
    parser.add_argument("--work", type=Path, default=Path(".cache/emoji"), help="data and checkpoints")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--vae-steps", type=int, default=1600)
    parser.add_argument("--judge-steps", type=int, default=600)
    parser.add_argument("--unet-steps", type=int, default=8_000)
    parser.add_argument("--early", type=int, default=500, help="steps of the U-Net whose encoder is kept as well")


def run(args: argparse.Namespace) -> None:
    if args.tiny:
        args.train, args.work, args.weights = True, args.out / "work", args.out / "weights"
        args.vae_steps, args.judge_steps, args.unet_steps, args.early = 2, 2, 2, 1
    args.work.mkdir(parents=True, exist_ok=True)
    emoji = parts(stand_in() if args.tiny else load(args.work))
    trained = train(args, emoji) if args.train else {}
    coder, judges = load_coder(args.weights), load_judges(args.weights)
    generator = load_generator(args.weights)
    measures = measured(coder, generator, judges, emoji)
    draw(args.out / "emoji.png", coder, generator, emoji.requests)
    rows = [{"measure": name, "value": value} for name, value in measures.items()]
    report.write_csv(args.out / "emoji.csv", rows)
    report.write_json(args.out / "emoji.json", report.record(args.device) | {"trained": trained, "measures": measures})
    report.print_table("The emoji testbed", rows, {"value": ".3f"})


def train(args: argparse.Namespace, emoji: Parts) -> dict[str, dict[str, float]]:
    """Autoencoder, judges, generator, in this order; steps and seconds of those that were trained."""

    def missing(weights: str, checkpoint: str) -> bool:
        return (args.work / checkpoint).is_file() or not (args.weights / weights).is_file()

    fits = {}
    if missing("emoji_vae.safetensors", "vae.pt"):
        fits["autoencoder"] = train_coder(args, emoji.generator.images.flatten(0, 1))
    coder = load_coder(args.weights)  # as the committed weights have it: rounded to half precision
    if missing("emoji_judges.safetensors", "caption.pt"):
        fits["caption judge"] = train_judges(args, coder, emoji.judges.images)
    fits["generator"] = train_generator(args, coder, emoji.generator)
    return {name: {"steps": fit.step, "seconds": round(fit.seconds)} for name, fit in fits.items()}


class Fit:
    """Training that can be interrupted at any time: weights, their moving average, optimizer and step are kept.

    Step n draws from seed n, so an interrupted run and a whole one are the same.
    """

    def __init__(self, path: Path, module: nn.Module, lr: float, average: float = 0.999) -> None:
        self.path, self.module, self.average = path, module, average
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.01)
        self.lr, self.step, self.seconds = lr, 0, 0.0
        self.mean = {name: value.clone() for name, value in module.state_dict().items()}
        if path.is_file():
            kept = torch.load(path)
            module.load_state_dict(kept["module"])
            self.optimizer.load_state_dict(kept["optimizer"])
            self.mean, self.step, self.seconds = kept["mean"], kept["step"], kept["seconds"]

    def go_on(self, weights: dict[str, Tensor], step: int) -> None:
        """Start where these weights were saved; the optimizer's state was not, and begins anew."""
        self.module.load_state_dict(weights)
        self.mean = {name: value.clone() for name, value in self.module.state_dict().items()}
        self.step = step

    def keep(self) -> None:
        content = {key: getattr(self, key) for key in ("mean", "step", "seconds")}
        content |= {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        beside = self.path.with_suffix(".writing")
        torch.save(content, beside)
        os.replace(beside, self.path)  # an interruption leaves the old file or the new one

    def run(self, steps: int, loss_of: Callable[[], Tensor], decay: bool = True) -> None:
        """Up to `steps` steps in all; `decay` lets the learning rate end at zero."""
        self.module.train()
        kept, before, start = time.perf_counter(), self.seconds, time.perf_counter()
        while self.step < steps:
            torch.manual_seed(self.step)
            warm, left = min(1.0, (self.step + 1) / 100), 1 - self.step / steps
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * warm * (left if decay else 1.0)
            loss = loss_of()
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimizer.step()
            share = min(self.average, (self.step + 1) / (self.step + 10))
            for name, value in self.module.state_dict().items():
                self.mean[name].lerp_(value, 1 - share)
            self.step += 1
            now = time.perf_counter()
            self.seconds = before + now - start
            if now - kept > CHECKPOINT_SECONDS or self.step == steps:
                self.keep()
                kept = now
                print(f"{self.path.stem} {self.step}/{steps} loss {loss.item():.4f} {self.seconds:.0f} s", flush=True)


def train_coder(args: argparse.Namespace, images: Tensor) -> Fit:
    """The autoencoder: absolute error and a small divergence; images are shifted by up to two pixels."""
    coder = Coder()
    fit = Fit(args.work / "vae.pt", coder.vae, lr=1e-3, average=0.995)

    def loss_of() -> Tensor:
        batch = shifted(images[torch.randint(len(images), (16,))])
        posterior = coder.encode(batch)
        decoded = coder.decode(posterior.sample())
        return F.l1_loss(decoded, batch) + 1e-6 * posterior.kl().mean()

    fit.run(args.vae_steps, loss_of)
    coder.vae.load_state_dict(fit.mean)
    coder.normalize(images)
    save(args.weights / "emoji_vae.safetensors", coder.state_dict())
    return fit


def shifted(images: Tensor, reach: int = 2) -> Tensor:
    """Each image moved by up to `reach` pixels each way, on white."""
    padded = F.pad(images, (reach,) * 4, value=1.0)
    size, offsets = images.shape[-1], torch.randint(2 * reach + 1, (len(images), 2)).tolist()
    return torch.stack([image[:, y : y + size, x : x + size] for image, (y, x) in zip(padded, offsets, strict=True)])


def train_judges(args: argparse.Namespace, coder: Coder, drawings: Tensor) -> Fit:
    """On drawings (N, 2, 3, 32, 32) and what the autoencoder makes of them; the caption judge sees them varied."""
    judges, decoded = Judges(), reconstructed(coder, drawings)
    judges.style.fit(*torch.cat([drawings, decoded]).unbind(1))

    def loss_of() -> Tensor:
        rows = torch.randperm(len(drawings))[:96]
        images = torch.where(torch.rand(len(rows), 2, 1, 1, 1) < 0.5, drawings[rows], decoded[rows])
        return contrast(judges.caption, varied(shifted(images.flatten(0, 1))).unflatten(0, (len(rows), 2)))

    fit = Fit(args.work / "caption.pt", judges.caption, lr=2e-3, average=0.99)
    fit.run(args.judge_steps, loss_of)
    judges.caption.load_state_dict(fit.mean)
    save(args.weights / "emoji_judges.safetensors", judges.state_dict())
    return fit


def reconstructed(coder: Coder, drawings: Tensor) -> Tensor:
    return coder.images(coder.latents(drawings.flatten(0, 1))).unflatten(0, drawings.shape[:2])


def train_generator(args: argparse.Namespace, coder: Coder, emoji: Emoji) -> Fit:
    """The U-Net and its words: the noise's squared error; a tenth of the captions is left out, for guidance."""
    generator = Generator(sorted({word for caption in emoji.captions for word in caption.split()}))
    fit, saved = Fit(args.work / "unet.pt", generator, lr=1e-3), args.weights / "emoji_unet.safetensors"
    if saved.is_file() and int(note(saved)["steps"]) > fit.step:
        fit.go_on(load_generator(args.weights).state_dict(), int(note(saved)["steps"]))
    latents = coder.latents(emoji.images.flatten(0, 1)).unflatten(0, emoji.images.shape[:2])
    tokens, nothing = generator.text.tokens(emoji.captions), generator.text.tokens([""])
    scheduler, count = new_scheduler(), 32

    def loss_of() -> Tensor:
        rows = torch.randint(len(latents), (count,))
        clean = latents[rows, torch.randint(latents.shape[1], (count,))]
        noise, timesteps = torch.randn_like(clean), torch.randint(scheduler.config.num_train_timesteps, (count,))
        given = torch.where(torch.rand(count, 1) < 0.1, nothing, tokens[rows])
        noisy = scheduler.add_noise(clean, noise, timesteps)
        return F.mse_loss(generator.unet(noisy, timesteps, generator.text(given)).sample, noise)

    # The rate is constant, so that training can end at any step: the average takes the noise out.
    for steps, name in ((args.early, "emoji_unet_early"), (args.unet_steps, "emoji_unet")):
        early = name != "emoji_unet"
        if early and fit.step > steps:
            continue
        fit.run(steps, loss_of, decay=False)
        words = " ".join(generator.text.vocabulary)
        weights = {key: value for key, value in fit.mean.items() if not early or key.startswith(ENCODER)}
        save(args.weights / f"{name}.safetensors", weights, {"vocabulary": words, "steps": str(fit.step)})
    return fit


def measured(coder: Coder, generator: Generator, judges: Judges, emoji: Parts, count: int = 128) -> dict[str, float]:
    """How well each network does on what it did not learn from; the generator, on the requests' captions."""
    held_out, asked = emoji.held_out.images, emoji.requests
    decoded = reconstructed(coder, held_out)
    right = accuracy(judges, held_out, decoded)
    chosen = torch.arange(min(count, len(asked.captions)))
    latents = sample(generator.unet, generator.text, asked.captions[: len(chosen)], seeded_noise(range(len(chosen))))
    images = coder.images(latents)
    real = judges.caption.features(asked.images.flatten(0, 1))
    return {
        "autoencoder: mean absolute error": float((decoded - held_out).abs().mean()),
        "style judge: right about drawings": right.style,
        "style judge: right about reconstructions": right.style_decoded,
        "caption judge: the nearest is right": right.first,
        "caption judge: one of five is right": right.nearest,
        "generator: belief in Twemoji": float(judges.twemoji(images).mean()),
        "generator: matches the caption": float(judges.matches(images, asked.images, chosen).double().mean()),
        "generator: distance to real drawings": kernel_distance(judges.caption.features(images), real),
    }


def draw(path: Path, coder: Coder, generator: Generator, asked: Emoji, rows: int = 12, samples: int = 4) -> None:
    """Two columns of requests: the real drawings, one reconstruction, and samples from different noise."""
    total = min(2 * rows, len(asked.captions))
    captions, drawings = asked.captions[:total], asked.images[:total]
    noise = seeded_noise(range(total * samples))
    drawn = coder.images(sample(generator.unet, generator.text, [c for c in captions for _ in range(samples)], noise))
    shown = torch.cat([drawings, reconstructed(coder, drawings), drawn.unflatten(0, (total, samples))], dim=1)
    figure, axes = report.new_figure(columns=2, width=10, height=0.47 * ((total + 1) // 2) + 0.6)
    for axis, part, names in zip(axes, shown.split((total + 1) // 2), _halves(captions), strict=True):
        framed = F.pad(part, (1,) * 4, value=1.0).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
        axis.imshow((framed + 1) / 2)
        axis.set_yticks([34 * (row + 0.5) for row in range(len(names))], [name[:26] for name in names], fontsize=7)
        places = ["Noto", "Twemoji", "decoded", "decoded", *["sample"] * samples]
        axis.set_xticks([34 * (column + 0.5) for column in range(len(places))], places, fontsize=6)
        axis.tick_params(length=0)
        axis.xaxis.tick_top()
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
    report.save_figure(path, figure)


def _halves(items: list[Any]) -> list[list[Any]]:
    middle = (len(items) + 1) // 2
    return [items[:middle], items[middle:]]
