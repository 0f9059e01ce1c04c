"""Does alignment on perceptual errors learn better, where, and with which settings? See PROTOCOL.md.

Tunes the arms that have a grid, trains every arm on fresh seeds, and writes evidence-TESTBED.json after each run, with
all runs in it. At the end it writes evidence-TESTBED.csv (a row for each point of each run) and four pictures: curves
of the methods in `COLORS` and differences of all methods, both at the same settings; each arm against its nearest
rival; and samples, whose strips are kept in a folder beside them. With `--resume` a study goes on with the runs that
its JSON holds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

from benchmarks import report
from benchmarks.evidence_arms import (
    ARMS,
    MAIN,
    METHODS,
    SAME_KAPPAS,
    SAME_RATE,
    SAME_SETTINGS,
    Arm,
    Bed,
    at_same,
    rivals,
    same_training,
    trained,
)
from benchmarks.evidence_beds import BEDS, Measures, Start

KAPPAS = 1.0, 3.0, 8.0
TUNING, REPEATED = (100, 101), 2
FRESH = (10, 11, 12, 13, 14)
DAMAGED = 0.10  # that much less of the samples match than of the base model's
SHOWN = [*(arm.name for arm in MAIN), "latent DPO, beta per pair", "NCP-DPO, step clean"]  # whose samples are drawn
COLORS = {  # of the methods whose curves are drawn, all at the same settings
    "latent DPO": report.GREY,
    "latent DPO, beta per pair": report.BLACK,
    "latent DPO, times B² of step clean": report.ORANGE,
    "NCP-DPO": report.BLUE,
    "NCP-DPO, beta per pair": report.RED,
    "NCP-DPO, step clean": report.GREEN,
}
MEASURES = "undamaged reward", "mean reward", "reward at kept diversity"  # of a run
TITLES = {  # in pictures
    "mean reward": "speed: mean reward\nover training",
    "undamaged reward": "highest reward\nbefore damage",
    "reward at kept diversity": "reward at\nkept diversity",
}
KEPT_DIVERSITY = 0.6  # of the base model's
LEVEL, LEAST = 0.03, 0.02  # within what arms are level, and the least difference that counts
VERDICTS = {"better": report.GREEN, "worse": report.RED, "level": report.BLUE, "not known": report.GREY}
Record = dict[str, Any]
Seeds = dict[int, list[Record]]  # runs by seed
Key = tuple[str, str, int, float, float]  # phase, arm, seed, learning rate, kappa


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--testbed", choices=list(BEDS), default="digits")
    parser.add_argument("--work", type=Path, default=Path(".cache/emoji"), help="the emoji's drawings")
    parser.add_argument("--only", choices=("main", "all"), default="all", help="the four main arms, or all of them")


def run(args: argparse.Namespace) -> None:
    study = Study(args)
    for arm in study.arms(MAIN):
        study.compare(arm)
    if args.only == "all":
        for arm in study.arms([arm for arm in ARMS if arm not in MAIN]):
            study.compare(arm)
    study.finish()


class Study:
    """All runs on one testbed, kept as they come."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.name = args, f"evidence-{args.testbed}"
        self.path = args.out / f"{self.name}.json"
        found = json.loads(self.path.read_text()) if args.resume and self.path.is_file() else {}
        self.runs: dict[Key, Record] = {key_of(run): run for run in found.get("runs", [])}
        self.begun = time.perf_counter() - found.get("seconds", 0)
        self.bed: Bed = BEDS[args.testbed](args.work, args.tiny)
        self.rates, self.kappas, self.tuning, self.fresh = self.bed.rates, KAPPAS, TUNING, FRESH
        self.points = {"tuning": self.bed.tuned_at, "comparison": self.bed.points}
        if args.tiny:
            self.rates, self.kappas, self.tuning, self.fresh = (1e-3,), (3.0,), (100,), (10,)
            self.points = {"tuning": (2,), "comparison": (1, 2)}
        self.start = cache(self.bed.start)
        self.before: Callable[[int, str], Measures] = cache(
            lambda seed, data: self.start(seed, data).measure(self.bed.base)
        )
        self.tuned: dict[str, tuple[float, float]] = {}
        self.flops: dict[str, int] = {}

    def arms(self, arms: list[Arm]) -> list[Arm]:
        """Those of this testbed; of a tiny study two, and one that inherits."""
        found = [arm for arm in arms if self.args.testbed in arm.beds]
        if not self.args.tiny:
            return found
        return found[:2] if arms == MAIN else [arm for arm in found if arm.inherits == "NCP-DPO"][:1]

    def settings(self, arm: Arm) -> tuple[float, float]:
        """Learning rate and kappa: given, those of the arm that it inherits from, or tuned."""
        if arm.lr is not None and arm.kappa is not None:
            return arm.lr, arm.kappa
        if arm.inherits:
            return self.tuned[arm.inherits]
        if arm.name not in self.tuned:
            self.tuned[arm.name] = self.tune(arm)
        return self.tuned[arm.name]

    def tune(self, arm: Arm) -> tuple[float, float]:
        """The grid on the first tuning seed, the best three again on the other: the best mean of both."""
        kappas = (1.0,) if arm.objective == "sft" else self.kappas
        grid, first = list(itertools.product(self.rates, kappas)), self.tuning[0]
        scores = {setting: [score(self.one("tuning", arm, first, *setting))] for setting in grid}
        best = sorted(grid, key=lambda setting: ranked(scores[setting]), reverse=True)[:REPEATED]
        for seed in self.tuning[1:]:
            for setting in best:
                scores[setting].append(score(self.one("tuning", arm, seed, *setting)))
        return max(best, key=lambda setting: ranked(scores[setting]))

    def compare(self, arm: Arm) -> None:
        lr, kappa = self.settings(arm)
        for seed in self.fresh:
            self.one("comparison", arm, seed, lr, kappa)

    def one(self, phase: str, arm: Arm, seed: int, lr: float, kappa: float) -> Record:
        key: Key = phase, arm.name, seed, lr, kappa
        if key not in self.runs:
            found = self.repeated(phase, arm, seed, lr, kappa) or self.train(phase, arm, seed, lr, kappa)
            self.runs[key] = {**found, "phase": phase, "arm": arm.name}
            self.write()
        record = self.runs[key]
        end = record["points"][-1]
        print(
            f"{phase} {arm.name}, seed {seed}, lr {lr:g}, kappa {kappa:g}: step {end['step']}, reward "
            f"{end['reward']:.3f}, match {end['match']:.3f}; undamaged {score(record)[0]:.3f}",
            flush=True,
        )
        return record

    def repeated(self, phase: str, arm: Arm, *setting: float) -> Record | None:
        """A run of another arm that would be repeated to the last digit, such as the one with the tuned kappa."""
        twins = (other.name for other in ARMS if same_training(arm, other))
        return next((self.runs[key] for name in twins if (key := (phase, name, *setting)) in self.runs), None)

    def train(self, phase: str, arm: Arm, seed: int, lr: float, kappa: float) -> Record:
        start: Start = self.start(seed, arm.data)
        shown = phase == "comparison" and seed == self.fresh[0] and arm.name in SHOWN
        keep = (lambda measures: self.show(arm.name, measures)) if shown else (lambda measures: None)
        before = self.before(seed, arm.data)
        if shown:
            self.show("base model", before)
        return trained(arm, self.bed, start, before, seed, lr, kappa, self.points[phase], self.flops, keep)

    def show(self, name: str, measures: Measures, columns: int = 32) -> None:
        """The first samples of a run, a strip of the sheet that `finish` puts together."""
        images = ((measures.images[:columns] + 1) / 2).expand(-1, 3, -1, -1)
        plt.imsave(self.strip(name), images.permute(2, 0, 3, 1).flatten(1, 2).contiguous().numpy())

    def strip(self, name: str) -> Path:
        folder = self.args.out / f"{self.name}-samples"
        folder.mkdir(exist_ok=True)
        return folder / f"{name.replace('²', '2')}.png"

    def sheet(self, path: Path) -> None:
        """The same requests and noise in every row."""
        strips = {name: self.strip(name) for name in ("base model", *SHOWN)}
        found = {name: plt.imread(strip) for name, strip in strips.items() if strip.is_file()}
        figure, axes = report.new_figure(rows=len(found), width=11, height=0.45 * len(found))
        for axis, (name, image) in zip(axes, found.items(), strict=True):
            axis.imshow(image)
            axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
            axis.set(xticks=[], yticks=[])
            axis.grid(visible=False)
            axis.spines[:].set_visible(False)
        report.save_figure(path, figure)

    def write(self) -> None:
        settings = {name: dict(zip(("lr", "kappa"), found, strict=True)) for name, found in self.tuned.items()}
        runs = list(self.runs.values())
        content = {
            "tuned": settings,
            "summary": summary(runs),
            "at the same settings": at_the_same_settings(runs, self.args.testbed),
            "runs": runs,
        }
        seconds = time.perf_counter() - self.begun
        report.write_json(self.path, report.record(self.args.device, seconds) | content)

    def finish(self) -> None:
        self.write()
        runs = list(self.runs.values())
        arms, same = summary(runs), at_the_same_settings(runs, self.args.testbed)
        rows = [
            {**{key: run[key] for key in ("phase", "arm", "seed", "lr", "kappa", "finite")}, **point}
            for run in runs
            for point in run["points"]
        ]
        report.write_csv(self.args.out / f"{self.name}.csv", rows)
        draw(self.args.out / f"{self.name}.png", runs, self.args.testbed)
        draw_arms(self.args.out / f"{self.name}-arms.png", arms, self.args.testbed)
        draw_same(self.args.out / f"{self.name}-same.png", same, self.args.testbed)
        self.sheet(self.args.out / f"{self.name}-samples.png")
        shown = [f"{name}{end}" for name in MEASURES for end in ("", " ±")]
        found = [{key: row[key] for key in ("arm", "seeds", *shown)} for row in arms]
        report.print_table(f"On {self.args.testbed}, fresh seeds", found, dict.fromkeys(shown, ".3f"))


