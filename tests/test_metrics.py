import json
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.metrics import balanced_accuracy_score

from histo_utils.embeddings import Embeddings
from histo_utils.metrics import (
    accuracy,
    cumulative_cutoff_score,
    eta_scores,
    majority_at_k,
    majority_labels,
    map_at_r,
    mean_average_precision,
    official_python_scorer,
    precision_at_k,
    recall_at_k,
)
from histo_utils.protocols import leave_one_out

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


@settings(max_examples=30, deadline=None)
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
    with pytest.raises(ValueError, match="y_pred holds 'c', which is not one"):
        score(["a", "b"], ["a", "c"], 2)
    with pytest.raises(
        ValueError, match="y_pred holds 3, which is not one of the classes 0 … 1"
    ):
        score([0, 1], [0, 3], 2)
    with pytest.raises(ValueError, match="two lists of the same length"):
        score([0, 1], [0], 2)
    with pytest.raises(ValueError, match="never predicted"):
        official_python_scorer([0, 1], [0, 0], 2)


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
