"""What each stage of a run may be told: one dataclass a stage, from which command line, YAML and `init` are made.

An option is added here and nowhere else: the field with its default, and what it means in the docstring.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import docstring_parser
import yaml

from st_wkl.data.selection import Selection
from st_wkl.files import write_text
from st_wkl.ranges import OptionError, check_arguments, check_options
from st_wkl.reading import load_yaml, overridden, read

FORMAT = 1


@dataclass(frozen=True)
class CollectionConfig:
    """What to learn from.

    Args:
        source: BEIR folder, or Hub id or folder in MTEB's layout.
        split: Split of the judgements to learn from.
        queries: Queries to learn from that nobody has judged, in place of that split: a text file with one in a line
            (`.txt`, `.log`), or a table. The source may then be documents alone. Default: the collection's own.
        limit: Use the first so many queries only.
        missing: `raise` an error for judgements of documents or queries that are not there, or `drop` them, counted.
        ignore_identical_ids: Leave the document of a query's own id out of candidates, lists and results, or not.
            Default: if most queries are documents of the same id and text.
        revision: Branch, tag or commit of a Hub id. Default: the newest.
        against: Test split that the dataset is compared with: what both share is counted and said.
        drop_leaks: Leave out queries and positives that the test split shares.
    """

    source: str
    split: str = "train"
    queries: str | None = None
    limit: int | None = None
    missing: Literal["raise", "drop"] = "raise"
    ignore_identical_ids: bool | None = None
    revision: str | None = None
    against: str | None = "test"
    drop_leaks: bool = False

    def __post_init__(self) -> None:
        """Refuse what would be ignored."""
        if self.queries is not None and self.split != "train":
            raise OptionError(
                "split", f"is {self.split!r}, and queries that nobody has judged take its place: leave it out."
            )


@dataclass(frozen=True)
class CandidatesConfig:
    """The first stage: which documents the teacher is asked about.

    Args:
        sources: `bm25` or `bm25:k1=0.9,b=0.4`, run files of TREC, and retrievers (Hub id, folder or `packaged:` name),
            fused by rank if there are several.
        top_k: Candidates of a query at most.
        num_negatives: Hard negatives of a training list at most, beside all judged positives. 15 is a common size.
        trust_remote_code: Run code of the retrievers' repositories. Only for those that you have read.
    """

    sources: list[str] = field(default_factory=lambda: ["bm25"])
    top_k: int = 100
    num_negatives: int = 15
    trust_remote_code: bool = False


# Options of a teacher that is loaded here, and of requests to one that is not.
_ASKED = frozenset("backend dtype batch_tokens device prompt model_kwargs".split())  # noqa: SIM905
_HERE = _ASKED | {"kind", "engine", "workers", "trust_remote_code"}
_LIMITS, _PRICES = "timeout give_up_after concurrency requests_per_minute", "1000_requests million_tokens"
REQUESTS = (*_LIMITS.split(), *(f"price_per_{what}" for what in _PRICES.split()))
_THERE = frozenset(("api", "activation", "api_key_env", *REQUESTS))


@dataclass(frozen=True)
class TeacherConfig:
    """The reranker that is distilled.

    Args:
        model: Cross-encoder: Hub id, folder (torch or ONNX), or `packaged:` name. Several are calibrated and mixed.
            With a url what the server calls it, which one that has a single model says itself.
        kind: `cross-encoder`, or `retriever`: a bi-encoder, sparse encoder or ColBERT, which teaches by its similarity.
        calibration: How the scores of several teachers become comparable, in each list: by `z-score`, since logits of
            two models share no scale, `min-max`, `rank` or `none`.
        weights: One for each of several teachers. Default: all alike.
        max_length: Tokens that it reads of a pair. Default: its own. 256 halves the time on long documents.
        backend: `torch`, `onnx`, `vllm` (with max_length and dtype), or `auto`: ONNX for a folder with nothing else.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: bfloat16 where it is fast. Default: the model's own.
        batch_tokens: Tokens of one forward pass. Default: what suits the device; lower it when memory ends.
        device: `cpu`, `cuda`, … Default: the fastest.
        revision: Branch, tag or commit of a Hub id. Default: the newest.
        prompt: Instruction for rerankers that take one, or what a chat model is asked. Default: the model's own.
        model_kwargs: What transformers is told besides when it loads the model: `{attn_implementation: eager}` or
            `{quantization_config: {load_in_4bit: true}}`. Default: nothing.
        pairwise: Cross-encoder whose scores say which of two neighbours is better, for `pair-distill`; packaged and
            others, or the teacher's own name. Default: no preferences.
        pairs_per_query: Pairs that it is asked about. Default: all within 5 ranks, about 5 for each document.
        store: SQLite file of scores, which outlives the run. Default: the user's cache, shared by all runs.
        engine: Where pairs are scored: in this `process`, a `pool` of processes, or on `ray`.
        workers: Processes of the pool, or actors on Ray. Default: one for each GPU, 2 where there is none.
        trust_remote_code: Run code of the model's repository. Only for those that you have read.
        url: Server that scores, such as http://127.0.0.1:8000, in place of this machine.
        api: What it speaks: `vllm` (/score), `tei`, the /v1/rerank of others (`openai-rerank`), `cohere`, `jina`,
            `voyage`, or a chat model that ranks lists (`chat`). Default: what it says of itself.
        activation: What the server does to logits: `identity`, `sigmoid` (turned back), or `auto`, which finds out.
        api_key_env: Environment variable with the key. Default: the usual one, for that company's own servers.
        timeout: Seconds of one request.
        give_up_after: Seconds in which requests are made again to a server that is away or asks to wait.
        concurrency: Requests at once.
        requests_per_minute: At most. Default: no limit.
        price_per_1000_requests: For estimates and progress. Default: not told.
        price_per_million_tokens: The same, where the server counts tokens.
        pairwise_url: Server with a chat API, whose model `pairwise` is asked which of two neighbours is better.
    """

    model: str | list[str] | None = None
    kind: Literal["cross-encoder", "retriever"] = "cross-encoder"
    calibration: Literal["z-score", "min-max", "rank", "none"] = "z-score"
    weights: list[float] | None = None
    max_length: int | None = None
    backend: Literal["auto", "torch", "onnx", "vllm"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    batch_tokens: int | None = None
    device: str | None = None
    revision: str | None = None
    prompt: str | None = None
    model_kwargs: dict[str, Any] | None = None
    pairwise: str | None = None
    pairs_per_query: int | None = None
    store: str | None = None
    engine: Literal["process", "pool", "ray"] = "process"
    workers: int | None = None
    trust_remote_code: bool = False
    url: str | None = None
    api: Literal["auto", "vllm", "tei", "openai-rerank", "cohere", "jina", "voyage", "chat"] = "auto"
    activation: Literal["auto", "identity", "sigmoid"] = "auto"
    api_key_env: str | None = None
    timeout: float = 60.0
    give_up_after: float = 300.0
    concurrency: int = 8
    requests_per_minute: int | None = None
    price_per_1000_requests: float | None = None
    price_per_million_tokens: float | None = None
    pairwise_url: str | None = None

    def __post_init__(self) -> None:
        """Refuse what would be ignored."""
        told = {entry.name for entry in dataclasses.fields(self) if getattr(self, entry.name) != entry.default}
        if self.url is None and self.model is None:
            raise OptionError("model", "is missing.")
        refused = _THERE - (set(REQUESTS) | {"api_key_env"} if self.pairwise_url else set())
        if self.url is not None:
            refused = _HERE ^ {"prompt", "activation", "max_length"} if self.api == "chat" else _HERE
            refused |= {"model"} if isinstance(self.model, list) else set()
        for name in sorted(told & refused):
            raise OptionError(name, f"means nothing {'for a teacher with a url' if self.url else 'without a url'}.")
        for name in sorted(told & (_ASKED | {"max_length", "revision"}) if self.kind == "retriever" else ()):
            raise OptionError(
                name, "means nothing for a retriever, which keeps its own: save one that has what you want."
            )
        if self.pairwise_url is not None and self.pairwise is None:
            raise OptionError("pairwise_url", "means nothing without the model that is asked: name it as pairwise.")
        if self.workers is not None and self.engine == "process":
            raise OptionError("workers", f"is {self.workers}, and one process scores: set the engine to pool or ray.")
        if self.pairs_per_query is not None and self.pairwise is None:
            raise OptionError("pairs_per_query", "means nothing without a pairwise teacher: name one as pairwise.")
        if len(self.models) <= 1 and (self.weights is not None or self.calibration != "z-score"):
            option = "calibration" if self.weights is None else "weights"
            raise OptionError(option, "means nothing for one teacher: name several, or leave it out.")

    @property
    def models(self) -> list[str]:
        """The names of all teachers that are loaded here."""
        if self.model is None or self.url is not None:
            return []
        return [self.model] if isinstance(self.model, str) else list(self.model)


@dataclass(frozen=True)
class StudentConfig:
    """What is trained.

    Args:
        model: Student: Hub id, folder, or packaged:potion-base-8M, packaged:all-MiniLM-L6-v2.
        layers: Layers of a transformer that stay, evenly from the first to the last: 3 of 6 take half of its time, and
            are taught what was lost. Default: all.
        name: What cards and results call it. Default: its Hub id or folder name.
        trust_remote_code: Run code of the model's repository, whenever it is loaded. Only for those that you have read.
        prompts: What stands before its texts, by `query` and `document` (a cross-encoder: `pair`), in training, dev
            split and evaluation; kept with the student. Default: its own.
        freeze_documents: Leave the document encoder of an asymmetric student as it is, and with it the index.
        save_dtype: Number type that the trained student is rounded to, `bfloat16` or `float16`. Default: the one that
            it is trained in, float32.
    """

    model: str
    layers: int | None = None
    name: str | None = None
    trust_remote_code: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    freeze_documents: bool = False
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None


@dataclass(frozen=True)
class LossConfig:
    """What is minimised.

    Args:
        name: `kl`, `weighted-kl`, `margin-kl`, `pair-distill`, `adaptive-margin`, `pearson`, `margin-mse`, `mse`,
            `rank-net`, `regularised-kl`, `list-contrastive`, `in-batch` or `embedding`, the last two also added to
            another one, as in `kl+in-batch`. Default: that, or `kl` alone where a student has no single embedding for a
            text; with an embedding_teacher also `+embedding`.
        in_batch: Weight of an in-batch contrastive term beside it. Default: 1 if no loss is named, otherwise 0.
        mini_batch_size: Texts that are embedded at once, which bounds memory. Default: 32 for transformers.
        matryoshka: Dimensions to which embeddings can be cut after training, such as `[256,128,64]`. Default: none.
        negatives_per_step: Negatives of a list that a step sees, drawn anew for each epoch. Default: all.
        draw: How they are drawn: `random`, by `quantiles` of the teacher's scores, or its `top`.
        embedding_teacher: Bi-encoder whose embeddings of all texts teach, for `embedding`: Hub id, folder or
            `packaged:` name. They are computed once and kept in the user's cache. Default: none.
        parameters: Parameters of the loss by name, such as `gamma: 2` or `student_temperature: 0.02`.
        each: For one of several datasets, by its name, another loss, `{squad: margin-mse}`, or other options of this
            one, `{squad: {parameters: {teacher_temperature: 2}}}`. Default: one loss for all.
    """

    name: str | None = None
    in_batch: float | None = None
    mini_batch_size: int | None = None
    matryoshka: list[int] | None = None
    negatives_per_step: int | None = None
    draw: Literal["top", "random", "quantiles"] = "random"
    embedding_teacher: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    each: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what would be ignored."""
        if self.draw != "random" and self.negatives_per_step is None:
            raise OptionError("draw", f"is {self.draw}, and a step sees all negatives: set negatives_per_step.")


