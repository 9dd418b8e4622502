"""A card must hold every number with its context, nothing of the machine, and all that its owner wrote."""

from __future__ import annotations

import getpass
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard, parse_eval_result_entries
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss

from st_wkl.evaluation import Comparison
from st_wkl.publish.card_results import PICTURE
from st_wkl.publish.model_card import BEGIN, END, headed, write_model_card
from tests.helpers.cards import CITATION, record, results
from tests.helpers.students import CLASSES, make_student

ALL: dict[str, Any] = {
    "results": {"before": results("potion", 0.697), "after": results("student", 0.711), "BM25": results("BM25", 0.8)},
    "comparison": Comparison(0.014, 0.008, 0.02, 1e-4, 2000, 400, 1300, 300),
    "notes": ["Test questions are new, but their documents were seen in training."],
    "command": "st-wkl demo",
}


@pytest.fixture(scope="module")
def trained(static_student_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a student that the stock trainer has trained for one step, card and all."""
    base = tmp_path_factory.mktemp("trained")
    model = SentenceTransformer(str(static_student_path), device="cpu")
    rows = {"query": ["cats", "dogs"], "positive": ["purr", "bark"], "negative": ["bark", "purr"]}
    SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(base / "out"), max_steps=1, report_to="none", save_strategy="no", disable_tqdm=True
        ),
        train_dataset=Dataset.from_dict({**rows, "label": [[1.0, 0.0]] * 2}),
        loss=DistillKLDivLoss(model),
    ).train()
    model.save_pretrained(str(base / "student"))
    return base / "student"


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of the trained student's folder that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "student"))


def front_matter(path: Path) -> dict[str, Any]:
    """Return what the Hub's YAML reader sees; safe_load fails on numpy objects."""
    loaded: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8").split("---\n")[1])
    return loaded


def test_the_block_says_how_and_how_well(folder: Path) -> None:
    """A reader must find loss, parameters, teacher, data, cost and every number with its uncertainty."""
    original = (folder / "README.md").read_text()
    text = write_model_card(folder, record=record(), **ALL, keep_samples=True).read_text()
    block = text[text.index(BEGIN) : text.index(END)]
    for part in (
        "| Loss | `WeightedKLDistillationLoss`: gamma `2` |",
        "| Loss | `WeightedKLDistillationLoss`: gamma `2`, alpha `1` |",
        "`ms-marco\\|L12`: backend `onnx`, max_length `256`, activation `identity`",
        "700 queries; 5,600 scored pairs; the teacher's best document is judged relevant for 88.4% of the queries; ",
        "learning_rate `0.03`",
        "9.8 seconds",
        "|  | before | after | BM25 | after − before |",
        "| squad-dev, nDCG@10, 2 queries | 0.6970<br>[0.697,&nbsp;0.697] | 0.7110<br>[0.711,&nbsp;0.711] | 0.8000<br>",
        "| squad-dev, Recall@100 | 0.9000 | 0.9000 | 0.9000 |",
        "- squad-dev: BM25, which needs no training, is 0.0890 nDCG@10 ahead of this model, [",
        "for 11.6% of the training queries the document that the teacher puts first is not judged relevant",
        "+0.0140 nDCG@10, 95 % interval [+0.0080, +0.0200], p = 0.0001, 2000 queries",
        "Test questions are new, but their documents were seen in training.",
        "```bash\nst-wkl demo\n```",
        f"```bibtex\n{CITATION}\n```",
    ):
        assert part in block
    assert "queries_without_positive" not in block, "what was not dropped needs no mention"
    assert text.index("# SentenceTransformer") < text.index(BEGIN) < text.index(END) < text.index("## Model Details")
    kept = text[: text.index(BEGIN)] + text[text.index(END) + len(END) + 2 :]
    assert kept.split("---\n", 2)[2] == original.split("---\n", 2)[2], "sentence-transformers' own text was changed"


def test_the_front_matter_is_valid_and_complete(folder: Path) -> None:
    """The Hub's search, filters and result widgets read this part only."""
    write_model_card(folder, record=record(student="minishlab/potion-base-8M"), **ALL)
    data = front_matter(folder / "README.md")
    assert {"st-wkl", "knowledge-distillation", "loss:WeightedKLDistillationLoss", "sentence-transformers"} <= set(
        data["tags"]
    )
    assert data["base_model"] == "minishlab/potion-base-8M"
    assert data["library_name"] == "sentence-transformers"
    assert "datasets" not in data, "squad-dev is no dataset on the Hub"
    entry = data["model-index"][0]
    assert entry["name"] == "student"
    assert entry["results"][0]["dataset"] == {"name": "squad-dev", "type": "squad-dev", "split": "test"}
    metrics = {metric["type"]: metric["value"] for metric in entry["results"][0]["metrics"]}
    assert metrics == {"ndcg_at_10": 71.1, "recall_at_100": 90.0}, "MTEB's scale"
    card = ModelCard.load(folder / "README.md")
    assert len(card.data.eval_results or []) == 2  # type: ignore[attr-defined]


def test_hub_ids_and_only_those_are_linked(folder: Path, monkeypatch: Any) -> None:
    """A folder that looks like an id would send readers to somebody else's model."""
    dataset = {"collection": {"name": "mteb/nfcorpus"}}
    path = write_model_card(folder, record=record(dataset=dataset), results={})
    assert front_matter(path)["datasets"] == ["mteb/nfcorpus"]
    monkeypatch.chdir(folder.parent)
    write_model_card(folder, record=record(student="student/1_Normalize"), results={})
    assert "base_model" not in front_matter(path)


def test_writing_again_changes_nothing(folder: Path) -> None:
    """A pipeline that is run twice must not grow the card or the model-index."""
    first = write_model_card(folder, record=record(), **ALL).read_bytes()
    assert write_model_card(folder, record=record(), **ALL).read_bytes() == first


def test_the_owners_words_stay(folder: Path) -> None:
    """Regenerating must only replace what this package wrote, in the text and in the front matter."""
    path = write_model_card(folder, record=record(), **ALL)
    text = path.read_text().replace("## Model Details", "## Mine\n\nDo not use for law.\n\n## Model Details")
    text = text.replace("tags:\n", "license: mit\ntags:\n- legal\n") + "\nMy last word.\n"
    path.write_text(text)
    again = dict(ALL, results={"after": results("student", 0.9)})
    new = write_model_card(folder, record=None, **again).read_text()
    assert "Do not use for law." in new
    assert new.endswith("My last word.\n")
    assert new.count(BEGIN) == new.count(END) == 1
    assert "0.7110" not in new
    data = front_matter(path)
    assert data["license"] == "mit"
    assert data["tags"][0] == "legal"
    assert [m["value"] for m in data["model-index"][0]["results"][0]["metrics"]] == [90.0, 90.0]


OWNER = """# ours, by hand
version: 1.10
thumbnail: no
released: 2024-01-02
language: &lang [en, "no"]  # both
same: *lang
octal: 010
tags:   # searched by these
  - 'legal'
  - 1.10  # a tag all the same
# the next one is checked by a lawyer
license: "mit"
datasets: [ "a/b",
  'c/d' ]   # two
model-index:
- name: theirs   # not the folder
  results:
  # by hand
  - task: {type: sts}
    dataset: {name: STS, type: sts, revision: 1e10}
    metrics: [{type: spearman, value: 0.80}]
  more: yes
description: |
  # no comment
  text
"""


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_owners_front_matter_stays_to_the_letter(folder: Path, newline: str) -> None:
    """YAML that is read and written again turns 1.10 into 1.1, `no` into false, and loses every comment."""
    path = folder / "README.md"
    path.write_bytes(f"---\n{OWNER}---\n\n# Mine\n".replace("\n", newline).encode())
    for _ in range(2):
        write_model_card(folder, record=record(student="x/y"), **ALL)
    text = path.read_bytes().decode()
    assert newline == "\n" or "\n" not in text.replace("\r\n", "")
    for line in OWNER.splitlines():
        assert f"{newline}{line.removesuffix(chr(39) + 'c/d' + chr(39) + ' ]   # two')}" in text
    order = [text.index(newline + line) for line in OWNER.splitlines() if "c/d" not in line]
    assert order == sorted(order)
    data = front_matter(path)
    assert data["tags"] == ["legal", 1.1, "st-wkl", "knowledge-distillation", "loss:WeightedKLDistillationLoss"]
    kinds = [result["task"]["type"] for result in data["model-index"][0]["results"]]
    assert kinds == ["sts", "information-retrieval"]
    assert data["base_model"] == "x/y"
    write_model_card(folder, record=None, results={})
    assert [r["task"]["type"] for r in front_matter(path)["model-index"][0]["results"]] == ["sts"]


def test_names_from_files_stay_names(folder: Path) -> None:
    """A collection's folder or a label may be called anything; it must not become HTML, a column or the card's end."""
    name = "<script>alert(1)</script>|a\n\n# b `c` " + END
    entry = results(name, 0.7, task=name, split=name, subset=name)
    made = record(
        student=name, loss=name, teacher={"model": name, "kind": name}, dataset={"collection": {"name": name}}
    )
    licences = {"student": name, "teacher": None}
    for _ in range(2):
        options: Any = {"results": {"before": entry, name: entry}, "command": f"echo ```{name}", "licences": licences}
        text = ModelCard(write_model_card(folder, record=made, **options).read_text()).text
    assert text.count(BEGIN) == text.count(END) == 1
    block = text[text.index(BEGIN) : text.index(END)]
    html = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table").render(block)
    assert "<script" not in html
    assert html.count("<h1") == 0
    rows = [line for line in block.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} <= {3, 4}


def test_a_change_that_an_anchor_would_carry_on_is_refused(folder: Path) -> None:
    """What is added to our list must not appear in the owner's other key, nor the card be broken."""
    path = folder / "README.md"
    path.write_text("---\ntags: &t [legal]\nkeywords: *t\n---\n\n# Mine\n")
    with pytest.raises(ValueError, match=r"change what stands at keywords\. If an anchor"):
        write_model_card(folder, record=record(), **ALL)
    path.write_text("---\nkeywords: &t [legal]\ntags: *t\n---\n\n# Mine\n")
    write_model_card(folder, record=record(), **ALL)
    assert "keywords: &t [legal]" in path.read_text()
    assert front_matter(path)["tags"][0] == "legal"


def test_results_of_others_stay_in_the_model_index(folder: Path) -> None:
    """An evaluator's entries in the model-index are not ours to delete."""
    path = folder / "README.md"
    foreign = {
        "name": "theirs",
        "results": [
            {
                "task": {"type": "sts"},
                "dataset": {"name": "STS", "type": "sts"},
                "metrics": [{"type": "spearman", "value": 0.8}],
            }
        ],
    }
    text = path.read_text().replace("---\n", "---\n" + yaml.safe_dump({"model-index": [foreign]}), 1)
    path.write_text(text)
    for _ in range(2):
        write_model_card(folder, record=record(), **ALL)
    entry = front_matter(path)["model-index"][0]
    assert entry["name"] == "theirs"
    assert [result["task"]["type"] for result in entry["results"]] == ["sts", "information-retrieval"]


def test_nothing_of_the_machine_is_published(folder: Path) -> None:
    """Paths carry user names, and mean nothing to a reader."""
    home, work = Path.home() / "secret-project" / "teacher", tempfile.gettempdir() + "/scratch dir/x"
    path = folder / "README.md"
    text = path.read_text().replace(
        "This is a [sentence-transformers]",
        f"finetuned from [{folder}](https://huggingface.co/{folder})\n- `resume_from_checkpoint`: {home}/checkpoint-5\n"
        "See https://example.org/home/page and and/or </details> and /usr/bin/env.\nThis is a [sentence-transformers]",
    )
    path.write_text(text.replace("---\n", f"---\nbase_model: {home}\n", 1))
    teacher = {"model": str(home), "note": r"C:\Users\somebody\models\teacher"}
    card = write_model_card(
        folder,
        record=record(student=str(folder), teacher=teacher),
        results={"after": results(f"file://{home}", 0.5)},
        notes=[f"Trained on {work}."],
        command=f"st-wkl evaluate {folder} {home}/data --output={home}/results.json",
    ).read_text()
    for private in (
        str(folder.parent),
        str(Path.home()) + "/",
        tempfile.gettempdir() + "/",
        "somebody",
        "secret-project",
    ):
        assert private not in card
    if getpass.getuser() != "root":
        assert getpass.getuser() not in card
    assert "st-wkl evaluate student data --output=results.json" in card
    assert "finetuned from `student`" in card
    assert "`resume_from_checkpoint`: checkpoint-5" in card
    assert "See https://example.org/home/page and and/or </details> and /usr/bin/env." in card
    assert "base_model" not in front_matter(path)


def test_the_loss_is_cited_once(folder: Path) -> None:
    """sentence-transformers already cites a loss that carries a citation; twice would look careless."""
    citation = DistillKLDivLoss.citation.fget(None)  # type: ignore[attr-defined]
    text = write_model_card(folder, record=record(loss="DistillKLDivLoss", loss_citation=citation), **ALL).read_text()
    assert text.count("@misc{lin2020distillingdense") == 1
    assert front_matter(folder / "README.md")["tags"].count("loss:DistillKLDivLoss") == 1


def test_a_card_without_model_details_gets_the_block_at_its_end(static_student_path: Path, tmp_path: Path) -> None:
    """A model that was loaded and saved untrained keeps its old card, which may look like anything."""
    shutil.copy(static_student_path / "README.md", tmp_path / "README.md")
    text = write_model_card(tmp_path, record=None, results={"after": results("potion", 0.5)}).read_text()
    assert text.endswith(f"{END}\n")
    assert front_matter(tmp_path / "README.md")["library_name"] == "model2vec"


def test_a_folder_without_a_card_gets_one(tmp_path: Path) -> None:
    """sentence-transformers skips the card when its template fails; the results must still have a place."""
    path = write_model_card(tmp_path, record=None, results={"after": results("student", 0.5)})
    assert front_matter(path)["library_name"] == "sentence-transformers"
    assert "| squad-dev, nDCG@10, 2 queries | 0.5000" in path.read_text()
    assert "## Usage" in path.read_text()
    with pytest.raises(FileNotFoundError, match="save the model there first"):
        write_model_card(tmp_path / "nothing", record=None, results={})


def test_a_card_without_front_matter_gets_one(tmp_path: Path) -> None:
    """A README written by hand is text only, and may use Windows line endings and a byte order mark."""
    (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbf# Mine\r\n\r\nHello.\r\n\r\n## Model Details\r\n")
    content = write_model_card(tmp_path, record=None, results={"after": results("student", 0.5)}).read_bytes()
    assert b"Hello.\r\n\r\n" + BEGIN.encode() + b"\r\n" in content
    assert b"\n" not in content.replace(b"\r\n", b"")
    assert write_model_card(tmp_path, record=None, results={"after": results("student", 0.5)}).read_bytes() == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("---\ntags:\n- a\nlicense: [mit\n---\n# X\n", r"README\.md:[45]: the front matter is not valid YAML"),
        (
            "---\nlicense: mit\ntags: a\nlicense: other\n---\n# X\n",
            r"README\.md:.*line 4: the key 'license' stands in line 2",
        ),
        ("---\ntags: a\n# X\n", r"README\.md:1: .*has no closing ---"),
        ("---\n- a\n- b\n---\n# X\n", r"README\.md:1: the front matter cannot be read .*should be a dict"),
        ("---\ntags: a\nmodel-index:\n- nam: x\n---\n# X\n", r"README\.md:3: the front matter cannot be read"),
        (f"---\ntags: a\n---\n# X\n{BEGIN}\nmine\n", r"README\.md:5: the card needs .* once each"),
        (f"---\ntags: a\n---\n# X\n{END}\n{BEGIN}\n", r"README\.md:5: .*\(found in lines 5, 6\)"),
        (f"---\ntags: a\n---\n{BEGIN}\n{END}\n{BEGIN}\n{END}\n", r"README\.md:4: .*\(found in lines 4, 5, 6, 7\)"),
    ],
)
def test_a_broken_card_is_left_alone(tmp_path: Path, content: str, message: str) -> None:
    """What somebody wrote by hand must not be lost because a colon is missing."""
    (tmp_path / "README.md").write_text(content)
    with pytest.raises(ValueError, match=message):
        write_model_card(tmp_path, record=record(), **ALL)
    assert (tmp_path / "README.md").read_text() == content
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


