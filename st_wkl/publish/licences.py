"""The licence of a student, as far as it follows from what it was made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from st_wkl.markdown import markdown_code

# Ids of the Hub, by what they ask of somebody who passes the student on.
_FREE = ("cc0-1.0", "unlicense", "0bsd", "pddl", "wtfpl")
_CREDIT = (
    *("mit", "isc", "bsd", "bsd-2-clause", "bsd-3-clause", "zlib", "artistic-2.0", "ms-pl", "apache-2.0"),
    *("cdla-permissive-1.0", "cdla-permissive-2.0", "odc-by", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0"),
)
_SHARE_ALIKE = (
    *("mpl-2.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "gpl", "gpl-2.0", "gpl-3.0", "agpl-3.0", "odbl", "cdla-sharing-1.0"),
    *("cc-by-sa-3.0", "cc-by-sa-4.0"),
)
_NON_COMMERCIAL = ("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0")
_CLASSES = (_FREE, _CREDIT, _SHARE_ALIKE, _NON_COMMERCIAL)
_RANK = {licence: (group, place) for group, ids in enumerate(_CLASSES) for place, licence in enumerate(ids)}
_RESEARCH = {"research", "research-only", "research use", "research use only", "non-commercial"}
_ASKS_THE_SAME = {*_SHARE_ALIKE, "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"}


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

    Returns:
        The licence, and why.

    Example:
        >>> licence_of({"student": "mit", "teacher": "apache-2.0", "training data": "cc-by-nc-4.0"}).id
        'cc-by-nc-4.0'
        >>> licence_of({"student": "mit", "training data": None}).id is None
        True
    """
    stated = {part: licence.strip().lower() if licence else None for part, licence in parts.items()}
    listed = ", ".join(
        f"{part}: {markdown_code(licence) if licence else 'not known'}" for part, licence in stated.items()
    )
    listed = f"{listed[:1].upper()}{listed[1:]}."
    caution = "This is a summary and no legal advice; look at the licences themselves."
    known = {licence for licence in stated.values() if licence}
    if research := [part for part, licence in stated.items() if licence in _RESEARCH]:
        why = f"The terms of the {' and '.join(research)} allow research only, so use this model for nothing else."
        return Licence("other", "research-only", f"{listed} {why} {caution}")
    unknown = [part for part, licence in stated.items() if licence is None]
    if unknown or not stated:
        hint = " What is known allows non-commercial use only." if _forbids_commerce(known) else ""
        missing = " and ".join(unknown) or "parts"
        why = f"The licence of the {missing} is not known, so none is claimed for this model."
        return Licence(None, None, f"{listed} {why}{hint} {caution}")
    if odd := sorted(known - _RANK.keys()):
        why = (
            f"{', '.join(markdown_code(licence) for licence in odd)}: see its own terms, which hold for this model too."
        )
        return Licence("other", odd[0], f"{listed} {why} {caution}")
    strictest = max(known, key=_RANK.__getitem__)
    demanding = known & _ASKS_THE_SAME
    if len(demanding) > 1 or (demanding and strictest not in demanding):
        why = f"{' and '.join(f'`{licence}`' for licence in sorted(demanding | {strictest}))} cannot both be met."
        return Licence("other", "conflicting-licences", f"{listed} {why} {caution}")
    why = f"The most restrictive of them is `{strictest}`."
    if _forbids_commerce({strictest}):
        why += " It forbids commercial use."
    return Licence(strictest, None, f"{listed} {why} {caution}")


def _forbids_commerce(licences: set[str]) -> bool:
    return any(licence in _NON_COMMERCIAL for licence in licences)