@dataclass(frozen=True)
class DevConfig:
    """In-training evaluation, by which the best checkpoint is kept.

    Args:
        source: Collection with the dev split. Default: that of the run.
        split: Split of the judgements; not the one that is reported.
        missing: As for the collection, where it is another one.
        ignore_identical_ids: Likewise.
        max_queries: A random sample of so many queries.
        max_documents: The judged documents and a random sample of others.
        seed: Seed of both samples.
        batch_size: Texts per forward pass.
        patience: Stop after so many evaluations without a better one. Default: never.
    """

    source: str | None = None
    split: str = "dev"
    missing: Literal["raise", "drop"] = "raise"
    ignore_identical_ids: bool | None = None
    max_queries: int | None = None
    max_documents: int | None = None
    seed: int = 0
    batch_size: int = 32
    patience: int | None = None


@dataclass(frozen=True)
class EvaluationConfig:
    """What before and after are measured on.

    Args:
        tasks: MTEB tasks by name, BEIR folders or Hub ids. Default: the collection itself.
        split: Split of collections, and of tasks that have it.
        missing: As for the collection, where tasks are others.
        ignore_identical_ids: Leave the document of a query's own id out of results, or not. Default: as the task says.
        first_stage: What finds the candidates to rerank: bm25, a run file, a retriever. Cross-encoders need one.
        top_k: Candidates of a query from the first stage. Default: 100.
        batch_size: Texts per forward pass.
        cache: Folder to keep MTEB's results and rankings in, by the model's weights. Default: none.
        datasets: Folder with the data of MTEB's tasks, each in one called after its task. Default: the Hub.
        efficiency: Measure speed and index size, too.
    """

    tasks: list[str] = field(default_factory=list)
    split: str | None = "test"
    missing: Literal["raise", "drop"] = "raise"
    ignore_identical_ids: bool | None = None
    first_stage: str | None = None
    top_k: int | None = None
    batch_size: int = 32
    cache: str | None = None
    datasets: str | None = None
    efficiency: bool = False

    def __post_init__(self) -> None:
        """Refuse what would be ignored."""
        if self.top_k is not None and self.first_stage is None:
            raise OptionError("top_k", f"is {self.top_k}, and nothing is reranked: name a first_stage.")


