"""In which columns scored lists lie: the layouts of other projects as a table, and their rows as pairs."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from st_wkl.data.grouping import NO_GAIN
from st_wkl.data.tables import Where, as_text, plain_name
from st_wkl.ranges import nearest

# How columns are called, as `plain_name` has it; the first that is there counts.
NAMES = {
    "query": ("query", "anchor", "question", "querytext", "sentence"),
    "query_id": ("queryid", "qid", "topicid"),
    "text": (
        "document",
        "passage",
        "documents",
        "passages",
        "docs",
        "doc",
        "answer",
        "text",
        "documenttext",
        "body",
        "content",
    ),
    "id": ("documentid", "documentids", "corpusid", "corpusids", "docid", "docids", "passageid", "pid", "pids", "id"),
    "title": ("title",),
    "score": ("score", "scores", "teacherscore", "teacherscores", "rerankerscore", "logit", "logits"),
    "label": ("gain", "gains", "relevance", "label", "labels", "grade", "rating", "judgement", "judgment", "clicks"),
}


@dataclass(frozen=True)
class Part:
    """Documents in one column, one or a list in each row.

    Args:
        column: Its name, as a pattern for `plain_name`; of texts, of ids, or of structures with either.
        ids: Column of their ids beside it.
        scores: Column of their scores beside it.
        gains: Column of their gains beside it.
        gain: What it says of them to stand there; None for nothing.
    """

    column: str
    ids: str = ""
    scores: str = ""
    gains: str = ""
    gain: int | None = None


# A row's documents are those of its parts, one after another; a layout is recognised by the first of these.
LAYOUTS: dict[str, tuple[Part, ...]] = {
    "FlagEmbedding": (
        Part("pos", "posids?", "posscores?", "posgains?", 1),
        Part("neg", "negids?", "negscores?", "neggains?", 0),
    ),
    "Tevatron": (
        Part("positivepassages", scores="positivescores?", gain=1),
        Part("negativepassages", scores="negativescores?", gain=0),
    ),
    "columns": (
        Part("positives?", "positive(document)?ids?", "positivescores?", gain=1),
        Part(r"negatives?\d*", r"negative(document)?ids?\d*", "negativescores?", gain=0),
    ),
}


# Columns of texts, of ids, of scores and of gains, and the gain of standing there.
PartColumns = tuple[str | None, str | None, str | None, str | None, int | None]


@dataclass(frozen=True)
class Layout:
    """How the rows of a table are read.

    Args:
        name: Of the layout.
        found: Column of the table for each role.
        parts: The documents: column of texts, of ids, of scores (None where there is none), and gain.
    """

    name: str
    found: Mapping[str, str]
    parts: tuple[PartColumns, ...] = ()

    @property
    def has_scores(self) -> bool:
        """Whether there is a column of scores."""
        return "score" in self.found or any(part[2] is not None for part in self.parts)

    def told(self) -> str:
        """Return which column was taken for what."""
        own = [f"{role} from {column!r}" for role, column in self.found.items()]
        own += [f"documents from {(text or ids)!r}" for text, ids, *_ in self.parts if "text" not in self.found]
        return f"{self.name}: {', '.join(own)}"


def told_columns(columns: Mapping[str, str | None]) -> dict[str, str]:
    """Return the columns that are named, by role.

    Raises:
        TypeError: There is no such role.
    """
    if wrong := [role for role in columns if role not in NAMES]:
        raise TypeError(f"There is no option {wrong[0]!r}{nearest(wrong[0], NAMES)}. Columns: {', '.join(NAMES)}.")
    return {role: column for role, column in columns.items() if column is not None}


def roles(first: pa.Table, told: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the columns of a table by their plain names, and those that are known by role; see `recognise`."""
    names = first.column_names
    if lost := [column for column in told.values() if column not in names]:
        raise ValueError(f"There is no column {lost[0]!r}; the columns are {', '.join(names)}.")
    plain = {plain_name(name): name for name in reversed(names) if name not in told.values()}
    found = dict(told)
    for role, known in NAMES.items():
        if role not in found and (there := next((plain[name] for name in known if name in plain), None)):
            found[role] = there
    if "score" not in found and "label" in found and _holds_scores(first[found["label"]]):
        found["score"] = found.pop("label")
    return plain, found


