"""The pure losses against plain Python loops, the authors' own numbers, upstream, and the laws they must obey."""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss
from sentence_transformers.util import pairwise_dot_score
from torch import Tensor

from st_wkl.functional import (
    adaptive_relevance_margin,
    kl_divergence,
    list_contrastive,
    margin_kl,
    margin_mse,
    pairwise_kl,
    pearson,
    pointwise_mse,
    raise_positives,
    rank_net,
    regularised_kl,
    student_ranks,
    swap_positives,
)
from st_wkl.functional import weighted_kl as constant_weights

GOLDEN = json.loads((Path(__file__).parent / "golden" / "losses.json").read_text(encoding="utf-8"))
SIDES = ("query", "positive", "negative")
# As published: gradients flow through the weights.
weighted_kl = functools.partial(constant_weights, detach_weights=False)

LOSSES: dict[str, Callable[..., Tensor]] = {
    "weighted_kl": weighted_kl,
    "weighted_kl_detached": lambda *a, **k: weighted_kl(*a, detach_weights=True, **k),
    "weighted_kl_mean": lambda *a, **k: weighted_kl(*a, reduction="mean", gamma=2.0, **k),
    "weighted_kl_beta": lambda *a, **k: weighted_kl(*a, beta=0.5, **k),
    "weighted_kl_first": lambda *a, **k: weighted_kl(*a, several_positives="first", **k),
    "kl_divergence": lambda s, t, p, **k: kl_divergence(s, t, **k),
    "regularised_kl_mean": regularised_kl,
    "margin_kl": margin_kl,
    "margin_kl_all": lambda *a, **k: margin_kl(*a, pairs="all", **k),
    "margin_mse": margin_mse,
    "rank_net": lambda s, t, p, **k: rank_net(s, t, **k),
    "pearson": lambda s, t, p, **k: pearson(s, t, **k),
    "pointwise_mse": lambda s, t, p, **k: pointwise_mse(s, t, **k),
    "list_contrastive": lambda s, t, p, **k: list_contrastive(s, p, **k),
}


# Those that compare documents; the other one takes each by itself, so scale, offset and single ones count.
RELATIVE = [name for name in LOSSES if name != "pointwise_mse"]


def float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch(seed: int, rows: int = 4, candidates: int = 6, positives: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, candidates, generator=generator, dtype=torch.float64)
    teacher = 3 * torch.randn(rows, candidates, generator=generator, dtype=torch.float64)
    relevant = torch.zeros(rows, candidates, dtype=torch.bool)
    relevant[:, :positives] = True
    return student, teacher, relevant


def value_and_gradient(loss: Callable[..., Tensor], student: Tensor, *rest: Any, **kwargs: Any) -> tuple[float, Tensor]:
    student = student.clone().requires_grad_()
    value = loss(student, *rest, **kwargs)
    return value.item(), torch.autograd.grad(value, student)[0]


def softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    exponentials = [math.exp(score - top) for score in scores]
    return [value / sum(exponentials) for value in exponentials]


def plain_weighted_kl(
    student: Tensor, teacher: Tensor, positives: Tensor, mask: Tensor, gamma: float, alpha: float
) -> float:
    """The definition, read off the paper line by line, with no tensor operation in it."""
    total = 0.0
    for row in range(len(student)):
        places = [n for n in range(student.shape[1]) if mask[row, n]]
        if not places:
            continue
        scores = [student[row, n].item() for n in places]
        p, q = softmax([teacher[row, n].item() for n in places]), softmax(scores)
        ranks = [1 + sum(other > score for other in scores) for score in scores]
        relevant = [bool(positives[row, n]) for n in places]
        best = min((rank for rank, is_relevant in zip(ranks, relevant, strict=True) if is_relevant), default=None)
        for p_i, q_i, rank, is_relevant in zip(p, q, ranks, relevant, strict=True):
            beta = alpha * (1 / rank - 1 / best) if best is not None else 0.0
            weight = (1 - q_i) ** gamma if is_relevant else q_i ** max(gamma - beta, 0.0)
            total += weight * p_i * (math.log(p_i) - math.log(q_i))
    return total / len(student)