@dataclass(frozen=True, repr=False)
class RunConfig:
    """All of a run.

    Args:
        output: Folder for everything that the run makes.
        collection: What to learn from.
        teacher: Who teaches by its scores; `null` where nobody does, and an embedding teacher alone teaches the
            collection's texts, without candidates.
        student: Who learns.
        candidates: The first stage.
        selection: Which candidates become negatives.
        datasets: Further datasets that are trained on beside the one that is made here, folders or Hub ids by name,
            `{squad: squad-scored}`, or as a list, `[squad=squad-scored]`. Default: none.
        loss: What is minimised.
        training: Training arguments by name, those of sentence-transformers, such as `{learning_rate: 2e-5,
            num_train_epochs: 3}`; what is not named is as `st_wkl.training.default_arguments` has it.
        lora: `true`, or parameters of `peft.LoraConfig` such as `{r: 32}`; `false` trains all weights.
        merge: Merge the trained adapter into a plain model; the adapter is kept beside it in `student-adapter`.
        dev: Evaluation in training such as `{split: dev, patience: 3}`, which keeps the best checkpoint, or nothing.
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
    teacher: TeacherConfig | None
    student: StudentConfig
    candidates: CandidatesConfig = field(default_factory=CandidatesConfig)
    selection: Selection = field(default_factory=Selection)
    datasets: dict[str, str] | list[str] = field(default_factory=dict)
    loss: LossConfig = field(default_factory=LossConfig)
    training: dict[str, Any] = field(default_factory=dict)
    lora: bool | dict[str, Any] = False
    merge: bool = False
    dev: DevConfig | None = None
    evaluation: EvaluationConfig | None = field(default_factory=EvaluationConfig)
    format: int = FORMAT

    def __post_init__(self) -> None:
        """Refuse what would be ignored."""
        if self.datasets and self.teacher is None:
            raise OptionError("datasets", "are trained on beside one with a teacher's scores: name a teacher.")
        if self.merge and self.lora is False:
            raise OptionError("merge", "merges an adapter: set lora.")
        if self.teacher is None and (self.loss.embedding_teacher is None or self.loss.name not in (None, "embedding")):
            raise OptionError("teacher", "is missing: without scores, a loss.embedding_teacher alone can teach.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Read the tree from plain values."""
        version = values.get("format", FORMAT) if isinstance(values, Mapping) else FORMAT
        if not isinstance(version, int) or version > FORMAT or version < 1:
            raise ValueError(
                f"The configuration has format {version!r}, and this version of st-wkl reads {FORMAT}. Upgrade st-wkl, "
                "or write the configuration anew with `st-wkl init`."
            )
        config = read(cls, values)
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
        return RunConfig.from_dict(overridden(self.to_dict(), settings))

    def __repr__(self) -> str:
        teacher = self.loss.embedding_teacher if self.teacher is None else self.teacher.model or self.teacher.url
        way = " → ".join(map(str, (self.collection.source, teacher, self.student.model)))
        return f"RunConfig: {way}, in {self.output}"

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


def described(kind: type) -> dict[str, str]:
    """Return what the docstring of a stage's options says of each, in one line."""
    parsed = docstring_parser.parse(kind.__doc__ or "", docstring_parser.DocstringStyle.GOOGLE)
    return {entry.arg_name: " ".join((entry.description or "").split()) for entry in parsed.params}
