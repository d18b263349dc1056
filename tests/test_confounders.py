"""Confounders, against loops and cases worked by hand."""

import numpy as np
import pandas as pd
import pytest

from histo_utils import confounders, metrics, protocols
from histo_utils.embeddings import Embeddings


def test_by_chance_equals_loops(bench_archive):
    table = bench_archive.table
    found = confounders.by_chance(table, "label", within="site")
    for row in (0, 40, 127):
        mine = table.iloc[row]
        others = table[(table["patient"] != mine["patient"])]
        others = others[others["site"] == mine["site"]]
        assert found[row] == pytest.approx((others["label"] == mine["label"]).mean())
    assert np.isnan(confounders.by_chance(table, "label", within="patient")).all()


def test_scores_by_value_and_no_interval_of_two_patients(bench_archive):
    out = protocols.patient_folds(bench_archive, 1, metric="cosine")
    hits, out = metrics.accuracy(out, per_query=True), out.assign(system="x")
    table = bench_archive.table
    found = confounders.by_value(out, table, "site")["A"]
    inside = (table["site"] == "A").to_numpy()
    assert found["patients"] == 4
    assert found["x"]["score"] == pytest.approx(hits[inside].mean())
    two = table.assign(pair=table["patient"] // 2)
    found = confounders.by_value(out, two, "pair")["0"]["x"]
    assert found == pytest.approx(hits[:32].mean())


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
    nested = bench_archive.table.assign(site=bench_archive.table["label"].to_numpy())
    with pytest.raises(ValueError, match="nested"):
        confounders.within_and_across(Embeddings(bench_archive.vectors, nested), "site")


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
    pairs = [n for name, n in found.items() if name.endswith("_label")]
    assert sum(pairs) - found["values_with_one_label"] == 8 * 7 // 2
    assert confounders.nesting(bench_archive.table, "site", "site")["values"] == 2


def test_agrees_with_the_label_of_the_nearest(bench_archive):
    out = protocols.leave_one_patient_out(bench_archive, 1)
    right = metrics.accuracy(out, per_query=True)
    for part in (out, out[50:]):
        found = confounders.agrees(part, bench_archive.table["label"])
        np.testing.assert_array_equal(found, right[part["query"]])


TABLE = pd.DataFrame(
    {
        "label": list("abcabcab"),
        "slide": list("stuvwxyz"),
        "preparation": ["P", "P", "F", "F", "P", "F", "P", "F"],
        "fold": [0, 0, 0, 1, 1, 1, 2, 2],
    }
)


def outcomes(neighbours):
    """Outcomes of the first rows, from the rows they found."""
    label, near = TABLE["label"].to_numpy(), np.array(neighbours)
    return pd.DataFrame(
        {
            "query": range(len(near)),
            "label": label[: len(near)],
            "predicted": label[near[:, 0]],
            "patient": TABLE["slide"][: len(near)],
            "neighbours": list(near),
            "neighbour_labels": list(label[near]),
        }
    )


def test_rules_by_hand():
    # 0 (a, P) finds 4 (b, P): same preparation, a exists as F; histogram on 4's slide
    # 1 (b, P) finds 4 (b): right.  2 (c, F) finds 7 (b, F): the only c is F, too
    found = confounders.causes(
        outcomes([[4, 5, 3], [4, 3, 5], [7, 5, 6]]),
        outcomes([[4, 3, 5], [6, 3, 5], [3, 4, 5]]),
        TABLE,
        related=[("b", "c")],
        k=3,
    )
    assert found["query"].tolist() == [0, 2]
    assert found["colour"].tolist() == [True, False]
    assert found["preparation"].tolist() == [True, False]
    assert found["related"].tolist() == [False, True]
    # 0: one a, one b among three; 2: one c, one b among three
    assert found["ambiguous"].tolist() == [True, True]
    assert found["none"].tolist() == [False, False]
    # query 0 might have found b, c, b of rows 4, 5, 7: rule colour holds for row 4,
    # preparation for row 4; query 2 might have found a, b, a, b of 3, 4, 6, 7
    assert found["chance_colour"].tolist() == pytest.approx([1 / 3, 1 / 4])
    assert found["chance_preparation"].tolist() == pytest.approx([1 / 3, 0])
    assert found["chance_related"].tolist() == pytest.approx([0, 2 / 4])


def test_an_error_may_fit_no_rule():
    found = confounders.causes(
        outcomes([[7, 5, 4]]), outcomes([[4, 3, 5]]), TABLE, k=3
    )  # 0 (a, P) finds 7 (b, F), no other a near
    assert found["none"].tolist() == [True]
    assert not found[list(confounders.RULES)].any(axis=None)
    with pytest.raises(ValueError, match="different queries"):
        confounders.causes(outcomes([[4], [4]]), outcomes([[4]]), TABLE)


def test_rule_scores_by_hand():
    rules = {rule: [False] * 4 for rule in (*confounders.RULES, "none")}
    rules |= {"colour": [True, True, True, False], "none": [False] * 3 + [True]}
    missed = pd.DataFrame(rules | {"patient": list("ppqq"), "chance_colour": 0.25})
    found = confounders.rule_scores(missed)
    assert list(found) == [*confounders.RULES, "none"]
    colour, share = found["colour"], found["colour"]["share"]
    assert (colour["wrong_hits"], colour["at_random"]) == (3, 0.25)
    assert (share["score"], share["low"], share["high"]) == (0.75, 0.5, 1.0)
    assert (share["n"], share["queries"]) == (2, 4)
    assert found["none"]["share"]["score"] == 0.25 and "at_random" not in found["none"]
    assert list(confounders.rule_scores(missed, ["colour"])) == ["colour"]


def test_centring_equals_a_loop(bench_archive):
    table, vectors = bench_archive.table, bench_archive.vectors.astype(float)
    gallery = (table["fold"] != 1).to_numpy()
    found = confounders.centred(bench_archive, gallery, "site").vectors
    for row in (0, 40, 127):
        same = gallery & (table["site"] == table["site"][row]).to_numpy()
        expected = vectors[row] - vectors[same].mean(axis=0)
        assert found[row] == pytest.approx(expected, abs=1e-6)
    everyone = confounders.centred(bench_archive, np.ones(128, bool)).vectors
    assert everyone == pytest.approx(vectors - vectors.mean(axis=0), abs=1e-5)


def test_what_the_gallery_does_not_know_is_refused(bench_archive):
    gallery = (bench_archive.table["site"] == "A").to_numpy()
    with pytest.raises(ValueError, match="no gallery row has site 'B', but 64"):
        confounders.centred(bench_archive, gallery, "site")
    with pytest.raises(ValueError, match="no column 'stain'"):
        confounders.centred(bench_archive, gallery, "stain")
    with pytest.raises(ValueError, match="mask"):
        confounders.centred(bench_archive, np.zeros(128, bool))


def test_batch_correction_equals_a_loop(bench_archive):
    table, vectors = bench_archive.table, bench_archive.vectors.astype(float)
    images = {"none": bench_archive}
    found = confounders.batch_correction(images, "site", metric="cosine")
    ways = ["none", "centred_by_site", "centred"]
    assert pd.unique(found["system"]).tolist() == ways
    fold, site = table["fold"].to_numpy(), table["site"].to_numpy()
    of = {
        key: part["value"].to_numpy()
        for key, part in found.groupby(["system", "score"])
    }
    for row in (0, 50, 127):
        gallery, moved = fold != fold[row], vectors.copy()
        for value in "AB":
            moved[site == value] -= vectors[gallery & (site == value)].mean(axis=0)
        unit = moved / np.linalg.norm(moved, axis=1, keepdims=True)
        near = np.where(gallery, unit @ unit[row], -2).argmax()
        right = table["label"][row] == table["label"][near]
        assert of["centred_by_site", "label"][row] == right
        assert of["centred_by_site", "same_site"][row] == (site[near] == site[row])
    plain = protocols.patient_folds(bench_archive, 1, metric="cosine")
    assert (of["none", "label"] == metrics.accuracy(plain, per_query=True)).all()
    found = confounders.batch_correction(images, "site", metric="euclidean")
    assert pd.unique(found["system"]).tolist() == ways[:2]


def copied(n_tiles=60, times=4):
    """Tiles of two classes whose vectors say nothing of the class, and duplicates."""
    rng = np.random.default_rng(0)
    tile = np.repeat(np.arange(n_tiles), times)
    vectors = rng.standard_normal((n_tiles, 32))[tile]
    vectors = vectors + 0.1 * rng.standard_normal((len(tile), 32))
    table = pd.DataFrame({
        "image": [f"{i}.png" for i in range(len(tile))], "slide": tile.astype(str),
        "label": np.array(["a", "b"])[tile % 2],
    })  # fmt: skip
    return Embeddings(vectors.astype(np.float32), table)


def test_a_split_by_file_finds_duplicates_and_a_split_by_tile_does_not():
    made, how = copied(), {"metric": "euclidean"}
    tile = made.table["slide"].to_numpy()
    files, tiles = (
        confounders.folds_by_unit(made, u, **how) for u in ("image", "slide")
    )
    own = {}
    for name, found in {"file": files, "tile": tiles}.items():
        near = found[found["protocol"] == "neighbour"]
        own[name] = (tile[confounders.nearest(near)] == near["patient"]).mean()
        assert near["patient"].nunique() == 60  # tiles, not images
    assert own["file"] > 0.95 and own["tile"] == 0
    score = {
        (name, way): metrics.accuracy(part)
        for name, found in {"file": files, "tile": tiles}.items()
        for way, part in found.groupby("protocol")
    }
    assert score["file", "neighbour"] >= own["file"]
    assert 0.25 < score["tile", "neighbour"] < 0.75
    assert score["file", "linear SVM"] - score["tile", "linear SVM"] > 0.2
