"""Embedding distillation: the student's vectors beside those of a teacher, which were stored before."""

from __future__ import annotations

import os
from dataclasses import KW_ONLY
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from safetensors.torch import save_file
from sentence_transformers import SparseEncoder
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss
from sentence_transformers.util import SimilarityFunction
from torch import Tensor, nn

import st_wkl.functional as functional
from st_wkl.losses.cached import StudentLoss
from st_wkl.losses.lists import holds_lists, of_texts, vectors_of
from st_wkl.losses.options import spelled_out
from st_wkl.losses.scoring import BOUNDED_TEMPERATURE, is_bounded, model_similarity

PROJECTION_FILE = "projection.safetensors"


class Vectors(Protocol):
    """What the loss asks of a teacher's stored vectors, as `VectorStore.embed` returns them."""

    name: str

    @property
    def dimension(self) -> int:
        """Numbers in a vector."""

    @property
    def similarity(self) -> str:
        """What the teacher compares vectors by."""

    def principal(self, dimension: int) -> np.ndarray:
        """Return the orthonormal directions in which they are longest."""


@spelled_out
class EmbeddingDistillLoss(StudentLoss):
    """The teacher's own embedding of each text as what the student's shall be, from stored vectors.

    No scores and no judgements are needed: queries, documents, or any texts teach. The vectors come with each batch,
    from `ListwiseCollator(model, vectors=vectors)`; `distill(…, "embedding", embedding_teacher=…)` does all of it.
    Distances and the learned projection are upstream's `EmbedDistillLoss`, averaged over queries and documents alike.

    Args:
        model: The student, a `SentenceTransformer`; a `SparseEncoder` learns relations alone.
        vectors: The teacher's vectors.
        distance_metric: `"cosine"`, 1 − the cosine of the two vectors; `"mse"`, `"l2"`; or `"relational"`, KL from the
            teacher's similarities in the batch to the student's, which needs no common space: of each query to all
            documents, or, where rows are single texts, of each text to all others. Default: `"cosine"`, relations for
            a `SparseEncoder`.
        projection: Where the dimensions differ: `"pca"` turns the teacher's vectors onto as many orthonormal directions
            as the student has dimensions, those in which they are longest, once; `"learned"` puts a linear layer on the
            student that is trained with it and is part of the loss. Default: PCA where the teacher has more dimensions,
            a learned layer where it has fewer.
        student_temperature: Divides the student's similarities. Default: 0.05 for cosines, 1 for any other.
        teacher_temperature: Divides the teacher's similarities. Default: likewise.

    Raises:
        ValueError: If the student has no single embedding per text, a projection cannot be, or at training time if a
            batch comes without vectors.

    Source:
        Kim et al.: EmbedDistill, https://arxiv.org/abs/2301.12005 (distances); Park et al.: Relational Knowledge
        Distillation, https://arxiv.org/abs/1904.05068, in the form of a softmax.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> student = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> vectors = VectorStore().embed("Qwen/Qwen3-Embedding-0.6B", {"document": texts})  # doctest: +SKIP
        >>> loss = EmbeddingDistillLoss(student, vectors)  # doctest: +SKIP
    """

    vectors: Vectors
    distance_metric: Literal["cosine", "mse", "l2", "relational"] | None = None
    projection: Literal["pca", "learned"] | None = None
    _: KW_ONLY
    student_temperature: float = None  # type: ignore[assignment]  # a number once the similarity is known
    teacher_temperature: float = None  # type: ignore[assignment]

    shown = ("distance_metric", "projection")
    paper = "kim2023embeddistill"

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = type(self.model).__name__
        if self.output != "embedding":
            raise ValueError(f"EmbeddingDistillLoss compares single embeddings, which a {kind} does not have.")
        sparse = isinstance(self.model, SparseEncoder)
        if self.distance_metric is None:
            self.distance_metric = "relational" if sparse else "cosine"
        self.upstream: EmbedDistillLoss | None = None
        self.register_buffer("axes", None)
        if self.distance_metric == "relational":
            self._prepare_relations()
        elif sparse:
            raise ValueError(
                f"The dimensions of a {kind} are words, and {self.vectors.name}'s are not: a sparse student can learn "
                "its relations alone, distance_metric='relational'."
            )
        else:
            self._prepare_distance()

    def _prepare_relations(self) -> None:
        if self.projection is not None:
            raise ValueError("distance_metric='relational' compares similarities, which need no projection.")
        self.similarity_fct = model_similarity(self.model, pairwise=False)
        self.teacher_similarity_fct = SimilarityFunction.to_similarity_fn(self.vectors.similarity)
        for side, similarity in (("student", self.similarity_fct), ("teacher", self.teacher_similarity_fct)):
            if getattr(self, f"{side}_temperature") is None:
                setattr(self, f"{side}_temperature", BOUNDED_TEMPERATURE if is_bounded(similarity) else 1.0)

    def _prepare_distance(self) -> None:
        for name in ("student_temperature", "teacher_temperature"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} belongs to distance_metric='relational'; a distance has no softmax.")
        own: Any = self.truncate_dim or self.model.get_embedding_dimension()  # type: ignore[operator]
        theirs = self.vectors.dimension
        if self.projection is None and own != theirs:
            self.projection = "pca" if theirs > own else "learned"
        if self.projection == "pca" and theirs <= own:
            raise ValueError(
                f"projection='pca' takes {self.vectors.name}'s {theirs} dimensions to fewer; the student has {own}: "
                + ("leave it out." if theirs == own else "take projection='learned' or distance_metric='relational'.")
            )
        learned = self.projection == "learned"
        self.upstream = EmbedDistillLoss(self.model, self.distance_metric, theirs if learned else None)  # type: ignore[arg-type]
        if learned:
            # Upstream's starts at random, and a run that is started again has to start at the same.
            layer = nn.Linear(own, theirs)
            nn.init.orthogonal_(layer.weight, generator=torch.Generator().manual_seed(0))
            nn.init.zeros_(layer.bias)
            self.upstream.projection = layer.to(self.model.device)
        elif self.projection == "pca":
            self.axes = torch.from_numpy(self.vectors.principal(own)).to(self.model.device)

    def loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        """Compute the loss from the embeddings of a batch.

        Args:
            embeddings: Those of the queries and those of the documents, or of one side.
            labels: What `ListwiseCollator(model, vectors=…)` made.

        Raises:
            ValueError: If no vectors came with the batch.
        """
        rows = [len(column) for column in embeddings]
        targets = None
        if labels is not None and holds_lists(labels):
            targets = vectors_of(labels, rows, self.vectors.dimension)
        if labels is None or targets is None:
            raise ValueError(
                "EmbeddingDistillLoss needs the teacher's vectors of each batch, which come with lists and texts from "
                "data_collator=ListwiseCollator(model, vectors=vectors). For columns that hold vectors as labels, "
                "take EmbedDistillLoss of sentence-transformers."
            )
        targets = [target.to(column.dtype) for target, column in zip(targets, embeddings, strict=True)]
        if self.upstream is None:
            return self._relational(embeddings, targets, texts=of_texts(labels))
        width = embeddings[0].shape[-1]
        if self.projection == "learned":
            if width != (whole := self.upstream.projection.in_features):  # type: ignore[union-attr]
                raise ValueError(
                    f"A learned projection takes the student's {whole} dimensions, and MatryoshkaLoss cuts them to "
                    f"{width}: take projection='pca' or distance_metric='relational', which can be cut."
                )
        elif self.axes is not None:
            targets = [target @ self.axes.to(target.dtype) for target in targets]
        if self.projection != "learned":
            targets = [target[:, :width] for target in targets]  # what MatryoshkaLoss has cut
        return self.upstream.compute_loss_from_embeddings(embeddings, targets)

    def _relational(self, embeddings: list[Tensor], targets: list[Tensor], *, texts: bool) -> Tensor:
        mask = None
        if texts or len(embeddings) == 1:
            everything, wanted = torch.cat(embeddings), torch.cat(targets)
            embeddings, targets = [everything, everything], [wanted, wanted]
            mask = ~torch.eye(len(everything), dtype=torch.bool, device=everything.device)
        return functional.kl_divergence(
            self.similarity_fct(*embeddings),  # type: ignore[misc]
            self.teacher_similarity_fct(*targets),
            mask=mask,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
        )

    def get_config_dict(self) -> dict[str, Any]:
        """Return the parameters for the model card, and whose vectors they are."""
        return {"teacher": self.vectors.name, "teacher_dimension": self.vectors.dimension, **super().get_config_dict()}

    def save_projection(self, path: str | os.PathLike[str]) -> None:
        """Write the projection as the `weight` of a linear layer (and `bias`), so that it can be used again.

        A PCA's takes the teacher's vectors to the student's dimensions, a learned one the student's to the teacher's.

        Args:
            path: A safetensors file.

        Raises:
            ValueError: There is none.
        """
        if self.axes is not None:
            save_file({"weight": self.axes.T.contiguous().cpu()}, os.fspath(path))
        elif self.upstream is not None:
            self.upstream.save_projection(path)
        else:
            raise ValueError("Relations have no projection.")


def save_projections(loss: nn.Module, folder: Path) -> None:
    """Keep the projections of a loss, if it has any, beside the student that it has trained."""
    found = [part for part in loss.modules() if isinstance(part, EmbeddingDistillLoss) and part.projection is not None]
    for number, part in enumerate(found, start=1):
        part.save_projection(folder / (PROJECTION_FILE if number == 1 else f"{number}-{PROJECTION_FILE}"))
