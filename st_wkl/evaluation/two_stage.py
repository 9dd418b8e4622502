"""Two-stage retrieval: a first stage finds, the model reranks, and the task's name says which first stage and how deep.

MTEB keeps the name of a task that was turned into reranking, whatever found its candidates and however many, so that
numbers of different tasks stand under one name. Importing this module imports MTEB, which takes seconds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.models import CrossEncoderWrapper, ModelMeta
from mteb.models.sentence_transformer_wrapper import SparseEncoderWrapper

from st_wkl.data.candidates import BM25, bm25_candidates
from st_wkl.data.collection import Collection
from st_wkl.data.runs import read_run
from st_wkl.data.selection import without_own
from st_wkl.evaluation.identity import TeacherWrapper, identified
from st_wkl.evaluation.runs import check_known
from st_wkl.evaluation.tasks import CollectionTask, data_of, rows_of, run_mteb, texts_of
from st_wkl.files import content_hash, expanded, file_name
from st_wkl.metrics import Run, checked_run
from st_wkl.model_checks import check_complete
from st_wkl.models import load_model
from st_wkl.text import ANALYSER

if TYPE_CHECKING:
    from st_wkl.data.candidates import Candidates
    from st_wkl.models import AnyModel

FirstStage: TypeAlias = "str | Path | BM25 | Mapping[str, Mapping[str, float]] | Candidates | AnyModel"


def bm25_settings(bm25: BM25) -> dict[str, Any]:
    """Return what the results say of a BM25."""
    language = bm25.language
    return {"formula": "lucene", "k1": bm25.k1, "b": bm25.b, "stemmer": language, "stop words": language}


class BM25Search:
    """BM25 as a model that MTEB runs, by `bm25_candidates`.

    Unlike in MTEB's own `mteb/baseline-bm25s`, words of one character count. With a task whose data are loaded, the
    name is the one that BM25 has over its documents.
    """

    def __init__(
        self, bm25: BM25 | None = None, task: AbsTaskRetrieval | None = None, *, show_progress: bool = True
    ) -> None:
        bm25 = bm25 or BM25()
        corpora = () if task is None else (data["corpus"] for _, _, data in data_of(task))
        self.name = bm25.name_over(text for corpus in corpora for text in texts_of(corpus).values())
        self.bm25, self.show_progress = bm25, show_progress
        digest = content_hash([self.name, bm25_settings(bm25), ANALYSER, version("bm25s")])
        self.mteb_model_meta = ModelMeta.create_empty(overwrites={"name": f"local/{self.name}", "revision": digest})
        self.documents: dict[str, str] = {}

    def index(self, corpus: Any, **_: Any) -> None:
        """Keep the documents; a search over them builds the index."""
        self.documents = texts_of(corpus)

    def search(self, queries: Any, *, top_k: int, top_ranked: Any = None, **_: Any) -> Run:
        """Return the best documents of each query, among its candidates if there are any."""
        collection = _collection("bm25", self.documents, queries)
        depth = top_k if top_ranked is None else len(self.documents)
        found = bm25_candidates(collection, top_k=depth, **asdict(self.bm25), show_progress=self.show_progress)
        run = {query: {hit.document_id: hit.score for hit in hits} for query, hits in found.items()}
        if top_ranked is not None:
            run = {query: {d: run[query].get(d, 0.0) for d in top_ranked.get(query, [])} for query in run}
        return run


def staged(
    model: Any,
    task: AbsTaskRetrieval,
    first_stage: FirstStage | None,
    top_k: int,
    speed: Mapping[str, Any],
    trust_remote_code: bool,
) -> tuple[Any, AbsTaskRetrieval]:
    """Return what MTEB runs on which task: with candidates if there is a first stage, and checked.

    Raises:
        ValueError: If a reranker has no lists, or a reranking task lost them and would silently become full retrieval.
    """
    if isinstance(model, BM25):
        model = BM25Search(model, task, show_progress=speed["show_progress"])
    if first_stage is not None:
        task = _with_candidates(task, first_stage, top_k, speed, trust_remote_code)
    elif not all(data.get("top_ranked") for _, _, data in data_of(task)):
        if isinstance(model, CrossEncoderWrapper | TeacherWrapper):
            raise ValueError(
                f"{task.metadata.name} has no candidates, and a cross-encoder can only rerank; say what finds them, as "
                "in evaluate(..., first_stage='bm25', top_k=100)"
            )
        if "Reranking" in task.metadata.type:
            raise ValueError(
                f"{task.metadata.name} is a reranking task, but its lists of candidates were not found, as happens "
                "offline with a warmed cache; download its dataset with huggingface_hub.snapshot_download and point "
                "task.metadata.dataset['path'] at the folder"
            )
    ranked = {f"{subset}/{split}": lists for subset, split, data in data_of(task) if (lists := data.get("top_ranked"))}
    if ranked and task.metadata.type == "Retrieval" and "+candidates." not in task.metadata.dataset["revision"]:
        # A user has turned it into reranking with MTEB's `convert_to_reranking`, which keeps its name.
        meta = getattr(task, "_previous_results_model_meta", None) or {}
        first = str(meta.get("model_name") or meta.get("name") or "candidates").split("/")[-1]
        depth = max(len(found) for lists in ranked.values() for found in lists.values())
        task = _renamed(task, first, depth, {place: dict(lists) for place, lists in ranked.items()})
    if ranked and isinstance(model, SparseEncoderWrapper) and "Reranking" not in task.metadata.type:
        # MTEB indexes rows of a sparse tensor in tasks of any other type, which torch cannot do.
        task = copy(task)
        task.metadata = task.metadata.model_copy(update={"type": "Reranking"})
    return model, task


def _with_candidates(
    task: AbsTaskRetrieval, first_stage: FirstStage, top_k: int, speed: Mapping[str, Any], trust_remote_code: bool
) -> AbsTaskRetrieval:
    """Return a task called `<name>-rerank-<first stage>-top<k>`, whose dataset revision has a hash of the candidates.

    Its corpus holds the candidates only, so that a bi-encoder does not embed what nobody found.
    """
    name, run_of = _first_stage(task, first_stage, speed, trust_remote_code)
    candidates: dict[str, Any] = {}
    datasets: dict[str, Any] = {}
    for subset, split, data in data_of(task):
        if data.get("top_ranked"):
            raise ValueError(f"{task.metadata.name} has candidates of its own; leave out first_stage=")
        ranked = _top(run_of(subset, split, data), data["relevant_docs"], top_k, task)
        candidates[f"{subset}/{split}"] = ranked
        corpus = rows_of(data["corpus"], {document for documents in ranked.values() for document in documents})
        datasets.setdefault(subset, {})[split] = {**data, "corpus": corpus, "top_ranked": ranked}
    task = copy(task)
    task.dataset = datasets
    return _renamed(task, name, top_k, candidates)


def _renamed(task: AbsTaskRetrieval, first_stage: str, top_k: int, candidates: Any) -> AbsTaskRetrieval:
    """Return the task under a name and a dataset revision that say what is reranked, so that no cache mixes them up."""
    digest = content_hash(candidates, size=6)
    task = copy(task)
    source = task.metadata.dataset
    room = max(40, 200 - len(task.metadata.name.encode()))  # MTEB names files after tasks
    first_stage = first_stage if len(first_stage) <= room else file_name(first_stage, longest=room)
    task.metadata = task.metadata.model_copy(
        update={
            "name": f"{task.metadata.name}-rerank-{first_stage}-top{top_k}",
            "dataset": {**source, "revision": f"{source['revision']}+candidates.{digest}"},
        }
    )
    return task


def _first_stage(
    task: AbsTaskRetrieval, source: FirstStage, speed: Mapping[str, Any], trust_remote_code: bool
) -> tuple[str, Callable[[str, str, Any], Run]]:
    """Return the name of a first stage, and what gives its run for a subset, a split and their data."""
    if isinstance(source, Mapping):
        run = checked_run(source, "first_stage")
        return "run", lambda subset, split, data: _given(task, data, run)
    if isinstance(source, str | Path) and (file := Path(expanded(source))).is_file():
        return _stem(file), lambda subset, split, data: _run_of_file(task, data, file)
    if bm25 := BM25.of(source):
        model: Any = BM25Search(bm25, task, show_progress=speed["show_progress"])
        name = model.name
    else:
        retriever, name = load_model(source, trust_remote_code=trust_remote_code)  # type: ignore[arg-type]
        if type(retriever).__name__ == "CrossEncoder":
            raise ValueError(
                f"first_stage is {name}, a cross-encoder, which can only rerank; take a retriever or 'bm25'"
            )
        check_complete(retriever, "first stage")
        model = identified(retriever, name=name)
    found = run_mteb(model, task, **speed)[1]
    of = f"of {model.mteb_model_meta.name}"
    return name.split("/")[-1], lambda subset, split, data: checked_run(found[subset][split], of)


def _given(task: AbsTaskRetrieval, data: Any, run: Run) -> Run:
    """Return the part of a run that a split needs; a document that it lacks means another collection."""
    known = task.collection.queries if isinstance(task, CollectionTask) else set(data["queries"]["id"])
    if absent := [query for query in run if query not in known]:
        if isinstance(task, CollectionTask) and len(absent) < len(run):
            raise ValueError(f"first_stage: query {absent[0]!r} is not in {task.metadata.name}; wrong collection?")
        run = {query: found for query, found in run.items() if query in known}
    if run:
        check_known(run, known, set(data["corpus"]["id"]), task.metadata.name, "first_stage")
    return run


def _run_of_file(task: AbsTaskRetrieval, data: Any, path: Path) -> Run:
    found = read_run(path, _collection(task.metadata.name, texts_of(data["corpus"]), data["queries"]))
    if not found:
        raise ValueError(f"{path} has no query and document of {task.metadata.name}; is it the run of another task?")
    return checked_run(found)


def _top(run: Run, qrels: Mapping[str, Any], top_k: int, task: AbsTaskRetrieval) -> dict[str, list[str]]:
    """Return the candidates of each judged query, best first; queries without any are counted."""
    ranked = {}
    # MTEB does not count a query's own document, so it must not take a candidate's place.
    run = without_own({query: run.get(query, {}) for query in qrels}, task.ignore_identical_ids)
    for query, found in run.items():
        ranked[query] = sorted(found, key=lambda document: (-found[document], document))[:top_k]
    empty = [query for query, found in ranked.items() if not found]
    if len(empty) == len(ranked):
        raise ValueError(
            f"the first stage has no candidate for any query of {task.metadata.name}; is it another's run?"
        )
    if empty:
        warnings.warn(
            f"the first stage has no candidate for {len(empty)} of {len(ranked)} queries of {task.metadata.name}, "
            f"which count as 0, such as {', '.join(empty[:5])}",
            stacklevel=2,
        )
    return ranked


def _collection(name: str, documents: dict[str, str], queries: Any) -> Collection:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of documents without text, of which the caller's own collection has warned
        texts = dict(zip(queries["id"], queries["text"], strict=True))
        return Collection(name, documents, texts, ignore_identical_ids=False)  # that is the task's to say


def _stem(path: Path) -> str:
    """Return a run file's name without its suffixes, which may hold dots only if they are no suffix of a run."""
    name = path.name
    for suffix in (".gz", ".txt", ".tsv", ".run", ".trec"):
        name = name.removesuffix(suffix)
    return "-".join(name.split()) or "run"
