import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from histo_utils import patches
from histo_utils import search as module
from histo_utils.embeddings import Embeddings
from histo_utils.search import (
    Archive,
    bag_distances,
    count_relevant,
    exclusion_mask,
    median_of_min,
    minmax_barcode,
)


def archive_of(n=60, d=8, patients=6, seed=0, coarse=False):
    """Random embeddings; coarse ones hold many exact duplicates and ties."""
    rng = np.random.default_rng(seed)
    vectors = rng.integers(1, 3, (n, d)) if coarse else rng.normal(size=(n, d))
    patient, part = rng.integers(0, patients, n), rng.integers(0, 2, n)
    table = pd.DataFrame(
        {
            "image": [f"i{p}" for p in patient],
            "x": np.arange(n),
            "y": 0,
            "size": 1,
            "label": rng.integers(0, 3, n),
            "patient": [f"p{p}" for p in patient],
            "slide": [f"p{p}-{s}" for p, s in zip(patient, part, strict=True)],
        }
    )
    return Embeddings(vectors.astype(np.float32), table)


def by_loops(queries, gallery, k, metric, allowed):
    """Distances pair by pair, sorted by (distance, row)."""
    ids, distances = [], []
    for q, query in enumerate(queries.vectors.astype(float)):
        found = []
        for g, item in enumerate(gallery.vectors.astype(float)):
            if not allowed(q, g):
                continue
            if metric == "euclidean":
                d = np.sqrt(((query - item) ** 2).sum())
            elif metric == "cosine":
                d = 1 - query @ item / np.sqrt((query @ query) * (item @ item))
            else:
                d = ((np.diff(query) < 0) != (np.diff(item) < 0)).sum()
            found.append((round(d, 14), g))
        found = sorted(found)[:k]
        ids.append([g for _, g in found])
        distances.append([d for d, _ in found])
    return np.array(ids), np.array(distances)


def rule(queries, gallery, exclude):
    q, g = queries.table, gallery.table
    if exclude is None:
        return lambda i, j: True
    if exclude == "self":
        return lambda i, j: i != j
    if exclude == "touching":
        near = abs(q["x"].to_numpy()[:, None] - g["x"].to_numpy()) <= 1
        same = q["slide"].to_numpy()[:, None] == g["slide"].to_numpy()
        return lambda i, j: not (near & same)[i, j]
    return lambda i, j: q[exclude][i] != g[exclude][j]


