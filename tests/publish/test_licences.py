"""A licence on a card is a promise to its reader, so it must err on the careful side."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from st_wkl.publish.licences import _CLASSES, licence_of

KNOWN = st.sampled_from([licence for group in _CLASSES for licence in group])


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (["mit", "apache-2.0", "cc0-1.0"], "apache-2.0"),
        (["MIT ", "apache-2.0", "cc-by-nc-4.0"], "cc-by-nc-4.0"),
        (["mit", "mit", "cc-by-sa-4.0"], "cc-by-sa-4.0"),
        (["mit", "cc-by-sa-4.0", "gpl-3.0"], "other"),
        (["mit", "cc-by-sa-4.0", "cc-by-nc-4.0"], "other"),
        (["mit", "mit", "research use"], "other"),
        ([None, "mit", "research-only"], "other"),
        (["gemma", "mit", "mit"], "other"),
        (["mit", None, "mit"], None),
        ([None, None, "cc-by-nc-4.0"], None),
        ([], None),
    ],
)
def test_the_most_restrictive_wins(licences: list[str | None], expected: str | None) -> None:
    """Permissive with permissive, with share-alike, with non-commercial, with research-only, and with the unknown."""
    parts = dict(zip(("student", "teacher", "training data"), licences, strict=False))
    assert licence_of(parts).id == expected


def test_what_is_not_known_is_said() -> None:
    """A reader must learn which part is in doubt, and that commerce is out in any case."""
    why = licence_of({"student": None, "teacher": "mit", "training data": "cc-by-nc-4.0"}).why
    assert "Student: not known, teacher: `mit`, training data: `cc-by-nc-4.0`." in why
    assert "licence of the student is not known" in why
    assert "non-commercial use only" in why


@given(st.lists(KNOWN, min_size=1, max_size=4), KNOWN)
def test_another_part_never_frees(licences: list[str], more: str) -> None:
    """Adding a part can only keep the licence, make it stricter, or make it a conflict."""
    order = [licence for group in _CLASSES for licence in group] + ["other"]
    before = licence_of({str(i): licence for i, licence in enumerate(licences)}).id
    after = licence_of({str(i): licence for i, licence in enumerate([*licences, more])}).id
    assert order.index(after or "") >= order.index(before or "")
