"""The evidence study's two testbeds: a base model, preference pairs for each seed, and what is measured on samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from sklearn.ensemble import RandomForestClassifier
from torch import Tensor

from benchmarks import emoji_data, emoji_model
from benchmarks.emoji_judges import Judges, kernel_distance, load_judges, spread
from examples import digits
from ncp_loss import absolute_winners

TIE = 0.1  # digits whose rewards are closer than that are no pair; of captions' likeness, half as much
SEEDS_A_RUN = 1_000_000  # noise seeds that belong to one seed; samples for measures have theirs in the second half


class Pairs(NamedTuple):
    """Latents of winners and losers, (P, C, H, W), and the text states of each pair, (P, L, D)."""

    winners: Tensor
    losers: Tensor
    states: Tensor
    early: Tensor | None = None  # the states that the encoder of an early checkpoint learned with

    def rows(self, rows: Any) -> Pairs:
        return Pairs(*(None if values is None else values[rows] for values in self))


class Measures(NamedTuple):
    """Of one model's samples, for the requests and the noise of a seed."""

    rewards: Tensor  # (N,)
    match: float  # share of samples that a second judge finds to show what was asked for
    distance: float  # to real images, 0 for the same distribution
    diversity: float  # mean distance of two samples of one request, over that of two real images of different requests
    variety: float  # mean distance of samples of different requests, over the same
    style: float | None  # mean belief in Twemoji
    images: Tensor


class Start(NamedTuple):
    """What all arms of a seed begin with."""

    pairs: Pairs
    spare: Pairs  # that training does not use
    measure: Callable[[UNet2DConditionModel], Measures]


