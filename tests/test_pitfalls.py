"""Pitfalls, against loops and cases worked by hand."""

import numpy as np
import pandas as pd
import pytest

from histo_utils import confounders, metrics, patches, protocols
from histo_utils.embeddings import Embeddings


def test_by_chance_equals_loops(bench_archive):
    table = bench_archive.table
    found = confounders.by_chance(table, "label", within="site")
    for row in (0, 40, 127):
        mine = table.iloc[row]
        others = table[(table["patient"] != mine["patient"])]
        others = others[others["site"] == mine["site"]]
        assert found[row] == pytest.approx((others["label"] == mine["label"]).mean())
    alone = confounders.by_chance(table, "label", within="patient")
    assert np.isnan(alone).all()


def test_within_and_across_by_loops(bench_archive):
    table = bench_archive.table
    found = confounders.within_and_across(bench_archive, "site", metric="euclidean")
    assert len(found) == 128
    for row in (3, 70, 127):
        mine = table.iloc[row]
        far = ((bench_archive.vectors - bench_archive.vectors[row]) ** 2).sum(1)
        for side in ("within", "across"):
            same = (table["site"] == mine["site"]).to_numpy()
            may = (table["patient"] != mine["patient"]).to_numpy()
            may = may & (same == (side == "within"))
            near = table.iloc[np.where(may, far, np.inf).argmin()]
            assert found[side][row] == (near["label"] == mine["label"])
            chance = (table[may]["label"] == mine["label"]).mean()
            assert found[f"chance_{side}"][row] == pytest.approx(chance)


def test_nested_labels_are_refused(bench_archive):
    nested = bench_archive.table.assign(site=bench_archive.table["label"].to_numpy())
    with pytest.raises(ValueError, match="nested"):
        confounders.within_and_across(Embeddings(bench_archive.vectors, nested), "site")


def test_touching_is_symmetric_and_counts_the_pairs(bench_archive):
    found = confounders.touching(bench_archive.table)
    assert (found == found.T).all() and not found.diagonal().any()
    assert found.sum() == 2 * len(patches.touching_pairs(bench_archive.table))


def test_position_1_counts_later_copies_as_right(bench_archive):
    copies = confounders.plant_copies(bench_archive, 0.1)
    changed = (copies.vectors != bench_archive.vectors).any(1)
    assert changed.sum() in (0, 13), "labels alternate: partners may all agree"
    table = pd.DataFrame({"label": ["a", "c", "b", "c"]})
    rows = Embeddings(np.float32([[0, 0], [5, 5], [0, 0], [5, 6]]), table)
    # row 0 finds its copy, row 2 finds itself behind its copy
    assert confounders.by_position(rows).tolist() == [False, True, True, True]


def test_copies_are_planted_where_labels_differ(bench_archive):
    table = bench_archive.table.assign(label=np.repeat(["a", "b"], 64))
    mixed = Embeddings(bench_archive.vectors, table)
    copies = confounders.plant_copies(mixed, 0.1, seed=1)
    later = np.flatnonzero((copies.vectors != mixed.vectors).any(1))
    assert len(later) == 13 and (later >= 64).all()
    np.testing.assert_array_equal(copies.vectors[later], mixed.vectors[later - 64])
    masked = protocols.leave_one_out(copies, 1, metric="euclidean")
    right = metrics.accuracy(masked, per_query=True)
    assert not right[later].any() and confounders.by_position(copies)[later].all()


def test_barcode_ties_by_loops(bench_archive):
    found = confounders.barcode_ties(bench_archive)
    bits = (np.diff(bench_archive.vectors) < 0).astype(int)
    table = bench_archive.table
    for row in (0, 50, 127):
        others = np.flatnonzero(table["patient"] != table["patient"][row])
        far = abs(bits[others] - bits[row]).sum(1)
        near = others[far == far.min()]
        right = (table["label"][near] == table["label"][row]).to_numpy()
        assert found["tied"][row] == (len(near) > 1)
        assert found["expected"][row] == pytest.approx(right.mean())
        assert found["lower_row"][row] == right[0]
        assert (found["worst"][row], found["best"][row]) == (right.all(), right.any())


def test_false_alarms_are_at_the_level_over_patients_only():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(30), 16)
    differences = rng.normal(0, 1, 30)[groups] + rng.normal(0, 0.3, 480)
    found = confounders.false_alarms(differences, groups, n=1000)
    assert 0.02 < found["patients"] < 0.08 and found["patches"] > 0.4


def test_nesting(bench_archive):
    found = confounders.nesting(bench_archive.table, "site")
    assert found["values"] == 2 and found["values_with_one_label"] == 0
    assert found["same_value_other_label"] == 8  # 2 × 2 in each of two sites
    pairs = sum(
        n for name, n in found.items() if "value_" in name and "one" not in name
    )
    assert pairs == 8 * 7 // 2


def test_agrees_with_the_label_of_the_nearest(bench_archive):
    out = protocols.leave_one_patient_out(bench_archive, 1)
    found = confounders.agrees(out, bench_archive.table["label"])
    np.testing.assert_array_equal(found, metrics.accuracy(out, per_query=True))
