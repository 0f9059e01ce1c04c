"""training_data: preference pairs, or winners alone, from a table or a folder, as batches of a run.

Data comes in one of two forms:

- `--dataset_name`: a `datasets` table by its name on the hub, or a folder that `save_to_disk` wrote. Preference pairs
  have columns `jpg_0`, `jpg_1`, `label_0` (1 where the first image won, 0 where the second did; anything undecided is
  skipped) and `caption`, as Pick-a-Pic has, or `chosen`, `rejected` and `caption`. Winners alone have `image` and
  `caption`, or are taken from pairs. Images are PIL images or encoded bytes. With `--absolute_winners`, a table like
  Pick-a-Pic's, with `image_0_uid`, `image_1_uid` and `label_1` too, is first filtered as in the paper: of each prompt,
  the images that neither lost nor drew, each with the one that it beat last.
- `--train_data_dir`: a folder with `chosen/NAME.png`, `rejected/NAME.png` (winners alone: `NAME.png`, or
  `chosen/NAME.png`) and `metadata.jsonl`, one line for each name: `{"file_name": "NAME.png", "caption": "a red fox"}`.
"""

import argparse
import hashlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import datasets
import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps
from torch import Tensor

from ncp_loss import absolute_winners

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Parser(argparse.ArgumentParser):
    """A parser that refuses in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def refuse(self, name: str, must_be: str, was: object, error: Exception | None = None) -> NoReturn:
        """The form of every refusal; of an error that is behind it, the first line."""
        why = f" ({[*str(error).splitlines(), ''][0] or type(error).__name__})" if error else ""
        self.error(f"{name} must be {must_be}; it was {was}{why}")


class Data(NamedTuple):
    """A table's rows as images, the winner first, and a caption."""

    table: datasets.Dataset
    columns: tuple[str, ...]  # of images
    caption: str
    swapped: np.ndarray  # (rows,) bool: the second column's image won, not the first one's
    members: int  # 2: winners and losers; 1: winners alone
    identity: str  # tells the data from other data

    def __len__(self) -> int:
        return len(self.table)

    def row(self, index: int) -> tuple[list[Image.Image], str]:
        row = self.table[index]
        columns = self.columns[::-1] if self.swapped[index] else self.columns
        return [open_image(row[column]) for column in columns[: self.members]], row[self.caption]


def open_image(value: Any) -> Image.Image:
    """A PIL image, encoded bytes or a path, as an RGB image the right way up."""
    if isinstance(value, dict):  # how `datasets` gives an image that it was told not to decode
        value = value["bytes"] or value["path"]
    if not isinstance(value, Image.Image):
        value = Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)
    return ImageOps.exif_transpose(value).convert("RGB")


def load_data(parser: Parser, args: argparse.Namespace, pairs: bool) -> Data:
    """The table or folder that the arguments name, without the rows that decide nothing."""
    if (args.dataset_name is None) == (args.train_data_dir is None):
        given = "neither" if args.dataset_name is None else "both"
        parser.refuse("data", "given by one of --dataset_name and --train_data_dir", given)
    name = "--dataset_name" if args.dataset_name else "--train_data_dir"
    table, identity = _named_table(parser, args) if args.dataset_name else _folder_table(parser, args, pairs)
    if args.absolute_winners:
        table = _absolute_winners(parser, args, name, table)

    choices = [("jpg_0", "jpg_1", "label_0"), ("chosen", "rejected")]
    if not pairs:
        choices = [("image",), ("chosen",), choices[0]]
    columns = next((choice for choice in choices if {*choice, args.caption_column} <= set(table.column_names)), None)
    if columns is None:
        must_be = ", or ".join(" and ".join([*choice, args.caption_column]) for choice in choices)
        parser.refuse(f"{name}'s columns", must_be, ", ".join(table.column_names))
    table = table.select_columns([*columns, args.caption_column])
    if not len(table):
        parser.refuse(name, "a table with rows", "empty")
    if args.max_train_samples:
        table = table.select(range(min(args.max_train_samples, len(table))))
    swapped = np.zeros(len(table), dtype=bool)
    if "label_0" in columns:
        try:
            labels = np.nan_to_num(np.array(list(table["label_0"]), dtype=float), nan=0.5)  # None becomes nan, too
        except (TypeError, ValueError) as error:
            parser.refuse(f"{name}'s label_0", "numbers", table.features["label_0"], error)
        decided = np.flatnonzero(labels != 0.5)
        if not len(decided):
            parser.refuse(f"{name}'s label_0", "0 or 1 in some row", "0.5, a tie, in all of them")
        table, swapped = table.select(decided), labels[decided] < 0.5
    images = tuple(column for column in columns if column != "label_0")
    data = Data(table, images, args.caption_column, swapped, 2 if pairs else 1, identity)
    try:
        _, caption = data.row(0)
    except Exception as error:
        must_be = "images, or encoded images"
        parser.refuse(f"{name}'s {', '.join(images)}", must_be, f"{type(error).__name__} in the first row")
    if not isinstance(caption, str):
        parser.refuse(f"{name}'s {args.caption_column}", "text", f"{caption!r}, in the first row")
    return data


