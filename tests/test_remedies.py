"""Centring by the gallery's means."""

import numpy as np
import pytest

from histo_utils import confounders


def test_centring_equals_a_loop(bench_archive):
    table = bench_archive.table
    gallery = (table["fold"] != 1).to_numpy()
    found = confounders.centred(bench_archive, gallery, "site").vectors
    for row in (0, 40, 127):
        same = gallery & (table["site"] == table["site"][row]).to_numpy()
        mean = bench_archive.vectors[same].astype(float).mean(axis=0)
        assert found[row] == pytest.approx(bench_archive.vectors[row] - mean, abs=1e-6)


def test_each_group_of_the_gallery_has_mean_zero_and_order_inside_is_kept(
    bench_archive,
):
    gallery = (bench_archive.table["fold"] != 0).to_numpy()
    site = bench_archive.table["site"].to_numpy()
    found = confounders.centred(bench_archive, gallery, "site").vectors
    for value in "AB":
        inside = gallery & (site == value)
        assert found[inside].mean(axis=0) == pytest.approx(np.zeros(5), abs=1e-6)
        apart = bench_archive.vectors[inside][1:] - bench_archive.vectors[inside][0]
        moved = found[inside][1:] - found[inside][0]
        assert moved == pytest.approx(apart, abs=1e-5)


def test_queries_do_not_move_the_means(bench_archive):
    gallery = (bench_archive.table["fold"] != 0).to_numpy()
    before = confounders.centred(bench_archive, gallery, "site").vectors
    vectors = bench_archive.vectors.copy()
    vectors[~gallery] += 5
    changed = type(bench_archive)(vectors, bench_archive.table)
    after = confounders.centred(changed, gallery, "site").vectors
    assert np.array_equal(before[gallery], after[gallery])
    assert after[~gallery] == pytest.approx(before[~gallery] + 5, abs=1e-5)


def test_one_mean_for_all(bench_archive):
    everyone = np.ones(len(bench_archive), bool)
    found = confounders.centred(bench_archive, everyone).vectors
    expected = bench_archive.vectors - bench_archive.vectors.mean(axis=0)
    assert found == pytest.approx(expected, abs=1e-5)


def test_what_the_gallery_does_not_know_is_refused(bench_archive):
    gallery = (bench_archive.table["site"] == "A").to_numpy()
    with pytest.raises(ValueError, match="no gallery row has site 'B', but 64"):
        confounders.centred(bench_archive, gallery, "site")
    with pytest.raises(ValueError, match="no column 'stain'"):
        confounders.centred(bench_archive, gallery, "stain")
    with pytest.raises(ValueError, match="mask"):
        confounders.centred(bench_archive, np.zeros(128, bool))
