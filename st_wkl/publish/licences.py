"""The licence of a student, as far as it follows from what it was made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from st_wkl.markdown import markdown_code

# Ids of the Hub, in classes by what they ask of somebody who passes the student on, the later the more: nothing, to
# name the authors, to keep the licence, to earn nothing.
_CLASSES = tuple(
    tuple(ids.split())
    for ids in (
        "cc0-1.0 unlicense 0bsd pddl wtfpl",
        "mit isc bsd bsd-2-clause bsd-3-clause zlib artistic-2.0 ms-pl apache-2.0 cdla-permissive-1.0 "
        "cdla-permissive-2.0 odc-by cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0",
        "mpl-2.0 lgpl lgpl-2.1 lgpl-3.0 gpl gpl-2.0 gpl-3.0 agpl-3.0 odbl cdla-sharing-1.0 cc-by-sa-3.0 cc-by-sa-4.0",
        "cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0",
    )
)
_RANK = {licence: rank for rank, licence in enumerate(licence for ids in _CLASSES for licence in ids)}
_ASKS_THE_SAME = {*_CLASSES[2], "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"}
_RESEARCH = {"research", "research-only", "research use", "research use only", "non-commercial"}


@dataclass(frozen=True)
class Licence:
    """What a card says of the licence.

    Args:
        id: Licence id of the Hub; `"other"` where no standard one fits; None where it is not known.
        name: For `"other"`, a short name.
        why: A paragraph for the card.
    """

    id: str | None
    name: str | None
    why: str


def licence_of(parts: Mapping[str, str | None]) -> Licence:
    """Return the most restrictive licence of what a student was made of.

    Whether the licence of training data binds the weights is disputed; this takes the cautious side. Where one part's
    licence is not known, nothing is claimed for the whole. Two licences that each ask that what is derived keeps that
    very licence cannot both be met, which gives `"other"`.

    Args:
        parts: What it is (`"student"`, `"teacher"`, `"training data"`) to its licence: an id of the Hub such as
            `"cc-by-nc-4.0"`, `"research-only"` for data that may be used for research alone, None where unknown.

    Example:
        >>> licence_of({"student": "mit", "teacher": "apache-2.0", "training data": "cc-by-nc-4.0"}).id
        'cc-by-nc-4.0'
        >>> licence_of({"student": "mit", "training data": None}).id is None
        True
    """
    stated = {part: licence.strip().lower() if licence else None for part, licence in parts.items()}
    listed = ", ".join(f"{part}: {markdown_code(id) if id else 'not known'}" for part, id in stated.items())
    known = {licence for licence in stated.values() if licence}

    def found(id: str | None, name: str | None, why: str) -> Licence:
        caution = "This is a summary and no legal advice; look at the licences themselves."
        return Licence(id, name, f"{listed[:1].upper()}{listed[1:]}. {why} {caution}")

    if research := " and ".join(part for part, licence in stated.items() if licence in _RESEARCH):
        why = f"The terms of the {research} allow research only, so use this model for nothing else."
        return found("other", "research-only", why)
    unknown = " and ".join(part for part, licence in stated.items() if licence is None)
    if unknown or not stated:
        hint = " What is known allows non-commercial use only." if known & {*_CLASSES[3]} else ""
        why = f"The licence of the {unknown or 'parts'} is not known, so none is claimed for this model.{hint}"
        return found(None, None, why)
    if odd := sorted(known - _RANK.keys()):
        why = f"{', '.join(map(markdown_code, odd))}: see its own terms, which hold for this model too."
        return found("other", odd[0], why)
    strictest = max(known, key=_RANK.__getitem__)
    demanding = known & _ASKS_THE_SAME
    if len(demanding) > 1 or (demanding and strictest not in demanding):
        why = f"{' and '.join(f'`{licence}`' for licence in sorted(demanding | {strictest}))} cannot both be met."
        return found("other", "conflicting-licences", why)
    commerce = " It forbids commercial use." if strictest in _CLASSES[3] else ""
    return found(strictest, None, f"The most restrictive of them is `{strictest}`.{commerce}")