def _named_table(parser: Parser, args: argparse.Namespace) -> tuple[datasets.Dataset, str]:
    """A table on disk, or else by name."""
    name, split = args.dataset_name, args.dataset_split_name
    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            table = datasets.load_from_disk(name)
        else:
            table = datasets.load_dataset(name, args.dataset_config_name, split=split, cache_dir=args.cache_dir)
    except Exception as error:  # many kinds, from a missing folder to a hub that cannot be reached
        parser.refuse("--dataset_name", "a table with rows, on the hub or on disk", f"{name}, split {split}", error)
    if isinstance(table, dict):
        if split not in table:
            parser.refuse("--dataset_split_name", f"one of {', '.join(table)}", split)
        table = table[split]
    return table, table._fingerprint


def _absolute_winners(parser: Parser, args: argparse.Namespace, name: str, table: datasets.Dataset) -> datasets.Dataset:
    """The rows that the paper's filter keeps; no image is decoded for it."""
    columns = {"caption": args.caption_column} | {c: c for c in ("image_0_uid", "image_1_uid", "label_0", "label_1")}
    if not set(columns.values()) <= set(table.column_names):
        must_be = f"{', '.join(columns.values())} and others, for --absolute_winners"
        parser.refuse(f"{name}'s columns", must_be, ", ".join(table.column_names))
    values = table.select_columns(list(columns.values())).with_format(None)[:]
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*(values[c] for c in columns.values()), strict=True)]
    try:
        return table.select([row["row"] for row in absolute_winners(row | {"row": i} for i, row in enumerate(rows))])
    except ValueError as error:
        parser.error(f"{name}, for --absolute_winners: {error}")


