"""What a training step holds for its backward pass, its peak, and weights beyond the user's model.

Every tensor that an operation makes is followed until nobody holds it. "Held" is what is alive as the backward pass
begins, which is what it needs; the peak is that of the whole step; both are beyond what existed before, and counted by
storage. "The loss holds" is what is alive once the loss is computed, beyond what was before its call. What the process
takes from the system, or from the GPU, is its own account: kernels' workspaces included, in whole pages. Weights held
beyond the user's model are counted too. Then peaks are followed over batch sizes, with all samples evaluated at once
and with ``chunk_size=2``, one pair: of the loss alone, from given predictions, and of a step. A step's may be no higher
than latent DPO's, whose own peak comes later, in the model's backward pass. Writes memory.csv, memory-batches.csv,
memory.json and memory.png.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import report
from benchmarks.steps import LATENTS, MODELS, Steps
from ncp_loss.encoder import linearized

BASE = "latent DPO"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=list(MODELS), default="small")
    parser.add_argument("--latents", type=int, help=f"height and width; default: {LATENTS}")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--layer", choices=["down_blocks", "mid_block"], default="mid_block")
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 8, 32], help="rows, for the peak by batch size")


def run(args: argparse.Namespace) -> None:
    if args.tiny:
        args.model, args.batches = "tiny", [2, 4]
    latents = args.latents or LATENTS[args.model]
    steps = Steps(args.model, latents, args.pairs, args.layer, torch.float32, args.device)
    checkpointed = steps.new_loss(checkpoint=True)
    contenders: dict[str, Callable[[], Any]] = {
        BASE: steps.latent,
        "NCP as published": steps.published_step,
        "ncp_loss": steps.perceptual,
        "ncp_loss, checkpoint=True": lambda: steps.perceptual(checkpointed),
        "ncp_loss, kept reference error": steps.kept_error,
    }
    weights = {
        "NCP as published": own_bytes(steps.published.encoder, steps.unet),
        **{name: own_bytes(steps.ncp._encoder.view, steps.unet) for name in contenders if name.startswith("ncp_loss")},
    }
    steps.perceptual()  # what is made once is there: tables, gradients
    found = {name: held_and_peak(steps, step) for name, step in contenders.items()}
    taken = {name: taken_by_process(step, args.device) for name, step in contenders.items()}
    base = found[BASE]
    rows = [
        {
            "step": name,
            "held for backward, MB": held / 1e6,
            "beyond latent DPO, MB": (held - base[0]) / 1e6,
            "peak, MB": peak / 1e6,
            "peak beyond latent DPO, MB": (peak - base[1]) / 1e6,
            "process, MB": None if taken[name] is None else taken[name] / 1e6,
            "the loss holds, MB": (holds := of_loss(steps, name)[0]) / 1e6,
            "in predictions": holds / steps.noise.nbytes,
            "weights beyond the model, MB": weights.get(name, 0) / 1e6,
        }
        for name, (held, peak) in found.items()
    ]
    settings = {key: getattr(args, key) for key in ("model", "pairs", "layer")} | {"latents": latents}
    activations = encoder_activations(steps) / args.pairs
    batches = [row for size in args.batches for row in of_batch(size, args, latents, activations)]
    content = {
        "settings": settings,
        "steps": rows,
        "a pair's encoder activations, MB": activations / 1e6,
        "one prediction, MB": steps.noise.nbytes / 1e6,
        "batches": batches,
    }
    report.write_csv(args.out / "memory.csv", rows)
    report.write_csv(args.out / "memory-batches.csv", batches)
    report.write_json(args.out / "memory.json", report.record(args.device) | content)
    title = f"{args.model}, {latents} x {latents} latents, {args.layer}, float32"
    draw(args.out / "memory.png", rows, batches, activations / 1e6, title)
    report.print_table("A training step", rows, dict.fromkeys(rows[0], ".2f") | {"step": ""})
    report.print_table("By batch size", batches, dict.fromkeys(list(batches[0])[2:], ".2f"))
    print(f"what the encoder alone holds for the backward pass of a pair: {activations / 1e6:.2f} MB")


def of_batch(size: int, args: argparse.Namespace, latents: int, activations: float) -> list[dict[str, Any]]:
    """The peak of a step beyond latent DPO's, all samples evaluated at once and a pair at a time; what losses hold."""
    steps = Steps(args.model, latents, size // 2, args.layer, torch.float32, args.device)
    steps.perceptual()
    base = held_and_peak(steps, steps.latent)[1]
    rows = []
    for chunk_size in (None, 2):
        ncp = steps.new_loss(chunk_size=chunk_size)
        peak, (held, own) = held_and_peak(steps, partial(steps.perceptual, ncp))[1], of_loss(steps, "ncp_loss", ncp)
        rows.append(
            {
                "rows": size,
                "chunk_size": str(chunk_size),
                "the loss's own peak, MB": own / 1e6,
                "own peak in a pair's activations": own / activations,
                "peak of a step beyond latent DPO, MB": (peak - base) / 1e6,
                "step's in a pair's activations": (peak - base) / activations,
                "the loss holds, predictions": held / steps.noise.nbytes,
            }
        )
    return rows


def of_loss(steps: Steps, name: str, ncp: nn.Module | None = None) -> tuple[int, int]:
    """What is alive when the loss has been computed from given predictions, beyond what was; and at most meanwhile."""
    model_pred, ref_pred = steps.predict(), steps.predict_reference()
    inputs = {
        "NCP as published": lambda: steps.published(model_pred, ref_pred, steps),
        BASE: lambda: steps.latent_loss(model_pred, ref_pred),
        "ncp_loss, kept reference error": lambda: steps.dpo(steps.ncp, model_pred, ref_error=steps.ref_error),
    }
    make = inputs.get(name, lambda: steps.dpo(ncp or steps.ncp, model_pred, ref_pred=ref_pred))
    with Alive() as alive:
        loss = make()
        gc.collect()
        held = alive.now
    del loss
    return held, alive.peak


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
    with Alive() as alive:
        features, pull_back = linearized(steps.encode, steps.noisy)
        held = alive.now
    del features, pull_back
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


def draw(path: Path, rows: list[dict[str, Any]], batches: list[dict[str, Any]], activations: float, title: str) -> None:
    """What a step holds, a bar for each contender; peaks by batch size, of the loss alone and of a step."""
    figure, (held, peak) = report.new_figure(2, width=12, height=0.5 * len(rows) + 1.6)
    left, right = "held for backward, MB", "weights beyond the model, MB"
    for i, row in enumerate(rows):
        held.barh(i, row[left], color=report.BLUE, alpha=0.85, height=0.6)
        held.barh(i, row[right], left=row[left], color=report.RED, height=0.6)
    held.barh(0, 0, color=report.BLUE, label="held for the backward pass")
    held.barh(0, 0, color=report.RED, label="weights beyond the user's model")
    held.set_yticks(range(len(rows)), [row["step"] for row in rows])
    held.invert_yaxis()
    held.grid(axis="y", visible=False)
    held.grid(axis="x", alpha=0.25)
    held.set_xlabel("MB")
    held.set_title(title, fontsize=11)
    held.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    for chunk, color in (("None", report.GREY), ("2", report.BLUE)):
        mine = [row for row in batches if row["chunk_size"] == chunk]
        sizes, label = [row["rows"] for row in mine], f"chunk_size={chunk}"
        own, step = (
            [row[k] for row in mine] for k in ("the loss's own peak, MB", "peak of a step beyond latent DPO, MB")
        )
        peak.plot(sizes, own, marker="o", color=color, label=f"the loss alone, {label}")
        peak.plot(sizes, step, marker="x", color=color, ls=":", label=f"a step beyond latent DPO's, {label}")
    peak.axhline(activations, color=report.ORANGE, ls="--", lw=1.2, label="the encoder's activations of one pair")
    peak.set(xscale="log", xlabel="rows of the batch", ylabel="MB")
    peak.set_xticks(sizes, [str(size) for size in sizes])
    peak.minorticks_off()
    peak.set_title("Peak by batch size", fontsize=11)
    peak.legend(frameon=False, fontsize=9)
    report.save_figure(path, figure)