def plain_margin_kl(student: Tensor, teacher: Tensor, positives: Tensor, mask: Tensor, all_pairs: bool) -> float:
    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    total = 0.0
    for row in range(len(student)):
        terms = []
        for i in range(student.shape[1]):
            for j in range(student.shape[1]):
                wanted = i < j if all_pairs else bool(positives[row, i]) and not bool(positives[row, j])
                if not (wanted and mask[row, i] and mask[row, j]):
                    continue
                p = sigmoid((teacher[row, i] - teacher[row, j]).item())
                q = sigmoid((student[row, i] - student[row, j]).item())
                terms.append(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
        total += sum(terms) / max(len(terms), 1)
    return total / len(student)


@pytest.mark.parametrize(("gamma", "alpha"), [(5.0, 1.0), (2.0, 0.5), (1.0, 0.0), (0.5, 0.25), (0.0, 0.0)])
@pytest.mark.parametrize("positives", [0, 1, 3])
def test_weighted_kl_equals_plain_loop(gamma: float, alpha: float, positives: int) -> None:
    """Vectorised ranks, weights and masks can each be wrong at a plausible value; a loop over the definition is not."""
    for seed in range(5):
        student, teacher, relevant = batch(seed, positives=positives)
        mask = torch.rand(student.shape, generator=torch.Generator().manual_seed(seed)) < 0.7
        value = weighted_kl(student, teacher, relevant, gamma=gamma, alpha=alpha, mask=mask).item()
        assert value == pytest.approx(plain_weighted_kl(student, teacher, relevant, mask, gamma, alpha), abs=1e-12)


@pytest.mark.parametrize("pairs", ["positive-negative", "all"])
def test_margin_kl_equals_plain_loop(pairs: Any) -> None:
    """The pair mask decides what is learned, and an extra or a missing pair would go unnoticed in training."""
    for seed in range(5):
        student, teacher, relevant = batch(seed, positives=2)
        mask = torch.rand(student.shape, generator=torch.Generator().manual_seed(seed)) < 0.7
        value = margin_kl(student, teacher, relevant, pairs=pairs, mask=mask).item()
        assert value == pytest.approx(plain_margin_kl(student, teacher, relevant, mask, pairs == "all"), abs=1e-12)


@pytest.mark.parametrize("name", ["margin_mse", "rank_net", "pearson", "pointwise_mse", "list_contrastive"])
def test_other_losses_equal_plain_loops(name: str) -> None:
    """The baselines of every comparison deserve the same suspicion as our own losses."""
    for seed in range(5):
        student, teacher, relevant = batch(seed, positives=2)
        mask = torch.rand(student.shape, generator=torch.Generator().manual_seed(seed)) < 0.7
        rows = []
        for b in range(len(student)):
            places = [n for n in range(student.shape[1]) if mask[b, n]]
            s, t = ([scores[b, n].item() for n in places] for scores in (student, teacher))
            positive = [bool(relevant[b, n]) for n in places]
            pairs = [(i, j) for i in range(len(places)) for j in range(len(places)) if i != j]
            if name == "margin_mse":
                terms = [((s[i] - s[j]) - (t[i] - t[j])) ** 2 for i, j in pairs if positive[i] and not positive[j]]
            elif name == "pointwise_mse":
                terms = [(a - b) ** 2 for a, b in zip(s, t, strict=True)]
            elif name == "rank_net":
                terms = [math.log(1 + math.exp(s[j] - s[i])) for i, j in pairs if t[i] > t[j]]
            elif name == "list_contrastive":
                negatives = [s[j] for j in range(len(places)) if not positive[j]]
                terms = [-math.log(softmax([s[i], *negatives])[0]) for i in range(len(places)) if positive[i]]
            else:
                terms = [1 - statistics.correlation(s, t)] if len(places) > 1 else []
            rows.append(sum(terms) / max(len(terms), 1))
        value = LOSSES[name](student, teacher, relevant, mask=mask).item()
        assert value == pytest.approx(sum(rows) / len(rows), abs=1e-10)


def test_pearson_of_constant_lists() -> None:
    """A list of equal scores has no correlation; 0/0 would make the whole batch NaN."""
    student = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]], requires_grad=True)
    teacher = torch.tensor([[7.0, 7.0, 7.0], [1.0, 2.0, 3.0]])
    rows = pearson(student, teacher, reduction="none")
    assert rows.tolist() == [0.0, 1.0]
    rows.sum().backward()
    assert student.grad is not None
    assert torch.equal(student.grad, torch.zeros(2, 3))


