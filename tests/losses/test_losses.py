"""The loss modules inside the stock sentence-transformers trainer: contract, checks, and what a user would see."""

from __future__ import annotations

import inspect
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss, MarginMSELoss, MatryoshkaLoss
from sentence_transformers.util import pairwise_cos_sim, pairwise_dot_score
from torch import Tensor

from st_wkl.functional import margin_kl, weighted_kl
from st_wkl.losses import (
    AdaptiveRelevanceMarginLoss,
    InBatchContrastiveLoss,
    ListContrastiveLoss,
    MarginKL,
    MarginMSEDistillLoss,
    PearsonDistillLoss,
    RankNetDistillLoss,
    RegularisedKLDistillLoss,
    WeightedKLDistillationLoss,
)
from st_wkl.losses.base import CandidateListLoss
from tests.helpers.students import ragged_rows
from tests.helpers.vectors import vectors_for

LOSSES = [WeightedKLDistillationLoss, MarginKL]


@pytest.fixture
def student(static_student_path: Path) -> SentenceTransformer:
    return SentenceTransformer(str(static_student_path))


def rows(n: int = 8, bad: float | None = None) -> Dataset:
    labels = [[6.0 + i, -1.0, -4.0] for i in range(n)]
    if bad is not None:
        labels[-1][1] = bad
    return Dataset.from_dict(
        {
            "query": [f"who wrote book {i}" for i in range(n)],
            "positive": [f"book {i} was written by a clerk" for i in range(n)],
            "negative_1": [f"book {i} has many pages" for i in range(n)],
            "negative_2": ["the weather was fine" for _ in range(n)],
            "label": labels,
        }
    )


def train(
    student: SentenceTransformer, loss: Any, dataset: Dataset, folder: Path, **arguments: Any
) -> SentenceTransformerTrainer:
    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 4,
            "num_train_epochs": 1,
            "learning_rate": 1e-2,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            **arguments,
        },
    )
    trainer = SentenceTransformerTrainer(
        model=student, args=args, train_dataset=dataset, eval_dataset=dataset, loss=loss
    )
    trainer.train()
    return trainer


def embeddings(n_candidates: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 8, generator=generator, requires_grad=True) for _ in range(n_candidates + 1)]


@pytest.mark.parametrize("loss_class", LOSSES)
def test_trains_and_evaluates_in_the_stock_trainer(
    loss_class: type[CandidateListLoss], student: SentenceTransformer, tmp_path: Path
) -> None:
    """A drop-in has to work in the script that users already have, evaluation loss included."""
    loss = loss_class(student)
    before = student.encode(["who wrote book 1"])[0].copy()
    trainer = train(student, loss, rows(), tmp_path)
    assert not (student.encode(["who wrote book 1"])[0] == before).all()
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_equals_upstream_without_weights(student: SentenceTransformer) -> None:
    """Replacing DistillKLDivLoss by γ=0, α=0 must not change a run, nor must the other way round."""
    vectors, labels = embeddings(), 3 * torch.randn(4, 3)
    for similarity, temperature in ((pairwise_dot_score, 1.0), (pairwise_cos_sim, 0.1)):
        ours = WeightedKLDistillationLoss(
            student, gamma=0, alpha=0, similarity_fct=similarity, student_temperature=temperature
        )
        theirs = DistillKLDivLoss(student, similarity_fct=similarity, student_temperature=temperature)
        value = ours.compute_loss_from_embeddings(vectors, labels)
        # Upstream multiplies by the squared student temperature, the only difference.
        expected = theirs.compute_loss_from_embeddings(vectors, labels) / temperature**2
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
        for mine, other in zip(
            torch.autograd.grad(value, vectors), torch.autograd.grad(expected, vectors), strict=True
        ):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_weights_are_constants_unless_asked_for_otherwise(student: SentenceTransformer) -> None:
    """The default and the authors' form have the same value, so only the gradient tells which one is trained."""
    vectors, labels = embeddings(), 3 * torch.randn(4, 3)
    found = []
    for loss in (WeightedKLDistillationLoss(student), WeightedKLDistillationLoss(student, detach_weights=False)):
        value = loss.compute_loss_from_embeddings(vectors, labels)
        found.append((value, torch.autograd.grad(value, vectors)))
    (default, ours), (published, theirs) = found
    torch.testing.assert_close(default, published)
    assert not any(torch.allclose(mine, other, atol=1e-6) for mine, other in zip(ours, theirs, strict=True))


