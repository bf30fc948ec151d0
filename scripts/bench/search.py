"""How fast and how well an index finds: against all embeddings compared exactly, on embeddings made for it.

    taskset -c 0,1 python scripts/bench/search.py --count 1000000 --kinds ivf_pq --folder /tmp/bench

A row per kind: how long it took to build, its size, milliseconds per query (median and 95th percentile, one query at a
time, with the rows of metadata that a user would see), and recall@10.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from clip_train.embedding.folder import EmbeddingFolder
from clip_train.embedding.options import IMAGE
from clip_train.embedding.part_files import embedding_path, metadata_path
from clip_train.search.index import IndexOptions, build_index, import_faiss, index_path
from clip_train.search.search import Searcher, SearchOptions

WIDTH, LATENT, CENTRES, PART = 512, 64, 20_000, 100_000
K = 10


class Synthetic:
    """Unit vectors around many centres in 64 of 512 dimensions, with a little noise in all."""

    def __init__(self, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.centres = generator.normal(size=(CENTRES, LATENT)).astype(np.float32)
        self.spread = generator.normal(size=(LATENT, WIDTH)).astype(np.float32) / np.sqrt(WIDTH)

    def draw(self, count: int, seed: int) -> np.ndarray:
        generator = np.random.default_rng(seed)
        latent = self.centres[generator.integers(CENTRES, size=count)]
        latent = latent + 0.6 * generator.standard_normal((count, LATENT), dtype=np.float32)
        vectors = latent @ self.spread + 0.02 * generator.standard_normal((count, WIDTH), dtype=np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_folder(folder: Path, count: int, synthetic: Synthetic) -> EmbeddingFolder:
    """As clip-embed writes it, without pictures; not again if it is there."""
    for number, start in enumerate(range(0, count, PART)):
        path, metadata = embedding_path(folder, IMAGE, number), metadata_path(folder, number)
        if metadata.exists():
            continue
        for parent in (path.parent, metadata.parent):
            parent.mkdir(parents=True, exist_ok=True)
        rows = min(PART, count - start)
        np.save(path, synthetic.draw(rows, 1000 + number).astype(np.float16))
        numbers = np.arange(start, start + rows)
        columns = {"key": pa.array(numbers.astype(str)), "caption": pa.array([f"sample {n}" for n in numbers])}
        parquet.write_table(pa.table(columns), metadata)
    return EmbeddingFolder.open(folder)


def exact(folder: EmbeddingFolder, queries: np.ndarray) -> np.ndarray:
    """The numbers of each query's nearest, by comparing with all."""
    best, numbers, first = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64), 0
    for block in folder.blocks(IMAGE):
        scores = queries @ block.T
        chosen = np.argpartition(-scores, K, axis=1)[:, :K]
        best = np.concatenate([best, np.take_along_axis(scores, chosen, axis=1)], axis=1)
        numbers, first = np.concatenate([numbers, first + chosen], axis=1), first + len(block)
    return np.take_along_axis(numbers, np.argsort(-best, axis=1)[:, :K], axis=1)


def measure(folder: EmbeddingFolder, kind: str, queries: np.ndarray, truth: np.ndarray) -> str:
    """Build an index and ask it; a row of the table."""
    begin, busy = time.monotonic(), time.process_time()
    build_index(folder, IMAGE, IndexOptions(kind=kind, seed=0))
    built, busy = time.monotonic() - begin, time.process_time() - busy
    searcher, options = Searcher(folder, IMAGE), SearchOptions(num_results=K)
    for query in queries[:10]:  # what is mapped comes into memory
        searcher.search(query, options)
    seconds, processor, found = [], [], []
    for query, right in zip(queries, truth):
        begin, used = time.monotonic(), time.process_time()
        hits = searcher.search(query, options)
        seconds.append(time.monotonic() - begin)
        processor.append(time.process_time() - used)
        found.append(len({hit.number for hit in hits} & set(right.tolist())) / K)
    size = index_path(folder.path, IMAGE).stat().st_size / 1e6
    median, high = (1000 * np.quantile(seconds, q) for q in (0.5, 0.95))
    work = 1000 * np.median(processor)
    about = f"| {len(folder):,} | {kind} | {built:.0f} s ({busy:.0f} s) | {size:,.0f} MB"
    return f"{about} | {median:.1f} ms | {high:.1f} ms | {work:.1f} ms | {np.mean(found):.3f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--kinds", default="ivf_pq")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    import_faiss().omp_set_num_threads(len(os.sched_getaffinity(0)))
    synthetic = Synthetic()
    folder = write_folder(arguments.folder, arguments.count, synthetic)
    queries = synthetic.draw(arguments.queries, seed=1)
    truth = exact(folder, queries)
    print(
        "| embeddings | kind | to build (processor time) | size | a query, median | 95 % | processor time | recall@10 |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for kind in arguments.kinds.split(","):
        print(measure(folder, kind, queries, truth), flush=True)


if __name__ == "__main__":
    main()
