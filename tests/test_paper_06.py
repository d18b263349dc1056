"""Two steps of chapter 06's paper profile, on a miniature of the NCT-CRC folders."""

import json
from pathlib import Path

import numpy as np
import papermill
import pytest
import timm
import torch
import yaml
from miniatures import nct_crc

from histo_utils import catalog
from histo_utils.readers.class_folders import NCT_CLASSES

ROOT = Path(__file__).parents[1]
NAME, EXPERIMENT = "06_two_step_fine_tuning", "06_two_step_fine_tuning.ftx2048"


def test_the_paper_profile_says_what_is_known_and_marks_what_is_ours():
    text = (ROOT / "profiles" / "paper" / f"{EXPERIMENT}.yaml").read_text("utf8")
    paper = yaml.safe_load(text)
    assert paper["network"] == "legacy_xception.tf_in1k" and paper["repeats"] == 50
    assert (paper["input_size"], paper["front_stage"]) == (299, -1)
    assert paper["rates"] == [[1e-3, 1e-3], [1e-4, 1e-5]]
    assert (paper["dataset"], paper["test_dataset"]) == (
        "nct_crc_he_100k",
        "crc_val_he_7k",
    )
    cfg = timm.get_pretrained_cfg(paper["network"])
    assert cfg.mean == cfg.std == (0.5, 0.5, 0.5)
    unknown = "held_out rates epochs patience batch_size"
    for name in (*unknown.split(), "seeds", "c_values", "input_size"):
        line = next(line for line in text.splitlines() if line.startswith(f"{name}:"))
        assert "# ours" in line


def test_the_test_set_is_found_in_its_own_folder_or_beside_the_training_set(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("HISTO_DATA", str(tmp_path))
    place = nct_crc(tmp_path, n_train=2, n_test=1)
    assert set(catalog.patch_table("crc_val_he_7k")["split"]) == {"train", "test"}
    (tmp_path / "crc_val_he_7k").mkdir()
    (place / "CRC-VAL-HE-7K").rename(tmp_path / "crc_val_he_7k" / "CRC-VAL-HE-7K")
    assert set(catalog.patch_table("crc_val_he_7k")["split"]) == {"test"}
    assert set(catalog.patch_table("nct_crc_he_100k")["split"]) == {"train"}


@pytest.mark.slow
def test_two_steps_of_the_paper_profile(tmp_path, monkeypatch):
    monkeypatch.setenv("HISTO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HISTO_DATA", str(tmp_path))
    place = nct_crc(tmp_path, n_train=3, n_test=5)  # five folds by class
    (tmp_path / "crc_val_he_7k").mkdir()
    (place / "CRC-VAL-HE-7K").rename(tmp_path / "crc_val_he_7k" / "CRC-VAL-HE-7K")
    text = (ROOT / "profiles" / "paper" / f"{EXPERIMENT}.yaml").read_text("utf8")
    small = {
        "weights": "random", "input_size": 71, "held_out": 0.34, "batch_size": 4,
        "steps": 2, "epochs": [1, 1], "seeds": [0, 1], "workers": 0, "accumulate": 2,
        "precision": "32-true", "repeats": 2, "n_boot": 20, "c_values": [0.01],
        "results": str(tmp_path / "found.json"),
    }  # fmt: skip
    papermill.execute_notebook(
        str(ROOT / "notebooks" / f"{NAME}.ipynb"), str(tmp_path / "out.ipynb"),
        parameters=yaml.safe_load(text) | small, progress_bar=False, cwd=str(ROOT),
    )  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())
    sizes = {"train": 17, "validation": 10, "gallery": 27, "test": 45}
    assert found["sizes"] == {"organ, split 0": sizes}
    # 45 images are no patients: none is counted, and nothing has an interval
    assert found["unit"] == "images; patients unknown"
    lines = [*found["scores"].values(), *found["differences"].values()]
    lines += [x for of in found["recalls"].values() for x in of.values()]
    lines.append(found["repeated"]["the same answers, by patients"])
    assert {(line["n"], line["low"]) for line in lines} == {(0, None)}
    frozen, after_1, after_2 = found["hashes"]
    assert frozen == after_1 != after_2
    head = 2048 * 256 + 256 + 256 * 9 + 9
    with torch.device("meta"):
        body = timm.create_model("legacy_xception", num_classes=1000)
    everything = sum(p.numel() for p in body.parameters())
    assert found["vector"] == 2048
    assert found["trained"] == [head, head + everything]
    counts = found["confusion"]["FTX"]
    assert tuple(counts) == NCT_CLASSES
    right = [row.get(name, 0) / sum(row.values()) for name, row in counts.items()]
    score = found["scores"]["organ, logistic regression, FTX"]
    assert score["seeds"][0] == pytest.approx(np.mean(right)) and score["queries"] == 45
    # the paper's table: folds of the test images, and the training set's classifier
    reported = found["reported"]
    assert len(reported) == 4
    assert reported["FTX, accuracy"]["test"] == pytest.approx(score["score"])
    mean = found["repeated"]["accuracy"]["IMGNET"]["mean"]
    assert reported["IMGNET, accuracy"]["folds"] == pytest.approx(mean)
    stroma = found["recalls"]["FTX"]["STR"]["score"]
    assert reported["FTX, recall of stroma"]["test"] == pytest.approx(stroma)
    # both steps read augmented images: the first step's checkpoint holds a head alone
    steps = sorted((tmp_path / "cache/06_two_steps").glob("*/last.pt"))
    states = [torch.load(path, weights_only=True) for path in steps]
    assert sorted(len(state["network"]) > 4 for state in states) == [0, 0, 1, 1]
    for state in states:
        taken = {int(s["step"]) for s in state["optimizer"]["state"].values()}
        assert taken == {1}  # two batches, accumulated
        assert state["settings"]["front_stage"] == -1
    assert (tmp_path / "cache/trained/ftx_organ_nct_crc_he_100k").is_dir()
    assert "0.984" in (tmp_path / "out.ipynb").read_text()
