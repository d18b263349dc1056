"""Slides as bags: distances, search in two steps, search within a site."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from histo_utils import published, search
from histo_utils.protocols import slide_search, vertical_search
from histo_utils.search import bag_distances, minmax_barcode


def distance_by_loops(a, b, metric, reduce):
    """What the authors' scripts do, patch by patch."""
    minima = []
    for p in a:
        if metric == "hamming":
            each = [sum(x != y for x, y in zip(p, q, strict=True)) for q in b]
        elif metric == "euclidean":
            each = [np.sqrt(((p - q) ** 2).sum()) for q in b]
        else:
            each = [1 - p @ q / np.sqrt((p @ p) * (q @ q)) for q in b]
        minima.append(min(each))
    return np.median(minima) if reduce == "median" else sum(minima) / len(minima)


def bags_of(sizes, d, metric, seed=0):
    rng = np.random.default_rng(seed)
    if metric == "hamming":
        return [rng.integers(0, 2, (n, d), dtype=np.uint8) for n in sizes]
    return [rng.normal(size=(n, d)) for n in sizes]


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    d=st.sampled_from([1, 7, 64, 65, 130, 300]),
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    metric=st.sampled_from(["hamming", "euclidean", "cosine"]),
    reduce=st.sampled_from(["median", "mean"]),
    together=st.sampled_from([1, 4, 2**16]),
)
def test_bag_distances_equal_loops(seed, d, sizes, metric, reduce, together):
    bags = bags_of(sizes, d, metric, seed)
    expected = [[distance_by_loops(a, b, metric, reduce) for b in bags] for a in bags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_PATCHES", together)
        among = bag_distances(bags, metric=metric, reduce=reduce)
        between = bag_distances(bags[:2], bags[1:], metric, reduce)
    np.testing.assert_allclose(among, expected, atol=2e-12)
    np.testing.assert_allclose(between, among[:2, 1:], atol=2e-12)
    if metric == "hamming":  # whole numbers: nothing to round
        np.testing.assert_array_equal(between, among[:2, 1:])


def test_every_bit_counts_at_the_papers_width():
    # 1,023 differing bits do not fit in a byte, nor in 15 words without the last.
    ones, zeros = np.ones((2, 1023), np.uint8), np.zeros((3, 1023), np.uint8)
    assert bag_distances([ones], [zeros, ones]).tolist() == [[1023.0, 0.0]]


def test_median_forgets_what_the_mean_remembers():
    # Two of three patches have a twin in b; the third is 4 bits from its nearest.
    a = np.uint8([[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    b = np.uint8([[0, 0, 0, 0]])
    assert bag_distances([a], [b])[0, 0] == 0
    assert bag_distances([a], [b], reduce="mean")[0, 0] == pytest.approx(4 / 3)
    assert bag_distances([b], [a], reduce="mean")[0, 0] == 0


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_twins_are_equally_far_from_every_slide(metric):
    # Copies between bags of other sizes: where they stand must not change a digit.
    bags = bags_of([5, 1, 16, 7, 3], 300, metric, seed=5)
    bags = [*bags, bags[0], bags[2], bags[4]]
    for found in (
        bag_distances(bags, metric=metric),
        bag_distances(bags, bags, metric),
    ):
        for i, twin in ((0, 5), (2, 6), (4, 7)):
            np.testing.assert_array_equal(found[:, i], found[:, twin])
            assert found[i, twin] == 0


def test_bag_distances_bad_input():
    bits, floats = np.zeros((2, 8), np.uint8), np.ones((2, 8))
    with pytest.raises(ValueError, match="reduce='max'; valid are median, mean"):
        bag_distances([bits], reduce="max")
    with pytest.raises(ValueError, match="give one kind"):
        bag_distances([bits], [floats])
    for other in (bits[:, :4], bits[:0]):
        with pytest.raises(ValueError, match="leave slides without patches out"):
            bag_distances([bits], [other])
    with pytest.raises(ValueError, match="slide 1 holds whole numbers other than"):
        bag_distances([bits, bits + 2])
    with pytest.raises(ValueError, match="metric='cosine' for bits"):
        bag_distances([bits], metric="cosine")
    with pytest.raises(ValueError, match="slide 0 holds NaN"):
        bag_distances([floats * np.nan])
    with pytest.raises(ValueError, match="zero vector, which has no cosine"):
        bag_distances([floats], [floats * [[1], [0]]], "cosine")


# --- search


def archive(patients=8, slides_each=2, patches=5, d=40, seed=0):
    """Slides of four labels in two organs, some patients with two."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), slides_each)
    label = np.array(["kich", "kirc", "luad", "lusc"])[patient % 4]
    centre = 0.6 * rng.normal(size=(4, d))[patient % 4]
    centre = centre + rng.normal(size=(patients, d))[patient]
    bags = [c + rng.normal(size=(patches, d)) for c in centre]
    table = pd.DataFrame(
        {
            "slide": [f"s{i}" for i in range(len(patient))],
            "patient": [f"p{p}" for p in patient],
            "label": label,
            "organ": np.where(patient % 4 < 2, "kidney", "lung"),
        }
    )
    return bags, table


def test_rerank_orders_the_shortlist_by_the_features():
    bags, table = archive()
    listed = slide_search([minmax_barcode(bag) for bag in bags], table, 5)
    found = slide_search(bags, table, 5, shortlist=listed)
    full = bag_distances(bags)
    moved = 0
    for row, short in zip(found.itertuples(), listed["neighbours"], strict=True):
        best = sorted(short, key=lambda j, i=row.query: (full[i, j], j))
        assert row.neighbours.tolist() == best
        np.testing.assert_allclose(row.distances, full[row.query, best], atol=1e-12)
        moved += best != short.tolist()
    assert moved, "the barcodes ranked all as the features do: nothing was tested"


def test_shortlist_bad_input():
    bags, table = archive()
    two = slide_search(bags, table, 2)
    with pytest.raises(ValueError, match="k=3 of a shortlist of 2"):
        slide_search(bags, table, 3, shortlist=two)
    with pytest.raises(ValueError, match="15 queries for 16 slides"):
        slide_search(bags, table, 2, shortlist=two[1:])
    with_siblings = slide_search(bags, table, 5, "slide")
    with pytest.raises(ValueError, match="slides that exclude='patient' forbids"):
        slide_search(bags, table, 2, shortlist=with_siblings)


@pytest.mark.parametrize("reduce", ["median", "mean"])
def test_vertical_search_stays_within_the_organ(reduce):
    bags, table = archive()
    # not sorted by organ, so that ids have to be mapped back
    order = np.random.default_rng(0).permutation(len(bags))
    bags, table = [bags[i] for i in order], table.iloc[order].reset_index(drop=True)
    out = vertical_search(bags, table, "organ", 3, reduce=reduce)
    assert out["query"].tolist() == list(range(16))
    distances = bag_distances(bags, reduce=reduce)
    for row in out.itertuples():
        me = table.iloc[row.query]
        assert (row.slide, row.label) == (me["slide"], me["label"])
        allowed = (table["organ"] == me["organ"]) & (table["patient"] != me["patient"])
        best = sorted(
            np.flatnonzero(allowed), key=lambda j, i=row.query: (distances[i, j], j)
        )
        assert row.neighbours.tolist() == best[:3]
        assert row.neighbour_labels.tolist() == table["label"][best[:3]].tolist()
        assert row.relevant == (allowed & (table["label"] == me["label"])).sum() == 2


def test_vertical_search_names_the_organ_where_it_fails():
    bags, table = archive(patients=4)
    with pytest.raises(ValueError, match="within organ 'kidney': class 'kich'"):
        vertical_search(bags, table, "organ", 1)
    with pytest.raises(ValueError, match="the table has no column 'site'"):
        vertical_search(bags, table, "site", 1)


# --- what KimiaNet published


def test_kimianet_table_is_the_published_one(golden):
    text = (golden / "kimianet_published_vertical_f1.json").read_text()
    rows = {t: r for site in published.KIMIANET_F1.values() for t, r in site.items()}
    columns = published.KIMIANET_COLUMNS
    rows = {t: dict(zip(columns, r, strict=True)) for t, r in rows.items()}
    assert rows == json.loads(text)
    assert sum(len(site) for site in published.KIMIANET_F1.values()) == 26
    table = pd.DataFrame(rows).T
    assert table["n"].sum() == 605
    macro = table.drop(columns="n").mean().round(1).tolist()
    assert macro == [63.8, 74.2, 69.4, 80.2, 81.3]
    weighted = np.average(table.drop(columns="n"), axis=0, weights=table["n"])
    assert weighted.round(1).tolist() == [74.9, 82.9, 81.1, 86.1, 87.0]
