import json
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from histo_utils.embeddings import Embeddings, standardise
from histo_utils.metrics import accuracy, eta_scores
from histo_utils.protocols import (
    Split,
    bench,
    classes,
    evaluate,
    leave_one_out,
    leave_one_patient_out,
    linear_probe,
    patient_folds,
    published_split,
    quarters,
    slide_bags,
    slide_search,
    splits,
    train_gallery,
)

COLUMNS = ["query", "label", "predicted", "patient", "slide", "neighbours"]
COLUMNS += ["neighbour_labels", "distances", "relevant"]


def archive_of(patients=12, each=6, d=5, seed=0, shift=1.0):
    """Patients of three classes; two slides a patient; every patient a little apart."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), each)
    label = np.array(["glia", "lung", "skin"])[patient % 3]
    centre = shift * rng.normal(size=(3, d))[patient % 3]
    centre = centre + 2 * rng.normal(size=(patients, d))[patient]
    n = len(patient)
    table = pd.DataFrame(
        {
            "image": [f"{p}.tif" for p in patient],
            "x": np.arange(n) % each,
            "y": 0,
            "size": 1,
            "label": label,
            "patient": [f"p{p:02d}" for p in patient],
            "slide": [f"s{p:02d}-{i % 2}" for i, p in enumerate(patient)],
            "fold": patient // 3 % 4,
        }
    )
    return Embeddings(centre + rng.normal(size=(n, d)), table)


@pytest.fixture
def made():
    return archive_of()


def test_quarters_of_a_region(bench_archive):
    found = pd.Series(quarters(bench_archive.table)).value_counts().to_dict()
    assert found == {"upper": 64, "lower left": 32, "lower right": 32}
    corner = quarters(bench_archive.table.query("x == 750 and y >= 500"))
    assert "upper" in corner, "the middle is that of the patches given"


def test_scans_train_above_validate_left_and_test_right(bench_archive):
    table, (split,) = bench_archive.table, splits(bench_archive.table, "scan")
    where = quarters(table)
    assert (split.train == (where == "upper")).all()
    assert (split.gallery == split.train).all()
    assert (split.validation == (where == "lower left")).all()
    assert (split.test == (where == "lower right")).all()
    assert split.sizes() == {"train": 64, "validation": 32, "gallery": 64, "test": 32}
    part = split.take(split.train | split.test)
    assert part.sizes() == {"train": 64, "validation": 0, "gallery": 64, "test": 32}
    assert classes(table, "scan").equals(table["slide"])
    assert classes(table, "organ").equals(table["label"])


def test_organ_splits_share_no_patient_and_test_everyone_once(bench_archive):
    table, tested = bench_archive.table, np.zeros(128, int)
    for split in splits(table, "organ"):
        tested += split.test
        train, validation, gallery, test = (set(table["patient"][m]) for m in split[1:])
        assert not train & validation and not train & test and not validation & test
        assert gallery == train | validation
    assert (tested == 1).all()


def test_known_leaves_out_validation_patches_without_a_training_patch():
    train, held = np.array([1, 0, 0, 0], bool), np.array([0, 1, 1, 0], bool)
    split = Split("organ", train, held, train | held, ~train & ~held)
    assert split.known(pd.Series(list("aabb"))).validation.tolist() == [0, 1, 0, 0]


def test_bad_splits(bench_archive):
    table = bench_archive.table
    with pytest.raises(ValueError, match="valid are scan, organ"):
        splits(table, "organs")
    with pytest.raises(ValueError, match="patients in more than one"):
        splits(table.assign(fold=np.arange(len(table)) % 5), "organ")


def test_a_published_split_holds_a_tenth_of_its_training_patches_back():
    rng, n = np.random.default_rng(0), 400
    table = pd.DataFrame({
        "label": rng.choice(list("ab"), n, p=[0.75, 0.25]),
        "split": rng.choice(["train", "test"], n),
    })  # fmt: skip
    split, train = published_split(table, seed=3), table["split"] == "train"
    assert (split.gallery == train).all() and (split.test == ~train).all()
    assert (split.train | split.validation == train).all()
    assert not (split.train & split.validation).any()
    share = table["label"][split.validation].eq("b").mean()
    assert abs(share - table["label"][train].eq("b").mean()) < 0.03
    assert abs(split.validation.sum() - train.sum() / 10) <= 1
    again = published_split(table, stratify=False, seed=3)
    assert again.sizes() == split.sizes() and (again.train != split.train).any()
    with pytest.raises(ValueError, match="expected train and test"):
        published_split(table.assign(split="valid"))


def test_evaluate_searches_where_it_says(bench_archive):
    (split,) = splits(bench_archive.table, "scan")
    out = evaluate(bench_archive, split, k=2, metric="euclidean")
    slide = bench_archive.table["slide"]
    assert out["query"].tolist() == np.flatnonzero(split.test).tolist()
    assert out["label"].tolist() == slide[split.test].tolist()
    for row in out.itertuples():
        far = np.linalg.norm(
            bench_archive.vectors - bench_archive.vectors[row.query], axis=1
        )
        far[~split.gallery] = np.inf
        assert row.neighbours.tolist() == far.argsort()[:2].tolist()
        assert row.neighbour_labels.tolist() == slide[row.neighbours].tolist()
    out = evaluate(bench_archive, split, "validation")
    assert out["query"].tolist() == np.flatnonzero(split.validation).tolist()
    assert split.train[np.concatenate(out["neighbours"])].all()


def test_the_bench_has_every_protocol_in_one_table(bench_archive):
    out = bench(bench_archive, k=3, metric="euclidean")
    sizes = {"scan_leave_one_out": 128, "scan_not_touching": 128, "organ": 128}
    sizes |= {"scan_validation": 32, "scan_split": 32, "scan_split_not_touching": 32}
    assert out["protocol"].value_counts().to_dict() == sizes
    hit = (
        out.assign(hit=out["label"] == out["predicted"])
        .groupby("protocol")["hit"]
        .mean()
    )
    assert hit["scan_not_touching"] <= hit["scan_leave_one_out"]
    organ = out[out["protocol"] == "organ"]
    patients = bench_archive.table["patient"].to_numpy()
    near = np.stack(organ["neighbours"])
    assert (patients[near] != patients[organ["query"]][:, None]).all()
    assert Split._fields == ("task", "train", "validation", "gallery", "test")


@pytest.mark.parametrize("exclude", ["self", "slide", "patient"])
def test_outcomes_agree_with_the_table(made, exclude):
    out = leave_one_out(made, 4, exclude)
    assert out.columns.tolist() == COLUMNS
    assert out["query"].tolist() == list(range(len(made)))
    t = made.table
    for row in out.itertuples():
        assert row.label == t["label"][row.query]
        assert row.patient == t["patient"][row.query]
        assert row.slide == t["slide"][row.query]
        assert len(row.neighbours) == 4
        assert row.neighbour_labels.tolist() == t["label"][row.neighbours].tolist()
        assert row.predicted == row.neighbour_labels[0]
        assert (np.diff(row.distances) >= 0).all()
        allowed = t.index != row.query
        if exclude != "self":
            allowed = t[exclude] != t[exclude][row.query]
        assert allowed[row.neighbours].all()
        assert row.relevant == (allowed & (t["label"] == row.label)).sum()


def test_leave_one_patient_out_is_leave_one_out_by_patient(made):
    pd.testing.assert_frame_equal(
        leave_one_patient_out(made, 3), leave_one_out(made, 3, "patient")
    )


def test_toy_scores_of_the_first_neighbour(golden):
    toy = np.load(golden / "retrieval_toy.npz")
    expected = json.loads((golden / "eta_metrics.json").read_text())["retrieval_toy"]
    for name, key in (
        ("X", "self_excluded_reference"),
        ("X_dup", "duplicate_case_reference"),
    ):
        gallery = Embeddings(toy[name], pd.DataFrame({"label": toy["y"]}))
        out = leave_one_out(gallery, 3)
        etas = eta_scores(out["label"], out["predicted"], 5)
        np.testing.assert_allclose(etas, expected[key], rtol=1e-12)
        assert out["patient"].isna().all()


def test_standardised_uses_the_gallery(made):
    test, train = made.take(made.table["fold"] == 0), made.take(made.table["fold"] > 0)
    wide = Embeddings(test.vectors * 3 + 5, test.table)
    scaled, queries = standardise(train, wide)
    pd.testing.assert_frame_equal(
        train_gallery(wide, train, 3, standardised=True, metric="euclidean"),
        train_gallery(queries, scaled, 3, metric="euclidean"),
    )


def test_train_gallery_refuses_shared_patients(made):
    even = made.take(made.table["x"] % 2 == 0)
    odd = made.take(made.table["x"] % 2 == 1)
    with pytest.raises(ValueError, match=r"patient 'p00' is in both .*12 such pat"):
        train_gallery(even, odd, 3)
    out = train_gallery(even, odd, 3, allow_shared_patients=True)
    assert len(out) == len(even)
    bare = Embeddings(odd.vectors, odd.table.drop(columns="patient"))
    with pytest.raises(ValueError, match=r"no column 'patient'.*allow_shared_patients"):
        train_gallery(even, bare, 3)


def test_folds_equal_one_search_a_fold(made):
    out = patient_folds(made, 3, standardised=True, metric="euclidean")
    assert out["query"].tolist() == list(range(len(made)))
    t = made.table
    for row in out.itertuples():
        assert (t["fold"][row.neighbours] != t["fold"][row.query]).all()
        assert row.neighbour_labels.tolist() == t["label"][row.neighbours].tolist()
    rows = np.flatnonzero(t["fold"] == 2)
    others = np.flatnonzero(t["fold"] != 2)
    one = train_gallery(
        made.take(rows), made.take(others), 3, standardised=True, metric="euclidean"
    )
    assert out["predicted"][rows].tolist() == one["predicted"].tolist()
    np.testing.assert_array_equal(
        np.stack(out["neighbours"][rows]), others[np.stack(one["neighbours"])]
    )


def test_each_fold_may_have_vectors_of_its_own(made):
    fold = made.table["fold"].to_numpy()
    values = np.unique(fold)
    rng = np.random.default_rng(1)
    each = [
        Embeddings(rng.normal(size=made.vectors.shape).astype("float32"), made.table)
        for _ in values
    ]
    out = patient_folds(each, 2, metric="euclidean")
    for value, own in zip(values, each, strict=True):
        others = np.flatnonzero(fold != value)
        for row in np.flatnonzero(fold == value):
            far = np.linalg.norm(own.vectors[others] - own.vectors[row], axis=1)
            assert out["neighbours"][row].tolist() == others[far.argsort()[:2]].tolist()
    with pytest.raises(ValueError, match=f"{len(values)} folds, for 1 Embeddings"):
        patient_folds(each[:1], 2)


def test_a_patient_in_two_folds_is_refused(made):
    table = made.table.copy()
    table.loc[0, "fold"] = 3
    with pytest.raises(ValueError, match="patient 'p00' is in 2 values of 'fold'"):
        patient_folds(Embeddings(made.vectors, table))
    with pytest.raises(ValueError, match="no column 'fold'"):
        patient_folds(Embeddings(made.vectors, table.drop(columns="fold")))
    with pytest.raises(ValueError, match="expected two folds or more"):
        patient_folds(Embeddings(made.vectors, table.assign(fold=0)))


def test_a_class_that_cannot_be_found_is_refused(made):
    label = made.table["label"].where(made.table["patient"] != "p03", "bone")
    table = made.table.assign(label=label)
    lonely = Embeddings(made.vectors, table)
    leave_one_out(lonely, 3, "self")
    with pytest.raises(
        ValueError, match=r"class 'bone': query 18 is alone .*'patient'"
    ):
        leave_one_patient_out(lonely, 3)
    with pytest.raises(ValueError, match=r"class 'bone'"):
        patient_folds(lonely, 3)
    single = Embeddings(made.vectors, table.assign(label=["a"] + ["b"] * 71))
    with pytest.raises(ValueError, match=r"class 'a': query 0 is alone in it"):
        leave_one_out(single, 3)


def test_search_errors_come_through(made):
    with pytest.raises(ValueError, match="k=72 is larger than the 71 items"):
        leave_one_out(made, 72)
    with pytest.raises(ValueError, match="exclude=None would let every patch find it"):
        leave_one_out(made, 3, None)
    one = made.take(made.table["patient"] == "p00")
    with pytest.raises(ValueError, match="patient 'p00' is the whole gallery"):
        leave_one_patient_out(one, 1)
    bare = Embeddings(made.vectors, made.table.drop(columns="label"))
    with pytest.raises(ValueError, match="no column 'label'"):
        leave_one_out(bare)


def test_probe_separates_what_is_linear():
    made = archive_of(24, shift=30, seed=3)
    test, train = made.take(made.table["fold"] == 0), made.take(made.table["fold"] > 0)
    out = linear_probe(train, test)
    assert accuracy(out) == 1
    assert out["neighbours"].isna().all()
    assert out["relevant"].isna().all()
    assert out.columns.tolist() == COLUMNS
    again = linear_probe(train, test)
    pd.testing.assert_frame_equal(out, again)


def test_probe_chooses_its_constant_on_training_patients_only(made):
    test, train = made.take(made.table["fold"] == 0), made.take(made.table["fold"] > 0)
    values = (1e-6, 1e-2, 1.0)
    out = linear_probe(train, test, values)
    assert out.attrs["c"] in values
    # Neither test labels nor test vectors may move the choice.
    shuffled = test.table.assign(label=test.table["label"].to_numpy()[::-1])
    other = Embeddings(1000 * test.vectors, shuffled)
    assert linear_probe(train, other, values).attrs["c"] == out.attrs["c"]
    assert linear_probe(train, test, values[1:2]).attrs["c"] == 1e-2


def test_probe_keeps_groups_whole(monkeypatch, made):
    test, train = made.take(made.table["fold"] == 0), made.take(made.table["fold"] > 0)
    patient, torn, split = train.table["patient"], [], StratifiedGroupKFold.split

    def watch(self, x, y, groups):
        for fit, held in split(self, x, y, groups):
            torn.append(set(patient[fit]) & set(patient[held]))
            yield fit, held

    monkeypatch.setattr(StratifiedGroupKFold, "split", watch)
    linear_probe(train, test, (0.01, 0.1))
    assert torn == [set()] * 5


def test_probe_bad_input(made):
    test, train = made.take(made.table["fold"] == 0), made.take(made.table["fold"] > 0)
    with pytest.raises(ValueError, match="is in both queries and gallery"):
        linear_probe(made, test)
    with pytest.raises(ValueError, match="classes that occur in two groups"):
        linear_probe(train, test, groups="label")
    with pytest.raises(ValueError, match="no column 'site'"):
        linear_probe(train, test, groups="site")
    with pytest.raises(ValueError, match="3 groups for 54 training patches"):
        linear_probe(train, test, groups=[1, 2, 3])
    strange = Embeddings(test.vectors, test.table.assign(label="bone"))
    with pytest.raises(ValueError, match="test class 'bone' is not in the training"):
        linear_probe(train, strange)


def test_probe_of_scans_by_place(made):
    # The class is the scan: patients are shared by design, places are held out.
    scans = Embeddings(made.vectors, made.table.assign(label=made.table["patient"]))
    test, train = scans.take(scans.table["x"] > 3), scans.take(scans.table["x"] <= 3)
    with pytest.raises(ValueError, match="occur in two groups"):
        linear_probe(train, test, allow_shared_patients=True)
    out = linear_probe(train, test, (0.01, 1.0), groups="x", allow_shared_patients=True)
    assert accuracy(out) > 0.5


def test_slide_search_golden(golden):
    toy = np.load(golden / "yottixel_loo_toy.npz")
    expected = json.loads((golden / "yottixel.json").read_text())["loo"]
    bags = [toy[f"bob{i:02d}"] for i in range(18)]
    names = [f"s{i}" for i in range(18)]
    table = pd.DataFrame({"slide": names, "label": toy["labels"]})
    # How equal distances are ordered decides these; NumPy's sort was not stable.
    by_order_of_ties = {1: 11, 3: 8, 5: 1}
    for k, skipped in by_order_of_ties.items():
        out = slide_search(bags, table, k, "slide")
        keep = np.arange(18) != skipped
        assert (
            out["predicted"][keep] == np.array(expected[str(k)]["y_pred"])[keep]
        ).all()
        for row in out.itertuples():
            np.testing.assert_array_equal(
                row.distances, toy["distance_matrix"][row.query, row.neighbours]
            )


def test_slide_search_votes_and_never_meets_its_patient(made):
    for barcode in (False, True):
        bags, table = slide_bags(made, barcode)
        assert len(bags) == 24
        assert [len(bag) for bag in bags] == [3] * 24
        out = slide_search(bags, table, 4)
        for row in out.itertuples():
            found = table.iloc[row.neighbours]
            assert row.patient not in set(found["patient"])
            assert row.neighbour_labels.tolist() == found["label"].tolist()
            votes = Counter(found["label"])
            best = [
                name for name in found["label"] if votes[name] == max(votes.values())
            ]
            assert row.predicted == best[0]
        with_sibling = slide_search(bags, table, 4, "slide")
        siblings = [
            row.patient in set(table["patient"].iloc[row.neighbours])
            for row in with_sibling.itertuples()
        ]
        assert any(siblings)


def test_slide_search_ties_go_by_place_in_the_table():
    bag = np.zeros((2, 4), np.uint8)
    labels = ["a", "b", "b", "a"]
    table = pd.DataFrame({"slide": range(4), "patient": range(4), "label": labels})
    out = slide_search([bag] * 4, table, 3)
    found = [row.tolist() for row in out["neighbours"]]
    assert found == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    # Two labels, once each: the one met first.
    votes = slide_search([bag] * 4, table.assign(label=list("baab")), 2, "slide")
    assert votes["predicted"].tolist() == ["a", "b", "b", "b"]


def test_slide_search_bad_input(made):
    bags, table = slide_bags(made)
    with pytest.raises(ValueError, match="expected 'slide' or 'patient'"):
        slide_search(bags, table, 3, "self")
    with pytest.raises(ValueError, match="one row per slide"):
        slide_search(bags[1:], table, 3)
    with pytest.raises(ValueError, match="k=23 is larger than the 22 items"):
        slide_search(bags, table, 23)
    two = made.table.assign(slide="s")
    with pytest.raises(ValueError, match="slide 's' has 3 values of 'label'"):
        slide_bags(Embeddings(made.vectors, two))
    two = made.table.assign(slide="s", label="a")
    with pytest.raises(ValueError, match="slide 's' has 12 values of 'patient'"):
        slide_bags(Embeddings(made.vectors, two))
