"""A user's own corpus: tables with columns of any name as documents, queries and judgements, a part of them as test."""

from __future__ import annotations

import logging
import os
import random
import shlex
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from st_wkl.data._rows import LINES, file_kind, numbered_lines
from st_wkl.data.collection_files import By, Judged, Qrels, Texts, whole_gains
from st_wkl.data.grouping import Ids
from st_wkl.data.layouts import roles, titled, told_columns
from st_wkl.data.tables import Table, as_text, seen, tables
from st_wkl.ranges import check_options
from st_wkl.text import plain_text, text_hash

logger = logging.getLogger(__name__)


def read_corpus(
    source: Any, columns: Mapping[str, str | None], *, queries: Any = None, judgements: Any = None, revision: Any = None
) -> tuple[Texts, Texts, Judged]:
    """Return documents, queries and judgements of tables; see `Collection.load`, which says what is taken for what.

    Args:
        source: Tables of documents, and perhaps of the other two.
        columns: Column by role, where the user names it.
        queries: Tables of queries.
        judgements: Tables of judgements.
        revision: Of a dataset of the Hub.
    """
    told = told_columns(columns)
    made = _Corpus(told)
    found = [(table, "") for table in tables(source, revision)]
    found += [(table, "queries") for table in _asked_in(queries)] if queries is not None else []
    if judgements is not None:
        found += [(table, "judgements") for table in tables(judgements, name="the judgements")]
    first = {table.name: table.first() for table, _ in found}
    there = {column for part in first.values() for column in part.column_names}
    if lost := [column for column in told.values() if column not in there]:
        raise ValueError(f"There is no column {lost[0]!r} in {seen(first)}.")
    kinds = [(table, kind or _kind(first[table.name], told)) for table, kind in found]
    if not any(kind == "documents" for _, kind in kinds):
        raise ValueError(
            f"No documents are in {seen(first)}. Name the columns of their ids and texts: id=, text=, title= "
            "(--id, --text, --title)."
        )
    for table, kind in kinds:
        _tell(table.name, kind, first[table.name].column_names, _own(first[table.name], told))
    for kind in ("documents", "queries", "judgements"):  # which name the former ones
        for table, of in kinds:
            if of == kind:
                getattr(made, f"add_{kind}")(table, first[table.name])
    if not made.queries:
        raise ValueError(
            f"No queries are in {seen(first)}. Name the column of the query that each document answers (query=, "
            "--query), or give tables of queries and judgements (queries=, judgements=; --queries, --judgements)."
        )
    return made.documents, made.queries, made.judged


def read_queries(source: Any) -> Texts:
    """Return queries by their ids; see `Collection.load`.

    Args:
        source: A table, a text file with one in a line, or a list of texts.

    Raises:
        ValueError: A row has no text, or there are none.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")  # that one repeats another one
        ...     list(read_queries(["who purrs", "Who  purrs", "who barks"]).values())
        ['who purrs', 'who barks']
    """
    made = _Corpus({})
    for table in _asked_in(source):
        first = table.first()
        _tell(table.name, "queries", first.column_names, _own(first, {}))
        made.add_queries(table, first)
    if not made.queries:
        raise ValueError(f"{source!r:.80} holds no queries.")
    return made.queries


def _asked_in(source: Any) -> list[Table]:
    """Return tables of queries; lines become one, without those that are empty or repeat another one."""
    name, lines = "the queries", source
    if isinstance(source, str | os.PathLike) and file_kind(Path(source)) in LINES:
        name, lines = str(source), [*numbered_lines(Path(source).expanduser())]
        if lines and all("\t" in line for _, line in lines):
            raise ValueError(
                f"{name}: each line has a tab, as in {lines[0][1]!r:.80}, and is read as one query. If these are "
                "columns, give them names in a first line, such as query_id and query, and call the file .tsv."
            )
    elif isinstance(source, list | tuple):
        lines = [*enumerate(source, 1)]
    else:
        return tables(source, name=name)
    kept: dict[str, str] = {}
    for number, text in lines:
        if not isinstance(text, str):
            raise TypeError(f"{name}, number {number}: a query is text (str), got {text!r:.80}.")
        if text.strip():
            kept.setdefault(plain_text(text), text.strip())
    total = max((number for number, _ in lines), default=0)
    full = sum(bool(text.strip()) for _, text in lines)
    if total > len(kept):
        warnings.warn(
            f"{name}: {len(kept):,} queries of {total:,} lines; {total - full:,} are empty, {full - len(kept):,} "
            "repeat another one (case and white space aside).",
            stacklevel=5,
        )
    return [Table(name, pa.table({"query": pa.array(kept.values(), pa.large_string())}))]