def test_a_full_disk_leaves_the_old_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a card would lose what the owner wrote."""
    before = (folder / "README.md").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_model_card(folder, record=record(), **ALL)
    assert (folder / "README.md").read_bytes() == before
    assert not list(folder.glob(".README*"))


def test_results_are_given_for_documents_that_training_has_not_seen(folder: Path) -> None:
    """The number over all queries flatters a student that has learnt the test documents by heart."""
    after, before = results("student", 0.75), results("potion", 0.5)
    after.tasks[0].per_query = {"q1": 1.0, "q2": 0.5}
    after.tasks[0].groups = {"shared": ["q1"], "unseen": ["q2"]}
    before.tasks[0].per_query = {"q1": 0.6, "q2": 0.4}
    text = write_model_card(folder, record=record(), results={"before": before, "after": after}).read_text()
    for row in (
        "| squad-dev, nDCG@10, 2 queries | 0.5000<br>[0.400,&nbsp;0.600] | 0.7500<br>[0.500,&nbsp;1.000] "
        "| +0.2500<br>[-1.6559,&nbsp;+2.1559]<br>p = ",
        "| · 1 with a seen document | 0.6000 | 1.0000 | +0.4000<br>no&nbsp;interval&nbsp;of&nbsp;one&nbsp;query<br>",
        "| · 1 with none seen | 0.4000 | 0.5000 | +0.1000<br>no&nbsp;interval&nbsp;of&nbsp;one&nbsp;query<br>",
    ):
        assert row in text
    assert "with none seen are the ones to expect on a collection of your own" in text
    assert "squad-dev: 1 of 2 test queries ask for documents that training has shown." in text
    after.tasks[0].groups = {"unseen": ["q1", "q2"]}
    text = write_model_card(folder, record=record(), results={"before": before, "after": after}).read_text()
    assert "| squad-dev, nDCG@10, 2 queries, all with none seen |" in text
    assert "| · 2 with none seen" not in text, "the same numbers again"


def test_training_texts_do_not_stay(folder: Path) -> None:
    """sentence-transformers prints rows of the training data; a research collection may not be passed on that way."""
    original = (folder / "README.md").read_text()
    assert "* Samples:" in original
    kept = shutil.copytree(folder, folder.with_name("kept"))
    text = write_model_card(folder, record=record(), **ALL).read_text()
    for word in ("* Samples:", "purr", "bark", "cats"):
        assert word in original
        assert word not in text
    assert "* Size: 2 training samples" in text
    assert "model.encode_query([" in text
    assert "purr" in write_model_card(kept, record=record(), **ALL, keep_samples=True).read_text()


@pytest.mark.parametrize("kind", list(CLASSES))
def test_the_example_runs_for_every_model_class(tiny_bert_path: Path, tmp_path: Path, kind: str, capsys: Any) -> None:
    """The first thing that a reader does is to copy the example."""
    make_student(kind, tiny_bert_path).save_pretrained(str(tmp_path))
    text = write_model_card(tmp_path, record=record(), results={}).read_text()
    assert text.count("```python") == 1
    code = text.split("```python\n")[1].split("```")[0]
    name, expected = CLASSES[kind].__name__, {"cross-encoder": "text-ranking", "dense": "sentence-similarity"}
    assert f"model = {name}(" in code
    exec(code.replace(next(part for part in code.split('"') if part.endswith("_model_id")), str(tmp_path)), {})
    assert capsys.readouterr().out
    assert front_matter(tmp_path / "README.md")["pipeline_tag"] == expected.get(kind, "feature-extraction")


def test_an_adapter_says_what_it_needs(tiny_bert_path: Path, tmp_path: Path) -> None:
    """An adapter alone is no model: its card names the base model, its rank, and peft."""
    from peft import LoraConfig, TaskType

    student = SentenceTransformer(str(tiny_bert_path))
    student.add_adapter(LoraConfig(TaskType.FEATURE_EXTRACTION, r=3, lora_alpha=6, target_modules=["query"]))
    student.save_pretrained(str(tmp_path))
    text = write_model_card(tmp_path, record=record(student="org/base"), results={}).read_text()
    data = front_matter(tmp_path / "README.md")
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", "adapter")
    assert "| LoRA | " in text
    assert "rank `3`" in text
    assert "pip install -U sentence-transformers peft" in text


def test_the_licence_follows_from_the_parts(folder: Path) -> None:
    """Research data must not turn into a permissive model by silence; what the owner states stays."""
    licences = {"student": "mit", "teacher": "apache-2.0", "training data": "cc-by-nc-4.0"}
    path = write_model_card(folder, record=record(), results={}, licences=licences)
    assert front_matter(path)["license"] == "cc-by-nc-4.0"
    assert "It forbids commercial use." in path.read_text()
    path.write_text(path.read_text().replace("license: cc-by-nc-4.0", "license: mit"))
    write_model_card(folder, record=record(), results={}, licences=licences)
    assert front_matter(path)["license"] == "mit"
    assert "The owner of this card states `mit`." in path.read_text()


def test_results_on_the_hubs_datasets_get_files_of_their_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's leaderboards read `.eval_results`, from 0 to 100; files that others wrote stay."""
    commit = "a" * 40
    after = results("student", 0.711, task="SciFact", dataset_revision=commit)
    after.tasks += results("student", 0.5, task="NFCorpus", dataset_revision=commit).tasks
    after.tasks += results("student", 0.5, task="mine").tasks
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results/NFCorpus.yaml").write_text("theirs\n")
    for _ in range(2):
        write_model_card(folder, record=None, results={"after": after})
    assert sorted(path.name for path in (folder / ".eval_results").iterdir()) == ["NFCorpus.yaml", "SciFact.yaml"]
    assert (folder / ".eval_results/NFCorpus.yaml").read_text() == "theirs\n"
    entries = parse_eval_result_entries(yaml.safe_load((folder / ".eval_results/SciFact.yaml").read_text()))
    assert [(entry.dataset_id, entry.task_id, entry.value, entry.dataset_revision) for entry in entries] == [
        ("mteb/scifact", "SciFact", 71.1, commit),
        ("mteb/scifact", "SciFact_default_test", 71.1, commit),
    ]


