import json
from collections import Counter
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from scipy import stats
from sklearn.metrics import average_precision_score, balanced_accuracy_score

from histo_utils.embeddings import Embeddings
from histo_utils.metrics import (
    accuracy,
    bootstrap_ci,
    cumulative_cutoff_score,
    detectable_difference,
    eta_scores,
    holm,
    majority_at_k,
    majority_labels,
    map_at_r,
    mean_average_precision,
    official_python_scorer,
    paired_sign_flip,
    precision_at_k,
    recall_at_k,
    score_table,
)
from histo_utils.protocols import leave_one_out, train_gallery

cases = st.integers(0, 10**6)


def outcomes_of(seed, n=40, k=8, classes=3, names=True):
    """Random outcomes, not from a search."""
    rng = np.random.default_rng(seed)
    labels = np.array(["a", "b", "c", "d"])[:classes] if names else np.arange(classes)
    found = labels[rng.integers(0, classes, (n, k))]
    return pd.DataFrame(
        {
            "query": range(n),
            "label": labels[rng.integers(0, classes, n)],
            "predicted": found[:, 0],
            "patient": rng.integers(0, 6, n),
            "slide": 0,
            "neighbours": list(rng.integers(0, 99, (n, k))),
            "neighbour_labels": list(found),
            "distances": list(np.sort(rng.random((n, k)))),
            "relevant": rng.integers(1, k + 1, n),
        }
    )


def by_loops(outcomes, k):
    """The definitions, one query at a time."""
    rows = []
    for row in outcomes.itertuples():
        near = list(row.neighbour_labels[:k])
        hits = [name == row.label for name in near]
        votes = Counter(near)
        winner = next(name for name in near if votes[name] == max(votes.values()))
        precision = [sum(hits[: i + 1]) / (i + 1) for i in range(k)]
        ap = sum(p for p, hit in zip(precision, hits, strict=True) if hit)
        rows.append((sum(hits) / k, float(any(hits)), float(winner == row.label),
                     ap / max(sum(hits), 1)))  # fmt: skip
    return np.array(rows).T


@settings(max_examples=50, deadline=None)
@given(cases, st.integers(1, 8), st.integers(1, 4), st.booleans())
def test_metrics_equal_loops(seed, k, classes, names):
    out = outcomes_of(seed, classes=classes, names=names)
    expected = by_loops(out, k)
    functions = precision_at_k, recall_at_k, majority_at_k, mean_average_precision
    for function, their in zip(functions, expected, strict=True):
        np.testing.assert_allclose(function(out, k, per_query=True), their, atol=1e-12)
        assert function(out, k) == pytest.approx(their.mean())
    assert accuracy(out) == (out["predicted"] == out["label"]).mean()


@settings(max_examples=30, deadline=None)
@given(cases)
def test_map_at_r_equals_loops(seed):
    out = outcomes_of(seed)
    expected = []
    for row in out.itertuples():
        total = right = 0
        for i in range(row.relevant):
            if row.neighbour_labels[i] == row.label:
                right += 1
                total += right / (i + 1)
        expected.append(total / row.relevant)
    np.testing.assert_allclose(map_at_r(out, per_query=True), expected, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(cases, st.integers(2, 8))
def test_average_precision_equals_scikit_learn(seed, k):
    out = outcomes_of(seed)
    values = mean_average_precision(out, k, per_query=True)
    for row, value in zip(out.itertuples(), values, strict=True):
        hits = row.neighbour_labels[:k] == row.label
        if hits.any():
            assert value == pytest.approx(average_precision_score(hits, -np.arange(k)))
        else:
            assert value == 0


@settings(max_examples=20, deadline=None)
@given(cases)
def test_precision_and_map_at_r_equal_pytorch_metric_learning(seed):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(60, 5)).astype(np.float32)
    labels = np.concatenate([np.arange(4), np.arange(4), rng.integers(0, 4, 52)])
    table = pd.DataFrame({"label": labels})
    whole = Embeddings(vectors, table)
    largest = np.bincount(labels).max()
    names = "precision_at_1", "mean_average_precision_at_r"
    judge = AccuracyCalculator(
        include=names, k="max_bin_count", device=torch.device("cpu")
    )
    out = leave_one_out(whole, largest - 1, metric="euclidean")
    their = judge.get_accuracy(torch.from_numpy(vectors), torch.from_numpy(labels))
    assert precision_at_k(out) == pytest.approx(their[names[0]])
    assert map_at_r(out) == pytest.approx(their[names[1]])
    q, g = whole.take(np.arange(20)), whole.take(np.arange(20, 60))
    if not set(labels[:20]) <= set(labels[20:]):
        return
    out = train_gallery(
        q, g, np.bincount(labels[20:]).max(), metric="euclidean",
        allow_shared_patients=True,
    )  # fmt: skip
    their = judge.get_accuracy(
        torch.from_numpy(vectors[:20]), torch.from_numpy(labels[:20]),
        torch.from_numpy(vectors[20:]), torch.from_numpy(labels[20:]),
    )  # fmt: skip
    assert precision_at_k(out) == pytest.approx(their[names[0]])
    assert map_at_r(out) == pytest.approx(their[names[1]])


