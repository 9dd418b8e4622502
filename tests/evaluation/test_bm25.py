"""BM25 is the baseline of every table: it must be as strong as it says, and say which one it is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from st_wkl.cli import app
from st_wkl.evaluation import BM25, evaluate
from tests.evaluation.test_bad_input import beir
from tests.helpers.command import CliRunner
from tests.helpers.tiny import DOCUMENTS, GAINS, QUERIES, collection

PLAIN = BM25(k1=0.9, b=0.4, language=None)
COLUMNS = ("cranfield", "nfcorpus", "scifact", "insuranceqa")


def documented(call: str) -> dict[str, float]:
    """Return the numbers that the documentation of `BM25` gives for some parameters."""
    row = next(line for line in str(BM25.__doc__).splitlines() if f"| `{call}` |" in line)
    return dict(zip(COLUMNS, map(float, re.findall(r" (\.\d+) ", row)), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "reference"), [("cranfield", 0.385), ("scifact", 0.667)])
@pytest.mark.filterwarnings("ignore:.*documents of 'cranfield' have no text")
def test_the_weak_and_the_strong_baseline(name: str, reference: float, shared_data: Path) -> None:
    """Published baselines differ by more than most students gain; ours must be reproducible, and as documented."""
    weak, strong = (evaluate(bm25, shared_data / name, show_progress=False).ndcg_at_10 for bm25 in (PLAIN, "bm25"))
    assert weak == pytest.approx(reference, abs=0.01)
    assert weak == pytest.approx(documented("BM25(k1=0.9, b=0.4, language=None)")[name], abs=0.001)
    assert strong == pytest.approx(documented("BM25()")[name], abs=0.001)


def test_parameters_reach_the_scores_and_the_names(student: Any) -> None:
    """Two baselines under one name would be mixed up in every table and cache."""
    plain, default = (evaluate(bm25, collection(), show_progress=False) for bm25 in (PLAIN, "bm25"))
    assert plain.task().per_query != default.task().per_query
    assert (plain.name, default.name) == ("bm25-k1-0.9-b-0.4-language-none", "bm25")
    assert plain.model["settings"] == {
        **{"formula": "lucene", "k1": 0.9, "b": 0.4},
        **{"stemmer": None, "stop words": None},
    }
    assert plain.model["revision"] != default.model["revision"]
    found = {
        first.name: evaluate(student, collection(), first_stage=first, top_k=2, show_progress=False).task()
        for first in (PLAIN, BM25())
    }
    assert {scores.task for scores in found.values()} == {f"tiny-rerank-{name}-top2" for name in found}
    assert len({scores.dataset_revision for scores in found.values()}) == 2


def test_the_command_line_takes_parameters(tmp_path: Path) -> None:
    """As a model and as a first stage, in one word."""
    folder = beir(tmp_path / "c", {key: text or "." for key, text in DOCUMENTS.items()}, QUERIES, GAINS)
    text = "bm25:k1=0.9,b=0.4,language=none"
    done = CliRunner().invoke(app, ["evaluate", text, str(folder), "--first-stage", text, "--json", "--quiet"])
    assert done.exit_code == 0, done.output
    assert list(json.loads(done.stdout)["tasks"]) == [f"c-rerank-{PLAIN.name}-top100"]


@pytest.mark.parametrize("text", ["bm25:k2=1", "bm25:k1=high", "bm25:k1", "bm25:b=2", "bm25:k1=-1"])
def test_wrong_parameters_are_named(text: str) -> None:
    """A typo must not give the default baseline under another name."""
    with pytest.raises(ValueError, match=f"'{text}': write it as bm25:k1=0.9,b=0.4,language=none"):
        BM25.of(text)


def test_what_else_begins_with_bm25_is_a_folder_or_model() -> None:
    """A run file or a model may have the word in its name."""
    assert [BM25.of(source) for source in ("bm25.trec", "bm25-student", Path("bm25"))] == [None] * 3
    assert BM25.of(PLAIN) is PLAIN
    assert BM25.of("bm25") == BM25() == BM25.of("bm25:")
