"""Asymmetric students: a small or static query encoder over a document encoder that stays, and with it its index."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, StaticEmbedding

from st_wkl.data.provenance import licence_of
from st_wkl.files import expanded, holds_nothing, replacing_folder, write_text
from st_wkl.losses.make import is_static
from st_wkl.models import load_model, own_prompt, set_prompts
from st_wkl.training.lora import difference, has_adapter

if TYPE_CHECKING:
    from st_wkl.losses.scoring import Student

# What is saved and loaded again differs by nothing but the order of sums.
_TOLERANCE = 1e-5


def asymmetric_student(
    queries: SentenceTransformer | str | Path,
    documents: SentenceTransformer | str | Path,
    texts: Iterable[str],
    *,
    output: str | Path,
    trust_remote_code: bool = False,
) -> Path:
    """Save a student that embeds queries with one encoder and documents with another, whose index stays as it is.

    It is a plain model of sentence-transformers with a `Router`. Least squares takes the query encoder's embeddings of
    some texts to those of the document encoder's model; distillation does the rest:
    `distill(folder, dataset, freeze_documents=True, …)`.

    Args:
        queries: Encoder of the queries: a static one, whose table is moved into the other space, or a transformer,
            which gets a linear layer. Model, folder, Hub id or `packaged:` name; it is not changed.
        documents: Encoder of the documents, likewise. What it embeds is embedded the same ever after.
        texts: What both embed as queries for the least squares: as many different ones as a query embedding has
            numbers, or more; the collection's documents do.
        output: New folder for it.
        trust_remote_code: Run code of the models' repositories. Only for those that you have read.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder holds something.
        TypeError: One of the models has no single embedding of a text.
        ValueError: A model has a `Router` or an adapter, or cuts its embeddings; texts are too few; or what is saved
            gives other embeddings when it is loaded.

    Example:
        >>> folder = asymmetric_student(
        ...     "minishlab/potion-base-8M", "BAAI/bge-m3", collection.documents.values(), output="start"
        ... )  # doctest: +SKIP
        >>> distill(folder, dataset, freeze_documents=True, output_dir="my-student")  # doctest: +SKIP
    """
    if not holds_nothing(folder := Path(expanded(output))):
        raise FileExistsError(f"{folder} is not empty. Choose another folder, or delete it if it may go.")
    encoder, name = _encoder(queries, trust_remote_code)
    index, index_name = _encoder(documents, trust_remote_code)
    kept = list(dict.fromkeys(text for text in texts if text.strip()))
    own = np.asarray(encoder.encode_query(kept), np.float64) if kept else np.zeros((0, 1))
    if len(kept) < own.shape[1]:
        raise ValueError(
            f"{len(kept):,} different texts do not say how {own.shape[1]} dimensions lie in another space: give "
            f"{own.shape[1]} or more, such as the collection's documents."
        )
    goal = np.asarray(index.encode_query(kept), np.float64)
    turned = np.linalg.lstsq(own, goal)[0].astype(np.float32)
    if not np.isfinite(turned).all():
        raise ValueError(f"{name} or {index_name} gives embeddings that are not finite.")
    way = _query_side(encoder, turned, normalised=any(isinstance(module, Normalize) for module in index.children()))
    router = Router.for_query_document(way, list(copy.deepcopy(index).children()))  # type: ignore[arg-type]
    student = SentenceTransformer(modules=[router], similarity_fn_name=index.similarity_fn_name)
    sides = {"query": own_prompt(encoder, "query"), "document": own_prompt(index, "document")}
    set_prompts(student, {side: prompt for side, prompt in sides.items() if prompt})
    licences = dict.fromkeys(filter(None, (licence_of(queries, encoder), licence_of(documents, index))))
    with replacing_folder(folder) as new:
        student.save_pretrained(str(new), create_model_card=False)
        write_text(new / "README.md", _card(name, index_name, list(licences)))
        again: Any = load_model(new, trust_remote_code=trust_remote_code)[0]
        for side in ("encode_query", "encode_document"):
            pair = [[np.asarray(getattr(model, side)(kept[:2]))] for model in (student.eval(), again.eval())]
            if (apart := difference(*pair)) > _TOLERANCE:
                raise ValueError(f"Saved and loaded again, {side} gives other embeddings, by {apart:.2g}.")
    return folder


def _encoder(model: SentenceTransformer | str | Path, trust_remote_code: bool) -> tuple[SentenceTransformer, str]:
    loaded, name = load_model(model, trust_remote_code=trust_remote_code)
    if type(loaded) is not SentenceTransformer:
        raise TypeError(f"{name} is a {type(loaded).__name__}, which has no single embedding of a text.")
    if has_adapter(loaded) or router_of(loaded) is not None or loaded.truncate_dim is not None:
        raise ValueError(
            f"{name} has an adapter (st_wkl.merge makes a plain model of it), sides of its own, or a truncate_dim: "
            "give a plain encoder."
        )
    return loaded, name


def _query_side(encoder: SentenceTransformer, turned: np.ndarray, *, normalised: bool) -> list[Any]:
    """Return the modules of an encoder whose embeddings go through a matrix at the end."""
    end = [Normalize()] if normalised else []
    if is_static(encoder):
        first: Any = encoder[0]
        before = first.embedding.weight.detach().float().cpu().numpy()
        table = before @ turned
        if normalised:  # of the length that it had, so that a learning rate which suits the one suits the other
            table *= np.linalg.norm(before, axis=1).mean() / np.linalg.norm(table, axis=1).mean()
        return [StaticEmbedding(first.tokenizer, embedding_weights=table), *end]
    modules = list(copy.deepcopy(encoder).children())
    weight = torch.from_numpy(turned.T.copy())
    linear = Dense(
        len(turned), turned.shape[1], bias=False, activation_function=torch.nn.Identity(), init_weight=weight
    )
    return [*modules, linear, *end]


def _card(queries: str, documents: str, licences: list[str]) -> str:
    """Return a card that says what this is: without it, the results of either would be taken for its own."""
    based = [name for name in (queries, documents) if "/" in name]
    front = ["base_model:", *(f"- {name}" for name in based)] if based else []
    front += [f"license: {licences[0]}"] if len(licences) == 1 else []
    head = "---\n" + "\n".join(front) + "\n---\n\n" if front else ""
    told = f" Their licences: {', '.join(licences)}." if len(licences) > 1 else ""
    return (
        f"{head}# {queries} for queries, {documents} for documents\n\nThe query encoder was taken into the space of "
        f"the document encoder by least squares, to start a distillation with. It was not trained since.{told}\n"
    )


def router_of(student: Student) -> Router | None:
    """Return what sends queries and documents to encoders of their own, None where one encodes both."""
    return next((module for module in student.children() if isinstance(module, Router)), None)


@contextmanager
def frozen_documents(student: Student) -> Iterator[None]:
    """Leave the document encoder of an asymmetric student as it is while the query encoder is trained.

    Args:
        student: With a `Router`; its document side computes as in use, without dropout, until the end.

    Raises:
        ValueError: It has no document side of its own, or layers that both sides go through.
    """
    router = router_of(student)
    sides: Any = {} if router is None else router.sub_modules
    if "query" not in sides or "document" not in sides:
        raise ValueError(
            "freeze_documents is for a student with one encoder for queries and another for documents; "
            "asymmetric_student makes one."
        )
    documents = sides["document"]
    weights = {id(weight) for weight in documents.parameters()}
    shared = [module for module in student.children() if module is not router and list(module.parameters())]
    if shared or any(id(weight) in weights for weight in sides["query"].parameters()):
        raise ValueError("The student's sides share weights, so documents cannot stay as they are: train both.")
    documents.eval().requires_grad_(False)
    documents.train = lambda mode=True: documents  # a trainer turns dropout on before each step
    try:
        yield
    finally:
        del documents.train