@pytest.mark.parametrize("exclude", [None, "self", "touching", "slide", "patient"])
@pytest.mark.parametrize("metric", ["cosine", "euclidean", "hamming"])
def test_search_equals_loops(exclude, metric):
    index = "barcode" if metric == "hamming" else "flat"
    for coarse in (False, True):
        gallery = archive_of(n=40, coarse=coarse)
        ids, distances = Archive(gallery, index, metric).search(gallery, 7, exclude)
        allowed = rule(gallery, gallery, exclude)
        expected, their = by_loops(gallery, gallery, 7, metric, allowed)
        np.testing.assert_array_equal(ids, expected)
        np.testing.assert_allclose(distances, their, atol=1e-11)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(30, 50),
    d=st.integers(2, 40),
    metric=st.sampled_from(["cosine", "euclidean", "hamming"]),
    exclude=st.sampled_from([None, "self", "slide", "patient"]),
    coarse=st.booleans(),
    shift=st.sampled_from([0, 1000]),
)
def test_search_equals_loops_on_random_cases(
    seed, n, d, metric, exclude, coarse, shift
):
    made = archive_of(n, d, 3, seed, coarse)
    gallery = Embeddings(made.vectors + np.float32(shift), made.table)
    left = n - made.table.groupby("patient").size().max()
    k = min(5, left)
    index = "barcode" if metric == "hamming" else "flat"
    ids, distances = Archive(gallery, index, metric).search(gallery, k, exclude)
    expected, their = by_loops(
        gallery, gallery, k, metric, rule(gallery, gallery, exclude)
    )
    np.testing.assert_allclose(distances, their, atol=1e-9)
    # Pairs whose distances differ by rounding alone may stand in either order.
    same = np.isclose(np.diff(their, prepend=-1), 0, atol=1e-9)
    same |= np.isclose(np.diff(their, append=np.inf), 0, atol=1e-9)
    same[:, -1] = True
    assert ((ids == expected) | same).all()
    if metric == "hamming":
        np.testing.assert_array_equal(ids, expected)


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "hamming"])
@pytest.mark.parametrize("k", [1, 3, 20, 60])
def test_more_ties_at_the_cut_than_candidates(metric, k):
    # 600 rows of 81 distinct vectors, the nearest of them last.
    vectors = np.random.default_rng(0).integers(1, 4, (600, 4))
    far = abs(vectors - vectors[:1]).sum(axis=1)
    vectors = vectors[np.argsort(-far, kind="stable")].astype(np.float32)
    gallery = Embeddings(vectors, pd.DataFrame({"label": range(600)}))
    queries = gallery.take([599, 0, 100, 300, 500])
    index = "barcode" if metric == "hamming" else "flat"
    ids, _ = Archive(gallery, index, metric).search(queries, k)
    expected, _ = by_loops(queries, gallery, k, metric, lambda i, j: True)
    np.testing.assert_array_equal(ids, expected)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_identical_vectors_tie_and_the_lower_row_wins(metric):
    rng = np.random.default_rng(0)
    unique = rng.normal(size=(7, 130)).astype(np.float32)
    copies = np.tile(unique, (40, 1))  # row i equals row i + 7, i + 14, …
    gallery = Embeddings(copies, pd.DataFrame({"label": range(len(copies))}))
    ids, distances = Archive(gallery, metric=metric).search(gallery, 12)
    for row in range(len(copies)):
        assert ids[row].tolist() == [row % 7 + 7 * i for i in range(12)]
    assert (distances == 0).all()
    constant = Embeddings(np.ones((300, 4)), pd.DataFrame({"label": [0] * 300}))
    ids, _ = Archive(constant, metric=metric).search(constant, 3, "self")
    assert ids[[0, 200]].tolist() == [[1, 2, 3], [0, 1, 2]]


@pytest.mark.parametrize("exclude", [None, "self", "touching", "slide", "patient"])
def test_blocks_of_queries_do_not_change_the_answer(monkeypatch, exclude):
    gallery = archive_of(coarse=True)
    table, label = gallery.table, gallery.table["label"].to_numpy()
    whole, mask = (
        Archive(gallery).search(gallery, 5, exclude),
        exclusion_mask(table, table, exclude),
    )
    allowed = rule(gallery, gallery, exclude)
    for q, g in np.ndindex(60, 60):
        assert mask[q, g] == (not allowed(q, g))
    monkeypatch.setattr(module, "_CELLS", 100)
    parts = Archive(gallery).search(gallery, 5, exclude)
    np.testing.assert_array_equal(whole.ids, parts.ids)
    np.testing.assert_array_equal(whole.distances, parts.distances)
    np.testing.assert_array_equal(exclusion_mask(table, table, exclude), mask)
    relevant = (~mask & (label[:, None] == label)).sum(axis=1)
    np.testing.assert_array_equal(count_relevant(table, table, exclude), relevant)


def test_permuting_the_archive_permutes_the_ids():
    gallery, queries = archive_of(200, 16), archive_of(20, 16, seed=1)
    order = np.random.default_rng(3).permutation(200)
    first = Archive(gallery).search(queries, 8, "patient")
    second = Archive(gallery.take(order)).search(queries, 8, "patient")
    np.testing.assert_array_equal(order[second.ids], first.ids)
    np.testing.assert_array_equal(second.distances, first.distances)


@pytest.mark.parametrize("exclude", ["slide", "patient"])
@pytest.mark.parametrize("index", ["flat", "barcode"])
def test_own_patient_or_slide_is_never_found(exclude, index):
    # Everything of one's own patient is nearer than anything else.
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(4), [2, 5, 150, 43])
    vectors = 50 * np.eye(4)[patient] + rng.normal(size=(200, 4))
    table = pd.DataFrame({"patient": patient, "slide": patient, "label": 0})
    gallery = Embeddings(vectors, table)
    ids, _ = Archive(gallery, index).search(gallery, 50, exclude)
    assert ids.shape == (200, 50)
    assert (patient[ids] != patient[:, None]).all()