def test_values_by_hand():
    out = pd.DataFrame(
        {
            "label": ["a", "a"],
            "predicted": ["a", "b"],
            "neighbours": [np.arange(4)] * 2,
            "neighbour_labels": [np.array(list("abba")), np.array(list("baab"))],
            "relevant": [2, 3],
        }
    )
    assert precision_at_k(out, 1) == 0.5
    assert recall_at_k(out, 2) == 1
    assert majority_labels(out, 4).tolist() == ["a", "b"]  # two votes each: nearest
    assert majority_at_k(out, 3, per_query=True).tolist() == [0, 1]
    assert mean_average_precision(out) == pytest.approx(
        np.mean([(1 + 2 / 4) / 2, (1 / 2 + 2 / 3) / 2])
    )
    assert map_at_r(out) == pytest.approx(np.mean([1 / 2, (1 / 2 + 2 / 3) / 3]))


def test_outcomes_that_cannot_answer():
    out = outcomes_of(0)
    with pytest.raises(ValueError, match="k=9 but the outcomes hold 8 neighbours; run"):
        recall_at_k(out, 9)
    with pytest.raises(ValueError, match="run the protocol with k=12"):
        map_at_r(out.assign(relevant=12))
    classifier = out.assign(neighbours=None, neighbour_labels=None)
    with pytest.raises(ValueError, match="come from a classifier"):
        precision_at_k(classifier, 1)
    with pytest.raises(ValueError, match="there are no outcomes"):
        precision_at_k(out.iloc[:0])


def test_eta_golden(golden):
    expected = json.loads((golden / "eta_metrics.json").read_text())
    confusion = np.load(golden / "dml_published_confusion.npz")["confusion"]
    true, predicted = (
        np.repeat(codes.ravel(), confusion.ravel()) for codes in np.indices((24, 24))
    )
    etas = eta_scores(true, predicted, 24)
    published = expected["published"]
    np.testing.assert_allclose(etas, [published[k] for k in published], rtol=1e-12)
    np.testing.assert_allclose(etas, [0.9788679, 0.9699728, 0.9494752], atol=5e-8)
    eta_p, eta_w, eta_total = official_python_scorer(true, predicted, 24)
    column = expected["recomputed_column_normalised_as_official_python_script"]
    assert eta_p == etas[0]
    assert (eta_w, eta_total) == pytest.approx((column["eta_w"], column["eta_total"]))
    assert round(100 * eta_w, 3) == 97.194


def test_eta_toy(golden):
    toy = json.loads((golden / "eta_metrics.json").read_text())["toy"]
    true, predicted = toy["y_true"], toy["y_pred"]
    paper, script = toy["paper_formula"], toy["official_CalculateError_py_logic"]
    assert eta_scores(true, predicted, 3) == pytest.approx(tuple(paper.values()))
    their = [value / 100 for value in script.values()]
    assert official_python_scorer(true, predicted, 3) == pytest.approx(tuple(their))
    names = np.array(["x", "y", "z"])
    assert eta_scores(names[true], names[predicted], 3) == pytest.approx(
        tuple(paper.values())
    )


@settings(max_examples=30, deadline=None)
@given(cases, st.integers(2, 6))
def test_eta_equals_scikit_learn(seed, classes):
    rng = np.random.default_rng(seed)
    true = np.concatenate([np.arange(classes), rng.integers(0, classes, 40)])
    predicted = rng.integers(0, classes, len(true))
    eta_p, eta_w, eta_total = eta_scores(true, predicted, classes)
    assert eta_p == pytest.approx((true == predicted).mean())
    assert eta_w == pytest.approx(balanced_accuracy_score(true, predicted))
    assert eta_total == pytest.approx(eta_p * eta_w)


