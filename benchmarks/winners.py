"""What the filter of absolute winners takes on as many pairs and prompts as Pick-a-Pic v2 has.

Prompts get pairs as unevenly as people rate: most a few, some hundreds. Within a prompt the image that won last meets a
new one, as Pick-a-Pic's page shows them, and some pairs are ties. Rows are read as dictionaries, and as text from a
file, whose reading is part of the time, and timed alone too. What the process takes at its peak includes the rows.
Writes winners.csv, winners.json and winners.png.
"""

from __future__ import annotations

import argparse
import csv
import io
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report
from benchmarks.memory import taken_by_process
from ncp_loss import absolute_winners

PROMPTS, PAIRS = 58_960, 851_293  # of Pick-a-Pic v2, paper
TIES = 0.12
SHARES = [0.125, 0.25, 0.5, 1.0]
FORMATS = dict.fromkeys(("reading, seconds", "seconds", "microseconds a pair"), ".2f") | {"peak, MB": ".0f"}
Rows = list[dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--pairs", type=int, default=PAIRS)


def run(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    if args.tiny:
        args.prompts, args.pairs = 60, 850
    plan = [(form, share) for form in FORMS for share in SHARES]
    rows = [measured(round(args.prompts * share), round(args.pairs * share), form, args.seed) for form, share in plan]
    report.write_csv(args.out / "winners.csv", rows)
    content = {"settings": {"prompts": args.prompts, "pairs": args.pairs, "ties": TIES}, "sizes": rows}
    report.write_json(args.out / "winners.json", report.record(args.device, time.perf_counter() - start) | content)
    draw(args.out / "winners.png", rows)
    report.print_table("Absolute winners", rows, FORMATS)


def measured(prompts: int, pairs: int, form: str, seed: int) -> dict[str, Any]:
    """The filter's time, and what making and filtering the rows takes of memory at the peak."""
    found: dict[str, Any] = {}

    def filtered() -> None:
        make = FORMS[form](list(tournaments(prompts, pairs, seed)))
        found["reading, seconds"] = timed(lambda: deque(make(), maxlen=0))
        found["seconds"] = timed(lambda: found.update(kept=len(absolute_winners(make()))))

    peak = taken_by_process(filtered, torch.device("cpu"))
    return {
        "rows": form,
        "prompts": prompts,
        "pairs": pairs,
        "kept": found["kept"],
        "reading, seconds": found["reading, seconds"],
        "seconds": found["seconds"],
        "microseconds a pair": 1e6 * found["seconds"] / pairs,
        "peak, MB": None if peak is None else peak / 1e6,
    }


def timed(step: Callable[[], Any]) -> float:
    """Seconds of the processor, which other programs on the machine do not change."""
    start = time.process_time()
    step()
    return time.process_time() - start


def as_csv(rows: Rows) -> Callable[[], Iterator[dict[str, Any]]]:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    rows.clear()

    def read() -> Iterator[dict[str, Any]]:
        file.seek(0)
        return csv.DictReader(file)

    return read


def tournaments(prompts: int, pairs: int, seed: int) -> Iterator[dict[str, Any]]:
    """Pairs of all prompts in the order of time, where prompts take turns."""
    generator = np.random.default_rng(seed)
    shares = generator.lognormal(sigma=1.2, size=prompts)
    counts = 1 + generator.multinomial(pairs - prompts, shares / shares.sum())
    order = generator.permutation(np.repeat(np.arange(prompts), counts)).tolist()
    draws = generator.random(pairs).tolist()
    champions: dict[int, str] = {}
    for number, (prompt, draw) in enumerate(zip(order, draws, strict=True)):
        champion, new = champions.get(prompt, f"{prompt:012d}-{pairs:023d}"), f"{prompt:012d}-{number:023d}"
        label = 0.5 if draw < TIES else float(draw < (1 + TIES) / 2)
        champions[prompt] = new if label == 0.0 else champion
        yield {
            "caption": f"a prompt that somebody wrote in their own words, number {prompt}",
            "image_0_uid": champion,
            "image_1_uid": new,
            "label_0": label,
            "label_1": 1.0 - label,
        }


FORMS: dict[str, Callable[[Rows], Callable[[], Iterator[dict[str, Any]]]]] = {
    "dictionaries": lambda rows: lambda: iter(rows),
    "csv": as_csv,
}


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Seconds and memory over pairs, a line for each form of the rows."""
    figure, axes = report.new_figure(2, width=9)
    for form, color in zip(FORMS, (report.BLUE, report.ORANGE), strict=True):
        mine = [row for row in rows if row["rows"] == form]
        for axis, key in zip(axes, ("seconds", "peak, MB"), strict=True):
            axis.plot([row["pairs"] / 1000 for row in mine], [row[key] for row in mine], "o-", color=color, label=form)
    for axis, title in zip(axes, ("Seconds of a core", "Memory at the peak, rows included, MB"), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("thousand pairs")
        axis.set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=9)
    report.save_figure(path, figure)