def test_self_goes_by_patch_where_the_queries_are_a_part():
    gallery = archive_of()
    part = gallery.take([40, 3])
    ids, _ = Archive(gallery).search(part, 59, "self")
    assert 40 not in ids[0]
    assert 3 not in ids[1]
    assert len(set(ids[0])) == 59


def test_a_duplicate_is_found_and_the_query_is_not(golden):
    toy = np.load(golden / "retrieval_toy.npz")
    for vectors, nearest in (("X", "nn"), ("X_dup", "nn_dup")):
        table = pd.DataFrame({"label": toy["y"]})
        gallery = Embeddings(toy[vectors], table)
        ids, _ = Archive(gallery).search(gallery, 1, "self")
        np.testing.assert_array_equal(ids[:, 0], toy[nearest])


def test_patches_that_are_files_of_their_own_touch_nothing():
    """Kimia Path24's lie at (0, 0) each: their place on the slide is not known."""
    table = pd.DataFrame(
        {"image": ["a.png", "b.png", "b.png"], "slide": "s0", "patient": "s0",
         "label": "s0", "x": [0, 0, 50], "y": 0, "size": 100, "mpp": 0.5}
    )  # fmt: skip
    made = Embeddings(np.eye(3, dtype=np.float32), table)
    assert patches.touching_pairs(table).tolist() == [[1, 2]]
    ids, _ = Archive(made).search(made.take([0]), 2, "touching")
    assert sorted(ids[0].tolist()) == [1, 2]


def test_touching_counts_corners_not_gaps():
    x, y = np.meshgrid([0, 250, 500], [0, 250, 500])
    table = pd.DataFrame({"slide": "s", "x": x.ravel(), "y": y.ravel(), "size": 250})
    table = table.assign(mpp=0.5, slide_mpp=0.5, label=0)
    gallery = Embeddings(np.random.default_rng(0).normal(size=(9, 3)), table)
    ids, _ = Archive(gallery).search(gallery.take([0]), 5, "touching")
    assert sorted(ids[0]) == [2, 5, 6, 7, 8]
    wide = Embeddings(gallery.vectors, table.assign(slide_mpp=0.25))
    with pytest.raises(ValueError, match=r"larger than the 0 items .* query 0"):
        Archive(wide).search(wide.take([0]), 1, "touching")


def test_reranked_barcodes():
    gallery, queries = archive_of(400, 32), archive_of(30, 32, seed=1)
    flat = Archive(gallery).search(queries, 5, "patient")
    everything = Archive(gallery, "barcode", "cosine", rerank=400)
    again = everything.search(queries, 5, "patient")
    np.testing.assert_array_equal(again.ids, flat.ids)
    np.testing.assert_array_equal(again.distances, flat.distances)
    few = Archive(gallery, "barcode", rerank=20).search(queries, 5, "patient")
    codes = Archive(gallery, "barcode").search(queries, 20, "patient").ids
    for q in range(30):
        assert set(few.ids[q]) <= set(codes[q])
    assert (np.diff(few.distances) >= 0).all()
    with pytest.raises(ValueError, match="rerank=20 is smaller than k=21"):
        Archive(gallery, "barcode", rerank=20).search(queries, 21)


def test_bad_archives():
    gallery = archive_of()
    with pytest.raises(ValueError, match="unknown index 'hnsw'; valid are flat, bar"):
        Archive(gallery, "hnsw")
    with pytest.raises(ValueError, match="valid here: cosine, euclidean"):
        Archive(gallery, metric="hamming")
    with pytest.raises(ValueError, match="valid here: hamming"):
        Archive(gallery, "barcode", "cosine")
    with pytest.raises(ValueError, match="a flat index is exact already"):
        Archive(gallery, rerank=10)
    with pytest.raises(ValueError, match="gallery is empty"):
        Archive(gallery.take([]))
    zero = Embeddings(np.eye(3) * [[1], [1], [0]], pd.DataFrame(index=range(3)))
    with pytest.raises(ValueError, match="gallery row 2 is all zeros"):
        Archive(zero)
    assert Archive(zero, metric="euclidean").search(zero, 1).ids[2, 0] == 2
    huge = Embeddings(np.array([[1e20, 0.0]]), pd.DataFrame(index=range(1)))
    with pytest.raises(ValueError, match="overflow float32"):
        Archive(huge)


