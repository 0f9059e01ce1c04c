"""Error, gradient and margin of every estimator in every precision, against the literal definition in float64.

The weights are rounded once to what bf16 and fp16 both hold, so that every precision has the same network; latents,
predictions and truths are fed in float32 to all. A margin is the reference's error less the model's, where the model
predicts what its reference does, moved in a random direction by 10%, 1% or 0.1% of the reference's error. Writes
precision.csv (a line per network, layer, precision, estimator, timestep and error size), precision.json (summary,
margins, costs, LoRA gradients, range of activations) and precision.png.
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
MOVED = [0.1, 0.01, 0.001]  # the prediction's distance from the reference's, in its error's size
MARGIN_RMS, MARGIN_ROWS = 0.1, 3  # the reference's error on a random network, and rows a timestep
ESTIMATORS = ["literal", "scaled", "central"]  # "auto" is one of them, and reported with its figures
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
    margins: dict[Key, list[tuple[int, float, float]]] = defaultdict(list)  # timestep, moved, relative error
    costs: dict[Key, list[tuple[float, float]]] = defaultdict(list)
    plan = [(n, s, layer) for n in args.networks for s in range(samples) for layer in layers]
    progress = tqdm(total=len(plan) * len(args.compute))
    for network, sample, layer in plan:
        unet, batch = prepared(network, args.seed + sample, args.tiny, timesteps, rms, args.device)
        truth = cache(partial(truth_of, unet, batch, layer, args.device))
        close = moved_batches(network, unet, args.seed + sample, timesteps, args.device)
        true_margins = cache(
            partial(margins_of, in_dtype(unet, torch.float64), layer, LITERAL, close, COMPUTES["float64"])
        )
        for name in args.compute:
            progress.set_description(f"{network} {layer} {name}")
            make = partial(compared, unet, batch, layer, COMPUTES[name], truth, args.device)
            for estimator, (rows, cost) in kept.get(f"{network} {sample} {layer} {name}", make).items():
                found[network, layer, name, estimator] += [Sample(*row) for row in rows]
                costs[network, layer, name, estimator].append(cost)
            make_margins = partial(compared_margins, unet, close, layer, COMPUTES[name], true_margins, args.device)
            for estimator, rows in kept.get(f"margins {network} {sample} {layer} {name}", make_margins).items():
                margins[network, layer, name, estimator] += rows
            progress.update()
    progress.close()

    cells = list(cells_of(found))
    summary = list(summary_of(found, cells, costs))
    adapted = args.networks[:1] if args.tiny else args.networks
    lora = [row for network in adapted for row in lora_gradients(network, args, kept)]
    ranges = kept.get("range", lambda: list(ranges_of(args)))
    chosen = {name: COMPUTES[name].estimator("auto", args.device)._asdict() for name in args.compute}
    of_margins = list(margin_summary(margins))
    content = {"auto": chosen, "summary": summary, "margins": of_margins, "lora": lora, "range": ranges}
    report.write_csv(args.out / "precision.csv", cells)
    report.write_json(args.out / "precision.json", report.record(args.device, kept.seconds) | content, digits=8)
    draw(args.out / "precision.png", summary, of_margins)
    kept.done()
    show(content, args.networks)


def show(content: dict[str, Any], networks: list[str]) -> None:
    """Tables of what precision.json holds."""
    formats = {"ratio": ".4g", "ratio t<=5": ".4g", "ratio t>=20": ".4g", "worst ratio": ".4g", "time": ".2f"}
    formats |= dict.fromkeys(("cosine", "cosine t<=5", "cosine t>=20", "worst cosine"), ".5f")
    for network in networks:
        rows = [{k: v for k, v in r.items() if k != "network"} for r in content["summary"] if r["network"] == network]
        report.print_table(NETWORKS[network].label, rows, formats)
    report.print_table("Relative error of the margin", content["margins"], {str(m): ".3f" for m in MOVED})
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


def moved_batches(
    network: str, unet: UNet2DConditionModel, seed: int, timesteps: list[int], device: torch.device
) -> dict[float, Batch]:
    """For each distance a batch whose prediction is the reference's, moved by it."""
    batch = NETWORKS[network].batch(unet.cpu(), timesteps * MARGIN_ROWS, [MARGIN_RMS], 2000 + seed)
    if network == "digits":  # thrice the rows of a random network's batch already
        batch = NETWORKS[network].batch(unet, timesteps, [MARGIN_RMS], 2000 + seed)
    unet.to(device)
    arguments = batch.arguments
    sizes = torch.tensor(batch.rms).reshape(-1, 1, 1, 1)
    direction = torch.randn(arguments["target"].shape, generator=torch.Generator().manual_seed(seed))
    return {
        moved: batch._replace(
            arguments=converted(
                arguments
                | {
                    "ref_pred": arguments["model_pred"],
                    "model_pred": arguments["model_pred"] + moved * sizes * direction,
                },
                device,
            )
        )
        for moved in MOVED
    }


