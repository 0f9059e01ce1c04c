"""What all benchmarks share: the record of where figures come from, files, tables and the style of pictures."""

from __future__ import annotations

import csv
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import matplotlib

matplotlib.use("Agg")  # draws to files, also where there is no display

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

import ncp_loss

RED, BLUE, GREEN, ORANGE, GREY, BLACK = "#c53030", "#2b6cb0", "#2f855a", "#dd8a2b", "#8a8f98", "#1a202c"
Row = Mapping[str, Any]


class Kept:
    """Results kept in a file as they come: with ``resume``, an interrupted run goes on where it stopped."""

    def __init__(self, path: Path, resume: bool) -> None:
        self.path, self.start = path, time.perf_counter()
        self.found: dict[str, Any] = json.loads(path.read_text()) if resume and path.is_file() else {}
        self.before: float = self.found.pop("seconds", 0.0)

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """What was found under ``key``, or else is made now: anything that JSON holds."""
        if key not in self.found:
            self.found[key] = make()
            self.path.write_text(json.dumps(self.found | {"seconds": self.seconds}))
        return self.found[key]

    @property
    def seconds(self) -> float:
        """Time spent, that of interrupted runs included."""
        return self.before + time.perf_counter() - self.start

    def done(self) -> None:
        self.path.unlink(missing_ok=True)


def record(device: torch.device, seconds: float | None = None) -> dict[str, Any]:
    """Command, versions and hardware; nothing that names a person's machine or its folders."""
    machine: dict[str, Any] = {"cpu": _cpu(), "threads": torch.get_num_threads(), "system": platform.system()}
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    versions = {module.__name__: module.__version__ for module in (ncp_loss, torch, diffusers)}
    return {
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "machine": machine,
        "versions": versions | {"python": platform.python_version()},
        **({} if seconds is None else {"seconds": round(seconds)}),
    }


def interval(name: str, values: list[float]) -> dict[str, float | None]:
    """Mean and half the width of its 95% t interval."""
    if not values:
        return {name: None, f"{name} ±": None}
    count = len(values)
    half = student.ppf(0.975, count - 1) * statistics.stdev(values) / math.sqrt(count) if count > 1 else None
    return {name: statistics.mean(values), f"{name} ±": half}


def write_csv(path: Path, rows: Sequence[Row], digits: int = 6) -> None:
    """One line per row, floats to ``digits`` significant digits."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _short(value, digits) for key, value in row.items()} for row in rows)


def write_json(path: Path, content: Any, digits: int = 6) -> None:
    """Readable JSON, floats to ``digits`` significant digits, null for what is not finite."""
    path.write_text(json.dumps(_tidy(content, digits), indent=1) + "\n")


def print_table(title: str, rows: Iterable[Row], formats: Mapping[str, str] | None = None) -> None:
    """A table of what the rows hold, a column per key; ``formats`` gives a column's format, such as ``.4f``."""
    rows, formats = list(rows), formats or {}
    table = Table(title=title, title_justify="left", title_style="bold")
    for key in rows[0]:
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*["" if value is None else format(value, formats.get(key, "")) for key, value in row.items()])
    console = Console()
    # A log is narrower than a table; only a terminal wraps.
    (console if console.is_terminal else Console(width=200)).print(table)


def new_figure(columns: int = 1, rows: int = 1, width: float = 6.4, height: float = 3.8) -> tuple[Figure, list[Axes]]:
    """Panels, row by row, with a light grid and no box."""
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.grid(axis="y", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)


def save_figure(path: Path, figure: Figure) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _cpu() -> str:
    """The processor's model, as the system calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def _short(value: Any, digits: int) -> Any:
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def _tidy(content: Any, digits: int) -> Any:
    if isinstance(content, Mapping):
        return {str(key): _tidy(value, digits) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_tidy(value, digits) for value in content]
    if isinstance(content, float) and content - content != 0:
        return None
    return _short(content, digits)
