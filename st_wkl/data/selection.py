"""Which documents make a training list: duplicates, false negatives, and the choice of N among the rest."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any, Literal

import numpy as np

from st_wkl.data.copies import COPY, NEAR, REPEATED, Texts, find_copies
from st_wkl.ranges import OptionError, check_options
from st_wkl.text import plain_text

Choice = Literal["top", "random", "quantiles"]
Reference = Literal["best", "worst"]
Correction = Literal["raise_positives", "swap_positives"]
Positives = Literal["judged", "optional", "teacher"]
# One wording for whoever needs positives and finds none.
NOTHING_RELEVANT = "No document of {} is judged relevant"
WITHOUT_POSITIVES = (
    "Train with KL alone (loss='kl'), build it with the teacher's best as positive (selection positives='teacher'), or "
    "give judgements."
)


@dataclass(frozen=True, repr=False)
class Selection:
    """How a list is made of the judged positives and the candidates of a query.

    The defaults take the candidates as the first stage ranked them, without copies of what is already in the list.

    Args:
        choice: `"top"`: the first candidates. `"random"`: any of the pool. `"quantiles"`: one of each stratum of the
            pool by the teacher's score, from the hardest to the easiest, which beat random and top in one study
            (arXiv:2604.04734) and needs a score for the whole pool.
        pool_size: Candidates that are looked at for a query. `None` takes as many as negatives are wanted, four times
            as many if some are filtered or drawn. Filters and quantiles score the whole pool.
        relative_margin: Keep a negative only if it is less than this share as relevant as the positive, such as 0.95
            (NV-Retriever); see `false_negatives`.
        absolute_margin: Keep a negative only if its score is at least this far below the positive's, such as 3.0 for
            logits.
        reference: Which positive the margins are measured from, the `"best"` or the `"worst"` by the teacher's score.
            The worst is the stricter one, and empties the list where the teacher misjudges one positive.
        label_correction: Change the stored scores where the teacher contradicts the judgements:
            `st_wkl.functional.raise_positives` or `swap_positives`.
        max_positives: Positives of a list at most, those with the highest gain and rank first. The others are left
            out; they are never negatives.
        near_duplicates: Candidates whose words have at least this Jaccard coefficient with those of a positive are
            left out: unjudged versions of a relevant document. `None` for exact copies only.
        positives: What becomes of a query without a judged positive. `"judged"`: it is dropped, counted. `"optional"`:
            its list has none, and teaches by the teacher's scores alone. `"teacher"`: the teacher's best document of
            its list is one, if it is ahead by `positive_margin`; copies and near copies of it are no negatives. With
            these two, queries that no split judges are learnt from, too. `None`: `"judged"`, or `"optional"` where the
            collection has no split `train` to learn from.
        positive_margin: How far the teacher's best stands ahead of the next, near copies aside, to be a positive, in
            logits: at 1 its odds are 2.7 times as good. Scores that are probabilities are turned into logits for it.
            Without a lead the best of two equals would be a positive, and the other one a negative.
        seed: For `"random"` and `"quantiles"`. The draw of a query depends on nothing else than this and its id.

    Raises:
        ValueError: A value is out of range.

    References:
        Moreira et al.: NV-Retriever: Improving text embedding models with effective hard-negative mining.
        arXiv:2407.15831.
    """

    choice: Choice = "top"
    pool_size: int | None = None
    relative_margin: float | None = None
    absolute_margin: float | None = None
    reference: Reference = "best"
    label_correction: Correction | None = None
    max_positives: int | None = None
    near_duplicates: float | None = 0.9
    positives: Positives | None = None
    positive_margin: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate."""
        options = {
            "choice": ("top", "random", "quantiles"),
            "reference": ("best", "worst"),
            "label_correction": (None, "raise_positives", "swap_positives"),
            "positives": (None, "judged", "optional", "teacher"),
        }
        for name, allowed in options.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        check_options(pool_size=self.pool_size, max_positives=self.max_positives, seed=self.seed)
        check_options(positive_margin=self.positive_margin)
        if self.positive_margin != 1.0 and self.positives != "teacher":
            raise OptionError("positive_margin", "is the lead of the teacher's best: set positives to teacher.")
        _check_margins(self.relative_margin, self.absolute_margin)
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            raise ValueError(f"near_duplicates is a Jaccard coefficient in (0, 1], got {self.near_duplicates}.")

    def __repr__(self) -> str:
        return f"Selection({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    def to_dict(self) -> dict[str, Any]:
        """Return the options as identities hold them: those for unjudged queries only where these are kept."""
        later = ("positives", "positive_margin") if self.positives is None else ()
        return {name: value for name, value in asdict(self).items() if name not in later}

    @property
    def keeps_unjudged(self) -> bool:
        """Whether queries without a judged positive stay."""
        return self.positives in ("optional", "teacher")

    @property
    def filters(self) -> bool:
        """Whether negatives are filtered by the teacher's score."""
        return self.relative_margin is not None or self.absolute_margin is not None

    @property
    def needs_scores(self) -> bool:
        """Whether the whole pool must be scored before the choice."""
        return self.filters or self.choice == "quantiles" or self.positives == "teacher"

    def pool(self, num_negatives: int) -> int:
        """Return the size of the pool for lists of `num_negatives`."""
        if self.pool_size is not None:
            return max(self.pool_size, num_negatives)
        return num_negatives * (4 if self.filters or self.choice != "top" else 1)


