"""The score store: exact, keyed by everything that matters, and safe from crashes and strangers' files."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from st_wkl.data.score_store import ScoreStore, ScoreStoreError, default_store_path
from st_wkl.data.teacher import text_key

TEACHER = {"model": "teacher", "revision": "abc", "max_length": 512, "prompt": None}
PAIRS = [("query", "document"), ("query", "another"), ("document", "query")]


def test_scores_read_back_to_the_bit(tmp_path: Path) -> None:
    """A score from the store must equal the score that was computed, or a repeated build gives another dataset."""
    scores = np.array([1 / 3, -1e-30, 3e38], dtype=np.float32)
    with ScoreStore(tmp_path / "new folder" / "scores.sqlite3") as store:
        store.put(TEACHER, PAIRS, scores)
    with ScoreStore(tmp_path / "new folder" / "scores.sqlite3") as store:
        found = store.get(TEACHER, [*PAIRS, ("never", "scored")])
        assert store.count() == 3
    assert found.dtype == np.float32
    assert found[:3].tobytes() == scores.tobytes()
    assert np.isnan(found[3])


@pytest.mark.parametrize(
    "change", [{"revision": "abd"}, {"max_length": 256}, {"prompt": "Find:"}, {"dtype": "bfloat16"}]
)
def test_two_teachers_never_meet(change: dict[str, str | int]) -> None:
    """A score of another revision or length under this teacher's name is the error that nobody would ever notice."""
    with ScoreStore(":memory:") as store:
        store.put(TEACHER, PAIRS[:1], [1.0])
        store.put({**TEACHER, **change}, PAIRS[:1], [2.0])
        assert store.get(TEACHER, PAIRS[:1]) == [1.0]
        assert store.get({**TEACHER, **change}, PAIRS[:1]) == [2.0]
        assert store.get(dict(reversed(TEACHER.items())), PAIRS[:1]) == [1.0]


def test_texts_are_told_apart() -> None:
    """Query and document are two keys: joining them would mix up ("a b", "c") and ("a", "b c"), or their order."""
    pairs = [("ab", "c"), ("a", "bc"), ("c", "ab"), ("ab", "c "), ("", "abc"), ("é", "\ud83d")]
    with ScoreStore(":memory:") as store:
        store.put(TEACHER, pairs, range(6))
        assert store.get(TEACHER, pairs).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("score", [float("nan"), float("inf"), float("-inf")])
def test_only_finite_scores_are_stored(score: float) -> None:
    """One NaN in the store would ruin every later training; nothing of the call is kept."""
    with ScoreStore(":memory:") as store:
        with pytest.raises(ValueError, match=r"query 'query' and document 'another' is (nan|inf|-inf)"):
            store.put(TEACHER, PAIRS, [1.0, score, 2.0])
        assert store.count() == 0


def test_counts_must_agree() -> None:
    """Scores that are shifted by one are worse than none."""
    with ScoreStore(":memory:") as store, pytest.raises(ValueError, match="2 scores for 3 pairs"):
        store.put(TEACHER, PAIRS, [1.0, 2.0])


def test_a_strangers_file_is_left_alone(tmp_path: Path) -> None:
    """A wrong path must not destroy another program's data, and must say what the file is."""
    text, other, newer = tmp_path / "text", tmp_path / "other", tmp_path / "newer"
    text.write_text("This is not a database, but it is long enough to look like one. " * 100, encoding="utf-8")
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE precious (x)")
    ScoreStore(newer).close()
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 99")
    for path, message in (
        (text, "is damaged or no score store.*Move the file away"),
        (other, "is a database of another program. Give another path"),
        (newer, "has format 99, this st_wkl reads 1.*Upgrade"),
    ):
        before = path.read_bytes()
        with pytest.raises(ScoreStoreError, match=message) as error:
            ScoreStore(path)
        assert str(path) in str(error.value)
        assert path.read_bytes() == before