@pytest.mark.parametrize("score", [eta_scores, official_python_scorer])
def test_eta_bad_input(score):
    with pytest.raises(ValueError, match="class 1 has no test items"):
        score([0, 0, 2], [0, 1, 2], 3)
    with pytest.raises(ValueError, match="y_true holds 2 of 3 classes"):
        score(["a", "b"], ["a", "b"], 3)
    with pytest.raises(ValueError, match="y_pred holds 'c', not a class of y_true"):
        score(["a", "b"], ["a", "c"], 2)
    with pytest.raises(ValueError, match="y_pred holds 3, outside the classes 0 … 1"):
        score([0, 1], [0, 3], 2)
    with pytest.raises(ValueError, match="two lists of the same length"):
        score([0, 1], [0], 2)
    with pytest.raises(ValueError, match="never predicted"):
        official_python_scorer([0, 1], [0, 0], 2)


def test_table_of_kieffer_does_not_multiply(golden):
    table = json.loads((golden / "kieffer_table1.json").read_text())
    off = {
        name: abs(p * w / 100 - total)
        for name, (p, w, total) in table["kieffer2017_table1_percent"].items()
    }
    assert [name for name, error in off.items() if error > 0.02] == ["CNN1"]


def test_cutoff_score_of_random_vectors(golden):
    expected = json.loads((golden / "eta_metrics.json").read_text())
    counts = expected["kimia_path24_test_counts"]
    labels = np.repeat(np.arange(24), counts)
    scores = [
        cumulative_cutoff_score(
            np.random.default_rng(s).normal(size=(1325, 64)), labels
        )
        for s in range(8)
    ]
    mean = np.mean(scores, axis=0)
    assert abs(mean[0] - 0.529) < 0.012
    theirs = expected["ffnir_metric_random_expectation"]
    np.testing.assert_allclose(mean[:2], list(theirs.values()), atol=0.015)


def test_cutoff_score_golden_and_its_order(golden):
    expected = json.loads((golden / "eta_metrics.json").read_text())["ffnir_metric_toy"]
    toy = np.load(golden / "retrieval_toy.npz")
    score = cumulative_cutoff_score(toy["X"], toy["y"])
    np.testing.assert_allclose(score, expected["published_code"], rtol=1e-12)
    order = np.argsort(-toy["y"], kind="stable")
    assert cumulative_cutoff_score(toy["X"][order], toy["y"][order]) != score
    with pytest.raises(ValueError, match="class '0' comes back at row 3"):
        cumulative_cutoff_score(np.eye(4), [0, 0, 1, 0])
    with pytest.raises(ValueError, match="row 1 of the vectors holds NaN"):
        cumulative_cutoff_score([[0.0], [np.nan]], [0, 1])
    with pytest.raises(ValueError, match="for 3 labels"):
        cumulative_cutoff_score(np.eye(4), [0, 0, 1])


def test_bootstrap_equals_loops():
    rng = np.random.default_rng(0)
    values, groups = rng.random(50), rng.integers(0, 7, 50)
    interval = bootstrap_ci(values, groups, n_boot=300, seed=5)
    draws = np.random.default_rng(5).integers(0, 7, (300, 7))
    names = pd.unique(groups)
    means = [
        np.concatenate([values[groups == names[g]] for g in draw]).mean()
        for draw in draws
    ]
    assert interval == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    pairs = np.stack([values, values], 1)
    general = bootstrap_ci(
        pairs, groups, n_boot=300, seed=5, statistic=lambda rows: rows[:, 1].mean()
    )
    assert interval == pytest.approx(general)


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(1).normal(size=80)
    ours = bootstrap_ci(values, n_boot=20_000)
    their = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=0
    ).confidence_interval
    np.testing.assert_allclose(ours, [their.low, their.high], atol=0.01)


def test_bootstrap_over_patients_is_wider_than_over_patches():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(10), 30)
    values = rng.normal(size=10)[groups] + 0.1 * rng.normal(size=300)
    by_patient, by_patch = bootstrap_ci(values, groups), bootstrap_ci(values)
    assert np.ptp(by_patient) > 3 * np.ptp(by_patch)


