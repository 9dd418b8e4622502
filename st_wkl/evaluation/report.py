"""One page that says what distillation has brought: a single HTML file that loads nothing else, and a picture.

Every text that comes from data is escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from st_wkl.evaluation.effects import Effect, compare_all, effect_rows, go_by_p, with_queries
from st_wkl.evaluation.results import SHARED, UNSEEN, Results, TaskScores, score_rows
from st_wkl.files import replacing, write_text

if TYPE_CHECKING:
    from st_wkl.data.collection import Collection

_SHOWN_QUERIES = 5
_SHOWN_CHARACTERS = 180


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
    from jinja2 import Environment, PackageLoader, StrictUndefined

    if not results:
        raise ValueError("there are no results to report; give at least one results file")
    path = Path(path).expanduser()
    if path.is_file() and path.read_bytes()[:9].lower() not in (b"", b"<!doctype"):
        raise FileExistsError(f"{path} is there and is no HTML page: choose another output, or delete it")
    before = before or next(iter(results))
    effects = effects_of(results, before=before, teacher=teacher)
    texts = {collection.name: collection for collection in collections}
    queries = {
        label: list(_queries(results[before], entry, texts))
        for label, entry in results.items()
        if label not in (before, teacher)
    }
    header, rows = effect_rows(effects)
    loader = PackageLoader("st_wkl.evaluation", "")
    template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("report.html.jinja")
    page = template.render(
        title=title,
        before=before,
        shown=with_queries(effects),
        groups={effect.group for effect in effects},
        at=_scale(effects),
        go_by_p=go_by_p(effects),
        details=(  # without the intervals, which are drawn
            [name.replace("W / T / L", "Win / tie / loss") for name in [*header[:5], *header[6:]]],
            [row[:5] + row[6:] for row in rows],
        ),
        scores=score_rows(results),
        repeated=len({(t.task, query) for one in results.values() for t in one.tasks for query in t.training_queries}),
        efficiency=_efficiency(results),
        queries=[(label, parts) for label, parts in queries.items() if parts],
        results=results,
        versions=next(iter(results.values())).versions,
    )
    return write_text(path, page + "\n")


def effects_of(results: Mapping[str, Results], *, before: str | None, teacher: str | None) -> list[Effect]:
    """Return what `compare_all` says of labelled results; the labels are those of `write_report`."""
    before = before or next(iter(results))
    for label in filter(None, (before, teacher)):
        if label not in results:
            raise ValueError(f"no results are called {label!r}; there are {', '.join(results)}")
    rivals = {label: entry for label, entry in results.items() if label not in (before, teacher)}
    return compare_all(results[before], rivals, teacher=results[teacher] if teacher else None) if rivals else []


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
        have = {scores.key for scores in known.tasks}
        if twice := [scores.task for scores in loaded.tasks if scores.key in have]:
            raise ValueError(f"{file}: {', '.join(twice)} of {label!r} is in a file before it; leave one out")
        found[label] = replace(known, tasks=[*known.tasks, *loaded.tasks])
    return found


def plot_effects(effects: Sequence[Effect], path: str | Path) -> Path:
    """Draw the forest plot as a picture, for cards and papers; readable in black and white.

    Args:
        effects: What `compare_all` returned.
        path: Where to, by its ending as PNG, SVG or PDF.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is no effect.

    Example:
        >>> plot_effects(compare_all(before, after), "effects.png")  # doctest: +SKIP
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'st-wkl[plots]'.") from error
    if not effects:
        raise ValueError("there is nothing to plot: compare_all found no effect")
    figure = Figure(figsize=(7, 0.8 + 0.34 * len(effects)), layout="constrained")
    axes = figure.subplots()
    marks = {None: ("o", "black"), SHARED: ("s", "white"), UNSEEN: ("D", "white")}
    several = len({effect.task for effect in effects}) > 1
    labels = []
    for place, (effect, queries) in enumerate(with_queries(effects)):
        d, (mark, fill) = effect.difference, marks[effect.group]
        if d.queries > 1:
            axes.plot([d.low, d.high], [place, place], color="black", linewidth=1.5, zorder=1)
        axes.plot(d.mean, place, mark, color="black", markerfacecolor=fill, markersize=7, zorder=2)
        labels.append(f"{effect.model}{f', {effect.task}' if several else ''}: {queries} ({d.queries})")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.axvline(0, color="grey", linestyle="--", linewidth=1)
    axes.set_xlabel(f"Difference in {effects[0].difference.label} (95 % interval)")
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix.lstrip(".") or "png", dpi=150)
    return Path(path)


def _scale(effects: Sequence[Effect]) -> Callable[[float], str]:
    """Return what tells where a difference stands in a picture with all means, intervals and zero."""
    differences = [effect.difference for effect in effects]
    ends = [0.0, *(d.mean for d in differences), *(e for d in differences if d.queries > 1 for e in (d.low, d.high))]
    margin = 0.06 * (max(ends) - min(ends)) or 0.01
    low, width = min(ends) - margin, max(ends) - min(ends) + 2 * margin
    return lambda value: f"{100 * (value - low) / width:.2f}%"


def _efficiency(results: Mapping[str, Results]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for label, entry in results.items():
        model, measured = entry.model, entry.model.get("efficiency") or {}
        if not measured and not model.get("parameters"):  # a ranking and BM25 have no size
            continue
        numbers = [model.get("parameters"), measured.get("queries_per_second"), measured.get("documents_per_second")]
        numbers.append(measured.get("index_bytes"))
        size, *rates, index = [number if isinstance(number, int | float) else None for number in numbers]
        row = [label, str(model.get("class", ""))]
        row.append("" if size is None else f"{size / 1e6:.1f} M" if size >= 100_000 else f"{size:,}")
        row += [str(model.get("dimension") or ""), *("" if rate is None else f"{rate:,.0f}" for rate in rates)]
        rows.append([*row, "" if index is None else f"{index / 1e6:,.1f} MB"])
    return ["Model", "Class", "Parameters", "Dimension", "Queries/s", "Documents/s", "Index"], rows


def _queries(
    before: Results, after: Results, collections: Mapping[str, Collection]
) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Yield headings and the queries that gained and lost most, by task."""
    entries = {scores.key: scores for scores in after.tasks}
    for first in before.tasks:
        second = entries.get(first.key)
        if second is None or not first.per_query:
            continue
        change = {query: second.per_query[query] - value for query, value in first.per_query.items()}
        for what, sign in (("gains", -1), ("losses", 1)):
            ranked = sorted((sign * value, query) for query, value in change.items() if sign * value < 0)
            shown = [_query(first, second, q, collections.get(first.task)) for _, q in ranked[:_SHOWN_QUERIES]]
            if shown:
                yield f"{first.task}: largest {what}", shown


def _query(before: TaskScores, after: TaskScores, query: str, collection: Collection | None) -> dict[str, str]:
    text, document = query, ""
    if collection is not None and query in collection.queries:
        text = collection.queries[query]
        if gains := collection.qrels.get(before.split, {}).get(query, {}):
            document = _short(collection.documents[max((gain, key) for key, gain in gains.items())[1]])
    group = next((g for g, members in (after.groups or before.groups).items() if query in set(members)), "")
    scores = f"{before.per_query[query]:.2f} → {after.per_query[query]:.2f}"
    return {"scores": scores, "group": group, "text": _short(text), "document": document}


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1].rsplit(" ", 1)[0] + " …"
