"""Figures in the documentation are those of committed results."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

from benchmarks.compute import COMPUTES
from benchmarks.evidence import FRESH, against_nearest, verdict
from benchmarks.evidence_arms import ARMS, MAIN, METHODS, OBJECTIVES, SAME_SETTINGS, TUNED_CLEAN, TUNED_PER_PAIR
from benchmarks.healthy import CASES
from benchmarks.networks import NETWORKS

ROOT = Path(__file__).parents[1]


def result(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def precision_rows() -> list[str]:
    found = {(r["network"], r["compute"], r["estimator"]): r for r in result("precision")["summary"]}
    rows = []
    for compute in [c for c in COMPUTES if c != "float64"]:
        for estimator in ("literal", "auto"):
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
        for estimator in ("literal", "auto")
    ]


def share(error: float) -> str:
    """A relative error: in percent, or as a multiple where it is larger than what it is the error of."""
    return f"{error:.1%}" if error < 1 else f"{error:,.0f} times"


def margin_rows() -> list[str]:
    found = {(r["network"], r["compute"], r["estimator"]): r for r in result("precision")["margins"]}
    rows = []
    for compute in [c for c in COMPUTES if c != "float64"]:
        for estimator in ("literal", "auto"):
            of = [found[network, compute, estimator] for network in NETWORKS]
            cells = [" / ".join(share(r[moved]) for moved in ("0.1", "0.01")) for r in of]
            label = " ".join(COMPUTES[compute].label.split())
            rows.append(f"| {label} | {estimator} | {' | '.join(cells)} |")
    return rows


def alignment_rows() -> list[str]:
    rows = []
    for row in result("alignment")["summary"]:
        seeds = " | ".join(f"{value:.3f}" for key, value in row.items() if key.startswith("seed "))
        reward = f"{row['reward']:.3f} ± {row['reward sd']:.3f}"
        win_rate = f"{row['win rate']:.3f} ± {row['win rate sd']:.3f}"
        margins = f"{row['same sign']:.0%} | {share(row['margin error'])}"
        rows.append(f"| {row['arm']} | {seeds} | {reward} | {win_rate} | {margins} |")
    return rows


def throughput_rows(name: str = "throughput") -> list[str]:
    keys = ("over latent DPO", "over the published", "FLOPs over latent DPO")
    return [
        f"| {r['step']} | " + " | ".join(f"{r[key]:.2f}" for key in keys) + f" | {r['encoder evaluations']} |"
        for r in result(name)["steps"]
    ]


def profile_rows() -> list[str]:
    """The operations that lead in either network's encoder."""
    small, real = (
        {r["operation"]: r["share"] for r in result(n)["profile"]} for n in ("throughput", "throughput-sd15")
    )
    leading = dict.fromkeys([*list(small)[:5], *list(real)[:5]])
    return [f"| `{name}` | {small[name]:.0%} | {real[name]:.0%} |" for name in leading]


def layer_rows() -> list[str]:
    found = {(r["model"], r["layer"]): f"{r['FLOPs']:.2f}" for r in result("layers")["layers"]}
    layers = dict.fromkeys(layer for model, layer in found if model == "sd15" and layer != "latent DPO")
    return [f"| {layer} | {found['sd15', layer]} | {found.get(('sdxl', layer), '')} |" for layer in layers]


def memory_rows() -> list[str]:
    keys = ["held for backward, MB", "peak, MB", "process, MB", "the loss holds, MB", "weights beyond the model, MB"]
    return [f"| {r['step']} | " + " | ".join(f"{r[key]:.1f}" for key in keys) + " |" for r in result("memory")["steps"]]


def batch_rows() -> list[str]:
    keys = ["the loss's own peak, MB", "peak of a step beyond latent DPO, MB"]
    rows = result("memory")["batches"]
    return [f"| {r['rows']} | {r['chunk_size']} | " + " | ".join(f"{r[key]:.1f}" for key in keys) + " |" for r in rows]


