"""The fused error's kernels: what they compile to, for three generations of GPUs, and what memory they move.

Compilation needs no GPU: registers, spills, local memory and the width of loads are read from the compiled artefact.
The traffic is counted operation by operation, eager and fused, on random features. Time is measured where there is a
GPU (``--device cuda``), and "not measured" elsewhere. Writes kernels.csv, kernels.json and kernels.png.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import report
from ncp_loss import error, fused

ARCHITECTURES = {80: "A100", 90: "H100", 100: "B200"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPE = (8, 1280, 16, 16)  # SD 1.5's down stack at 1024 x 1024 pixels, four pairs
TARGETS = {"sums": "features of four points to (B,)", "cotangent": "features of four points to theirs"}
POINTS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", type=int, nargs=4, default=SHAPE)


def run(args: argparse.Namespace) -> None:
    if "TRITON_INTERPRET" in os.environ:  # Triton reads it when it is imported; what it interprets, it cannot compile
        raise SystemExit(f"TRITON_INTERPRET must be unset to compile; it was {os.environ['TRITON_INTERPRET']!r}")
    shape = (2, 8, 4, 4) if args.tiny else tuple(args.shape)
    compiled = [
        {"kernel": kernel.__name__, "GPU": ARCHITECTURES[sm], "dtype": dtype} | compiled_to(kernel, dtype, sm)
        for kernel in (fused.sums_kernel, fused.combined_kernel)
        for sm in ARCHITECTURES
        for dtype in DTYPES
    ]
    passes = list(passes_of(shape, args.device))
    content = {"settings": {"shape": shape}, "compiled": compiled, "passes": passes}
    report.write_csv(args.out / "kernels.csv", compiled)
    report.write_json(args.out / "kernels.json", report.record(args.device) | content)
    draw(args.out / "kernels.png", passes)
    report.print_table("Compiled", compiled)
    report.print_table(f"Passes over features {shape}", passes)
    print(verdict(passes))


def compiled_to(kernel: Any, dtype: str, sm: int) -> dict[str, Any]:
    """Ahead of time, for pointers and sizes that 16 divides, as torch's allocator and real features have them."""
    pointer = dict.fromkeys(("f0", "f1", "f2", "f3", "out"), f"*{dtype}")
    pointer |= {"partial": "*fp32", "coefficients": "*fp32"}
    constants = {"POINTS": POINTS, "BLOCK": fused.BLOCK, "ROUNDS": fused.ROUNDS}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else pointer.get(name, "i32") for name in names}
    divisible = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants}
    constexprs = {name: value for name, value in constants.items() if name in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=divisible)
    made = triton.compile(source, target=GPUTarget("cuda", sm, 32))
    usage = resources(made.asm["cubin"])
    loads = re.findall(r"ld\.global\S*?\.(?:v(\d)\.)?b(\d+)", made.asm["ptx"])
    return {
        "registers": usage["REG"],
        "stack bytes": usage["STACK"],
        "local bytes": usage["LOCAL"],
        "local accesses": len(re.findall(r"(?:ld|st)\.local", made.asm["ptx"])),
        "widest load, bits": max(int(width or 1) * int(bits) for width, bits in loads),
    }


def resources(cubin: bytes) -> dict[str, int]:
    """What the assembler says a kernel takes; registers that spill show as stack."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        said = subprocess.run([cuobjdump, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}


def passes_of(shape: tuple[int, ...], device: torch.device) -> Any:
    """What each pass moves and allocates, one point's features being 1, its time, and how far the two agree."""
    for name, dtype in DTYPES.items():
        features = [torch.randn(shape, device=device).to(dtype) for _ in range(POINTS)]
        coefficients, size = torch.randn(2, POINTS, shape[0], device=device), features[0].nbytes
        eager: dict[str, Callable[[], Tensor]] = {
            "sums": lambda f=features, c=coefficients: error._sums(f, *c, "eager"),
            "cotangent": lambda f=features, c=coefficients: error._cotangent(f, c[0], "eager"),
        }
        kernels: dict[str, Callable[[], Tensor]] = {
            "sums": lambda f=features, c=coefficients: fused.sums(f, c),
            "cotangent": lambda f=features, c=coefficients: fused.combined(f, c[0]),
        }
        for what in TARGETS:
            with Traffic() as traffic:
                eager[what]()
            made = int(what == "cotangent")
            times = [milliseconds(step, device) for step in (eager[what], kernels[what])]
            yield {
                "pass": what,
                "dtype": name,
                "eager moves": round(traffic.moved / size, 2),
                "kernel moves": POINTS + made,
                "eager allocates": round(traffic.allocated / size, 2),
                "kernel allocates": made,
                "eager, ms": times[0],
                "kernel, ms": times[1],
                "faster": "not measured" if isinstance(times[0], str) else ("eager", "kernel")[times[1] < times[0]],
                "relative difference": disagreement(eager[what], kernels[what], device),
            }


def verdict(passes: list[dict[str, Any]]) -> str:
    """Which is faster, and whether the two agree: sums to float32's rounding, cotangents to that of their dtype."""
    bound = {"sums": 1e-5} | {dtype: 4 * torch.finfo(DTYPES[dtype]).eps for dtype in DTYPES}
    if passes[0]["faster"] == "not measured":
        return "time and agreement are measured on a GPU alone, with --device cuda"
    agree = all(row["relative difference"] <= bound.get(row["pass"], bound[row["dtype"]]) for row in passes)
    faster = sum(row["faster"] == "kernel" for row in passes)
    says = "agree" if agree else "DISAGREE"
    return f"kernels are faster in {faster} of {len(passes)} passes, and {says} with eager ones"


def disagreement(eager: Callable[[], Tensor], kernel: Callable[[], Tensor], device: torch.device) -> float | str:
    """The largest difference between the two, over the largest value; tests compare them interpreted on a CPU."""
    if device.type != "cuda":
        return "not measured"
    found, right = kernel().double(), eager().double()
    return ((found - right).abs().max() / right.abs().max()).item()


class Traffic(TorchDispatchMode):
    """What operations read and write, and what they allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.allocated = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = [x for x in args if isinstance(x, Tensor)]
        if isinstance(out, Tensor) and all(
            x.untyped_storage().data_ptr() != out.untyped_storage().data_ptr() for x in read
        ):
            self.moved += sum(x.nbytes for x in read) + out.nbytes
            self.allocated += out.nbytes
        return out


def milliseconds(step: Callable[[], Any], device: torch.device) -> float | str:
    return triton.testing.do_bench(step, return_mode="median") if device.type == "cuda" else "not measured"


def draw(path: Path, passes: list[dict[str, Any]]) -> None:
    figure, axes = report.new_figure(len(TARGETS), width=9, height=3.4)
    for axis, (what, meaning) in zip(axes, TARGETS.items(), strict=True):
        rows = [row for row in passes if row["pass"] == what]
        for shift, which, color in ((-0.2, "eager", report.GREY), (0.2, "kernel", report.BLUE)):
            values = [row[f"{which} moves"] for row in rows]
            axis.bar([i + shift for i in range(len(rows))], values, width=0.38, color=color, label=which)
            for i, value in enumerate(values):
                axis.annotate(
                    f"{value:.0f}", (i + shift, value), (0, 2), textcoords="offset points", ha="center", fontsize=9
                )
        axis.set_xticks(range(len(rows)), [row["dtype"] for row in rows])
        axis.set_title(f"{what}: {meaning}", fontsize=10)
    axes[0].set_ylabel("bytes moved, features of one point = 1")
    axes[0].legend(frameon=False)
    report.save_figure(path, figure)
