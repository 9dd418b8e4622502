"""From the finished runs to one tidy file, tables and figures."""

from __future__ import annotations

import itertools
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from figures import correctness_figure, curves_figure, differences_figure
from runs import Run, collection, done, groups, per_query, scored, student
from study import analysis_runs, final_runs

from st_wkl.data import bm25_candidates
from st_wkl.evaluation import evaluate_run, holm, paired_difference
from st_wkl.evaluation.compare import PairedDifference

BASELINE, UNDISTILLED, BM25 = "KL", "undistilled", "BM25"
Scores = dict[str, float]
# What each analysis varies; a table of a single value would say nothing.
VARIED = {
    "weights": ("method",),
    "temperature": ("student_temperature",),
    "candidates": ("negatives",),
    "choice": ("choice", "negatives"),
    "noise": ("noise",),
    "teacher": ("teacher",),
    "refresh": ("method",),
}


def report(config: dict[str, Any], data: str, output: Path) -> None:
    """Write results.csv, per_query.parquet, tables.md and figures/ into the output folder."""
    final = list(done(output, final_runs(config, output)))
    analyses = {}
    for name, runs in analysis_runs(config, output).items():
        found = list(done(output, runs))
        analyses[name] = found if len(found) == len(runs) else []  # some rows of a table would be taken for all of it
    if not final:
        raise SystemExit(f"There is no finished run of the final stage in {output}.")
    parts = {name: groups(name, data) for name in config["collections"]}
    references = {name: _references(name, final[0][0], data) for name in config["collections"]}
    _tidy(final, analyses, parts).to_csv(output / "results.csv", index=False, float_format="%.5f")
    means = _mean_over_seeds(final)
    _write_per_query(means, output)
    (output / "figures").mkdir(exist_ok=True)
    own = {name: _differences(means, name, parts[name]) for name in config["collections"]}
    text = [_main_table(name, final, parts[name], references[name], own[name], config) for name in own]
    text += [_pairs_table(means, parts, config), _transfer_table(means, config)]
    for name, runs in analyses.items():
        if name in VARIED and len({tuple(getattr(run, axis) for axis in VARIED[name]) for run, _ in runs}) > 1:
            text.append(_analysis_table(name, runs, parts))
    differences_figure(own, parts, output / "figures" / "differences.png")
    if analyses.get("correctness"):
        table, points = _by_correctness(analyses["correctness"], config)
        text.append(table)
        correctness_figure(points, output / "figures" / "correctness.png")
    curves_figure(_curves(analyses), output / "figures" / "curves.png")
    (output / "tables.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    print("\n\n".join(text))


def _references(name: str, taught: Run, data: str) -> dict[str, Scores]:
    """Return what the students are seen against: the undistilled student and BM25."""
    where = collection(data, name)
    found = bm25_candidates(where, list(where.qrels["test"]), top_k=100, show_progress=False)
    run = {query: {hit.document_id: hit.score for hit in hits} for query, hits in found.items()}
    return {
        UNDISTILLED: per_query(student(taught.student, taught.max_length), where, "test", bf16=taught.bf16),
        BM25: evaluate_run(run, where, name=BM25).tasks[0].per_query,
    }


def _mean_over_seeds(final: list[tuple[Run, dict[str, Scores]]]) -> dict[tuple[str, str, str], Scores]:
    """Return (trained on, method, evaluated on) → nDCG@10 of each query, the mean over seeds."""
    collected: dict[tuple[str, str, str], list[Scores]] = defaultdict(list)
    for run, scores in final:
        for where, values in scores.items():
            collected[run.collection, run.method, where].append(values)
    return {
        key: {query: float(np.mean([run[query] for run in runs])) for query in runs[0]}
        for key, runs in collected.items()
    }


def _difference(before: Scores, after: Scores, queries: list[str]) -> PairedDifference | None:
    """Compare two methods on the same queries, each averaged over seeds first, with a percentile bootstrap."""
    if not queries:
        return None
    return paired_difference([after[query] - before[query] for query in queries], interval="percentile")


def _differences(
    means: dict[tuple[str, str, str], Scores], name: str, parts: dict[str, list[str]]
) -> dict[str, dict[str, PairedDifference | None]]:
    """Return each method's difference to the baseline on all, shared and unseen test queries."""
    before = means[name, BASELINE, name]
    chosen = {"all": list(before), **parts}
    return {
        method: {part: _difference(before, values, queries) for part, queries in chosen.items()}
        for (trained, method, where), values in means.items()
        if trained == where == name and method != BASELINE
    }


def _main_table(
    name: str,
    final: list[tuple[Run, dict[str, Scores]]],
    parts: dict[str, list[str]],
    references: dict[str, Scores],
    differences: dict[str, dict[str, PairedDifference | None]],
    config: dict[str, Any],
) -> str:
    chosen = {"all": list(references[UNDISTILLED]), **parts}
    lines = [
        f"### {name}: nDCG@10, trained on {len(scored(name)):,} queries",
        "",
        "| | " + " | ".join(f"{part}, {len(queries):,}" for part, queries in chosen.items())
        + " | all − KL, 95 % interval | p (Holm) | unseen − KL | p (Holm) | lr, τ_s, τ_t |",
        "| :-- |" + " --: |" * len(chosen) + " --: | --: | --: | --: | :-- |",
    ]  # fmt: skip
    corrected = {
        part: dict(zip(differences, holm([_p(d[part]) for d in differences.values()]), strict=True))
        for part in ("all", "unseen")
    }
    for method, scores in references.items():
        cells = [_mean(scores, queries) for queries in chosen.values()]
        lines.append(f"| {method} | " + " | ".join(cells) + " | | | | | |")
    for method in config["methods"]:
        runs = [(run, scores[name]) for run, scores in final if (run.collection, run.method) == (name, method)]
        if not runs:
            continue
        cells = [_mean_and_deviation([scores for _, scores in runs], queries) for queries in chosen.values()]
        tail = ["", "", "", ""]
        if method in differences:
            for place, part in ((0, "all"), (2, "unseen")):
                if (found := differences[method][part]) is not None:
                    tail[place : place + 2] = [_interval(found), _p_text(corrected[part][method])]
        run = runs[0][0]
        setting = f"{run.learning_rate:g}, {run.student_temperature:g}, {run.teacher_temperature:g}"
        lines.append(f"| {method} | " + " | ".join([*cells, *tail, setting]) + " |")
    return "\n".join(lines)


def _pairs_table(
    means: dict[tuple[str, str, str], Scores], parts: dict[str, dict[str, list[str]]], config: dict[str, Any]
) -> str:
    """Compare two methods that differ in one thing, on shared and on unseen documents."""
    lines = [
        "### One thing changed",
        "",
        "| | trained on | shared | unseen | all | p (Holm) |",
        "| :-- | :-- | --: | --: | --: | --: |",
    ]
    cells = []
    for (after, before), name in itertools.product(config["pairs"], config["collections"]):
        if (name, after, name) not in means or (name, before, name) not in means:
            continue
        first, second = means[name, before, name], means[name, after, name]
        found = [_difference(first, second, queries) for queries in (*parts[name].values(), list(first))]
        cells.append((f"{after} − {before}", name, found))
    for (label, name, found), p in zip(cells, holm([_p(found[-1]) for *_, found in cells]), strict=True):
        values = " | ".join(_interval(part) if part is not None else "–" for part in found)
        lines.append(f"| {label} | {name} | {values} | {_p_text(p)} |")
    return "\n".join(lines)


def _transfer_table(means: dict[tuple[str, str, str], Scores], config: dict[str, Any]) -> str:
    """Show what a student that learned one collection does on the others."""
    others = [*config["collections"], *config["transfer_to"]]
    pairs = [(name, other) for name in config["collections"] for other in others if name != other]
    pairs = [pair for pair in pairs if (pair[0], BASELINE, pair[1]) in means]
    lines = [
        "### Zero-shot: difference to KL in nDCG@10, trained on → evaluated on",
        "",
        "| | " + " | ".join(f"{name} → {other}" for name, other in pairs) + " |",
        "| :-- |" + " --: |" * len(pairs),
        f"| {BASELINE} | "
        + " | ".join(_mean(means[a, BASELINE, b], list(means[a, BASELINE, b])) for a, b in pairs)
        + " |",
    ]
    for method in config["methods"]:
        if method == BASELINE or any((a, method, b) not in means for a, b in pairs):
            continue
        cells = []
        for a, b in pairs:
            before, after = means[a, BASELINE, b], means[a, method, b]
            found = _difference(before, after, list(before))
            assert found is not None
            cells.append(f"{found.mean:+.3f}{'*' if found.low > 0 or found.high < 0 else ''}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "\\* the 95 % interval, not corrected for the number of cells, leaves out 0."])


def _analysis_table(
    name: str, runs: list[tuple[Run, dict[str, Scores]]], parts: dict[str, dict[str, list[str]]]
) -> str:
    """Show each setting's scores, and what sets it apart from the same setting of what it is compared with."""
    varied = tuple(axis for axis in VARIED[name] if axis != "method")
    collected: dict[tuple[Any, ...], list[Scores]] = defaultdict(list)
    for run, scores in runs:
        key = (run.collection, run.method, *(getattr(run, axis) for axis in varied))
        collected[key].append(scores[run.collection])
    means = {
        key: {query: float(np.mean([one[query] for one in values])) for query in values[0]}
        for key, values in collected.items()
    }
    columns = ("trained on", "method", *varied, "all", "shared", "unseen", "against", "shared", "unseen", "seeds")
    lines = [f"### {name}", "", f"| {' | '.join(columns)} |", "| :-- | :-- |" + " --: |" * (len(columns) - 2)]
    for key, scores in sorted(means.items(), key=lambda item: tuple(map(str, item[0]))):
        where, method, *setting = key
        shared, unseen = parts[where]["shared"], parts[where]["unseen"]
        cells = [f"{_value(scores, part):.3f}" for part in (list(scores), shared, unseen)]
        other = "γ0 α0" if name == "weights" else BASELINE
        against = ["", "", ""]
        if other != method and (before := means.get((where, other, *setting))) is not None:
            found = [_difference(before, scores, part) for part in (shared, unseen)]
            against = [other, *("–" if one is None else _interval(one) for one in found)]
        lines.append("| " + " | ".join([*map(str, key), *cells, *against, str(len(collected[key]))]) + " |")
    return "\n".join(lines)


def _by_correctness(
    runs: list[tuple[Run, dict[str, Scores]]], config: dict[str, Any]
) -> tuple[str, dict[str, dict[str, PairedDifference]]]:
    """Compare weighted KL with KL on training queries that were held out, by how right the teacher was about them."""
    collected: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for run, scores in runs:
        for query, value in scores[run.collection].items():
            collected[run.collection, run.method, query].append(value)
    weighted = next(method for method in config["analyses"]["methods"] if method != BASELINE)
    points: dict[str, dict[str, PairedDifference]] = {}
    lines = [
        f"### {weighted} − KL on held-out training queries, by the place of the teacher's best positive in the list",
        "",
        "| | first | 2–3 | 4 and worse |",
        "| :-- | --: | --: | --: |",
    ]
    for name in config["collections"]:
        queries: dict[str, list[str]] = {"first": [], "2–3": [], "4 and worse": []}
        for row in scored(name).itertuples():
            labels, scores = np.asarray(row.labels), np.asarray(row.scores)
            place = 1 + int((scores[labels <= 0] > scores[labels > 0].max()).sum())
            if (name, BASELINE, row.query_id) in collected and (name, weighted, row.query_id) in collected:
                queries["first" if place == 1 else "2–3" if place <= 3 else "4 and worse"].append(row.query_id)
        if not any(queries.values()):
            continue
        before, after = (
            {query: float(np.mean(collected[name, method, query])) for ids in queries.values() for query in ids}
            for method in (BASELINE, weighted)
        )
        points[name] = {label: found for label, ids in queries.items() if (found := _difference(before, after, ids))}
        cells = [f"{_interval(found)}, {len(queries[label])} queries" for label, found in points[name].items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines), points


def _curves(analyses: dict[str, list[tuple[Run, dict[str, Scores]]]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return (analysis, collection) → method → x → nDCG@10 of each seed."""
    axes = {"noise": "noise", "candidates": "negatives", "temperature": "student_temperature"}
    curves: dict[tuple[str, str], dict[str, Any]] = {}
    for name, axis in axes.items():
        for run, scores in analyses.get(name, []):
            line = curves.setdefault((name, run.collection), {}).setdefault(run.method, defaultdict(list))
            line[getattr(run, axis)].append(_value(scores[run.collection], list(scores[run.collection])))
    return curves


def _tidy(
    final: list[tuple[Run, dict[str, Scores]]],
    analyses: dict[str, list[tuple[Run, dict[str, Scores]]]],
    parts: dict[str, dict[str, list[str]]],
) -> pd.DataFrame:
    rows = []
    for stage, runs in {"final": final, **analyses}.items():
        for run, scores in runs:
            for where, values in scores.items():
                chosen = {"all": list(values)}
                if where == run.collection and run.fold is None:
                    chosen |= parts[where]
                for part, queries in chosen.items():
                    rows.append(
                        {
                            "stage": stage, "trained_on": run.collection, "method": run.method, "seed": run.seed,
                            "learning_rate": run.learning_rate, "student_temperature": run.student_temperature,
                            "teacher_temperature": run.teacher_temperature, "negatives": run.negatives,
                            "choice": run.choice, "noise": run.noise, "teacher": run.teacher, "fold": run.fold,
                            "evaluated_on": where, "queries_of": part, "queries": len(queries),
                            "ndcg_at_10": _value(values, queries) if queries else None,
                        }
                    )  # fmt: skip
    return pd.DataFrame(rows)


def _write_per_query(means: dict[tuple[str, str, str], Scores], output: Path) -> None:
    rows = [
        (*key, query, np.float32(value)) for key, values in means.items() for query, value in values.items()
    ]  # the mean over seeds, enough for every paired test of the tables
    columns = ["trained_on", "method", "evaluated_on", "query_id", "ndcg_at_10"]
    table = pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(columns[:3], "category"))
    table.to_parquet(output / "per_query.parquet", compression="zstd", index=False)


def _value(scores: Scores, queries: list[str]) -> float:
    return float(np.mean([scores[query] for query in queries])) if queries else float("nan")


def _mean(scores: Scores, queries: list[str]) -> str:
    return f"{_value(scores, queries):.3f}" if queries else "–"


def _mean_and_deviation(runs: list[Scores], queries: list[str]) -> str:
    if not queries:
        return "–"
    values = [_value(scores, queries) for scores in runs]
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def _interval(found: PairedDifference) -> str:
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def _p(found: PairedDifference | None) -> float:
    return 1.0 if found is None else found.p_value


def _p_text(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def check(found: Path, published: Path) -> int:
    """Compare the final table's means over seeds with the published ones, and say how far apart they are."""
    keys = ["trained_on", "method", "evaluated_on", "queries_of"]
    tables = []
    for file in (found, published):
        table = pd.read_csv(file).query("stage == 'final'")
        tables.append(table.groupby(keys)["ndcg_at_10"].agg(["mean", "std", "count"]))
    both = tables[0].join(tables[1], lsuffix="_found", rsuffix="_published", how="inner")
    both["apart"] = (both["mean_found"] - both["mean_published"]).abs()
    # Two means over seeds of the same thing; a thousandth more, since other machines round sums in another order.
    allowed = 3 * both["std_published"].fillna(0) * np.sqrt(2 / both["count_published"]) + 0.001
    outside = both[both["apart"] > allowed]
    print(f"{len(both)} numbers compared, the largest difference is {both['apart'].max():.4f} nDCG@10.")
    if len(outside):
        print(f"{len(outside)} are further apart than seeds explain:\n{outside[['mean_found', 'mean_published']]}")
    return 1 if len(outside) or not len(both) else 0
