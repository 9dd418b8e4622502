"""What MTEB's reviewers ask: a mock run, on which tasks the model is not zero-shot, what only its owner knows.

Sources: https://docs.mteb.org/contributing/adding_a_model/ and the checklists of both repositories' pull requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mteb
from mteb.benchmarks import Benchmark
from mteb.mocks.mock_run import MockRunResults, is_dependency_error
from mteb.models import ModelMeta
from mteb.results.task_result import TaskError

from st_wkl.evaluation.evaluate import quiet
from st_wkl.evaluation.identity import identified

if TYPE_CHECKING:
    from st_wkl.models import AnyModel

# Whose coverage and zero-shot share are said. Of the RTEB benchmarks, the one of the model's languages.
_BENCHMARKS = ("MTEB(eng, v2)", "BEIR", "NanoBEIR")


@dataclass(frozen=True)
class Coverage:
    """What an entry and its results mean for one benchmark.

    Args:
        name: MTEB's name of the benchmark.
        tasks: Names of its tasks.
        done: Those of them that there are results of.
        private: Those of them that MTEB's maintainers alone can run.
        zero_shot: Percentage of its tasks that the model has not been trained on, as MTEB computes it; None where it is
            not known what it was trained on.
        seen: The other tasks, with why.
    """

    name: str
    tasks: tuple[str, ...]
    done: tuple[str, ...]
    private: tuple[str, ...]
    zero_shot: int | None
    seen: dict[str, str]


def mock_run(model: AnyModel, meta: ModelMeta) -> MockRunResults:
    """Run MTEB's mock tasks on the loaded student under its entry, as `mteb mock-run` does on what the Hub has."""
    wrapped: Any = identified(model, name=meta.name, revision=meta.revision)
    wrapped.mteb_model_meta = meta
    with quiet(False):
        return mteb.mock_run(wrapped)


def failed(mock: MockRunResults) -> list[str]:
    """Return the mock tasks that have failed; one that misses an optional package has not, as MTEB counts."""
    return [name for name, told in mock.items() if isinstance(told, TaskError) and not is_dependency_error(told)]


def coverage(meta: ModelMeta, sources: Mapping[str, Sequence[str]] | None, done: Sequence[str]) -> list[Coverage]:
    """Return what the entry means for the benchmarks that it can be shown on.

    Args:
        meta: The entry.
        sources: What it was trained on and through which part, as `known_training_datasets` returns it.
        done: Tasks that there are results of.
    """
    found = []
    for benchmark in _benchmarks(meta):
        names = tuple(task.metadata.name for task in benchmark.tasks)
        private = tuple(task.metadata.name for task in benchmark.tasks if not task.metadata.is_public)
        there = tuple(name for name in names if name in done)
        share = meta.zero_shot_percentage(names)
        found.append(Coverage(str(benchmark.name), names, there, private, share, not_zero_shot(meta, sources, names)))
    return found


def not_zero_shot(meta: ModelMeta, sources: Mapping[str, Sequence[str]] | None, tasks: Sequence[str]) -> dict[str, str]:
    """Return those of the tasks that the model is not zero-shot on, with why: what of its training, and which part."""
    closures = {}
    for name in sources or ():  # MTEB adds translations, subsets and newer versions of each
        alone = meta.model_copy(update={"training_datasets": {name}, "adapted_from": None})
        closures[name] = alone.get_training_datasets() or set()
    why = {}
    for task in (task for task in tasks if task in (meta.get_training_datasets() or ())):
        parts: dict[str, str] = {}
        for name in sorted(closures, key=lambda name: (name != task, len(name))):
            for part in (sources or {})[name] if task in closures[name] else ():
                parts.setdefault(part, "" if name == task else f" ({name})")
        why[task] = "; ".join(f"{part}{through}" for part, through in parts.items())
    return why


def _benchmarks(meta: ModelMeta) -> Iterator[Benchmark]:
    if meta.is_cross_encoder:  # which the retrieval benchmarks, their candidates left to each, do not rank
        return
    yield from (mteb.get_benchmark(name) for name in _BENCHMARKS)
    wanted = "RTEB(eng" if meta.languages == ["eng-Latn"] else "RTEB(beta"
    yield from (found for found in mteb.get_benchmarks() if str(found.name).startswith(wanted))


def open_questions(
    meta: ModelMeta, mock: MockRunResults | None, public: bool | None, own_citation: bool, reference: bool, done: bool
) -> list[str]:
    """Return what nothing here says, and only the owner of the model can.

    Args:
        meta: The entry.
        mock: MTEB's mock run, None if it was left out.
        public: Whether the Hub says that everybody can load the model, None if it was not asked.
        own_citation: Whether the owner has named the citation.
        reference: Whether the results were computed through `mteb.get_model`.
        done: Whether there are results.
    """
    asked = {
        "Has the model seen training or test data of the tasks that results are of? The statement in "
        "`results_pull_request.md` is yours to make.": True,
        "Is there a paper or a card with results of this model? One of its numbers is to be reproduced in "
        "`model_pull_request.md`.": True,
        "What else have the student, its teacher or its base been trained on? `training_datasets` is None (unknown), "
        "and the leaderboard cannot say on which tasks the model is zero-shot. Name what is missing with `--trained-on "
        "TASK`, or `--trained-on none` if nothing is.": meta.training_datasets is None,
        "Is there a link to public training data? Give it with `--training-data URL`.": not meta.public_training_data,
        "What was it trained with? It carries no record, so `public_training_code` is None.": (
            meta.public_training_code is None
        ),
        "Is there an article? `citation` is None; give BibTeX with `--citation FILE`.": meta.citation is None,
        "Is there an article on the model? `citation` is that of its loss; give another with `--citation FILE`.": (
            meta.citation is not None and not own_citation
        ),
        "Who answers for the model on GitHub? Say it with `--contact`.": meta.contacts is None,
        f"Is https://huggingface.co/{meta.name} public at {meta.revision}? The Hub was not asked.": public is None,
        f"https://huggingface.co/{meta.name} is private. Make it public: reviewers load it.": public is False,
        "Does `mteb mock-run` pass? It was left out here.": mock is None,
        "There are no results yet: `python evaluate.py` computes them.": not done,
        "Will you compute the results again through `mteb.get_model` (`python evaluate.py`)? These are of the local "
        "folder, through the same wrapper and with the same weights.": done and not reference,
    }
    if mock is not None and (broken := failed(mock)):
        told = "; ".join(f"{name} ({getattr(mock[name], 'exception', '')})" for name in broken)
        known = "MTEB gives rerankers no candidates in its mock retrieval, so every reranker fails them. "
        known = known if meta.is_cross_encoder and all("top_ranked" in part for part in told.split("; ")) else ""
        asked[f"Mock tasks have failed, which reviewers will ask about. {known}{' '.join(told.split())}"] = True
    return [question for question, holds in asked.items() if holds]
