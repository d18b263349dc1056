import numpy as np
import pandas as pd
import pytest
from PIL import Image

from histo_utils.patches import (
    assign_folds,
    assign_splits,
    check_patches,
    cramers_v,
    leakage_report,
    load_patches,
    patch_hashes,
    read_patch,
    save_patches,
    touching_pairs,
)


def test_a_table_survives_saving(patches, tmp_path):
    save_patches(patches, tmp_path / "new" / "patches.parquet")
    pd.testing.assert_frame_equal(
        load_patches(tmp_path / "new" / "patches.parquet"), patches
    )
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["patches.parquet"]


def test_what_is_wrong_with_a_table_is_said(patches):
    with pytest.raises(ValueError, match="no column patient"):
        check_patches(patches.drop(columns="patient"))
    with pytest.raises(ValueError, match="empty"):
        check_patches(patches.iloc[:0])
    with pytest.raises(ValueError, match="1 rows have no patient, the first is row 4"):
        check_patches(
            patches.assign(patient=patches["patient"].where(patches.index != 4))
        )
    with pytest.raises(ValueError, match="row 2: size=0"):
        check_patches(patches.assign(size=[100, 100, 0] + [100] * 9))
    split = ["train"] * 11 + ["test"]
    with pytest.raises(ValueError, match=r"1 patients are in more than one split.* p3"):
        check_patches(patches.assign(split=split))


def test_a_bad_table_leaves_no_file(patches, tmp_path):
    with pytest.raises(ValueError, match="no column"):
        save_patches(patches.drop(columns="x"), tmp_path / "a.parquet")
    assert list(tmp_path.iterdir()) == []


def test_read_patch_takes_series_dict_and_tuple(write_slide, patches):
    pixels = np.random.default_rng(1).integers(0, 256, (400, 600, 3), np.uint8)
    table = patches.assign(image=str(write_slide("a.tif", pixels)))
    row = table.iloc[2]
    expected = pixels[:100, 300:400]
    assert np.array_equal(read_patch(row), expected)
    assert np.array_equal(read_patch(row.to_dict()), expected)
    assert np.array_equal(read_patch(list(table.itertuples())[2]), expected)


def test_an_image_of_unknown_scale_gives_its_own_pixels(tmp_path):
    pixels = np.random.default_rng(2).integers(0, 256, (224, 224, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "tile.png")
    row = {"image": tmp_path / "tile.png", "x": 0, "y": 0, "size": 224, "mpp": np.nan}
    assert np.array_equal(read_patch(row), pixels)


@pytest.mark.parametrize("assign", [assign_splits, assign_folds])
def test_no_patient_is_ever_divided(assign):
    rng = np.random.default_rng(3)
    table = pd.DataFrame({"patient": rng.integers(0, 40, 500).astype(str)})
    table["label"] = table["patient"].astype(int) % 4
    for seed in range(5):
        part = assign(table, seed=seed)
        assert part.groupby(table["patient"]).nunique().max() == 1
        # every label in every part
        assert (pd.crosstab(table["label"], part) > 0).all(axis=None)
        pd.testing.assert_series_equal(part, assign(table, seed=seed))
    assert not assign(table, seed=0).equals(assign(table, seed=1))


def test_shares_of_a_split_by_hand():
    table = pd.DataFrame({"patient": range(20), "label": [0] * 10 + [1] * 10})
    part = assign_splits(table, validation=0.1, test=0.3)
    assert part.value_counts().to_dict() == {"train": 12, "test": 6, "validation": 2}
    by_label = pd.crosstab(table["label"], part)
    assert by_label["test"].tolist() == [3, 3]


def test_impossible_splits(patches):
    with pytest.raises(ValueError, match="leave something to train on"):
        assign_splits(patches, validation=0.5, test=0.5)
    with pytest.raises(ValueError, match="n_folds=5 for 4 groups"):
        assign_folds(patches, 5)


def test_touching_pairs_against_a_loop():
    rng = np.random.default_rng(4)
    table = pd.DataFrame(
        {"slide": rng.integers(0, 3, 60), "x": rng.integers(0, 12, 60) * 50}
    ).assign(y=lambda t: rng.integers(0, 12, len(t)) * 50, size=50, mpp=0.5)
    table["slide_mpp"] = 0.25  # a side is 100 level-0 pixels
    expected = set()
    for i, a in table.iterrows():
        for j, b in table.iterrows():
            near = abs(a["x"] - b["x"]) <= 100 and abs(a["y"] - b["y"]) <= 100
            if i < j and a["slide"] == b["slide"] and near:
                expected.add((i, j))
    assert set(map(tuple, touching_pairs(table).tolist())) == expected


def test_cramers_v_against_scipy():
    from scipy.stats.contingency import association

    rng = np.random.default_rng(5)
    a, b = rng.integers(0, 4, 200), rng.integers(0, 3, 200)
    assert cramers_v(a, b) == pytest.approx(association(pd.crosstab(a, b), "cramer"))


def test_planted_leaks_are_found(write_slide, patches):
    rng = np.random.default_rng(6)
    pixels = rng.integers(0, 256, (100, 400, 3), np.uint8)
    other = rng.integers(0, 256, (100, 400, 3), np.uint8)
    other[:, 300:400] = pixels[:, :100]  # s3's last patch is s0's first
    files = [write_slide(f"{n}.tif", p) for n, p in (("a", pixels), ("b", other))]
    clean = patches.iloc[[0, 1, 2, 9, 10, 11]].reset_index(drop=True)
    clean["image"] = np.repeat([str(f) for f in files], 3)
    clean["split"] = ["train"] * 3 + ["test"] * 3
    report = leakage_report(clean).set_index("check")["found"]
    assert report["patients in more than one split"] == 0
    assert report["identical images in more than one split"] == 1
    assert report["touching patches in different splits"] == 0
    assert report["labels with a single site"] == 2
    leaky = clean.assign(split=["train", "test"] * 3)
    report = leakage_report(leaky).set_index("check")
    assert report.loc["patients in more than one split", "found"] == 2
    assert report.loc["touching patches in different splits", "found"] == 2
    assert report.loc["touching patches in different splits", "of"] == 2
    assert "Cramér's V 1.00" in report.loc["labels with a single site", "detail"]
    assert patch_hashes(clean).nunique() == 5
    with pytest.raises(ValueError, match="no column 'fold'"):
        leakage_report(clean, "fold")
