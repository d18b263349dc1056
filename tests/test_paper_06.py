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

from histo_utils.readers.class_folders import NCT_CLASSES

ROOT = Path(__file__).parents[1]
NAME = "06_two_step_fine_tuning"


def test_the_paper_profile_says_what_is_known_and_marks_what_is_ours():
    text = (ROOT / "profiles" / "paper" / f"{NAME}.yaml").read_text("utf8")
    paper = yaml.safe_load(text)
    assert paper["network"] == "legacy_xception.tf_in1k" and paper["repeats"] == 50
    assert (paper["input_size"], paper["front_stage"]) == (299, -1)
    assert (paper["rates_1"][0], paper["rates_2"]) == (1e-3, [1e-4, 1e-5])
    cfg = timm.get_pretrained_cfg(paper["network"])
    assert cfg.mean == cfg.std == (0.5, 0.5, 0.5)
    unknown = "held_out turns rates_1 rates_2 epochs patience batch_size"
    for name in (*unknown.split(), "seeds", "c_values", "input_size"):
        line = next(line for line in text.splitlines() if line.startswith(f"{name}:"))
        assert "# ours" in line


@pytest.mark.slow
def test_two_steps_of_the_paper_profile(tmp_path, monkeypatch):
    monkeypatch.setenv("HISTO_CACHE", str(tmp_path / "cache"))
    place = nct_crc(tmp_path, n_train=3, n_test=2)
    paper = yaml.safe_load((ROOT / "profiles" / "paper" / f"{NAME}.yaml").read_text())
    small = {
        "dataset": str(place), "weights": "random", "input_size": 71, "held_out": 0.34,
        "batch_size": 4, "steps": 2, "epochs": [1, 1], "seeds": [0], "workers": 0,
        "precision": "32-true", "repeats": 2, "turns": [0], "n_boot": 20,
        "c_values": [0.01], "results": str(tmp_path / "found.json"),
    }  # fmt: skip
    papermill.execute_notebook(
        str(ROOT / "notebooks" / f"{NAME}.ipynb"), str(tmp_path / "out.ipynb"),
        parameters=paper | small, progress_bar=False, cwd=str(ROOT),
    )  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())
    sizes = {"train": 17, "validation": 10, "gallery": 27, "test": 18}
    assert found["sizes"] == {"organ, split 0": sizes}
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
    recalls = [found["recalls"]["FTX"][name]["score"] for name in NCT_CLASSES]
    np.testing.assert_allclose(recalls, right)
    score = found["scores"]["organ, logistic regression, FTX"]
    assert score["score"] == pytest.approx(np.mean(right)) and score["queries"] == 18
    steps = list((tmp_path / "cache/06_two_steps").glob("*/last.pt"))
    assert len(steps) == 2
    for path in steps:
        optimizer = torch.load(path, weights_only=True)["optimizer"]
        assert {int(s["step"]) for s in optimizer["state"].values()} == {2}
    assert (tmp_path / "cache/trained/ftx_organ_nct_crc_he_100k").is_dir()
