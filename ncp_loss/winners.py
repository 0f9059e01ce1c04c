"""winners: the paper's filter of preference data, which keeps images that never lost; no tensors."""

from __future__ import annotations

import numbers
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, TypeVar

from .checks import bad

COLUMNS = ("caption", "image_0_uid", "image_1_uid", "label_0", "label_1")
SHARES = {(1.0, 0.0): 1.0, (0.0, 1.0): 0.0, (0.5, 0.5): 0.5}  # by labels: the first image's share of the win
Row = TypeVar("Row", bound=Mapping[str, Any])


def absolute_winners(rows: Iterable[Row]) -> list[Row]:
    """One row for each absolute winner, an image that neither lost nor drew in any row of its prompt.

    An image that wins one pair and loses another gets gradients that partly cancel (paper, eq. 20 and 21). For each
    absolute winner its last row is kept.

    Args:
        rows: mappings with Pick-a-Pic's columns ``caption``, ``image_0_uid``, ``image_1_uid``, ``label_0`` and
            ``label_1``, in the order of time. Other columns are kept. Labels are 1 and 0, 0 and 1, or 0.5 and 0.5 for a
            tie, as numbers or as text. ``rows`` may be a ``datasets.Dataset`` (without its image columns, which would
            be decoded), ``DataFrame.to_dict("records")`` or a ``csv.DictReader``. Each row is read once.

    Returns:
        The kept rows themselves, unchanged and in their order. ``datasets.Dataset.from_list``, ``pandas.DataFrame`` and
        ``csv.DictWriter.writerows`` take them. To get rows by number, put the numbers into a column first.

    Raises:
        ValueError, TypeError: a row is no mapping, lacks a column, or has other labels.

    >>> pairs = [("a", "b", 1, 0), ("c", "a", 1, 0), ("d", "b", 1, 0), ("e", "d", 0, 1), ("c", "f", 0.5, 0.5)]
    >>> rows = [dict(zip(COLUMNS, ("a fox", *pair))) for pair in pairs]
    >>> [(row["image_0_uid"], row["image_1_uid"]) for row in absolute_winners(rows)]  # d alone; c drew
    [('e', 'd')]
    """
    # By prompt and image: the number of the last row that the image won, or None once it has lost or drawn.
    last: defaultdict[Hashable, dict[Hashable, int | None]] = defaultdict(dict)
    kept: dict[int | None, Row] = {}
    try:
        numbered = enumerate(rows)
    except (TypeError, NotImplementedError):
        raise bad("rows", "an iterable of mappings", type(rows).__name__, TypeError) from None
    for number, row in numbered:
        caption, winner, loser, tie = _read(row, number)
        # The loser can be no absolute winner any more. The winner can, unless it has lost or drawn before.
        images = last[caption]
        kept.pop(images.get(loser), None)
        images[loser] = None
        won = images.get(winner, number)
        if won is not None:
            kept.pop(won, None)
            images[winner] = None if tie else number
            if not tie:
                kept[number] = row
    return list(kept.values())


def _read(row: Mapping[str, Any], number: int) -> tuple[Hashable, Hashable, Hashable, bool]:
    """The caption, the winner, the loser, and whether the two drew."""
    try:
        caption, first, second = row["caption"], row["image_0_uid"], row["image_1_uid"]
        labels = row["label_0"], row["label_1"]
    except (KeyError, TypeError, IndexError):
        must_be = f"a mapping with {', '.join(COLUMNS)}"
        if not isinstance(row, Mapping):
            raise bad(f"rows[{number}]", must_be, type(row).__name__, TypeError) from None
        raise bad(f"rows[{number}]", must_be, f"one with {', '.join(map(str, row))}") from None
    for value in (caption, first, second):
        if not isinstance(value, str | bytes | numbers.Real) or value != value:  # pandas has NaN for what is missing
            name, was = f"rows[{number}]'s caption, image_0_uid, image_1_uid", repr((caption, first, second))
            raise bad(name, "given, as text or a number", was)
    try:
        share = SHARES[labels] if labels in SHARES else SHARES[float(labels[0]), float(labels[1])]
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError):
        must_be = "1 and 0, 0 and 1, or 0.5 and 0.5 for a tie"
        raise bad(f"rows[{number}]'s label_0, label_1", must_be, f"{labels[0]!r} and {labels[1]!r}") from None
    return (caption, first, second, share == 0.5) if share else (caption, second, first, False)
