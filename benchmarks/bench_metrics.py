"""Time and memory of all metrics with intervals beside two known evaluators.

Run by hand: ``python benchmarks/bench_metrics.py`` (about a minute on two cores).
Wanted (issue 3): 100,000 × 512 vectors, 1,000 queries, k = 10: at most 1 s beyond the
search itself, less than 1 GB above the vectors.
"""

import os
import resource
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # cores are shared

import numpy as np
import pandas as pd
import psutil

from histo_utils import metrics, statistics
from histo_utils.embeddings import Embeddings
from histo_utils.protocols import train_gallery
from histo_utils.search import Archive

N, D, QUERIES, K, PATIENTS, CLASSES = 100_000, 512, 1_000, 10, 500, 24


def clustered(n, seed):
    """Draw unit vectors around centres, with the table of who is who."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(N // 500, D)).astype(np.float32)
    which = rng.integers(0, len(centres), n)
    vectors = rng.standard_normal((n, D), np.float32)
    vectors *= 2
    vectors += centres[which]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    patient = rng.integers(0, PATIENTS, n)
    label = np.where(rng.random(n) < 0.8, which % CLASSES, rng.integers(0, CLASSES, n))
    names = np.array([f"class {c:02d}" for c in range(CLASSES)])
    table = pd.DataFrame({"label": names[label], "patient": patient, "slide": patient})
    return Embeddings(vectors, table)


def everything(outcomes, other):
    """Compute all metrics of the module that outcomes allow, with intervals."""
    table = metrics.score_table(outcomes, ks=(1, 3, 5, 10))
    etas = metrics.eta_scores(outcomes["label"], outcomes["predicted"], CLASSES)
    right = outcomes["label"].to_numpy() == outcomes["predicted"].to_numpy()
    pairs = np.stack([pd.factorize(outcomes["label"], sort=True)[0], right], 1)
    eta_w = statistics.bootstrap_ci(
        pairs, outcomes["patient"], statistic=lambda rows: np.mean(
            np.bincount(rows[:, 0], rows[:, 1])[rows[:, 0]]
            / np.bincount(rows[:, 0])[rows[:, 0]]
        ),
    )  # fmt: skip
    a, b = (metrics.precision_at_k(o, K, per_query=True) for o in (outcomes, other))
    compared = statistics.paired_sign_flip(a, b, outcomes["patient"])
    statistics.holm([compared.p] * 5)
    statistics.detectable_difference(a - b, outcomes["patient"])
    return table, etas, eta_w


def timed(function, *arguments, repeats=1):
    """Return the answer and the shortest time in seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        answer = function(*arguments)
        seconds.append(time.perf_counter() - start)
    return answer, min(seconds)


class Stopwatch:
    """Adds up the seconds spent inside the Archive, to subtract them."""

    def __init__(self):
        self.seconds = 0.0
        for name in ("__init__", "search"):
            setattr(Archive, name, self._watched(getattr(Archive, name)))

    def _watched(self, method):
        def watched(*arguments, **options):
            start = time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - start

        return watched


def main():
    """Measure, and print what was measured."""
    gallery, queries = clustered(N, 1), clustered(QUERIES, 2)
    Archive(gallery.take([0])).search(queries.take([0]), 1)  # imports before measuring
    before = psutil.Process().memory_info().rss
    archive, build = timed(Archive, gallery)
    _, search = timed(archive.search, queries, K, "patient", repeats=3)
    del archive
    inside = Stopwatch()
    outcomes, protocol = timed(
        lambda: train_gallery(
            queries, gallery, K, "patient", allow_shared_patients=True
        )
    )
    own_part = protocol - inside.seconds
    other = outcomes.assign(
        neighbour_labels=list(np.roll(np.stack(outcomes["neighbour_labels"]), 1, 0))
    )
    (table, etas, _), seconds = timed(everything, outcomes, other, repeats=3)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    beyond = own_part + seconds
    print(table.to_string(index=False, float_format="{:.3f}".format))
    print(f"eta {etas[0]:.4f} {etas[1]:.4f} {etas[2]:.4f}")
    print(f"index {build:.2f} s, search {1000 * search / QUERIES:.3f} ms per query")
    print(f"metrics with intervals {seconds:.2f} s; with the protocol's own part "
          f"{beyond:.2f} s beyond index and search (wanted: 1 s)")  # fmt: skip
    above = (peak - before) / 1e9
    print(f"peak {above:.2f} GB above the vectors ({gallery.vectors.nbytes / 1e9:.2f} "
          "GB) (wanted: 1 GB)")  # fmt: skip

    many = pd.concat([outcomes] * 100, ignore_index=True)
    _, scored = timed(metrics.score_table, many)
    print(f"score_table on {len(many):,} outcomes x {K}: {scored:.2f} s")

    from sklearn.neighbors import NearestNeighbors

    nearest = NearestNeighbors(algorithm="brute", metric="cosine").fit(gallery.vectors)
    _, theirs = timed(nearest.kneighbors, queries.vectors, K, repeats=2)
    print(f"scikit-learn brute search: {1000 * theirs / QUERIES:.3f} ms per query, "
          f"{theirs / search:.1f} times ours")  # fmt: skip
    try:
        import torch
        from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    except ImportError:
        sys.exit("no pytorch-metric-learning: pip install 'histo_utils[networks]'")
    names = ["precision_at_1", "mean_average_precision", "mean_reciprocal_rank"]
    names += ["r_precision", "mean_average_precision_at_r"]
    judge = AccuracyCalculator(include=names, k=K, device=torch.device("cpu"))
    code = {name: i for i, name in enumerate(sorted(set(gallery.table["label"])))}
    q, g = (
        torch.tensor(e.table["label"].map(code).to_numpy()) for e in (queries, gallery)
    )
    vectors = [torch.from_numpy(e.vectors) for e in (queries, gallery)]
    _, theirs = timed(lambda: judge.get_accuracy(vectors[0], q, vectors[1], g))
    ours = build + search + beyond
    print(f"AccuracyCalculator (5 metrics, no intervals, no exclusion): {theirs:.2f} s;"
          f" ours, all of it: {ours:.2f} s, ratio {theirs / ours:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
