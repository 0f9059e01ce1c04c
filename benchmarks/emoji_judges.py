"""Judges of emoji, and how far samples are from real drawings. They learn from captions that taught no generator.

The style judge is a logistic regression on colours, edges and coarse pixels; its fit is convex. The caption judge is a
small convolutional network. Both see pixels; the generator's features are of latents. Among their training images are
reconstructions by the autoencoder, so that its blur is no sign of style or of caption.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from benchmarks.emoji_model import WEIGHTS, load

NEAREST = 5
BINS, ANGLES = 6, 8  # of a colour channel; of an edge's direction
STEEP = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # thresholds of an edge's height; white to black is 2 sqrt(3)


def palette(images: Tensor) -> Tensor:
    """The root of each colour's share, (N, 216): a pixel counts for the colours around its own, by nearness."""
    levels = (images + 1) / 2 * (BINS - 1)
    near = (1 - (levels.flatten(2)[..., None] - torch.arange(BINS)).abs()).clamp(min=0)  # (N, 3, pixels, bins)
    red, green, blue = near.unbind(1)
    return (torch.einsum("npr,npg,npb->nrgb", red, green, blue).flatten(1) / red.shape[1]).sqrt()


def edges(images: Tensor) -> Tensor:
    """How high edges are, in all and in 4 x 4 places, and where they point, in 4 x 4 places: (N, 247)."""
    across = F.pad(images[..., 1:] - images[..., :-1], (0, 1))
    down = F.pad(images[..., 1:, :] - images[..., :-1, :], (0, 0, 0, 1))
    height = (across.square() + down.square()).sum(1, keepdim=True).sqrt()
    angle = torch.atan2(down.mean(1, keepdim=True), across.mean(1, keepdim=True))
    steep = height > torch.tensor(STEEP).view(-1, 1, 1)
    turns = torch.arange(ANGLES).view(-1, 1, 1) * (2 * torch.pi / ANGLES)
    towards = height * (angle - turns).cos().clamp(min=0).square()
    found = [steep.float().mean((2, 3))]
    return torch.cat(found + [F.avg_pool2d(x.float(), 8).flatten(1) for x in (steep, towards)], dim=1)


class StyleJudge(nn.Module):
    """Images (N, 3, 32, 32) to the log-odds of Twemoji over Noto, (N, 1)."""

    def __init__(self) -> None:
        super().__init__()
        count = self._plain(torch.zeros(1, 3, 32, 32)).shape[1]
        self.register_buffer("centre", torch.zeros(count))
        self.register_buffer("scale", torch.ones(count))
        self.head = nn.Linear(count, 1)

    @staticmethod
    def _plain(images: Tensor) -> Tensor:
        border = torch.cat([images[:, :, (0, -1)].flatten(1), images[..., (0, -1)].flatten(1)], dim=1)
        return torch.cat([palette(images), edges(images), F.avg_pool2d(images, 4).flatten(1), border], dim=1)

    def features(self, images: Tensor) -> Tensor:
        return (self._plain(images) - self.centre) / self.scale

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    @torch.no_grad()
    def fit(self, noto: Tensor, twemoji: Tensor, strength: float = 0.02) -> None:
        plain = self._plain(torch.cat([noto, twemoji]))
        self.centre, self.scale = plain.mean(0), plain.std(0).clamp(min=0.02)
        features = ((plain - self.centre) / self.scale).numpy()
        found = LogisticRegression(C=strength, max_iter=1000).fit(features, [0] * len(noto) + [1] * len(twemoji))
        self.head.weight.copy_(torch.from_numpy(found.coef_))
        self.head.bias.copy_(torch.from_numpy(found.intercept_))


