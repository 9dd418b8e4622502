"""One rule of what a word is, for BM25, leak check and near copies, in any script."""

from __future__ import annotations

import re
import unicodedata
from itertools import pairwise
from pathlib import Path

import mteb
import pytest
import regex

from st_wkl.data.candidates import BM25, bm25_candidates
from st_wkl.data.collection import Collection
from st_wkl.data.leaks import find_leaks
from st_wkl.data.selection import duplicates
from st_wkl.evaluation import evaluate
from st_wkl.text import _SPECIAL, near_texts, text_hash, unspaced, words

# Script: (the relevant document, another, a query); without its rule each finds nothing, or the wrong document.
TEXTS = {
    "Chinese": ("北京是中国的首都", "长城位于中国北方", "中国的首都"),
    "Chinese, one character": ("黑猫在睡觉", "小狗在外面", "猫"),
    "Japanese": ("東京は日本の首都です", "京都は古い町です", "日本の首都"),
    "Japanese, half width": ("コーヒーを飲む", "お茶を飲む", "ｺｰﾋｰ"),
    "Korean": ("서울은 한국의 수도이다", "부산은 큰 항구이다", "한국 수도"),
    "Korean, decomposed": ("서울은 한국의 수도이다", "부산은 큰 항구이다", unicodedata.normalize("NFD", "서울")),
    "Thai": ("กรุงเทพเป็นเมืองหลวงของประเทศไทย", "เชียงใหม่อยู่ทางเหนือ", "เมืองหลวง"),
    "Khmer": ("ភ្នំពេញជារាជធានីនៃប្រទេសកម្ពុជា", "សៀមរាបនៅភាគខាងជើង", "រាជធានី"),
    "Hindi": ("दिल्ली भारत की राजधानी है", "दलील भरत का राज धन", "भारत राजधानी दिल्ली"),
    "accents, decomposed": ("un résumé précis", "un resume", unicodedata.normalize("NFD", "Résumé")),
    "Arabic": ("القاهرة عاصمة مصر", "الإسكندرية مدينة ساحلية", "عاصمة"),
    "Persian, joiner": ("می\u200cخواهم بروم", "می روم", "میخواهم"),
    "mixed": ("iPhone手机2024年发布", "相机2023年发布", "手机 iphone"),
}


def small(name: str) -> Collection:
    """Return a collection of one relevant document, another and a query."""
    relevant, other, query = TEXTS[name]
    return Collection("mine", {"a": other, "b": relevant}, {"q": query}, {"test": {"q": {"b": 1}}})


@pytest.mark.parametrize("name", TEXTS)
def test_bm25_finds_words_of_any_script(name: str) -> None:
    """It found nothing where a script has no spaces, and syllables where marks cut words into pieces, silently."""
    found = bm25_candidates(small(name), show_progress=False)["q"]
    assert found[0].document_id == "b"
    assert evaluate("bm25", small(name), show_progress=False).ndcg_at_10 == 1.0


def test_words_are_those_that_lucene_makes() -> None:
    """Pairs of neighbours, single characters alone, other scripts and numbers as words, marks where they belong."""
    assert words("我是中国人。BM25は検索") == ["我是", "是中", "中国", "国人", "BM25", "は検", "検索"]
    assert words("2024年 ไทย หมา") == ["2024", "年", "ไท", "ทย", "หม", "มา"]
    assert words("हिन्दी में पढ़ना") == [unicodedata.normalize("NFC", word) for word in ("हिन्दी", "में", "पढ़ना")]
    assert words("葛\U000e0100飾 ❤️ 1️⃣ 🍕", bigrams=False) == ["葛飾", "1"]
    assert words("北京是iPhone", bigrams=False) == ["北京是iPhone"]


