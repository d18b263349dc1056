"""Selective prediction against hand cases and loops."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from histo_utils import protocols, selective
from histo_utils.embeddings import Embeddings


def loop_area(confidence, errors, orders=4000):
    """Mean risk over all coverages, tied queries in random order, many times."""
    rng, values = np.random.default_rng(0), []
    for _ in range(orders):
        order = sorted(range(len(errors)), key=lambda i: (-confidence[i], rng.random()))
        made, risks = 0, []
        for n, i in enumerate(order, 1):
            made += errors[i]
            risks.append(made / n)
        values.append(np.mean(risks))
    return np.mean(values)


def test_curve_by_hand():
    """Five queries: two surest right, then a tied pair with one wrong, then wrong."""
    found = selective.risk_coverage([0.9, 0.8, 0.5, 0.5, 0.1], [0, 0, 1, 0, 1])
    assert found["threshold"].tolist() == [0.9, 0.8, 0.5, 0.1]
    assert found["coverage"].tolist() == pytest.approx([0.2, 0.4, 0.8, 1.0])
    assert found["risk"].tolist() == pytest.approx([0, 0, 1 / 4, 2 / 5])


def test_coverage_rises_as_the_threshold_falls_to_answering_all():
    rng = np.random.default_rng(1)
    confidence, errors = rng.integers(0, 9, 200) / 8, rng.random(200) < 0.4
    found = selective.risk_coverage(confidence, errors)
    assert (np.diff(found["coverage"]) > 0).all()
    assert (np.diff(found["threshold"]) < 0).all()
    assert found["coverage"].iloc[-1] == 1
    assert found["risk"].iloc[-1] == pytest.approx(errors.mean())
    for row in found.itertuples():
        mine = confidence >= row.threshold
        assert row.coverage == pytest.approx(mine.mean())
        assert row.risk == pytest.approx(errors[mine].mean())


def test_area_by_hand():
    # risks 0, 0, then within the tie 0.5 expected errors of 3, 1 of 4, then 2 of 5
    by_hand = (0 + 0 + 0.5 / 3 + 1 / 4 + 2 / 5) / 5
    found = selective.area([0.9, 0.8, 0.5, 0.5, 0.1], [0, 0, 1, 0, 1])
    assert found == pytest.approx(by_hand)


def test_area_equals_loops_over_random_orders_of_ties():
    rng = np.random.default_rng(2)
    confidence, errors = rng.integers(0, 4, 30), rng.random(30) < 0.5
    found = selective.area(confidence, errors)
    assert found == pytest.approx(loop_area(confidence, errors), abs=0.005)


def test_area_depends_on_the_order_of_confidences_only():
    rng = np.random.default_rng(3)
    confidence, errors = rng.random(50), rng.random(50) < 0.3
    found = selective.area(confidence, errors)
    assert selective.area(np.exp(3 * confidence) - 7, errors) == pytest.approx(found)
    mixed = rng.permutation(50)
    assert selective.area(confidence[mixed], errors[mixed]) == pytest.approx(found)
    best, worst = selective.area(~errors, errors), selective.area(errors, errors)
    assert best <= found <= worst


@pytest.mark.parametrize(
    ("risk", "least"), [(0.0, 0.8), (0.24, 0.8), (0.25, 0.5), (0.4, 0.1), (1.0, 0.1)]
)
def test_threshold_by_hand(risk, least):
    confidence, errors = [0.9, 0.8, 0.5, 0.5, 0.1], [0, 0, 1, 0, 1]
    assert selective.threshold(confidence, errors, risk) == least


def test_no_threshold_is_good_enough():
    assert selective.threshold([2, 1], [1, 0], 0.3) == np.inf
    # a mistake on top does not forbid a lower threshold whose risk is small enough
    assert selective.threshold([4, 3, 2, 1], [1, 0, 0, 0], 0.3) == 1


def test_auroc_equals_scikit_learn_and_the_share_of_pairs():
    rng = np.random.default_rng(4)
    confidence, present = rng.integers(0, 5, 40), rng.random(40) < 0.7
    pairs = [
        (a > b) + (a == b) / 2
        for a in confidence[present]
        for b in confidence[~present]
    ]
    found = selective.auroc(confidence, present)
    assert found == pytest.approx(np.mean(pairs))
    assert found == pytest.approx(roc_auc_score(present, confidence))


def test_auroc_is_a_mean_over_archives_with_both_kinds():
    assert np.isnan(selective.auroc([1, 2], [1, 1]))
    # archive 0: 1.0; archive 1: 0.5; archive 2 misses nothing
    found = selective.auroc([2, 1, 1, 1, 9], [1, 0, 1, 0, 1], [0, 0, 1, 1, 2])
    assert found == pytest.approx(0.75)


def test_risk_of_what_was_answered():
    errors = np.array([1, 0, 1, 0])
    assert selective.risk([1, 1, 0, 1], errors) == pytest.approx(1 / 3)
    assert np.isnan(selective.risk(np.zeros(4), errors))


def test_confidences_by_hand():
    found = pd.DataFrame(
        {
            "neighbour_labels": [["a", "b", "a", "c"], ["b", "b", "b", "b"]],
            "distances": [[0.25, 0.5, 0.5, 0.75], [0.5, 1, 1, 1]],
        }
    )
    assert selective.agreement(found).tolist() == [0.5, 1.0]
    assert selective.closeness(found).tolist() == [-0.25, -0.5]


def test_intervals_are_over_patients():
    """Two patients, one all right and one all wrong: each draw is 0, 1/2 or 1."""
    found = selective.over_patients(
        selective.risk, [np.ones(8), [0] * 4 + [1] * 4], list("aaaabbbb")
    )
    assert (found["score"], found["low"], found["high"]) == (0.5, 0, 1)
    assert (found["n"], found["queries"]) == (2, 8)


def test_answers_are_those_of_the_protocol(bench_archive):
    protocol = protocols.patient_folds(bench_archive, 5, metric="cosine")
    found = selective.abstain(bench_archive, selective.agreement, [1.0, 0.3], k=5)
    assert found["target_risk"].tolist() == [0.3] * 128 + [1.0] * 128
    for _, part in found.groupby("target_risk"):
        part = part.reset_index(drop=True)
        for column in ("query", "label", "predicted", "patient"):
            assert part[column].tolist() == protocol[column].tolist()
        for column in ("neighbours", "neighbour_labels"):
            assert np.array_equal(np.stack(part[column]), np.stack(protocol[column]))
        assert (part["wrong"] == (part["label"] != part["predicted"])).all()
        assert (part["answered"] == (part["confidence"] >= part["threshold"])).all()


def test_a_threshold_never_saw_its_fold(bench_archive):
    """Other labels and vectors in a fold change its answers, never its threshold."""
    table = bench_archive.table
    how = {"confidence": selective.closeness, "risks": [0.5], "k": 5}
    before = selective.abstain(bench_archive, **how)
    inside = (table["fold"] == 2).to_numpy()
    vectors = bench_archive.vectors.copy()
    vectors[inside] = np.random.default_rng(9).standard_normal((inside.sum(), 5))
    other = table.assign(label=table["label"].where(~inside, "b"))
    after = selective.abstain(Embeddings(vectors, other), **how)
    first, second = (x.groupby(table["fold"])["threshold"] for x in (before, after))
    assert (first.nunique() == 1).all() and (second.nunique() == 1).all()
    assert first.first()[2] == second.first()[2]
    assert (first.first() != second.first()).any(), "the other folds did see it"


def test_the_threshold_equals_loops(bench_archive):
    found = selective.abstain(bench_archive, selective.closeness, [0.4], k=3)
    table, vectors = bench_archive.table, bench_archive.vectors.astype(float)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    fold, label = table["fold"].to_numpy(), table["label"].to_numpy()
    confidence, errors = [], []
    for row in np.flatnonzero(fold != 0):
        may = (fold != 0) & (fold != fold[row])
        far = np.where(may, 1 - unit @ unit[row], np.inf)
        confidence.append(-far.min())
        errors.append(label[far.argmin()] != label[row])
    by_loops = selective.threshold(confidence, errors, 0.4)
    mine = found.loc[table["fold"] == 0, "threshold"]
    assert mine.to_numpy() == pytest.approx(by_loops, abs=1e-6)


def test_two_folds_are_too_few(bench_archive):
    rows = bench_archive.take((bench_archive.table["fold"] < 2).to_numpy())
    with pytest.raises(ValueError, match="three folds"):
        selective.abstain(rows, selective.agreement, [0.2])


def test_an_absent_class_is_never_found(bench_archive):
    found = selective.without_each_class(bench_archive, k=4)
    assert len(found) == 2 * len(bench_archive)
    labels = np.stack(found["neighbour_labels"])
    assert (labels != found["without"].to_numpy()[:, None]).all()
    assert (found["present"] == (found["label"] != found["without"])).all()
    folds = bench_archive.table["fold"].to_numpy()
    near = folds[np.stack(found["neighbours"])]
    assert (near != folds[found["query"]][:, None]).all()


@pytest.mark.parametrize(
    ("confidence", "errors"), [([], []), ([1, 2], [1]), ([np.nan, 1], [0, 1])]
)
def test_bad_input_is_refused(confidence, errors):
    with pytest.raises(ValueError, match="expected"):
        selective.risk_coverage(confidence, errors)


def test_scores_by_hand(bench_archive):
    found = selective.abstain(bench_archive, selective.agreement, [0.3, 1.0], k=5)
    row, out = selective.scores(found), found[found["target_risk"] == 1]
    coverage = row["coverage_at_100"]["score"]
    assert coverage == pytest.approx((out["confidence"] >= out["threshold"]).mean())
    gain = row["gain"]["score"]
    assert gain == pytest.approx(out["wrong"].mean() - row["area"]["score"])
    # two labels: without one of them, all neighbours agree on the other
    searched = selective.without_each_class(bench_archive, k=5)
    row, each = selective.absent_scores(searched, selective.agreement, found)
    assert row["AUROC"]["score"] == 0.5 and each == {"a": 0.5, "b": 0.5}
    answered = (out["threshold"] <= 1).mean()
    assert row["absent_answered_at_100"]["score"] == pytest.approx(answered)


def test_a_risk_without_answers_is_no_number(bench_archive):
    out = selective.abstain(bench_archive, selective.agreement, [1.0], k=5)
    none = out.assign(answered=False, target_risk=0.1)
    one = out.assign(answered=out["patient"] == 3, target_risk=0.2)
    row = selective.scores(pd.concat([none, one]))
    assert row["risk_at_10"] == "–"
    assert row["risk_at_20"] == pytest.approx(out["wrong"][48:64].mean())
