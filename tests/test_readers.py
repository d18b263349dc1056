"""Readers of the papers' folders, on miniatures of them."""

from pathlib import Path

import miniatures
import numpy as np
import pandas as pd
import pytest
import tifffile

from histo_utils.catalog import patch_table
from histo_utils.patches import check_patches, read_patch
from histo_utils.readers.class_folders import (
    NCT_CLASSES,
    PATH24_CLASSES,
    convert_pannuke,
    read_class_folders,
    save_png,
)
from histo_utils.readers.tcga import (
    STUDIES,
    projects_of_sites,
    read_mosaics,
    weak_labels,
)

COLUMNS = {
    "image", "x", "y", "size", "mpp", "slide_mpp", "label", "slide", "patient",
}  # fmt: skip


def counts(table, by="split"):
    return table.groupby([by, "label"]).size().to_dict()


@pytest.mark.parametrize(
    ("make", "name"),
    [(miniatures.path24_rgb, None), (miniatures.path24c, "kimia_path24c")],
)
def test_colour_path24_comes_with_its_split(make, name, tmp_path):
    place = make(tmp_path, n_classes=11, n_train=2, n_test=1)
    table = patch_table(name or place, folder=place)
    assert set(table) == COLUMNS | {"split"}
    assert counts(table) == {("train", f"s{i}"): 2 for i in range(11)} | {
        ("test", f"s{i}"): 1 for i in range(11)
    }
    # in the order of the classes' numbers, not of their letters
    assert table["label"].unique().tolist() == list(PATH24_CLASSES[:11])
    assert (table[["slide", "patient"]].eq(table["label"], axis=0)).all(axis=None)
    assert (table[["mpp", "slide_mpp"]] == 0.5).all(axis=None)
    assert (table["size"] == miniatures.SIDE).all()
    for split, part in table.groupby("split"):
        assert len(check_patches(part)) == (22 if split == "train" else 11)


@pytest.mark.parametrize(("make", "n"), [("path24_rgb", 11), ("path24c", 24)])
def test_folders_of_path24_may_be_numbers(make, n, tmp_path):
    place = getattr(miniatures, make)(tmp_path, n_classes=n, n_train=2, n_test=1)
    expected = patch_table(place).drop(columns="image")
    for folder in list(place.glob("*/s*")):
        folder.rename(folder.with_name(folder.name[1:]))
    found = patch_table(place)
    pd.testing.assert_frame_equal(found.drop(columns="image"), expected)
    assert found["image"].map(lambda i: Path(i).parent.name[0]).str.isdigit().all()


def test_other_numbered_folders_are_not_path24(tmp_path):
    """0 and 1 are any two classes, unless all 24 are there or the release is named."""
    place = miniatures.path24c(tmp_path, n_classes=2)
    for folder in list(place.glob("*/s*")):
        folder.rename(folder.with_name(folder.name[1:]))
    table = patch_table(place)
    assert set(table["label"]) == {"0", "1"} and table["patient"].isna().all()
    assert table["mpp"].isna().all()


def test_path24c_lists_equal_training_files_once(tmp_path):
    place = miniatures.path24c(tmp_path)
    assert (place / "train/s0/s0_900.jpg").exists()
    table = patch_table(place)
    names = table["image"].map(lambda image: Path(image).name)
    assert "s0_0.jpg" in set(names) and "s0_900.jpg" not in set(names)
    # as long as another, but not equal: kept
    other = bytearray((place / "train/s1/s1_0.jpg").read_bytes())
    other[-1] ^= 1
    (place / "train/s1/s1_901.jpg").write_bytes(other)
    assert counts(patch_table(place))[("train", "s1")] == 5
    one_part = patch_table(place / "test")
    assert "split" not in one_part and set(one_part["slide"]) == {"s0", "s1", "s2"}


