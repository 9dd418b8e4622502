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
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder

from st_wkl.markdown import markdown_code
from st_wkl.record import TrainingRecord

if TYPE_CHECKING:
    from st_wkl.models import AnyModel

_CODE_URL = "https://pypi.org/project/st-wkl/"
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
    training_datasets: set[str] | None,
    adapted_from: str | None = None,
    training_data: str | bool = False,
    languages: Sequence[str] = ("eng-Latn",),
    release_date: str | None = None,
    contacts: Sequence[str] = (),
) -> ModelMeta:
    """Return MTEB's description of a student: sizes are counted on the loaded model, the rest is what is passed.

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
    factory = next((factory for kind, factory in _FACTORIES.items() if isinstance(model, kind)), None)
    if factory is None:
        names = ", ".join(kind.__name__ for kind in _FACTORIES)
        raise TypeError(f"model is a {type(model).__name__}; pass one of {names}")
    known = factory(model)  # loader, type and similarity; what else MTEB takes from a loaded model is not always so
    student: Any = model  # the four classes share these methods, but no base class says so
    parameters = list(student.parameters())
    length = student.get_max_seq_length()
    adapted = bool(getattr(student.transformers_model, "peft_config", None))
    try:
        return ModelMeta(
            loader=known.loader,
            name=name,
            revision=revision,
            release_date=release_date or datetime.now(UTC).date().isoformat(),
            languages=list(languages),
            n_parameters=sum(weight.numel() for weight in parameters),
            n_embedding_parameters=_embedding_parameters(model),
            memory_usage_mb=math.ceil(sum(weight.numel() * weight.element_size() for weight in parameters) / 2**20),
            max_tokens=length if length is not None and math.isfinite(length) else math.inf,
            embed_dim=known.embed_dim,
            license=license.lower() if "://" not in license else license,
            open_weights=True,
            public_training_code=_CODE_URL,
            public_training_data=training_data,
            framework=[*known.framework, "safetensors"],
            reference=f"https://huggingface.co/{name}",
            similarity_fn_name=known.similarity_fn_name,
            use_instructions=any(student.prompts.values()),
            training_datasets=training_datasets,
            adapted_from=adapted_from if adapted_from != name else None,
            model_type=known.model_type,
            contacts=list(contacts) or None,
            extra_requirements_groups=["peft"] if adapted else None,
        )
    except pydantic.ValidationError as error:
        wrong = {".".join(map(str, e["loc"][:1])): e["msg"] for e in error.errors()}
        raise ValueError("MTEB does not accept " + "; ".join(f"{k}: {v}" for k, v in wrong.items())) from error


def _embedding_parameters(model: Any) -> int | None:
    """Count the table of token embeddings, which MTEB takes to be as wide as the output."""
    static = getattr(model[0], "embedding", None)
    table = static if model.transformers_model is None else model.transformers_model.get_input_embeddings()
    return int(table.weight.numel()) if table is not None else None


def known_training_datasets(
    record: TrainingRecord | None, trained_on: Iterable[str] | None = None
) -> tuple[set[str] | None, list[str]]:
    """Return the MTEB tasks whose data a student has seen, itself or through its teacher or its base.

    A distilled student inherits what its teacher learned from, so the leaderboard's zero-shot column is honest only if
    the teacher's training data counts as the student's.

    Args:
        record: How the student was made.
        trained_on: Names of further tasks; an empty list says that there are none beyond what MTEB knows. With None,
            the answer is None (unknown) as soon as MTEB does not know the teacher's, base's or collection's part.

    Returns:
        The tasks, or None for unknown; and a sentence for each part that says where the names come from.

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
    found, notes, complete = set(declared), [], record is not None
    if record is None:
        notes.append("The student carries no record of its training, so its training data is not known.")
    else:
        stated = record.dataset.get("collection")
        collection = str(stated.get("name") if isinstance(stated, Mapping) else stated)
        matching = {
            name for name, path in names.items() if collection in (path, name) or name.lower() == collection.lower()
        }
        found |= matching
        complete &= bool(matching)
        told = f"the MTEB task {', '.join(sorted(matching))}" if matching else "no MTEB task that we recognise"
        notes.append(f"Collection {markdown_code(collection)}: {told}.")
        models = [("Teacher", teacher) for teacher in _models(record.teacher)] + [("Base", record.student)]
        for role, model in models:
            seen = _trained_on(model)
            complete &= seen is not None
            found |= seen or set()
            told = "MTEB does not know what it was trained on" if seen is None else ", ".join(sorted(seen)) or "nothing"
            notes.append(f"{role} {markdown_code(model)}: {told}.")
    if declared:
        notes.append(f"Declared by you: {', '.join(sorted(declared))}.")
    return (found if complete or trained_on is not None else None), notes


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