def test_first_candidate_is_the_positive(student: SentenceTransformer) -> None:
    """The column order carries the only label there is; taking another column would reward a negative."""
    vectors, labels = embeddings(), torch.randn(4, 3)
    scores = torch.stack([pairwise_cos_sim(vectors[0], other) for other in vectors[1:]], dim=1)
    positives = torch.tensor([[True, False, False]]).expand(4, 3)
    torch.testing.assert_close(
        WeightedKLDistillationLoss(student).compute_loss_from_embeddings(vectors, labels),
        weighted_kl(scores, labels, positives, student_temperature=0.05),
    )
    torch.testing.assert_close(
        MarginKL(student).compute_loss_from_embeddings(vectors, labels),
        margin_kl(scores, labels, positives, student_temperature=0.05),
    )


def test_similarity_is_the_models_own(student: SentenceTransformer) -> None:
    """Upstream always takes the dot product, so a cosine model was trained for a ranking that it never produces."""
    assert WeightedKLDistillationLoss(student).get_config_dict()["similarity_fct"] == "pairwise_cos_sim"
    student.similarity_fn_name = "dot"
    loss = WeightedKLDistillationLoss(student)
    assert loss.get_config_dict()["similarity_fct"] == "pairwise_dot_score"
    assert loss.student_temperature == 1.0


@pytest.mark.parametrize("loss_class", LOSSES)
def test_flat_temperature_warns(loss_class: type[CandidateListLoss], student: SentenceTransformer) -> None:
    """Cosines at temperature 1 train to a flat ranking and nothing else would tell."""
    with pytest.warns(UserWarning, match=r"student_temperature=1.0 with cosine similarity.*0\.05"):
        loss_class(student, student_temperature=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_class(student)
        loss_class(student, similarity_fct=pairwise_dot_score, student_temperature=1.0)


@pytest.mark.parametrize("loss_class", LOSSES)
def test_matryoshka(loss_class: type[CandidateListLoss], student: SentenceTransformer, tmp_path: Path) -> None:
    """MatryoshkaLoss patches the model's forward, which any extra or cached forward of ours would break."""
    inner = loss_class(student)
    train(student, MatryoshkaLoss(student, inner, matryoshka_dims=[256, 64]), rows(), tmp_path)
    vectors = [vector.detach() for vector in embeddings()]
    assert torch.isfinite(inner.compute_loss_from_embeddings([v[:, :4] for v in vectors], torch.randn(4, 3)))


def test_card_names_loss_parameters_and_citation(student: SentenceTransformer, tmp_path: Path) -> None:
    """A published student has to say how it was trained; the trainer reads that from the loss."""
    train(student, WeightedKLDistillationLoss(student, gamma=2.0), rows(), tmp_path / "run")
    student.save_pretrained(str(tmp_path / "student"))
    card = (tmp_path / "student" / "README.md").read_text(encoding="utf-8")
    assert "WeightedKLDistillationLoss" in card
    assert '"gamma": 2.0' in card
    assert "Weighted KL-Divergence for Document Ranking Model Refinement" in card


@pytest.mark.parametrize("loss_class", LOSSES)
def test_config_is_json_and_nothing_is_learned(
    loss_class: type[CandidateListLoss], student: SentenceTransformer
) -> None:
    """Parameters of a loss are not saved in checkpoints, so it must not have any; its config must fit a card."""
    loss = loss_class(student)
    assert json.loads(json.dumps(loss.get_config_dict())) == loss.get_config_dict()
    own = [name for name, _ in loss.named_parameters() if not name.startswith("model.")]
    assert own == []
    assert dict(loss.named_children()).keys() == {"model"}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("loss_class", LOSSES)
def test_bad_label_in_a_later_batch_stops_the_run(
    loss_class: type[CandidateListLoss], bad: float, student: SentenceTransformer, tmp_path: Path
) -> None:
    """Upstream looks at the first batch only: a NaN in the second trains all weights to NaN and logs a loss of 0."""
    with pytest.raises(ValueError, match=r"teacher_scores\[\d, 1\] is"):
        train(student, loss_class(student), rows(bad=bad), tmp_path, dataloader_drop_last=False)
    assert all(torch.isfinite(parameter).all() for parameter in student.parameters())


EXCLUDING = [
    WeightedKLDistillationLoss,
    RegularisedKLDistillLoss,
    MarginKL,
    MarginMSEDistillLoss,
    RankNetDistillLoss,
    PearsonDistillLoss,
    ListContrastiveLoss,
    AdaptiveRelevanceMarginLoss,
    InBatchContrastiveLoss,
]


@pytest.mark.parametrize("loss_class", EXCLUDING)
def test_a_label_of_minus_infinity_leaves_the_candidate_out(loss_class: Any, student: SentenceTransformer) -> None:
    """Upstream's users mark a candidate as excluded by -inf: no value, no gradient and no probability may know it."""
    # Weights that are taken as constants have another gradient than the value has.
    loss = loss_class(student, **({"detach_weights": False} if loss_class is WeightedKLDistillationLoss else {}))
    vectors = [vector.detach().double().requires_grad_() for vector in embeddings(4)]
    labels = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fewer, labels[:, 2] = labels[:, [0, 1, 3]], -math.inf
    value = loss.compute_loss_from_embeddings(vectors, labels)
    kept = [vectors[column] for column in (0, 1, 2, 4)]
    if loss_class is InBatchContrastiveLoss:  # a negative of the other queries all the same: excluded for its own only
        away = [torch.tensor([row]) for row in range(4)]
        value = sum(loss.compute_loss_from_embeddings([v[row] for v in vectors], labels[row]) for row in away)
        wanted = sum(loss.compute_loss_from_embeddings([v[row] for v in kept], fewer[row]) for row in away)
    else:
        wanted = loss.compute_loss_from_embeddings(kept, fewer)
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(value, vectors, allow_unused=True)
    assert gradients[3] is None or not gradients[3].any()
    for mine, other in zip([gradients[i] for i in (0, 1, 2, 4)], torch.autograd.grad(wanted, kept), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *v: loss.compute_loss_from_embeddings(list(v), labels), vectors)


def test_excluded_candidates_equal_upstream_without_them(student: SentenceTransformer) -> None:
    """Rows that leave out different candidates: each is what upstream makes of it without the column."""
    vectors = embeddings()
    labels = torch.tensor([[2.0, -math.inf, 0.5], [1.0, 0.0, -math.inf], [3.0, 1.0, -1.0], [0.0, -math.inf, 2.0]])
    options: Any = {"similarity_fct": pairwise_dot_score, "student_temperature": 1.0}
    for ours, theirs in (
        (WeightedKLDistillationLoss(student, gamma=0, alpha=0, **options), DistillKLDivLoss(student)),
        (MarginMSEDistillLoss(student, **options), MarginMSELoss(student)),
    ):
        rows = []
        for row in range(4):
            columns = labels[row].isfinite().nonzero().flatten().tolist()
            kept = [vectors[0][[row]], *(vectors[column + 1][[row]] for column in columns)]
            rows.append(theirs.compute_loss_from_embeddings(kept, labels[[row]][:, columns]))
        value, wanted = ours.compute_loss_from_embeddings(vectors, labels), torch.stack(rows).mean()
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6)
        for mine, other in zip(torch.autograd.grad(value, vectors), torch.autograd.grad(wanted, vectors), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_class", EXCLUDING)
def test_lists_with_nothing_or_one_left_are_survived_and_said(
    loss_class: Any, student: SentenceTransformer, caplog: pytest.LogCaptureFixture
) -> None:
    """A softmax over nothing is NaN, and a row that teaches nothing must not go unsaid."""
    loss, vectors = loss_class(student), embeddings()
    labels = torch.tensor([[-math.inf] * 3, [1.0, -math.inf, -math.inf], [1.0, 0.0, 2.0], [0.0, 1.0, -math.inf]])
    for _ in range(2):
        value = loss.compute_loss_from_embeddings(vectors, labels)
        assert torch.isfinite(value)
        assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(value, vectors))
    if isinstance(loss, CandidateListLoss):
        assert caplog.text.count("2 of 4 lists of this batch keep fewer than two candidates") == 1


