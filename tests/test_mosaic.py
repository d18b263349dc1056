import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.stats import spearmanr
from sklearn.cluster import KMeans

from histo_utils.mosaic import (
    extract_mosaics,
    high_cellularity_mosaic,
    mean_colours,
    slide_mosaic,
    yottixel_mosaic,
    yottixel_tissue,
)
from histo_utils.patches import check_patches, read_patch
from histo_utils.slides import open_slide, patch_grid

PERCENT = (5, 10, 15, 100)
SMALL = {"size": 256, "mpp": 0.5, "fraction": 0.1}


@pytest.fixture(scope="module")
def toy(golden):
    """Patches of the golden slide that cover enough tissue, and what was chosen."""
    arrays = np.load(golden / "yottixel_mosaic_toy.npz")
    kept = arrays["tissue_coverage"] >= 0.7
    table = pd.DataFrame(arrays["rgb"][kept], columns=list("rgb"))
    table[["y", "x"]] = arrays["wsi_loc"][kept]
    return table, json.loads((golden / "yottixel.json").read_text())


def released_recipe(table, percent):
    """Locations as the released code chooses them (SEEDS §10): seed 724, argsort."""
    places = table[["y", "x"]].to_numpy()
    colours = KMeans(min(9, len(table)), random_state=724)
    cluster = colours.fit_predict(table[["r", "g", "b"]].to_numpy())
    chosen = []
    for colour in range(cluster.max() + 1):
        members = np.flatnonzero(cluster == colour)
        wanted = max(1, len(members) * percent // 100)
        spatial = KMeans(wanted, random_state=724)
        distances = spatial.fit_transform(places[members])
        taken = []
        for centre in range(wanted):
            order = np.argsort(distances[:, centre])
            taken.append(next(i for i in order if i not in taken))
        chosen += members[taken].tolist()
    return places[chosen].tolist()


@pytest.mark.parametrize("percent", PERCENT)
def test_counts_are_those_of_the_released_code(toy, percent):
    table, expected = toy
    mosaic = yottixel_mosaic(table, fraction=percent / 100, seed=724)
    expected = expected[f"mosaic_pct{percent}"]
    counts = mosaic["colour_cluster"].value_counts()
    assert len(mosaic) == expected["n"]
    assert sorted(counts, reverse=True) == expected["per_region"]
    assert mosaic.index.is_unique


@pytest.mark.parametrize("percent", PERCENT)
def test_locations_are_those_of_the_released_code_under_its_tie_rule(toy, percent):
    # The golden locations need NumPy's unstable order of equal distances. The package
    # decides by row instead, so this shows that nothing but ties differs.
    table, expected = toy
    golden_places = expected[f"mosaic_pct{percent}"]["wsi_loc"]
    assert released_recipe(table, percent) == golden_places


@pytest.mark.parametrize("percent", PERCENT[:3])
def test_without_ties_the_package_chooses_what_the_recipe_chooses(toy, percent):
    table = toy[0].copy()
    rng = np.random.default_rng(0)
    table[["y", "x"]] = table[["y", "x"]] + rng.uniform(0, 300, (len(table), 2))
    mosaic = yottixel_mosaic(table, fraction=percent / 100, seed=724)
    assert mosaic[["y", "x"]].to_numpy().tolist() == released_recipe(table, percent)


def test_a_few_patches(toy):
    table = toy[0]
    assert len(yottixel_mosaic(table.iloc[:4])) == 4
    assert len(yottixel_mosaic(table.iloc[:1])) == 1
    assert yottixel_mosaic(table.iloc[:0]).empty
    flat = table.iloc[:30].assign(r=0.5, g=0.4, b=0.6)
    assert len(yottixel_mosaic(flat, fraction=0.29)) == 8  # ⌊30 · 0.29⌋ of one colour


def test_bad_patches_are_refused(toy):
    table = toy[0]
    with pytest.raises(ValueError, match="no column g"):
        yottixel_mosaic(table.drop(columns="g"))
    with pytest.raises(ValueError, match=r"row 3 has no mean colour"):
        yottixel_mosaic(table.assign(r=table["r"].where(table.index != 3)))
    with pytest.raises(ValueError, match="fraction=0"):
        yottixel_mosaic(table, fraction=0)


def test_the_released_tissue_mask(golden):
    toy = np.load(golden / "yottixel_tissue_toy.npz")
    assert np.array_equal(yottixel_tissue(toy["image"]), toy["mask"])


def test_mean_colours_against_whole_patches(write_slide):
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (512, 768, 3), np.uint8)
    slide = open_slide(write_slide("a.tif", pixels))
    grid = patch_grid(slide, 256, 0.5, mask=[[True]])
    found = mean_colours(slide, grid)[["r", "g", "b"]].to_numpy()
    whole = [
        pixels[y : y + 256, x : x + 256].mean((0, 1)) / 255
        for y, x in zip(grid["y"], grid["x"], strict=True)
    ]
    assert np.allclose(found, whole, atol=0.005)


