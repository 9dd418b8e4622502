"""Texts as words, near copies, and hashes: one rule for BM25, leak check, copies and twin questions."""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

import regex

# Scripts that put no space between words; Hangul, too, as in Lucene's CJKAnalyzer, since its words carry particles.
# Only letters: digits make numbers in any script. The long-vowel mark of the two kana belongs to no script.
_UNSPACED = (
    r"[[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Hangul}\p{Yi}\p{Thai}\p{Lao}\p{Myanmar}\p{Khmer}\p{Tai_Le}"
    r"\p{New_Tai_Lue}\p{Tai_Tham}\p{Tai_Viet}\p{Ahom}\p{Balinese}\p{Javanese}ー]&&[\p{L}\p{Nl}]]"
)
# How `words` makes words, for whatever keeps what was made of them: a change of it needs another text.
ANALYSER = "NFC, marks inside, pairs of characters where a script has no spaces"
_LETTER, _MARKS = r"[\p{L}\p{N}_]", r"[\p{Mn}\p{Mc}]*+"
_PLAIN = re.compile(r"\w+")
# Texts without any of these are the many, and take the short way: marks and scripts that have them, joiners, variation
# selectors, East Asia, other widths.
_SPECIAL = re.compile(
    "[\u0300-\u036f\u0483-\u0489\u0590-\u11ff\u1300-\u1dff\u200c\u200d\u20d0-\u20ff\u2c00-\U0010ffff]"
)
_IGNORED = re.compile("[\u200c\u200d\ufe00-\ufe0f\U000e0100-\U000e01ef]")  # joiners; which glyph is drawn
_WIDE = re.compile("[\uff00-\uffef]+")
_WORD = regex.compile(rf"(?V1)(?:{_LETTER}{_MARKS})++")
_PART = regex.compile(rf"(?V1)(?P<run>(?:{_UNSPACED}{_MARKS})++)|(?:(?!{_UNSPACED}){_LETTER}{_MARKS})++")
_CHARACTER = regex.compile(rf"(?V1){_UNSPACED}{_MARKS}")


def words(text: str, *, bigrams: bool = True) -> list[str]:
    """Return the words of a text as they stand, case and all, without punctuation.

    Text is normalised to NFC, marks stay inside words. Where a script has no spaces, each pair of neighbouring
    characters is a word, as in Lucene's `CJKAnalyzer`, and a character without neighbours is one.

    Args:
        text: Any text.
        bigrams: False takes a run of such characters for one word.

    Example:
        >>> words("Don't panic"), words("BM25は検索")
        (['Don', 't', 'panic'], ['BM25', 'は検', '検索'])
    """
    if not _SPECIAL.search(text) and unicodedata.is_normalized("NFC", text):
        return _PLAIN.findall(text)
    text = _WIDE.sub(lambda wide: unicodedata.normalize("NFKC", wide[0]), _IGNORED.sub("", text))
    text = unicodedata.normalize("NFC", text)
    if not bigrams:
        return _WORD.findall(text)
    found: list[str] = []
    for part in _PART.finditer(text):
        characters = unspaced_characters(part["run"] or "")
        found += [first + second for first, second in pairwise(characters)] or characters or [part[0]]
    return found


def unspaced(text: str) -> bool:
    """Return whether a text has letters of a script without spaces between its words."""
    return bool(_SPECIAL.search(text) and _CHARACTER.search(text))


def unspaced_characters(text: str) -> list[str]:
    """Return the letters of such scripts in a text, each with its marks."""
    found: list[str] = _CHARACTER.findall(text) if _SPECIAL.search(text) else []
    return found


def plain_text(text: str) -> str:
    """Return a text for comparison: NFKC, case-folded, with single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_words(text: str) -> list[str]:
    """Return the words of `plain_text` without punctuation; what stands between spaces if there is no letter."""
    plain = plain_text(text)
    return words(plain) or plain.split()


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """Return |first ∩ second| / |first ∪ second|, 0 for two empty sets."""
    common = len(first & second)
    return common / (len(first) + len(second) - common) if common else 0.0


def near_texts(
    texts: Mapping[str, str], others: Mapping[str, str], near: float = 0.9
) -> tuple[dict[str, list[str]], dict[str, dict[str, float]]]:
    """Find for each text those of `others` that are equal, and those that share nearly all words; see `find_leaks`.

    Args:
        texts: `{id: text}`.
        others: `{id: text}` to search in.
        near: Jaccard coefficient of the sets of words, above 0 and at most 1.

    Returns:
        `{id: equal others}` and `{id: {near other: Jaccard}}`, ids without any left out, equal others not among the
        near ones.

    Example:
        >>> near_texts({"a": "Cats  purr", "b": "Purr, cats!"}, {"c": "cats purr"})
        ({'a': ['c']}, {'b': {'c': 1.0}})
    """
    sets = {key: frozenset(text_words(text)) for key, text in others.items()}
    plain = {key: plain_text(text) for key, text in others.items()}
    by_text: dict[str, list[str]] = defaultdict(list)
    for key, text in plain.items():
        by_text[text].append(key)
    frequency = Counter(word for unique in sets.values() for word in unique)

    def prefix(unique: frozenset[str]) -> Sequence[str]:
        # Two sets with a Jaccard coefficient of at least `near` share one of these, their rarest words: prefix
        # filtering, Chaudhuri, Ganti, Kaushik: A primitive operator for similarity joins, ICDE 2006.
        length = len(unique) - math.ceil(near * len(unique) - 1e-9) + 1
        return sorted(unique, key=lambda word: (frequency[word], word))[:length]

    index: dict[str, list[str]] = defaultdict(list)
    for key, unique in sets.items():
        for word in prefix(unique):
            index[word].append(key)
    equal: dict[str, list[str]] = {}
    nearly: dict[str, dict[str, float]] = {}
    for key, text in texts.items():
        if same := by_text.get(plain_text(text)):
            equal[key] = list(same)
        unique = frozenset(text_words(text))
        hits = {
            other: round(overlap, 4)
            for other in dict.fromkeys(other for word in prefix(unique) for other in index.get(word, ()))
            if (overlap := jaccard(unique, sets[other])) >= near and plain[other] != plain_text(text)
        }
        if hits:
            nearly[key] = hits
    return equal, nearly


def text_hash(text: str) -> str:
    """Return 16 hex digits for a text, equal for texts that differ in white space only."""
    return hashlib.blake2b(" ".join(text.split()).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
