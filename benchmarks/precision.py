"""Error and gradient of every estimator in every precision, against the literal definition in float64.

The weights are rounded once to what bf16 and fp16 both hold, so that every precision has the same network; latents,
predictions and truths are fed in float32 to all. Writes precision.csv (a line per network, layer, precision, estimator,
timestep and error size), precision.json (summary, costs, LoRA gradients, range of activations) and precision.png.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

from benchmarks import report
from benchmarks.compute import COMPUTES, Compute
from benchmarks.lora import lora_gradients
from benchmarks.networks import NETWORKS, Batch, converted
from examples.digits import new_scheduler
from ncp_loss import NoiseConditionedPerceptualLoss
from ncp_loss.difference import Estimator

TIMESTEPS = [1, 5, 20, 100, 500, 900, 999]
RMS = [0.3, 0.05, 0.01]
LAYERS = ["down_blocks", "mid_block"]
ESTIMATORS = ["literal", "scaled", "central", "tangent"]  # "auto" is one of them, and reported with its figures
LITERAL = Estimator("literal")
Key = tuple[str, str, str, str]  # network, layer, compute, estimator


class Measured(NamedTuple):
    """Per-sample error (B,), its gradient with respect to the prediction, and what both cost."""

    error: Tensor
    gradient: Tensor
    evaluations: float
    seconds: float


class Sample(NamedTuple):
    """One row of a batch, compared with the truth."""

    timestep: int
    rms: float
    ratio: float
    cosine: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--compute", nargs="+", choices=list(COMPUTES), default=list(COMPUTES))
    parser.add_argument("--samples", type=int, default=1, help="per cell; a random network each")


def run(args: argparse.Namespace) -> None:
    kept = report.Kept(args.out / "precision.partial.json", args.resume)
    timesteps, rms, layers, samples = TIMESTEPS, RMS, LAYERS, args.samples
    if args.tiny:
        timesteps, rms, layers, samples = [1, 500], [0.05], LAYERS[:1], 1
        args.compute = ["float32", "tf32", "bfloat16", "bf16-fp16"]
    found: dict[Key, list[Sample]] = defaultdict(list)
    costs: dict[Key, list[tuple[float, float]]] = defaultdict(list)
    plan = [(n, s, layer) for n in args.networks for s in range(samples) for layer in layers]
    progress = tqdm(total=len(plan) * len(args.compute))
    for network, sample, layer in plan:
        unet, batch = prepared(network, args.seed + sample, args.tiny, timesteps, rms, args.device)
        truth = cache(partial(truth_of, unet, batch, layer, args.device))
        for name in args.compute:
            progress.set_description(f"{network} {layer} {name}")
            make = partial(compared, unet, batch, layer, COMPUTES[name], truth, args.device)
            for estimator, (rows, cost) in kept.get(f"{network} {sample} {layer} {name}", make).items():
                found[network, layer, name, estimator] += [Sample(*row) for row in rows]
                costs[network, layer, name, estimator].append(cost)
            progress.update()
    progress.close()

    cells = list(cells_of(found))
    summary = list(summary_of(found, cells, costs))
    adapted = args.networks[:1] if args.tiny else args.networks
    lora = [row for network in adapted for row in lora_gradients(network, args, kept)]
    ranges = kept.get("range", lambda: list(ranges_of(args)))
    chosen = {name: COMPUTES[name].estimator("auto", args.device)._asdict() for name in args.compute}
    content = {"auto": chosen, "summary": summary, "lora": lora, "range": ranges}
    report.write_csv(args.out / "precision.csv", cells)
    report.write_json(args.out / "precision.json", report.record(args.device, kept.seconds) | content, digits=8)
    draw(args.out / "precision.png", summary)
    kept.done()
    show(content, args.networks)


def show(content: dict[str, Any], networks: list[str]) -> None:
    """Tables of what precision.json holds."""
    formats = {"ratio": ".4g", "ratio t<=5": ".4g", "ratio t>=20": ".4g", "worst ratio": ".4g", "time": ".2f"}
    formats |= dict.fromkeys(("cosine", "cosine t<=5", "cosine t>=20", "worst cosine"), ".5f")
    for network in networks:
        rows = [{k: v for k, v in r.items() if k != "network"} for r in content["summary"] if r["network"] == network]
        report.print_table(NETWORKS[network].label, rows, formats)
    report.print_table("NCP-DPO gradient of LoRA parameters", content["lora"], {"cosine": ".4f", "worst": ".4f"})
    report.print_table("Range of activations, and fp16", content["range"], {"largest activation": ".3g"})


def prepared(
    network: str, seed: int, tiny: bool, timesteps: list[int], rms: list[float], device: torch.device
) -> tuple[UNet2DConditionModel, Batch]:
    """The float32 network and its batch; the batch is drawn on the CPU, the same on every device."""
    kind = NETWORKS[network]
    unet = kind.make(seed, tiny)
    batch = kind.batch(unet, timesteps, rms, 1000 + seed)
    return unet.to(device), batch._replace(arguments=converted(batch.arguments, device))


def in_dtype(unet: UNet2DConditionModel, dtype: torch.dtype) -> UNet2DConditionModel:
    """A copy in another dtype; its weights keep their values, which every dtype holds."""
    return copy.deepcopy(unet).to(dtype)


def truth_of(unet: UNet2DConditionModel, batch: Batch, layer: str, device: torch.device) -> Measured:
    """The literal definition in float64."""
    exact = converted(batch.arguments, device, torch.float64)
    return measured(in_dtype(unet, torch.float64), layer, LITERAL, exact, COMPUTES["float64"], device)


def compared(
    unet: UNet2DConditionModel,
    batch: Batch,
    layer: str,
    compute: Compute,
    truth: Callable[[], Measured],
    device: torch.device,
) -> dict[str, tuple[list[Sample], tuple[float, float]]]:
    """Each estimator's rows against the truth, and its cost: evaluations over literal's, seconds over literal's."""
    exact = compute.weights == torch.float64
    arguments = converted(batch.arguments, device, torch.float64) if exact else batch.arguments
    kinds = {name: compute.estimator(name, device) for name in ESTIMATORS}
    with compute.flags():
        copied = in_dtype(unet, compute.weights)
        results = {name: measured(copied, layer, kind, arguments, compute, device) for name, kind in kinds.items()}
    auto = compute.estimator("auto", device)
    results["auto"] = next(results[name] for name, kind in kinds.items() if kind == auto)
    literal = results["literal"]
    return {
        name: (
            samples_of(batch, result, truth()),
            (result.evaluations / literal.evaluations, result.seconds / literal.seconds),
        )
        for name, result in results.items()
    }