def test_a_difference_names_its_task(folder: Path) -> None:
    """With several tasks a gain that does not say where it is from is read as one on all of them."""
    entries = {label: results(label, value) for label, value in (("before", 0.697), ("after", 0.711))}
    for label, value in (("before", 0.5), ("after", 0.5)):
        entries[label].tasks += results(label, value, task="other").tasks
    named = {"results": entries, "comparison": replace(ALL["comparison"], task="squad-dev")}
    text = write_model_card(folder, record=record(), **(ALL | named)).read_text()
    assert "Difference on squad-dev, after − before: +0.0140 nDCG@10" in text
    assert "| other, nDCG@10, 2 queries | 0.5000<br>" in text
    text = write_model_card(folder, record=record(), **(ALL | {"results": entries})).read_text()
    assert "Difference, after − before: +0.0140" in text, "one that does not say its task is not given one by its mean"


def test_several_tasks_have_a_picture(folder: Path) -> None:
    """A forest of intervals is read at a glance; a table of ten tasks is not. One task needs none."""
    entries = {label: results(label, value) for label, value in (("before", 0.697), ("after", 0.711))}
    assert "![" not in write_model_card(folder, record=None, results=entries).read_text()
    for label, value in (("before", 0.5), ("after", 0.6)):
        entries[label].tasks += results(label, value, task="other").tasks
    text = write_model_card(folder, record=None, results=entries).read_text()
    assert f"]({PICTURE})" in text
    assert (folder / PICTURE).read_bytes().startswith(b"\x89PNG")