def test_contrast_without_a_negative_counts_zero() -> None:
    """A query whose positives are its only candidates has nothing to tell apart, and must not make the batch NaN."""
    student = torch.tensor([[1.0, 2.0], [1.0, 2.0]], requires_grad=True)
    positives = torch.tensor([[True, True], [False, False]])
    loss = list_contrastive(student, positives)
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert torch.equal(student.grad, torch.zeros(2, 2))


def plain_pairwise_kl(student: Tensor, pairs: Tensor, probabilities: Tensor) -> Tensor:
    terms = []
    for (row, i, j), p in zip(pairs.tolist(), probabilities.tolist(), strict=True):
        log_q = torch.stack([student[row, i], student[row, j]]).log_softmax(dim=0)
        entropy = sum(-value * math.log(value) for value in (p, 1 - p) if value > 0)
        terms.append(-p * log_q[0] - (1 - p) * log_q[1] - entropy)
    return torch.stack(terms).mean()


def test_pairwise_kl_equals_plain_loop() -> None:
    """Vectorised indexing can pick the wrong row or document and still train to a plausible loss."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    pairs = torch.stack([torch.randint(0, n, (40,), generator=generator) for n in (5, 7, 7)], dim=1)
    pairs = pairs[pairs[:, 1] != pairs[:, 2]]
    probabilities = torch.rand(len(pairs), generator=generator, dtype=torch.float64)
    probabilities[:2] = torch.tensor([0.0, 1.0])
    value, gradient = value_and_gradient(pairwise_kl, student, pairs, probabilities)
    expected, expected_gradient = value_and_gradient(plain_pairwise_kl, student, pairs, probabilities)
    assert value == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(gradient, expected_gradient)
    student.requires_grad_()
    probabilities = probabilities.clamp(0.05, 0.95)
    assert torch.autograd.gradcheck(lambda s: pairwise_kl(s, pairs, probabilities), (student,))
    assert torch.autograd.gradgradcheck(lambda s: pairwise_kl(s, pairs, probabilities), (student,))


@pytest.mark.parametrize(
    ("pair", "probability", "message"),
    [
        ((0, 0, 9), 0.5, "no document"),
        ((9, 0, 1), 0.5, "no document"),
        ((-1, 0, 1), 0.5, "no document"),
        ((0, 0, 2), 0.5, "no document"),
        ((0, 0, 1), 1.5, r"outside \[0, 1\]"),
        ((0, 0, 1), math.nan, r"outside \[0, 1\]"),
    ],
)
def test_bad_pairs_are_named(pair: tuple[int, int, int], probability: float, message: str) -> None:
    """An index past the end reads another query's document, and a NaN preference trains NaN weights."""
    mask = torch.tensor([[True, True, False]])
    pairs, probabilities = torch.tensor([(0, 0, 1), pair]), torch.tensor([0.5, probability])
    with pytest.raises(ValueError, match=f"pair 1, .*{message}"):
        pairwise_kl(torch.zeros(1, 3), pairs, probabilities, mask=mask)


