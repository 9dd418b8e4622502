"""What a training set knows of a test split: the same queries, nearly the same queries, the same relevant documents."""

from __future__ import annotations

import dataclasses
import random
import unicodedata
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from st_wkl.data.collection import Collection
from st_wkl.text import near_texts

if TYPE_CHECKING:
    from st_wkl.data.dataset import DistillationDataset

# A judgement below 0 is TREC's mark for documents that are neither relevant nor irrelevant; the builder leaves such
# documents out of a list altogether.
UNUSABLE = -1
# What a dataset says of queries without a judged positive, if it has any.
UNJUDGED = ("unjudged_queries", "teacher_positives")


@dataclass(frozen=True, repr=False)
class LeakReport:
    """What of a test split a training set has seen.

    Attributes:
        training: Name of the training side.
        test: Name of the test side.
        test_queries: Number of test queries with a relevant document.
        test_judgements: Number of their judgements with a gain above 0.
        equal_queries: `{test query: training queries}` with the same text but for case and white space.
        near_queries: `{test query: {training query: Jaccard}}` of the others that share nearly all words.
        shared_documents: `{test query: its relevant documents that are positives of the training set}`.
        near: Jaccard coefficient from which two queries count as near.
        unjudged_queries: Number of training queries without a judged positive; they count among the queries.
        teacher_positives: Number of these whose positive is the teacher's best document.
    """

    training: str
    test: str
    test_queries: int
    test_judgements: int
    equal_queries: dict[str, list[str]] = field(default_factory=dict)
    near_queries: dict[str, dict[str, float]] = field(default_factory=dict)
    shared_documents: dict[str, list[str]] = field(default_factory=dict)
    near: float = 0.9
    unjudged_queries: int = 0
    teacher_positives: int = 0

    @property
    def shared_judgements(self) -> int:
        """Number of relevant test judgements that point at a training positive."""
        return sum(map(len, self.shared_documents.values()))

    @property
    def share_of_judgements(self) -> float:
        """Share of the relevant test judgements that point at a training positive, from 0 to 1."""
        return self.shared_judgements / self.test_judgements if self.test_judgements else 0.0

    @property
    def share_of_queries(self) -> float:
        """Share of the test queries with such a judgement, from 0 to 1."""
        return len(self.shared_documents) / self.test_queries if self.test_queries else 0.0

    def __bool__(self) -> bool:
        """Return whether there is any leak."""
        return bool(self.equal_queries or self.near_queries or self.shared_documents)

    def to_dict(self) -> dict[str, Any]:
        """Return the counts and shares, without texts or ids, as JSON values."""
        return {
            "training": self.training,
            "test": self.test,
            "test_queries": self.test_queries,
            "test_judgements": self.test_judgements,
            "equal_queries": len(self.equal_queries),
            "near_queries": len(self.near_queries),
            "near": self.near,
            "queries_with_shared_documents": len(self.shared_documents),
            "share_of_queries": round(self.share_of_queries, 6),
            "shared_judgements": self.shared_judgements,
            "share_of_judgements": round(self.share_of_judgements, 6),
            **{name: count for name in UNJUDGED if (count := getattr(self, name))},
        }

    def __repr__(self) -> str:
        """Return what a reader of a result on the test split has to know."""
        return (
            f"Of {self.test_queries:,} queries of {self.test}, {len(self.shared_documents):,} "
            f"({self.share_of_queries:.1%}) have a relevant document that is also a positive of {self.training}: "
            f"{self.share_of_judgements:.1%} of the {self.test_judgements:,} relevant judgements. "
            f"{len(self.equal_queries):,} test queries are training queries too, and {len(self.near_queries):,} are "
            f"nearly one (Jaccard coefficient of the words ≥ {self.near:g})."
            + (
                f" {self.unjudged_queries:,} training queries have no judged positive; of {self.teacher_positives:,} "
                "the teacher's best document is one."
                if self.unjudged_queries
                else ""
            )
        )


def find_leaks(
    train: DistillationDataset | tuple[Collection, str] | str,
    collection: Collection,
    split: str = "test",
    *,
    near: float = 0.9,
) -> LeakReport:
    """Compare the queries and positives of a training set with those of a test split.

    Texts are compared, not ids, so that a dataset of another collection can be checked, and copies of a document under
    another id are found. Two queries are equal if their texts are, whatever their case and white space. They are near
    if they are not equal and the Jaccard coefficient of their sets of words is at least `near`; below 10 different
    words, 0.9 finds other punctuation, orders and repetitions only. All such pairs are found (an inverted index over
    the rarest words of each query, no sampling). Words are those of `st_wkl.text.words`: pairs of characters where a
    script has no spaces.

    Args:
        train: A distillation dataset, `(collection, split)`, or the name of another split of `collection`.
        collection: Where the test split is.
        split: Name of the test split.
        near: Jaccard coefficient in (0, 1]; 0.9 is one different word in 19.

    Raises:
        ValueError: There is no such split, or `near` is out of range.

    Example:
        >>> collection = Collection(
        ...     "mine",
        ...     documents={"d1": "Cats purr.", "d2": "Dogs bark."},
        ...     queries={"q1": "who purrs", "q2": "Who  PURRS", "q3": "purring animals"},
        ...     qrels={"train": {"q1": {"d1": 1}}, "test": {"q2": {"d2": 1}, "q3": {"d1": 1}}},
        ... )
        >>> report = find_leaks("train", collection)
        >>> report.equal_queries, report.shared_documents
        ({'q2': ['q1']}, {'q3': ['d1']})
    """
    if not 0 < near <= 1:
        raise ValueError(f"near is a Jaccard coefficient above 0 and at most 1, got {near}.")
    name, queries, positive_texts = _training_side(train, collection)
    unjudged = {} if isinstance(train, str | tuple) else train.unjudged()
    relevant = collection.positives(split)
    equal, nearly = near_texts({query_id: collection.queries[query_id] for query_id in relevant}, queries, near)
    keys = {document_key(text) for text in positive_texts}
    shared = {
        query_id: found
        for query_id, judged in relevant.items()
        if (found := [key for key in judged if document_key(collection.documents[key]) in keys])
    }
    return LeakReport(
        training=name,
        test=f"{collection.name}, {split}",
        test_queries=len(relevant),
        test_judgements=sum(map(len, relevant.values())),
        equal_queries=equal,
        near_queries=nearly,
        shared_documents=shared,
        near=near,
        **unjudged,
    )