def test_other_text_has_the_words_that_it_had(shared_data: Path) -> None:
    """Published numbers of English collections stand on the old rule: a run of letters, digits and underlines."""
    documents = Collection.from_beir(shared_data / "scifact").documents.values()
    for text in (*documents, "Don't stop_it naïve façade ½ m² Straße ﬁne Ωmega İzmir".replace("İ", "I")):
        if not unspaced(text):
            assert words(text) == re.findall(r"(?u)\b\w+\b", unicodedata.normalize("NFC", text))


def test_no_character_with_a_rule_takes_the_short_way() -> None:
    """The quick look is a list of ranges; a script that it forgets would be cut as before."""
    special = regex.compile(
        r"[\p{Mn}\p{Mc}\p{Han}\p{Hangul}\p{Thai}\p{Khmer}\p{Lao}\p{Myanmar}\u200c\u200d\uff00-\uffef]"
    )
    assert all(_SPECIAL.match(sign) for sign in map(chr, range(0x110000)) if special.match(sign))


def test_the_name_says_how_words_were_made(tmp_path: Path) -> None:
    """A number of pairs of characters, or one from a cache of before, must not stand under the name of words."""
    chinese, latin = small("Chinese"), small("accents, decomposed")
    assert [evaluate("bm25", c, show_progress=False).name for c in (chinese, latin)] == ["bm25-bigrams", "bm25"]
    assert {hit.source for hit in bm25_candidates(chinese, show_progress=False)["q"]} == {"bm25-bigrams"}
    plain = evaluate(BM25(k1=0.9, language=None), chinese, show_progress=False, name="mine", cache=tmp_path)
    assert (plain.name, plain.ndcg_at_10) == ("mine", 1.0)
    (cached,) = {str(result.model_name) for result in mteb.ResultCache(tmp_path).load_results().model_results}
    assert cached == "local/bm25-k1-0.9-language-none-bigrams"
    tasks = [evaluate("bm25", c, first_stage="bm25", show_progress=False).task().task for c in (chinese, latin)]
    assert tasks == ["mine-rerank-bm25-bigrams-top100", "mine-rerank-bm25-top100"]


def test_a_named_language_has_words() -> None:
    """Who names a language says that the texts have words, and is told where no word of a query can be found."""
    named = BM25(language="german")
    assert bm25_candidates(small("Chinese"), language="german", show_progress=False) == {"q": []}
    assert named.name_over(["北京是中国的首都"]) == named.name
    with pytest.warns(UserWarning, match=r"BM25 finds no word in 1 of 1 queries of 'x', and so no candidate.*'q'"):
        bm25_candidates(Collection("x", {"d": "a cat 🍕"}, {"q": "🍕!"}), show_progress=False)


def test_leak_check_and_near_copies_see_the_same_words() -> None:
    """A sentence without spaces was one word to them, so that only equal ones were near."""
    long = "北京是中华人民共和国的首都也是全国的政治文化和国际交往中心"
    equal, near = near_texts({"a": long}, {"b": long + "吗", "c": long[:9]}, 0.9)
    assert (equal, list(near["a"])) == ({}, ["b"])
    assert duplicates({"b": long + "吗", "c": long[:9]}, {"p": long}) == ([], ["b"], [])
    decomposed = unicodedata.normalize("NFD", "Un résumé précis")
    mine = Collection(
        "mine",
        {"d": "Un résumé précis", "e": decomposed},
        {"q": "très court", "r": "autre chose"},
        {"train": {"q": {"d": 1}}, "test": {"r": {"e": 1}}},
    )
    assert find_leaks("train", mine).shared_documents == {"r": ["e"]}


def test_hashes_of_texts_stay() -> None:
    """Students carry hashes of their training texts: those of before must go on being found."""
    assert text_hash("  Who \n PURRS ") == text_hash("Who PURRS") == "38ad16f3219e7c03"
    assert len({text_hash(text) for text in ("é", "e\u0301", "É")}) == 3
    assert [first != second for first, second in pairwise(map(text_hash, ("a b", "ab", "A B")))] == [True, True]