def performance_figures() -> list[str]:
    throughput, kernels = result("throughput"), result("kernels")
    real = result("throughput-sd15")
    backward, forward = (row["share"] for row in throughput["profile"][:2])  # of attention
    return [
        f"Medians of {throughput['settings']['rounds']} interleaved rounds",
        f"medians of {real['settings']['rounds']} rounds",
        f"at SD 1.5's size {real['step over its parts']['time']:.2f} times",
        f"its backward pass takes\n  {backward / forward:.1f} times its forward's time",
        f"takes {throughput['step over its parts']['time']:.2f} times the sum of its parts",
        f"at most {max(row['registers'] for row in kernels['compiled'])} registers",
    ]


def test_the_performance_page_shows_the_committed_figures():
    page = (ROOT / "docs" / "performance.md").read_text()
    rows = throughput_rows() + throughput_rows("throughput-sd15") + profile_rows()
    rows += layer_rows() + memory_rows() + batch_rows() + performance_figures()
    for row in rows:
        assert row in page, row


def test_the_page_on_data_shows_the_committed_figures_of_the_filter_which_meet_their_bounds():
    whole = [row for row in result("winners")["sizes"] if row["pairs"] == 851_293]
    assert {row["rows"] for row in whole} == {"dictionaries", "csv"}
    for row in whole:
        assert row["seconds"] < 10
        assert row["peak, MB"] < 2000
    shown = next(row for row in whole if row["rows"] == "dictionaries")
    page = (ROOT / "docs" / "choosing.md").read_text()
    assert f"takes {shown['seconds']:.1f} s of a CPU core, and {shown['peak, MB']:.0f} MB" in page


def beta_rows() -> list[str]:
    keys = (("gain", ".2f"), ("win rate", ".0%"), ("norm 50%", ".2f"), ("norm 99%", ".3g"))
    return [
        f"| {r['errors']} | {r['rule']} | {r['setting']:g} | {'yes' if r['clip'] else 'no'} | "
        + " | ".join(format(r[k], f) for k, f in keys)
        + " |"
        for r in result("beta")["summary"]
    ]


def test_the_page_on_beta_shows_the_committed_figures_and_a_relative_beta_is_ahead_of_the_other_rules():
    page = (ROOT / "docs" / "choosing.md").read_text()
    for row in beta_rows():
        assert row in page, row
    latent, perceptual = (row["mean"] for row in result("beta")["means"])
    assert f"{round(latent / perceptual, -3):,.0f} times" in page
    for space in ("latent", "perceptual"):
        runs = [row for row in result("beta")["summary"] if row["errors"] == space]
        relative, others = ([r["gain"] for r in runs if (r["rule"] == "relative") is kind] for kind in (True, False))
        assert min(relative) > max(others)


OF_AN_ARM = ("mean reward", "undamaged reward")
OF_TWO = ("mean reward", "reward at equal FLOPs", "undamaged reward")
MORE = {"emoji": (), "digits": ("reward at kept diversity",)}
# What the page compares: a label, an arm and its rival.
LATENT, NCP, TIMES_B2, RANDOM = (arm.name for arm in MAIN)
PER_PAIR, NCP_PER_PAIR, CLEAN_PER_PAIR = (arm.name for arm in TUNED_PER_PAIR)
CLEAN, CLEAN_B2 = (arm.name for arm in TUNED_CLEAN)
COMPARED = [
    (f"{NCP} over {LATENT}", NCP, LATENT),
    (f"{NCP} over {TIMES_B2}", NCP, TIMES_B2),
    (f"{TIMES_B2}, over {LATENT}", TIMES_B2, LATENT),
    (f"random encoder over {TIMES_B2}", RANDOM, TIMES_B2),
    (f"random encoder over {NCP}", RANDOM, NCP),
    (f"{LATENT}, beta per pair, over {LATENT}", f"{LATENT}, beta per pair", LATENT),
    (f"{LATENT}, beta per pair, over {NCP}", f"{LATENT}, beta per pair", NCP),
    (f"{NCP}, beta per pair, over {NCP}", f"{NCP}, beta per pair", NCP),
    (f"{NCP}, beta per pair, over {LATENT}", f"{NCP}, beta per pair", LATENT),
    (f"{NCP} over {LATENT}, both with a beta per pair", f"{NCP}, beta per pair", f"{LATENT}, beta per pair"),
    (f"{NCP} with step clean over {LATENT}", f"{NCP}, step clean", LATENT),
    (f"the same over {LATENT}, beta per pair", f"{NCP}, step clean", f"{LATENT}, beta per pair"),
    (f"the same over {LATENT}, times B² of step clean", f"{NCP}, step clean", f"{LATENT}, times B² of step clean"),
    (f"{NCP} over {LATENT}, both with a tuned beta per pair", NCP_PER_PAIR, PER_PAIR),
    (f"{NCP} with step clean over {LATENT}, both with a tuned beta per pair", CLEAN_PER_PAIR, PER_PAIR),
    (f"{CLEAN}, over {LATENT}", CLEAN, LATENT),
    (f"{CLEAN}, over {PER_PAIR}", CLEAN, PER_PAIR),
    (f"{CLEAN}, over {CLEAN_B2}", CLEAN, CLEAN_B2),
]
# Whose last points it shows.
LAST = [LATENT, NCP, f"{LATENT}, beta per pair", PER_PAIR, f"{NCP}, step clean", CLEAN, CLEAN_PER_PAIR]
LAST += [arm.name for arm in OBJECTIVES]


