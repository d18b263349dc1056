"""Time of slide search by median of minimum distances, beside loops over patches.

Run by hand on a quiet machine: ``python benchmarks/bench_slide_search.py`` (10 s).
Wanted (issue 6): at most 20 µs per slide pair in a batch, at 30 barcodes of 1,023 bits
per slide. The authors' scripts loop over bit arrays of the package bitarray; Python's
whole numbers stand in for it, which count differing bits in one call too.
"""

import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd

from histo_utils.protocols import slide_search
from histo_utils.search import bag_distances, minmax_barcode

SLIDES, PATCHES, D = 120, 30, 1024
WANTED = 20  # µs per slide pair


def archive(seed=0):
    """Sample features of slides, 18 to 42 patches each, around a centre per slide."""
    rng = np.random.default_rng(seed)
    sizes = np.resize([PATCHES - 12, PATCHES, PATCHES + 12], SLIDES)
    centres = rng.standard_normal((SLIDES, D), np.float32)
    return [
        c + rng.standard_normal((n, D), np.float32)
        for c, n in zip(centres, sizes, strict=True)
    ]


def by_loops(bags):
    """Leave-one-out distances as the authors' scripts compute them."""
    numbers = [[int("".join(map(str, row)), 2) for row in bag] for bag in bags]
    found = np.zeros((len(bags), len(bags)))
    for i, a in enumerate(numbers):
        for j, b in enumerate(numbers):
            if i != j:
                nearest = [min((p ^ q).bit_count() for q in b) for p in a]
                found[i, j] = statistics.median(nearest)
    return found


def by_matrix_product(bags):
    """Hamming distances from a product of ±1, then the same minima and medians."""
    signs = np.concatenate(bags).astype(np.float32) * 2 - 1
    starts = np.cumsum([0] + [len(bag) for bag in bags])
    pairs = (signs.shape[1] - signs @ signs.T) / 2
    minima = np.minimum.reduceat(pairs, starts[:-1], axis=1)
    return np.stack(
        [np.median(part, axis=0) for part in np.split(minima, starts[1:-1])]
    )


def timed(function, *arguments, repeats=5, **options):
    """Return the answer and the shortest time in seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        answer = function(*arguments, **options)
        seconds.append(time.perf_counter() - start)
    return answer, min(seconds)


def main():
    """Measure, and print what was measured."""
    features = archive()
    bags = [minmax_barcode(bag) for bag in features]
    pairs = SLIDES * (SLIDES - 1)
    off = ~np.eye(SLIDES, dtype=bool)
    loops, slow = timed(by_loops, bags, repeats=1)
    rows = {"loops over whole numbers": slow}
    for name, function in (("±1 matrix product", by_matrix_product),
                           ("ours", bag_distances)):  # fmt: skip
        found, rows[name] = timed(function, bags)
        assert (found[off] == loops[off]).all(), f"{name} disagrees with the loops"
    patient = np.arange(SLIDES)
    table = pd.DataFrame({"slide": patient, "patient": patient, "label": patient % 5})
    listed, rows["ours, slide_search, shortlist of 20"] = timed(
        slide_search, bags, table, 20
    )
    _, again = timed(slide_search, features, table, 3, metric="cosine",
                     shortlist=listed, repeats=2)  # fmt: skip
    rows["… and exact re-rank"] = rows["ours, slide_search, shortlist of 20"] + again
    _, rows["features, median of minimum cosines"] = timed(
        slide_search, features, table, 3, metric="cosine", repeats=2
    )
    print(f"{SLIDES} slides, {sum(map(len, bags)):,} barcodes of {D - 1:,} bits, "
          f"{pairs:,} slide pairs; one thread; distances identical")  # fmt: skip
    for name, seconds in rows.items():
        micro = 1e6 * seconds / pairs
        times = slow / seconds
        print(f"{name:36} {seconds:7.3f} s {micro:8.1f} µs per pair {times:7.1f}×")
    ours = 1e6 * rows["ours"] / pairs
    print(f"wanted: {WANTED} µs per pair; {'met' if ours <= WANTED else 'NOT met'}")


if __name__ == "__main__":
    main()
