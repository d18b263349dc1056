"""Trials: splits that do not leak, seeds put together as by hand."""

import numpy as np
import pandas as pd
import pytest

from histo_utils import bench, metrics, protocols, trials


def test_the_scan_split_is_that_of_the_bench(bench_archive):
    (split,) = trials.splits(bench_archive.table, "scan")
    where = bench.quarters(bench_archive.table)
    assert (split.train == (where == "upper")).all()
    assert (split.gallery == split.train).all()
    assert (split.choose == (where == "lower left")).all()
    assert (split.test == (where == "lower right")).all()
    found = trials.asked(bench_archive, split, metric="cosine")
    known = bench.tasks(bench_archive, metric="cosine")
    assert list(found["predicted"]) == list(known["scan_split"]["predicted"])
    choosing = trials.asked(bench_archive, split, "choose", metric="cosine")
    assert list(choosing["predicted"]) == list(known["scan_choice"]["predicted"])


def test_organ_splits_share_no_patient_and_ask_everyone_once(bench_archive):
    table = bench_archive.table
    asked = np.zeros(len(table), int)
    for split in trials.splits(table, "organ"):
        asked += split.test
        parts = [set(table["patient"][m]) for m in split[1:3]] + [
            set(table["patient"][split.test])
        ]
        assert not parts[0] & parts[1] and not parts[0] & parts[2]
        assert not parts[1] & parts[2]
        assert set(table["patient"][split.gallery]) == parts[0] | parts[1]
    assert (asked == 1).all()


def test_organ_outcomes_are_those_of_the_patient_folds(bench_archive):
    splits = trials.splits(bench_archive.table, "organ")
    found = trials.together([trials.asked(bench_archive, split) for split in splits])
    known = protocols.patient_folds(bench_archive, 1, metric="cosine")
    assert list(found["predicted"]) == list(known["predicted"])
    assert list(found["label"]) == list(bench_archive.table["label"])


def test_kept_vectors_come_back_for_the_same_patches_only(bench_archive, tmp_path):
    table, n = bench_archive.table, bench_archive.table["fold"].nunique()
    rng = np.random.default_rng(0)
    shape = bench_archive.vectors.shape

    def drawn(seeds, splits):
        return [
            [trials.with_vectors(table, rng.normal(size=shape)) for _ in range(splits)]
            for _ in range(seeds)
        ]

    place = tmp_path / "ours"
    trials.keep_vectors(drawn(3, n), place)
    made = drawn(2, n)
    trials.keep_vectors(made, place)  # the third seed of before is gone
    back = trials.kept_vectors(place, table)
    assert [len(parts) for parts in back] == [n, n]
    for ours, theirs in zip(made, back, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a.vectors == b.vectors).all()
    for other in (
        table.iloc[1:],
        table.assign(x=table["x"] + 1),
        table.assign(fold=(table["fold"] + 1) % n),
    ):
        assert trials.kept_vectors(place, other) == []
    assert trials.kept_vectors(tmp_path / "none", table) == []


def test_any_score_of_seeds_is_put_together(bench_archive):
    (split,) = trials.splits(bench_archive.table, "scan")
    rng = np.random.default_rng(1)
    runs = []
    for _ in range(3):
        moved = bench_archive.vectors + rng.normal(size=bench_archive.vectors.shape)
        made = bench.as_scans(trials.with_vectors(bench_archive.table, moved))
        queries, gallery = made.take(split.test), made.take(split.gallery)
        how = {"allow_shared_patients": True, "metric": "cosine"}
        runs.append(protocols.train_gallery(queries, gallery, 8, **how))
    found = trials.over_seeds(runs, value=metrics.map_at_r)
    each = [metrics.map_at_r(run) for run in runs]
    assert found["seeds"] == pytest.approx(each)
    assert found["score"] == pytest.approx(np.mean(each))
    gap = trials.against(runs[:2], runs[2], value=metrics.map_at_r)
    rows = [metrics.map_at_r(run, per_query=True) for run in runs]
    gaps = pd.Series((rows[0] + rows[1]) / 2 - rows[2])
    by_patient = gaps.groupby(runs[0]["patient"].to_numpy()).mean()
    assert gap["difference"] == pytest.approx(by_patient.mean())


def test_bad_splits(bench_archive):
    table = bench_archive.table
    with pytest.raises(ValueError, match="valid are scan, organ"):
        trials.splits(table, "organs")
    with pytest.raises(ValueError, match="patients in more than one"):
        trials.splits(table.assign(fold=np.arange(len(table)) % 5), "organ")


def outcomes(hits, patients):
    return pd.DataFrame(
        {"query": range(len(hits)), "patient": patients, "label": "a",
         "predicted": ["a" if hit else "b" for hit in hits]}
    )  # fmt: skip


RUNS = [
    outcomes([1, 1, 0, 0, 1, 1], list("ppqqrr")),
    outcomes([1, 0, 0, 0, 1, 1], list("ppqqrr")),
]


def test_seeds_by_hand():
    found = trials.over_seeds(RUNS)
    assert found["seeds"] == pytest.approx([4 / 6, 3 / 6])
    assert found["score"] == pytest.approx(7 / 12)
    assert (found["n"], found["queries"]) == (3, 6)


def test_the_interval_is_over_seeds_and_patients():
    """A loop over the same two sources of chance gives the same interval."""
    rng, drawn = np.random.default_rng(1), []
    hits = np.stack([run["predicted"].eq("a").to_numpy() for run in RUNS])
    patient = RUNS[0]["patient"].to_numpy()
    for _ in range(4000):
        rows = np.concatenate(
            [np.flatnonzero(patient == p) for p in rng.choice(list("pqr"), 3)]
        )
        drawn.append(hits[rng.integers(2, size=2)][:, rows].mean())
    found = trials.over_seeds(RUNS, n_boot=4000)
    assert found["low"] == pytest.approx(np.quantile(drawn, 0.025), abs=0.05)
    assert found["high"] == pytest.approx(np.quantile(drawn, 0.975), abs=0.05)
    one = trials.over_seeds(RUNS[:1] * 2, n_boot=4000)  # two equal seeds add no chance
    only = bench.p_at_1(RUNS[0], n_boot=4000)
    assert one["low"] == pytest.approx(only["low"], abs=0.05)


def test_differences_are_paired_over_patients_after_averaging_seeds():
    other = outcomes([0, 0, 0, 0, 1, 1], list("ppqqrr"))
    found = trials.against(RUNS, other)
    assert found["difference"] == pytest.approx((0.75 + 0 + 0) / 3)
    assert found["n"] == 3
    with pytest.raises(ValueError, match="different queries"):
        trials.against(RUNS, other.assign(query=range(1, 7)))


def test_a_family_is_corrected_over_all_its_comparisons():
    other = outcomes([0, 0, 0, 0, 1, 1], list("ppqqrr"))
    runs = {"histogram": {"scan": other}, "a": {"scan": RUNS}, "b": {"scan": RUNS[0]}}
    found = trials.family(runs, "histogram", ["scan"])
    assert set(found) == {"a", "b"}
    for row in found.values():
        assert row["scan"]["p_holm"] == pytest.approx(min(1, 2 * row["scan"]["p"]))