# What it compares at the same rate and kappa: a method and its rival.
TIMES_B2_CLEAN, NCP_CLEAN = f"{LATENT}, times B² of step clean", f"{NCP}, step clean"
SAME = [(arm.name, LATENT) for arm in METHODS[1:]]
SAME += [(NCP, TIMES_B2), (NCP_CLEAN, TIMES_B2_CLEAN), (NCP_CLEAN, f"{LATENT}, beta per pair")]
SAME += [(f"{name}, beta per pair", f"{LATENT}, beta per pair") for name in (NCP, NCP_CLEAN)]
SAME += [(NCP_CLEAN, f"{NCP_CLEAN}, beta per pair"), (TIMES_B2_CLEAN, f"{LATENT}, beta per pair")]


def averages(of: dict, measures: tuple[str, ...]) -> str:
    return " | ".join(f"{of[name]:.3f} ± {of[f'{name} ±']:.3f}" for name in measures)


def differences(of: dict, other: str, measures: tuple[str, ...]) -> str:
    found = [(of[f"{name} over {other}"], of[f"{name} over {other} ±"]) for name in measures]
    return " | ".join(f"{mean:+.3f} ± {half:.3f}, {verdict(mean, half)}" for mean, half in found)


def same_rows(testbed: str) -> list[str]:
    """The methods at the same rate and kappa, and one over another."""
    more, study = MORE[testbed], result(f"evidence-{testbed}")
    found = {of["arm"]: of for of in study["at the same settings"] if of["seeds"] == len(FRESH)}
    rows = [f"| {name} | {averages(of, OF_AN_ARM + more)} |" for name, of in found.items()]
    compared = [(name, rival) for name, rival in SAME if {name, rival} <= found.keys()]
    cells = ((name, rival, differences(found[name], rival, OF_TWO + more)) for name, rival in compared)
    return rows + [f"| {name} | {rival} | {shown} |" for name, rival, shown in cells]


def main_rows(testbed: str) -> list[str]:
    """The tuned arms, and what one with DPO is over another."""
    study, more, rows = result(f"evidence-{testbed}"), MORE[testbed], []
    found = {of["arm"]: of for of in study["summary"] if of["seeds"] == len(FRESH)}
    for name in (arm.name for arm in ARMS if arm.name in study["tuned"] and arm.name in found):
        settings = "{lr:g} | {kappa:g}".format(**study["tuned"][name])
        rows.append(f"| {name} | {settings} | {averages(found[name], OF_AN_ARM + more)} |")
    compared = [(label, found[name], rival) for label, name, rival in COMPARED if {name, rival} <= found.keys()]
    return rows + [f"| {label} | {differences(of, rival, OF_TWO + more)} |" for label, of, rival in compared]


