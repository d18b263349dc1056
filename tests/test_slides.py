import json
import pickle

import numpy as np
import pytest
import tifffile
from PIL import Image

from histo_utils.slides import (
    SlideError,
    open_slide,
    patch_grid,
    resolve_mpp,
    tissue_mask,
    tissue_of_image,
    without_ink,
)

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (700, 900, 3), np.uint8)


def blobs(height, width, scale):
    """A smooth picture, the same at any resolution: pixel centres in units of scale."""
    y, x = np.mgrid[:height, :width]
    y, x = (y + 0.5) * scale, (x + 0.5) * scale
    wave = [np.sin(x / 90 + c) * np.cos(y / 70 - c) for c in range(3)]
    return np.stack([127 + 100 * w for w in wave], -1).astype(np.uint8)


# --- µm per pixel ---------------------------------------------------------------------


def test_the_first_source_of_mpp_wins():
    found = {"resolution tag": 0.51, "vendor": 0.5}
    assert resolve_mpp(found) == (0.5, "vendor")
    assert resolve_mpp({**found, "given": 0.49}) == (0.49, "given")


@pytest.mark.parametrize("wrong", [0.0999, 4.001, 352.8])
def test_implausible_mpp_counts_as_absent(wrong):
    assert resolve_mpp({"vendor": wrong, "resolution tag": 0.25})[0] == 0.25
    with pytest.raises(SlideError, match=r"pass mpp="):
        resolve_mpp({"vendor": wrong})
    with pytest.raises(SlideError, match="was given"):
        resolve_mpp({"given": wrong, "vendor": 0.5})


def test_sources_more_than_five_percent_apart_warn():
    with pytest.warns(UserWarning, match="disagree"):
        resolve_mpp({"vendor": 0.5, "resolution tag": 0.53})
    assert resolve_mpp({"vendor": 0.5, "resolution tag": 0.52}) == (0.5, "vendor")


def test_mpp_is_read_from_the_resolution_tag_and_recorded(write_slide):
    slide = open_slide(write_slide("a.tif", NOISE, mpp=0.25))
    assert slide.mpp == pytest.approx(0.25)
    assert slide.mpp_source == "resolution tag"
    with pytest.warns(UserWarning, match="disagree"):
        given = open_slide(slide.path, mpp=0.5)
    assert given.mpp_source == "given"
    assert given.mpp_found["resolution tag"] == pytest.approx(0.25)


def test_no_mpp_is_refused_with_the_remedy(write_slide):
    path = write_slide("a.tif", NOISE, mpp=None)
    with pytest.raises(SlideError, match=r"a\.tif: no µm per pixel .* pass mpp="):
        open_slide(path)
    assert open_slide(path, mpp=0.5).mpp == 0.5


@pytest.mark.tissue
def test_real_slides_tell_their_scale_or_are_refused(real_slides):
    small = open_slide(real_slides / "CMU-1-Small-Region.svs")
    assert (small.mpp, small.mpp_source, small.objective) == (0.499, "vendor", 20)
    frozen = real_slides / "TCGA-CR-7395-01A-01-TS1.svs"
    with pytest.raises(SlideError, match=r"CR-7395.* pass mpp="):
        open_slide(frozen)
    assert open_slide(frozen, mpp=0.5).dimensions == (4443, 3567)


# --- reading --------------------------------------------------------------------------


def test_at_its_own_scale_a_patch_is_the_stored_pixels(write_slide):
    slide = open_slide(write_slide("a.tif", NOISE))
    assert np.array_equal(slide.read(37, 11, 256, 0.5), NOISE[11:267, 37:293])


def test_beyond_the_edge_it_is_white(write_slide):
    slide = open_slide(write_slide("a.tif", NOISE))
    patch = slide.read(800, 650, 256, 0.5)
    assert np.array_equal(patch[:50, :100], NOISE[650:, 800:])
    assert (patch[50:] == 255).all() and (patch[:, 100:] == 255).all()
    plain = open_slide(_plain(slide.path.parent / "p.tif", NOISE), mpp=0.5)
    assert np.array_equal(plain.read(800, 650, 256, 0.5), patch)
    assert np.array_equal(plain.read(-20, -30, 64, 0.5)[30:, 20:], NOISE[:34, :44])


