"""Pictures say what they were given."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

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
    assert rows == ["a (3, 2)", "b (1, 1)"]
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


def test_outlines_are_in_pixels_of_the_thumbnail():
    class Slide:
        mpp = 0.25

    patches = pd.DataFrame({"x": [80], "y": [40], "size": [100], "mpp": [0.5]})
    _, ax = plt.subplots()
    plots.outline_patches(ax, patches, Slide(), mpp=2.0, fill=0.5)
    faces, edges = ax.collections
    assert edges.get_paths()[0].get_extents().bounds == (10, 5, 25, 25)
    assert faces.get_paths()[0].get_extents().bounds == (10, 5, 25, 25)


def test_a_class_has_one_colour_whatever_else_is_shown():
    for names in plots.CLASSES:
        assert len({plots.colour_of(name) for name in names}) == len(names)
    assert plots.colour_of("a name of no chapter") in plots.PALETTE


def test_a_tile_says_label_match_and_patient(tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    table = pd.DataFrame(
        {"image": str(tmp_path / "a.png"), "x": 0, "y": 0, "size": 8, "mpp": 0.5,
         "slide_mpp": 0.5, "label": ["lung", "colon"], "patient": "TCGA-AB-0001"}
    )  # fmt: skip
    image, title, colour = plots.tile(table, 0)
    assert image.shape == (8, 8, 3) and colour == plots.colour_of("lung")
    assert title == "lung\n…AB-0001"
    assert plots.tile(table, 0, table.iloc[0], "0.1")[1] == "✓ lung\n…AB-0001 0.1"
    assert plots.tile(table, 1, table.iloc[0])[1].startswith("✗ colon")