def test_no_pairs_count_zero() -> None:
    """A batch whose queries have no preferences must not divide by zero."""
    student = torch.zeros(2, 3, requires_grad=True)
    loss = pairwise_kl(student, torch.zeros(0, 3, dtype=torch.long), torch.zeros(0))
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("case", range(len(GOLDEN["cases"])))
def test_neighbours_agree_with_their_authors_code(case: int) -> None:
    """PairDistill's pair term and adaptive relevance margins, in value and in gradient."""
    inputs = GOLDEN["cases"][case]
    expected = inputs["expected"]
    pairs = torch.tensor(inputs["pairs"], dtype=torch.float64)
    arguments = (float64(inputs["student_scores"]), pairs[:, :3].long(), pairs[:, 3])
    value, gradient = value_and_gradient(pairwise_kl, *arguments)
    assert value == pytest.approx(expected["pairdistill"]["loss"], abs=1e-9)
    torch.testing.assert_close(gradient, float64(expected["pairdistill"]["grad"]), rtol=0, atol=1e-9)
    for name, found in expected.items():
        if not name.startswith("arm_") or name.endswith("as_published"):
            continue
        _, target, error = name.split("_")
        embeddings = [
            float64(inputs[f"{side}_embeddings"]).requires_grad_() for side in ("query", "positive", "negative")
        ]
        goal: Any = target if target in ("adaptive", "distributed") else float(target)
        loss = adaptive_relevance_margin(*embeddings, target=goal, error=error)  # type: ignore[arg-type]
        assert loss.item() == pytest.approx(found["loss"], abs=1e-9), name
        for side, gradient in zip(
            ("query", "positive", "negative"), torch.autograd.grad(loss, embeddings), strict=True
        ):
            torch.testing.assert_close(gradient, float64(found["grad"][side]), rtol=0, atol=1e-9, msg=f"{name} {side}")