def key_of(run: Record) -> Key:
    return run["phase"], run["arm"], run["seed"], run["lr"], run["kappa"]


def score(record: Record) -> tuple[float, float]:
    """The highest reward that is not damaged, the base model's among them; the mean reward over the points."""
    points = record["points"]
    if not record["finite"]:
        return points[0]["reward"], points[0]["reward"]
    least = points[0]["match"] - DAMAGED
    kept = [point["reward"] for point in points if point["match"] >= least]
    crossing = where_it_falls(points, "match", least)
    if crossing is not None:
        kept.append(crossing)
    return max(kept), statistics.mean(point["reward"] for point in points[1:])


def where_it_falls(points: list[Record], key: str, least: float) -> float | None:
    """The reward where what `key` names first falls to `least`, straight between points; None where it never does."""
    for before, after in itertools.pairwise(points):
        if before[key] >= least > after[key]:
            share = (before[key] - least) / (before[key] - after[key])
            return float(before["reward"] + share * (after["reward"] - before["reward"]))
    return None


def ranked(scores: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """What settings are ordered by: the mean reward at kept fidelity, to 0.01; where that is the same, the mean."""
    undamaged, mean = (statistics.mean(values) for values in zip(*scores, strict=True))
    return round(undamaged, 2), mean


def summary(runs: list[Record]) -> list[Record]:
    """A row for each arm: means over the fresh seeds with 95% intervals, and paired differences to the arm's rivals."""
    by_arm: dict[str, Seeds] = {}
    for run in runs:
        if run["phase"] == "comparison":
            by_arm.setdefault(run["arm"], {})[run["seed"]] = [run]
    return compared(by_arm, rivals)


def at_the_same_settings(runs: list[Record], testbed: str) -> list[Record]:
    """The methods at one learning rate and the same kappas, all against all; of a seed the mean over the kappas."""
    found = {(run["arm"], run["seed"]): run for run in runs if run["phase"] == "comparison"}
    methods: dict[str, Seeds] = {}
    for method in (arm.name for arm in METHODS):
        for seed in FRESH:
            of = [found.get((at_same(method, kappa), seed)) for kappa in SAME_KAPPAS[testbed]]
            if None not in of:
                methods.setdefault(method, {})[seed] = of
    return compared(methods, lambda method: [other for other in methods if other != method])


def compared(found: dict[str, Seeds], others: Callable[[str], list[str]]) -> list[Record]:
    """A row for each name: mean and interval of each measure, and of its differences to others, seed by seed."""
    rows = []
    for name, ours in found.items():
        row: Record = {"arm": name, "seeds": len(ours)}
        row |= over_seeds([means([measured(run) for run in of]) for of in ours.values()])
        for other in others(name):
            theirs = found.get(other, {})
            shared = [zip(ours[seed], theirs[seed], strict=True) for seed in ours if seed in theirs]
            row |= over_seeds([means([difference(*pair) for pair in of]) for of in shared], f" over {other}")
        rows.append(row)
    return rows


def means(of: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.mean(values[name] for values in of) for name in of[0]}


def over_seeds(of: list[dict[str, float]], end: str = "") -> Record:
    """The mean of each measure over seeds, and half of its 95% interval."""
    row: Record = {}
    for name in of[0] if of else ():
        row |= report.interval(f"{name}{end}", [values[name] for values in of])
    return row


def measured(run: Record) -> dict[str, float]:
    """What a run is compared by."""
    return dict(zip(MEASURES, (*score(run), at_kept_diversity(run)), strict=True))


def difference(ours: Record, theirs: Record) -> dict[str, float]:
    """Of two runs; at equal FLOPs up to where the cheaper one ends."""
    mine, other = measured(ours), measured(theirs)
    limit = min(run["points"][-1]["step"] * run["FLOPs a step"] for run in (ours, theirs))
    at_equal = at_equal_cost(ours, limit) - at_equal_cost(theirs, limit)
    return {name: mine[name] - other[name] for name in MEASURES} | {"reward at equal FLOPs": at_equal}


def at_equal_cost(record: Record, limit: float) -> float:
    """The mean reward between no training and `limit` FLOPs, the curve taken as straight between its points."""
    if not record["finite"] or not limit:
        return float(record["points"][0]["reward"])
    costs = [point["step"] * record["FLOPs a step"] for point in record["points"]]
    places = np.linspace(0, limit, 1001)
    return float(np.interp(places, costs, [point["reward"] for point in record["points"]]).mean())


def at_kept_diversity(record: Record) -> float:
    """The reward where diversity first falls to 60% of the base model's, or the last one."""
    points = record["points"]
    found = where_it_falls(points, "diversity", KEPT_DIVERSITY * points[0]["diversity"])
    return float(points[-1]["reward"] if record["finite"] else points[0]["reward"]) if found is None else found


def against_nearest(rows: list[Record]) -> list[tuple[Record, str]]:
    """Each row with the name of its arm's nearest rival, where that one is in a row before. So a pair comes once."""
    run = [row["arm"] for row in rows]
    found = [(row, rivals(row["arm"])[0]) for row in rows]
    return [(row, other) for row, other in found if other in run[: run.index(row["arm"])]]


def verdict(mean: float, half: float) -> str:
    """What the protocol calls a difference with a 95% interval of ``mean ± half``."""
    if abs(mean) > half and abs(mean) >= LEAST:
        return "better" if mean > 0 else "worse"
    return "level" if abs(mean) + half <= LEVEL else "not known"


def draw(path: Path, runs: list[Record], testbed: str) -> None:
    """Reward against steps, against the share of samples that match, and against diversity; every fresh seed."""
    keys = {
        "step": "training step",
        "match": "share of samples that match the request",
        "diversity": "diversity, over that of real images",
    }
    figure, axes = report.new_figure(columns=len(keys), width=9.5, height=3.8)
    kappa = SAME_KAPPAS[testbed][0]
    for (key, label), axis in zip(keys.items(), axes, strict=True):
        for name, color in COLORS.items():
            fresh = ("comparison", at_same(name, kappa))
            ours = [run["points"] for run in runs if (run["phase"], run["arm"]) == fresh]
            for points in ours:
                axis.plot(*_curve([points], key), color=color, lw=0.8, alpha=0.35)
            whole = [points for points in ours if len(points) == max(map(len, ours))]
            if whole:
                axis.plot(*_curve(whole, key), color=color, lw=2.2, marker="o", ms=4, label=name)
        axis.set(xlabel=label, ylabel="mean held-out reward")
    axes[0].set_xlim(0)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    settings = f"learning rate {SAME_RATE:g}, kappa {kappa:g}"
    figure.suptitle(
        f"{testbed.capitalize()}, {settings}: thick lines are means over seeds, thin ones the seeds", fontsize=10
    )
    report.save_figure(path, figure)


def draw_arms(path: Path, rows: list[Record], testbed: str) -> None:
    """The difference of each arm to its nearest rival."""
    apart = [row for row in rows if row["seeds"] > 1 and row["arm"] not in [arm.name for arm in SAME_SETTINGS]]
    title = f"{testbed.capitalize()}: one method minus another, each at its own settings; 95% intervals over seeds"
    draw_differences(
        path, [(row, other, f"{row['arm']} minus {other}") for row, other in against_nearest(apart)], title
    )


def draw_same(path: Path, rows: list[Record], testbed: str) -> None:
    """The difference of each method to the first, at the same settings."""
    found = [(row, rows[0]["arm"], row["arm"]) for row in rows[1:] if row["seeds"] > 1]
    kappas = ", ".join(f"{kappa:g}" for kappa in sorted(SAME_KAPPAS[testbed]))
    title = f"{testbed.capitalize()}: over latent DPO at the same rate ({SAME_RATE:g}) and kappa ({kappas})"
    draw_differences(path, found, title, panels=3 if testbed == "digits" else 2)


def draw_differences(path: Path, found: list[tuple[Record, str, str]], title: str, panels: int = 2) -> None:
    """Of rows to others, each with its label: mean over seeds, 95% interval, and where they count as level."""
    figure, axes = report.new_figure(columns=panels, width=11, height=1.2 + 0.27 * len(found))
    places = range(len(found))
    for (name, meaning), axis in zip(list(TITLES.items())[:panels], axes, strict=True):
        axis.axvspan(-LEVEL, LEVEL, color=report.GREY, alpha=0.15, lw=0)
        axis.axvline(0, color=report.GREY, lw=1)
        for place, (row, other, _) in enumerate(found):
            mean, half = row[f"{name} over {other}"], row[f"{name} over {other} ±"]
            axis.errorbar(mean, place, xerr=half, fmt="o", ms=4, color=VERDICTS[verdict(mean, half)], elinewidth=1.5)
        axis.set(ylim=(max(len(found), 1) - 0.5, -0.5), xlabel=meaning)
        axis.locator_params(axis="x", nbins=5)
        axis.set_yticks(places, [label for *_, label in found], fontsize=8)
    for axis in axes[1:]:
        axis.tick_params(labelleft=False)
    axes[-1].legend(
        handles=[Line2D([], [], marker="o", color=color, label=name) for name, color in VERDICTS.items()],
        frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5),
    )  # fmt: skip
    figure.suptitle(title, fontsize=10)
    report.save_figure(path, figure)


def _curve(runs: list[list[Record]], key: str) -> tuple[list[float], list[float]]:
    """The mean over runs at each point: what `key` names, and the reward."""
    places = list(zip(*runs, strict=True))
    return tuple([statistics.mean(point[name] for point in at) for at in places] for name in (key, "reward"))