def _tell(name: str, kind: str, columns: list[str], found: Mapping[str, str]) -> None:
    """Say which column was taken for what: a guess that nobody sees is a wrong corpus."""
    if not kind:
        warnings.warn(f"{name} is not read; its columns are {', '.join(columns)}.", stacklevel=4)
        return
    taken = ", ".join(f"{role} from {column!r}" for role, column in found.items())
    left = ", ".join(repr(column) for column in columns if column not in found.values())
    logger.info("%s is read as %s: %s%s", name, kind, taken, f"; not used: {left}" if left else "")


def advice(folder: Path) -> str | None:
    """Return what a folder of tables holds and the command that makes a collection of it; None of any other."""
    try:
        first = {table.name: table.first() for table in tables(folder)}
    except (FileNotFoundError, ValueError):
        return None
    flags: dict[str, str] = {}
    for part in first.values():
        named = roles(part, {})[1]
        flags |= {role: named[role] for role in ("id", "text", "title", "query") if role in named and role not in flags}
    flags = {"id": "ID_COLUMN", "text": "TEXT_COLUMN"} | flags
    told = " ".join(f"--{role} {shlex.quote(column)}" for role, column in flags.items())
    command = f"st-wkl import {shlex.quote(str(folder))} --output my-collection {told}"
    return f"It holds {seen(first)}. `{command}` makes a BEIR folder of them."


def _kind(first: pa.Table, told: Mapping[str, str]) -> str:
    """Return what a table holds, by its columns; "" for nothing that is known."""
    found = _own(first, told)
    asks = "query" in found or "query_id" in found
    if "text" in found and not ("query_id" in found and "id" not in found and "query" not in found):
        return "documents"
    if "id" in found and asks and ("query_id" in found or "label" in found or "score" in found):
        return "judgements"
    return "queries" if asks else ""


def _own(first: pa.Table, told: Mapping[str, str]) -> dict[str, str]:
    return roles(first, {role: column for role, column in told.items() if column in first.column_names})[1]


class _Corpus:
    """What was read so far."""

    def __init__(self, told: Mapping[str, str]) -> None:
        self.told, self.ids = told, Ids()
        self.documents: Texts = {}
        self.queries: Texts = {}
        self.judged: Judged = {}
        self.by_text: dict[str, str] = {}  # the first query of each text

    def add_documents(self, table: Table, first: pa.Table) -> None:
        """Take documents, and the queries beside them, which they answer."""
        found = _own(first, self.told)
        for part, where in table.batches():
            texts = titled(part[found["title"]] if "title" in found else None, part[found["text"]])
            ids = as_text(part[found["id"]]) if "id" in found else self.ids.of(texts)
            for row, (key, text) in enumerate(zip(ids.to_pylist(), texts.to_pylist(), strict=True)):
                _put(self.documents, key, text or "", f"{where(row)}: the document")
            if "query" in found:
                rows = zip(self._asked(part, found, where), ids.to_pylist(), _gains(part, found), strict=True)
                for row, (query, key, gain) in enumerate(rows):
                    if query is not None:
                        self._judge(query, key, gain, where(row))

    def add_queries(self, table: Table, first: pa.Table) -> None:
        """Take queries; their ids and texts may be called as those of documents are."""
        found = _own(first, self.told)
        names = {"query_id": found.get("query_id") or found.get("id"), "query": found.get("query") or found.get("text")}
        found = {role: name for role, name in names.items() if name is not None}
        if "query" not in found:
            raise ValueError(
                f"{seen({table.name: first})} has no texts of queries. Name their column: query= (--query)."
            )
        for part, where in table.batches():
            for row, key in enumerate(self._asked(part, found, where)):
                if key is None:
                    raise ValueError(f"{where(row)}: the query has no text. Remove the row and its judgements.")

    def add_judgements(self, table: Table, first: pa.Table) -> None:
        """Take judgements of queries by id or text, and documents by id; without gains all are relevant."""
        found = _own(first, self.told)
        if "id" not in found or not {"query", "query_id"} & found.keys():
            raise ValueError(
                f"{seen({table.name: first})} has no judgements. They have a query (query= or query_id=), the id of a "
                "document (id=), and perhaps a gain (label=)."
            )
        by_id = "query_id" in found or self._are_ids(first, found)
        for part, where in table.batches():
            ids = as_text(part[found["id"]]).to_pylist()
            named = found.get("query_id", found.get("query"))
            asked = as_text(part[named]).to_pylist() if by_id else self._asked(part, found, where)
            for row, (query, key, gain) in enumerate(zip(asked, ids, _gains(part, found), strict=True)):
                if query is None or key is None:
                    raise ValueError(
                        f"{where(row)}: query {query!r}, document {key!r}: one is missing. Remove the row."
                    )
                self._judge(query, key, gain, where(row))

    def _are_ids(self, first: pa.Table, found: Mapping[str, str]) -> bool:
        return bool(self.queries) and as_text(first[found["query"]])[:1].to_pylist()[0] in self.queries

    def _asked(self, part: pa.Table, found: Mapping[str, str], where: Any) -> Iterator[str | None]:
        """Take the queries of some rows, and yield their ids; None for an empty one."""
        texts = as_text(part[found["query"]])
        ids = as_text(part[found["query_id"]]) if "query_id" in found else self.ids.of(texts)
        for row, (key, text) in enumerate(zip(ids.to_pylist(), texts.to_pylist(), strict=True)):
            if text is None or not text.strip():
                yield None
                continue
            if "query_id" not in found:
                key = self.by_text.setdefault(text, key)
            _put(self.queries, key, text, f"{where(row)}: the query")
            self.by_text.setdefault(text, key)
            yield key

    def _judge(self, query: str, key: str, gain: Any, where: str) -> None:
        (whole,) = whole_gains({key: gain}, f"{where}, query {query!r}").values()
        before = self.judged.setdefault(query, {}).setdefault(key, whole)
        if before != whole:
            raise ValueError(
                f"{where}: query {query!r} and document {key!r} were judged {before} before and {whole} here. Keep one "
                "of the two, or add them up."
            )