@pytest.mark.parametrize("beta", [0.01, 0.02])
@pytest.mark.parametrize("case", range(len(GOLDEN["cases"])))
def test_regularised_kl_agrees_with_its_authors_code(case: int, beta: float) -> None:
    """A baseline of the comparison, with its sum over the batch beside a mean over the candidates."""
    inputs = GOLDEN["cases"][case]
    expected = inputs["expected"][f"kl_plus_regulariser_beta{beta}"]
    arguments = [float64(inputs[name]) for name in ("student_scores", "teacher_scores", "positives")]
    value, gradient = value_and_gradient(regularised_kl, *arguments, beta=beta)
    assert value == pytest.approx(expected["loss"], abs=1e-9)
    torch.testing.assert_close(gradient, float64(expected["grad"]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", range(len(GOLDEN["cases"])))
def test_collective_labels_agree_with_their_authors_code(case: int) -> None:
    """The labelled positive raised to the row's best, and a sharpened teacher: CollectiveKD's target."""
    inputs = GOLDEN["cases"][case]
    labelled = torch.zeros(float64(inputs["positives"]).shape, dtype=torch.bool)
    labelled[:, 0] = True  # theirs raises the one labelled positive, the first
    corrected = raise_positives(float64(inputs["teacher_scores"]), labelled)
    expected = inputs["expected"]["collective_label_correction_T0.25"]
    value, gradient = value_and_gradient(
        kl_divergence, float64(inputs["student_scores"]), corrected, teacher_temperature=0.25
    )
    assert value == pytest.approx(expected["loss"], abs=1e-9)
    torch.testing.assert_close(gradient, float64(expected["grad"]), rtol=0, atol=1e-9)


def test_arm_in_batch_is_as_meant_not_as_published() -> None:
    """The published code broadcasts the positive over the wrong axis; ours must differ from it in exactly that."""
    inputs = GOLDEN["cases"][1]
    query, positive, negative = (float64(inputs[f"{side}_embeddings"]) for side in SIDES)
    ours = adaptive_relevance_margin(query, positive, negative, target="adaptive", in_batch=True)
    unit = [embeddings / embeddings.norm(dim=1, keepdim=True) for embeddings in (query, positive, negative)]
    own, goal = (unit[0] * unit[1]).sum(dim=1), unit[1] @ unit[2].T / 2 + 0.5
    published = ((own[None, :] - unit[0] @ unit[2].T - goal) ** 2).mean()
    assert published.item() == pytest.approx(
        inputs["expected"]["arm_adaptive_l2_in_batch_as_published"]["loss"], abs=1e-9
    )
    errors = [
        (own[i] - unit[0][i] @ unit[2][j] - goal[i, j]) ** 2 for i in range(len(query)) for j in range(len(query))
    ]
    assert ours.item() == pytest.approx(torch.stack(errors).mean().item(), abs=1e-12)
    assert ours.item() != pytest.approx(published.item(), abs=1e-3)


def test_arm_refuses_what_has_no_cosine() -> None:
    """A zero vector gives NaN gradients, and the row that made it is what the user needs to know."""
    good, zero = torch.ones(3, 4), torch.ones(3, 4)
    zero[1] = 0
    with pytest.raises(ValueError, match="the negative embedding of row 1 has length 0"):
        adaptive_relevance_margin(good, good, zero)
    with pytest.raises(ValueError, match="positive_embeddings must be"):
        adaptive_relevance_margin(good, good[:2], good)
    with pytest.raises(ValueError, match="target must be"):
        adaptive_relevance_margin(good, good, good, target="static")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="error must be"):
        adaptive_relevance_margin(good, good, good, error="huber")  # type: ignore[arg-type]


@pytest.mark.parametrize("case", range(len(GOLDEN["cases"])))
def test_agrees_with_the_authors_code(case: int) -> None:
    """What we call CKL has to be what its authors ran, in value and in gradient."""
    inputs = GOLDEN["cases"][case]
    student, teacher = float64(inputs["student_scores"]), float64(inputs["teacher_scores"])
    positives, ranks = float64(inputs["positives"]).bool(), float64(inputs["student_ranks"])
    compared = 0
    for name, expected in inputs["expected"].items():
        if not name.startswith("ckl_"):
            continue
        _, kind, gamma, bias, *_ = name.split("_")
        parameters: dict[str, Any] = {"gamma": float(gamma.removeprefix("gamma"))}
        if kind == "rank":
            parameters |= {"alpha": float(bias.removeprefix("alpha")), "ranks": ranks}
        else:
            parameters |= {"beta": float(bias.removeprefix("beta"))}
        value, gradient = value_and_gradient(weighted_kl, student, teacher, positives, reduction="mean", **parameters)
        assert value == pytest.approx(expected["loss"], abs=1e-9), name
        torch.testing.assert_close(gradient, float64(expected["grad"]), rtol=0, atol=1e-9, msg=name)
        if parameters == {"gamma": 0.0, "alpha": 0.0, "ranks": ranks}:
            value, gradient = value_and_gradient(kl_divergence, student, teacher, reduction="mean")
            assert value == pytest.approx(expected["loss"], abs=1e-9)
            torch.testing.assert_close(gradient, float64(expected["grad"]), rtol=0, atol=1e-9)
        compared += 1
    assert compared >= 5


def test_without_weights_equals_upstream() -> None:
    """γ=0, α=0 is the baseline of every comparison, so it must be the KL that users already have."""
    torch.manual_seed(0)
    embeddings = [torch.randn(8, 16, requires_grad=True) for _ in range(6)]
    labels = 4 * torch.randn(8, 5)
    upstream = DistillKLDivLoss(model=None, similarity_fct=pairwise_dot_score)  # type: ignore[arg-type]
    expected = upstream.compute_loss_from_embeddings(embeddings, labels)
    expected_gradients = torch.autograd.grad(expected, embeddings)
    scores = torch.stack([pairwise_dot_score(embeddings[0], other) for other in embeddings[1:]], dim=1)
    positives = torch.zeros(8, 5, dtype=torch.bool)
    for value in (weighted_kl(scores, labels, positives, gamma=0, alpha=0), kl_divergence(scores, labels)):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
        gradients = torch.autograd.grad(value, embeddings, retain_graph=True)
        for gradient, other in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_twice(name: str) -> None:
    """Second-order methods (sharpness, influence) differentiate the gradient, so each path must be smooth code."""
    student, teacher, positives = batch(3, rows=2, candidates=4, positives=1)
    mask = torch.tensor([[True, True, True, True], [True, True, True, False]])
    student.requires_grad_()
    teacher.requires_grad_()

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return LOSSES[name](student, teacher, positives, mask=mask)

    if name == "weighted_kl_detached":
        # A detached weight is no function of the score as far as autograd knows, so only the value can be compared.
        assert loss(student, teacher).item() == weighted_kl(student, teacher, positives, mask=mask).item()
        return
    assert torch.autograd.gradcheck(loss, (student, teacher))
    assert torch.autograd.gradgradcheck(loss, (student, teacher))


lists = st.integers(0, 10_000)


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=25, deadline=None)
@given(seed=lists, positives=st.integers(0, 3))
def test_order_of_candidates_does_not_matter(name: str, seed: int, positives: int) -> None:
    """A list has no order but that of its scores; if columns mattered, shuffled data would train differently."""
    if name == "weighted_kl_first":
        positives = min(positives, 1)  # it does depend on which positive comes first
    student, teacher, relevant = batch(seed, positives=positives)
    order = torch.randperm(student.shape[1], generator=torch.Generator().manual_seed(seed))
    value, gradient = value_and_gradient(LOSSES[name], student, teacher, relevant)
    moved, moved_gradient = value_and_gradient(LOSSES[name], student[:, order], teacher[:, order], relevant[:, order])
    assert moved == pytest.approx(value, abs=1e-10)
    torch.testing.assert_close(moved_gradient, gradient[:, order])


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=25, deadline=None)
@given(seed=lists, padding=st.integers(1, 4), junk=st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
def test_masked_places_do_not_exist(name: str, seed: int, padding: int, junk: float) -> None:
    """Ragged lists are padded, and padding that leaks trains the student on documents that are not there."""
    student, teacher, relevant = batch(seed)
    rows = len(student)
    mask = torch.ones_like(relevant)
    value, gradient = value_and_gradient(LOSSES[name], student, teacher, relevant)
    junk_scores = torch.full((rows, padding), junk, dtype=torch.float64)
    padded, padded_gradient = value_and_gradient(
        LOSSES[name],
        torch.cat([student, junk_scores], dim=1),
        torch.cat([teacher, junk_scores], dim=1),
        torch.cat([relevant, torch.ones(rows, padding, dtype=torch.bool)], dim=1),
        mask=torch.cat([mask, torch.zeros(rows, padding, dtype=torch.bool)], dim=1),
    )
    assert padded == pytest.approx(value, abs=1e-10)
    torch.testing.assert_close(padded_gradient[:, :-padding], gradient)
    assert torch.equal(padded_gradient[:, -padding:], torch.zeros(rows, padding, dtype=torch.float64))


@pytest.mark.parametrize("name", RELATIVE)
@settings(max_examples=25, deadline=None)
@given(seed=lists, shift=st.floats(-20, 20))
def test_shifting_a_row_changes_nothing(name: str, seed: int, shift: float) -> None:
    """Teachers differ by a constant per query; only differences within a list carry the ranking."""
    student, teacher, relevant = batch(seed)
    value, gradient = value_and_gradient(LOSSES[name], student, teacher, relevant)
    moved, moved_gradient = value_and_gradient(LOSSES[name], student + shift, teacher - shift, relevant)
    assert moved == pytest.approx(value, abs=1e-9)
    torch.testing.assert_close(moved_gradient, gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", RELATIVE)
def test_rows_without_documents_or_with_one(name: str) -> None:
    """An empty or single list says nothing about order; it must add 0, not NaN that spreads to every weight."""
    student, teacher, relevant = batch(1, rows=3, candidates=3)
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    value, gradient = value_and_gradient(LOSSES[name], student, teacher, relevant, mask=mask)
    alone, _ = value_and_gradient(LOSSES[name], student[:1], teacher[:1], relevant[:1])
    assert math.isfinite(value)
    assert torch.isfinite(gradient).all()
    assert torch.equal(gradient[1:], torch.zeros(2, 3, dtype=torch.float64))
    if "mean" not in name:
        assert value == pytest.approx(alone / 3)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("spread", [1e3, 1e30])
def test_float32_survives_extreme_scores(name: str, spread: float) -> None:
    """A student that is certain has probabilities of exactly 0 and 1, where naive powers and logarithms break."""
    student = torch.tensor([[spread, 0.0, -spread], [0.0, spread, 0.0]], requires_grad=True)
    teacher = torch.tensor([[300.0, 0.0, -300.0], [0.0, 0.0, 0.0]])
    positives = torch.tensor([[True, False, False], [True, False, False]])
    LOSSES[name](student, teacher, positives).backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("gamma", [0.3, 0.999, 1.0, 1.5])
def test_small_gamma_has_finite_gradients_at_certainty(gamma: float) -> None:
    """(1 − q)^γ has an infinite slope at q = 1 for γ < 1; a student that is right must not receive NaN for it."""
    student = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    loss = weighted_kl(
        student, torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[True, False, False]]), gamma=gamma, alpha=0
    )
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    """A log-softmax in bf16 has two decimal digits, too few to tell candidates apart."""
    student, teacher, positives = batch(2)
    student, teacher = student.to(dtype), teacher.to(dtype)
    value = weighted_kl(student, teacher, positives)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, weighted_kl(student.float(), teacher.float(), positives))


