"""`python -m benchmarks NAME [options]`: each benchmark is a module with `add_arguments(parser)` and `run(args)`."""

from __future__ import annotations

import argparse
import importlib
import logging
from pathlib import Path

import torch

BENCHMARKS = {
    "precision": "error and gradient in every precision, against float64",
    "reach": "how far from the middle a central difference should look",
    "throughput": "what a training step costs, against latent DPO and the published algorithm",
    "layers": "what each layer costs, and how the cost grows",
    "memory": "what a training step holds, and weights beyond the model",
    "kernels": "what the fused kernels compile to, and the memory they move",
    "winners": "what the filter of absolute winners takes, at the size of Pick-a-Pic v2",
    "alignment": "digits aligned with the encoder in float32 and in bfloat16",
    "beta": "rules that set beta against a tuned one, on the digits, and the heavy tail of perceptual errors",
    "healthy": "margins, accuracies, gradients and errors of a good run and of five bad ones, on the digits",
    "demo": "what the demo reaches on seeds that no choice of its settings saw",
    "emoji": "the emoji testbed: trains its networks, draws their samples, measures its judges",
    "evidence": "whether perceptual errors align better, where and with which settings: PROTOCOL.md",
}


def main() -> None:
    """Parse, set what all benchmarks share, run one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in BENCHMARKS}
    for name, module in modules.items():
        command = commands.add_parser(name, help=BENCHMARKS[name], description=module.__doc__)
        command.add_argument("--tiny", action="store_true", help="seconds instead of minutes; the figures mean nothing")
        command.add_argument("--device", type=torch.device, default=torch.device("cpu"))
        command.add_argument("--out", type=Path, default=Path("benchmarks/results"))
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--threads", type=int, default=1, help="CPU threads")
        command.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
        module.add_arguments(command)
    args = parser.parse_args()

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    modules[args.benchmark].run(args)


if __name__ == "__main__":
    main()