def false_negatives(
    scores: Sequence[float] | np.ndarray,
    positive_scores: Sequence[float] | np.ndarray,
    *,
    relative_margin: float | None = None,
    absolute_margin: float | None = None,
    reference: Reference = "best",
    probabilities: bool = False,
) -> np.ndarray:
    """Say which candidates the teacher takes for about as relevant as a judged positive: probably unjudged positives.

    With `s⁺` the score of the reference, a candidate with score `s` is kept if

        s ≤ s⁺ − absolute_margin    and    p(s) < relative_margin · p(s⁺),   p = sigmoid

    A share of a logit has no meaning: for a negative one, 0.95·s⁺ lies above s⁺. So the relative margin compares
    probabilities. Below a probability of a few percent it is a margin of −ln(relative_margin) between logits; close to
    1 it takes any candidate out that the teacher is nearly sure of, however far below the positive.

    Args:
        scores: `(n,)` teacher scores of the candidates, raw logits.
        positive_scores: `(m,)` teacher scores of the positives of the same query, m ≥ 1.
        relative_margin: In (0, 1]; `None` for no such filter.
        absolute_margin: From 0, in the unit of the scores; `None` for no such filter.
        reference: The `"best"` or the `"worst"` of the positives by their scores.
        probabilities: The scores are probabilities already, so no sigmoid is applied.

    Returns:
        `(n,)` boolean, True for probable false negatives.

    Raises:
        ValueError: There is no positive, or a margin is out of range.

    Example:
        >>> false_negatives([4.0, 1.5, -3.0], [4.5, 0.0], absolute_margin=3.0)
        array([ True, False, False])
        >>> false_negatives([4.0, 1.5, -3.0], [-1.0], relative_margin=0.95)
        array([ True,  True, False])
    """
    _check_margins(relative_margin, absolute_margin)
    values, positives = np.asarray(scores, dtype=np.float64), np.asarray(positive_scores, dtype=np.float64)
    if not len(positives):
        raise ValueError("There is no positive to compare with.")
    limit = positives.max() if reference == "best" else positives.min()
    removed = np.zeros(len(values), dtype=bool)
    if absolute_margin is not None:
        removed |= values > limit - absolute_margin
    if relative_margin is not None:
        if probabilities:
            removed |= values >= relative_margin * limit
        else:  # logarithms: the sigmoid of a logit below -745 is 0
            removed |= -np.logaddexp(0, -values) >= math.log(relative_margin) - np.logaddexp(0, -limit)
    return removed