def setting_rows(testbed: str) -> list[str]:
    """All other arms, each against the one that it is most like."""
    whole = [of for of in result(f"evidence-{testbed}")["summary"] if of["seeds"] == len(FRESH)]
    main = [arm.name for arm in [*MAIN, *TUNED_PER_PAIR, *TUNED_CLEAN, *SAME_SETTINGS]]
    found = [(of, nearest) for of, nearest in against_nearest(whole) if of["arm"] not in main]
    return [f"| {of['arm']} | {nearest} | {differences(of, nearest, OF_TWO)} |" for of, nearest in found]


def last_rows(testbed: str) -> list[str]:
    """What the last point of a run has, mean over the seeds: whether and how far a model left its base."""
    study, rows = result(f"evidence-{testbed}"), []
    for name in LAST:
        runs = [run for run in study["runs"] if (run["phase"], run["arm"]) == ("comparison", name)]
        ends = [run["points"][-1] for run in runs]
        keys = ("reward", "match", "diversity", "winner error", "loser error")
        cells = (f"{statistics.mean(end[key] for end in ends):.2f}" for key in keys if ends)
        rows += [f"| {name} | {' | '.join(cells)} |"] if len(runs) == len(FRESH) else []
    return rows


@pytest.mark.parametrize("testbed", ["digits", "emoji"])
def test_the_page_on_evidence_shows_the_committed_figures_of_whole_arms(testbed):
    page = "".join((ROOT / "docs" / f"{name}.md").read_text() for name in ("evidence", "evidence-tables"))
    rows = same_rows(testbed) + main_rows(testbed) + setting_rows(testbed) + last_rows(testbed)
    assert [row for row in rows if row not in page] == []
    flops = {run["arm"]: run["FLOPs a step"] for run in result(f"evidence-{testbed}")["runs"]}
    assert f"{flops['NCP-DPO'] / flops['latent DPO']:.2f} times the FLOPs" in page


def test_every_difference_with_an_interval_that_a_page_speaks_of_is_one_of_the_studys():
    rows = [
        row
        for testbed in ("digits", "emoji")
        for table in ("summary", "at the same settings")
        for row in result(f"evidence-{testbed}")[table]
    ]
    keys = [(row, key) for row in rows for key in row if " over " in key and not key.endswith("±")]
    known = {f"{row[key]:+.3f} ± {row[f'{key} ±']:.3f}" for row, key in keys if row[f"{key} ±"] is not None}
    shown = {
        (page.name, found)
        for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
        for found in re.findall(r"[+-]\d\.\d{3} ± \d\.\d{3}", page.read_text().replace("\n", " "))
    }
    assert len(shown) > 100
    assert {found for found in shown if found[1] not in known} == set()


def healthy_rows() -> list[str]:
    keys = ("first |margin|", "last loss", "last accuracy", "norm 50%", "norm 90%", "reward")
    rows = ([row["run"], *(f"{float(f'{row[key]:.2g}'):g}" for key in keys)] for row in result("healthy")["summary"])
    return [f"| {' | '.join(row)} |" for row in rows]


def test_the_page_on_healthy_runs_shows_the_committed_figures_and_a_picture_of_each_run():
    page = (ROOT / "docs" / "healthy.md").read_text()
    for row in healthy_rows():
        assert row in page, row
    assert f"from {result('healthy')['reward of the base']:.2g}" in page
    for case in CASES:
        name = f"benchmarks/results/healthy-{case.name}.png"
        assert (ROOT / name).is_file()
        assert f"(../{name})" in page


def test_the_precision_page_shows_the_committed_figures():
    page = (ROOT / "docs" / "precision.md").read_text()
    for row in margin_rows() + precision_rows() + lora_rows() + alignment_rows():
        assert row in page, row


def mutation_rows() -> list[str]:
    rows = []
    for name, r in json.loads((ROOT / "tests" / "mutation.json").read_text()).items():
        same = sum(bool(each["why"]) for each in r["survived"])
        rows.append(f"| {name} | {r['faults']} | {r['tried']} | {r['found']} | {same} |")
        share = 0.95 if name in ("schedule", "difference", "error", "objectives") else 0.9
        assert r["found"] + len(r["survived"]) == r["tried"]
        assert r["found"] >= share * (r["tried"] - same), name
    return rows


def test_the_table_of_faults_that_tests_find_is_the_committed_result_and_meets_its_aim():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    assert [row for row in mutation_rows() if row not in page] == []
