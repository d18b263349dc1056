"""The bench's tasks and reports."""

import numpy as np
import pandas as pd
import pytest

from histo_utils import bench, metrics, protocols, statistics


def test_quarters_of_a_region(bench_archive):
    found = pd.Series(bench.quarters(bench_archive.table)).value_counts().to_dict()
    assert found == {"upper": 64, "lower left": 32, "lower right": 32}
    corner = bench.quarters(bench_archive.table.query("x == 750 and y >= 500"))
    assert "upper" in corner, "the middle is that of the patches given"


def test_tasks_search_where_they_say(bench_archive):
    found = bench.tasks(bench_archive, k=3, metric="euclidean")
    where = bench.quarters(bench_archive.table)
    assert len(found["scan_leave_one_out"]) == 128
    assert len(found["scan_split"]) == (where == "lower right").sum()
    assert len(found["scan_choice"]) == (where == "lower left").sum()
    assert set(found["scan_split"]["label"]) == set(bench_archive.table["slide"])
    near = np.stack(found["organ"]["neighbours"])
    patients = bench_archive.table["patient"].to_numpy()
    assert (patients[near] != patients[:, None]).all()
    least = metrics.accuracy(found["scan_not_touching"])
    assert least <= metrics.accuracy(found["scan_leave_one_out"])


def test_scored_counts_patients(bench_archive):
    out = protocols.leave_one_patient_out(bench_archive, 1)
    right = metrics.accuracy(out, per_query=True)
    found = bench.scored(right, out["patient"], n_boot=200)
    assert found["n"] == 8 and found["queries"] == 128
    assert found["low"] <= found["score"] <= found["high"]


def test_macro_weighs_classes_alike():
    out = pd.DataFrame(
        {"label": list("aaab"), "predicted": list("aaaa"), "patient": range(4)}
    )
    found = bench.macro(out, n_boot=50)
    assert found["score"] == 0.5 and found["n"] == 4


def test_compared_weighs_patients_alike():
    found = bench.compared([1, 1, 1, 0], [0, 0, 0, 0], ["p", "p", "p", "q"])
    assert found["difference"] == 0.5 and found["n"] == 2


def test_galleries_ask_the_same_queries(bench_archive):
    found = bench.galleries(bench_archive, metric="euclidean")
    assert {len(out) for out in found.values()} == {32}
    first = found["training_half"]["slide"].tolist()
    assert all(out["slide"].tolist() == first for out in found.values())
    assert set(found["test_among_test"]["relevant"]) == {3}
    assert set(found["training_half"]["relevant"]) == {8}


def test_exclusions_start_from_the_query_itself(bench_archive):
    found = bench.exclusions(bench_archive, metric="euclidean")
    assert list(found) == ["nothing", "self", "touching", "slide", "patient"]
    assert metrics.accuracy(found["nothing"]) == 1


def test_report_says_what_was_not_run(bench_archive):
    out = protocols.leave_one_patient_out(bench_archive, 1)
    shown = bench.report(
        {
            "ours": {"P@1": bench.p_at_1(out), "difference": bench.compared(out, out)},
            "network": {},
        }
    )
    assert shown.loc["network"].tolist() == ["not run", "not run"]
    assert shown.loc["ours", "difference"].startswith(
        "+0.000 [+0.00,\u00a0+0.00]; p = 1"
    )


def test_report_writes_lists_and_numbers():
    shown = bench.report({"ours": {"seeds": [0.5, 0.25], "area": 0.12345, "why": "–"}})
    assert shown.loc["ours"].tolist() == ["0.500 0.250", "0.123", "–"]


def test_compared_by_patient_where_queries_differ(bench_archive):
    out = protocols.leave_one_patient_out(bench_archive, 1)
    fewer = out[::4]
    found = bench.compared(out, fewer)
    right = metrics.accuracy(out, per_query=True).reshape(8, 16)
    expected = (right.mean(1) - right[:, ::4].mean(1)).mean()
    assert found["difference"] == pytest.approx(expected) and found["n"] == 8


def test_summary_and_family(bench_archive):
    runs = {
        "a": bench.tasks(bench_archive),
        "b": bench.tasks(bench_archive, metric="euclidean"),
    }
    row = bench.summary(runs["a"], bench_archive.table["site"])
    assert {"organ", "macro", "A", "B"} <= set(row) and row["A"]["n"] == 4
    assert "A" not in bench.summary(runs["a"])
    found = bench.family(runs, "a", ["b"], ["scan_split", "organ"])["b"]
    p = [comparison["p"] for comparison in found.values()]
    adjusted = [comparison["p_holm"] for comparison in found.values()]
    np.testing.assert_allclose(adjusted, statistics.holm(p))


def test_sides_and_column():
    found = pd.DataFrame(
        {"patient": [0, 0, 1, 1], "within": [1, 1, 1, 0], "across": [0, 0, 1, 0],
         "chance_within": 0.5, "chance_across": 0.25}
    )  # fmt: skip
    row = bench.sides(found)
    assert row["within"]["score"] == 0.75 and row["patients"] == 2
    assert row["difference"]["difference"] == 0.5 and row["chance_across"] == 0.25
    cells = {name: row[name] for name in ("within", "across")}
    assert bench.column({"ours": cells}, "score")["ours"].tolist() == [0.75, 0.25]
