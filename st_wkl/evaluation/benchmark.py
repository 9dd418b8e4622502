"""What a benchmark costs before it is run: sizes that MTEB states, and the speed that its smallest task shows."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from st_wkl.markdown import markdown_table
from st_wkl.progress import progress

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Estimate:
    """How long the tasks that are left will take.

    Args:
        done: Names of the tasks that the cache holds.
        left: Name of each other task to how many characters a model reads in it, None where MTEB does not say; the
            smallest first, as they will be evaluated.
        measured: Name of the task that the speed was measured on; None if everything is done.
        speed: Characters per second. A small task makes it too low rather than too high, as some of its time is the
            same for every task.
    """

    done: tuple[str, ...]
    left: Mapping[str, int | None]
    measured: str | None
    speed: float | None

    @property
    def hours(self) -> float:
        """How long the tasks of known size will take."""
        return sum(size or 0 for size in self.left.values()) / self.speed / 3600 if self.speed else 0.0

    def __str__(self) -> str:
        if not self.left:
            return f"All {len(self.done)} tasks are done."
        speed = self.speed or math.inf
        rows = [
            (name, f"{size / 1e6:,.1f}", f"{size / speed / 60:,.1f}") if size else (name, "not known", "")
            for name, size in self.left.items()
        ]
        table = markdown_table([("task", "million characters", "minutes"), (":--", "--:", "--:"), *rows])
        known = "" if all(self.left.values()) else " without those of unknown size"
        return (
            f"{len(self.done)} tasks are done, {len(self.left)} are left: about {self.hours:,.1f} hours{known}, at the "
            f"{self.speed or 0:,.0f} characters per second of {self.measured}.\n{table}"
        )


def size_of(task: Any, reranked: int | None = None) -> int | None:
    """Return how many characters a model reads in a task, None where MTEB does not say; no data are loaded.

    Args:
        task: The task.
        reranked: Candidates of a query, where a first stage finds them.
    """
    if (collection := getattr(task, "collection", None)) is not None:
        documents, queries = collection.documents, [collection.queries[query] for query in task.qrels]
        counts = {"num_documents": len(documents), "num_queries": len(queries)}
        read = {"documents": sum(map(len, documents.values())), "queries": sum(map(len, queries))}
        stated: Any = {task.split: counts | {f"{k}_text_statistics": {"total_text_length": n} for k, n in read.items()}}
    else:
        stated = task.metadata.descriptive_stats or {}
    total = 0.0
    for split in (stated.get(split, {}) for split in task.eval_splits):
        lengths = {
            name: part["total_text_length"]
            for name, part in split.items()
            if isinstance(part, dict) and "total_text_length" in part
        }
        if reranked and split.get("num_documents") and split.get("num_queries"):
            pairs = reranked * split["num_queries"]
            lengths = {name: pairs * n / split[f"num_{name.split('_')[0]}"] for name, n in lengths.items()}
        total += sum(lengths.values())
    return round(total) or None


def smallest_first(tasks: Iterable[AbsTask], reranked: int | None = None) -> list[AbsTask]:
    """Return the tasks by size, those of unknown size last: what cannot work fails at once, and speed is known soon."""
    return sorted(tasks, key=lambda task: size_of(task, reranked) or math.inf)


def with_progress(tasks: list[AbsTask], reranked: int | None, show_progress: bool) -> Iterator[AbsTask]:
    """Yield tasks, the smallest first, with a bar that counts characters, and say early how long all will take."""
    if len(tasks) == 1:
        yield tasks[0]
        return
    sizes = {id(task): size_of(task, reranked) or 0 for task in tasks}
    total, read, spent, told = sum(sizes.values()), 0, 0.0, False
    with progress(total=total, desc="Tasks", unit=" characters", unit_scale=True, disable=not show_progress) as bar:
        for task in smallest_first(tasks, reranked):
            start = time.perf_counter()
            yield task
            spent, read = spent + time.perf_counter() - start, read + sizes[id(task)]
            bar.update(sizes[id(task)])
            if not told and spent > 1 and read < total:  # in less time it was only looked up
                hours = (total - read) * spent / max(read, 1) / 3600
                logger.info("after %s: about %.1f hours for what is left, by its size", task.metadata.name, hours)
                told = True
