"""A whole run as one tree of dataclasses, which is one YAML file."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from st_wkl._files import write_text

FORMAT = 1
T = TypeVar("T")
# YAML 1.1 wants a dot and a sign in 1.0e-3; what people write is 1e-3.
_FLOAT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


@dataclass(frozen=True)
class CollectionConfig:
    """What to learn from.

    Args:
        source: BEIR folder, or Hub id or folder in MTEB's layout.
        split: Split of the judgements to learn from.
        limit: Use the first so many judged queries only.
    """

    source: str
    split: str = "train"
    limit: int | None = None


@dataclass(frozen=True)
class CandidatesConfig:
    """The first stage.

    Args:
        sources: `bm25`, run files of TREC, and retrievers (Hub id, folder or `packaged:` name), fused by rank if there
            are several.
        top_k: Candidates of a query at most.
        num_negatives: Negatives of a training list at most.
    """

    sources: list[str] = field(default_factory=lambda: ["bm25"])
    top_k: int = 100
    num_negatives: int = 15


@dataclass(frozen=True)
class TeacherConfig:
    """The reranker that is distilled.

    Args:
        model: Cross-encoder: Hub id, folder (torch or ONNX), or `packaged:` name.
        max_length: Tokens that it reads of a pair. Default: its own.
        store: SQLite file of scores, which outlives the run. Default: the user's cache.
        engine: Where pairs are scored: `process`, `pool` or `ray`.
    """

    model: str
    max_length: int | None = None
    store: str | None = None
    engine: Literal["process", "pool", "ray"] = "process"


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
    """

    model: str
    name: str | None = None


@dataclass(frozen=True)
class LossConfig:
    """What it is trained with.

    Args:
        name: One of `st_wkl.training.LOSSES`.
        in_batch: Weight of an in-batch contrastive term beside it.
        mini_batch_size: Texts that are embedded at once. Default: 32 for transformers.
        parameters: Parameters of the loss by name, such as `gamma: 2`.
    """

    name: str = "weighted-kl"
    in_batch: float = 0.0
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
        return _read(cls, values, "")

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Read a YAML file."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist. `st-wkl init {path}` writes one to start from.")
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from error
        try:
            return cls.from_dict(values)
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
        """Write a YAML file in one step."""
        return write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the nearest of the right names, nothing if none is near.

    Example:
        >>> nearest("lerning_rate", ["learning_rate", "seed"])
        " (did you mean 'learning_rate'?)"
    """
    found = difflib.get_close_matches(str(name), list(choices), n=1, cutoff=0.6)
    return f" (did you mean {found[0]!r}?)" if found else ""


def check_training_arguments(values: Mapping[str, Any], arguments: type) -> None:
    """Stop at a training argument that does not exist.

    Args:
        values: Arguments by name.
        arguments: The class that takes them.

    Raises:
        ValueError: If one is unknown, or is for the run to decide.
    """
    known = {entry.name for entry in dataclasses.fields(arguments) if entry.init}
    for name in values:
        if name not in known:
            raise ValueError(f"training.{name}: {arguments.__name__} has no such argument{nearest(name, known)}.")
        if name == "output_dir":
            raise ValueError("training.output_dir: set `output` of the run instead; checkpoints go beside the student.")


def _read(kind: type[T], values: Any, where: str) -> T:
    """Make a dataclass from plain values."""
    what = f"{where or 'the configuration'}"
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} has to be keys and values, got {values!r}.")
    hints = get_type_hints(kind)
    entries = {entry.name: entry for entry in dataclasses.fields(kind)}  # type: ignore[arg-type]
    made = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in entries:
            raise ValueError(f"{path}: there is no such key{nearest(str(key), entries)}. Keys: {', '.join(entries)}.")
        made[key] = _convert(value, hints[key], path)
    for name, entry in entries.items():
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and name not in made:
            raise ValueError(f"{f'{where}.{name}' if where else name} is missing.")
    return kind(**made)


def _convert(value: Any, hint: Any, path: str) -> Any:
    """Return a value as the type that a key has, or say that it cannot be one."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        fitting = [option for option in options if option is not type(None)]
        if len(fitting) == 1:
            return _convert(value, fitting[0], path)
        return _first_that_fits(value, fitting, path)
    if origin is Literal:
        if value not in options:
            raise ValueError(f"{path} is {value!r}{nearest(str(value), options)}; it has to be one of {options}.")
        return value
    if dataclasses.is_dataclass(hint):
        return _read(hint, value, path)  # type: ignore[arg-type]
    if hint is float and _is_float(value):
        return float(value)
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _number(entry) for key, entry in value.items()}
    if origin is list and isinstance(value, str):
        return [value]
    kind = origin or hint
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{path} is {value!r}; it has to be of type {kind.__name__}.")
    if origin is list:
        return [_convert(entry, options[0], f"{path}[{number}]") for number, entry in enumerate(value)]
    return value