def test_margin_kl_moves_the_positive() -> None:
    """The softmax form of MarginKL found in research code gives the positive no gradient at all."""
    student, teacher, positives = batch(5)
    _, gradient = value_and_gradient(margin_kl, student, teacher, positives)
    assert gradient[:, 0].abs().min() > 1e-3
    relevant_first = torch.tensor([[5.0, 0.0, -2.0]], dtype=torch.float64)
    _, gradient = value_and_gradient(margin_kl, torch.zeros_like(relevant_first), relevant_first, positives[:1, :3])
    assert gradient[0, 0] < 0


def test_weighted_kl_is_no_divergence() -> None:
    """Users ask why the loss is negative: it may be, and a student equal to its teacher is still moved."""
    _, teacher, positives = batch(0)
    _, gradient = value_and_gradient(weighted_kl, teacher.clone(), teacher, positives)
    assert gradient.abs().max() > 1e-6
    values = [weighted_kl(*batch(seed)).item() for seed in range(50)]
    assert min(values) < 0


def test_detached_weights_change_the_gradient_only() -> None:
    """The option exists for its gradient; a changed value would make logged losses incomparable."""
    student, teacher, positives = batch(6)
    value, gradient = value_and_gradient(weighted_kl, student, teacher, positives)
    same, other = value_and_gradient(weighted_kl, student, teacher, positives, detach_weights=True)
    assert same == value
    assert not torch.allclose(gradient, other)


