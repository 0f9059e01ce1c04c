"""The evidence study measures what its protocol says, on drawings that its judges and generators share fairly."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import emoji_data, emoji_model, evidence
from benchmarks.emoji import Fit, train_generator
from benchmarks.emoji_judges import STEEP, Judges, accuracy, edges, kernel_distance, palette
from benchmarks.evidence_arms import (
    ARMS,
    MAIN,
    METHODS,
    SAME_RATE,
    SAME_SETTINGS,
    Arm,
    Run,
    at_same,
    drawn,
    encoder_of,
    errors_of,
    latent_errors,
    mean_error,
    rivals,
    safeguarded,
    same_training,
)
from benchmarks.evidence_beds import Digits, Measures, Pairs, Start, _decided, _tournament
from examples.digits import condition, new_scheduler, real_digits
from ncp_loss import NoiseConditionedPerceptualLoss


@pytest.fixture(scope="module")
def bed():
    return Digits(Path(), tiny=True)


@pytest.fixture(scope="module")
def start():
    """Pairs of real digits, which need no sampling: a label's image over another label's."""
    (images, labels), _ = real_digits()
    pairs = Pairs(images[:32], images[32:64], condition(labels[:32]))
    return Start(pairs, pairs, lambda unet: None)


def test_parts_share_no_caption_and_people_who_do_the_same_stay_together():
    captions = [f"{who} doing {index}" for index in range(300) for who in ("man", "woman", "person")]
    parts = emoji_data.parts(emoji_data.Emoji(captions, torch.arange(len(captions)).float()))
    generator, judges, held_out = (set(part.captions) for part in (parts.generator, parts.judges, parts.held_out))
    assert generator | judges | held_out == set(captions)
    assert not generator & judges
    assert not (generator | judges) & held_out
    assert set(parts.pairs.captions) | set(parts.requests.captions) == generator
    assert not set(parts.pairs.captions) & set(parts.requests.captions)
    assert all(f"woman {caption[4:]}" in judges for caption in judges if caption.startswith("man "))
    assert 0.6 < len(generator) / len(captions) < 0.73


def test_images_of_a_part_are_those_of_its_captions():
    emoji = emoji_data.stand_in()
    part = emoji.part([5, 2])
    assert part.captions == [emoji.captions[5], emoji.captions[2]]
    assert torch.equal(part.images, torch.stack([emoji.images[5], emoji.images[2]]))


def test_kernel_distance_is_that_of_its_definition_and_zero_on_average_for_one_distribution():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(count, 3, generator=generator).double() + 1 for count in (4, 5))
    unit = b.square().mean().sqrt()

    def kernel(x, y):
        return (float(x @ y) / unit.item() ** 2 / 3 + 1) ** 3

    def mean(values):
        values = list(values)
        return sum(values) / len(values)

    right = mean(kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j)
    right += mean(kernel(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j)
    right -= 2 * mean(kernel(x, y) for x in a for y in b)
    assert kernel_distance(a, b) == pytest.approx(right)
    same = [kernel_distance(*torch.randn(2, 50, 8, generator=generator)) for _ in range(200)]
    mean_of_same, error = sum(same) / 200, float(torch.tensor(same).std()) / 200**0.5
    assert abs(mean_of_same) < 3 * error
    assert (
        kernel_distance(torch.randn(50, 8, generator=generator) + 1, torch.randn(50, 8)) > 10 * max(map(abs, same)) / 4
    )


def test_a_drawing_matches_its_own_caption_and_counts_those_that_are_nearer():
    emoji = emoji_data.stand_in(20)
    judges = Judges().eval()
    own = torch.arange(20)
    assert judges.matches(emoji.images[:, 1], emoji.images, own).all()
    likeness = judges.likeness(emoji.images[:, 1], emoji.images)
    farthest = likeness.argmin(1)
    assert not judges.matches(emoji.images[:, 1], emoji.images, farthest).any()


def test_training_goes_on_after_an_interruption_as_if_there_had_been_none(tmp_path):
    def trained(path, *stops):
        for steps in stops:
            torch.manual_seed(7)
            module = torch.nn.Linear(3, 1)
            fit = Fit(tmp_path / path, module, lr=0.1)
            fit.run(steps, lambda module=module: (module(torch.randn(4, 3)) - 1).square().mean(), decay=False)
        return fit

    whole, parted = trained("whole.pt", 9), trained("parted.pt", 4, 9)
    assert parted.step == whole.step == 9
    for name, value in whole.mean.items():
        assert torch.equal(parted.mean[name], value)
        assert not torch.equal(value, whole.module.state_dict()[name])


def test_a_generator_without_a_checkpoint_goes_on_from_its_saved_weights(tmp_path):
    emoji = emoji_data.parts(emoji_data.stand_in()).generator
    coder = emoji_model.Coder().eval()

    def trained(work, steps):
        (tmp_path / work).mkdir()
        args = argparse.Namespace(work=tmp_path / work, weights=tmp_path / "weights", early=1, unet_steps=steps)
        fit = train_generator(args, coder, emoji)
        return fit, emoji_model.load_generator(args.weights).state_dict()

    _, saved = trained("here", 2)
    fit, again = trained("elsewhere", 2)
    assert fit.step == 2
    for name, value in saved.items():
        assert torch.equal(again[name], value), name
    assert trained("later", 3)[0].step == 3


# Of arms that differ only in what they inherit one is enough; an early encoder is not to be had for digits.
UNLIKE = {
    arm._replace(name="", inherits="", lr=None, kappa=None, data="", beds=()): arm
    for arm in ARMS
    if arm.encoder != "early"
}
DEFAULT = Arm("")
ALSO = [  # a slow test does the arms that only pass another option to the loss
    pytest.param(arm, marks=pytest.mark.slow) if arm[5:9] != DEFAULT[5:9] else arm for arm in UNLIKE.values()
]


@pytest.mark.parametrize("arm", ALSO, ids=lambda arm: arm.name)
def test_every_arm_moves_the_adapters(bed, start, arm):
    run = Run(arm, bed, start, seed=3, lr=1e-3, kappa=3.0)
    before = [value.detach().clone() for value in run.parameters]
    assert run.step()
    assert any(not torch.equal(value, old) for value, old in zip(run.parameters, before, strict=True))


def test_beta_is_kappa_over_the_arms_own_mean_error(bed, start):
    for arm in (MAIN[1], MAIN[2]):
        errors = errors_of(arm, bed, 3)
        batch = drawn(start.pairs, 16, torch.Generator().manual_seed(1))
        with torch.no_grad():
            prediction = bed.base(*batch.question).sample
        run = Run(arm, bed, start, seed=3, lr=1e-3, kappa=3.0)
        assert run.beta * mean_error(errors, bed, start.pairs, 3) == pytest.approx(3.0)
        scale = run.beta * errors(batch, prediction, None)[0].mean().item()
        assert 0.3 < scale < 30.0, arm.name  # of other draws, and few of them


def test_arms_of_a_seed_start_and_draw_alike(bed, start):
    runs = [Run(arm, bed, start, seed=3, lr=1e-3, kappa=3.0) for arm in (MAIN[0], MAIN[1], MAIN[3])]
    batches = [drawn(start.pairs, 2, run.generator) for run in runs]
    for run, batch in zip(runs, batches, strict=True):
        assert torch.equal(batch.noisy, batches[0].noisy)
        assert all(torch.equal(a, b) for a, b in zip(run.parameters, runs[0].parameters, strict=True))


def test_latent_errors_times_b2_are_the_displacement_of_the_reverse_step(bed, start):
    batch = drawn(start.pairs, 4, torch.Generator().manual_seed(0))
    prediction = bed.base(*batch.question).sample.detach()
    found, _ = errors_of(MAIN[2], bed, 0)(batch, prediction, None)
    scheduler = new_scheduler()
    schedule = NoiseConditionedPerceptualLoss(bed.base, schedule=scheduler).schedule
    back = schedule.reverse_step(batch.timesteps, 1)
    moved = back.latents(batch.noisy, prediction, None) - back.latents(batch.noisy, batch.noise, None)
    assert torch.allclose(found, moved.square().mean((1, 2, 3)), rtol=1e-3)


def test_a_shuffled_encoder_has_the_same_entries_elsewhere_and_a_random_one_others(bed):
    shuffled, fresh = (encoder_of(kind, bed, 0) for kind in ("shuffled", "random"))
    for name, weight in bed.base.named_parameters():
        other = shuffled.get_parameter(name)
        assert torch.equal(weight.flatten().sort().values, other.flatten().sort().values)
    name = "down_blocks.1.resnets.0.conv1.weight"
    assert not torch.equal(bed.base.get_parameter(name), shuffled.get_parameter(name))
    assert not torch.equal(bed.base.get_parameter(name), fresh.get_parameter(name))
    assert encoder_of("base", bed, 0) is bed.base


def test_the_safeguard_never_lets_a_step_raise_the_winners_error(bed, start):
    batch = drawn(start.pairs, 8, torch.Generator().manual_seed(0))
    prediction = bed.base(*batch.question).sample.detach().requires_grad_()
    error, _ = latent_errors(batch, prediction, None)
    chosen, _ = error.chunk(2)

    def change_of_winners(loss):  # when both predictions take the mean step, as shared weights make them do
        (slope,) = torch.autograd.grad(loss, prediction, retain_graph=True)
        (winner,) = torch.autograd.grad(chosen.sum(), prediction, retain_graph=True)
        step = slope.chunk(2)[0] + slope.chunk(2)[1]
        return -(winner.chunk(2)[0] * step).sum().item()

    # Losers as bad as they can be: a pull against the winners' own.
    assert change_of_winners(chosen.sum() - error.chunk(2)[1].sum() * 5) > 0
    assert change_of_winners(chosen.sum() - safeguarded(error, prediction).sum()) <= 0


def test_runs_that_damage_their_samples_count_with_what_they_had_before():
    def record(*points, finite=True):
        found = [{"reward": reward, "match": match} for reward, match in points]
        return {"points": found, "finite": finite}

    kept = record((0.5, 0.8), (0.7, 0.75), (0.9, 0.71), (1.0, 0.61))
    assert evidence.score(kept) == pytest.approx((0.91, (0.7 + 0.9 + 1.0) / 3))  # 0.70 is a tenth of the way down
    assert evidence.score(record((0.5, 0.8), (1.0, 0.3))) == pytest.approx((0.6, 1.0))
    assert evidence.score(record((0.5, 0.8), (0.9, 0.75), (0.4, 0.65))) == pytest.approx((0.9, 0.65))
    assert evidence.score(record((0.5, 0.8), (0.4, 0.3), (0.9, 0.75))) == (0.9, 0.65)  # it came back
    assert evidence.score(record((0.5, 0.8), (1.0, 0.8), finite=False)) == (0.5, 0.5)


def test_equal_rewards_are_ordered_by_the_mean_over_the_points():
    assert evidence.ranked([(0.904, 0.7), (0.900, 0.7)]) > evidence.ranked([(0.901, 0.6), (0.898, 0.6)])
    assert evidence.ranked([(0.92, 0.1)]) > evidence.ranked([(0.90, 0.9)])


def two_points(arm, seed, reward):
    """A run whose reward is 0.5 before; perceptual errors cost half as much again as latent ones."""
    alike = {"match": 0.9, "diversity": 1.0}
    points = [{"step": 0, "reward": 0.5, **alike}, {"step": 10, "reward": reward, **alike}]
    run = {"phase": "comparison", "arm": arm, "seed": seed, "points": points, "finite": True}
    return run | {"FLOPs a step": 3 if arm.startswith("NCP") else 2}


def test_differences_are_taken_seed_by_seed():
    runs = [two_points(MAIN[0].name, seed, 0.6 + 0.1 * seed) for seed in range(3)]
    runs += [two_points(MAIN[1].name, seed, 0.65 + 0.1 * seed) for seed in range(3)]
    row = evidence.summary(runs)[1]
    assert row["mean reward over latent DPO"] == pytest.approx(0.05)
    assert row["mean reward over latent DPO ±"] == pytest.approx(0.0, abs=1e-9)
    assert row["mean reward ±"] == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)


def test_rewards_are_read_at_equal_cost_up_to_where_the_cheapest_arm_ends():
    points = [{"step": 0, "reward": 0.5}, {"step": 10, "reward": 0.8}]
    cheap = {"points": points, "finite": True, "FLOPs a step": 2}
    assert evidence.at_equal_cost(cheap, 20) == pytest.approx((0.5 + 0.8) / 2)
    dear = cheap | {"FLOPs a step": 3}  # two thirds of its steps for the same cost
    assert evidence.at_equal_cost(dear, 20) == pytest.approx((0.5 + (0.5 + 0.3 * 2 / 3)) / 2)
    assert evidence.at_equal_cost(cheap | {"finite": False}, 20) == 0.5


def test_a_reward_at_kept_diversity_is_that_where_diversity_first_falls_to_six_tenths():
    points = [{"reward": 0.5, "diversity": 1.0}, {"reward": 0.7, "diversity": 0.8}, {"reward": 0.9, "diversity": 0.4}]
    assert evidence.at_kept_diversity({"points": points, "finite": True}) == pytest.approx(0.8)
    assert evidence.at_kept_diversity({"points": points[:2], "finite": True}) == 0.7  # it never falls so far
    assert evidence.at_kept_diversity({"points": points[:2], "finite": False}) == 0.5


@pytest.mark.parametrize(
    ("mean", "half", "expected"),
    [
        *((0.05, 0.04, "better"), (-0.05, 0.04, "worse"), (0.05, 0.06, "not known"), (0.01, 0.02, "level")),
        *((0.01, 0.005, "level"), (0.0, 0.031, "not known"), (0.02, 0.01, "better")),
    ],
)
def test_a_difference_counts_as_the_protocol_says(mean, half, expected):
    assert evidence.verdict(mean, half) == expected


def test_decided_pairs_leave_ties_out_and_winners_lost_to_no_other():
    rewards = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.5, 0.55]])
    assert _decided(rewards) == [(0, 0, 1), (1, 1, 0)]
    generator = torch.Generator().manual_seed(0)
    four = torch.tensor([[0.1, 0.5, 0.9, 0.3]])
    assert len(_tournament(four, "all", generator)) == 6
    assert {winner for _, winner, _ in _tournament(four, "winners", generator)} == {2}
    many = four.repeat(200, 1)
    flipped = [four[0, w] < four[0, x] for _, w, x in _tournament(many, "all, flipped", generator)]
    assert 0.17 < sum(flipped) / len(flipped) < 0.23


def test_every_arm_has_a_name_of_its_own_and_inherits_from_one_that_runs_before():
    names = [arm.name for arm in ARMS]
    assert len(set(names)) == len(names)
    tuned = {arm.name for arm in ARMS if not arm.inherits and arm.lr is None}
    for arm in ARMS:
        assert not arm.inherits or arm.inherits in tuned & {main.name for main in MAIN}


def test_an_arm_is_compared_with_arms_on_the_same_data_with_its_nearest_first():
    by_name = {arm.name: arm for arm in ARMS}
    for arm in ARMS:
        found = [by_name[name] for name in rivals(arm.name)]
        assert arm not in found
        data = {arm.data, arm.data.replace("winners", "all")}
        assert {other.data for other in found} <= data
        assert found or arm.data.startswith("all")
    assert rivals("NCP-DPO")[0] == "latent DPO"
    assert rivals("NCP-DPO, random encoder")[0] == "NCP-DPO"
    assert rivals("NCP-CPO")[0] == "latent CPO"
    assert "latent DPO, beta per pair" in rivals("NCP-DPO, beta per pair")
    assert rivals("NCP-DPO, mid_block")[0] == "NCP-DPO"
    weighted = "latent DPO, times B² of step clean"
    assert rivals("NCP-DPO, step clean")[-2:] == [weighted, f"{weighted}, tuned"]
    assert rivals("NCP-DPO, step clean, tuned")[-2:] == [weighted, f"{weighted}, tuned"]
    assert rivals("NCP-DPO, at kappa 8")[0] == "latent DPO, at kappa 8"
    assert rivals("NCP-DPO, caption pairs")[0] == "latent DPO, caption pairs"
    assert rivals("NCP-DPO, winners, flipped")[0] == "NCP-DPO, all, flipped"


def test_arms_that_train_alike_differ_in_where_their_rate_and_kappa_come_from():
    for arm in ARMS:
        twins = {other.name for other in ARMS if same_training(arm, other)} - {arm.name}
        bare = {re.sub(r", at kappa \d|,? tuned", "", name).rstrip(",") for name in {arm.name, *twins}}
        assert len({name.replace(", beta", " beta") for name in bare}) == 1, arm.name


def test_methods_at_the_same_settings_differ_in_nothing_else():
    for kappa in evidence.SAME_KAPPAS["emoji"]:
        arms = [arm for arm in SAME_SETTINGS if arm.kappa == kappa]
        assert [arm.name for arm in arms] == [at_same(method.name, kappa) for method in METHODS]
        assert {arm.lr for arm in arms} == {SAME_RATE}
        assert len({arm._replace(name="") for arm in arms}) == len(arms)
        alike = {arm._replace(name="", errors="", objective="", step=1) for arm in arms}
        assert len(alike) == 1


def test_at_the_same_settings_a_seeds_figure_is_the_mean_over_its_kappas():
    rewards = {"latent DPO": 0.6, "NCP-DPO": 0.7}
    runs = [
        two_points(at_same(method, kappa), seed, reward + kappa / 100 + seed / 1000)
        for method, reward in rewards.items()
        for kappa in evidence.SAME_KAPPAS["emoji"]
        for seed in evidence.FRESH
    ]
    latent, ncp = evidence.at_the_same_settings(runs, "emoji")
    assert latent["mean reward"] == pytest.approx(0.6 + 0.04 + 0.012)
    assert ncp["mean reward over latent DPO"] == pytest.approx(0.1)
    # The dearer is read at two thirds of its steps: a curve from 0.5 to r has the mean (0.5 + r) / 2 over its range.
    end, theirs = 0.752, 0.652
    at_equal = (0.5 + 0.5 + (end - 0.5) * 2 / 3) / 2 - (0.5 + theirs) / 2
    assert ncp["reward at equal FLOPs over latent DPO"] == pytest.approx(at_equal)
    assert len(evidence.at_the_same_settings(runs[:-1], "emoji")[1]) == len(ncp)
    assert evidence.at_the_same_settings(runs[:-1], "emoji")[1]["seeds"] == len(evidence.FRESH) - 1


@pytest.mark.slow
@pytest.mark.parametrize("testbed", ["digits", "emoji"])
def test_an_interrupted_study_goes_on_with_what_it_has(tmp_path, testbed, monkeypatch):
    def study(resume):
        args = {"testbed": testbed, "work": tmp_path, "tiny": True, "out": tmp_path, "resume": resume, "only": "all"}
        evidence.run(argparse.Namespace(device=torch.device("cpu"), **args))
        return json.loads((tmp_path / f"evidence-{testbed}.json").read_text())

    first = study(resume=False)
    assert {run["arm"] for run in first["runs"]} >= {MAIN[0].name, MAIN[1].name}
    assert [row["arm"] for row in first["summary"]] == list(dict.fromkeys(run["arm"] for run in first["runs"]))
    for run in first["runs"]:
        assert [point["step"] for point in run["points"]] == [0, 1, 2] if run["phase"] == "comparison" else [0, 2]
        assert run["FLOPs a step"] > 1e6
    for end in ("", "-arms", "-same", "-samples"):
        assert (tmp_path / f"evidence-{testbed}{end}.png").read_bytes().startswith(b"\x89PNG")
    kept = tmp_path / f"evidence-{testbed}.json"
    kept.write_text(json.dumps(first | {"runs": first["runs"][:-1]}))
    made = []
    monkeypatch.setattr(evidence, "trained", lambda *args, **kw: made.append(args[0].name) or first["runs"][-1])
    again = study(resume=True)
    assert made == [first["runs"][-1]["arm"]]
    assert again["runs"] == first["runs"]


def test_measures_name_what_the_protocol_names():
    protocol = (Path(evidence.__file__).with_name("PROTOCOL.md")).read_text()
    for word in ("reward", "match", "distance", "diversity", "win rate"):
        assert word in protocol.lower()
        assert word in (*Measures._fields, "reward", "win rate")
    for seed in (*evidence.TUNING, *evidence.FRESH):
        assert str(seed) in protocol
    assert isinstance(MAIN[0], Arm)


def test_the_style_judge_learns_style_from_other_captions_than_it_is_asked_about():
    emoji = emoji_data.stand_in(60)
    judges = Judges()
    learned, asked = emoji.part(range(40)), emoji.part(range(40, 60))
    judges.style.fit(*learned.images.unbind(1))
    right = accuracy(judges, asked.images, asked.images)
    assert right.style > 0.9
    judges.style.fit(learned.images[:, 1], learned.images[:, 0])
    assert accuracy(judges, asked.images, asked.images).style == pytest.approx(1 - right.style)


def test_colours_are_shares_and_edges_are_counted_where_they_are():
    images = torch.ones(1, 3, 32, 32)
    white = palette(images)
    assert white.argmax() == 215
    assert white.square().sum() == pytest.approx(1.0)
    assert edges(images).count_nonzero() == 0
    images[..., 16:] = -1
    assert palette(images).square().topk(2).values[0].tolist() == pytest.approx([0.5, 0.5])
    steep = edges(images)[0]
    assert steep[: len(STEEP)].tolist() == pytest.approx([1 / 32] * len(STEEP))  # one column of pixels
    places = steep[len(STEEP) :][:16].view(4, 4)
    assert places.nonzero()[:, 1].unique().tolist() == [1]  # the last before the middle


def test_committed_weights_are_small_and_each_is_described_beside_its_source():
    folder = Path(evidence.__file__).with_name("weights")
    described, files = (folder / "README.md").read_text(), list(folder.glob("*.safetensors"))
    assert len(files) == 4
    assert sum(file.stat().st_size for file in files) < 10_000_000
    for word in (*(file.name for file in files), "Noto Emoji", "Twemoji", "CC BY 4.0", "Apache License", "MIT License"):
        assert word in described