def samples_of(batch: Batch, result: Measured, truth: Measured) -> list[Sample]:
    ratios = (result.error.double() / truth.error).tolist()
    cosines = cosine_similarity(result.gradient.double().flatten(1), truth.gradient.flatten(1), eps=0).tolist()
    return [Sample(*row) for row in zip(batch.timesteps, batch.rms, ratios, cosines, strict=True)]


def measured(
    unet: UNet2DConditionModel,
    layer: str,
    estimator: Estimator,
    arguments: dict[str, Any],
    compute: Compute,
    device: torch.device,
) -> Measured:
    """One call of ``ncp.errors`` and its backward pass, timed, its encoder evaluations counted."""
    ncp = NoiseConditionedPerceptualLoss(unet, layer, schedule=new_scheduler(), difference=estimator.kind)
    prediction = arguments["model_pred"].detach().requires_grad_()
    rows: list[int] = []

    def count(_: Any, args: tuple[Tensor, ...]) -> None:  # a dual number takes two evaluations
        rows.append(len(args[0]) * (1 if forward_ad.unpack_dual(args[0]).tangent is None else 2))

    def step() -> tuple[Tensor, Tensor]:
        with compute.forward(device), mock.patch("ncp_loss.loss.choose", return_value=estimator):
            error, _ = ncp.errors(**(arguments | {"model_pred": prediction}))
        return error.detach(), torch.autograd.grad(error.sum(), prediction)[0]

    ncp._encoder.view.register_forward_pre_hook(count)
    if device.type == "cuda":
        step()  # loads and picks kernels
        rows.clear()
    start = now(device)
    error, gradient = step()
    return Measured(error, gradient, sum(rows) / len(prediction) + 1, now(device) - start)  # 1: the backward pass


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def cells_of(found: dict[Key, list[Sample]]) -> Iterator[dict[str, Any]]:
    """A line per network, layer, compute, estimator, timestep and error size: medians and the worst of its samples."""
    for (network, layer, compute, estimator), samples in found.items():
        cells: dict[tuple[int, float | None], list[Sample]] = defaultdict(list)
        for sample in samples:  # a trained network's errors are its own: one cell per timestep
            cells[sample.timestep, None if network == "digits" else sample.rms].append(sample)
        for (timestep, rms), rows in cells.items():
            yield {
                "network": network,
                "layer": layer,
                "compute": compute,
                "estimator": estimator,
                "timestep": timestep,
                "error rms": statistics.median(r.rms for r in rows) if rms is None else rms,
                "samples": len(rows),
                "ratio": statistics.median(r.ratio for r in rows),
                "lowest ratio": min(r.ratio for r in rows),
                "highest ratio": max(r.ratio for r in rows),
                "cosine": statistics.median(r.cosine for r in rows),
                "worst cosine": min(r.cosine for r in rows),
            }