def test_only_what_differs_stands_in_the_open(folder: Path) -> None:
    """A wall of defaults hid the two settings that mattered, and the default loss was called by another's name."""
    sum_of = {
        "WeightedKLDistillationLoss": {"weight": 1.0, "gamma": 0.0, "alpha": 0.0, "student_temperature": 0.05},
        "InBatchContrastiveLoss": {"weight": 0.5, "own_negatives": True, "similarity_fct": "cos_sim"},
    }
    arguments = {"num_train_epochs": 3, "weight_decay": 0.0, "warmup_steps": 7, "bf16": False, "max_steps": -1}
    changes = {"loss": "WeightedSumLoss", "loss_config": sum_of, "arguments": arguments}
    text = write_model_card(folder, record=record(**changes), results={}).read_text()
    open_part, folded = text.split("<summary>The whole configuration</summary>")
    loss = "| Loss | `KLDistillLoss`: student_temperature `0.05`<br>`InBatchContrastiveLoss`: weight `0.5` |"
    assert loss in open_part
    assert "| Training | num_train_epochs `3`, warmup_steps `7` |" in open_part
    assert "max_steps `-1`" in folded
    assert "WeightedKLDistillationLoss.gamma `0`" in folded
    own = record(loss="OwnLoss", loss_config={"power": 2})
    assert "| Loss | `OwnLoss`: power `2` |" in write_model_card(folder, record=own, results={}).read_text()