def _plain(path, pixels):
    tifffile.imwrite(path, pixels, photometric="rgb")  # strips: OpenSlide refuses it
    return path


@pytest.mark.parametrize(("levels", "mpp"), [(1, 0.8), (3, 0.5), (3, 1.0), (3, 2.3)])
def test_a_patch_covers_the_same_ground_on_20x_and_40x(write_slide, levels, mpp):
    fine = open_slide(write_slide("40.tif", blobs(2048, 2048, 0.25), 0.25, levels))
    coarse = open_slide(write_slide("20.tif", blobs(1024, 1024, 0.5), 0.5, levels))
    a = fine.read(400, 600, 150, mpp).astype(float)
    b = coarse.read(200, 300, 150, mpp).astype(float)
    truth = blobs(2000, 2000, mpp)  # resampled by formula
    top, left = 150 / mpp, 100 / mpp
    if top == int(top) and left == int(left):
        c = truth[int(top) :, int(left) :][:150, :150]
        assert np.abs(a - c).mean() < 2
    assert np.abs(a - b).mean() < 2


def test_finer_than_scanned_warns(write_slide):
    slide = open_slide(write_slide("a.tif", NOISE))
    with pytest.warns(UserWarning, match="no detail is gained"):
        assert slide.read(0, 0, 100, 0.25).shape == (100, 100, 3)


def test_thumbnail_equals_the_downsampled_image(write_slide):
    image = blobs(1500, 2100, 1.0)
    slide = open_slide(write_slide("a.tif", image))
    thumbnail = slide.thumbnail(2.0)
    assert thumbnail.shape == (375, 525, 3)
    means = image[:1500, :2100].reshape(375, 4, 525, 4, 3).mean((1, 3))
    assert np.abs(thumbnail - means).mean() < 1.5


def test_slides_survive_pickling(write_slide):
    slide = open_slide(write_slide("grün und weiß.tif", NOISE))
    before = slide.read(5, 5, 64, 0.5)
    again = pickle.loads(pickle.dumps(slide))
    assert np.array_equal(again.read(5, 5, 64, 0.5), before)


# --- bad files ------------------------------------------------------------------------


def test_bad_files_are_named(tmp_path):
    with pytest.raises(SlideError, match="no such file"):
        open_slide(tmp_path / "none.svs")
    text = tmp_path / "text.svs"
    text.write_text("not a slide")
    with pytest.raises(SlideError, match=r"text\.svs: neither OpenSlide nor tifffile"):
        open_slide(text)


@pytest.mark.tissue
@pytest.mark.slow
def test_damaged_slides(real_slides, tmp_path):
    whole = real_slides / "CMU-1-Small-Region.svs"
    short = tmp_path / "short.svs"
    short.write_bytes(whole.read_bytes()[:900_000])
    with pytest.raises(SlideError, match=r"short\.svs"):
        open_slide(short)
    holed = tmp_path / "holed.svs"
    content = bytearray(whole.read_bytes())
    content[400_000:700_000] = bytes(300_000)
    holed.write_bytes(content)
    slide = open_slide(holed)
    with pytest.raises(SlideError, match=r"holed\.svs: cannot read"):
        slide.thumbnail(1.0)
    # The library's handle stays failed after an error; ours reads on where it can.
    sound = open_slide(whole).read(0, 0, 200, 0.499)
    assert np.array_equal(slide.read(0, 0, 200, 0.499), sound)


def test_an_image_without_tiles_is_refused_above_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("histo_utils.slides.MAX_ARRAY_PIXELS", 1000)
    with pytest.raises(SlideError, match="tiled pyramid"):
        open_slide(_plain(tmp_path / "big.tif", NOISE), mpp=0.5)


# --- tissue ---------------------------------------------------------------------------


