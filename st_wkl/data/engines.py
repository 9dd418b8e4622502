"""Where chunks of pairs are scored: in this process, in a pool of processes, or on a Ray cluster.

Whatever the engine, chunks come back to the caller, and the caller alone writes them down.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import sys
import time
from collections import Counter, deque
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

logger = logging.getLogger(__name__)

# What a killed run loses at most, where the teacher scores in parts.
_SECONDS_AT_ONCE = 15.0

# Workers that may die over one chunk: the first may have been killed, the third has met what kills.
_LIVES = 3

_worker: Any = None  # of a process of a pool


def score_chunks(
    teacher: Teacher, chunks: Sequence[list[Pair]], *, engine: Engine = "process", workers: int | None = None
) -> Iterator[tuple[int, np.ndarray | slice, Any]]:
    """Yield the place of a chunk, the places in it, and the teacher's scores of these, as they are finished.

    A teacher with `score_parts` returns what it has every 15 seconds; workers, and other teachers, a chunk as a whole.

    Args:
        teacher: The teacher. For `"pool"` and `"ray"` it must be picklable; a `CrossEncoderTeacher` is.
        chunks: Lists of pairs; one is one call of `teacher.score`.
        engine: `"process"` scores here, one chunk after the other. `"pool"` starts processes on this machine, which
            share its cores and are dealt its GPUs, one after another (a script needs `if __name__ == "__main__":`, as
            always with spawned processes). `"ray"` starts actors (extra `ray`) on the cluster that `ray.init` or
            RAY_ADDRESS names, else on this machine; an actor holds one GPU where there are any, else one core.
        workers: Processes of the pool, or actors of Ray; `None` takes one for each GPU, 2 where there is none. One that
            dies (killed, out of memory) gives its chunks back, another takes them, and a new one starts.

    Raises:
        ValueError: There is no such engine, or `workers` is not positive.
        ImportError: Ray is not installed.
        TypeError: The teacher cannot be sent to other processes.
        RuntimeError: A worker failed, or three died over one chunk; the message names the chunk's first pair. An error
            in this process is raised as it is, with a note that names the pair.
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
    staff = _Processes if engine == "pool" else _Actors
    for number, scores in _Shift(staff(teacher, _pickled(teacher), workers), chunks).results():
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


class _Loaded:
    """A worker's end: the teacher is made once, with the first chunk, where an error reaches the caller."""

    def __init__(self, teacher: bytes) -> None:
        self.sent = teacher
        self.teacher: Any = None

    def score(self, chunk: list[Pair]) -> np.ndarray:
        """Score a chunk."""
        if self.teacher is None:
            try:
                self.teacher = pickle.loads(self.sent)
            except Exception as error:
                raise RuntimeError(f"the teacher could not be loaded: {error!r}") from error
        return as_numbers(self.teacher.score(chunk), chunk)


def _start_process(teacher: bytes, threads: int, device: str | None) -> None:
    global _worker
    if device is not None:  # before CUDA is first used in this process
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    # Each worker would take all cores, and all of them together would be slower than one.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    _worker = _Loaded(teacher)


def _score_in_process(chunk: list[Pair]) -> np.ndarray:
    return _worker.score(chunk)


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