def test_nct_crc_trains_on_one_set_and_tests_on_the_other(tmp_path):
    place = miniatures.nct_crc(tmp_path, n_train=2, n_test=1)
    table = patch_table("nct_crc_he_100k", folder=place)
    assert set(table) == COLUMNS | {"split"}
    assert counts(table) == {("train", c): 2 for c in NCT_CLASSES} | {
        ("test", c): 1 for c in NCT_CLASSES
    }
    assert table["label"].unique().tolist() == list(NCT_CLASSES)
    assert (table[["mpp", "slide_mpp"]] == 0.5).all(axis=None)
    train = table[table["split"] == "train"]
    assert train["image"].str.contains("/NCT-CRC-HE-100K/").all()
    assert table["patient"].isna().all()  # no patient ids are published
    assert (table["slide"] == table["image"].map(lambda i: Path(i).stem)).all()
    row = table.iloc[4]
    assert np.array_equal(read_patch(row), tifffile.imread(row["image"]))
    # the same tiles in their own colours, beside the same test set
    (place / "NCT-CRC-HE-100K").rename(place / "NCT-CRC-HE-100K-NONORM")
    other = patch_table("nct_crc_he_100k_nonorm", folder=place)
    assert counts(other) == counts(table)
    (place / "NCT-CRC-HE-100K-NONORM" / "TUM").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"expected ADI, .*TUM; unpack"):
        patch_table(place)


