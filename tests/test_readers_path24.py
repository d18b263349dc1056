"""Kimia Path24's HDF5 file: which patches are cut, from which pixels."""

import builtins

import h5py
import miniatures
import numpy as np
import pytest

from histo_utils.catalog import patch_table
from histo_utils.patches import check_patches, read_patch
from histo_utils.readers import path24
from histo_utils.readers.path24 import convert_path24


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("path24")
    truth = miniatures.path24_h5(folder)
    counts = convert_path24(truth["file"], folder, progress=False)
    return folder, truth, counts


def place_of(image):
    """Label, y and x from a training patch's file name."""
    label, y, x = str(image).rsplit("/", 1)[1].removesuffix(".png").split("_")
    return label, int(y[1:]), int(x[1:])


def test_counts_of_every_scan(made):
    _, _, counts = made
    # 3 × 4 whole cells: the last complete strip is there
    each = {"cells": 12, "test_place": 5, "homogeneous": 2, "train": 5, "test": 2}
    assert counts["slide"].tolist() == ["s0", "s1", "s2"]
    assert counts.drop(columns="slide").to_dict("records") == [each] * 3


def test_the_patches_kept_are_those_worked_out_by_hand(made):
    folder, truth, _ = made
    table = patch_table("kimia_path24", folder=folder)
    train = table[table["split"] == "train"]
    for label, kept in truth["kept"].items():
        found = {place_of(i)[1:] for i in train.loc[train["label"] == label, "image"]}
        assert found == kept


def test_no_training_patch_covers_a_test_place_and_bright_ground_is_white(made):
    folder, truth, _ = made
    table = patch_table("kimia_path24", folder=folder)
    side, whitened = truth["side"], 0
    for row in table[table["split"] == "train"].to_dict("records"):
        label, y, x = place_of(row["image"])
        for top, left in truth["places"][label]:
            assert abs(y - top) >= side or abs(x - left) >= side
        expected = truth["scans"][label][y : y + side, x : x + side].copy()
        assert not (expected == 255).any()  # nothing was white in the raw scan
        expected[expected >= path24.BRIGHT] = 255
        pixels = read_patch(row)
        assert np.array_equal(pixels, np.repeat(expected[..., None], 3, -1))
        whitened += int((expected == 255).any())
    assert whitened == 3  # the cell with 1.2 % tissue, in each scan


def test_test_patches_keep_their_labels_and_pixels(made):
    folder, truth, _ = made
    table = patch_table("kimia_path24", folder=folder)
    test = table[table["split"] == "test"]
    with h5py.File(truth["file"]) as file:
        for i, target in enumerate(truth["targets"]):
            row = test[test["image"].str.endswith(f"test{i:04d}.png")].iloc[0]
            assert row["label"] == f"s{target}"
            raw = file["test_data/patches"][i]
            assert (raw >= path24.BRIGHT).sum() == 9 and not (raw == 255).any()
            assert np.array_equal(
                read_patch(row)[..., 0], np.where(raw >= path24.BRIGHT, 255, raw)
            )


def test_the_table_says_that_its_patients_are_in_both_splits(made):
    folder, _, _ = made
    table = patch_table("kimia_path24", folder=folder)
    assert set(table["label"]) == {"s0", "s1", "s2"}
    assert (table["slide"] == table["label"]).all()
    assert (table["patient"] == table["label"]).all()
    assert (table[["mpp", "slide_mpp"]] == 0.5).all(axis=None)
    assert table["split"].value_counts().to_dict() == {"train": 15, "test": 6}
    with pytest.raises(ValueError, match="more than one split"):
        check_patches(table)
    check_patches(table[table["split"] == "train"])


def test_an_interrupted_run_goes_on(tmp_path, made, monkeypatch):
    whole, truth, counts = made
    real, written = path24.save_png, []

    def dies(pixels, path):
        if len(written) == 7:
            raise KeyboardInterrupt
        written.append(path)
        real(pixels, path)

    monkeypatch.setattr(path24, "save_png", dies)
    with pytest.raises(KeyboardInterrupt):
        convert_path24(truth["file"], tmp_path, progress=False)
    monkeypatch.setattr(path24, "save_png", real)
    assert sorted(p.name for p in (tmp_path / "train").glob("*.json")) == ["s0.json"]
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")}
    again = convert_path24(truth["file"], tmp_path, progress=False)
    assert again.equals(counts)
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    for path in whole.rglob("*.png"):
        copy = tmp_path / path.relative_to(whole)
        assert copy.read_bytes() == path.read_bytes()
    assert not list(tmp_path.rglob("*.part"))


def test_other_settings_and_other_data_are_refused(made, tmp_path):
    folder, truth, _ = made
    with pytest.raises(ValueError, match=r"bright.: 230.*bright.: 200"):
        convert_path24(truth["file"], folder, bright=200, progress=False)
    with pytest.raises(ValueError, match="bright=0"):
        convert_path24(truth["file"], folder, bright=0)
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"without path24\.json"):
        convert_path24(truth["file"], tmp_path, progress=False)


def test_files_of_another_layout(tmp_path):
    with pytest.raises(FileNotFoundError, match="kimia_path24"):
        convert_path24(tmp_path / "none.h5", tmp_path / "out")
    patches = np.zeros((1, 4, 4), np.uint8)

    def write(**data):
        with h5py.File(tmp_path / "odd.h5", "w") as file:
            for name, values in data.items():
                file[name.replace("__", "/")] = values
        return tmp_path / "odd.h5"

    scan = {"scan0__data": np.zeros((8, 8), np.uint8)}
    test = {"test_data__patches": patches, "test_data__targets": [0]}
    with pytest.raises(ValueError, match="test_data/patches, test_data/targets"):
        convert_path24(write(**scan), tmp_path / "out")
    with pytest.raises(ValueError, match="no scan0"):
        convert_path24(write(**test), tmp_path / "out")
    with pytest.raises(ValueError, match="two dimensions"):
        colour = {"scan0__data": np.zeros((8, 8, 3), np.uint8)}
        convert_path24(write(**colour, **test), tmp_path / "out")
    with pytest.raises(ValueError, match=r"test targets \[7\]"):
        convert_path24(write(**scan, **test | {"test_data__targets": [7]}), tmp_path)
    with pytest.raises(ValueError, match="with 2 targets"):
        convert_path24(write(**scan, **test | {"test_data__targets": [0, 0]}), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["odd.h5"]


def test_without_h5py_the_extra_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name == "h5py":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"histo_utils\[networks\]"):
        convert_path24(tmp_path / "a.h5", tmp_path)


def test_a_folder_not_yet_cut_says_how(tmp_path, made, monkeypatch):
    _, truth, _ = made
    monkeypatch.setattr("histo_utils.catalog.fetch", lambda *given: None)
    (tmp_path / "Kimia_Path24.h5").write_bytes(truth["file"].read_bytes())
    with pytest.raises(FileNotFoundError, match="convert_path24"):
        patch_table("kimia_path24", folder=tmp_path)
