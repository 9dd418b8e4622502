"""One page that says what distillation has brought: a single HTML file that loads nothing else.

It is written for a phone first, works in the dark and in black and white, and every text that comes from data is
escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from st_wkl.evaluation.effects import Effect, compare_all, go_by_p, with_queries
from st_wkl.evaluation.plots import forest_plot
from st_wkl.evaluation.results import SHARED, UNSEEN, Results, TaskScores, common_groups
from st_wkl.files import write_text
from st_wkl.metrics import METRIC_LABELS

if TYPE_CHECKING:
    from st_wkl.data.collection import Collection

_SHOWN_QUERIES = 5
_SHOWN_CHARACTERS = 180
_STYLE = """
:root{color-scheme:light dark;--page:#fff;--text:#1b1f24;--soft:#59636e;--line:#d5dae0;--band:#f5f7f9}
@media(prefers-color-scheme:dark){:root{--page:#14171b;--text:#e8ebee;--soft:#9aa4af;--line:#343b43;--band:#1c2026}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem 1rem 3rem;max-width:64rem;background:var(--page);color:var(--text);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:break-word}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0}h2{font-size:1.15rem;margin:2.2rem 0 .4rem}
h3{font-size:1rem;margin:1.2rem 0 .3rem}
p{margin:.4rem 0}.soft{color:var(--soft);font-size:.875rem}
table{border-collapse:collapse;width:100%;margin-top:.8rem;font-size:.9rem;font-variant-numeric:tabular-nums}
th{font-weight:600;color:var(--soft);white-space:nowrap}.wide{overflow-x:auto}
td{white-space:nowrap}td:first-child,td:nth-child(2){white-space:normal}
th,td{text-align:right;padding:.4rem .5rem;border-bottom:1px solid var(--line);vertical-align:top}
th:first-child,td:first-child,th:nth-child(2),td:nth-child(2){text-align:left}
.row{display:grid;grid-template-columns:13rem 1fr 14rem;gap:.75rem;align-items:center;padding:.25rem 0}
.row>span:last-child{white-space:nowrap;font-variant-numeric:tabular-nums;font-size:.9rem;text-align:right}
.row svg{display:block;width:100%;height:24px;overflow:visible}
.numbers{white-space:nowrap}
.query{border-top:1px solid var(--line);padding:.5rem 0}.query b{font-variant-numeric:tabular-nums}
.legend svg{width:16px;height:16px;overflow:visible;vertical-align:-3px;margin:0 .2rem 0 .6rem}
@media(max-width:40rem){
thead{position:absolute;left:-9999px}
tr{display:grid;grid-template-columns:1fr 1fr;column-gap:1.5rem;border-bottom:1px solid var(--line);padding:.5rem 0}
td{display:flex;justify-content:space-between;gap:.5rem;border:0;padding:.1rem 0;white-space:normal}
td::before{content:attr(data-label);color:var(--soft);text-align:left}
td:first-child,td:nth-child(2){display:block;font-weight:600}
td:nth-child(2){text-align:right}td:first-child::before,td:nth-child(2)::before{content:none}
td:empty{display:none}td.long{grid-column:1/3}
.row{grid-template-columns:1fr auto;gap:0 .5rem;padding:.3rem 0}.row svg{grid-column:1/3;grid-row:2}
.row>span:first-child{font-size:.9rem}}
@media print{body{max-width:none}}
"""


def write_report(
    path: str | Path,
    results: Mapping[str, Results],
    *,
    before: str | None = None,
    teacher: str | None = None,
    collections: Iterable[Collection] = (),
    title: str = "What distillation has changed",
) -> Path:
    """Write one self-contained HTML page: scores by group, differences with intervals, efficiency, single queries.

    Args:
        path: The `.html` file.
        results: Label to results: the undistilled student, students, and what they are to be seen beside.
        before: Label of the undistilled student. None for the first.
        teacher: Label of the teacher, whose lead is the gap to close. None for no such share.
        collections: Where the texts of queries come from, found by the task's name; without, their ids are shown.
        title: Headline.

    Returns:
        Path of the file.

    Raises:
        ValueError: If there are no results, a label is unknown, or nothing can be compared.
        FileExistsError: If a file of another kind would be replaced.

    Example:
        >>> write_report("report.html", {"before": before, "after": after}, collections=[collection])  # doctest: +SKIP
    """
    if not results:
        raise ValueError("there are no results to report; give at least one results file")
    path = Path(path).expanduser()
    if path.is_file() and path.read_bytes()[:9].lower() not in (b"", b"<!doctype"):
        raise FileExistsError(f"{path} is there and is no HTML page: choose another output, or delete it")
    before = before or next(iter(results))
    for label in filter(None, (before, teacher)):
        if label not in results:
            raise ValueError(f"no results are called {label!r}; there are {', '.join(results)}")
    rivals = {label: entry for label, entry in results.items() if label not in (before, teacher)}
    ceiling = results[teacher] if teacher else None
    effects = compare_all(results[before], rivals, teacher=ceiling) if rivals else []
    parts = [f"<h1>{escape(title)}</h1>", _summary(effects, before)]
    if effects:
        note = escape(go_by_p(effects))
        parts += [
            "<h2>Differences</h2>",
            forest_plot(effects),
            f'<p class="soft">{note}</p>' * bool(note),
            _details(effects),
        ]
    parts += ["<h2>Scores</h2>", _scores(results)]
    parts.append(_efficiency(results))
    texts = {collection.name: collection for collection in collections}
    for label, entry in rivals.items():
        parts += _queries(before, results[before], label, entry, texts)
    parts.append(_made_with(results))
    body = "\n".join(filter(None, parts))
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    head += f"<title>{escape(title)}</title><style>{_STYLE}</style>"
    return write_text(path, f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n')


def labelled_results(files: Iterable[str | Path]) -> dict[str, Results]:
    """Load results files as label to results, and join the files of one model.

    Args:
        files: Files or folders, each as it is (the label is the model's name) or as `LABEL=FILE`.

    Raises:
        ValueError: If two files go by one label and are of different models, or hold the same task twice.
    """
    found: dict[str, Results] = {}
    for item in files:
        label, _, file = str(item).rpartition("=") if "=" in str(item) and not Path(item).exists() else ("", "", item)
        loaded = Results.load(file)
        label = label or loaded.name
        if label not in found:
            found[label] = loaded
            continue
        known = found[label]
        if known.model["revision"] != loaded.model["revision"]:
            raise ValueError(
                f"{file}: these results of {label!r} are of another model (revision {loaded.model['revision'][:12]}) "
                f"than those before ({known.model['revision'][:12]}), so they are not mixed; name them apart, as in "
                f"before={file}"
            )
        have = {(t.task, t.split, t.subset) for t in known.tasks}
        if twice := [t.task for t in loaded.tasks if (t.task, t.split, t.subset) in have]:
            raise ValueError(f"{file}: {', '.join(twice)} of {label!r} is in a file before it; leave one out")
        found[label] = replace(known, tasks=[*known.tasks, *loaded.tasks])
    return found


def _summary(effects: Sequence[Effect], before: str) -> str:
    """Return a sentence for each student and task: over unseen queries where they are known."""
    lines = []
    shown = with_queries(effects)
    for effect in (e for e in effects if e.group is None):
        place = (effect.task, effect.model, effect.split)
        told = [_points(e, queries) for e, queries in shown if (e.task, e.model, e.split) == place]
        gap = ""
        if effect.gap and effect.gap.share is not None:
            gap = f' Of the teacher\'s lead it closes <span class="numbers">{escape(str(effect.gap))}</span>.'
        elif effect.gap:
            gap = f" The share of the gap is {escape(str(effect.gap))}."
        lines.append(
            f"<p><b>{escape(effect.model)}</b> against {escape(before)}, {escape(effect.task)}: "
            f"{'; '.join(told)}.{gap}</p>"
        )
    return "\n".join(lines)


def _points(effect: Effect, queries: str) -> str:
    d = effect.difference
    sure = ", which may be chance" if d.may_be_chance else ""
    numbers = f'<span class="numbers">{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]</span>'
    return f"{numbers} on {escape(queries)} queries{sure}"


def _details(effects: Sequence[Effect]) -> str:
    with_gap = any(effect.gap for effect in effects)
    header = ["Task", "Model", "Queries", "Before", "After", "p", "p (Holm)", "Win / tie / loss"]
    rows = [
        [
            effect.task,
            effect.model,
            f"{queries} ({effect.difference.queries})",
            f"{effect.before:.4f}",
            f"{effect.after:.4f}",
            f"{effect.difference.p_value:.2g}",
            f"{effect.p_holm:.2g}",
            f"{effect.difference.wins} / {effect.difference.ties} / {effect.difference.losses}",
            *([str(effect.gap) if effect.gap else ""] if with_gap else []),
        ]
        for effect, queries in with_queries(effects)
    ]
    note = "p: paired randomisation test; Holm: corrected over all models and tasks of the same group of queries."
    return _table(header + ["Gap closed"] * with_gap, rows) + f'\n<p class="soft">{note}</p>'


def _scores(results: Mapping[str, Results]) -> str:
    rows = [(label, scores) for label, entry in results.items() for scores in entry.tasks]
    metrics = [m for m in METRIC_LABELS if any(m in scores.metrics for _, scores in rows)]
    order = {scores.task: place for place, (_, scores) in reversed(list(enumerate(rows)))}
    rows.sort(key=lambda row: order[row[1].task])
    lines: list[list[str]] = []
    repeated: set[tuple[str, str]] = set()
    for label, scores in rows:
        others = [s for _, s in rows if (s.task, s.split, s.subset) == (scores.task, scores.split, scores.subset)]
        groups = common_groups(others, scores)
        cells = [_mean(scores, groups.get(group, [])) for group in (SHARED, UNSEEN)]
        values = [f"{scores.metrics[m]:.4f}" if m in scores.metrics else "" for m in metrics]
        lines.append([f"{scores.task} ({scores.split})", label, str(len(scores.per_query) or ""), *values])
        place = 3 + (metrics.index("ndcg_at_10") + 1 if "ndcg_at_10" in metrics else len(metrics))
        lines[-1][place:place] = cells
        repeated |= {(scores.task, query) for query in scores.training_queries}
    header = ["Task", "Model", "Queries", *(METRIC_LABELS[m] for m in metrics)]
    header[place:place] = ["shared", "unseen"]
    note = (
        "shared: nDCG@10 over the queries that have a relevant document which was a training positive; unseen: over "
        "the others. In brackets the number of queries."
    )
    if repeated:
        note += f" Test queries whose very text was a training query: {len(repeated)}."
    return _table(header, lines) + f'\n<p class="soft">{note}</p>'


def _mean(scores: TaskScores, members: Sequence[str]) -> str:
    if not members:
        return ""
    return f"{sum(scores.per_query[query] for query in members) / len(members):.4f} ({len(members)})"


def _efficiency(results: Mapping[str, Results]) -> str:
    header = ["Model", "Class", "Parameters", "Dimension", "Queries/s", "Documents/s", "Index"]
    rows = []
    for label, entry in results.items():
        model: dict[str, Any] = entry.model
        measured: dict[str, Any] = model.get("efficiency") or {}
        if not measured and not model.get("parameters"):  # a ranking and BM25 have no size
            continue
        rows.append(
            [
                label,
                str(model.get("class", "")),
                _count(model.get("parameters")),
                str(model.get("dimension") or ""),
                _rate(measured.get("queries_per_second")),
                _rate(measured.get("documents_per_second")),
                _bytes(measured.get("index_bytes")),
            ]
        )
    return f"<h2>Efficiency</h2>\n{_table(header, rows)}" if rows else ""


def _queries(
    before: str, first: Results, label: str, second: Results, collections: Mapping[str, Collection]
) -> list[str]:
    """Return the queries that gained and lost most, by task."""
    parts: list[str] = []
    for scores in first.tasks:
        other = next((t for t in second.tasks if (t.task, t.split) == (scores.task, scores.split)), None)
        if other is None or not scores.per_query:
            continue
        change = {query: other.per_query[query] - value for query, value in scores.per_query.items()}
        collection = collections.get(scores.task)
        for what, sign in (("gains", -1), ("losses", 1)):
            ranked = sorted((sign * value, query) for query, value in change.items() if sign * value < 0)
            shown = [_query(scores, other, query, collection) for _, query in ranked[:_SHOWN_QUERIES]]
            if shown:
                parts += [f"<h3>{escape(scores.task)}: largest {what}</h3>", *shown]
    head = f"<h2>Single queries: {escape(label)} against {escape(before)}</h2>"
    return [head, '<p class="soft">nDCG@10 before → after</p>', *parts] if parts else []


def _query(before: TaskScores, after: TaskScores, query: str, collection: Collection | None) -> str:
    text, documents = query, ""
    if collection is not None and query in collection.queries:
        text = collection.queries[query]
        gains = collection.qrels.get(before.split, {}).get(query, {})
        best = max((gain, document) for document, gain in gains.items())[1] if gains else None
        if best is not None:
            documents = f'<br><span class="soft">relevant: {escape(_short(collection.documents[best]))}</span>'
    group = next((g for g, members in (after.groups or before.groups).items() if query in set(members)), "")
    scores = f"{before.per_query[query]:.2f} → {after.per_query[query]:.2f}"
    mark = f' <span class="soft">{escape(group)}</span>' if group else ""
    return f'<div class="query"><b>{scores}</b>{mark}<br>{escape(_short(text))}{documents}</div>'


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table, whose rows become blocks of label and value on a narrow screen."""
    rows = list(rows)
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    head = "".join(f"<th>{escape(header[i])}</th>" for i in kept)
    labels = [escape(name) for name in header]
    long = {i for i in kept[2:] if any(len(header[i]) + len(row[i]) > 22 for row in rows)}
    cells = [
        [f'<td{" class=long" * (i in long)} data-label="{labels[i]}">{escape(row[i])}</td>' for i in kept]
        for row in rows
    ]
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"


def _made_with(results: Mapping[str, Results]) -> str:
    rows = [f"{escape(label)}: revision {escape(str(r.model['revision'])[:12])}" for label, r in results.items()]
    versions = next(iter(results.values())).versions
    tools = ", ".join(f"{escape(name)} {escape(str(value))}" for name, value in versions.items())
    return f'<h2>How it was measured</h2>\n<p class="soft">{"<br>".join(rows)}<br>{tools}</p>'


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1].rsplit(" ", 1)[0] + " …"


def _count(number: Any) -> str:
    if not isinstance(number, int):
        return ""
    return f"{number / 1e6:.1f} M" if number >= 100_000 else f"{number:,}"


def _rate(number: Any) -> str:
    return f"{number:,.0f}" if isinstance(number, int | float) else ""


def _bytes(number: Any) -> str:
    return f"{number / 1e6:,.1f} MB" if isinstance(number, int) else ""
