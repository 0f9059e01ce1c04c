"""Figures in the documentation are those of committed results."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.compute import COMPUTES
from benchmarks.networks import NETWORKS

ROOT = Path(__file__).parents[1]


def result(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def precision_rows() -> list[str]:
    found = {(r["network"], r["compute"], r["estimator"]): r for r in result("precision")["summary"]}
    rows = []
    for compute in [c for c in COMPUTES if c != "float64"]:
        for estimator in ("literal", "auto", "tangent"):
            of = [found[network, compute, estimator] for network in NETWORKS]
            cells = [f"{r['ratio']:.4g} / {r['cosine']:.4f}" for r in of]
            label = " ".join(COMPUTES[compute].label.split())
            rows.append(f"| {label} | {estimator} | {' | '.join(cells)} | {of[0]['evaluations']:.2f} |")
    return rows


def lora_rows() -> list[str]:
    found = {(r["network"], r["compute"], r["estimator"]): r for r in result("precision")["lora"]}
    return [
        f"| {compute} | {estimator} | "
        + " | ".join("{cosine:.4f} ({worst:.4f})".format(**found[n, compute, estimator]) for n in NETWORKS)
        + " |"
        for compute in ("float16", "bfloat16")
        for estimator in ("literal", "auto", "tangent")
    ]


def alignment_rows() -> list[str]:
    rows = []
    for row in result("alignment")["summary"]:
        seeds = " | ".join(f"{value:.3f}" for key, value in row.items() if key.startswith("seed "))
        reward = f"{row['reward']:.3f} ± {row['reward sd']:.3f}"
        rows.append(f"| {row['arm']} | {seeds} | {reward} | {row['win rate']:.3f} ± {row['win rate sd']:.3f} |")
    return rows


def test_the_precision_page_shows_the_committed_figures():
    page = (ROOT / "docs" / "precision.md").read_text()
    for row in precision_rows() + lora_rows() + alignment_rows():
        assert row in page, row