def test_mask_agrees_with_the_phantoms_truth(phantoms):
    folder, table = phantoms
    for row in table.itertuples():
        slide = open_slide(folder / row.file)
        truth = np.asarray(Image.open(folder / row.tissue_mask)).astype(bool)
        mask = tissue_mask(slide)
        truth = np.asarray(Image.fromarray(truth).resize(mask.shape[::-1]))
        overlap = (mask & truth).sum() / (mask | truth).sum()
        assert overlap > 0.95, (row.slide, row.pen, row.folded, row.pale, overlap)


def test_no_tissue_on_empty_glass_and_under_pens():
    glass = RNG.normal(243, 2, (300, 300, 3)).clip(0, 255).astype(np.uint8)
    assert not tissue_of_image(glass, 4.0).any()
    for pen in ((20, 130, 60), (30, 60, 160), (25, 25, 30)):
        marked = glass.copy()
        marked[100:200, 50:250] = pen
        assert not tissue_of_image(marked, 4.0).any(), pen


@pytest.mark.parametrize("pen", [(20, 130, 60), (30, 60, 160), (25, 25, 30)])
def test_ink_is_painted_white_and_tissue_left_alone(pen):
    tissue = np.full((256, 256, 3), (200, 140, 180), np.uint8)
    tissue[40:60, 40:60] = (80, 40, 120)  # a nucleus of 10 µm
    assert without_ink(tissue, 0.5) is tissue
    marked = tissue.copy()
    marked[:, 150:200] = pen
    cleaned = without_ink(marked, 0.5)
    assert (cleaned[:, 150:200] == 255).all()
    assert np.array_equal(cleaned[:, :120], tissue[:, :120])


def test_pale_tissue_is_kept_beside_dark_tissue():
    image = np.full((300, 300, 3), 245, np.uint8)
    image[50:130, 50:250] = (150, 70, 140)
    image[170:250, 50:250] = (238, 221, 234)
    mask = tissue_of_image(image, 4.0)
    assert mask[60:120, 60:240].all() and mask[180:240, 60:240].all()
    assert mask.sum() == pytest.approx(2 * 80 * 200, rel=0.05)


# --- grid -----------------------------------------------------------------------------


class Fake:
    """A slide that has only a size and a scale."""

    def __init__(self, width, height, mpp):
        self.dimensions, self.mpp = (width, height), mpp


def test_grid_matches_the_released_yottixel_code(golden):
    expected = json.loads((golden / "yottixel.json").read_text())["patch_grid"]
    mask = np.zeros((300, 500), bool)
    mask[40:260, 60:430] = True
    slide = Fake(10_500, 6_300, 0.25)
    grid = patch_grid(slide, mask=mask, min_tissue=0, whole=False)
    shape = (expected["rows"], expected["cols"])
    found = grid["tissue"].to_numpy().reshape(shape)
    assert np.allclose(found, expected["coverage"], atol=1e-6)
    assert grid[["y", "x"]].to_numpy()[:2].tolist() == expected["first_locs"][:2]


def test_grid_against_a_loop():
    mask = RNG.random((130, 190)) < 0.6
    slide = Fake(1900, 1300, 0.5)
    grid = patch_grid(slide, 100, 1.0, overlap=0.25, mask=mask, min_tissue=0.6)
    rows = []
    for y in range(0, 1300 - 200 + 1, 150):
        for x in range(0, 1900 - 200 + 1, 150):
            share = mask[y // 10 : y // 10 + 20, x // 10 : x // 10 + 20].mean()
            if share >= 0.6:
                rows.append((x, y, share))
    assert grid[["x", "y"]].to_numpy().tolist() == [list(r[:2]) for r in rows]
    assert np.allclose(grid["tissue"], [r[2] for r in rows])


def test_a_patch_of_1000_px_at_20x_spans_500_um_on_any_slide():
    for mpp, side in ((0.25, 2000), (0.499, 1002), (0.2325, 2151)):
        grid = patch_grid(Fake(9000, 9000, mpp), mask=[[True]])
        assert np.diff(grid["x"].unique())[0] == side == round(1000 * 0.5 / mpp)


def test_grid_refuses_an_impossible_overlap():
    with pytest.raises(ValueError, match=r"overlap=1 .* expected 0 ≤ overlap < 1"):
        patch_grid(Fake(100, 100, 0.5), overlap=1, mask=[[True]])
