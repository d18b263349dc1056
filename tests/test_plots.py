"""Pictures say what they were given."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from histo_utils import plots


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def row(score):
    return {"score": score, "low": score - 0.1, "high": score + 0.1}


def test_forest_has_a_panel_a_task_and_says_what_was_not_run():
    panels = {f"task {i}": {"ours": row(0.5), "planned": None} for i in range(4)}
    figure = plots.forest(panels, dict.fromkeys(panels, 0.2), columns=3)
    drawn = [ax for ax in figure.axes if ax.axison]
    assert [ax.get_title() for ax in drawn] == list(panels)
    names = [text.get_text() for text in drawn[0].get_yticklabels()]
    assert names == ["ours", "planned"]
    assert all([t.get_text() for t in ax.texts] == ["not run"] for ax in drawn)


def test_confusion_rows_sum_to_their_queries():
    outcomes = pd.DataFrame(
        {"label": list("aaab"), "predicted": list("aabc"), "patient": list("1223")}
    )
    _, ax = plt.subplots()
    counts = plots.confusion(ax, outcomes)
    assert counts.loc["a"].tolist() == [2, 1, 0]
    assert counts.loc["b"].tolist() == [0, 0, 1]
    rows = [text.get_text() for text in ax.get_yticklabels()]
    assert rows == ["a (3 of 2)", "b (1 of 1)"]
    assert [text.get_text() for text in ax.texts] == ["67", "33", "0", "0", "0", "100"]


def test_scatter_by_gives_a_value_its_own_colour():
    _, ax = plt.subplots()
    plots.scatter_by(ax, np.eye(3)[:, :2], ["lung", "breast", "lung"])
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["breast", "lung"]
    drawn = [len(c.get_offsets()) for c in ax.collections]
    assert drawn == [1, 2]
    colours = [matplotlib.colors.to_hex(c.get_facecolor()[0]) for c in ax.collections]
    assert colours == [plots.colour_of(name).lower() for name in names]


def test_heat_covers_the_image_and_hides_nothing_where_it_is_cold():
    _, ax = plt.subplots()
    heat = np.array([[0.0, 0.5], [0.25, 1.0]])
    plots.show_heat(ax, np.full((40, 60, 3), 200, np.uint8), heat, mpp=0.5)
    tissue, over = ax.images
    assert tuple(over.get_extent()) == tuple(tissue.get_extent())
    np.testing.assert_array_equal(over.get_array(), heat)
    np.testing.assert_allclose(over.get_alpha(), 0.65 * heat)
    assert over.get_clim() == (0, 1)
    assert len(ax.artists) == 1
    for wrong in (heat * 2, heat[None], heat * np.nan):
        with pytest.raises(ValueError, match=r"expected \(u, v\), 0–1"):
            plots.show_heat(ax, np.zeros((4, 4, 3), np.uint8), wrong)


def test_retrieval_atlas_has_one_scale_bar():
    image = np.zeros((20, 20, 3), np.uint8)
    search = [(image, "lung", "#332288")] * 4
    figure = plots.retrieval_atlas([search, search[:3]], ["first", "second"], mpp=0.5)
    shown = [ax for ax in figure.axes if ax.images]
    assert len(shown) == 7
    assert [len(ax.artists) for ax in shown] == [1] + [0] * 6
    labels = [ax.get_ylabel() for ax in shown if ax.get_ylabel()]
    assert labels == ["first", "second"]


def test_neighbours_kept_by_hand_and_by_loops():
    line = np.float64([[0], [1], [3], [7]])
    assert plots.neighbours_kept(line, line, k=1).tolist() == [1, 1, 1, 1]
    moved = np.float64([[0], [1], [3], [-2.5]])  # the last now lies beside the first
    assert plots.neighbours_kept(line, moved, k=1).tolist() == [1, 1, 1, 0]
    rng = np.random.default_rng(0)
    vectors, points = rng.standard_normal((30, 8)), rng.standard_normal((30, 2))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    found = []
    for i in range(30):
        others = [j for j in range(30) if j != i]
        space = sorted(others, key=lambda j: -unit[i] @ unit[j])[:5]
        plane = sorted(others, key=lambda j: np.linalg.norm(points[i] - points[j]))[:5]
        found.append(len({*space} & {*plane}) / 5)
    kept = plots.neighbours_kept(vectors, points, k=5, metric="cosine")
    np.testing.assert_allclose(kept, found)
    with pytest.raises(ValueError, match="k=30 for 30 points"):
        plots.neighbours_kept(vectors, points, k=30)