def test_a_truncated_file_is_never_half_read(tmp_path: Path) -> None:
    """A file that lost its end (full disk, broken copy) must not pass for one with fewer scores."""
    path = tmp_path / "scores.sqlite3"
    pairs = [("query", f"document {i}") for i in range(5000)]
    with ScoreStore(path) as store:
        store.put(TEACHER, pairs, range(5000))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    damaged = path.read_bytes()
    with (
        pytest.raises(ScoreStoreError, match=r"scores\.sqlite3 is damaged.*set aside as .*\.damaged-1"),
        ScoreStore(path) as store,
    ):
        store.get(TEACHER, pairs)
    assert Path(f"{path}.damaged-1").read_bytes() == damaged
    with ScoreStore(path) as store:
        assert store.count() == 0, "the next run starts with a new store"
        assert np.isnan(store.get(TEACHER, pairs)).all()


def test_verify_finds_what_no_lookup_meets(tmp_path: Path) -> None:
    """A flipped block in the middle is found before a build needs it; entries of another program are named."""
    path = tmp_path / "scores.sqlite3"
    with ScoreStore(path) as store:
        store.put(TEACHER, [("query", f"document {i}") for i in range(5000)], range(5000))
        assert store.verify() == 5000
        store._connection.execute("UPDATE scores SET score = 'high' WHERE score = 7")
        with pytest.raises(ScoreStoreError, match="1 entries of the score store"):
            store.verify()
        assert path.exists()
    contents = bytearray(path.read_bytes())
    contents[3 * 4096 + 8 : 3 * 4096 + 600] = bytes(592)
    path.write_bytes(contents)
    with pytest.raises(ScoreStoreError, match=r"is damaged.*set aside"), ScoreStore(path) as store:
        store.verify()
    assert not path.exists()
    assert Path(f"{path}.damaged-1").exists()


def test_only_damage_sets_a_store_aside(tmp_path: Path) -> None:
    """A sound store that was used after close(), or in another thread, was renamed: weeks of work seemed lost."""
    path = tmp_path / "scores.sqlite3"
    with ScoreStore(path) as store:
        store.put(TEACHER, PAIRS, [1.0, 2.0, 3.0])
        said: list[str] = []

        def elsewhere() -> None:
            for use in (lambda: store.get(TEACHER, PAIRS), lambda: store.put(TEACHER, PAIRS, [0, 0, 0]), store.close):
                with pytest.raises(ScoreStoreError) as error:
                    use()
                said.append(str(error.value))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert len(said) == 3
        assert all("Each thread needs a ScoreStore of its own" in text for text in said)
        with pytest.raises(ScoreStoreError, match=r"constraint.*stored before is safe"), store._explained():
            store._connection.execute("INSERT INTO scores SELECT * FROM scores")
    for use in (lambda: store.get(TEACHER, PAIRS), lambda: store.put(TEACHER, PAIRS, [0, 0, 0]), store.count):
        with pytest.raises(ScoreStoreError, match=r"was closed.*What was stored|What was stored.*It was closed"):
            use()
    assert [file.name for file in tmp_path.iterdir()] == ["scores.sqlite3"]
    with ScoreStore(path) as store:
        assert store.get(TEACHER, PAIRS).tolist() == [1.0, 2.0, 3.0]


