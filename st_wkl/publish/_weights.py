"""Whose results are these: the hash of the weights that were measured, against the weights in a folder."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from st_wkl._versions import package_versions
from st_wkl.evaluation.results import FILE_NAME, Results

logger = logging.getLogger(__name__)

_MARKER = re.compile(r"<!-- st-wkl:weights ([0-9a-f]{32}) -->")


def marker(results: Results) -> str:
    """Return the line of a card, invisible when it is read, that says which weights its results are of."""
    stated = results.model.get("weights")
    return f"<!-- st-wkl:weights {stated} -->" if stated else ""


def check_results(folder: Path, results: Results, *, trust_remote_code: bool = False) -> None:
    """Stop where results are not those of the weights in the folder, as after training went on.

    Results of older versions, and of models that torch cannot read, do not say whose they are.

    Raises:
        ValueError: If they are of other weights.
    """
    if _check(folder, f"The results of {results.name!r}", results.model.get("weights"), trust_remote_code):
        _check_settings(folder, results, trust_remote_code)


def check_published(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Stop before a card or a results file is published with weights that it does not belong to.

    Raises:
        ValueError: If one of them does not.
    """
    if (folder / "README.md").is_file():
        found = _MARKER.search((folder / "README.md").read_text(encoding="utf-8-sig"))
        _check(folder, "The results in README.md", found and found[1], trust_remote_code)
    if (folder / FILE_NAME).is_file():
        results = Results.load(folder)
        if _check(folder, f"The results in {FILE_NAME}", results.model.get("weights"), trust_remote_code):
            _check_settings(folder, results, trust_remote_code)


def _check(folder: Path, what: str, stated: str | None, trust_remote_code: bool) -> bool:
    """Return whether the weights are known to be those in the folder."""
    if stated is None:
        return False
    try:
        found = _hash(folder, trust_remote_code)
        # A base model without a pooler, say, gets a random one each time that it is loaded with an adapter.
        reason = "part of them are random" if found != stated and _hash(folder, trust_remote_code) != found else ""
    except Exception as error:  # whatever a missing base model or code of the model's own breaks
        reason = f"{type(error).__name__}: {error}"
    if reason:
        logger.warning("%s: whether they are of the weights in %s could not be checked (%s)", what, folder, reason)
    elif found != stated:
        raise ValueError(
            f"{what} are of other weights ({stated[:8]}…) than those in {folder} ({found[:8]}…): the student was "
            "changed after it was evaluated. Evaluate it again, and write the card from the new results."
        )
    return not reason


def _check_settings(folder: Path, results: Results, trust_remote_code: bool) -> None:
    """Stop where the prompts, lengths, tokenizer or modules in a folder are not those that were measured.

    Results of earlier versions do not say them, and other versions of the libraries may say them in other words.
    """
    from st_wkl.models import identity, load_model, prompts_of

    stated = results.model.get("settings_hash")
    libraries = package_versions(("sentence-transformers", "transformers"))
    if stated is None or any(results.versions.get(name) != version for name, version in libraries.items()):
        return
    model = load_model(folder, trust_remote_code=trust_remote_code)[0]
    if identity(model)["settings"] != stated:
        raise ValueError(
            f"The results of {results.name!r} are of these weights with other settings than those in {folder}, which "
            f"has the prompts {prompts_of(model) or 'none'} and a length of {model.get_max_seq_length()}: prompts, "
            "lengths, tokenizer or modules were changed after it was evaluated. Evaluate it again."
        )


def _hash(folder: Path, trust_remote_code: bool) -> str:
    from st_wkl.models import hash_weights, load_model

    return hash_weights(load_model(folder, trust_remote_code=trust_remote_code)[0])
