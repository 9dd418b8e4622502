"""What becomes of results, students and scores: page, card, Hub, leaderboard, store; and the demo of all of it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from st_wkl.cli._answers import Answer, Asked, answering

if TYPE_CHECKING:
    from st_wkl.data.score_store import ScoreStore

_Store = Annotated[Path | None, Parameter(help="SQLite file of teacher scores. Default: the user's cache.")]
_Trust = Annotated[bool, Parameter(help="Run code of the model's repository. Read it before.")]
_PARTS = {"student": "student", "teacher": "teacher", "data": "training data"}


@answering
def demo(asked: Asked, *, output: Path = Path("demo-output"), hub: bool = False) -> Answer:
    """Teach a tiny model one corpus, on real text, in minutes; run it again and it goes on where it stopped.

    Args:
        output: Folder for scores, students and results.
        hub: Take models and data from the Hub.
    """
    from st_wkl.demo import run_demo

    result = run_demo(output, hub=hub, show_progress=not asked.quiet)
    return result.to_json(), f"\n{result.table()}\n\nThe students and their cards are in {output / 'students'}."


@answering
def report(
    asked: Asked,
    results: list[str],
    *,
    output: Path = Path("report.html"),
    before: str | None = None,
    teacher: str | None = None,
    collection: list[str] | None = None,
    plot: Path | None = None,
) -> Answer:
    """Write one HTML page with scores, differences and their intervals, efficiency, and single queries.

    Args:
        results: Results files, plain or as LABEL=FILE; the first is before.
        output: HTML file to write.
        before: Label of the undistilled student. Default: the first.
        teacher: Label of the teacher, whose lead is the gap to close.
        collection: Collection to take the texts of queries from; repeatable.
        plot: Picture of the differences to write, too (PNG, SVG).
    """
    from st_wkl.data.collection import Collection
    from st_wkl.evaluation import compare_all
    from st_wkl.evaluation.effects import effects_table, go_by_p
    from st_wkl.evaluation.report import labelled_results, plot_effects, write_report

    found = labelled_results(results)
    loaded = [Collection.load(source) for source in collection or ()]
    path = write_report(output, found, before=before, teacher=teacher, collections=loaded)
    base = before or next(iter(found))
    rivals = {label: entry for label, entry in found.items() if label not in (base, teacher)}
    ceiling = found[teacher] if teacher else None
    effects = compare_all(found[base], rivals, teacher=ceiling) if rivals else []
    if plot is not None:
        plot_effects(effects, plot)
    value = {"report": str(path), "effects": [asdict(effect) for effect in effects]}
    return value, "\n".join(
        [*([effects_table(effects)] if effects else []), *filter(None, [go_by_p(effects)]), f"report written to {path}"]
    )


@answering
def card(
    asked: Asked,
    folder: Path,
    results: list[str],
    *,
    licence: list[str] | None = None,
    command: str | None = None,
    trust_remote_code: _Trust = False,
) -> Answer:
    """Write a student's card from its record and results; what its owner wrote there stays.

    Args:
        folder: Folder of the student.
        results: Results files with their columns: before=FILE after=FILE BM25=FILE …
        licence: Licence of a part, such as student=mit or data=cc-by-nc-4.0; repeatable.
        command: The command that makes this student.
    """
    from st_wkl.evaluation import Results, compare
    from st_wkl.publish.model_card import write_model_card
    from st_wkl.record import RECORD_FILE, TrainingRecord

    columns = {label: Results.load(path) for label, path in _pairs(results, "before=results.json").items()}
    licences = _pairs(licence or [], "student=mit")
    if unknown := sorted(licences.keys() - _PARTS.keys()):
        raise ValueError(f"--licence {unknown[0]}=…: name one of {', '.join(_PARTS)}.")
    before, after = columns.get("before"), columns.get("after")
    comparison = None
    if before is not None and after is not None:
        shared = {scores.task for scores in before.tasks} & {scores.task for scores in after.tasks}
        comparison = compare(before, after) if len(shared) == 1 else None
    path = write_model_card(
        folder,
        record=TrainingRecord.load(folder) if (folder / RECORD_FILE).is_file() else None,
        results=columns,
        comparison=comparison,
        command=command,
        trust_remote_code=trust_remote_code,
        licences={_PARTS[part]: stated for part, stated in licences.items()} or None,
    )
    stated = "\nlicense:" in path.read_text(encoding="utf-8").partition("\n---\n")[0]
    hint = "" if stated else " It claims no licence: name those that are not known, as in --licence data=cc-by-4.0."
    return {"card": str(path)}, f"The card is {path}.{hint}"


def _pairs(items: list[str], example: str) -> dict[str, str]:
    pairs = {}
    for item in items:
        label, equals, value = item.partition("=")
        if not (label and equals and value):
            raise ValueError(f"{item!r} must be a name and a value, such as {example}.")
        if label in pairs:
            raise ValueError(f"{label!r} is given twice.")
        pairs[label] = value
    return pairs


@answering
def push(
    asked: Asked,
    folder: Path,
    repo: str,
    *,
    dataset: bool = False,
    public: bool = False,
    pr: bool = False,
    base_model: str | None = None,
    trust_remote_code: _Trust = False,
) -> Answer:
    """Push a student or a dataset to the Hub, private unless --public. Log in with `hf auth login` first.

    Args:
        folder: Folder of a student, a merged student, an adapter, or a dataset.
        repo: Repository on the Hub: user/name or organisation/name.
        dataset: The folder is what `st-wkl build` made.
        public: Publish. Without it, only you can see it.
        pr: Open a pull request instead of writing.
        base_model: Hub id of an adapter's base model.
    """
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    from st_wkl.publish.hub import push_dataset, push_student

    if asked.quiet:
        disable_progress_bars()
    built = (folder / "provenance.json").is_file() and (folder / "train.parquet").is_file()
    if built != dataset:
        kind = "a dataset: add --dataset" if built else "no dataset: leave --dataset out"
        raise ValueError(f"{folder} is {kind}.")
    if dataset:
        pushed = push_dataset(folder, repo, private=not public, create_pr=pr)
    else:
        options = {"base_model": base_model, "trust_remote_code": trust_remote_code}
        pushed = push_student(folder, repo, private=not public, create_pr=pr, **options)  # type: ignore[arg-type]
    lines = [f"{pushed.url} ({'private' if pushed.private else 'public'}, {len(pushed.files)} files)"]
    if pushed.left_out:
        lines.append(f"not part of the model, left here: {', '.join(pushed.left_out)}")
    if pushed.removed:
        lines.append(f"of an earlier push, removed there: {', '.join(pushed.removed)}")
    if public and pushed.private:
        lines.append("The repository was private before and stays so; its settings on the Hub change that.")
    return asdict(pushed), "\n".join(lines)


@answering
def prepare(
    asked: Asked,
    student: Path,
    results: list[Path] | None = None,
    *,
    org: str,
    output: Path = Path("submission"),
    name: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    trained_on: list[str] | None = None,
    training_data: str | None = None,
    language: list[str] | None = None,
    release_date: str | None = None,
    contact: list[str] | None = None,
    citation: Path | None = None,
    superseded_by: str | None = None,
    no_mock: bool = False,
    trust_remote_code: _Trust = False,
) -> Answer:
    """Write MTEB's entry of the model, its mock run and results, and the texts of both pull requests.

    Args:
        student: Folder of the trained student, as it was pushed.
        results: Folders with MTEB's own result files.
        org: User or organisation of the student on the Hub.
        output: Folder to write.
        name: Repository name. Default: the folder's name.
        revision: Commit on the Hub. Default: the newest.
        license: Licence. Default: that of the card.
        trained_on: MTEB task whose data student, teacher or base has seen, beyond what MTEB knows, or `none`.
        training_data: URL of the training data.
        language: Language and script. Default: eng-Latn.
        release_date: YYYY-MM-DD. Default: today.
        contact: GitHub handle of who answers for the model.
        citation: BibTeX file of articles. Default: that of the loss.
        superseded_by: Id of the model to be used in its place.
        no_mock: Leave out MTEB's mock tasks, whose outcome reviewers ask for.
    """
    from st_wkl.publish.leaderboard import prepare as write

    done = write(
        student,
        results or [],
        org=org,
        output=output,
        name=name,
        revision=revision,
        license=license,
        trained_on=[] if trained_on == ["none"] else trained_on,
        training_data=training_data,
        languages=language or ("eng-Latn",),
        release_date=release_date,
        contacts=contact or (),
        citation=citation,
        superseded_by=superseded_by,
        mock=not no_mock,
        trust_remote_code=trust_remote_code,
    )
    value = {
        "model": done.meta.name,
        "revision": done.meta.revision,
        "model_file": str(done.model_file),
        "results": str(done.results) if done.results else None,
        "tasks": list(done.tasks),
        "page": str(done.page),
        "notes": list(done.notes),
        "coverage": [asdict(row) for row in done.coverage],
        "questions": list(done.questions),
    }
    told = f"{len(done.tasks)} results, checked" if done.tasks else "no results yet"
    lines = [f"{done.model_file} holds the entry of {done.meta.name}; {told}.", *(f"- {note}" for note in done.notes)]
    for row in done.coverage:
        share = "not known how much of it is" if row.zero_shot is None else f"{row.zero_shot} %"
        lines.append(f"{row.name}: {len(row.done)} of {len(row.tasks)} tasks here, {share} zero-shot")
        lines += [f"  not on {name}: {why}" for name, why in row.seen.items()]
    lines += ["What only you can say:", *(f"- {question}" for question in done.questions)]
    return value, "\n".join([*lines, f"Go on with {done.page}."])


@answering
def info(asked: Asked, *, store: _Store = None) -> Answer:
    """Say which teachers' scores the store holds, and how many."""
    with _opened(store) as opened:
        found = opened.info()
    return asdict(found), str(found)


