"""What must not stay in a card: training texts; and the example that takes their place."""

from __future__ import annotations

import json
import re
from pathlib import Path

# The samples of a training or evaluation dataset, as sentence-transformers' template prints them.
_SAMPLES = re.compile(r"^\* Samples:[ \t]*\r?\n(?:[ \t]*\|.*\r?\n)+", re.MULTILINE)
# Its example code, whose sentences come from the training data; ours has another comment, so it is not found again.
_UPSTREAM_EXAMPLE = re.compile(
    r"```python\r?\nfrom sentence_transformers import \w+\r?\n\r?\n# Download from the 🤗 Hub\r?\n.*?```", re.DOTALL
)
_QUERY = "Which planet is known as the Red Planet?"
_DOCUMENTS = (
    "Venus is often called Earth's twin because of its similar size and proximity.",
    "Mars, known for its reddish appearance, is often referred to as the Red Planet.",
    "Saturn, famous for its rings, is sometimes mistaken for the Red Planet.",
)
_STAND_INS = {
    "SentenceTransformer": "sentence_transformers_model_id",
    "SparseEncoder": "sparse_encoder_model_id",
    "MultiVectorEncoder": "multi_vector_encoder_model_id",
    "CrossEncoder": "cross_encoder_model_id",
}


def model_class(folder: Path) -> str:
    """Return the sentence-transformers class of a saved model."""
    try:
        stated = json.loads((folder / "config_sentence_transformers.json").read_text(encoding="utf-8"))
        return str(stated["model_type"]) if stated["model_type"] in _STAND_INS else "SentenceTransformer"
    except (OSError, ValueError, KeyError, TypeError):
        pass
    try:
        architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    except (OSError, ValueError):
        architectures = []
    ranks = any(str(name).endswith("ForSequenceClassification") for name in architectures)
    return "CrossEncoder" if ranks and not (folder / "modules.json").is_file() else "SentenceTransformer"


def without_training_texts(text: str) -> str:
    """Return the body of a card without the samples that sentence-transformers copies from the training data."""
    return _SAMPLES.sub("", text)


def with_usage(text: str, folder: Path) -> str:
    """Return the body of a card with an example for retrieval in place of sentence-transformers' own.

    Its own shows training texts, and calls `encode` for queries and documents alike, which skips their prompts.
    """
    newline = "\r\n" if "\r\n" in text else "\n"
    code = usage(folder).replace("\n", newline)
    text = _UPSTREAM_EXAMPLE.sub(lambda _: code, text)
    if (folder / "adapter_config.json").is_file():
        text = text.replace("pip install -U sentence-transformers\n", "pip install -U sentence-transformers peft\n")
    return text


def usage(folder: Path) -> str:
    """Return the example of a saved model, as a code block: queries against documents, by its class."""
    name = model_class(folder)
    documents = "\n".join(f"    {document!r}," for document in _DOCUMENTS)
    load = f'model = {name}("{_STAND_INS[name]}")'
    if (folder / "adapter_config.json").is_file():
        load += "  # loads the base model and this adapter, which needs peft"
    if name == "CrossEncoder":
        use = (
            "for place in model.rank(query, documents, return_documents=True):\n"
            '    print(f"{place[\'score\']:.3f}", place["text"])'
        )
    else:
        use = (
            "query_embeddings = model.encode_query([query])\ndocument_embeddings = model.encode_document(documents)\n"
            "scores = model.similarity(query_embeddings, document_embeddings)\nprint(scores)  # one row per query"
        )
    return (
        f"```python\nfrom sentence_transformers import {name}\n\n{load}\n"
        f"query = {_QUERY!r}\ndocuments = [\n{documents}\n]\n{use}\n```"
    )