class CaptionJudge(nn.Module):
    """Images (N, 3, 32, 32) to vectors (N, 64)."""

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 96)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((3, *widths), widths, strict=False):
            stride = 1 if before == 3 else 2
            layers += [nn.Conv2d(before, width, 3, stride, 1), nn.GroupNorm(8, width), nn.SiLU()]
        self.trunk, self.head = nn.Sequential(*layers), nn.Linear(2 * widths[-1], 64)

    def features(self, images: Tensor) -> Tensor:
        found = self.trunk(images)
        return torch.cat([found.mean((2, 3)), found.amax((2, 3))], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class Judges(nn.Module):
    """`style`: the log-odds of Twemoji over Noto. `caption`: vectors in which drawings of one caption are near."""

    def __init__(self) -> None:
        super().__init__()
        self.style, self.caption = StyleJudge(), CaptionJudge()

    @torch.no_grad()
    def twemoji(self, images: Tensor) -> Tensor:
        """The style judge's belief that Twemoji drew it, (N,)."""
        return self.style(images).squeeze(1).sigmoid()

    @torch.no_grad()
    def likeness(self, images: Tensor, drawings: Tensor) -> Tensor:
        """(N, M): cosine of each image to the drawings (M, S, 3, 32, 32) of M captions, the nearest of the S styles."""
        keys = F.normalize(self.caption(drawings.flatten(0, 1)), dim=1).unflatten(0, drawings.shape[:2])
        return torch.einsum("nd,msd->nms", F.normalize(self.caption(images), dim=1), keys).amax(2)

    def matches(self, images: Tensor, drawings: Tensor, right: Tensor) -> Tensor:
        """Whether the right caption (N,) is among the five of which a drawing is nearest, (N,) bool."""
        likeness = self.likeness(images, drawings)
        return (likeness > likeness.gather(1, right[:, None])).sum(1) < NEAREST


def load_judges(folder: Path = WEIGHTS) -> Judges:
    judges = Judges()
    load(folder / "emoji_judges.safetensors", judges)
    return judges


def kernel_distance(samples: Tensor, real: Tensor) -> float:
    """Squared maximum mean discrepancy of features, cubic polynomial kernel, unbiased: 0 for the same distribution.

    Features are first divided by the real ones' root mean square.
    """
    samples, real = (x.double() / real.double().square().mean().sqrt() for x in (samples, real))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> Tensor:
        return (kernel(a, a).sum() - kernel(a, a).diagonal().sum()) / (len(a) * (len(a) - 1))

    return float(within(samples) + within(real) - 2 * kernel(samples, real).mean())


def spread(features: Tensor) -> float:
    """Mean distance between two of the features (N, D)."""
    return float(F.pdist(features.float()).mean())


class Accuracy(NamedTuple):
    style: float  # right about real drawings
    style_decoded: float  # and about their reconstructions
    first: float  # a Noto drawing's nearest Twemoji drawing has its caption
    nearest: float  # one of the nearest five has it


@torch.no_grad()
def accuracy(judges: Judges, drawings: Tensor, decoded: Tensor) -> Accuracy:
    """On drawings (N, 2, 3, 32, 32), Noto first, and their reconstructions."""

    def right(images: Tensor) -> float:
        noto, twemoji = (judges.twemoji(x) for x in images.unbind(1))
        return float(torch.cat([noto < 0.5, twemoji > 0.5]).double().mean())

    likeness = judges.likeness(drawings[:, 0], drawings[:, 1:])
    rank = (likeness > likeness.diagonal()[:, None]).sum(1)
    shares = [float((rank < count).double().mean()) for count in (1, NEAREST)]
    return Accuracy(right(drawings), right(decoded), *shares)


def varied(images: Tensor) -> Tensor:
    """Half of the images mirrored, some blurred, all with a little noise and another brightness."""
    count = len(images)
    chance = torch.rand(4, count, 1, 1, 1)
    images = torch.where(chance[0] < 0.5, images.flip(3), images)
    blurred = F.avg_pool2d(F.pad(images, (1,) * 4, mode="replicate"), 3, 1)
    images = torch.lerp(images, blurred, chance[1] * (chance[2] < 0.5))
    gain = 1 + 0.1 * (torch.rand(count, 3, 1, 1) - 0.5)
    return (images * gain + 0.1 * chance[3] * torch.randn_like(images)).clamp(-1, 1)


def contrast(caption: CaptionJudge, images: Tensor, temperature: float = 0.1) -> Tensor:
    """The loss of vectors of drawings (N, 2, 3, 32, 32): each must find its caption's other drawing among the N."""
    one, other = (F.normalize(caption(x), dim=1) for x in images.unbind(1))
    logits, right = one @ other.T / temperature, torch.arange(len(images))
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