def test_bad_searches():
    gallery = archive_of()
    archive = Archive(gallery)
    one = archive_of(n=30, patients=1)
    with pytest.raises(ValueError, match=r"unknown exclude='scan'; valid are None, se"):
        archive.search(gallery, 1, "scan")
    with pytest.raises(
        ValueError, match=r"larger than the 59 items .* query 0 .*lower"
    ):
        archive.search(gallery, 60, "self")
    with pytest.raises(ValueError, match=r"leaving out its patient 'p\d'; lower k"):
        archive.search(gallery, 58, "patient")
    with pytest.raises(ValueError, match="patient 'p0' is the whole gallery, so noth"):
        Archive(one).search(one, 1, "patient")
    with pytest.raises(ValueError, match="queries have 4 dimensions, the archive 8"):
        archive.search(archive_of(d=4), 1)
    with pytest.raises(ValueError, match="k=0; expected a whole number of 1 or more"):
        archive.search(gallery, 0)
    with pytest.raises(ValueError, match=r"k=2\.0"):
        archive.search(gallery, 2.0)
    with pytest.raises(ValueError, match="not an array"):
        archive.search(gallery.vectors, 1, "self")
    with pytest.raises(ValueError, match="row 0 of the vectors holds NaN"):
        archive.search(np.full((1, 8), np.nan), 1)


def test_exclusion_never_fails_silently():
    gallery = archive_of()
    archive = Archive(gallery)
    bare = Embeddings(gallery.vectors, gallery.table.drop(columns="patient"))
    with pytest.raises(ValueError, match="queries' table has no column 'patient'"):
        archive.search(bare, 1, "patient")
    gap = gallery.table.assign(
        patient=gallery.table["patient"].where(lambda p: p != "p1")
    )
    with pytest.raises(ValueError, match=r"row \d+ of the queries' table has no pati"):
        archive.search(Embeddings(gallery.vectors, gap), 1, "patient")
    numbers = gallery.table.assign(patient=gallery.table["patient"].str[1:].astype(int))
    with pytest.raises(ValueError, match="integer in one table and string in the oth"):
        archive.search(Embeddings(gallery.vectors, numbers), 1, "patient")


def test_barcode_bits(golden):
    toy = np.load(golden / "yottixel_barcode_toy.npz")
    bits = minmax_barcode(toy["features_a"])
    assert bits.dtype == np.uint8
    np.testing.assert_array_equal(bits, toy["barcode_a"])
    np.testing.assert_array_equal(minmax_barcode(toy["features_b"]), toy["barcode_b"])
    with pytest.raises(ValueError, match=r"expected \(n, d\)"):
        minmax_barcode(np.ones(4))
    with pytest.raises(ValueError, match="row 1 of the features holds NaN"):
        minmax_barcode([[1.0, 2.0], [np.nan, 1.0]])


def test_median_of_min_golden(golden):
    toy = np.load(golden / "yottixel_barcode_toy.npz")
    bob = json.loads((golden / "yottixel.json").read_text())["bob"]
    a, b = toy["barcode_a"], toy["barcode_b"]
    assert median_of_min(a, b) == bob["d12"]
    assert median_of_min(b, a) == bob["d21"]
    assert median_of_min(a, a) == bob["d11"]
    loo = np.load(golden / "yottixel_loo_toy.npz")
    matrix = bag_distances([loo[f"bob{i:02d}"] for i in range(18)])
    off = ~np.eye(18, dtype=bool)
    np.testing.assert_array_equal(matrix[off], loo["distance_matrix"][off])
