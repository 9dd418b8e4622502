"""What the folder of a saved student says of it: class, adapter, length, how to use it, and whose results are in it."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from st_wkl._versions import package_versions
from st_wkl.evaluation.results import FILE_NAME, Results
from st_wkl.models import hash_weights, identity, load_model, prompts_of, saved_class, saved_settings
from st_wkl.publish import TEMPLATES

logger = logging.getLogger(__name__)

# The class of a saved model: what stands in its examples until it is pushed, and what the Hub files it under.
CLASSES = {
    "SentenceTransformer": ("sentence_transformers_model_id", "sentence-similarity"),
    "SparseEncoder": ("sparse_encoder_model_id", "feature-extraction"),
    "MultiVectorEncoder": ("multi_vector_encoder_model_id", "feature-extraction"),
    "CrossEncoder": ("cross_encoder_model_id", "text-ranking"),
}
# The samples of a training or evaluation dataset, as sentence-transformers' template prints them.
_SAMPLES = re.compile(r"^\* Samples:[ \t]*\r?\n(?:[ \t]*\|.*\r?\n)+", re.MULTILINE)
# Its example code, whose sentences come from the training data; ours has another comment, so it is not found again.
_UPSTREAM_EXAMPLE = re.compile(
    r"```python\r?\nfrom sentence_transformers import \w+\r?\n\r?\n# Download from the 🤗 Hub\r?\n.*?```", re.DOTALL
)
_MARKER = re.compile(r"<!-- st-wkl:weights ([0-9a-f]{32}) -->")


def max_length(folder: Path) -> int | None:
    """Return how many tokens of a text a saved model reads, None where it does not say or has no limit."""
    for name, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        length = saved_settings(folder, name).get(key)
        if isinstance(length, int) and 0 < length < 10**6:  # transformers writes 1e30 for "no limit"
            return length
    return None


def usage(folder: Path) -> str:
    """Return the example of a saved model, as a code block: queries against documents, by its class."""
    name = saved_class(folder)
    adapter = (folder / "adapter_config.json").is_file()
    template = TEMPLATES.get_template("usage.md.jinja")
    return template.render(name=name, stand_in=CLASSES[name][0], adapter=adapter).rstrip()


def without_training_texts(text: str, folder: Path) -> str:
    """Return a card's body without the texts that sentence-transformers copies from the training data.

    Its example, which also calls `encode` for queries and documents alike and so skips their prompts, becomes `usage`.
    """
    code = usage(folder).replace("\n", "\r\n" if "\r\n" in text else "\n")
    text = _UPSTREAM_EXAMPLE.sub(lambda _: code, _SAMPLES.sub("", text))
    if (folder / "adapter_config.json").is_file():
        text = text.replace("pip install -U sentence-transformers\n", "pip install -U sentence-transformers peft\n")
    return text


def marker(results: Results) -> str:
    """Return the line of a card, invisible when it is read, that says which weights its results are of."""
    stated = results.model.get("weights")
    return f"<!-- st-wkl:weights {stated} -->" if stated else ""


def check_results(folder: Path, results: Results, *, trust_remote_code: bool = False) -> None:
    """Stop where results are not those of the student in the folder, as after training went on.

    Results of older versions, and of models that torch cannot read, do not say whose they are.

    Raises:
        ValueError: If they are of other weights, or of these with other prompts, lengths, tokenizer or modules.
    """
    what = f"The results of {results.name!r}"
    _check(folder, what, results.model, results.versions, trust_remote_code)


def check_published(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Stop before a card or a results file is published with a student that it does not belong to.

    Raises:
        ValueError: If one of them does not.
    """
    if (folder / "README.md").is_file():
        found = _MARKER.search((folder / "README.md").read_text(encoding="utf-8-sig"))
        _check(folder, "The results in README.md", {"weights": found[1] if found else None}, {}, trust_remote_code)
    if (folder / FILE_NAME).is_file():
        results = Results.load(folder)
        _check(folder, f"The results in {FILE_NAME}", results.model, results.versions, trust_remote_code)


def _check(
    folder: Path, what: str, of: Mapping[str, Any], versions: Mapping[str, str], trust_remote_code: bool
) -> None:
    """Compare what results say of their model with the one in the folder; say where that cannot be done."""
    if (stated := of.get("weights")) is None:
        return
    reason = ""
    try:
        model = load_model(folder, trust_remote_code=trust_remote_code)[0]
        weights, settings = (found := identity(model))["weights"], found["settings"]
        # A base model without a pooler, say, gets a random one each time that it is loaded with an adapter.
        changes = weights != stated and weights != hash_weights(
            load_model(folder, trust_remote_code=trust_remote_code)[0]
        )
        reason = "part of them are random" if changes else ""
    except Exception as error:  # whatever a missing base model or code of the model's own breaks
        reason = f"{type(error).__name__}: {error}"
    if reason:
        logger.warning("%s: whether they are of the weights in %s could not be checked (%s)", what, folder, reason)
        return
    if weights != stated:
        raise ValueError(
            f"{what} are of other weights ({stated[:8]}…) than those in {folder} ({weights[:8]}…): the student was "
            "changed after it was evaluated. Evaluate it again, and write the card from the new results."
        )
    libraries = package_versions(("sentence-transformers", "transformers"))  # others may say settings in other words
    same_words = all(versions.get(name) == version for name, version in libraries.items())
    if same_words and of.get("settings_hash") not in (None, settings):
        raise ValueError(
            f"{what} are of these weights with other settings than those in {folder}, which has the prompts "
            f"{prompts_of(model) or 'none'} and a length of {model.get_max_seq_length()}: prompts, lengths, tokenizer "
            "or modules were changed after it was evaluated. Evaluate it again."
        )