def recognise(first: pa.Table, told: Mapping[str, str]) -> Layout | None:
    """Return how a table is read, by the names of its columns; None where these say nothing.

    The layouts `queries` and `documents` are tables of texts with ids; the others hold lists or pairs.

    Args:
        first: Its first rows.
        told: Column for each role that the user names.

    Raises:
        ValueError: There is no column of a name that the user gives.
    """
    plain, found = roles(first, told)
    if "query" not in found and "query_id" not in found:
        own = _part(found, "id", "text", "title")
        return Layout("documents", own) if {"id", "text"} <= own.keys() else None
    own = _part(found, "query", "query_id", "score")
    text, ids = found.get("text"), found.get("id")
    for name, parts in LAYOUTS.items():
        made = [[*_columns_of(part, plain, "query" in found)] for part in parts]
        if not made[0] and made[1] and (text or ids):
            made[0] = [(text, ids, None, None, 1)]  # hard negatives beside the two columns that were there before
        if name == "columns" and made[0] and not made[1]:  # documents of either kind, by the name of the first
            text, ids = text or made[0][0][0], ids or made[0][0][1]
        elif made[0]:
            return Layout(name, own, tuple(one for part in made for one in part))
    if ids or (text and ("query" in found or "score" in found)):
        return Layout("pairs", own | _part(found, "title", "label"), ((text, ids, None, None, None),))
    of = {"query_id": found.get("query_id"), "query": text or found.get("query")}
    return Layout("queries", {role: name for role, name in of.items() if name}) if all(of.values()) else None


def _part(found: Mapping[str, str], *roles: str) -> dict[str, str]:
    return {role: found[role] for role in roles if role in found}


def _columns_of(part: Part, plain: Mapping[str, str], with_query: bool) -> Iterator[PartColumns]:
    def column(pattern: str) -> list[str]:
        names = [name for name in plain if pattern and re.fullmatch(pattern, name)]
        return [plain[name] for name in sorted(names, key=lambda name: (len(name), name))]

    texts, ids = column(part.column), column(part.ids)
    scores, gains = (next(iter(column(pattern)), None) for pattern in (part.scores, part.gains))
    if texts and not with_query and not ids:  # a query by its id has documents by theirs
        texts, ids = [], texts
    for place in range(max(len(texts), len(ids))):
        text, key = (found[place] if place < len(found) else None for found in (texts, ids))
        yield text, key, scores, gains, part.gain


def _holds_scores(column: pa.ChunkedArray) -> bool:
    """Tell whether a column called label holds a teacher's scores: numbers with a point, and not only 0 and 1."""
    kind = column.type
    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        column = pc.list_flatten(column)
        kind = column.type
    if pa.types.is_floating(kind):
        return not pc.all(pc.or_(pc.equal(column, 0), pc.equal(column, 1))).as_py()
    return bool(pa.types.is_string(kind) and pc.any(pc.match_substring_regex(column, r"^\[?-?\d+\.\d*[1-9]")).as_py())


@dataclass
class Rows:
    """Pairs of some rows: `row` says which each is of; texts or ids are None where the table has none."""

    row: np.ndarray
    texts: pa.Array | None
    ids: pa.Array | None
    score: np.ndarray
    gain: np.ndarray


def pairs_of(layout: Layout, table: pa.Table, where: Where) -> Rows:
    """Return the pairs of some rows, in the order of each row's documents.

    Raises:
        ValueError: Lists of a row differ in length, or a value is no number; with the place.
    """
    count, made = len(table), []
    for text, ids, scores, gains, gain in layout.parts:
        title = layout.found.get("title")
        for rows, texts, keys in _documents(table, text, ids, title, skip_null=layout.name != "pairs"):
            score = _numbers(table, scores, rows, count, where) if scores else np.full(len(rows), np.nan)
            stated = (
                _gains(table, gains, rows, where) if gains else np.full(len(rows), NO_GAIN if gain is None else gain)
            )
            made.append((rows, texts, keys, score, stated.astype(np.int32)))
    row = np.concatenate([part[0] for part in made])
    order = np.argsort(row, kind="stable")
    row = row[order]

    def joined(place: int) -> pa.Array | None:
        columns = [part[place] for part in made]
        if all(column is None for column in columns):
            return None
        absent = [pa.nulls(len(part[0]), pa.large_string()) for part in made]
        filled = [none if column is None else column for column, none in zip(columns, absent, strict=True)]
        return filled[0] if len(made) == 1 else pa.concat_arrays(filled).take(pa.array(order))

    score, labels = (np.concatenate([part[place] for part in made])[order] for place in (3, 4))
    if "score" in layout.found:
        score = _numbers(table, layout.found["score"], row, count, where)
    if "label" in layout.found:
        labels = _gains(table, layout.found["label"], row, where)
    return Rows(row, joined(1), joined(2), score, labels)


def _gains(table: pa.Table, name: str, row: np.ndarray, where: Where) -> np.ndarray:
    gains = _numbers(table, name, row, len(table), where)
    if len(wrong := np.flatnonzero(~np.isnan(gains) & ((gains != np.floor(gains)) | (np.abs(gains) > 1e6)))):
        place = int(wrong[0])
        raise ValueError(
            f"{where(int(row[place]))}: the gain in {name!r} is {gains[place]}, no whole number. If these are "
            "a teacher's scores, say that this is their column (score)."
        )
    return np.where(np.isnan(gains), NO_GAIN, gains).astype(np.int32)