class _Processes:
    """Workers that are processes of this machine: each has its share of the cores, and a GPU if there is one."""

    dead = BrokenProcessPool

    def __init__(self, teacher: Teacher, sent: bytes, workers: int | None) -> None:
        self.sent, self.devices = sent, _devices(teacher)
        self.count = workers or len(self.devices) or 2

    def start(self, place: int, of: int) -> ProcessPoolExecutor:
        """Start one: a pool of one, so that its death is nobody else's."""
        device = self.devices[place % len(self.devices)] if self.devices else None
        return ProcessPoolExecutor(
            1,
            mp_context=multiprocessing.get_context("spawn"),  # fork breaks CUDA and the thread pools of torch
            initializer=_start_process,
            initargs=(self.sent, max(1, cores() // of), device),
        )

    def submit(self, worker: ProcessPoolExecutor, chunk: list[Pair]) -> Future[np.ndarray]:
        """Give a worker something to do."""
        return worker.submit(_score_in_process, chunk)

    def finished(self, tasks: list[Future[np.ndarray]]) -> set[Future[np.ndarray]]:
        """Wait for at least one of the tasks."""
        return wait(tasks, return_when=FIRST_COMPLETED).done

    def result(self, task: Future[np.ndarray]) -> np.ndarray:
        """Return what came of a task."""
        return task.result()

    def stop(self, worker: ProcessPoolExecutor) -> None:
        """Let a worker finish what it does, and end it."""
        worker.shutdown(wait=True, cancel_futures=True)


def _devices(teacher: Any) -> list[str]:
    """Return the GPUs that workers are dealt, none for a teacher that names its own device or does without."""
    device = str(getattr(teacher, "device", None) or "cuda")
    if device != "cuda" or not torch.cuda.is_available():
        return []
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible or [str(place) for place in range(torch.cuda.device_count())]


class _Actors:
    """Workers that are actors of Ray: each holds one GPU of the cluster where there are any, else one core."""

    def __init__(self, teacher: Teacher, sent: bytes, workers: int | None) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError('engine="ray" needs Ray: pip install st-wkl[ray]') from error
        self.ray, errors = ray, ray.exceptions
        self.dead = (errors.RayActorError, errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError)
        if not ray.is_initialized():
            ray.init()
        # Ray hides the GPUs from an actor that has not asked for one, and the teacher would be slow without a word.
        gpus = int(ray.cluster_resources().get("GPU", 0))
        device = str(getattr(teacher, "device", None) or "")
        if gpus and ":" in device:
            raise ValueError(f"An actor of Ray sees one GPU, its own, and the teacher asks for {device!r}: say 'cuda'.")
        self.resources = {"num_gpus": 1} if gpus and device != "cpu" else {"num_cpus": 1}
        self.count, self.sent = workers or gpus or 2, ray.put(sent)

    def start(self, place: int, of: int) -> Any:
        """Start one. Chunks travel as bytes, as the lone surrogates that web text may hold are refused elsewhere."""
        return self.ray.remote(_Loaded).options(**self.resources).remote(self.sent)

    def submit(self, worker: Any, chunk: list[Pair]) -> Any:
        """Give a worker something to do."""
        return worker.score.remote(chunk)

    def finished(self, tasks: list[Any]) -> list[Any]:
        """Wait for one of the tasks."""
        return self.ray.wait(tasks, num_returns=1)[0]  # type: ignore[no-any-return]

    def result(self, task: Any) -> np.ndarray:
        """Return what came of a task."""
        try:
            return self.ray.get(task)  # type: ignore[no-any-return]
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause or error from None

    def stop(self, worker: Any) -> None:
        """End a worker."""
        self.ray.kill(worker)


class _Shift:
    """Deals chunks to workers; one that dies gives its chunks back, another takes them, and a new one starts."""

    def __init__(self, workers: _Processes | _Actors, chunks: Sequence[list[Pair]]) -> None:
        self.workers, self.chunks, self.count = workers, chunks, min(workers.count, len(chunks))
        self.staff = [workers.start(place, self.count) for place in range(self.count)]
        # Each task with its worker's place and its chunk's number, as they were dealt.
        self.running: dict[Any, tuple[int, int]] = {}
        self.fresh, self.given_back = iter(range(len(chunks))), deque[int]()
        self.deaths: Counter[int] = Counter()

    def results(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the numbers of chunks and their scores, as they come."""
        try:
            while self._deal():
                done = set(self.workers.finished([*self.running])) if self.running else ()
                for task in [task for task in self.running if task in done]:
                    if task not in self.running:  # of a worker whose death has shown already
                        continue
                    place, number = self.running[task]
                    try:
                        scores = self.workers.result(task)
                    except self.workers.dead as error:
                        self._replace(place, error)
                        continue
                    except Exception as error:
                        raise RuntimeError(f"A worker failed at {_named(self.chunks[number])}: {error!r}") from error
                    del self.running[task]
                    yield number, scores
        finally:
            for worker in self.staff:
                self.workers.stop(worker)

    def _deal(self) -> bool:
        """Give each worker a chunk, and one that waits: not all, so that memory stays flat. False if none is left."""
        busy = Counter(place for place, _ in self.running.values())
        for place in [*range(self.count)] * 2:
            if busy[place] == 2:
                continue
            number = self.given_back.popleft() if self.given_back else next(self.fresh, None)
            if number is None:
                break
            try:
                self.running[self.workers.submit(self.staff[place], self.chunks[number])] = place, number
                busy[place] += 1
            except self.workers.dead:  # its death shows in what it has been dealt, if there is something
                self.given_back.appendleft(number)
                if not busy[place]:
                    self._restart(place)
        return bool(self.running or self.given_back)

    def _replace(self, place: int, error: BaseException) -> None:
        lost = [task for task, (at, _) in self.running.items() if at == place]
        numbers = [self.running.pop(task)[1] for task in lost]
        about = _named(self.chunks[numbers[0]])  # the first of them is what it was at
        self.deaths[numbers[0]] += 1
        if self.deaths[numbers[0]] == _LIVES:
            raise RuntimeError(
                f"A worker died at or near {about}, {_LIVES} times: it was killed, or memory ended, on its GPU or the "
                "machine (its output above may say why). Start again, with fewer workers or a smaller batch_tokens; "
                "finished chunks are kept."
            ) from error
        logger.warning("A worker died at or near %s; another one takes them.", about)
        self.given_back.extend(numbers)
        self._restart(place)

    def _restart(self, place: int) -> None:
        self.workers.stop(self.staff[place])
        self.staff[place] = self.workers.start(place, self.count)