def test_a_teacher_temperature_that_silences_candidates_is_said_once(
    student: SentenceTransformer, caplog: pytest.LogCaptureFixture
) -> None:
    """At probability 0 a candidate teaches nothing, at a loss that looks right; upstream says so, too."""
    labels = torch.tensor([[300.0, 1.0, 0.0]] * 4)
    loss = WeightedKLDistillationLoss(student, gamma=0, alpha=0)
    for _ in range(2):
        loss.compute_loss_from_embeddings(embeddings(), labels)
    assert caplog.text.count("teacher_temperature=1 leaves 8 of 12 candidates") == 1
    assert "take a teacher_temperature above 3." in caplog.text
    caplog.clear()
    gentle = WeightedKLDistillationLoss(student, gamma=0, alpha=0, teacher_temperature=3.5)
    gentle.compute_loss_from_embeddings(embeddings(), labels)
    assert "probability" not in caplog.text


def test_diverged_student_stops_the_run(student: SentenceTransformer) -> None:
    """NaN weights give a NaN loss, which the trainer logs as 0 and trains on."""
    vectors = [vector.detach().clone() for vector in embeddings()]
    vectors[0][2] = math.nan
    with pytest.raises(ValueError, match="student's scores in row 2 of this batch are NaN"):
        WeightedKLDistillationLoss(student).compute_loss_from_embeddings(vectors, torch.randn(4, 3))


