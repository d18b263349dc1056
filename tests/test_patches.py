import numpy as np
import pandas as pd
import pytest
from PIL import Image

from histo_utils.patches import (
    assign_folds,
    check_patches,
    leakage_report,
    read_patch,
    touching_pairs,
)


def test_what_is_wrong_with_a_table_is_said(patches):
    assert check_patches(patches) is patches
    with pytest.raises(ValueError, match="no column patient"):
        check_patches(patches.drop(columns="patient"))
    with pytest.raises(ValueError, match="empty"):
        check_patches(patches.iloc[:0])
    missing = patches["slide"].where(patches.index != 4)
    with pytest.raises(ValueError, match="1 rows have no slide, the first is row 4"):
        check_patches(patches.assign(slide=missing))
    with pytest.raises(ValueError, match="row 2: size=0"):
        check_patches(patches.assign(size=[100, 100, 0] + [100] * 9))
    split = ["train"] * 11 + ["test"]
    with pytest.raises(ValueError, match=r"1 patients are in more than one split.* p3"):
        check_patches(patches.assign(split=split))


def test_a_missing_patient_stays_missing(patches):
    """It is no name of its own, and no two missing ones are the same patient."""
    table = patches.assign(patient=None, split=["train", "test"] * 6)
    assert check_patches(table)["patient"].isna().all()
    with pytest.raises(ValueError, match=r"no patient.* or leave it missing \(None\)"):
        check_patches(table.assign(patient=""))
    with pytest.raises(ValueError, match=r"row 0 has no patient.*group=.slide"):
        assign_folds(table, 2)
    assert assign_folds(table, 4, group="slide").nunique() == 4
    report = leakage_report(table, pixels=False).set_index("check")
    row = report.loc["patients in more than one split"]
    assert row.tolist() == [0, 0, "12 patches have no patient"]
    assert not report.index.str.startswith("labels").any()


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


def test_no_patient_is_ever_divided(patches):
    rng = np.random.default_rng(3)
    table = pd.DataFrame({"patient": rng.integers(0, 40, 500).astype(str)})
    table["label"] = table["patient"].astype(int) % 4
    for seed in range(5):
        fold = assign_folds(table, seed=seed)
        assert fold.groupby(table["patient"]).nunique().max() == 1
        # every label in every fold
        assert (pd.crosstab(table["label"], fold) > 0).all(axis=None)
        pd.testing.assert_series_equal(fold, assign_folds(table, seed=seed))
    assert not assign_folds(table, seed=0).equals(assign_folds(table, seed=1))
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


def test_planted_leaks_are_found(write_slide, patches):
    rng = np.random.default_rng(6)
    pixels = rng.integers(0, 256, (100, 400, 3), np.uint8)
    other = rng.integers(0, 256, (100, 400, 3), np.uint8)
    other[:, 300:400] = pixels[:, :100]  # s3's last patch is s0's first
    files = [write_slide(f"{n}.tif", p) for n, p in (("a", pixels), ("b", other))]
    clean = patches.iloc[[0, 1, 2, 9, 10, 11]].reset_index(drop=True)
    clean["image"] = np.repeat([str(f) for f in files], 3)
    clean["split"] = ["train"] * 3 + ["test"] * 3
    report = leakage_report(clean).set_index("check")
    assert report["found"]["patients in more than one split"] == 0
    identical = report.loc["identical images in more than one split"]
    assert (identical["found"], identical["of"]) == (1, 5)
    assert report["found"]["touching patches in different splits"] == 0
    assert report["found"]["labels with a single site"] == 2
    leaky = clean.assign(split=["train", "test"] * 3)
    report = leakage_report(leaky).set_index("check")
    assert report.loc["patients in more than one split", "found"] == 2
    assert report.loc["touching patches in different splits", "found"] == 2
    assert report.loc["touching patches in different splits", "of"] == 2
    assert "Cramér's V 1.00" in report.loc["labels with a single site", "detail"]
    with pytest.raises(ValueError, match="no column 'fold'"):
        leakage_report(clean, "fold")