@answering
def verify(asked: Asked, *, store: _Store = None) -> Answer:
    """Read every score; a damaged file is named and set aside."""
    with _opened(store) as opened:
        count = opened.verify()
        return {"path": str(opened.path), "scores": count}, f"{opened.path} is sound: {count:,} scores."


@answering
def export(asked: Asked, output: Path, *, store: _Store = None) -> Answer:
    """Write all scores to a parquet file, which other stores can import.

    Args:
        output: Parquet file to write.
    """
    with _opened(store) as opened:
        count = opened.export_parquet(output, show_progress=not asked.quiet)
    return {"path": str(output), "scores": count}, f"{count:,} scores are in {output}."


@answering
def import_scores(asked: Asked, source: Path, *, store: _Store = None) -> Answer:
    """Take the scores of a parquet file into the store, which is made if there is none; scores it has stay.

    Args:
        source: Parquet file that `st-wkl scores export` wrote.
    """
    with _opened(store, new=True) as opened:
        count = opened.import_parquet(source, show_progress=not asked.quiet)
        return {"path": str(opened.path), "scores": count}, f"{count:,} scores of {source} are in {opened.path}."


def _opened(store: Path | None, *, new: bool = False) -> ScoreStore:
    from st_wkl.data.score_store import ScoreStore, default_store_path

    path = default_store_path() if store is None else store
    if not new and not path.is_file():
        raise FileNotFoundError(f"There is no score store at {path}. `st-wkl build` makes one.")
    return ScoreStore(path)