def document_disjoint(
    collection: Collection,
    train: str = "train",
    test: str = "test",
    *,
    test_share: float = 1.0,
    seed: int = 0,
) -> Collection:
    """Return the collection with two splits that have no relevant document in common.

    By default the test split stays as it is: every training judgement of a document that is relevant in the test split
    is taken back. Taken back means a gain of -1, TREC's mark for "do not use", so that the builder does not take a
    document that is known to be relevant for a negative. Queries that lose their last relevant document lose all
    judgements. Copies of a document (equal texts) count as one document. Other splits stay as they are.

    Where nearly all documents are shared, little is left of the training split (NFCorpus: 823 of 2,590 queries). A
    `test_share` below 1 gives each shared document to the test side with that probability, else to the training side.
    The test split is another one then: its numbers compare with no published ones.

    Args:
        collection: A collection with both splits.
        train: Split that gives way.
        test: Split that stays.
        test_share: Share of the shared documents that the test side keeps.
        seed: Which ones, if not all.

    Raises:
        ValueError: A split does not exist, the two are one, or a side would have no query left.

    Example:
        >>> collection = Collection(
        ...     "mine",
        ...     documents={"d1": "Cats purr.", "d2": "Dogs bark."},
        ...     queries={"q1": "cats and dogs", "q2": "who purrs"},
        ...     qrels={"train": {"q1": {"d1": 1, "d2": 1}}, "test": {"q2": {"d1": 1}}},
        ... )
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     document_disjoint(collection).qrels
        {'train': {'q1': {'d1': -1, 'd2': 1}}, 'test': {'q2': {'d1': 1}}}
    """
    if train == test:
        raise ValueError(f"train and test are both {train!r}; give two splits.")
    if not 0 <= test_share <= 1:
        raise ValueError(f"test_share must be from 0 to 1, got {test_share}.")
    sides = {split: relevant_keys(collection, split) for split in (train, test)}
    shared = sorted(sides[train] & sides[test])
    for_test = set(shared) if test_share == 1 else {key for key in shared if _draw(key, seed) < test_share}
    qrels = dict(collection.qrels)
    for split, lost in ((train, for_test), (test, set(shared) - for_test)):
        qrels[split] = _without(collection, split, lost)
        if not qrels[split]:
            raise ValueError(
                f"Every relevant document of split {split!r} of {collection.name!r} is shared: no query is left. "
                "Try another test_share."
            )
        if lost:
            before = collection.positives(split)
            kept = sum(gain > 0 for judged in qrels[split].values() for gain in judged.values())
            total = sum(map(len, before.values()))
            warnings.warn(
                f"{total - kept:,} of {total:,} relevant judgements and {len(before) - len(qrels[split]):,} of "
                f"{len(before):,} queries of split {split!r} of {collection.name!r} are taken back, since their "
                f"documents are relevant in split {test if split == train else train!r} too.",
                stacklevel=2,
            )
    return dataclasses.replace(collection, name=f"{collection.name}-document-disjoint", qrels=qrels, missing="raise")


def _draw(key: str, seed: int) -> float:
    return random.Random(f"{seed} {key}").random()


def relevant_keys(collection: Collection, split: str) -> set[str]:
    """Return the keys of the documents that are relevant in a split, see `document_key`."""
    relevant = collection.positives(split)
    return {document_key(collection.documents[key]) for judged in relevant.values() for key in judged}


def _without(collection: Collection, split: str, lost: set[str]) -> dict[str, dict[str, int]]:
    kept = {}
    for query_id, judged in collection.judgements(split).items():
        gains = {
            document_id: UNUSABLE if gain > 0 and document_key(collection.documents[document_id]) in lost else gain
            for document_id, gain in judged.items()
        }
        if any(gain > 0 for gain in gains.values()):
            kept[query_id] = gains
    return kept


def document_key(text: str) -> str:
    """Return what copies of a document share: its text, white space and Unicode's ways of writing a letter aside."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _training_side(
    train: DistillationDataset | tuple[Collection, str] | str, collection: Collection
) -> tuple[str, dict[str, str], Iterable[str]]:
    """Return a name, the queries, and the texts of the positives."""
    if isinstance(train, str):
        train = (collection, train)
    if isinstance(train, tuple):
        source, split = train
        relevant = source.positives(split)
        positives = {document_id for judged in relevant.values() for document_id in judged}
        queries = {query_id: source.queries[query_id] for query_id in relevant}
        return f"{source.name}, {split}", queries, [source.documents[key] for key in positives]
    name = str(train.provenance.get("collection", {}).get("name", "the training set"))
    of_split = train.provenance.get("split")
    queries = dict(zip(train.queries["query_id"], train.queries["text"], strict=True))
    texts = dict(zip(train.documents["document_id"], train.documents["text"], strict=True))
    used = {document_id for judged in train.positives().values() for document_id in judged}
    name = f"{name}, {of_split}" if of_split else name
    return name, {query_id: queries[query_id] for query_id in train.train["query_id"]}, [texts[key] for key in used]