def _documents(
    table: pa.Table, text: str | None, ids: str | None, title: str | None, skip_null: bool
) -> Iterator[tuple[np.ndarray, pa.Array | None, pa.Array | None]]:
    """Yield rows, texts and ids of a part's documents; a structure of lists, one for each system, is several."""
    columns = [table[name] for name in (text, ids) if name is not None]
    if pa.types.is_struct(columns[0].type) and len(columns) == 1:
        fields = {field.name: pc.struct_field(columns[0], field.name) for field in columns[0].type}
        if not {"text", "docid"} & fields.keys():
            for found in fields.values():
                rows, values = _flat(found, skip_null)
                yield (rows, as_text(values), None) if text else (rows, None, as_text(values))
            return
    rows, values = _flat(columns[0], skip_null)
    beside = None
    if len(columns) == 2:
        other, beside = _flat(columns[1], skip_null)
        beside = as_text(beside)
        if not np.array_equal(rows, other):
            raise ValueError(f"The lists of {text!r} and {ids!r} differ in length. Write one id for each document.")
    if pa.types.is_struct(values.type):  # of Tevatron's passages
        fields = {field.name: pc.struct_field(values, field.name) for field in values.type}
        keys = next((as_text(fields[name]) for name in ("docid", "id", "_id") if name in fields), None)
        yield rows, None if "text" not in fields else titled(fields.get("title"), fields["text"]), keys
    elif text is None:
        yield rows, None, as_text(values)
    else:
        plain = title is None or pa.types.is_list(columns[0].type)
        yield rows, as_text(values) if plain else titled(table[title], table[text]), beside


def titled(title: pa.ChunkedArray | None, text: pa.ChunkedArray) -> pa.Array:
    """Return `document_text` of columns; null where there is neither title nor text."""
    texts = as_text(text)
    if title is None:
        return texts
    titles = as_text(title)
    space = pa.scalar(" ", pa.large_string())
    both = pc.binary_join_element_wise(pc.fill_null(titles, ""), pc.fill_null(texts, ""), space)
    return pc.if_else(pc.and_(pc.is_null(titles), pc.is_null(texts)), None, pc.utf8_trim_whitespace(both))


def _flat(column: pa.ChunkedArray | pa.Array, skip_null: bool) -> tuple[np.ndarray, pa.Array]:
    """Return rows and values of a column, with lists one after another; a null list is an empty one."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)) and _is_list(column):
        column = pa.array([_parsed(value) for value in column.to_pylist()])
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type):
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        return np.repeat(np.arange(len(column)), lengths), column.flatten()
    if not skip_null or not column.null_count:
        return np.arange(len(column)), column
    there = pc.is_valid(column)
    return np.flatnonzero(there.to_numpy(zero_copy_only=False)), column.filter(there)


def _is_list(column: pa.Array) -> bool:
    first = next((value.as_py() for value in column[:10] if value.is_valid), "")
    return first.startswith("[") and first.rstrip().endswith("]") and isinstance(_parsed(first), list)


def _parsed(value: str | None) -> Any:
    """Return a list that was written as text, by JSON or by Python."""
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value or "null" if read is json.loads else str(value))
        except (ValueError, SyntaxError):
            continue
        return found if isinstance(found, list | None) else value
    return value


def _numbers(table: pa.Table, name: str, row: np.ndarray, count: int, where: Where) -> np.ndarray:
    """Return a number for each pair, from a column of numbers or of lists of them; NaN where there is none.

    Args:
        table: With the column.
        name: Of the column.
        row: Row of each pair.
        count: Number of rows.
        where: For messages.
    """
    column = table[name].combine_chunks()
    rows, values = _flat(column, True)
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        try:
            values = pc.cast(pc.utf8_trim_whitespace(as_text(values)), pa.float64())
        except (pa.ArrowException, ValueError):
            row_of, value = _first_wrong(rows, values)
            raise ValueError(f"{where(row_of)}: {value!r} in {name!r} is no number.") from None
    numbers = pc.fill_null(pc.cast(values, pa.float64(), safe=False), np.nan).to_numpy(zero_copy_only=False)
    have, want = np.bincount(rows, minlength=count), np.bincount(row, minlength=count)
    lists = pa.types.is_nested(column.type) or len(values) != len(rows) or (have > 1).any()
    if not lists:
        if len(many := np.flatnonzero((want > 1) & (have == 1))):
            raise ValueError(
                f"{where(int(many[0]))}: {name!r} holds one number, {numbers[have[: many[0]].sum()]}, for "
                f"{want[many[0]]} documents. A difference of two scores is no score of either: give a list of scores."
            )
        alone = np.full(count, np.nan)
        alone[rows] = numbers
        return alone[row]
    if len(wrong := np.flatnonzero(have != want)):
        raise ValueError(
            f"{where(int(wrong[0]))}: {have[wrong[0]]} numbers in {name!r} for {want[wrong[0]]} documents. Each "
            "document needs one."
        )
    return numbers


def _first_wrong(rows: np.ndarray, values: pa.Array) -> tuple[int, Any]:
    for row, value in zip(rows.tolist(), values.to_pylist(), strict=True):
        try:
            float(value)
        except (TypeError, ValueError):
            return row, value
    return int(rows[0]), values[0].as_py()
