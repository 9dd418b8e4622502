"""Triples of query, document and score to lists by query: rows a second, and peak memory above the libraries'.

Run: python examples/benchmark_import.py     (a million triples of 50 words; Linux only, for the memory)
     python examples/benchmark_import.py --triples 10000000

Queries have 32 documents each, out of a tenth as many documents as triples. The file is made first; the import runs in
a process of its own. Its CPU seconds are those of all cores, whatever else keeps the machine busy.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import in_own_process, peak_megabytes

LENGTH, WORDS, AT_ONCE = 32, 50, 100_000


def write_triples(path: Path, count: int) -> None:
    rng, words = np.random.default_rng(0), np.array([f"w{place:05}" for place in range(20_000)], dtype=object)

    def texts(name: str, number: int, length: int) -> pa.Array:
        return pa.array([f"{name}{n} " + " ".join(words[rng.integers(0, len(words), length)]) for n in range(number)])

    queries, documents = texts("q", count // LENGTH + 1, 6), texts("d", count // 10, WORDS)
    columns = {"query": pa.string(), "document": pa.string(), "score": pa.float32()}
    with pq.ParquetWriter(path, pa.schema(columns), compression="zstd") as writer:
        for start in range(0, count, AT_ONCE):
            rows = np.arange(start, min(start + AT_ONCE, count))
            places = (rows // LENGTH * 7_919 + rows % LENGTH * 104_729) % len(documents)
            parts = queries.take(pa.array(rows // LENGTH)), documents.take(pa.array(places))
            writer.write_table(pa.table([*parts, pa.array(rng.normal(0, 4, len(rows)).astype(np.float32))], [*columns]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triples", type=int, default=1_000_000)
    parser.add_argument("--file", type=Path, help="import this one, in this process, as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.file:
            from st_wkl.data.importers import convert

            before, start, cpu = peak_megabytes(), time.perf_counter(), time.process_time()
            convert(arguments.file, f"{folder}/lists", teacher="none")
            seconds = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
            print(json.dumps(seconds | {"megabytes": peak_megabytes() - before}))
            return
        write_triples(Path(folder) / "triples.parquet", arguments.triples)
        run = in_own_process("--triples", arguments.triples, "--file", f"{folder}/triples.parquet")
    print(
        f"{arguments.triples:,} triples: {run['seconds']:.1f} s, {arguments.triples / run['seconds']:,.0f} rows/s; ",
        end="",
    )
    print(f"{run['cpu']:.1f} CPU s; {run['megabytes']:,.0f} MB above the libraries at its peak")


if __name__ == "__main__":
    main()