def test_a_flipped_bit_is_found_when_it_is_read(tmp_path: Path) -> None:
    """Other numbers than the teacher's would be trained on: no bit of a score changes unseen, in `get` or `verify`."""
    pairs = [(f"query {i}", f"document {j}") for i in range(20) for j in range(15)]
    scores = np.random.default_rng(0).normal(size=len(pairs)).astype(np.float32)
    with ScoreStore(tmp_path / "sound") as store:
        store.put(TEACHER, pairs[::-1], scores[::-1])
    contents, generator = (tmp_path / "sound").read_bytes(), np.random.default_rng(1)
    found = 0
    for bit in generator.integers(8 * len(contents), size=150):
        path = tmp_path / "flipped"
        changed = bytearray(contents)
        changed[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(changed)
        sound = True
        try:
            with warnings.catch_warnings(record=True) as said, ScoreStore(path) as store:
                warnings.simplefilter("always")
                read = store.get(TEACHER, pairs)
                # What is no longer found is computed again; what is found is what was written.
                assert ((read == scores) | np.isnan(read)).all()
                found += bool(said)
                sound = bool((read == scores).all())
                assert store.verify() == len(pairs)
            assert sound, "verify calls a store sound that lacks a score"
        except ScoreStoreError:
            found += 1
        for file in tmp_path.glob("flipped*"):
            file.unlink()
    assert found > 75


def test_scores_that_differ_are_computed_again(tmp_path: Path) -> None:
    """One flipped bit must cost the scores of one query, not the store."""
    pairs = [*PAIRS, ("query", "third")]
    with ScoreStore(tmp_path / "scores") as store:
        store.put(TEACHER, pairs, [1.0, 2.0, 3.0, 4.0])
        checks = store._connection.execute("SELECT * FROM checks").fetchall()
        store._connection.execute("UPDATE scores SET score = 9 WHERE score = 2")
        assert store.get(TEACHER, pairs).tolist() == [1.0, 9.0, 3.0, 4.0], "what another program writes has no checksum"
        store._connection.executemany("INSERT OR REPLACE INTO checks VALUES (?, ?, ?)", checks)
        with pytest.warns(UserWarning, match="3 of 4 pairs have scores .* not what was written"):
            assert np.isnan(store.get(TEACHER, pairs)).tolist() == [True, True, False, True]
        with pytest.raises(ScoreStoreError, match="1 parts are not what was written"):
            store.verify()
        store.put(TEACHER, PAIRS[:2], [1.0, 2.0])
        assert store.verify() == 3
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = store.get(TEACHER, pairs)
    assert found[:3].tolist() == [1.0, 2.0, 3.0]
    assert np.isnan(found[3])


def test_info_counts_each_teacher(tmp_path: Path) -> None:
    """Whoever finds a large file must see what is in it."""
    with ScoreStore(tmp_path / "scores.sqlite3") as store:
        store.put(TEACHER, PAIRS, [1.0, 2.0, 3.0])
        store.put({"model": "other"}, PAIRS[:1], [1.0])
        info = store.info()
    assert info.teachers == [(TEACHER, 3), ({"model": "other"}, 1)]
    assert (info.scores, info.bytes > 4096) == (4, True)
    assert '1 of {"model": "other"}' in str(info)


def test_export_and_import(tmp_path: Path) -> None:
    """Scores move between machines to the bit; what is there stays, and a second import adds nothing."""
    scores = np.array([1 / 3, -1e-30, 3e38], dtype=np.float32)
    with ScoreStore(tmp_path / "first") as store:
        store.put(TEACHER, PAIRS, scores)
        store.put({"model": "other"}, PAIRS[:1], [5.0])
        assert store.export_parquet(tmp_path / "scores.parquet", show_progress=False) == 4
    with ScoreStore(tmp_path / "second") as store:
        store.put({"model": "third"}, PAIRS, [0.0, 0.0, 0.0])
        store.put({"model": "other"}, PAIRS[:1], [6.0])
        assert store.import_parquet(tmp_path / "scores.parquet", show_progress=False) == 3
        assert store.import_parquet(tmp_path / "scores.parquet", show_progress=False) == 0
        assert store.get(TEACHER, PAIRS).tobytes() == scores.tobytes()
        assert store.get({"model": "other"}, PAIRS[:1]) == [6.0]
        assert store.verify() == 7
    with ScoreStore(tmp_path / "empty") as store:
        assert store.export_parquet(tmp_path / "empty.parquet", show_progress=False) == 0
        assert store.import_parquet(tmp_path / "empty.parquet", show_progress=False) == 0


def test_files_that_are_no_export(tmp_path: Path) -> None:
    """Another parquet file, a truncated one and one with NaN change nothing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with ScoreStore(tmp_path / "store") as store:
        store.put(TEACHER, PAIRS, [1.0, 2.0, 3.0])
        store.export_parquet(tmp_path / "good", show_progress=False)
        table = pq.read_table(tmp_path / "good")
        nan = pa.array([1.0, float("nan"), 3.0], type=pa.float32())
        metadata = table.schema.metadata
        for name, column, values in (
            ("short", "query", pa.array([b"short"] * 3)),
            ("none", "document", pa.array([None, b"0" * 16, b"1" * 16], type=pa.binary(16))),
            ("text", "score", pa.array(["1", "2", "3"])),
            ("teacher", "teacher", pa.array(["[1]"] * 3)),
            ("no JSON", "teacher", pa.array(["{"] * 3)),
        ):
            wrong = table.set_column(table.column_names.index(column), column, values)
            pq.write_table(wrong.replace_schema_metadata(metadata), tmp_path / name)
        pq.write_table(table.set_column(3, "score", nan), tmp_path / "nan")
        pq.write_table(table.replace_schema_metadata(None), tmp_path / "other")
        (tmp_path / "cut").write_bytes((tmp_path / "good").read_bytes()[:-20])
    with ScoreStore(tmp_path / "new") as store:
        for name, message in (
            ("nan", "not finite"),
            ("other", "is no export"),
            ("cut", "cannot be read"),
            ("short", "query .binary.*Nothing is imported"),
            ("none", "a document without a hash of 16 bytes"),
            ("text", "score .string.*Nothing is imported"),
            ("teacher", "no JSON object"),
            ("no JSON", "no JSON object"),
        ):
            with pytest.raises(ValueError, match=message):
                store.import_parquet(tmp_path / name, show_progress=False)
        assert store.info().teachers == []


def test_unusable_places(tmp_path: Path) -> None:
    """No permission, a folder in the file's place, a file in the folder's place: an error before the first score."""
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "scores.sqlite3"):
        with pytest.raises(ScoreStoreError, match=r"cannot be opened.*Give a file"):
            ScoreStore(path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    """Said before the first score is computed."""
    tmp_path.chmod(0o555)
    with pytest.raises(ScoreStoreError, match="cannot be"):
        ScoreStore(tmp_path / "scores.sqlite3")


def test_a_read_only_file(tmp_path: Path) -> None:
    """A store that may be read but not written says so, and what it holds is safe."""
    with ScoreStore(tmp_path / "scores.sqlite3") as store:
        store.put(TEACHER, PAIRS, [1.0, 2.0, 3.0])
        store._connection.execute("PRAGMA query_only = ON")
        with pytest.raises(ScoreStoreError, match=r"readonly.*What was stored before is safe"):
            store.put(TEACHER, [("new", "pair")], [1.0])
        assert store.count() == 3


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """What was committed stays, and the error says that a new start continues."""
    with ScoreStore(tmp_path / "scores.sqlite3") as store:
        store.put(TEACHER, PAIRS, [1.0, 2.0, 3.0])
        store._connection.execute("PRAGMA max_page_count = 5")
        more = [("query", f"document {i}") for i in range(1000)]
        with pytest.raises(ScoreStoreError, match=r"full.*continues where it stopped"):
            store.put(TEACHER, more, range(1000))
        assert store.count() == 3
        assert store.get(TEACHER, PAIRS).tolist() == [1.0, 2.0, 3.0]


def test_a_locked_file_is_waited_for_and_then_named(tmp_path: Path) -> None:
    """Another process may write for a moment; one that never ends must not hang this one for ever."""
    path = tmp_path / "scores.sqlite3"
    with ScoreStore(path, timeout=0.1) as store:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(ScoreStoreError, match="locked"):
            store.put(TEACHER, PAIRS[:1], [1.0])
        other.execute("ROLLBACK")
        other.close()
        store.put(TEACHER, PAIRS[:1], [1.0])
        assert store.count() == 1


def run(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a Python process that has this package."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_committed_scores_survive_kill_9(tmp_path: Path) -> None:
    """A transaction that was cut off leaves the file as it was before, without any repair."""
    code = (
        "import os, signal, sys\n"
        "from st_wkl.data.score_store import ScoreStore\n"
        "store = ScoreStore(sys.argv[1])\n"
        "store.put({'model': 't'}, [('q', str(i)) for i in range(100)], range(100))\n"
        "def scores():\n"
        "    yield from range(50)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "store._connection.execute('BEGIN IMMEDIATE')\n"
        "store._connection.executemany('INSERT INTO scores VALUES (1, ?, ?, ?)',"
        " ((b'q', str(i).encode(), s) for i, s in enumerate(scores())))\n"
    )
    process = run(code, tmp_path / "scores.sqlite3")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    with ScoreStore(tmp_path / "scores.sqlite3") as store:
        assert store.count() == 100
        assert store.get({"model": "t"}, [("q", "99")]) == [99.0]


@pytest.mark.slow
def test_processes_share_one_file(tmp_path: Path) -> None:
    """Several scoring processes on one machine may open and fill a new store at the same moment."""
    code = (
        "import sys\n"
        "from st_wkl.data.score_store import ScoreStore\n"
        "with ScoreStore(sys.argv[1]) as store:\n"
        "    for i in range(40):\n"
        "        store.put({'model': sys.argv[2]}, [('q', f'{i}-{j}') for j in range(25)], [i] * 25)\n"
    )
    processes = [run(code, tmp_path / "scores.sqlite3", name) for name in ("first", "second", "second", "third")]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    with ScoreStore(tmp_path / "scores.sqlite3") as store:
        assert store.count() == 3000
        assert store.get({"model": "third"}, [("q", "39-24")]) == [39.0]


@pytest.mark.slow
def test_new_stores_are_made_once(tmp_path: Path) -> None:
    """Processes that start together race to make the tables of a new store."""
    code = (
        "import sys, time\n"
        "from st_wkl.data.score_store import ScoreStore\n"
        "start = float(sys.argv[2])\n"
        "for i in range(60):\n"
        "    while time.time() < start + i / 100: pass\n"
        "    ScoreStore(f'{sys.argv[1]}/{i}').close()\n"
    )
    processes = [run(code, tmp_path, time.time() + 1.5) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors


def test_the_switch_to_the_log_waits_for_a_lock(tmp_path: Path) -> None:
    """SQLite does not wait there by itself: of two runs started together on a new store, one would stop at once."""
    path = tmp_path / "scores"
    ScoreStore(path).close()
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("PRAGMA journal_mode = DELETE")
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(ScoreStoreError, match="locked"):
        ScoreStore(path, timeout=0.1)
    timer = threading.Timer(0.5, lambda: other.execute("COMMIT"))
    timer.start()
    with ScoreStore(path, timeout=30) as store:
        store.put({"model": "teacher"}, [("q", "d")], [1.0])
        assert store.count() == 1
    timer.join()
    other.close()


def test_default_path_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hours of scores belong where the user's system keeps such things, not in the working folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_store_path() == tmp_path / "st_wkl" / "scores.sqlite3"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_store_path() == Path.home() / ".cache" / "st_wkl" / "scores.sqlite3"


def test_many_queries_with_one_document_each_are_read_together(tmp_path: Path) -> None:
    """A statement for each query took longer than before there were checksums; in one, none may be lost or mixed up."""
    pairs = [(f"query {number}", f"document {number % 7}") for number in range(2_345)]
    with ScoreStore(tmp_path / "scores.sqlite3") as store:
        store.put(TEACHER, pairs, range(len(pairs)))
        store.put(TEACHER, [("query 7", "another")], [-1.0])
        statements: list[str] = []
        store._connection.set_trace_callback(statements.append)
        asked = [
            pairs[7],
            *pairs[::-1],
            ("query 7", "another"),
            ("query 7", "none"),
            ("nobody", "document 1"),
            pairs[7],
        ]
        found = store.get(TEACHER, asked)
        assert len(statements) < 10
        expected = [7.0, *range(len(pairs))[::-1], -1.0, np.nan, np.nan, 7.0]
        np.testing.assert_array_equal(found, np.array(expected, dtype=np.float32))
        store._connection.set_trace_callback(None)
        store._connection.execute("UPDATE checks SET checksum = checksum + 1 WHERE query = ?", (text_key(pairs[0][0]),))
        with pytest.warns(UserWarning, match="1 of 2,345 pairs"):
            assert np.isnan(store.get(TEACHER, pairs)).sum() == 1


def test_minus_zero_is_a_zero(tmp_path: Path) -> None:
    """SQLite keeps it as 0.0: its checksum differed at every start, and a teacher of whole lists was asked for ever."""
    with ScoreStore(tmp_path / "scores.db") as store, warnings.catch_warnings():
        warnings.simplefilter("error")
        store.put({"model": "m"}, [("q", "d")], np.array([-0.0], dtype=np.float32))
        assert store.get({"model": "m"}, [("q", "d")]).tolist() == [0.0]