def lead(best: float, others: Sequence[float] | np.ndarray, *, probabilities: bool = False) -> float:
    """Return how far a document stands ahead of the best of others by the teacher's scores, in logits.

    Args:
        best: Its score.
        others: `(n,)` scores of the others, without copies of it.
        probabilities: The scores are probabilities; the lead is that of their logits, a millionth from 0 and 1 at most.

    Returns:
        The lead, below 0 if it is behind; infinite if there is no other.

    Example:
        >>> lead(4.5, [1.5, -3.0]), round(lead(0.8, [0.5], probabilities=True), 3)
        (3.0, 1.386)
    """
    values = np.array([best, *others], np.float64)
    if probabilities:
        values = values.clip(1e-6, 1 - 1e-6)
        values = np.log(values) - np.log1p(-values)
    return float(values[0] - values[1:].max(initial=-np.inf))


def choose(
    count: int,
    n: int,
    choice: Choice = "top",
    *,
    scores: Sequence[float] | np.ndarray | None = None,
    seed: int = 0,
    key: str = "",
) -> list[int]:
    """Choose `n` of `count` candidates.

    Args:
        count: Number of candidates, which stand in the order of the first stage.
        n: How many to choose; all if there are no more.
        choice: `"top"`, `"random"` or `"quantiles"`, see `Selection`.
        scores: `(count,)` teacher scores, for `"quantiles"`.
        seed: Seed of the draw.
        key: Id of the query, so that each query has its own draw whatever the others are.

    Returns:
        Places. `"top"` keeps their order; the others come in random order, so that the first k are a random choice
        (of the strata) too.

    Raises:
        ValueError: `"quantiles"` without one score for each candidate.

    Example:
        >>> choose(5, 2)
        [0, 1]
        >>> sorted(place // 2 for place in choose(6, 3, "quantiles", scores=[6, 5, 4, 3, 2, 1]))
        [0, 1, 2]
    """
    if n < 0:
        raise ValueError(f"n must be 0 or more, got {n}.")
    if choice == "top":
        return list(range(min(n, count)))
    rng = np.random.default_rng([seed, int.from_bytes(blake2b(key.encode(), digest_size=8).digest())])
    if choice == "random":
        return [int(place) for place in rng.permutation(count)[:n]]
    if scores is None or len(scores) != count:
        raise ValueError(f"Quantiles need the teacher's score of each of the {count} candidates.")
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")
    strata = np.array_split(order, max(min(n, count), 1))
    chosen = [int(rng.choice(stratum)) for stratum in strata if len(stratum)]
    return [chosen[place] for place in rng.permutation(len(chosen))]


def duplicates(
    candidates: Mapping[str, str], positives: Mapping[str, str], near: float | None = 0.9
) -> tuple[list[str], list[str], list[str]]:
    """Find candidates that repeat a positive or another candidate.

    Args:
        candidates: `{id: text}`, best first.
        positives: `{id: text}` of everything that is judged relevant for the query.
        near: Jaccard coefficient of the sets of words from which a candidate is a version of a positive; `None` for
            exact copies only. Case, white space and Unicode's ways of writing one letter never count.

    Returns:
        Ids of copies of a positive, of near copies of a positive, and of copies of an earlier candidate.

    Example:
        >>> duplicates({"a": "Cats purr.", "b": "cats PURR!", "c": "x", "d": "X"}, {"p": "cats purr."})
        (['a'], ['b'], ['d'])
    """
    texts = Texts([*candidates.values(), *positives.values()], near)
    places, sizes = (
        np.arange(len(candidates) + len(positives)),
        [np.array([len(part)]) for part in (candidates, positives)],
    )
    kinds = find_copies(texts, places[: len(candidates)], sizes[0], places[len(candidates) :], sizes[1])
    copies, versions, repeated = (
        [key for key, kind in zip(candidates, kinds.tolist(), strict=True) if kind == wanted]
        for wanted in (COPY, NEAR, REPEATED)
    )
    return copies, versions, repeated


def own_result(query_id: str, ignore_identical_ids: bool) -> set[str]:
    """Return the id that is no result of a query, in a set: its own, where these are left out."""
    return {query_id} if ignore_identical_ids else set()


def without_own(run: Mapping[str, Mapping[str, float]], ignore_identical_ids: bool) -> dict[str, dict[str, float]]:
    """Leave each query's own document out of its results, where these are left out."""
    return {
        query_id: {key: score for key, score in found.items() if key not in own_result(query_id, ignore_identical_ids)}
        for query_id, found in run.items()
    }


