"""Where chunks of pairs are scored: in this process, in a pool of processes, or on a Ray cluster.

Whatever the engine, chunks come back to the caller, and the caller alone writes them down.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import torch

from st_wkl.data.backends import cores
from st_wkl.data.teacher import Engine, Pair, Teacher, as_numbers, shown
from st_wkl.ranges import check_options

# What a killed run loses at most, where the teacher scores in parts.
_SECONDS_AT_ONCE = 15.0

_worker_teacher: Any = None  # the teacher of a pool's worker, loaded once for all its chunks


def score_chunks(
    teacher: Teacher, chunks: Sequence[list[Pair]], *, engine: Engine = "process", workers: int | None = None
) -> Iterator[tuple[int, np.ndarray | slice, Any]]:
    """Yield the place of a chunk, the places in it, and the teacher's scores of these, as they are finished.

    A teacher with `score_parts` returns what it has every 15 seconds; workers, and other teachers, a chunk as a whole.

    Args:
        teacher: The teacher. For `"pool"` and `"ray"` it must be picklable; a `CrossEncoderTeacher` is.
        chunks: Lists of pairs; one is one call of `teacher.score`.
        engine: `"process"` scores here, one chunk after the other. `"pool"` starts processes on this machine, which
            share its cores (a script needs `if __name__ == "__main__":`, as always with spawned processes). `"ray"`
            uses Ray Data (extra `ray`) on the cluster that `ray.init` or RAY_ADDRESS names, else on this machine.
        workers: Processes of the pool, or actors of Ray; `None` takes 2, on a Ray cluster with GPUs one for each GPU.
            An actor holds one GPU where there are any, else one core.

    Raises:
        ValueError: There is no such engine, or `workers` is not positive.
        TypeError: The teacher cannot be sent to other processes.
        RuntimeError: A worker failed; the message names the first pair of its chunk. An error in this process is
            raised as it is, with a note that names the pair.
    """
    if engine not in ("process", "pool", "ray"):
        raise ValueError(f'engine must be "process", "pool" or "ray", got {engine!r}.')
    check_options(workers=workers)
    if not chunks:
        return
    if engine == "process":
        for number, chunk in enumerate(chunks):
            try:
                yield from ((number, part, scores) for part, scores in _parts(teacher, chunk))
            except Exception as error:
                error.add_note(f"This happened while scoring {_named(chunk)}.")
                raise
        return
    if engine == "pool":
        _check_main(teacher)
    run = _pool if engine == "pool" else _ray
    for number, scores in run(_pickled(teacher), chunks, workers):
        yield number, slice(None), scores


def _parts(teacher: Any, chunk: list[Pair]) -> Iterator[tuple[np.ndarray | slice, Any]]:
    if (split := _parts_of(teacher)) is None:
        yield slice(None), teacher.score(chunk)
        return
    places: list[np.ndarray] = []
    found: list[np.ndarray] = []
    last = time.monotonic()
    try:
        for part, scores in split(chunk):
            places.append(part)
            found.append(scores)
            if time.monotonic() - last >= _SECONDS_AT_ONCE:
                yield np.concatenate(places), np.concatenate(found)
                places, found, last = [], [], time.monotonic()
    except (Exception, KeyboardInterrupt):
        if places:  # what was finished before is kept
            yield np.concatenate(places), np.concatenate(found)
        raise
    if places:
        yield np.concatenate(places), np.concatenate(found)


def _parts_of(teacher: Any) -> Any:
    """Return the teacher's `score_parts`, None if it has none or a `score` of its own that came after it."""
    for place in (vars(teacher) if hasattr(teacher, "__dict__") else {}, *(vars(cls) for cls in type(teacher).__mro__)):
        if "score_parts" in place:
            return teacher.score_parts
        if "score" in place:
            return None
    return None


def _named(chunk: Sequence[Pair]) -> str:
    return f"{len(chunk):,} pairs, the first of which is {shown(chunk[0])}"


def _pickled(teacher: Teacher) -> bytes:
    try:
        return pickle.dumps(teacher)
    except Exception as error:
        raise TypeError(
            f"The teacher {type(teacher).__name__} cannot be sent to other processes: {error}. Define it (and its "
            "function) at the top of a module, or use engine='process'."
        ) from error