def summary_of(
    found: dict[Key, list[Sample]], cells: list[dict[str, Any]], costs: dict[Key, list[tuple[float, float]]]
) -> Iterator[dict[str, Any]]:
    """Per network, compute and estimator: medians over all samples, the worst cell's medians, and the cost."""
    for network, compute, estimator in dict.fromkeys((n, c, e) for n, _, c, e in found):
        keys = [key for key in found if (key[0], *key[2:]) == (network, compute, estimator)]
        samples = [sample for key in keys for sample in found[key]]
        mine = [c for c in cells if (c["network"], c["compute"], c["estimator"]) == (network, compute, estimator)]

        def median(what: str, keep: Callable[[Sample], bool] = lambda _: True, rows: Any = samples) -> float | None:
            return statistics.median([getattr(row, what) for row in rows if keep(row)] or [float("nan")])

        yield {
            "network": network,
            "compute": compute,
            "estimator": estimator,
            "ratio": median("ratio"),
            "ratio t<=5": median("ratio", lambda s: s.timestep <= 5),
            "ratio t>=20": median("ratio", lambda s: s.timestep >= 20),
            "worst ratio": max((c["ratio"] for c in mine), key=lambda ratio: max(ratio, 1 / ratio)),
            "cosine": median("cosine"),
            "cosine t<=5": median("cosine", lambda s: s.timestep <= 5),
            "cosine t>=20": median("cosine", lambda s: s.timestep >= 20),
            "worst cosine": min(c["cosine"] for c in mine),
            "evaluations": statistics.median(cost for key in keys for cost, _ in costs[key]),
            "time": statistics.median(seconds for key in keys for _, seconds in costs[key]),
        }


