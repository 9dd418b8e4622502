"""Versions of the packages that a result depends on, and of those that have to fit each other."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version
from platform import python_version

from packaging.requirements import Requirement
from packaging.version import Version


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed; extras and a bare checkout may not be."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def package_versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """Return the versions of Python, st-wkl and the packages; without any of those that decide a score."""
    names = packages or ("mteb", "sentence-transformers", "transformers", "torch", "numpy", "pytrec-eval-terrier")
    return {"python": python_version(), **installed_versions(("st-wkl", *names))}


def check_adapters(wanted: object = True) -> None:
    """Stop where an adapter is wanted and the installed transformers refuses the installed peft.

    It says so only when an adapter is put on, after data and models are loaded, and no installer knows of it: neither
    package declares which version of the other it needs.

    Raises:
        ImportError: With both versions and what to install.
    """
    if not wanted:
        return
    from transformers.integrations.peft import MIN_PEFT_VERSION

    found = version("peft")
    if Version(found) < Version(MIN_PEFT_VERSION):
        raise ImportError(
            f"Adapters (LoRA) need peft {MIN_PEFT_VERSION} or newer beside transformers {version('transformers')}, and "
            f"peft {found} is installed. Install a pair that fits: pip install {_tested('transformers', 'peft')}"
        )


def _tested(*names: str) -> str:
    """Return the bounds that st-wkl is installed with, for a shell; bare names in a checkout that is not installed."""
    try:
        bounds = {entry.name: str(entry) for entry in map(Requirement, requires("st-wkl") or []) if not entry.marker}
    except PackageNotFoundError:
        bounds = {}
    return " ".join(f"'{bounds.get(name, name)}'" for name in names)
