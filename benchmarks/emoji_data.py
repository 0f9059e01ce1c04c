"""The emoji of Unicode, each drawn in two styles: what the emoji testbed learns from, and which part learns what.

The npm packages `emoji-datasource-google` (Noto Emoji) and `emoji-datasource-twitter` (Twemoji) hold 1,911 emoji with
their names. `npm pack` fetches them into a folder that git ignores. Drawings are laid on white and reduced to 32 x 32.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PACKAGES = {"Noto": "emoji-datasource-google", "Twemoji": "emoji-datasource-twitter"}
VERSION = "16.0.0"
SIZE = 32
CELL = 64  # of a sheet, with a margin of one pixel on each side
SIGN_OF_PERSON = {"man", "woman", "person", "men", "women", "boy", "girl", "people"}


class Emoji(NamedTuple):
    """Captions, and each one's drawings in the order of PACKAGES."""

    captions: list[str]
    images: Tensor  # (N, 2, 3, 32, 32) in [-1, 1]

    def part(self, rows: list[int]) -> Emoji:
        return Emoji([self.captions[row] for row in rows], self.images[rows])


class Parts(NamedTuple):
    """Who sees which captions. What teaches a judge teaches no generator, and the other way round."""

    generator: Emoji  # the autoencoder and the U-Net
    pairs: Emoji  # of the generator's: preference pairs
    requests: Emoji  # of the generator's, the others: what is drawn to measure reward and fidelity
    judges: Emoji
    held_out: Emoji  # what judges are measured on; nothing learns from it


def load(work: Path) -> Emoji:
    """All emoji, from the reduced copy in `work`, which is made from the packages where it is missing."""
    kept = work / "emoji.npz"
    if not kept.is_file():
        work.mkdir(parents=True, exist_ok=True)
        sheets, rows = zip(*(_unpacked(name, work) for name in PACKAGES.values()), strict=True)
        captions = [[" ".join(re.findall(r"[a-z0-9]+", row["name"].lower())) for row in table] for table in rows]
        if captions[0] != captions[1]:
            raise ValueError("the two packages must list the same emoji in the same order; their versions differ")
        images = np.stack([[_cut(sheet, row) for row in rows[0]] for sheet in sheets], axis=1)
        np.savez_compressed(kept, images=images, captions=np.array(captions[0]))
    found = np.load(kept)
    images = torch.from_numpy(found["images"]).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    return Emoji(found["captions"].tolist(), images)


def _unpacked(package: str, work: Path) -> tuple[Image.Image, list[dict[str, object]]]:
    """A package's sheet of drawings, on white, and its table of emoji."""
    archive = work / f"{package}-{VERSION}.tgz"
    if not archive.is_file():
        npm = shutil.which("npm")
        if npm is None:
            raise FileNotFoundError(f"npm must be installed to fetch {package}, or {archive} be there already")
        subprocess.run(
            [npm, "pack", f"{package}@{VERSION}", "--silent"], cwd=work, check=True, stdout=subprocess.DEVNULL
        )
    with tarfile.open(archive) as files:
        table = json.loads(_read(files, "package/emoji.json"))
        style = package.rpartition("-")[2]
        drawn = Image.open(io.BytesIO(_read(files, f"package/img/{style}/sheets-clean/{CELL}.png"))).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB"), table


def _read(files: tarfile.TarFile, name: str) -> bytes:
    member = files.extractfile(name)
    if member is None:
        raise FileNotFoundError(f"{name} is no file of the package")
    return member.read()


def _cut(sheet: Image.Image, row: dict[str, object]) -> np.ndarray:
    left, top = (int(str(row[key])) * (CELL + 2) + 1 for key in ("sheet_x", "sheet_y"))
    return np.asarray(sheet.crop((left, top, left + CELL, top + CELL)).resize((SIZE, SIZE), Image.Resampling.BOX))


def parts(emoji: Emoji) -> Parts:
    """A fixed division: two thirds of the captions for the generator, one third for the judges.

    Captions that differ only in who is drawn ("man golfing", "woman golfing") stay together.
    """
    drawn = [_fraction(caption) for caption in emoji.captions]
    rows = {
        name: [row for row, at in enumerate(drawn) if low <= at < high]
        for name, (low, high) in {
            "generator": (0, 2 / 3),
            "pairs": (0, 8 / 15),
            "requests": (8 / 15, 2 / 3),
            "judges": (2 / 3, 11 / 12),
            "held_out": (11 / 12, 1),
        }.items()
    }
    # The first requests are then of every kind, not flags, with which the table begins.
    rows["requests"].sort(key=lambda row: _hash(f"request {emoji.captions[row]}"))
    return Parts(**{name: emoji.part(found) for name, found in rows.items()})


def _fraction(caption: str) -> float:
    """A number in [0, 1) that depends on the caption alone: the division is the same on every machine."""
    key = " ".join(word for word in caption.split() if word not in SIGN_OF_PERSON)
    return int.from_bytes(_hash(key)[:4], "big") / 2**32


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def stand_in(count: int = 60) -> Emoji:
    """Coloured shapes with captions in two styles, filled and outlined: for tests, which fetch nothing."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, SIZE), torch.linspace(-1, 1, SIZE), indexing="ij")
    sizes = {"disc": (x.square() + y.square()).sqrt(), "square": torch.maximum(x.abs(), y.abs()), "bar": 2 * y.abs()}
    captions, images = [], []
    for index in range(count):
        name = list(sizes)[index % 3]
        colour = torch.rand(3, 1, 1, generator=torch.Generator().manual_seed(index)) * 1.6 - 1
        captions.append(f"{name} {index}")
        masks = sizes[name] < 0.7, (sizes[name] - 0.6).abs() < 0.15
        images.append(torch.stack([torch.where(mask, colour, torch.ones(())) for mask in masks]))
    return Emoji(captions, torch.stack(images))