def ranges_of(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """How large activations are, and whether the loss is finite in fp16: each network, and one made ever louder."""
    cases = [(network, 1.0) for network in args.networks]
    cases += [("sd15", scale) for scale in ((1e5,) if args.tiny else (1e3, 1e4, 1e5))]
    for network, scale in cases:
        unet, batch = prepared(network, args.seed, args.tiny, [500], [0.05], args.device)
        unet.conv_in.weight.mul_(scale)  # the residual stream carries it through
        largest = Largest(unet)
        ncp = NoiseConditionedPerceptualLoss(unet, "mid_block")
        inputs = [batch.arguments[name] for name in ("noisy_latents", "timesteps", "encoder_hidden_states")]
        extra = {k: v for k, v in batch.arguments.items() if k == "added_cond_kwargs"}
        largest.watch(ncp._encoder.view)
        ncp.features(*inputs, **extra)
        row: dict[str, Any] = {"network": network, "first layer times": scale, "largest activation": largest.value}
        truth = truth_of(unet, batch, "mid_block", args.device)
        for name in ("float16", "bf16-fp16"):
            compute = COMPUTES[name]
            auto, copied = compute.estimator("auto", args.device), in_dtype(unet, compute.weights)
            result = measured(copied, "mid_block", auto, batch.arguments, compute, args.device)
            finite = bool(result.error.isfinite().all() and result.gradient.isfinite().all())
            cosine = (
                cosine_similarity(*(g.double().flatten(1) for g in (result.gradient, truth.gradient)), eps=0)
                .median()
                .item()
            )
            row |= {f"{name} finite": finite, f"{name} cosine": round(cosine, 4) if finite else None}
        yield row


class Largest:
    """The largest magnitude that any module of a network returns."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.value = 0.0

    def watch(self, view: torch.nn.Module) -> None:
        for module in view.modules():
            module.register_forward_hook(self._see)

    def _see(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        for x in output if isinstance(output, tuple) else (output,):
            if isinstance(x, Tensor):
                self.value = max(self.value, x.abs().max().item())


def draw(path: Path, summary: list[dict[str, Any]]) -> None:
    """The gradient's cosine and the error's ratio in each precision; a marker per network, a line to its worst cell."""
    shown = {"literal": report.RED, "auto": report.BLUE, "tangent": report.GREEN}
    computes = [c for c in COMPUTES if c != "float64" and any(row["compute"] == c for row in summary)]
    networks = list(dict.fromkeys(row["network"] for row in summary))
    figure, axes = report.new_figure(2, width=12, height=4.6)
    for place, (compute, estimator) in enumerate((c, e) for c in computes for e in shown):
        rows = {row["network"]: row for row in summary if (row["compute"], row["estimator"]) == (compute, estimator)}
        for i, row in enumerate(rows[n] for n in networks if n in rows):
            x = place // 3 + 0.27 * (place % 3 - 1) + 0.07 * (i - 1)
            style = {"color": shown[estimator], "ms": 5, "marker": "os^"[networks.index(row["network"])], "mew": 0}
            for axis, value, worst in (
                (axes[0], _lack(row["cosine"]), _lack(row["worst cosine"])),
                (axes[1], row["ratio"], row["worst ratio"]),
            ):
                axis.plot([x, x], [value, worst], color=shown[estimator], lw=1, alpha=0.4)
                axis.plot([x], [value], ls="", **style)
    for axis in axes:
        axis.set_yscale("log")
        axis.set_xticks(range(len(computes)), [COMPUTES[c].label for c in computes], fontsize=8)
        axis.tick_params(axis="x", length=0)
    axes[0].invert_yaxis()
    ticks = [1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6]
    axes[0].set_yticks(ticks, ["0", "0.9", "0.99", "0.999", "0.9999", "0.99999", "1"])
    axes[0].set_ylim(1.6, 6e-7)
    axes[0].set_title("Cosine of the gradient with float64's (1 is right)", fontsize=11)
    axes[1].set_title("Error over float64's (1 is right)", fontsize=11)
    axes[1].set_yticks([1, 10, 100, 1000, 10000], ["1", "10", "100", "1000", "10000"])
    for axis in axes:
        axis.minorticks_off()
    for name, color in shown.items():
        axes[1].plot([], [], color=color, marker="o", ls="", ms=7, label=name)
    for name, marker in zip(networks, "os^", strict=False):
        axes[1].plot([], [], color=report.GREY, marker=marker, ls="", ms=6, label=NETWORKS[name].label)
    axes[1].plot([], [], color=report.GREY, lw=1, label="to the worst timestep and error size")
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=7)
    report.save_figure(path, figure)


def _lack(cosine: float) -> float:
    """1 - cosine, within what the axis shows."""
    return min(max(1 - cosine, 1e-6), 1.0)
