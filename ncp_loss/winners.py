"""winners: the pairs of each prompt's images that never lost, the paper's filter of preference data; no tensors."""

from __future__ import annotations

import numbers
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, TypeVar

from .checks import bad

COLUMNS = ("caption", "image_0_uid", "image_1_uid", "label_0", "label_1")
SHARES = {(1.0, 0.0): 1.0, (0.0, 1.0): 0.0, (0.5, 0.5): 0.5}  # by labels: how much of the win is the first image's
Row = TypeVar("Row", bound=Mapping[str, Any])


def absolute_winners(rows: Iterable[Row]) -> list[Row]:
    """The rows whose winner neither lost nor drew in any row of its prompt: for each such image, its last row.

    An image that wins one pair and loses another gets gradients that partly cancel (paper, eq. 20 and 21). What remains
    is one pair for each absolute winner, against the image that it beat last.

    Args:
        rows: mappings with Pick-a-Pic's columns ``caption``, ``image_0_uid``, ``image_1_uid``, ``label_0`` and
            ``label_1``, in the order of time; other columns are carried along. Labels are 1 and 0, 0 and 1, or 0.5
            and 0.5 for a tie, as numbers or as text. A ``datasets.Dataset`` (without its image columns, which would be
            decoded), ``DataFrame.to_dict("records")`` and a ``csv.DictReader`` all will do. Each is read once.

    Returns:
        The kept rows themselves, unchanged and in their order: ``datasets.Dataset.from_list``, ``pandas.DataFrame``
        and ``csv.DictWriter.writerows`` take them. Where rows are wanted by number, number them in a column.

    Raises:
        ValueError, TypeError: a row that is no mapping, lacks a column, or has labels other than those.

    >>> pairs = [("a", "b", 1, 0), ("c", "a", 1, 0), ("d", "b", 1, 0), ("e", "d", 0, 1), ("c", "f", 0.5, 0.5)]
    >>> rows = [dict(zip(COLUMNS, ("a fox", *pair))) for pair in pairs]
    >>> [(row["image_0_uid"], row["image_1_uid"]) for row in absolute_winners(rows)]  # d alone; c drew
    [('e', 'd')]
    """
    # By prompt and image: the number of the last row that it won, or None once it has lost or drawn.
    last: defaultdict[Hashable, dict[Hashable, int | None]] = defaultdict(dict)
    kept: dict[int | None, Row] = {}
    try:
        numbered = enumerate(rows)
    except (TypeError, NotImplementedError):
        raise bad("rows", "an iterable of mappings", type(rows).__name__, TypeError) from None
    for number, row in numbered:
        caption, winner, loser, tie = _read(row, number)
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
    """Caption, winner, loser, and whether they drew."""
    try:
        caption, first, second = row["caption"], row["image_0_uid"], row["image_1_uid"]
        labels = row["label_0"], row["label_1"]
    except (KeyError, TypeError, IndexError):
        must_be = f"a mapping with {', '.join(COLUMNS)}"
        if not isinstance(row, Mapping):
            raise bad(f"rows[{number}]", must_be, type(row).__name__, TypeError) from None
        raise bad(f"rows[{number}]", must_be, f"one with {', '.join(row)}") from None
    for value in (caption, first, second):
        if not isinstance(value, str | bytes | numbers.Real) or value != value:  # NaN is pandas' None
            name, was = f"rows[{number}]'s caption, image_0_uid, image_1_uid", repr((caption, first, second))
            raise bad(name, "given, as text or a number", was)
    try:
        share = SHARES[labels] if labels in SHARES else SHARES[float(labels[0]), float(labels[1])]
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError):
        must_be = "1 and 0, 0 and 1, or 0.5 and 0.5 for a tie"
        raise bad(f"rows[{number}]'s label_0, label_1", must_be, f"{labels[0]!r} and {labels[1]!r}") from None
    return (caption, first, second, share == 0.5) if share else (caption, second, first, False)
