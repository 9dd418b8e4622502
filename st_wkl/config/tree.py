"""The tree of dataclasses; one YAML file holds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from st_wkl.files import write_text
from st_wkl.ranges import check_arguments, check_options, nearest
from st_wkl.reading import load_yaml, read

FORMAT = 1


@dataclass(frozen=True)
class CollectionConfig:
    """What to learn from.

    Args:
        source: BEIR folder, or Hub id or folder in MTEB's layout.
        split: Split of the judgements to learn from.
        limit: Use the first so many judged queries only.
        missing: `raise` an error for judgements of documents or queries that are not there, or `drop` them, counted.
        ignore_identical_ids: Leave the document of a query's own id out of candidates, lists and results, or not.
            Default: if most queries are documents of the same id and text.
    """

    source: str
    split: str = "train"
    limit: int | None = None
    missing: Literal["raise", "drop"] = "raise"
    ignore_identical_ids: bool | None = None


@dataclass(frozen=True)
class CandidatesConfig:
    """The first stage.

    Args:
        sources: `bm25` or `bm25:k1=0.9,b=0.4`, run files of TREC, and retrievers (Hub id, folder or `packaged:` name),
            fused by rank if there are several.
        top_k: Candidates of a query at most.
        num_negatives: Negatives of a training list at most.
        trust_remote_code: Run code of the retrievers' repositories. Only for those that you have read.
    """

    sources: list[str] = field(default_factory=lambda: ["bm25"])
    top_k: int = 100
    num_negatives: int = 15
    trust_remote_code: bool = False


@dataclass(frozen=True)
class TeacherConfig:
    """The reranker that is distilled.

    Args:
        model: Cross-encoder: Hub id, folder (torch or ONNX), or `packaged:` name.
        max_length: Tokens that it reads of a pair. Default: its own.
        store: SQLite file of scores, which outlives the run. Default: the user's cache.
        engine: Where pairs are scored: `process`, `pool` or `ray`.
        trust_remote_code: Run code of the model's repository. Only for those that you have read.
    """

    model: str
    max_length: int | None = None
    store: str | None = None
    engine: Literal["process", "pool", "ray"] = "process"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class SelectionConfig:
    """Which candidates become negatives; `st_wkl.data.selection.Selection` says what each means.

    Args:
        choice: `top`, `random` or `quantiles`.
        pool_size: Candidates that are looked at for a query.
        relative_margin: Keep negatives below this share of the positive's score.
        absolute_margin: Keep negatives at least so far below the positive's score.
        reference: The `best` or the `worst` positive is what margins are measured from.
        label_correction: `raise_positives`, `swap_positives`, or nothing.
        max_positives: Positives of a list at most.
        near_duplicates: Jaccard coefficient from which on a candidate counts as a copy of a positive.
        seed: Of random choices.
    """

    choice: Literal["top", "random", "quantiles"] = "top"
    pool_size: int | None = None
    relative_margin: float | None = None
    absolute_margin: float | None = None
    reference: Literal["best", "worst"] = "best"
    label_correction: Literal["raise_positives", "swap_positives"] | None = None
    max_positives: int | None = None
    near_duplicates: float | None = 0.9
    seed: int = 0


@dataclass(frozen=True)
class StudentConfig:
    """What is trained.

    Args:
        model: Hub id, folder, or `packaged:` name.
        name: What cards and results call it. Default: its Hub id or folder name.
        trust_remote_code: Run code of the model's repository, whenever it is loaded. Only for those that you have read.
        prompts: What stands before its texts, by `query` and `document` (a cross-encoder: `pair`), in training, dev
            split and evaluation. Default: its own.
        save_dtype: Number type that the trained student is rounded to, `bfloat16` or `float16`. Default: the one that
            it is trained in, float32.
    """

    model: str
    name: str | None = None
    trust_remote_code: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None


@dataclass(frozen=True)
class LossConfig:
    """What it is trained with.

    Args:
        name: One of `st_wkl.training.LOSSES`. Default: `kl`, with an in-batch contrastive term where that is possible.
        in_batch: Weight of an in-batch contrastive term beside it. Default: 1 if no loss is named, otherwise 0.
        mini_batch_size: Texts that are embedded at once. Default: 32 for transformers.
        parameters: Parameters of the loss by name, such as `gamma: 2`.
    """

    name: str | None = None
    in_batch: float | None = None
    mini_batch_size: int | None = None
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DevConfig:
    """In-training evaluation, by which the best checkpoint is kept.

    Args:
        split: Split of the judgements; not the one that is reported.
        max_queries: A random sample of so many queries.
        max_documents: The judged documents and a random sample of others.
        patience: Stop after so many evaluations without a better one. Default: never.
    """

    split: str = "dev"
    max_queries: int | None = None
    max_documents: int | None = None
    patience: int | None = None


@dataclass(frozen=True)
class EvaluationConfig:
    """What before and after are measured on.

    Args:
        tasks: MTEB names, BEIR folders or Hub ids. Default: the collection itself.
        split: Split of collections, and of tasks that have it.
        batch_size: Texts per forward pass.
    """

    tasks: list[str] = field(default_factory=list)
    split: str | None = "test"
    batch_size: int = 32


@dataclass(frozen=True)
class RunConfig:
    """All of a run.

    Args:
        output: Folder for everything that the run makes.
        collection: What to learn from.
        teacher: Who teaches.
        student: Who learns.
        candidates: The first stage.
        selection: Which candidates become negatives.
        loss: What is minimised.
        training: Training arguments by name, those of sentence-transformers; what is not named is as
            `st_wkl.training.default_arguments` has it.
        lora: `true`, or parameters of `peft.LoraConfig`; `false` trains all weights.
        dev: In-training evaluation, or nothing.
        evaluation: What before and after are measured on, or nothing.
        format: Version of this layout.

    Raises:
        ValueError: By `from_dict` and `load`, for unknown keys, values of another type, and newer versions.

    Example:
        >>> parts = {"collection": {"source": "data"}, "teacher": {"model": "t"}, "student": {"model": "s"}}
        >>> RunConfig.from_dict({"output": "out", **parts}).override(["training.learning_rate=1e-3"]).training
        {'learning_rate': 0.001}
    """

    output: str
    collection: CollectionConfig
    teacher: TeacherConfig
    student: StudentConfig
    candidates: CandidatesConfig = field(default_factory=CandidatesConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    training: dict[str, Any] = field(default_factory=dict)
    lora: bool | dict[str, Any] = False
    dev: DevConfig | None = None
    evaluation: EvaluationConfig | None = field(default_factory=EvaluationConfig)
    format: int = FORMAT

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Read the tree from plain values."""
        version = values.get("format", FORMAT) if isinstance(values, Mapping) else FORMAT
        if not isinstance(version, int) or version > FORMAT or version < 1:
            raise ValueError(
                f"The configuration has format {version!r}, and this version of st-wkl reads {FORMAT}. Upgrade st-wkl, "
                "or write the configuration anew with `st-wkl init`."
            )
        config = read(cls, values, "")
        check_options(config.to_dict())
        check_arguments(config.training, config.dev is not None, "training")
        return config

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Read a YAML file."""
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist. `st-wkl init {path}` writes one to start from.")
        try:
            return cls.from_dict(load_yaml(path.read_bytes()))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def override(self, settings: Iterable[str]) -> RunConfig:
        """Return a copy with `path.to.key=value` settings, the values in YAML.

        Raises:
            ValueError: If a setting has no `=`, names no key, or has a value of another type.
        """
        values = self.to_dict()
        for setting in settings:
            path, equals, text = setting.partition("=")
            if not equals:
                raise ValueError(f"--set takes path.to.key=value, got {setting!r}.")
            *parents, key = path.strip().split(".")
            place: Any = values
            for parent in parents:
                if not isinstance(place, dict) or parent not in place:
                    choices = place if isinstance(place, dict) else ()
                    raise ValueError(f"--set {setting}: there is no {parent!r}{nearest(parent, choices)}.")
                if place[parent] is None or place[parent] is False:
                    place[parent] = {}  # a part that was left out is put in
                place = place[parent]
            if not isinstance(place, dict):
                raise ValueError(f"--set {setting}: {'.'.join(parents)} is {place!r} and has no keys.")
            try:
                place[key] = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(f"--set {setting}: the value is not valid YAML ({error}).") from error
        return RunConfig.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, from which `from_dict` makes the same tree."""
        return dataclasses.asdict(self)

    def save(self, path: str | Path) -> Path:
        """Write a YAML file in one step; whoever runs it says anew whose code is trusted."""
        values = self.to_dict()
        for part in values.values():
            if isinstance(part, dict) and "trust_remote_code" in part:
                part["trust_remote_code"] = False
        return write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