def test_reductions_relate_as_documented() -> None:
    """A learning rate is tied to the reduction, so their ratio has to be the number of candidates, padding aside."""
    student, teacher, positives = batch(7, rows=3, candidates=5)
    for name in ("weighted_kl", "kl_divergence"):
        loss = LOSSES[name]
        total = loss(student, teacher, positives)
        torch.testing.assert_close(loss(student, teacher, positives, reduction="mean") * 5, total)
        terms = loss(student, teacher, positives, reduction="none")
        assert terms.shape == student.shape
        torch.testing.assert_close(terms.sum() / 3, total)
    assert margin_kl(student, teacher, positives, reduction="none").shape == (3,)
    with pytest.raises(ValueError, match="reduction must be"):
        weighted_kl(student, teacher, positives, reduction="sum")  # type: ignore[arg-type]


def test_several_positives_follow_paper_or_code() -> None:
    """With several positives the paper and the authors' code differ; both have to be available, and differ."""
    student, teacher, positives = batch(8, positives=3)
    best = weighted_kl(student, teacher, positives)
    first = weighted_kl(student, teacher, positives, several_positives="first")
    assert best.item() != pytest.approx(first.item(), abs=1e-9)
    student, teacher, positives = batch(8, positives=1)
    torch.testing.assert_close(
        weighted_kl(student, teacher, positives), weighted_kl(student, teacher, positives, several_positives="first")
    )


