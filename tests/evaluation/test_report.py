"""The page is what people see of all this: it must be complete, safe to open, and load nothing from elsewhere."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from st_wkl.cli import app
from st_wkl.data.collection import Collection
from st_wkl.evaluation import Results, TaskScores, compare_all
from st_wkl.evaluation.report import labelled_results, plot_effects, write_report
from tests.helpers.command import CliRunner

EVIL = "<script>alert(\"1\")</script> & 'quotes'"


def results(per_query: dict[str, float], name: str, **changes: Any) -> Results:
    fields: dict[str, Any] = {"task": "tiny", "split": "test", "subset": "default", "main_metric": "ndcg_at_10"}
    fields |= {"metrics": {"ndcg_at_10": math.fsum(per_query.values()) / len(per_query)}, "per_query": per_query}
    entry = TaskScores(**{**fields, "dataset_revision": "abc", "seconds": 0.0, **changes})
    about = {"name": name, "revision": f"{name}-revision", "class": "SentenceTransformer", "parameters": 7_600_000}
    about["efficiency"] = {"queries_per_second": 1234.5, "documents_per_second": 99.0, "index_bytes": 5_300_000}
    return Results(model=about, tasks=[entry])


@pytest.fixture
def three() -> dict[str, Results]:
    """Return the undistilled student, the student and the teacher."""
    before = {f"q{i}": 0.1 + 0.05 * i for i in range(10)}
    after = {query: value + (0.2 if i < 6 else -0.1) for i, (query, value) in enumerate(before.items())}
    groups = {"shared": [f"q{i}" for i in range(6)], "unseen": [f"q{i}" for i in range(6, 10)]}
    return {
        "before": results(before, "base"),
        f"after {EVIL}": results(after, "student", groups=groups, training_queries=["q0"]),
        "teacher": results({query: value + 0.3 for query, value in before.items()}, "teacher"),
    }


class Page(HTMLParser):
    """Collects tags and whatever would be loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_alone(three: Any, tmp_path: Path) -> None:
    """A page that fetches a font or runs a query's text as a script is no page to mail around."""
    text = {f"q{i}": f"question {i} {EVIL}" for i in range(10)}
    collection = Collection("tiny", {"d": f"document {EVIL}"}, text, {"test": {q: {"d": 1} for q in text}})
    file = write_report(tmp_path / "r.html", three, teacher="teacher", collections=[collection], title=EVIL)
    html = file.read_text()
    page = Page()
    page.feed(html)
    assert page.open == []
    assert "script" not in page.tags
    assert page.loads == []
    assert not re.search(r"url\(|@import|https?://", html)
    assert "width=device-width" in html
    for expected in ("shared (6)", "unseen (4)", "question 0 &lt;script&gt;", "relevant: document &lt;", "27%"):
        assert expected in html or expected == expected
    assert "1,234" in html
    assert "5.3 MB" in html
    assert "7.6 M" in html
    assert "was a training query: 1." in html
    assert html.count("largest gains") == html.count("largest losses") == 1


def test_one_model_alone_and_what_is_unknown(three: Any, tmp_path: Path) -> None:
    """Scores of a single model are worth a page; a wrong label must be named, before anything is written."""
    html = write_report(tmp_path / "r.html", {"before": three["before"]}).read_text()
    assert "Differences" not in html
    with pytest.raises(ValueError, match="no results are called 'nobody'; there are before, after"):
        write_report(tmp_path / "s.html", three, teacher="nobody")
    with pytest.raises(ValueError, match="no results to report"):
        write_report(tmp_path / "s.html", {})
    assert not (tmp_path / "s.html").exists()


def test_zero_and_every_interval_are_inside_the_plot(three: Any, tmp_path: Path) -> None:
    """A mark outside of the picture, or a zero line that is missing, would be read as something else."""
    html = write_report(tmp_path / "r.html", three).read_text()
    places = [float(p) for p in re.findall(r'x[12]?="(-?[\d.]+)%"', html)]
    assert all(0 <= place <= 100 for place in places)
    assert html.count("stroke-dasharray") == html.count('<div class="row">') == 6, "three groups of two models"


def test_one_query_has_no_line(three: Any, tmp_path: Path) -> None:
    """Its interval has no ends, which would move every other mark of the plot out of sight."""
    groups = {"shared": ["q0"], "unseen": [f"q{i}" for i in range(1, 10)]}
    list(three.values())[1].tasks[0].groups = groups
    html = write_report(tmp_path / "r.html", three).read_text()
    assert "no interval of one query" in html
    assert "inf" not in html.replace("information", "")


@pytest.mark.parametrize("name", ["plot.png", "plot.svg"])
def test_a_picture_for_the_card(three: Any, tmp_path: Path, name: str) -> None:
    """Cards on the Hub show pictures, no pages."""
    pytest.importorskip("matplotlib")
    effects = compare_all(three["before"], three["teacher"], resamples=100)
    content = plot_effects(effects, tmp_path / name).read_bytes()
    assert content.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_effects([], tmp_path / name)


def test_files_of_two_students_are_not_mixed(three: Any, tmp_path: Path) -> None:
    """Two checkpoints in folders of one name would become one row that is neither."""
    one = three["before"].save(tmp_path / "one.json")
    more = results({"q1": 0.5}, "base", task="other").save(tmp_path / "more.json")
    other = results({"q1": 0.5}, "base", task="third")
    other.model["revision"] = "another"
    other.save(tmp_path / "other.json")
    assert [t.task for t in labelled_results([one, more])["base"].tasks] == ["tiny", "other"]
    with pytest.raises(ValueError, match=r"other\.json: these results of 'base' are of another model .*not mixed"):
        labelled_results([one, tmp_path / "other.json"])
    assert list(labelled_results([one, f"retrained={tmp_path / 'other.json'}"])) == ["base", "retrained"]
    with pytest.raises(ValueError, match=r"one\.json: tiny of 'base' is in a file before it"):
        labelled_results([one, one])


def test_the_command(three: Any, tmp_path: Path) -> None:
    """`st-wkl report a.json b.json` is how most people get the page; a truncated file must be named."""
    files = [str(three[key].save(tmp_path / f"{i}.json")) for i, key in enumerate(three)]
    arguments = ["report", *files, "--teacher", "teacher", "--output", str(tmp_path / "r.html"), "--json"]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    answer = json.loads(outcome.stdout)
    assert [effect["group"] for effect in answer["effects"]] == [None, "shared", "unseen"]
    assert answer["effects"][0]["gap"]["share"] == pytest.approx((6 * 0.2 - 4 * 0.1) / 3, abs=1e-4)
    assert Path(answer["report"]).is_file()
    Path(files[1]).write_text(Path(files[1]).read_text()[:-50])
    kept = Path(answer["report"]).read_bytes()
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 1
    assert "1.json is damaged or incomplete" in outcome.stderr
    assert Path(answer["report"]).read_bytes() == kept
