"""Scores that others have made: candidate lists in the layouts of other projects, as the three tables of a dataset."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from st_wkl.data.arrow import lists_of
from st_wkl.data.collection import Collection, Missing
from st_wkl.data.dataset_files import check_free, describe, features
from st_wkl.data.grouping import NO_GAIN, Ids, Pairs, Texts, lists, single
from st_wkl.data.layouts import Layout, Rows, pairs_of, recognise, titled, told_columns
from st_wkl.data.report import report_on_lists
from st_wkl.data.tables import Table, Where, as_text, seen, tables
from st_wkl.files import replacing_folder

logger = logging.getLogger(__name__)
# Pairs that the report on the teacher is made of: the first so many.
_REPORTED = 5_000_000
# Two scores of one pair that differ by more than rounding, in parts of the score.
_ROUNDING = 1e-3
_KINDS, _TEXTS = ("query", "document"), ("queries", "documents")


class _Read(NamedTuple):
    table: Table
    layout: Layout


def convert(
    source: Any,
    folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    collection: Any = None,
    split: str = "train",
    scores: Any = None,
    teacher: str | None = None,
    missing: Missing = "raise",
    command: str | None = None,
    **columns: str | None,
) -> Path:
    """Write scores that others have made as the folder of a dataset, in bounded memory, and return it.

    Args:
        source: See `DistillationDataset.load`, for all but the next and `command`.
        folder: See `DistillationDataset.save`.
        revision: Of a dataset of the Hub.
        collection: Texts and judgements of ids: what `Collection.load` takes.
        split: Of its judgements.
        scores: Scores of lists without any.
        teacher: Who made the scores.
        missing: What is done about pairs that lack something.
        command: What makes the dataset again, for its card.
        **columns: Column by role.

    Example:
        >>> convert("triples", "lists", teacher="my-reranker")  # doctest: +SKIP
    """
    folder, told = Path(folder).expanduser(), told_columns(columns)
    check_free(folder)
    main, texts, judged = _sorted(_recognised(tables(source, revision), told), scores is not None)
    loaded = None if collection is None else Collection.load(collection)
    with replacing_folder(folder) as new:
        work = _Work(new, main, texts, loaded, missing)
        try:
            made = work.run(judged, scores, told, split) | _origin(source, main, teacher)
        finally:
            shutil.rmtree(new / "pairs", ignore_errors=True)
        describe(new, made | ({} if command is None else {"command": command}))
    return folder


def holds_lists(source: Any, columns: Mapping[str, str | None], revision: str | None = None) -> bool:
    """Tell whether tables hold lists of scored documents."""
    told = told_columns(columns)
    firsts = [table.first() for table in tables(source, revision)]
    found = [recognise(part, _own(part, told)) for part in firsts]
    return any(one is not None and one.name not in _TEXTS and one.has_scores for one in found)


def _own(first: pa.Table, told: Mapping[str, str]) -> dict[str, str]:
    return {role: column for role, column in told.items() if column in first.column_names}


def _sorted(found: list[_Read], scored: bool) -> tuple[list[_Read], list[_Read], list[_Read]]:
    """Return tables of lists, of texts, and of judgements, which are lists with gains beside others with scores."""
    main = [one for one in found if one.layout.name not in _TEXTS]
    judged = [one for one in main if not one.layout.has_scores and "label" in one.layout.found]
    judged = judged if len(judged) < len(main) else []
    main = [one for one in main if one not in judged]
    if not scored and (bare := [one for one in main if not one.layout.has_scores]):
        raise ValueError(
            f"{bare[0].table.name} has no scores ({_told(bare[0])}). Give those of a reranker as scores= (--scores), "
            "name their column as score=, or have these lists scored: hard_negative_candidates makes candidates of "
            "them for the builder."
        )
    return main, [one for one in found if one.layout.name in _TEXTS], judged


def _recognised(found: list[Table], told: Mapping[str, str]) -> list[_Read]:
    first = {table.name: table.first() for table in found}
    there = {column for part in first.values() for column in part.column_names}
    if lost := [column for column in told.values() if column not in there]:
        raise ValueError(f"There is no column {lost[0]!r} in {seen(first)}.")
    made = []
    for table in found:
        part = first[table.name]
        if (layout := recognise(part, _own(part, told))) is not None:
            made.append(_Read(table, layout))
            logger.info("%s is read as %s", table.name, layout.told())
        elif len(part):
            warnings.warn(f"{table.name} is not read; its columns are {', '.join(part.column_names)}.", stacklevel=5)
    if not any(one.layout.name not in _TEXTS for one in made):
        raise ValueError(
            f"No lists of scored documents are in {seen(first)}. Lists have a query, documents and scores: name their "
            "columns (query=, text=, score=; --query, --text, --score). A corpus without scores is read by "
            "Collection.load, and by st-wkl import with --id and --text."
        )
    return made


def _told(one: _Read) -> str:
    return f"read as {one.layout.told()}"


def _origin(source: Any, main: list[_Read], teacher: str | None) -> dict[str, Any]:
    name = Path(source).name.partition(".")[0] if isinstance(source, str | Path) else type(source).__name__
    identity = {"kind": "imported"} | ({} if teacher is None else {"model": teacher})
    if teacher is None:
        warnings.warn("Who made the scores is not said. Name the teacher with teacher= (--teacher).", stacklevel=4)
    return {"collection": {"name": name}, "teacher": identity, "imported": main[0].layout.told()}


class _Work:
    """One import: what was seen, what was left out, and the files."""

    def __init__(
        self, folder: Path, main: list[_Read], texts: list[_Read], collection: Collection | None, missing: Missing
    ) -> None:
        self.folder, self.main, self.collection, self.missing = folder, main, collection, missing
        self.beside: dict[str, list[_Read]] = {"query": [], "document": []}  # tables of texts
        for one in texts:
            self.beside["query" if one.layout.name == "queries" else "document"].append(one)
        inline = {kind: [_inline(one.layout, kind) for one in main] for kind in _KINDS}
        self.inline = {kind: all(has) for kind, has in inline.items()}
        files = {"query": folder / "queries.parquet", "document": folder / "documents.parquet"}
        self.files = files
        self.texts = {kind: Texts(kind, files[kind] if self.inline[kind] else None) for kind in _KINDS}
        for kind in _KINDS:
            if not self.inline[kind] and not self.beside[kind] and collection is None:
                raise ValueError(
                    f"{main[0].table.name} names {'queries' if kind == 'query' else 'documents'} by id, and there is "
                    f"no table of their texts ({_told(main[0])}). Give the collection that they are of (--collection)."
                )
        if collection is not None and all(self.inline.values()):
            raise ValueError(
                "A collection gives texts and judgements to ids, but these lists hold texts. Leave it out."
            )
        self.ids = {kind: Ids() for kind in _KINDS}
        (folder / "pairs").mkdir()
        self.pairs = Pairs(folder / "pairs" / "lists")
        self.dropped: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()

    def run(self, judged: list[_Read], scores: Any, told: Mapping[str, str], split: str) -> dict[str, Any]:
        """Do all of it, and return counts and report."""
        for kind in _KINDS:
            if not self.inline[kind]:
                for ids, texts, where in self._known(kind):
                    self.texts[kind].add(ids, texts, where)
        for one in self.main:
            for table, where in one.table.batches():
                self._take(pairs_of(one.layout, table, where), one.layout, table, where, scored=scores is None)
        others = None if scores is None else self._scores(scores, told)
        gains = self._judgements(judged, split)
        for kind in _KINDS:
            if self.inline[kind]:
                self.texts[kind].close()
            else:
                self.texts[kind].write_used(self.files[kind], ((ids, texts) for ids, texts, _ in self._known(kind)))
        report = self._write(others, gains)
        return self._said(report)

    def _known(self, kind: str) -> Iterator[tuple[pa.Array, pa.Array, Where]]:
        """Yield ids and texts of the tables of texts, or of the collection."""
        for one in self.beside[kind]:
            found = one.layout.found
            key, text = (found["query_id"], found["query"]) if kind == "query" else (found["id"], found["text"])
            for table, where in one.table.batches():
                title = table[found["title"]] if kind == "document" and "title" in found else None
                yield as_text(table[key]), titled(title, table[text]), where
        if not self.beside[kind] and self.collection is not None:
            entries = iter((self.collection.queries if kind == "query" else self.collection.documents).items())
            while part := list(islice(entries, 10_000)):
                ids, texts = (pa.array(column, pa.large_string()) for column in zip(*part, strict=True))
                yield ids, texts, str

    def _take(self, rows: Rows, layout: Layout, table: pa.Table, where: Where, *, scored: bool) -> None:
        """Take the pairs of some rows, less those that lack something."""
        texts = {"query": as_text(table[layout.found["query"]]) if self.inline["query"] else None}
        texts["document"] = rows.texts if self.inline["document"] else None
        asked, ids = self._ids(layout, table, rows)
        if texts["query"] is not None:
            texts["query"] = texts["query"].take(pa.array(rows.row))
        keys = {"query": asked.take(pa.array(rows.row)), "document": ids}
        lacks = {f"pairs without {kind} id": _is_blank(keys[kind]) for kind in _KINDS}
        lacks |= {f"pairs without {kind} text": _is_blank(texts[kind]) for kind in _KINDS if texts[kind] is not None}
        if scored:
            with np.errstate(over="ignore"):
                lacks["pairs without a finite score"] = ~np.isfinite(rows.score.astype(np.float32))
        kept = self._kept(lacks, rows, keys, where)
        if not kept.all():
            keep = pa.array(np.flatnonzero(kept))
            keys = {kind: column.take(keep) for kind, column in keys.items()}
            texts = {kind: None if column is None else column.take(keep) for kind, column in texts.items()}
            rows = Rows(rows.row[kept], None, None, rows.score[kept], rows.gain[kept])
        for kind in _KINDS:
            if (column := texts[kind]) is not None:
                self.texts[kind].add(keys[kind], column, lambda place: where(int(rows.row[place])))
        numbers = {kind: self.texts[kind].numbers_of(keys[kind], use=True) for kind in _KINDS}
        lacks = {f"pairs with a {kind} that has no text": numbers[kind] < 0 for kind in _KINDS}
        kept = self._kept(lacks, rows, keys, where)
        query, document = (numbers[kind][kept] for kind in _KINDS)
        ids = keys["document"].filter(pa.array(kept))
        self.pairs.add(query, document, ids, rows.score[kept].astype(np.float32), rows.gain[kept])

    def _kept(
        self, lacks: Mapping[str, np.ndarray], rows: Rows, keys: Mapping[str, pa.Array], where: Where
    ) -> np.ndarray:
        """Tell which pairs lack nothing; or stop at the first that does."""
        kept = np.ones(len(rows.row), bool)
        for what, wrong in lacks.items():
            wrong = wrong & kept
            if self.missing == "raise" and wrong.any():
                place = int(np.flatnonzero(wrong)[0])
                pair = f"query {keys['query'][place].as_py()!r}, document {keys['document'][place].as_py()!r}"
                raise ValueError(
                    f"{where(int(rows.row[place]))}: {pair}, score {rows.score[place]}: {what}. Repair the row, or "
                    'have such pairs left out and counted with missing="drop" (--missing drop).'
                )
            self.dropped[what] += int(wrong.sum())
            kept &= ~wrong
        return kept

    def _scores(self, source: Any, told: Mapping[str, str]) -> Pairs:
        """Return the scores of pairs that the lists name, from another source."""
        made = Pairs(self.folder / "pairs" / "scores")
        for one in _recognised(tables(source), {"score": told["score"]} if "score" in told else {}):
            if one.layout.has_scores:
                for table, where in one.table.batches():
                    rows = pairs_of(one.layout, table, where)
                    with np.errstate(over="ignore"):
                        wrong = ~np.isfinite(rows.score.astype(np.float32))
                    self._add_known(made, one, table, rows, ~wrong)
        return made

    def _judgements(self, judged: list[_Read], split: str) -> Pairs | None:
        made = Pairs(self.folder / "pairs" / "gains")
        for one in judged:
            for table, where in one.table.batches():
                rows = pairs_of(one.layout, table, where)
                self._add_known(made, one, table, rows, rows.gain != NO_GAIN)
        if self.collection is not None and split in self.collection.qrels:
            judgements = self.collection.judgements(split)
            found = [(query, key, gain) for query, gains in judgements.items() for key, gain in gains.items()]
            query, key, gain = zip(*found, strict=True)
            asked, ids = (pa.array(column, pa.large_string()) for column in (query, key))
            rows = Rows(np.arange(len(ids)), None, ids, np.full(len(ids), np.nan), np.array(gain, np.int32))
            self._add_numbered(made, asked, ids, rows, np.ones(len(ids), bool))
        elif self.collection is not None:
            warnings.warn(f"{self.collection.name!r} has no split {split!r}, so nothing is judged.", stacklevel=5)
        return made if made.count or self.collection is not None else None

    def _add_known(self, made: Pairs, one: _Read, table: pa.Table, rows: Rows, kept: np.ndarray) -> None:
        asked, ids = self._ids(one.layout, table, rows)
        self._add_numbered(made, asked.take(pa.array(rows.row)), ids, rows, kept)

    def _ids(self, layout: Layout, table: pa.Table, rows: Rows) -> tuple[pa.Array, pa.Array]:
        """Return the id of each row's query and of each pair's document, made of the text where there is none."""
        found, ids = layout.found, rows.ids
        if "query_id" in found:
            asked = as_text(table[found["query_id"]])
        else:
            asked = self.ids["query"].of(as_text(table[found["query"]]))
        if rows.texts is not None and (ids is None or ids.null_count):
            made = self.ids["document"].of(rows.texts)
            ids = made if ids is None else pc.coalesce(ids, made)
        return asked, ids

    def _add_numbered(self, made: Pairs, asked: pa.Array, ids: pa.Array, rows: Rows, kept: np.ndarray) -> None:
        query, document = self.texts["query"].numbers_of(asked), self.texts["document"].numbers_of(ids)
        kept = kept & (query >= 0) & (document >= 0)
        made.add(
            *(query[kept], document[kept], ids.filter(pa.array(kept))),
            *(rows.score[kept].astype(np.float32), rows.gain[kept]),
        )

    def _write(self, others: Pairs | None, gains: Pairs | None) -> Any:
        """Write the lists, and return the report on the teacher."""
        if not self.pairs.count:
            raise ValueError(f"No pair is left: {self._lost() or 'the source is empty'}.")
        schema = features("train").arrow_schema
        names = pa.concat_arrays(self.texts["query"].names)
        reported: list[tuple[np.ndarray, ...]] = []
        negatives: Counter[int] = Counter()
        with pq.ParquetWriter(self.folder / "train.parquet", schema, compression="zstd") as writer:
            for first, last in self.pairs.ranges():
                found = self._settled(self.pairs.between(first, last), names)
                if others is not None:
                    found = self._scored(found, self._settled(others.between(first, last), names), names)
                if gains is not None:
                    found = _judged(found, single(gains.between(first, last))[0])
                if not len(found):
                    continue
                queries, lengths, ids, score, gain = lists(found)
                ends = np.cumsum(lengths)
                relevant = np.add.reduceat(gain > 0, ends - lengths)
                negatives.update((lengths - relevant)[relevant > 0].tolist())
                self.counts["queries"] += len(queries)
                self.counts["pairs"] += len(ids)
                self.counts["lists without a positive"] += int((relevant == 0).sum())
                self.counts["lists of one document"] += int((lengths == 1).sum())
                if sum(len(part[0]) for part in reported) < _REPORTED:
                    reported.append((score, gain, lengths))
                values = [names.take(pa.array(queries)), *(lists_of(lengths, part) for part in (ids, score, gain))]
                writer.write_table(pa.table(values, schema=schema))
        self.counts["documents"] = self.texts["document"].used
        for kind in _KINDS:
            if copies := self.texts[kind].copies():
                what = "queries" if kind == "query" else "documents"
                self.counts[f"{what} with the text of another id"] = copies
        if not self.counts["pairs"]:
            raise ValueError(f"No pair is left: {self._lost()}.")
        self.negatives = max(negatives, key=lambda count: (negatives[count], count), default=0)
        score, gain, lengths = (np.concatenate(column) for column in zip(*reported, strict=True))
        return report_on_lists(score, gain, lengths=lengths)

    def _settled(self, pairs: pl.DataFrame, names: pa.Array) -> pl.DataFrame:
        """Return each pair once; two different scores of one are an error."""
        found, twice = single(pairs)
        if len(twice):
            apart = (twice["score"] - twice["other"]).abs()
            wrong = apart > _ROUNDING * twice["score"].abs().clip(lower_bound=1.0)
            if wrong.any():
                row = twice.row(int(wrong.arg_max() or 0), named=True)
                raise ValueError(
                    f"{self._named(names[row['query']].as_py(), row['id'])} have two scores, {row['score']} "
                    f"and {row['other']}. Which one counts? Keep the rows of one teacher."
                )
            self.dropped["pairs that came again"] += int((twice["times"] - 1).sum())
            self.counts["pairs with two gains, of which the higher counts"] += int((twice["gains"] > 1).sum())
        return found

    def _scored(self, found: pl.DataFrame, scored: pl.DataFrame, names: pa.Array) -> pl.DataFrame:
        joined = found.drop("score").join(scored.select("query", "document", "score"), ["query", "document"], "left")
        lost = joined.filter(pl.col("score").is_null())
        if len(lost) and self.missing == "raise":
            row = lost.row(0, named=True)
            raise ValueError(
                f"{self._named(names[row['query']].as_py(), row['id'])} have no score among the others. Have such "
                'pairs left out and counted with missing="drop" (--missing drop).'
            )
        self.dropped["pairs without a score"] += len(lost)
        return joined.filter(pl.col("score").is_not_null()).select(found.columns)

    def _named(self, query: str, document: str) -> str:
        """Return a pair for a message, with its texts, since ids may be hashes of these."""
        told = []
        for kind, key in (("Query", query), ("document", document)):
            rows = pl.scan_parquet(self.files[kind.lower()]).filter(pl.col(f"{kind.lower()}_id") == key)
            told.append(f"{kind} {key!r} ({rows.select('text').collect().item()[:60]!r})")
        return " and ".join(told)

    def _lost(self) -> str:
        return ", ".join(f"{count:,} {what}" for what, count in self.dropped.items() if count)

    def _said(self, report: Any) -> dict[str, Any]:
        """Say what is not there, and return counts and report."""
        counts = {what: count for what, count in self.counts.items() if count}
        if lost := self._lost():
            warnings.warn(f"Left out: {lost}.", stacklevel=4)
        odd = [f"{count:,} {what}" for what, count in counts.items() if what not in ("queries", "pairs", "documents")]
        if odd:
            warnings.warn(
                f"Of {counts['queries']:,} lists with {counts['pairs']:,} pairs: {', '.join(odd)}.", stacklevel=4
            )
        if counts.get("lists without a positive") == counts["queries"]:
            warnings.warn(
                "No list says what is relevant, and nothing is made up: losses that need positives cannot be used. "
                "Name the column of gains (label), or give the collection whose judgements they are.",
                stacklevel=4,
            )
        if useless := report.warning():
            warnings.warn(useless, stacklevel=4)
        dropped = {what: count for what, count in self.dropped.items() if count}
        return {"num_negatives": self.negatives, "counts": counts, "dropped": dropped, "report": report.to_dict()}


def _inline(layout: Layout, kind: str) -> bool:
    return "query" in layout.found if kind == "query" else any(part[0] is not None for part in layout.parts)


def _judged(found: pl.DataFrame, gains: pl.DataFrame) -> pl.DataFrame:
    known = gains.select("query", "document", judged="gain")
    joined = found.join(known, ["query", "document"], "left")
    return joined.with_columns(gain=pl.coalesce("judged", "gain")).select(found.columns)


def _is_blank(column: pa.Array) -> np.ndarray:
    plain = pc.fill_null(column, "")
    return pc.equal(pc.utf8_trim_whitespace(plain), "").to_numpy(zero_copy_only=False)