class Digits:
    """The networks and the judge of the examples; pairs are two samples of the base model, ranked by the judge."""

    rates = 3e-4, 1e-3  # of the tuning grid
    points, tuned_at = (20, 40, 80, 120, 160), (40, 80, 160)
    early = None

    def __init__(self, work: Path, tiny: bool) -> None:
        self.base, self.judge, self.tiny = digits.load_unet(), digits.Judge(), tiny
        self.batch, self.sampling = (2, 4) if tiny else (16, 20)  # pairs a step; DDIM steps
        _, (images, labels) = digits.real_digits()
        self.real, self.real_labels = F.avg_pool2d(images, 2).flatten(1), labels
        trees = 20 if tiny else 200
        self.forest = RandomForestClassifier(trees, random_state=0).fit(self.real.numpy(), labels.numpy())

    def new_network(self) -> UNet2DConditionModel:
        return digits.new_unet()

    def start(self, seed: int, data: str) -> Start:
        first, count = seed * SEEDS_A_RUN, 20 if self.tiny else 300
        if data == "pairs":
            labels, rewards, images = self._judged(first, 2, count)
            pairs = self._pairs(labels, images, _decided(rewards))
        else:
            labels, rewards, images = self._judged(first, 4, count // 4)
            generator = torch.Generator().manual_seed(seed)
            pairs = self._pairs(labels, images, _tournament(rewards, data, generator))
        labels, rewards, images = self._judged(first + SEEDS_A_RUN // 4, 2, count // 4)
        spare = self._pairs(labels, images, _decided(rewards))
        return Start(pairs, spare, lambda unet: self._measure(unet, first + SEEDS_A_RUN // 2))

    def _judged(self, first: int, each: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Requests (R,), and for each of them the rewards (R, each) and the images of samples of the base model."""
        labels = torch.arange(count) % digits.CLASSES
        asked = labels.repeat_interleave(each)
        noise = digits.seeded_noise(range(first, first + len(asked)))
        images = digits.sample(self.base, asked, noise, self.sampling)
        rewards, _ = self.judge(images, asked)
        return labels, rewards.unflatten(0, (count, each)), images.unflatten(0, (count, each))

    @staticmethod
    def _pairs(labels: Tensor, images: Tensor, found: list[tuple[int, int, int]]) -> Pairs:
        request, winner, loser = torch.tensor(found).T
        return Pairs(images[request, winner], images[request, loser], digits.condition(labels[request]))

    def _measure(self, unet: UNet2DConditionModel, first: int) -> Measures:
        count = 20 if self.tiny else 200
        asked = torch.arange(count) % digits.CLASSES
        images = digits.sample(unet, asked, digits.seeded_noise(range(first, first + count)), self.sampling)
        small = F.avg_pool2d(images, 2).flatten(1)
        rewards, _ = self.judge(images, asked)
        match = torch.from_numpy(self.forest.predict(small.numpy())) == asked
        unit = spread(self.real)
        return Measures(
            rewards,
            match.double().mean().item(),
            kernel_distance(small, self.real),
            sum(spread(small[asked == label]) for label in range(digits.CLASSES)) / digits.CLASSES / unit,
            spread(small) / unit,
            None,
            images,
        )


def _decided(rewards: Tensor, tie: float = TIE) -> list[tuple[int, int, int]]:
    """Of requests with two samples each: (request, winner, loser)."""
    leads = (rewards[:, 0] - rewards[:, 1]).tolist()
    return [(i, int(lead < 0), int(lead > 0)) for i, lead in enumerate(leads) if abs(lead) > tie]


def _tournament(rewards: Tensor, data: str, generator: torch.Generator) -> list[tuple[int, int, int]]:
    """All decided pairs of each request's samples; with "flipped" a fifth is the wrong way round, and with "winners"
    only those stay whose winner lost to no other."""
    found = []
    for request, row in enumerate(rewards.tolist()):
        for one, other in itertools.combinations(range(len(row)), 2):
            if abs(row[one] - row[other]) > TIE:
                winner, loser = (one, other) if row[one] > row[other] else (other, one)
                if "flipped" in data and torch.rand((), generator=generator) < 0.2:
                    winner, loser = loser, winner
                found.append((request, winner, loser))
    if "winners" not in data:
        return found
    columns = "caption", "image_0_uid", "image_1_uid", "label_0", "label_1", "pair"
    rows = [dict(zip(columns, (str(r), f"{r} {w}", f"{r} {x}", 1, 0, (r, w, x)), strict=True)) for r, w, x in found]
    return [row["pair"] for row in absolute_winners(rows)]


class Emoji:
    """Drawings in two styles. Of style pairs the Twemoji drawing wins; of caption pairs, which are samples of the base
    model, the one that the caption judge finds more like the caption's own drawings."""

    rates = 5e-4, 1e-3  # of the tuning grid
    points, tuned_at = (8, 16, 24, 32, 48, 64), (16, 32, 64)

    def __init__(self, work: Path, tiny: bool) -> None:
        self.tiny = tiny
        self.batch, self.sampling = (2, 2) if tiny else (12, 10)  # pairs a step; DDIM steps
        if tiny:  # untrained networks, which need no files
            parts = emoji_data.parts(emoji_data.stand_in())
            self.coder, self.judges = emoji_model.Coder().eval(), Judges().eval()
            words = sorted({word for caption in parts.generator.captions for word in caption.split()})
            generator, early = (emoji_model.Generator(words).eval().requires_grad_(False) for _ in range(2))
        else:
            parts = emoji_data.parts(emoji_data.load(work))
            self.coder, self.judges = emoji_model.load_coder(), load_judges()
            generator, early = emoji_model.load_generator(), emoji_model.load_generator(early=True)
        self.base, self.text, self.early, self.early_text = generator.unet, generator.text, early.unet, early.text
        self.sources, self.requests = parts.pairs, parts.requests
        self.count = 4 if tiny else 64  # requests, each sampled twice
        self.drawings = self._pairs(self.sources)
        self.spare = self._pairs(self.requests).rows(slice(self.count))

    def new_network(self) -> UNet2DConditionModel:
        return emoji_model.new_unet()

    @torch.no_grad()
    def _pairs(self, emoji: emoji_data.Emoji) -> Pairs:
        losers, winners = (self.coder.latents(images) for images in emoji.images.unbind(1))
        return self._with_states(winners, losers, emoji.captions)

    @torch.no_grad()
    def _with_states(self, winners: Tensor, losers: Tensor, captions: list[str]) -> Pairs:
        states, early = (text(text.tokens(captions)) for text in (self.text, self.early_text))
        return Pairs(winners, losers, states, early)

    def start(self, seed: int, data: str) -> Start:
        first = seed * SEEDS_A_RUN
        pairs = self.drawings if data == "pairs" else self._sampled_pairs(seed)
        return Start(pairs, self.spare, lambda unet: self._measure(unet, first + SEEDS_A_RUN // 2, data))

    def _sampled_pairs(self, seed: int) -> Pairs:
        """256 captions of the sources, two samples each, ranked by how like the caption's own drawings they are."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self.sources.captions), generator=generator)[: 4 if self.tiny else 256]
        captions, drawings = [self.sources.captions[row] for row in chosen], self.sources.images[chosen]
        noise = emoji_model.seeded_noise(range(seed * SEEDS_A_RUN, seed * SEEDS_A_RUN + 2 * len(chosen)))
        twice = [caption for caption in captions for _ in range(2)]
        latents = emoji_model.sample(self.base, self.text, twice, noise, self.sampling)
        likeness = self.judges.likeness(self.coder.images(latents), drawings)
        right = torch.arange(len(chosen)).repeat_interleave(2)
        rewards = likeness.gather(1, right[:, None]).reshape(-1, 2)
        request, winner, loser = torch.tensor(_decided(rewards, 0.0 if self.tiny else TIE / 2)).T
        latents = latents.unflatten(0, (len(chosen), 2))
        asked = [captions[row] for row in request]
        return self._with_states(latents[request, winner], latents[request, loser], asked)

    def _measure(self, unet: UNet2DConditionModel, first: int, data: str) -> Measures:
        asked = self.requests.captions[: self.count] * 2
        noise = emoji_model.seeded_noise(range(first, first + len(asked)))
        images = self.coder.images(emoji_model.sample(unet, self.text, asked, noise, self.sampling))
        own = torch.arange(self.count).repeat(2)
        belief, likeness = self.judges.twemoji(images), self.judges.likeness(images, self.requests.images)
        second = self.judges.caption if data == "pairs" else self.judges.style  # reward and distance: two judges
        with torch.no_grad():
            features = second.features(images)
            real = second.features(self.requests.images.flatten(0, 1))
        halves, unit = features.chunk(2), spread(real[1::2])
        return Measures(
            belief if data == "pairs" else likeness.gather(1, own[:, None]).squeeze(1),
            self.judges.matches(images, self.requests.images, own).double().mean().item(),
            kernel_distance(features, real),
            (halves[0] - halves[1]).norm(dim=1).mean().item() / unit,
            spread(halves[0]) / unit,
            belief.mean().item(),
            images,
        )


BEDS: dict[str, type[Digits] | type[Emoji]] = {"digits": Digits, "emoji": Emoji}