def test_negative_exponents_are_clamped_and_said() -> None:
    """With α > γ a weight would exceed every bound; silently clamping it would hide that the setting is wrong."""
    student, teacher, positives = batch(9)
    with pytest.warns(UserWarning, match="exponents γ − β fell below 0"):
        weighted_kl(student, teacher, positives, gamma=0.1, alpha=2.0)


def test_ranks_share_ties() -> None:
    """Equal scores must not be ranked by column, or shuffling a list would change its loss."""
    scores = torch.tensor([[0.1, 0.7, 0.7, 0.3], [1.0, 1.0, 1.0, 1.0]])
    assert student_ranks(scores).tolist() == [[4, 1, 1, 3], [1, 1, 1, 1]]
    mask = torch.tensor([[True, False, True, True], [True] * 4])
    assert student_ranks(scores, mask).tolist() == [[3, 1, 1, 2], [1, 1, 1, 1]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "list_contrastive"])
def test_bad_teacher_scores_are_named(name: str, bad: float) -> None:
    """One NaN label makes all weights NaN while the trainer logs a loss of 0, so it must stop the run by name."""
    student, teacher, positives = batch(0)
    teacher[2, 4] = bad
    with pytest.raises(ValueError, match=r"teacher_scores\[2, 4\] is .*nan|teacher_scores\[2, 4\] is .*inf"):
        LOSSES[name](student, teacher, positives)


def test_bad_arguments_are_refused() -> None:
    """Broadcasting would accept most wrong shapes and train something else at a plausible loss."""
    student, teacher, positives = batch(0)
    with pytest.raises(ValueError, match="teacher_scores must have the shape"):
        weighted_kl(student, teacher[:, :1], positives)
    with pytest.raises(ValueError, match="positives must have the shape"):
        weighted_kl(student, teacher, positives[:1])
    with pytest.raises(ValueError, match="mask must have the shape"):
        kl_divergence(student, teacher, mask=torch.ones(4, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"must be \(B, N\)"):
        kl_divergence(student[0], teacher[0])
    with pytest.raises(ValueError, match="student_temperature must be a positive"):
        kl_divergence(student, teacher, student_temperature=0)
    with pytest.raises(ValueError, match="gamma must be a finite number"):
        weighted_kl(student, teacher, positives, gamma=-1)
    with pytest.raises(ValueError, match=r"ranks\[0, 0\] is 0.0"):
        weighted_kl(student, teacher, positives, ranks=torch.zeros_like(student))
    with pytest.raises(ValueError, match="pairs must be"):
        margin_kl(student, teacher, positives, pairs="some")  # type: ignore[arg-type]


@pytest.mark.parametrize("correct", [raise_positives, swap_positives])
def test_label_corrections_against_a_loop(correct: Callable[..., Tensor]) -> None:
    """Row by row in plain Python, with several positives, none, ties, and padding that holds NaN."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.randint(-3, 4, (200, 6), generator=generator).float()
    positives = torch.rand(200, 6, generator=generator) < 0.3
    mask = torch.rand(200, 6, generator=generator) < 0.8
    scores[~mask] = math.nan
    expected = scores.tolist()
    for row, (values, relevant, real) in enumerate(
        zip(scores.tolist(), positives.tolist(), mask.tolist(), strict=True)
    ):
        places = [n for n in range(6) if real[n]]
        right = [n for n in places if relevant[n]]
        if not right:
            continue
        top, best = max(places, key=lambda n: values[n]), max(right, key=lambda n: values[n])
        if correct is raise_positives:
            for n in right:
                expected[row][n] = values[top]
        elif values[best] < values[top]:
            expected[row][top], expected[row][best] = values[best], values[top]
    before = scores.clone()
    torch.testing.assert_close(correct(scores, positives, mask), torch.tensor(expected), equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(scores, before, equal_nan=True)
    with pytest.raises(ValueError, match=r"positives must have the shape of teacher_scores, \(200, 6\)"):
        correct(scores, positives[:, :2])
    assert correct(scores[:0], positives[:0]).shape == (0, 6)
    assert correct(scores[:, :0], positives[:, :0]).shape == (200, 0)