def _folder_table(parser: Parser, args: argparse.Namespace, pairs: bool) -> tuple[datasets.Dataset, str]:
    """A folder's images and captions; every image must have its caption, and its partner."""
    root = Path(args.train_data_dir)
    members = ("chosen", "rejected") if pairs else ("chosen",) if (root / "chosen").is_dir() else (".",)
    for folder in [root, *(root / member for member in members), root / "metadata.jsonl"]:
        if not folder.exists():
            must_be = "a folder with " + ", ".join([*(f"{m}/" for m in members if m != "."), "metadata.jsonl"])
            parser.refuse("--train_data_dir", must_be, f"{root}, without {folder}")
    captions = {}
    for number, line in enumerate((root / "metadata.jsonl").read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            known = entry["file_name"] in captions
            captions[entry["file_name"]] = entry[args.caption_column]
        except (ValueError, KeyError, TypeError):
            known = True
        if known:
            must_be = f'{{"file_name": ..., "{args.caption_column}": ...}} in every line, each name once'
            parser.refuse(f"{root / 'metadata.jsonl'}", must_be, f"{line[:80]!r} in line {number}")
    files = {m: {p.name: p for p in (root / m).iterdir() if p.suffix.lower() in IMAGES} for m in members}
    for member, found in files.items():
        odd = sorted(captions.keys() ^ found.keys())
        if odd:
            must_be = "the names in metadata.jsonl"
            where = "metadata.jsonl" if odd[0] in captions else f"{member}/"
            parser.refuse(f"--train_data_dir's images in {member}/", must_be, f"{odd[0]} in {where} alone")
    names = sorted(captions)
    rows = {("image" if m == "." else m): [str(files[m][name]) for name in names] for m in members}
    rows[args.caption_column] = [captions[name] for name in names]
    stats = [Path(path).stat() for member in files for path in rows["image" if member == "." else member]]
    return datasets.Dataset.from_dict(rows), digest([rows, [(stat.st_size, stat.st_mtime_ns) for stat in stats]])


def digest(value: Any) -> str:
    """Equal for equal values, short enough for a file's name."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def mix(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class Stream(torch.utils.data.Dataset):
    """The samples of a run, in order: epoch after epoch, each in an order of its own, from `start` to `stop`.

    Where the reference's predictions are precomputed, every epoch draws for a row what the first one drew.
    """

    def __init__(
        self, data: Data, args: argparse.Namespace, start: int, stop: int, ref_preds: Tensor | None = None
    ) -> None:
        self.data, self.args, self.start, self.stop, self.ref_preds = data, args, start, stop, ref_preds
        self.processor = VaeImageProcessor()
        self.epoch, self.order = -1, torch.empty(0)

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, place = divmod(self.start + index, len(self.data))
        if self.epoch != epoch:
            generator = torch.Generator().manual_seed(mix(self.args.seed, epoch))
            self.epoch, self.order = epoch, torch.randperm(len(self.data), generator=generator)
        row = int(self.order[place])
        seed = mix(self.args.seed, 0 if getattr(self.args, "precompute_reference", False) else epoch, row)
        draws = np.random.default_rng(seed).random(3)
        mirror = draws[0] < 0.5 and not self.args.no_hflip
        place = draws[1:] if self.args.random_crop else (0.5, 0.5)
        images, caption = self.data.row(row)
        # The members of a pair are mirrored and cropped alike; each has the numbers of its own image.
        squares, time_ids = zip(*(square(i, self.args.resolution, mirror, *place) for i in images), strict=True)
        sample = {"images": self.processor.preprocess(list(squares)), "time_ids": torch.tensor(time_ids)}
        sample |= {"captions": caption, "seeds": seed, "rows": row}
        return sample if self.ref_preds is None else sample | {"ref_preds": self.ref_preds[row]}


def square(image: Image.Image, side: int, mirror: bool, down: float, right: float) -> tuple[Image.Image, tuple]:
    """Mirror, scale the shorter side to `side`, crop; and the six numbers by which SDXL is told of it.

    Args:
        down, right: where the crop is, from 0 (top, left) to 1 (bottom, right).

    Returns:
        The square, and the original height and width, the crop's top and left, and twice `side`, the target.
    """
    scale = side / min(image.size)
    original = image.height, image.width
    height, width = (max(side, round(scale * length)) for length in original)
    image = (ImageOps.mirror(image) if mirror else image).resize((width, height), Image.Resampling.LANCZOS)
    top, left = round(down * (height - side)), round(right * (width - side))
    return image.crop((left, top, left + side, top + side)), (*original, top, left, side, side)


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch: winners first, then losers, where a tensor has a row for each; captions, seeds and rows once a pair."""
    batch = {name: [sample[name] for sample in samples] for name in samples[0]}
    for name in {"images", "time_ids", "ref_preds"} & batch.keys():
        batch[name] = torch.stack(batch[name], dim=1).flatten(0, 1)
    return batch | {name: torch.tensor(batch[name]) for name in ("seeds", "rows")}