def _first_that_fits(value: Any, options: list[Any], path: str) -> Any:
    for option in options:
        try:
            return _convert(value, option, path)
        except ValueError:
            continue
    names = ", ".join(getattr(get_origin(option) or option, "__name__", str(option)) for option in options)
    raise ValueError(f"{path} is {value!r}; it has to be one of these types: {names}.")


def _is_float(value: Any) -> bool:
    if isinstance(value, str):
        return bool(_FLOAT.fullmatch(value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and _FLOAT.fullmatch(value) else value


TEMPLATE = """\
# A whole run of st-wkl: `st-wkl run {name}`. Run it again after a crash, and it goes on where it was.
# `--set training.learning_rate=1e-3` overrides a key for one run. Every key has a default except those marked (*).
format: {format}
output: {output}              # (*) everything that the run makes goes here

collection:
  source: {collection}        # (*) BEIR folder, or Hub id or folder in MTEB's layout, such as mteb/nfcorpus
  split: train                # its judgements say what is relevant
  limit: null                 # use the first so many queries only

candidates:
  sources: [bm25]             # also: run files of TREC, retrievers (Hub id, folder, packaged:...); fused by rank
  top_k: 100
  num_negatives: 15           # of a training list, beside all judged positives

teacher:
  model: {teacher}            # (*) cross-encoder: Hub id, folder (torch or ONNX), or packaged:ms-marco-MiniLM-L12-v2
  max_length: 256             # tokens of a pair; null for the model's own
  store: null                 # SQLite file of scores; null for the user's cache, shared by all runs
  engine: process             # process, pool (several processes) or ray

selection:                    # which candidates become negatives
  choice: top                 # top, random or quantiles
  relative_margin: null       # such as 0.95: drop negatives that score higher than this share of the positive
  label_correction: null      # raise_positives or swap_positives, where the teacher contradicts the judgements
  near_duplicates: 0.9        # drop candidates that are nearly the words of a positive

student:
  model: {student}            # (*) Hub id, folder, or packaged:potion-base-8M, packaged:all-MiniLM-L6-v2

loss:
  name: weighted-kl           # `st-wkl train --help` lists all
  in_batch: 0                 # weight of a contrastive term over the batch beside it
  mini_batch_size: null       # texts embedded at once: bounds memory; null for 32 with transformers
  parameters: {{}}              # such as {{gamma: 2, student_temperature: 0.02}}

training: {{}}                  # arguments of sentence-transformers' trainer, such as
                              #   {{learning_rate: 2e-5, num_train_epochs: 3, per_device_train_batch_size: 32}}
lora: false                   # true, or parameters of peft.LoraConfig such as {{r: 32}}
dev: null                     # {{split: dev, patience: 3}}: keep the checkpoint that is best on this split

evaluation:                   # null for none
  tasks: []                   # MTEB names or collections; empty for the collection itself
  split: test
"""


def template(
    name: str = "config.yaml",
    *,
    collection: str = "mteb/nfcorpus",
    teacher: str = "cross-encoder/ms-marco-MiniLM-L12-v2",
    student: str = "minishlab/potion-base-8M",
    output: str = "run",
) -> str:
    """Return a commented configuration to start from.

    Example:
        >>> RunConfig.from_dict(yaml.safe_load(template())).loss.name
        'weighted-kl'
    """
    quoted = {
        key: yaml.safe_dump(value).removesuffix("\n...\n").strip()
        for key, value in {
            "collection": collection, "teacher": teacher, "student": student, "output": output
        }.items()
    }  # fmt: skip
    return TEMPLATE.format(name=name, format=FORMAT, **quoted)