def margins_of(
    unet: UNet2DConditionModel, layer: str, estimator: Estimator, close: dict[float, Batch], compute: Compute
) -> dict[float, list[float]]:
    """``error - ref_error`` of each batch's rows."""
    ncp = NoiseConditionedPerceptualLoss(unet, layer, schedule=new_scheduler())
    found = {}
    for moved, batch in close.items():
        device = batch.arguments["target"].device
        exact = torch.float64 if compute.weights == torch.float64 else None
        with compute.forward(device), mock.patch("ncp_loss.loss.choose", return_value=estimator):
            error, ref_error = ncp.errors(**converted(batch.arguments, device, exact))
        assert ref_error is not None
        found[moved] = (error - ref_error).double().tolist()
    return found


def compared_margins(
    unet: UNet2DConditionModel,
    close: dict[float, Batch],
    layer: str,
    compute: Compute,
    truth: Callable[[], dict[float, list[float]]],
    device: torch.device,
) -> dict[str, list[tuple[int, float, float]]]:
    """Each estimator's margins: timestep, how far the prediction was moved, and the margin's relative error."""
    kinds = {name: compute.estimator(name, device) for name in ESTIMATORS}
    with compute.flags():
        copied = in_dtype(unet, compute.weights)
        found = {name: margins_of(copied, layer, kind, close, compute) for name, kind in kinds.items()}
    found["auto"] = next(found[name] for name, kind in kinds.items() if kind == compute.estimator("auto", device))
    return {
        name: [
            (t, moved, abs(value - right) / abs(right))
            for moved, values in margins.items()
            for t, value, right in zip(close[moved].timesteps, values, truth()[moved], strict=True)
        ]
        for name, margins in found.items()
    }


def margin_summary(margins: dict[Key, list[tuple[int, float, float]]]) -> Iterator[dict[str, Any]]:
    """Per network, compute and estimator, for each distance: the median over timesteps and layers."""
    for network, compute, estimator in dict.fromkeys((n, c, e) for n, _, c, e in margins):
        rows = [
            row
            for (n, _, c, e), found in margins.items()
            for row in found
            if (n, c, e) == (network, compute, estimator)
        ]
        medians = {str(m): statistics.median(error for _, moved, error in rows if moved == m) for m in MOVED}
        yield {"network": network, "compute": compute, "estimator": estimator} | medians


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

    def count(_: Any, args: tuple[Tensor, ...]) -> None:
        rows.append(len(args[0]))

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


SHOWN = {"literal": report.RED, "auto": report.BLUE}


def draw(path: Path, summary: list[dict[str, Any]], margins: list[dict[str, Any]]) -> None:
    """What training takes from the loss: the margin's error, and the gradient's direction; a marker per network."""
    computes = [c for c in COMPUTES if c != "float64" and any(row["compute"] == c for row in summary)]
    networks = list(dict.fromkeys(row["network"] for row in summary))
    figure, axes = report.new_figure(3, width=15, height=4.8)

    def points(axis: Any, rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> None:
        for row in rows:
            if row["compute"] not in computes or row["estimator"] not in SHOWN:
                continue
            side = 0.18 * (2 * list(SHOWN).index(row["estimator"]) - 1)
            x = computes.index(row["compute"]) + side + 0.08 * (networks.index(row["network"]) - 1)
            marker = "os^"[networks.index(row["network"])]
            axis.plot([x], [value(row)], ls="", color=SHOWN[row["estimator"]], marker=marker, ms=5.5, mew=0)

    points(axes[0], margins, lambda row: max(row["0.01"], 1e-4))
    points(axes[1], summary, lambda row: _lack(row["cosine"]))
    points(axes[2], summary, lambda row: row["ratio"])
    for axis in axes:
        axis.set_yscale("log")
        axis.set_xticks(range(len(computes)), [COMPUTES[c].label for c in computes], fontsize=7.5)
        axis.tick_params(axis="x", length=0)
        axis.minorticks_off()
    axes[0].set_title("Margin: its error over the margin itself (0 is right)", fontsize=10.5)
    axes[0].axhline(1, color=report.GREY, lw=1, ls="--")
    axes[0].annotate(
        "as large as the margin", (0, 1), (-8, 3), textcoords="offset points", fontsize=8, color=report.GREY
    )
    axes[0].set_yticks([1e-3, 1e-2, 0.1, 1, 10, 100], ["0.1%", "1%", "10%", "100%", "10 times", "100 times"])
    axes[1].set_title("Gradient: its cosine with float64's (1 is right)", fontsize=10.5)
    axes[1].set_yticks([1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5], ["0", "0.9", "0.99", "0.999", "0.9999", "0.99999"])
    axes[1].set_ylim(1.6, 6e-7)
    axes[2].set_title("Error: over float64's (1 is right)", fontsize=10.5)
    axes[2].set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
    for name, color in SHOWN.items():
        label = {"literal": "as published", "auto": "ncp_loss"}[name]
        axes[2].plot([], [], color=color, marker="o", ls="", ms=7, label=label)
    for name, marker in zip(networks, "os^", strict=False):
        axes[2].plot([], [], color=report.GREY, marker=marker, ls="", ms=6, label=NETWORKS[name].label)
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=6)
    report.save_figure(path, figure)


def _lack(cosine: float) -> float:
    """1 - cosine, within what the axis shows."""
    return min(max(1 - cosine, 1e-6), 1.0)
