"""A student's entry in MTEB's registry of models: `ModelMeta`, with every field that a reviewer asks for.

Source: https://github.com/embeddings-benchmark/mteb/blob/main/docs/contributing/adding_a_model.md
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Any

import mteb
import pydantic
from mteb.models import ModelMeta
from mteb.types import OutputDType
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Router
from torch import nn
from transformers import PreTrainedModel

from st_wkl.markdown import is_hub_id, markdown_code
from st_wkl.record import TrainingRecord, collection_of

if TYPE_CHECKING:
    from st_wkl.models import AnyModel

_SHAPES = {
    "name": (r"[A-Za-z0-9][\w.-]*/[\w.-]+", "org/name"),
    "revision": (r"[0-9a-f]{40}", "the 40 hexadecimal digits of a commit on the Hub"),
}
_FACTORIES: dict[type, Callable[..., ModelMeta]] = {
    SparseEncoder: ModelMeta.from_sparse_encoder_model,
    MultiVectorEncoder: ModelMeta.from_multi_vector_encoder_model,
    CrossEncoder: ModelMeta.from_cross_encoder,
    SentenceTransformer: ModelMeta.from_sentence_transformer_model,
}


def model_meta(
    model: AnyModel,
    *,
    name: str,
    revision: str,
    license: str,
    training_datasets: Iterable[str] | None,
    adapted_from: str | None = None,
    training_data: str | bool = False,
    languages: Sequence[str] = ("eng-Latn",),
    release_date: str | None = None,
    contacts: Sequence[str] = (),
    citation: str | None = None,
    superseded_by: str | None = None,
    record: TrainingRecord | None = None,
) -> ModelMeta:
    """Return MTEB's description of a student: sizes are counted on the loaded model, the rest is what is passed.

    A student that was trained with `matryoshka` has all its dimensions in `embed_dim`, one with weights of another type
    than float32 has it in `output_dtypes`, and an asymmetric one is a router, whose active parameters are those of a
    query. `public_training_code` is the version of this package that trained it.

    Args:
        model: The student, loaded, of any of the four model classes.
        name: Its id on the Hub, `"org/name"`.
        revision: Commit of the Hub, 40 hexadecimal digits.
        license: An id that MTEB knows, such as `"apache-2.0"`, or a URL.
        training_datasets: What `known_training_datasets` returns.
        adapted_from: Hub id of the model that training started from; MTEB adds what that one was trained on.
        training_data: URL of the training data, or whether it is public.
        languages: As MTEB writes them, language and script.
        release_date: `YYYY-MM-DD`. Default: today in UTC.
        contacts: GitHub handles of those who answer for the model.
        citation: BibTeX of articles that exist.
        superseded_by: Hub id of the model that is to be used in its place.
        record: How the student was made.

    Raises:
        ValueError: If MTEB does not accept a field; the message names each with the reason.

    Example:
        >>> meta = model_meta(SentenceTransformer("student"), name="lab/student", revision=commit,
        ...                   license="apache-2.0", training_datasets={"MSMARCO"})  # doctest: +SKIP
    """
    for field, (shape, wanted) in _SHAPES.items():
        if not re.fullmatch(shape, given := {"name": name, "revision": revision}[field]):
            raise ValueError(f"{field} is {given!r}; MTEB needs {wanted}")
    if release_date is not None:
        date.fromisoformat(release_date)
    if citation is not None and not re.match(r"\s*@\w+\s*\{\s*[^\s,{}]+\s*,", citation):
        raise ValueError(f"citation is {citation[:60]!r}; MTEB needs BibTeX, such as @article{{key, title = ...}}")
    if superseded_by is not None and (not is_hub_id(superseded_by) or superseded_by == name):
        raise ValueError(f"superseded_by is {superseded_by!r}; MTEB needs the id of another model, org/name")
    factory = next((factory for kind, factory in _FACTORIES.items() if isinstance(model, kind)), None)
    if factory is None:
        names = ", ".join(kind.__name__ for kind in _FACTORIES)
        raise TypeError(f"model is a {type(model).__name__}; pass one of {names}")
    known = factory(model)  # loader, type and similarity; what else MTEB takes from a loaded model is not always so
    student: Any = model  # the four classes share these methods, but no base class says so
    parameters = list(student.parameters())
    router = next((module for module in student.modules() if isinstance(module, Router)), None)
    readers = [next(iter(way.children())) for way in router.sub_modules.values()] if router else [student]
    lengths = [length for reader in readers if (length := getattr(reader, "max_seq_length", None)) is not None]
    dtype = str(student.dtype).removeprefix("torch.")
    adapted = bool(getattr(student.transformers_model, "peft_config", None))
    try:
        return ModelMeta(
            loader=known.loader,
            name=name,
            revision=revision,
            release_date=release_date or datetime.now(UTC).date().isoformat(),
            languages=list(languages),
            n_parameters=sum(weight.numel() for weight in parameters),
            n_active_parameters_override=_active_for_a_query(student, router),
            n_embedding_parameters=_embedding_parameters(student),
            memory_usage_mb=math.ceil(sum(weight.numel() * weight.element_size() for weight in parameters) / 2**20),
            max_tokens=min(lengths, default=math.inf),
            embed_dim=_dimensions(known.embed_dim, record),
            license=license.lower() if "://" not in license else license,
            open_weights=True,
            public_training_code=training_code(record),
            public_training_data=training_data,
            framework=[*known.framework, "safetensors"],
            reference=f"https://huggingface.co/{name}",
            similarity_fn_name=known.similarity_fn_name,
            use_instructions=any(student.prompts.values()),
            training_datasets=None if training_datasets is None else set(training_datasets),
            adapted_from=adapted_from if adapted_from != name else None,
            superseded_by=superseded_by,
            model_type=["router"] if router and known.model_type == ["dense"] else known.model_type,
            citation=citation,
            output_dtypes=None if dtype == "float32" else [OutputDType(dtype)],
            contacts=list(contacts) or None,
            extra_requirements_groups=["peft"] if adapted else None,
        )
    except pydantic.ValidationError as error:
        wrong = {".".join(map(str, e["loc"][:1])): e["msg"] for e in error.errors()}
        raise ValueError("MTEB does not accept " + "; ".join(f"{k}: {v}" for k, v in wrong.items())) from error


def training_code(record: TrainingRecord | None) -> str | None:
    """Return where the version of this package is that trained a student; None where nobody knows what did."""
    version = (record.versions if record else {}).get("st-wkl")
    return None if record is None else "https://pypi.org/project/st-wkl/" + (f"{version}/" if version else "")


def _dimensions(full: Any, record: TrainingRecord | None) -> Any:
    """Return the dimensions that embeddings can be used at, a list where training has made several."""
    trained = record.loss_config.get("matryoshka_dims") if record and full else None
    sizes = sorted({*(size for size in trained or () if size <= full), full}) if full else []
    return sizes if len(sizes) > 1 else full


def _active_for_a_query(student: Any, router: Router | None) -> int | None:
    """Return what a query is computed with in a model that takes another way for documents; None for all others."""
    if router is None or "query" not in router.sub_modules:
        return None
    others = {id(weight) for name, way in router.sub_modules.items() if name != "query" for weight in way.parameters()}
    own = {id(weight) for weight in router.sub_modules["query"].parameters()}
    taken = others - own | {id(table) for table in _token_tables(student)}
    return sum(weight.numel() for weight in student.parameters() if id(weight) not in taken)


def _embedding_parameters(student: Any) -> int | None:
    """Count the tables of token embeddings, those of both ways of a router; positions are no part, as MTEB counts."""
    return sum(table.numel() for table in _token_tables(student)) or None


def _token_tables(student: Any) -> list[nn.Parameter]:
    tables: dict[int, Any] = {}
    for module in student.modules():
        if isinstance(module, nn.EmbeddingBag):
            tables[id(module.weight)] = module.weight
        elif isinstance(module, PreTrainedModel) and (table := module.get_input_embeddings()) is not None:
            tables[id(table.weight)] = table.weight
    return list(tables.values())


def known_training_datasets(
    record: TrainingRecord | None, trained_on: Iterable[str] | None = None
) -> tuple[dict[str, list[str]] | None, list[str]]:
    """Return the MTEB tasks whose data a student has seen, each with the part through which: itself, teacher or base.

    A distilled student inherits what its teacher learned from, so the leaderboard's zero-shot column is honest only if
    the teacher's training data counts as the student's.

    Args:
        record: How the student was made.
        trained_on: Names of further tasks; an empty list says that there are none beyond what MTEB knows. With None,
            the answer is None (unknown) as soon as MTEB does not know the teacher's, base's or collection's part.

    Returns:
        Each task with the parts that have seen it, or None for unknown; and a sentence for each part that says where
        the names come from.

    Raises:
        ValueError: If a name in `trained_on` is no MTEB task; the nearest ones are given.
    """
    names = _task_datasets()
    declared = set(trained_on or ())
    for name in declared - names.keys():
        near = difflib.get_close_matches(name, names, n=3)
        raise ValueError(
            f"trained_on: MTEB has no task {name!r}" + (f"; did you mean {', '.join(near)}?" if near else "")
        )
    parts: list[tuple[str, set[str] | None, str]] = []
    if record is not None:
        for collection in dict.fromkeys(map(collection_of, record.datasets.values())):
            matching = {
                name for name, path in names.items() if collection in (path, name) or name.lower() == collection.lower()
            }
            told = f"the MTEB task {', '.join(sorted(matching))}" if matching else "no MTEB task that we recognise"
            parts.append((f"Collection {markdown_code(collection)}", matching or None, told))
        identities = [record.teacher, *(data.get("teacher") for data in record.datasets.values())]
        teachers = dict.fromkeys(("Teacher", model) for model in _models(identities))
        for role, model in [*teachers, ("Base", record.student)]:
            seen = _trained_on(model)
            told = "MTEB does not know what it was trained on" if seen is None else ", ".join(sorted(seen)) or "nothing"
            parts.append((f"{role} {markdown_code(model)}", seen, told))
    notes = [f"{part}: {told}." for part, _, told in parts]
    if record is None:
        notes.append("The student carries no record of its training, so its training data is not known.")
    if declared:
        notes.append(f"Declared by you: {', '.join(sorted(declared))}.")
    if trained_on is None and (record is None or any(seen is None for _, seen, _ in parts)):
        return None, notes
    found: dict[str, list[str]] = {}
    for part, seen, _ in [*parts, ("declared", declared, "")]:
        for name in sorted(seen or ()):
            found.setdefault(name, []).append(part[0].lower() + part[1:])
    return found, notes


@functools.cache
def _task_datasets() -> dict[str, str | None]:
    """Return the dataset on the Hub of every task that MTEB has."""
    tasks = mteb.get_tasks(exclude_superseded=False, exclude_private=False)
    return {task.metadata.name: task.metadata.dataset.get("path") for task in tasks}


def _models(identity: Any) -> Iterator[str]:
    """Yield the ids of the models that a teacher consists of."""
    if isinstance(identity, Mapping):
        for key, value in identity.items():
            if key == "model" and isinstance(value, str):
                yield value
            else:
                yield from _models(value)
    elif isinstance(identity, list | tuple):
        for value in identity:
            yield from _models(value)


def _trained_on(model: str) -> set[str] | None:
    """Return what MTEB says that a registered model and its ancestors were trained on; None for unknown.

    Without the translations and subsets of these tasks, which MTEB adds itself.
    """
    try:
        meta = mteb.get_model_meta(model)
    except (KeyError, ValueError):
        return None
    if meta.training_datasets is None:
        return None
    return meta.training_datasets | ((_trained_on(meta.adapted_from) if meta.adapted_from else None) or set())
