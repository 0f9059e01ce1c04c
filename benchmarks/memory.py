"""What a training step holds for its backward pass, its peak, and weights beyond the user's model.

Every tensor that an operation makes is followed until nobody holds it. "Held" is what is alive as the backward pass
begins, which is what it needs; the peak is that of the whole step; both are beyond what existed before, and counted by
storage. What the process takes from the system, or from the GPU, is its own account: kernels' workspaces included, in
whole pages. Weights held beyond the user's model are counted too. Writes memory.csv, memory.json and memory.png.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import report
from benchmarks.steps import LATENTS, MODELS, Steps
from ncp_loss import NoiseConditionedPerceptualLoss

BASE = "latent DPO"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=list(MODELS), default="small")
    parser.add_argument("--latents", type=int, help=f"height and width; default: {LATENTS}")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--layer", choices=["down_blocks", "mid_block"], default="mid_block")


def run(args: argparse.Namespace) -> None:
    if args.tiny:
        args.model = "tiny"
    latents = args.latents or LATENTS[args.model]
    steps = Steps(args.model, latents, args.pairs, args.layer, torch.float32, args.device)
    checkpointed = NoiseConditionedPerceptualLoss(steps.unet, args.layer, schedule=steps.scheduler, checkpoint=True)
    contenders: dict[str, Callable[[], Any]] = {
        BASE: steps.latent,
        "NCP as published": steps.published_step,
        "ncp_loss": steps.perceptual,
        "ncp_loss, checkpoint=True": lambda: steps.perceptual(checkpointed),
        "ncp_loss, kept reference": steps.kept_reference,
    }
    weights = {
        "NCP as published": own_bytes(steps.published.encoder, steps.unet),
        **{name: own_bytes(steps.ncp._encoder.view, steps.unet) for name in contenders if name.startswith("ncp_loss")},
    }
    steps.perceptual()  # what is made once is there: tables, gradients
    found = {name: held_and_peak(steps, step) for name, step in contenders.items()}
    taken = {name: taken_by_process(step, args.device) for name, step in contenders.items()}
    base = found[BASE]
    extra = found["ncp_loss"][0] - base[0]
    rows = [
        {
            "step": name,
            "held for backward, MB": held / 1e6,
            "beyond latent DPO, MB": (held - base[0]) / 1e6,
            "over ncp_loss's": (held - base[0]) / extra,
            "peak, MB": peak / 1e6,
            "peak beyond latent DPO, MB": (peak - base[1]) / 1e6,
            "process, MB": None if taken[name] is None else taken[name] / 1e6,
            "weights beyond the model, MB": weights.get(name, 0) / 1e6,
        }
        for name, (held, peak) in found.items()
    ]
    settings = {key: getattr(args, key) for key in ("model", "pairs", "layer")} | {"latents": latents}
    activations = encoder_activations(steps)
    content = {"settings": settings, "steps": rows, "encoder activations, MB": activations / 1e6}
    report.write_csv(args.out / "memory.csv", rows)
    report.write_json(args.out / "memory.json", report.record(args.device) | content)
    draw(args.out / "memory.png", rows, f"{args.model}, {latents} x {latents} latents, {args.layer}, float32")
    report.print_table("A training step", rows, dict.fromkeys(rows[0], ".2f") | {"step": ""})
    print(f"what the encoder alone holds for its backward pass: {activations / 1e6:.2f} MB")


def own_bytes(encoder: nn.Module, unet: nn.Module) -> int:
    """Of the weights that an encoder holds and the user's model does not."""
    theirs = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    ours = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in encoder.parameters()}
    return sum(size for pointer, size in ours.items() if pointer not in theirs)


def held_and_peak(steps: Steps, step: Callable[[], Any]) -> tuple[int, int]:
    with Alive() as alive:
        steps.before_backward = lambda: setattr(alive, "held", alive.now)
        step()
    steps.before_backward = lambda: None
    return alive.held, alive.peak


def taken_by_process(step: Callable[[], Any], device: torch.device) -> int | None:
    """How far a step takes the process's memory above where it began, at most; None where the system does not tell."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be used first, and not be seen
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now
    except (OSError, AttributeError):
        return None
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def _resident(which: str) -> int:
    """Bytes of this process in memory now, VmRSS, or at the peak, VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


def encoder_activations(steps: Steps) -> int:
    """What the encoder alone holds for its backward pass, its features included."""
    latents = steps.noisy.detach().requires_grad_()
    with Alive() as alive:
        features = steps.ncp._encoder(latents, steps.timesteps, steps.text, steps.extra, latents.dtype)
        held = alive.now
    del features
    return held


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations have made and nobody has dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.held = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is not None and storage._cdata not in before | self.known:
                self._born(storage)
        return out

    def _born(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._dropped, key, size)

    def _dropped(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def draw(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    figure, (axis,) = report.new_figure(width=8, height=0.5 * len(rows) + 1.4)
    for i, row in enumerate(rows):
        axis.barh(i, row["held for backward, MB"], color=report.BLUE, alpha=0.85, height=0.6)
        axis.barh(
            i, row["weights beyond the model, MB"], left=row["held for backward, MB"], color=report.RED, height=0.6
        )
    axis.barh(0, 0, color=report.BLUE, label="held for the backward pass")
    axis.barh(0, 0, color=report.RED, label="weights beyond the user's model")
    axis.set_yticks(range(len(rows)), [row["step"] for row in rows])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", alpha=0.25)
    axis.set_xlabel("MB")
    axis.set_title(title, fontsize=11)
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=2)
    report.save_figure(path, figure)
