"""The data filter equals its definition, on drawn tournaments, and takes rows from wherever people have them."""

from __future__ import annotations

import csv
import io
import re

import datasets
import oracle
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ncp_loss import absolute_winners
from ncp_loss.winners import COLUMNS

images, captions = st.sampled_from("abcde"), st.sampled_from(["a fox", "two foxes"])
labels = st.sampled_from([(1, 0), (0, 1), (0.5, 0.5)])


def as_rows(drawn: list[tuple]) -> list[dict]:
    return [dict(zip(COLUMNS, (c, one, two, *label), strict=True)) for c, one, two, label in drawn]


# Few images, so that ties, repeated pairs, cycles, images of two prompts and pairs of an image with itself all occur.
tournaments = st.lists(st.tuples(captions, images, images, labels), max_size=12).map(as_rows)


@given(rows=tournaments)
@example(as_rows([("p", "a", "b", (1, 0)), ("p", "b", "c", (1, 0)), ("p", "c", "a", (1, 0))]))  # a cycle
@example(as_rows([("p", "a", "b", (1, 0)), ("p", "b", "a", (0, 1))]))  # a pair seen twice
@example(as_rows([("p", "a", "a", (1, 0))]))  # an image that beats itself
@example(as_rows([("p", "a", "b", (1, 0)), ("q", "b", "a", (1, 0))]))  # winners of two prompts
def test_the_kept_rows_are_those_of_the_definition(rows):
    assert absolute_winners(rows) == [rows[i] for i in oracle.absolute_winners(rows)]


@given(rows=tournaments)
def test_filtering_twice_keeps_what_filtering_once_kept(rows):
    once = absolute_winners(rows)
    assert absolute_winners(once) == once


@given(rows=tournaments, cut=st.integers(0, 12))
def test_an_image_that_has_lost_never_wins_again(rows, cut):
    def winners(kept):
        return {(row["caption"], row["image_0_uid" if row["label_0"] else "image_1_uid"]) for row in kept}

    played = {(row["caption"], row[f"image_{i}_uid"]) for row in rows[:cut] for i in (0, 1)}
    assert winners(absolute_winners(rows)) & played <= winners(absolute_winners(rows[:cut]))


def test_rows_are_returned_as_they_came_with_their_other_columns():
    rows = as_rows([("p", "a", "b", (1, 0)), ("p", "a", "c", (1, 0)), ("q", "d", "e", (0, 1))])
    for number, row in enumerate(rows):
        row["number"] = number
    before = [dict(row) for row in rows]
    kept = absolute_winners(iter(rows))
    assert [row["number"] for row in kept] == [1, 2]
    assert kept[0] is rows[1]
    assert rows == before


def test_a_dataset_a_csv_and_a_list_give_the_same_and_a_dataset_can_be_made_of_it():
    rows = as_rows([("p", "a", "b", (1.0, 0.0)), ("p", "a", "c", (1.0, 0.0)), ("q", "d", "e", (0.5, 0.5))])
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    file.seek(0)
    (read,) = absolute_winners(csv.DictReader(file))  # labels are text here
    (kept,) = absolute_winners(datasets.Dataset.from_list(rows))
    assert kept == rows[1] == {**read, "label_0": float(read["label_0"]), "label_1": float(read["label_1"])}
    assert datasets.Dataset.from_list([kept]).to_list() == [kept]


@pytest.mark.parametrize("column", COLUMNS)
def test_a_row_without_a_column_is_refused_by_its_number_with_the_columns_it_has(column):
    rows = as_rows([("p", "a", "b", (1, 0))] * 2)
    del rows[1][column]
    with pytest.raises(ValueError, match=r"^rows\[1\] must be a mapping with caption, .*; it was one with ") as raised:
        absolute_winners(rows)
    assert column not in str(raised.value).partition("it was")[2]
    with pytest.raises(ValueError, match="it was one with 0, caption"):
        absolute_winners([{0: 1, "caption": "p"}])


@pytest.mark.parametrize(
    "pair", [(1, 1), (0, 0), (None, None), ("left", "right"), (float("nan"), 0), (2, -1), ("", "")]
)
def test_labels_that_decide_nothing_are_refused(pair):
    rows = as_rows([("p", "a", "b", (1, 0)), ("p", "a", "c", pair)])
    was = re.escape(f"; it was {pair[0]!r} and {pair[1]!r}") + "$"
    with pytest.raises(
        ValueError, match=r"^rows\[1\]'s label_0, label_1 must be 1 and 0, 0 and 1, or 0.5 and 0.5.*" + was
    ):
        absolute_winners(rows)


@pytest.mark.parametrize("missing", [None, float("nan")])
@pytest.mark.parametrize("column", COLUMNS[:3])
def test_an_image_or_caption_that_is_missing_is_refused(column, missing):
    rows = as_rows([("p", "a", "b", (1, 0))])
    rows[0][column] = missing
    with pytest.raises(
        ValueError, match=r"^rows\[0\]'s caption, image_0_uid, image_1_uid must be given, as text or a number"
    ):
        absolute_winners(rows)


class Abstract:
    """As torch's IterableDataset was before its method became abstract."""

    def __iter__(self):
        raise NotImplementedError


def test_what_is_no_table_of_rows_is_refused():
    with pytest.raises(TypeError, match=r"^rows\[0\] must be a mapping with caption, .*; it was str$"):
        absolute_winners({"caption": ["p"]})
    for nothing in (5, dict, Abstract()):
        with pytest.raises(TypeError, match=r"^rows must be an iterable of mappings; it was \w+$"):
            absolute_winners(nothing)