def _put(texts: Texts, key: str | None, text: str, where: str) -> None:
    if not key:
        raise ValueError(f"{where} that begins {text[:60]!r} has no id. Give it one, or leave the column of ids out.")
    if texts.setdefault(key, text) != text:
        raise ValueError(f"{where} {key!r} had another text before. Ids must be unique: rename one.")


def _gains(part: pa.Table, found: Mapping[str, str]) -> list[Any]:
    name = found.get("label", found.get("score"))
    return [1] * len(part) if name is None else part[name].to_pylist()


def held_out(documents: Texts, judged: Judged, share: float, by: By, seed: int) -> Qrels:
    """Return the judgements as the splits train and test.

    Args:
        documents: Their texts: copies count as one document.
        judged: The judgements.
        share: Share of the queries for test, about; 0 for none.
        by: Whether queries are drawn one by one, or, by documents, with all that share a relevant one with them.
        seed: Of the draw.

    Raises:
        ValueError: No query would be left on one side.
    """
    check_options(test_share=share, seed=seed)
    if not share or not judged:
        return {"train": judged} if judged else {}
    names = sorted(judged)
    group = np.arange(len(names))
    if by == "document":
        keys: dict[str, int] = {}
        edges = [
            (place, keys.setdefault(text_hash(documents[key]) if key in documents else key, len(keys)))
            for place, name in enumerate(names)
            for key, gain in judged[name].items()
            if gain > 0
        ]
        if edges:
            queries, texts = np.array(edges).T
            size = len(names) + len(keys)
            graph = coo_array((np.ones(len(queries), bool), (queries, texts + len(names))), shape=(size, size))
            group = connected_components(graph, directed=False)[1][: len(names)]
    _, group, sizes = np.unique(group, return_inverse=True, return_counts=True)
    order = list(range(len(sizes)))
    random.Random(seed).shuffle(order)
    wanted, test = share * len(names), set[int]()
    taken = 0
    for place in order:
        if taken + sizes[place] <= max(wanted, 1):
            test.add(place)
            taken += int(sizes[place])
    if not 0 < taken < len(names):
        largest = int(sizes.max())
        raise ValueError(
            f"test_share {share}: of {len(names):,} queries {taken:,} would be for test. "
            + (f"{largest:,} share documents with one another and stay together by document; " if by != "query" else "")
            + 'Give another test_share, or by="query".'
        )
    chosen = {name for place, name in enumerate(names) if group[place] in test}
    train = {name: gains for name, gains in judged.items() if name not in chosen}
    return {"train": train, "test": {name: judged[name] for name in judged if name in chosen}}