def test_bootstrap_is_repeatable_and_in_chunks(monkeypatch):
    from histo_utils import metrics

    values, groups = np.random.default_rng(0).random(60), np.arange(60) % 20
    first = bootstrap_ci(values, groups)
    assert first == bootstrap_ci(values, groups)
    assert first != bootstrap_ci(values, groups, seed=1)
    monkeypatch.setattr(metrics, "_CELLS", 64)
    assert first == bootstrap_ci(values, groups)


@pytest.mark.parametrize(
    ("values", "groups", "message"),
    [
        ([0.0, np.nan], None, "value 1 is NaN"),
        ([0.0, 1.0], ["a"], "2 values but 1 groups"),
        ([0.0, 1.0], ["a", "a"], "1 group; an interval over groups"),
        ([0.0, 1.0], ["a", None], "value 1 has no group"),
        ([], None, "0 group"),
    ],
)
def test_bootstrap_bad_input(values, groups, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_ci(values, groups)
    with pytest.raises(ValueError, match="level=95"):
        bootstrap_ci([0, 1], level=95)


def test_sign_flip_is_exact_for_few_patients():
    rng = np.random.default_rng(2)
    groups = np.repeat(list("abcdefg"), [1, 5, 2, 2, 3, 1, 4])
    a, b = rng.random(18) + 0.2, rng.random(18)
    found = paired_sign_flip(a, b, groups)
    each = [(a - b)[groups == g].mean() for g in "abcdefg"]
    far = [
        abs(np.dot(signs, each)) >= abs(sum(each)) - 1e-12
        for signs in product([-1, 1], repeat=7)
    ]
    assert found.p == np.mean(far)
    assert found.difference == pytest.approx(np.mean(each))
    assert found.n == 7
    assert found.low < found.difference < found.high
    their = stats.permutation_test(
        (np.array(each),), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert found.p == pytest.approx(their.pvalue)


def test_sign_flip_by_monte_carlo():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=30) + 1.5, rng.normal(size=30)
    assert paired_sign_flip(a, b, n_flips=999).p <= 0.01
    assert paired_sign_flip(a, b, n_flips=999).p >= 1 / 1000
    null = [
        paired_sign_flip(*rng.normal(size=(2, 20)), n_flips=199).p for _ in range(400)
    ]
    assert abs(np.mean(np.array(null) <= 0.1) - 0.1) < 0.04
    assert paired_sign_flip(a, a).p == 1
    assert paired_sign_flip(a, b) == paired_sign_flip(a, b)
    swapped = paired_sign_flip(b, a)
    assert swapped.difference == -paired_sign_flip(a, b).difference
    with pytest.raises(ValueError, match="on the same queries"):
        paired_sign_flip(a, b[:5])


def test_holm_by_hand():
    p = [0.01, 0.04, 0.03, 0.005]
    np.testing.assert_allclose(holm(p), [0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]).tolist() == [1, 1]
    assert holm([]).tolist() == []
    with pytest.raises(ValueError, match="numbers 0–1"):
        holm([0.1, np.nan])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_equals_loops(p):
    order = sorted(range(len(p)), key=lambda i: p[i])
    expected, worst = {}, 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        expected[i] = worst
    np.testing.assert_allclose(holm(p), [expected[i] for i in range(len(p))])


def test_detectable_difference():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(43), 16)
    differences = rng.normal(size=43)[groups] + rng.normal(size=len(groups))
    each = pd.Series(differences).groupby(groups).mean()
    expected = (stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * each.std() / np.sqrt(43)
    assert detectable_difference(differences, groups) == pytest.approx(expected)
    # A shift of this size is found in about 80 of 100 repetitions.
    size = detectable_difference(rng.normal(size=4000)) * np.sqrt(4000 / 60)
    found = [
        stats.ttest_1samp(rng.normal(size, 1, 60), 0).pvalue < 0.05 for _ in range(800)
    ]
    assert abs(np.mean(found) - 0.8) < 0.05


def test_score_table():
    out = outcomes_of(0)
    table = score_table(out, n_boot=200).set_index("metric")
    assert table.loc["precision@3", "value"] == precision_at_k(out, 3)
    assert "recall@10" not in table.index
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()
    assert table["groups"].unique() == [out["patient"].nunique()]
    low, high = bootstrap_ci(
        recall_at_k(out, 5, per_query=True), out["patient"], n_boot=200
    )
    assert tuple(table.loc["recall@5", ["low", "high"]]) == (low, high)
    classifier = out.assign(neighbours=None, neighbour_labels=None, relevant=None)
    assert score_table(classifier)["metric"].tolist() == ["accuracy"]
