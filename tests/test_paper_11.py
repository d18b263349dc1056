"""Chapter 11's paper experiment, on a miniature of TCGA-LUAD in the GDC's folders."""

import json
from pathlib import Path

import numpy as np
import papermill
import pytest
import yaml
from miniatures import tcga_luad

from histo_utils import catalog, encoders
from histo_utils.readers.molecular import read_expression, read_mutations

ROOT = Path(__file__).parents[1]
NAME, EXPERIMENT = "11_molecular_prediction", "11_molecular_prediction.luad"


@pytest.fixture(scope="module")
def luad(tmp_path_factory):
    return tcga_luad(tmp_path_factory.mktemp("gdc"))


def test_expression_is_that_of_the_primary_tumour(luad):
    found = read_expression(luad, ["CD274", "ENSG00000153563"])
    assert found.shape == (12, 2) and found.index[0].startswith("TCGA-05-4000")
    order = found.index.str[-4:].astype(int) - 4000
    np.testing.assert_allclose(found["CD274"], order)  # log2(2^i - 1 + 1), no 11A
    with pytest.raises(ValueError, match=r"no gene 'CD275'; nearest: CD274"):
        read_expression(luad, ["CD275"])


def test_a_mutation_changes_the_protein(luad):
    found = read_mutations(luad, ["KRAS", "TP53", "STK11"])
    order = found.index.str[-4:].astype(int)
    np.testing.assert_array_equal(found["KRAS"], order % 2)
    assert (found[["TP53", "STK11"]] == 0).all(axis=None)  # silent; none


def test_files_without_a_sheet_are_refused(luad, tmp_path):
    with pytest.raises(FileNotFoundError, match="0 sample sheets, 0 files"):
        read_expression(tmp_path, ["CD274"])
    for file in (*luad.glob("*/*.tsv"), *luad.glob("*.tsv")):
        copy = tmp_path / file.relative_to(luad)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(file.read_text())
    sheet = next(tmp_path.glob("gdc_*.tsv"))
    sheet.write_text("\n".join(sheet.read_text().splitlines()[:2]))
    with pytest.raises(ValueError, match=r"is not in gdc_sample_sheet"):
        read_expression(tmp_path, ["CD274"])


def test_slides_in_the_gdcs_folders_are_found(luad):
    table = catalog.slide_table(luad)
    assert len(table) == 12 and table["patient"].nunique() == 12
    assert set(table["site"]) == {"05", "38", "44", "50", "55"}


@pytest.mark.slow
def test_ftx_against_imgnet_per_gene(luad, tmp_path, monkeypatch):
    monkeypatch.setenv("HISTO_CACHE", str(tmp_path / "cache"))
    paper = yaml.safe_load(
        (ROOT / "profiles" / "paper" / f"{EXPERIMENT}.yaml").read_text()
    )
    assert "# ours" in (ROOT / "profiles" / "paper" / f"{EXPERIMENT}.yaml").read_text()
    # the family is Xception's; a small network of another seed stands for chapter 06's
    tuned = encoders.frozen("mobilenetv2_035", size=32, seed=1)
    place = catalog.trained_folder("ftx", paper["encoder"], "organ")
    encoders.save(tuned, place)
    small = {
        "dataset": str(luad), "network": "mobilenetv2_035", "weights": "random",
        "input_size": 32, "stride": 400, "genes": ["CD274", "CD8A"], "workers": 0,
        "mutations": ["KRAS", "TP53"], "alphas": [1.0, 0.2], "l1_ratios": [0.5],
        "c_values": [0.0, 0.01], "n_planted": 2, "n_boot": 20,
        "results": str(tmp_path / "found.json"),
    }  # fmt: skip
    papermill.execute_notebook(
        str(ROOT / "notebooks" / f"{NAME}.ipynb"), str(tmp_path / "out.ipynb"),
        parameters=paper | small, progress_bar=False, cwd=str(ROOT),
    )  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["units"] == {"patient": 12, "site": 5}
    assert set(found["compared"]) == {"site", "patient"}
    for unit in ("site", "patient"):
        rows = found["compared"][unit]
        assert set(rows) == {"CD274", "CD8A"}  # no ten patients with KRAS here
        assert found["too_few"][unit] == ["mutated KRAS", "mutated TP53"]
        for row in rows.values():
            assert {"FTX", "IMGNET"} <= set(row) and row["FTX"]["n"] == 12
            difference = row["error, FTX − IMGNET"]
            assert difference["n"] == 12 and 0 <= difference["p_holm"] <= 1
        counts = found["counts"][f"ours, folds by {unit}"]
        assert counts["genes related"].endswith("of 2")
        assert counts["FTX better, mutations"] == "0 of 0"
    assert found["planted"]["FTX"]["genes, no signal, nothing found"].endswith("of 2")
    text = (tmp_path / "out.ipynb").read_text()
    assert "139 of 171" in text and "5 of 9" in text