def _start_worker(teacher: bytes, threads: int) -> None:
    global _worker_teacher
    # Each worker would take all cores, and all of them together would be slower than one.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    _worker_teacher = pickle.loads(teacher)


def _score_in_worker(chunk: list[Pair]) -> np.ndarray:
    return as_numbers(_worker_teacher.score(chunk), chunk)


def _check_main(teacher: Teacher) -> None:
    """Refuse a pool that cannot start: its processes run the program's file again, before their own work.

    Raises:
        RuntimeError: There is no such file, or all of it would be run again, the pool included.
        TypeError: The teacher is defined where other processes cannot see it.
    """
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if file is None and type(teacher).__module__ == "__main__":
        raise TypeError(
            f'engine="pool" starts processes that cannot see {type(teacher).__name__}, which was defined at a prompt '
            'or in a notebook. Define it in a module, or use engine="process".'
        )
    if file is None or getattr(main, "__spec__", None) is not None:
        return
    path = Path(file)
    if not path.is_file():
        why = f"there is none: this program came from {path.name}"
    elif path.suffix == ".py" and "__name__" not in path.read_text(encoding="utf-8", errors="replace"):
        why = f"{path.name} would start pools without end"
    else:
        return
    raise RuntimeError(
        f'engine="pool" starts processes that run the program\'s file again, and {why}. Put what it does under '
        '`if __name__ == "__main__":` in a file and run that, or use engine="process".'
    )


def _pool(teacher: bytes, chunks: Sequence[list[Pair]], workers: int | None) -> Iterator[tuple[int, np.ndarray]]:
    workers = min(workers or 2, len(chunks))
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),  # fork breaks CUDA and the thread pools of torch
        initializer=_start_worker,
        initargs=(teacher, max(1, cores() // workers)),
    )
    running: dict[Future, int] = {}
    places = iter(range(len(chunks)))
    try:
        while True:
            # A few chunks wait at each worker, not all of them: memory stays flat, and an error ends the run soon.
            while len(running) < 2 * workers and (place := next(places, None)) is not None:
                running[pool.submit(_score_in_worker, chunks[place])] = place
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                place = running.pop(future)
                try:
                    scores = future.result()
                except BrokenProcessPool as error:
                    raise RuntimeError(
                        f"A worker died at or near {_named(chunks[place])}: it could not load the teacher (its output "
                        "above says why), was killed, or memory ended. Start again, with fewer workers or a smaller "
                        "batch_tokens; finished chunks are kept."
                    ) from error
                except Exception as error:
                    raise RuntimeError(f"A worker failed at {_named(chunks[place])}: {error!r}") from error
                yield place, scores
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _RayWorker:
    """An actor of Ray Data. Chunks travel as bytes: Arrow refuses the lone surrogates that web text may hold."""

    def __init__(self, teacher: bytes) -> None:
        self.teacher = pickle.loads(teacher)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"answer": [self._answer(*pickle.loads(sent)) for sent in batch["chunk"]]}

    def _answer(self, number: int, chunk: list[Pair]) -> bytes:
        try:
            return pickle.dumps((number, as_numbers(self.teacher.score(chunk), chunk), ""))
        except Exception as problem:
            return pickle.dumps((number, None, repr(problem)))


def _ray(teacher: bytes, chunks: Sequence[list[Pair]], workers: int | None) -> Iterator[tuple[int, np.ndarray]]:
    try:
        import ray.data
    except ImportError as error:
        raise ImportError('engine="ray" needs Ray Data: pip install st-wkl[ray]') from error

    if not ray.is_initialized():
        ray.init()
    # Ray hides the GPUs from an actor that has not asked for one, and the teacher would be slow without a word.
    gpus = int(ray.cluster_resources().get("GPU", 0))
    rows = [{"chunk": pickle.dumps(numbered)} for numbered in enumerate(chunks)]
    blocks = ray.data.from_items(rows, override_num_blocks=len(rows))
    results = blocks.map_batches(
        _RayWorker,
        fn_constructor_args=(teacher,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers or gpus or 2, len(chunks))),
        num_gpus=1 if gpus else None,
    )
    for row in results.iter_rows():
        number, scores, problem = pickle.loads(row["answer"])
        if problem:
            raise RuntimeError(f"A worker failed at {_named(chunks[number])}: {problem}")
        yield number, scores
