"""Time and memory of search and scores with intervals beside known libraries.

Run by hand: ``python benchmarks/bench_metrics.py`` (two minutes on two cores).
Wanted (issue 3): 100,000 × 512 vectors, 1,000 queries, k = 10: at most 1 s beyond the
search itself, less than 1 GB above the vectors.
"""

import resource
import time

import faiss
import numpy as np
import pandas as pd
import psutil
import torch
from sklearn.neighbors import NearestNeighbors

from histo_utils import metrics, protocols, statistics
from histo_utils.embeddings import Embeddings
from histo_utils.search import Archive

N, D, QUERIES, K, PATIENTS, CLASSES = 100_000, 512, 1_000, 10, 500, 24
METRICS = (metrics.accuracy, metrics.precision_at_k, metrics.majority_at_k,
           metrics.mean_average_precision)  # fmt: skip


def clustered(n, seed):
    """Sample unit vectors around centres, with labels and patients."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(N // 500, D)).astype(np.float32)
    which = rng.integers(0, len(centres), n)
    vectors = centres[which] + 2 * rng.standard_normal((n, D), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    patient = rng.integers(0, PATIENTS, n)
    label = np.where(rng.random(n) < 0.8, which % CLASSES, rng.integers(0, CLASSES, n))
    table = pd.DataFrame({"label": label, "patient": patient, "slide": patient})
    return Embeddings(vectors, table)


def scored(outcomes, other):
    """Score two systems by several metrics, compare them, and compute η."""
    both = pd.concat({"a": outcomes, "b": other}, names=["system"])
    both = both.reset_index("system").assign(protocol="search")
    for metric in METRICS:
        statistics.score_table(both, metric)
        statistics.compare_table(both, metric, reference="b")
    return metrics.eta_scores(outcomes["label"], outcomes["predicted"], CLASSES)


def timed(function, *arguments, repeats=1, **options):
    """Return the answer and the shortest time in seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        answer = function(*arguments, **options)
        seconds.append(time.perf_counter() - start)
    return answer, min(seconds)


def main():
    """Measure, and print what was measured."""
    gallery, queries = clustered(N, 1), clustered(QUERIES, 2)
    before = psutil.Process().memory_info().rss
    archive, build = timed(Archive, gallery)
    _, search = timed(archive.search, queries, K, "patient", repeats=3)
    outcomes, protocol = timed(
        protocols.train_gallery, queries, gallery, K, "patient",
        allow_shared_patients=True,
    )  # fmt: skip
    shifted = list(np.roll(np.stack(outcomes["neighbour_labels"]), 1, axis=0))
    etas, scores = timed(scored, outcomes, outcomes.assign(neighbour_labels=shifted))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    own = max(0, protocol - build - search) + scores
    print("η {:.4f} {:.4f} {:.4f}".format(*etas))
    print(f"peak {peak / 1e9:.2f} GB above the vectors (wanted: 1 GB)")
    print(f"outcomes and scores with intervals: {own:.2f} s (wanted: 1 s)")

    brute = NearestNeighbors(algorithm="brute", metric="cosine").fit(gallery.vectors)
    flat = faiss.IndexFlatIP(D)
    flat.add(gallery.vectors)
    rows = {"ours, patient excluded, exact ties": search}
    _, rows["scikit-learn brute"] = timed(brute.kneighbors, queries.vectors, K)
    _, rows["faiss flat, nothing excluded"] = timed(flat.search, queries.vectors, K)
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    library = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"), k=K,
        device=torch.device("cpu"),
    )  # fmt: skip
    parts = [
        torch.from_numpy(x)
        for e in (queries, gallery)
        for x in (e.vectors, e.table["label"].to_numpy())
    ]
    _, rows["AccuracyCalculator, 2 metrics"] = timed(library.get_accuracy, *parts)
    for name, seconds in rows.items():
        print(f"{name:36} {1e3 * seconds / QUERIES:8.3f} ms per query, "
              f"{seconds / search:6.2f} times ours")  # fmt: skip


if __name__ == "__main__":
    main()