def test_several_teachers_are_named(folder: Path) -> None:
    """The card of an ensemble's student called its teacher unknown."""
    teacher = {"kind": "ensemble", "teachers": [{"kind": "cross-encoder", "model": name} for name in ("a/x", "y")]}
    text = write_model_card(folder, record=record(teacher=teacher), results={}).read_text()
    assert "as the ensemble `a/x and y` does" in text
    dataset = {"collection": {"name": "texts"}, "counts": {"queries": 0, "documents": 5}}
    made = record(teacher={"kind": "embedding", "model": "y"}, dataset=dataset)
    text = write_model_card(folder, record=made, results={}).read_text()
    assert "cut to its length" not in text
    counts = {"queries": 700, "pairs": 60, "different_pairs": 50, "cut_pairs": 49, "unjudged_queries": 3}
    cut = record(dataset={"collection": {"name": "texts"}, "counts": counts})
    limits = write_model_card(folder, record=cut, results={}).read_text().split("## Limits")[1]
    assert (
        "- The teacher read 49 of 50 pairs cut to its length.\n- What is good for 3 training queries, nobody" in limits
    )
    text = write_model_card(folder, record=made, results={}).read_text()
    assert "taught to embed texts as `y` does, on 5 documents of `texts`. Made" in text


@pytest.mark.parametrize("kind", list(CLASSES))
def test_a_student_of_ours_is_headed_by_what_it_is(tiny_bert_path: Path, tmp_path: Path, kind: str) -> None:
    """sentence-transformers' title is the class's name, its first sentence ends after "trained", and `inf` tokens."""
    student = make_student(kind, tiny_bert_path)
    template, told = student.model_card_data.template_path, record(student="org/base", teacher={"model": "org/big"})
    with headed(student, told):
        student.save_pretrained(str(tmp_path))
    assert student.model_card_data.template_path == template
    text = write_model_card(tmp_path, record=told, results={}).read_text()
    assert "# base taught by big on squad-dev\n\n<!-- st-wkl:begin -->\n\n[`org/base`](" in text
    assert text.index("## Usage") < text.index("## Limits") < text.index("## How it was made")
    for wrong in ("model trained", "inf tokens", "Unknown", "<!--\n"):
        assert wrong not in text
    assert text.count("<details>") == text.count("</details>")
    student.model_card_data.model_name = "Mine"
    with headed(student, told):
        student.save_pretrained(str(tmp_path))
    assert "# Mine\n" in (tmp_path / "README.md").read_text()