def test_what_is_missing_is_fetched_and_nothing_else(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(
        "histo_utils.catalog.fetch", lambda name, folder: fetched.append(name)
    )
    place = miniatures.nct_crc(tmp_path)
    patch_table("nct_crc_he_100k", folder=place)
    assert fetched == []
    (place / "CRC-VAL-HE-7K").rename(tmp_path / "elsewhere")
    patch_table("nct_crc_he_100k", folder=place)
    with pytest.raises(FileNotFoundError, match=r"unpack CRC-VAL-HE-7K\.zip there"):
        patch_table("crc_val_he_7k", folder=place)
    assert fetched == ["crc_val_he_7k"]
    with pytest.raises(FileNotFoundError, match="into the folder train"):
        patch_table("kimia_path24c", folder=tmp_path / "none")
    assert fetched[1:] == ["kimia_path24c"]
    place = miniatures.path24c(tmp_path)
    (place / "test").rename(tmp_path / "test elsewhere")
    with pytest.raises(FileNotFoundError, match="archive into test"):
        patch_table("kimia_path24c", folder=place)


def test_other_folders_with_a_split_have_no_patients_and_no_scale(tmp_path):
    for part in ("train", "test"):
        save_png(np.zeros((8, 8, 3), np.uint8), tmp_path / part / "a" / "same.png")
    table = patch_table(tmp_path)
    assert table["split"].tolist() == ["train", "test"]
    assert table[["mpp", "patient"]].isna().all(axis=None)
    save_png(np.ones((8, 8), np.uint8), tmp_path / "test" / "a" / "same.png")
    assert read_patch(table.iloc[1]).sum() == 0  # what is there is kept
    save_png(np.zeros((8, 9), np.uint8), tmp_path / "train" / "a" / "long.png")
    with pytest.raises(ValueError, match=r"\(9, 8\) px; expected square"):
        read_class_folders(tmp_path)
    assert not list(tmp_path.rglob("*.part"))


def test_pannuke_becomes_folders_with_its_folds(tmp_path):
    place = miniatures.pannuke(tmp_path)
    with pytest.raises(FileNotFoundError, match="no 'Fold 1"):
        convert_pannuke(tmp_path, progress=False)
    convert_pannuke(place, progress=False)
    table = patch_table("pannuke", folder=place)
    assert set(table) == COLUMNS | {"fold"}
    tissues = ["Adrenal-gland", "Bile-duct", "Breast", "Colon"]
    assert counts(table, "fold") == {(k, t): 1 for k in (1, 2, 3) for t in tissues}
    assert (table[["mpp", "slide_mpp"]] == 0.25).all(axis=None)
    for row in table.to_dict("records"):
        fold, number = Path(row["image"]).stem.split("_")
        arrays = place / f"Fold {fold[-1]}" / "images" / fold
        assert np.array_equal(
            read_patch(row), np.load(arrays / "images.npy")[int(number)]
        )
        kind = np.load(arrays / "types.npy")[int(number)]
        assert row["label"] == str(kind).replace("_", "-")
        assert fold == f"fold{row['fold']}"


def test_pannuke_arrays_that_do_not_fit(tmp_path):
    place = miniatures.pannuke(tmp_path)
    arrays = place / "Fold 2" / "images" / "fold2"
    pixels = np.load(arrays / "images.npy")
    np.save(arrays / "images.npy", pixels[:-1])
    with pytest.raises(ValueError, match="and 4 types"):
        convert_pannuke(place, progress=False)
    pixels[3, 0, 0, 0] = 256
    np.save(arrays / "images.npy", pixels)
    with pytest.raises(ValueError, match=r"image 3 has values .* to 256"):
        convert_pannuke(place, progress=False)
    # an array of objects could run code when it is loaded
    np.save(arrays / "types.npy", np.array(["Breast"] * 4, object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        convert_pannuke(place, progress=False)


@pytest.fixture(scope="module")
def tcga(tmp_path_factory):
    return miniatures.tcga(tmp_path_factory.mktemp("tcga"))


@pytest.mark.slow
def test_tcga_patches_get_their_slides_project(tcga):
    mosaics = read_mosaics(tcga["mosaics"])
    assert mosaics["in_mosaic"].all() and mosaics["slide"].nunique() == 4
    table = check_patches(
        weak_labels(mosaics, projects=projects_of_sites(tcga["sites"]))
    )
    assert (table["label"] == table["slide"].map(tcga["projects"])).all()
    assert (table["patient"] == table["slide"].str[:12]).all()
    assert (table["site"] == table["slide"].str[5:7]).all()
    assert set(table["site"]) == {"05", "18"}
    assert table["patient"].nunique() == 4 and len(table) == len(mosaics)
    # places and scale are those of the mosaic: the patch can be read
    assert table[["x", "y"]].equals(mosaics[["x", "y"]])
    assert read_patch(table.iloc[0]).shape == (128, 128, 3)
    some = table[table["high_cellularity"]]
    assert 0 < len(some) < len(table) and some["slide"].nunique() == 4


def toy(**columns):
    slide = ["TCGA-NA-0001-01Z-00-DX1.x", "TCGA-NA-0001-01Z-00-DX2.y", "own"]
    return pd.DataFrame({"slide": slide, "x": [1, 2, 3]} | columns)


def test_two_slides_of_a_patient_and_a_slide_of_another_kind():
    table = weak_labels(toy(), pd.DataFrame({"slide": ["own"], "label": ["c"]}),
                        {"NA": "UCS"})  # fmt: skip
    assert table["label"].tolist() == ["UCS", "UCS", "c"]
    assert table["patient"].tolist()[:2] == ["TCGA-NA-0001", "TCGA-NA-0001"]
    assert table["site"].tolist()[:2] == ["NA", "NA"]
    assert table[["patient", "site"]].iloc[2].isna().all()
    assert table["x"].tolist() == [1, 2, 3]


def test_what_is_stated_wins_over_the_name():
    mosaics = toy(label=["m", "m", "m"], patient=["p", None, "q"], site="M")
    table = weak_labels(mosaics, projects={"NA": "UCS"})
    assert table["label"].tolist() == ["m"] * 3 and table["site"].tolist() == ["M"] * 3
    assert table["patient"].tolist() == ["p", "TCGA-NA-0001", "q"]
    slides = mosaics[["slide"]].assign(label=["s", None, "s"], patient="q")
    table = weak_labels(mosaics, slides)
    assert table["label"].tolist() == ["s", "m", "s"]
    assert table["patient"].tolist() == ["q"] * 3


def test_slides_without_a_label_or_listed_twice():
    with pytest.raises(ValueError, match="'own' has no label"):
        weak_labels(toy(), projects={"NA": "UCS"})
    twice = pd.DataFrame({"slide": ["own", "own"], "label": ["a", "b"]})
    with pytest.raises(ValueError, match="'own' is listed twice"):
        weak_labels(toy(), twice)


def test_source_sites_and_their_projects(tmp_path):
    (tmp_path / "sites.tsv").write_text(miniatures.SITES)
    found = projects_of_sites(tmp_path / "sites.tsv")
    assert found == {"05": "LUAD", "18": "LUSC", "NA": "UCS"}


@pytest.mark.tissue
def test_every_study_of_the_site_table_is_known(monuseg):
    path = monuseg.parent / "tcga_tissue_source_sites.tsv"
    projects, studies = projects_of_sites(path), pd.read_csv(STUDIES)["project"]
    assert set(projects.values()) == set(studies) and len(set(studies)) == 33
    assert (projects["05"], projects["02"], projects["NA"]) == ("LUAD", "GBM", "UCS")


@pytest.mark.slow
def test_mosaics_from_one_file_or_from_nowhere(tcga, tmp_path):
    folder = read_mosaics(tcga["mosaics"])
    folder.to_csv(tmp_path / "all.csv", index=False)
    again = read_mosaics(tmp_path / "all.csv")
    assert again[["slide", "x", "y"]].equals(folder[["slide", "x", "y"]])
    with pytest.raises(FileNotFoundError, match="chapter 02"):
        read_mosaics(tmp_path)