@pytest.mark.parametrize("loss_class", LOSSES)
def test_wrong_labels_say_what_is_expected(loss_class: type[CandidateListLoss], student: SentenceTransformer) -> None:
    """Labels of a neighbouring shape would broadcast and train toward a uniform ranking at a plausible loss."""
    loss = loss_class(student)
    with pytest.raises(ValueError, match=r"\(4, 3\), but the labels have shape \(4, 2\)"):
        loss.compute_loss_from_embeddings(embeddings(3), torch.randn(4, 2))
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        loss.compute_loss_from_embeddings(embeddings(3), torch.randn(4))
    with pytest.raises(ValueError, match="needs the teacher's scores: add a column 'label'"):
        loss.compute_loss_from_embeddings(embeddings(3), None)
    with pytest.raises(ValueError, match="one candidate there is nothing to rank"):
        loss.compute_loss_from_embeddings(embeddings(1), torch.randn(4, 1))


def test_id_column_left_in_is_explained(student: SentenceTransformer, tmp_path: Path) -> None:
    """The collator tokenizes ids like text; without a hint the user looks for the fault in the labels."""
    dataset = rows().add_column("query_id", [str(i) for i in range(8)])
    with pytest.raises(ValueError, match="an id column too: remove what is neither query nor candidate"):
        train(student, WeightedKLDistillationLoss(student), dataset, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": -1.0}, "gamma must be a finite number"),
        ({"reduction": "none"}, "reduction must be"),
        ({"teacher_temperature": 0.0}, "teacher_temperature must be a positive"),
        ({"student_temperature": math.nan}, "student_temperature must be a positive"),
    ],
)
def test_bad_parameters_are_refused_at_once(
    arguments: dict[str, Any], message: str, student: SentenceTransformer
) -> None:
    """A parameter that only fails at the first batch costs the user the time of loading and tokenizing."""
    with pytest.raises(ValueError, match=message):
        WeightedKLDistillationLoss(student, **arguments)


def test_all_ways_of_whole_numbers_work(student: SentenceTransformer) -> None:
    """Scores like 1 and 0 come out of the collator as integers, which have no softmax."""
    labels = torch.tensor([[1, 0, 0]] * 4)
    assert torch.isfinite(MarginKL(student).compute_loss_from_embeddings(embeddings(), labels))
    assert torch.isfinite(WeightedKLDistillationLoss(student).compute_loss_from_embeddings(embeddings(), labels))


def test_a_misspelt_option_is_refused_by_every_loss(student: SentenceTransformer) -> None:
    """A word that an option does not know took the place of the other choice, and training ran with that."""
    import st_wkl.losses

    tried = set()
    for name in st_wkl.losses.__all__:
        loss = getattr(st_wkl.losses, name)
        given = {"vectors": vectors_for(ragged_rows())} if name == "EmbeddingDistillLoss" else {}
        for part in loss.__mro__:
            if "__init__" not in vars(part):
                continue
            taken = inspect.signature(loss.__init__).parameters
            options = any(entry.kind is inspect.Parameter.VAR_KEYWORD for entry in taken.values())
            for option, entry in inspect.signature(part.__init__).parameters.items():
                if "Literal[" not in str(entry.annotation) or not (options or option in taken):
                    continue
                with pytest.raises(ValueError, match=f"{name}: {option} must be .* got 'frist'"):
                    loss(student, **given, **{option: "frist"})
                tried.add(option)
    words = {"several_positives", "reduction", "ranks", "without_positive", "pairs", "target", "error"}
    assert tried == words | {"distance_metric", "projection"}
    with pytest.raises(ValueError, match=r"similarity_fct must be a function.*got 'cosine'"):
        MarginKL(student, similarity_fct="cosine")
    with pytest.raises(ValueError, match="several_positives must be 'best' or 'first'"):
        weighted_kl(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2), several_positives="frist")


def test_the_card_tells_every_option_that_is_not_the_default(student: SentenceTransformer) -> None:
    """A student of another threshold looked like one of the default, on its card and to a run that was resumed."""
    contrast = InBatchContrastiveLoss(student, positive_threshold=3.0)
    assert contrast.get_config_dict()["positive_threshold"] == 3.0
    assert "positive_threshold" not in InBatchContrastiveLoss(student).get_config_dict()
    weighted = WeightedKLDistillationLoss(student, several_positives="first", beta=0.5)
    config = weighted.get_config_dict()
    assert (config["several_positives"], config["beta"]) == ("first", 0.5)
    assert "alpha" not in config
