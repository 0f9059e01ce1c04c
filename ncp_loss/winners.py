"""winners: the pairs of each prompt's images that never lost, the paper's filter of preference data; no tensors."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from .checks import bad

COLUMNS = ("caption", "image_0_uid", "image_1_uid", "label_0", "label_1")
OUTCOMES = ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5))
Row = TypeVar("Row", bound=Mapping[str, Any])


class _Pair(NamedTuple):
    caption: Hashable
    winner: Hashable
    loser: Hashable
    tie: bool


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
    # By prompt and image: its last row and that row's number, or None once it has lost or drawn.
    last: dict[Hashable, dict[Hashable, tuple[int, Row] | None]] = {}
    for number, row in enumerate(rows):
        pair = _read(row, number)
        images = last.setdefault(pair.caption, {})
        images[pair.loser] = None
        if pair.tie:
            images[pair.winner] = None
        elif images.get(pair.winner, ()) is not None:
            images[pair.winner] = number, row
    kept = [found for images in last.values() for found in images.values() if found is not None]
    return [row for _, row in sorted(kept, key=lambda found: found[0])]


def _read(row: Mapping[str, Any], number: int) -> _Pair:
    if not isinstance(row, Mapping):
        raise bad(f"rows[{number}]", f"a mapping with {', '.join(COLUMNS)}", type(row).__name__, TypeError)
    try:
        caption, first, second, *labels = [row[column] for column in COLUMNS]
    except KeyError:
        raise bad(f"rows[{number}]", f"a mapping with {', '.join(COLUMNS)}", f"one with {', '.join(row)}") from None
    if any(value is None or value != value for value in (caption, first, second)):  # NaN is pandas' None
        raise bad(f"rows[{number}]'s caption, image_0_uid, image_1_uid", "given", repr((caption, first, second)))
    try:
        outcome = float(labels[0]), float(labels[1])
    except (TypeError, ValueError):
        outcome = None
    if outcome not in OUTCOMES:
        must_be = "1 and 0, 0 and 1, or 0.5 and 0.5 for a tie"
        raise bad(f"rows[{number}]'s label_0, label_1", must_be, f"{labels[0]!r} and {labels[1]!r}")
    winner, loser = (first, second) if outcome[0] >= outcome[1] else (second, first)
    return _Pair(caption, winner, loser, outcome[0] == outcome[1])