def test_the_richest_patches_are_kept(phantoms):
    folder, table = phantoms
    row = table.iloc[0]
    slide = open_slide(folder / row["file"])
    grid = patch_grid(slide, 256, 0.5)
    scored = high_cellularity_mosaic(slide, grid, keep=0.2)
    assert scored["high_cellularity"].sum() == max(1, int(len(grid) * 0.2))
    kept = scored.loc[scored["high_cellularity"], "cellularity"]
    others = scored.loc[~scored["high_cellularity"], "cellularity"]
    assert kept.min() >= others.max()
    one = high_cellularity_mosaic(slide, grid.iloc[:3], keep=0.2)
    assert one["high_cellularity"].sum() == 1
    assert high_cellularity_mosaic(slide, grid.iloc[:0]).empty
    with pytest.raises(ValueError, match="keep=0"):
        high_cellularity_mosaic(slide, grid, keep=0)


@pytest.mark.slow
def test_cellularity_follows_the_planted_nuclei(phantoms):
    folder, table = phantoms
    for row in table.itertuples():
        if row.pale:
            continue
        slide = open_slide(folder / row.file)
        scored = high_cellularity_mosaic(slide, patch_grid(slide, 256, 0.5))
        truth = np.asarray(Image.open(folder / row.nuclei_mask)).astype(float)
        side = round(256 * 0.5 / slide.mpp)
        shares = [truth[y : y + side, x : x + side].mean()
                  for x, y in zip(scored["x"], scored["y"], strict=True)]  # fmt: skip
        assert spearmanr(shares, scored["cellularity"])[0] > 0.7, row.slide


def test_a_slide_twice_gives_the_same_mosaic(phantoms):
    folder, table = phantoms
    slide = open_slide(folder / table["file"][1])
    first, again = slide_mosaic(slide, **SMALL), slide_mosaic(slide, **SMALL)
    pd.testing.assert_frame_equal(first, again)
    assert 0 < first["in_mosaic"].sum() < len(first)
    assert (first["high_cellularity"] <= first["in_mosaic"]).all()
    assert first.loc[first["in_mosaic"], "cellularity"].between(0, 1).all()
    assert first.loc[~first["in_mosaic"], "cellularity"].isna().all()


@pytest.fixture
def mixed_slides(phantoms, write_slide, tmp_path):
    """Two good slides, glass only, a text file, and a slide without µm per pixel."""
    folder, table = phantoms
    glass = np.full((800, 800, 3), 244, np.uint8)
    (tmp_path / "text.svs").write_text("not a slide")
    images = [
        folder / table["file"][0],
        write_slide("leeres Glas ä.tif", glass),
        tmp_path / "text.svs",
        write_slide("no_mpp.tif", glass, mpp=None),
        folder / table["file"][1],
    ]
    return pd.DataFrame({"image": images, "patient": list("abcde")})


def test_a_batch_reports_every_slide(mixed_slides, tmp_path):
    out, here = tmp_path / "out", ThreadPoolExecutor(1)
    report = extract_mosaics(mixed_slides, out, here, progress=False, **SMALL)
    status = report["status"].tolist()
    assert status == ["done", "no tissue", "failed", "failed", "done"]
    assert "pass mpp=" in report["message"][3]
    assert "text.svs" in report["message"][2]
    assert report["mosaic"][1] == 0 and report["mosaic"][0] > 0
    table = pd.read_parquet(out / f"{report['slide'][0]}.parquet")
    check_patches(table)
    assert set(table["patient"]) == {"a"}
    assert read_patch(table.iloc[0]).shape == (256, 256, 3)
    assert len(pd.read_parquet(out / "leeres Glas ä.parquet")) == 0
    # again, with the remedy: finished slides are not repeated
    mended = mixed_slides.assign(slide_mpp=[None, None, None, 0.5, None])
    again = extract_mosaics(mended, out, here, progress=False, **SMALL)
    assert again["resumed"].tolist() == [True, True, False, False, True]
    assert again["status"][3] == "no tissue" and again["mpp_source"][3] == "given"
    first, second = report.set_index("slide"), again.set_index("slide")
    assert first.loc[first.index[0], "mosaic"] == second.loc[first.index[0], "mosaic"]


def test_bad_slide_tables(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        extract_mosaics(pd.DataFrame({"image": []}), tmp_path)
    with pytest.raises(ValueError, match="no column image"):
        extract_mosaics(pd.DataFrame({"path": ["a"]}), tmp_path)
    with pytest.raises(ValueError, match="two slides are called 'a'"):
        extract_mosaics(pd.DataFrame({"image": ["x/a.svs", "y/a.tif"]}), tmp_path)