def test_mixed_results_are_refused(folder: Path) -> None:
    """A gain that belongs to another student, or two columns of different data, would be believed."""
    before = (folder / "README.md").read_bytes()
    mixed = dict(ALL, comparison=Comparison(0.2, 0.1, 0.3, 1e-4, 2000, 1700, 0, 300))
    with pytest.raises(ValueError, match=r"says \+0\.2000 nDCG@10, but 'student' minus 'potion' is \+0\.0140.*again"):
        write_model_card(folder, record=record(), **mixed)
    elsewhere = replace(ALL["comparison"], task="other")
    with pytest.raises(ValueError, match=r"comparison is of other, which 'student' minus 'potion' is not.*again"):
        write_model_card(folder, record=record(), **(ALL | {"comparison": elsewhere}))
    others = replace(ALL["comparison"], task="squad-dev", revisions=("r", "s"))
    with pytest.raises(ValueError, match=r"of other weights or settings than 'student' minus 'potion'.*again"):
        write_model_card(folder, record=record(), **(ALL | {"comparison": others}))
    other = results("potion", 0.697, dataset_revision="other", per_query={"q9": 0.697})
    with pytest.raises(ValueError, match=r"squad-dev: 'before' .* were measured on different data"):
        write_model_card(folder, record=record(), results={"before": other, "after": results("student", 0.7)})
    assert (folder / "README.md").read_bytes() == before


def test_before_is_the_model_that_training_started_from(folder: Path) -> None:
    """A gain over some other, weaker model was believed to be the gain of training."""
    said = "The results before are of `potion`; the record calls the model that training started from `m`, and whether"
    assert said in write_model_card(folder, record=record(student="m"), **ALL).read_text()
    for known in (
        record(student="m", identity={"student": "r"}),
        record(student="org/Potion", identity={"student": "s"}),
    ):
        assert "The results before are of" not in write_model_card(folder, record=known, **ALL).read_text()
    half = record(student="m", identity={"student": "s"}, precision={"loaded": "bfloat16", "trained": "float32"})
    assert said in write_model_card(folder, record=half, **ALL).read_text(), "trained with other bits than measured"
    before = (folder / "README.md").read_bytes()
    with pytest.raises(ValueError, match=r"before are of 'potion' \(r…\).*started from 'm' \(s…\).*such as baseline="):
        write_model_card(folder, record=record(student="m", identity={"student": "s"}), **ALL)
    assert (folder / "README.md").read_bytes() == before
