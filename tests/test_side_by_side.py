"""Systems side by side: by hand on few queries, and both ways to ask on a bench."""

import numpy as np
import pandas as pd
import pytest

from histo_utils import side_by_side, trials
from histo_utils.metrics import accuracy
from histo_utils.statistics import holm


def run(hits, patients="aabbcc"):
    said = np.where(np.array(hits), "x", "y")
    return pd.DataFrame({
        "query": range(len(hits)), "label": "x", "predicted": said,
        "patient": list(patients),
    })  # fmt: skip


ASKED = {
    "one": {"A": [run([1, 1, 1, 0, 1, 1]), run([1, 1, 1, 0, 0, 1])],
            "B": [run([0, 1, 0, 0, 1, 1])]},
    "two": {"B": [run([1, 0, 1, 0, 1, 0])], "C": [run([1, 1, 1, 1, 1, 1])]},
}  # fmt: skip


def test_scores_and_differences_by_hand():
    scores = side_by_side.scores(ASKED, n_boot=50)
    assert list(scores) == ["one, A", "one, B", "two, B", "two, C"]
    assert scores["one, A"]["score"] == pytest.approx((5 / 6 + 4 / 6) / 2)
    assert scores["one, A"]["seeds"] == pytest.approx([5 / 6, 4 / 6])
    pairs = [("A", "B"), ("C", "B"), ("C", "A")]
    found = side_by_side.differences(ASKED, pairs)
    assert list(found) == ["one: A − B", "two: C − B"]  # where both were asked
    # patients of A: 1, 1/2, (1 + 1/2) / 2; of B: 1/2, 0, 1
    by_hand = np.mean([1 - 0.5, 0.5 - 0, 0.75 - 1])
    assert found["one: A − B"]["difference"] == pytest.approx(by_hand)
    adjusted = holm([line["p"] for line in found.values()])
    np.testing.assert_allclose([line["p_holm"] for line in found.values()], adjusted)
    text = side_by_side.score_table(scores).loc["one, A"]
    assert text["seeds"] == "0.833 0.667" and text["patients"] == 3
    assert (
        "+0.25" in side_by_side.difference_table(found).loc["one: A − B", "difference"]
    )


def test_recalls_from_fixed_counts():
    one = run([1, 0, 1, 1, 0, 1], "aabbcd")
    groups = np.array(["g", "g", "g", "h", "h", "h", "not asked"])
    found = side_by_side.recalls([one, run([1, 1, 1, 1, 0, 1], "aabbcd")], groups)
    assert found["g"]["score"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["g"]["n"] == 2 and np.isnan(found["g"]["low"])
    assert found["h"]["score"] == pytest.approx(2 / 3)
    assert found["h"]["n"] == 3 and found["h"]["low"] <= 2 / 3 <= found["h"]["high"]


def test_each_task_is_asked_in_its_two_ways(bench_archive):
    table, vectors = bench_archive.table, bench_archive.vectors
    organ, scan = (trials.splits(table, task) for task in trials.TASKS[::-1])
    found = side_by_side.ask(table, organ, [0.1], vectors)
    assert list(found) == ["nearest neighbour", "logistic regression"]
    for outcome in found.values():
        assert outcome["query"].tolist() == list(range(128))  # each asked once
    each = side_by_side.ask(table, organ, [0.1], [vectors] * len(organ))
    for way, outcome in found.items():
        np.testing.assert_array_equal(outcome["predicted"], each[way]["predicted"])
    # one split's own vectors are asked for its own test patches alone
    other = [vectors, *[np.zeros_like(vectors)] * (len(organ) - 1)]
    mixed = side_by_side.ask(table, organ, [0.1], other, metric="euclidean")
    plain = side_by_side.ask(table, organ, [0.1], vectors, metric="euclidean")
    same = [m["predicted"].to_numpy()[organ[0].test] for m in
            (mixed["logistic regression"], plain["logistic regression"])]  # fmt: skip
    np.testing.assert_array_equal(*same)
    found = side_by_side.ask(table, scan, [0.1], vectors)
    assert list(found) == ["nearest neighbour", "neighbour apart"]
    assert accuracy(found["nearest neighbour"]) >= accuracy(found["neighbour apart"])
    assert set(found["nearest neighbour"]["label"]) == set(table["slide"])