def is_own_text(query: str, document: str) -> bool:
    """Return whether the text of the document of a query's id is the query's, with or without a title before it.

    Example:
        >>> is_own_text("Cats  purr.", "On animals cats purr."), is_own_text("1", "21")
        (True, False)
    """
    return f" {plain_text(document)}".endswith(f" {plain_text(query)}")


def twin_queries(queries: Mapping[str, str]) -> list[list[str]]:
    """Return the ids of queries that have the same words, case and white space aside, for all such words."""
    twins: dict[str, list[str]] = defaultdict(list)
    for query_id, text in queries.items():
        twins[plain_text(text)].append(query_id)
    return [query_ids for query_ids in twins.values() if len(query_ids) > 1]


def shared_judgements(
    queries: Mapping[str, str], judgements: Mapping[str, Mapping[str, int]]
) -> tuple[dict[str, Mapping[str, int]], dict[str, int]]:
    """Give queries of the same words the same judgements: what answers one is no negative of the other.

    Args:
        queries: `{query_id: text}`; case, white space and Unicode's ways of writing one letter do not count.
        judgements: `{query_id: {document_id: gain}}`.

    Returns:
        The judgements, where each document has its largest gain of any of the queries, or one below 0 if there is one
        (TREC's "do not use"); and for each query that has learnt something, the number of its judgements that have.

    Example:
        >>> shared_judgements({"a": "Who purrs?", "b": "who  purrs?"}, {"a": {"d1": 1}, "b": {"d2": 2}})
        ({'a': {'d1': 1, 'd2': 2}, 'b': {'d2': 2, 'd1': 1}}, {'a': 1, 'b': 1})
    """
    shared, learnt = {**judgements}, {}
    for query_ids in twin_queries({query_id: queries[query_id] for query_id in judgements}):
        gains: dict[str, list[int]] = defaultdict(list)
        for query_id in query_ids:
            for document_id, gain in judgements[query_id].items():
                gains[document_id].append(gain)
        best = {document_id: min(found) if min(found) < 0 else max(found) for document_id, found in gains.items()}
        for query_id in query_ids:
            before = judgements[query_id]
            shared[query_id] = {document_id: best[document_id] for document_id in {**before, **best}}
            learnt[query_id] = sum(before.get(document_id) != gain for document_id, gain in best.items())
    return shared, {query_id: learnt[query_id] for query_id in judgements if learnt.get(query_id)}


def no_negatives(
    rows: Sequence[tuple[str, Sequence[str], Sequence[float], str | None]], texts: Iterable[str]
) -> list[list[str]] | None:
    """Return which documents of a batch are no negatives of each row, beside those in its own list.

    Args:
        rows: Query, documents, labels, and the document that is the query itself or nothing.
        texts: The different documents of the batch.

    Returns:
        For each row its own document, what has the query's very text, and what answers another row of the same words;
        `None` where no row has any.
    """
    queries = {str(number): query for number, (query, *_) in enumerate(rows)}
    longest = 4 * max(map(len, queries.values())) + 64  # no spelling of a query is longer, but for runs of spaces
    plain: dict[str, list[str]] = {}
    for text in texts:
        if len(text) <= longest:
            plain.setdefault(plain_text(text), []).append(text)
    found: list[set[str]] = []
    for query, documents, _, own in rows:  # what stands in its list has a label
        found.append({*([own] if own else []), *plain.get(plain_text(query), ())} - {*documents})
    for twins in twin_queries(queries):
        lists = {twin: zip(*rows[int(twin)][1:3], strict=True) for twin in twins}
        answers = {twin: {text for text, gain in judged if gain > 0} for twin, judged in lists.items()}
        for twin in twins:
            found[int(twin)] |= set().union(*answers.values()) - answers[twin]
    return [sorted(others) for others in found] if any(found) else None


def _check_margins(relative: float | None, absolute: float | None) -> None:
    if relative is not None and not 0 < relative <= 1:
        raise ValueError(f"relative_margin is a share of the positive's probability in (0, 1], got {relative}.")
    if absolute is not None and not 0 <= absolute < math.inf:
        raise ValueError(f"absolute_margin is a finite distance of 0 or more, got {absolute}.")
