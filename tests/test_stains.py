"""Cellularity on published toys, planted mixtures and tissue; stain matching."""

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image
from scipy.stats import spearmanr
from skimage.color import rgb2hed

from histo_utils import patches
from histo_utils.stains import (
    NucleiFit,
    StainMatch,
    cellularity,
    fit_stains,
    haematoxylin,
    macenko_stains,
    nuclei_mask,
    nuclei_threshold,
)

# All 43 regions: Spearman over 688 patches, mean within regions, mean Dice.
REFERENCE = [0.852, 0.836, 0.774]
GOLDEN = Path(__file__).parent / "golden"
BLUE, PINK = np.array([0.55, 0.75, 0.37]), np.array([0.15, 0.85, 0.50])
BLUE, PINK = BLUE / np.linalg.norm(BLUE), PINK / np.linalg.norm(PINK)


def paint(blue, pink):
    """Image of the given amounts of the two planted stains (Beer-Lambert)."""
    density = np.asarray(blue)[..., None] * BLUE + np.asarray(pink)[..., None] * PINK
    return np.round(255 * np.exp(-density)).astype(np.uint8)


def disc_scene(size=200, radius=20, seed=0):
    """Pink ground with one blue disc; returns image and disc."""
    row, col = np.mgrid[:size, :size] - size // 2
    disc = row**2 + col**2 < radius**2
    pink = 0.6 + 0.1 * np.random.default_rng(seed).random((size, size))
    return paint(np.where(disc, 1.2, 0.0), pink), disc


@pytest.fixture(scope="module")
def toy():
    return np.load(GOLDEN / "cellularity_toy.npz"), json.loads(
        (GOLDEN / "cellularity.json").read_text()
    )


def test_golden_fixed_threshold(toy):
    arrays, golden = toy
    fit = NucleiFit("hed", 0.11, 0.0)
    got = [cellularity(p, fit=fit) for p in arrays["patches"]]
    assert got == golden["cellularity_fixed"]


def test_golden_pooled_otsu(toy):
    arrays, golden = toy
    fit = nuclei_threshold(arrays["patches"], stains="hed", smooth=0)
    assert fit.threshold == pytest.approx(golden["H_threshold_otsu_pooled"], abs=1e-9)
    got = [cellularity(p, fit=fit) for p in arrays["patches"]]
    assert got == golden["cellularity_otsu"]
    for patch, channel in zip(arrays["patches"], arrays["H_channel"], strict=True):
        np.testing.assert_allclose(haematoxylin(patch, "hed"), channel, atol=1e-6)
        np.testing.assert_array_equal(
            haematoxylin(patch, "hed"), rgb2hed(patch)[..., 0]
        )


def test_planted_stains_are_found():
    # Every tenth pixel holds one stain only, and one more the other: the 5 % ends. Dark
    # enough that no channel of the pink is faint.
    rng = np.random.default_rng(0)
    blue, pink = 1.2 + rng.random((2, 256, 256))
    kind = rng.integers(0, 10, blue.shape)
    pink[kind == 0], blue[kind == 1] = 0, 0
    image = paint(blue, pink)
    stains = macenko_stains(image)
    angle = np.degrees(np.arccos(np.clip((stains * [BLUE, PINK]).sum(1), -1, 1)))
    assert angle.max() < 1.0
    np.testing.assert_allclose(np.linalg.norm(stains, axis=1), 1)
    amount = haematoxylin(image, np.array([BLUE, PINK]))
    np.testing.assert_allclose(amount[kind == 1], 0, atol=0.06)


def test_slow_macenko_agrees():
    image = paint(*(1.2 + np.random.default_rng(1).random((2, 80, 80))))
    od = [[-np.log(max(int(v), 1) / 255) for v in p] for p in image.reshape(-1, 3)]
    od = np.array([p for p in od if min(p) > 0.15])
    v1, v2 = np.linalg.svd(od, full_matrices=False)[2][:2]
    v1 = v1 if v1.sum() > 0 else -v1
    angle = [np.arctan2(p @ v2, p @ v1) for p in od]
    ends = np.percentile(angle, [5, 95])
    slow = np.array([np.cos(a) * v1 + np.sin(a) * v2 for a in ends])
    slow = slow[np.argsort(-slow[:, 0])]
    np.testing.assert_allclose(
        macenko_stains(image.reshape(-1, 3), percent=5), slow, atol=1e-5
    )


@pytest.mark.parametrize("white", [255, 243])
def test_blank_has_none(white):
    blank = np.full((64, 80, 3), white, np.uint8)
    assert cellularity(blank) == 0
    noise = np.random.default_rng(0).integers(-6, 7, blank.shape)
    assert cellularity(np.clip(blank + noise, 0, 255).astype(np.uint8)) == 0
    assert nuclei_threshold([blank]).threshold == np.inf


def test_eosin_alone_has_none():
    pink = 0.3 + np.random.default_rng(0).random((200, 200))
    assert cellularity(paint(np.zeros_like(pink), pink)) == 0


def test_disc_by_hand():
    image, disc = disc_scene()
    fit = NucleiFit(np.array([BLUE, PINK]), 0.6, 0.0)
    np.testing.assert_array_equal(nuclei_mask(image, fit=fit), disc)
    assert cellularity(image, fit=fit) == disc.sum() / 40_000
    # Otsu sits between the plateaus; the Gaussian may move only the rim.
    assert abs(cellularity(image) - disc.mean()) < 0.1 * disc.mean()


def test_holes_by_area():
    blue = np.zeros((40, 40))
    blue[5:25, 5:25] = 1.2
    blue[10:20, 10:20] = 0  # 100 px: 6.25 um2 at 0.25, 25 um2 at 0.5 um per pixel
    blue[30:, :5] = blue[30, :5] = 1.2
    blue[33:, :4] = 0  # meets the border: no hole
    image = paint(blue, np.full((40, 40), 0.5))
    fit = NucleiFit(np.array([BLUE, PINK]), 0.6, 0.0)
    border = 10 * 5 - 7 * 4
    assert nuclei_mask(image, 0.25, fit).sum() == 400 + border
    assert nuclei_mask(image, 0.5, fit).sum() == 300 + border  # "less than" 25
    assert nuclei_mask(image, 0.25, fit, holes=0).sum() == 300 + border


def test_white_ground_changes_nothing():
    image, disc = disc_scene()
    wide = np.full((600, 600, 3), 250, np.uint8)
    wide[200:400, 200:400] = image
    got = cellularity(wide) * 600**2
    assert abs(got - cellularity(image) * 200**2) < 0.03 * disc.sum()


def test_order_of_patches_and_empty_patch():
    scenes = [disc_scene(radius=r, seed=r)[0] for r in (8, 16, 24)]
    empty = disc_scene(radius=0, seed=9)[0]
    one = nuclei_threshold([*scenes, empty])
    two = nuclei_threshold([empty, *scenes[::-1]])
    np.testing.assert_allclose(one.stains, two.stains, atol=1e-9)
    assert one.threshold == pytest.approx(two.threshold, rel=1e-5)
    assert cellularity(empty, fit=one) == 0
    shares = [cellularity(s, fit=one) for s in scenes]
    assert shares == sorted(shares)


def test_bad_input():
    black = np.zeros((4, 4, 3), np.uint8)
    for image in (black / 1.0, np.zeros((4, 4, 4), np.uint8), black[:0]):
        with pytest.raises(ValueError, match=r"8-bit RGB image|no pixels"):
            cellularity(image)
    with pytest.raises(ValueError, match="positive µm per pixel, got 0"):
        cellularity(black, mpp=0)
    with pytest.raises(ValueError, match="holes must be zero or more, got -1"):
        nuclei_mask(black, holes=-1)
    with pytest.raises(ValueError, match=r"stains must be .*'hes'"):
        haematoxylin(black, "hes")
    with pytest.raises(ValueError, match="at least one image"):
        nuclei_threshold([])


@pytest.mark.tissue
@pytest.mark.slow
def test_reference_figures(monuseg):
    expert, got, dice = [], [], []
    with open(monuseg / "slides.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        truth = np.asarray(Image.open(monuseg / row["mask"])) > 0
        mask = nuclei_mask(tifffile.imread(monuseg / row["file"]), float(row["mpp"]))
        for store, m in ((expert, truth), (got, mask)):
            store.append(m.reshape(4, 250, 4, 250).mean((1, 3)).ravel())
        dice.append(2 * (mask & truth).sum() / (mask.sum() + truth.sum()))
    pooled = spearmanr(np.ravel(expert), np.ravel(got)).statistic
    within = [spearmanr(e, g).statistic for e, g in zip(expert, got, strict=True)]
    figures = [pooled, np.mean(within), np.mean(dice)]
    assert figures == pytest.approx(REFERENCE, abs=0.005)


# --- stain matching

SIDE = 32
PURPLE, ROSE = np.array([0.65, 0.70, 0.29]), np.array([0.07, 0.99, 0.11])


def stained(rng, haematoxylin, strength=1.0, side=128):
    """An image of two stains in random amounts, a fifth of it clear glass."""
    amount = rng.gamma(2.0, 0.35, (side, side, 2)) * strength
    amount[: side // 5] = 0
    density = amount @ np.stack([haematoxylin, ROSE])
    return np.rint(255 * np.exp(-density)).astype(np.uint8)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Patches of a usual slide, a strange one and a white one."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("stains")
    images = {
        "usual": stained(rng, PURPLE),
        "blue and pale": stained(rng, np.array([0.45, 0.60, 0.66]), 0.6),
        "white": np.full((64, 64, 3), 255, np.uint8),
    }
    rows = []
    for name, image in images.items():
        Image.fromarray(image).save(folder / f"{name}.png")
        for y in range(0, len(image), SIDE):
            for x in range(0, len(image), SIDE):
                rows.append((str(folder / f"{name}.png"), x, y, name, name))
    table = pd.DataFrame(rows, columns=["image", "x", "y", "slide", "patient"])
    return table.assign(size=SIDE, mpp=0.5, slide_mpp=0.5, label="a")


def tiles(table, slide):
    rows = table[table["slide"] == slide].to_dict("records")
    return np.stack([patches.read_patch(row) for row in rows])


def test_matching_moves_a_slide_towards_the_target(table):
    match = StainMatch.fit(table, target="usual")
    assert match.degenerate == ("white",)
    strange, usual = tiles(table, "blue and pale"), tiles(table, "usual")
    moved = np.stack([match(tile, "blue and pale") for tile in strange])
    goal = usual.mean((0, 1, 2))
    before = abs(strange.mean((0, 1, 2)) - goal).max()
    assert before > 25 and abs(moved.mean((0, 1, 2)) - goal).max() < before / 4
    # the target's own tiles stay what they were, up to the plane of two stains
    own = np.stack([match(tile, "usual") for tile in usual])
    assert abs(own.astype(int) - usual).mean() < 2


def test_fit_is_one_per_slide_not_per_tile(table):
    match = StainMatch.fit(table, target="usual")
    some = list(tiles(table, "blue and pale")[-4:])
    together = match(np.concatenate(some, axis=1), "blue and pale")
    apart = np.concatenate([match(t, "blue and pale") for t in some], axis=1)
    np.testing.assert_array_equal(together, apart)


def test_white_tiles_and_degenerate_slides_are_left_alone(table):
    match = StainMatch.fit(table, target="usual")
    white = np.full((16, 16, 3), 250, np.uint8)
    assert match(white, "usual") is white
    dark = stained(np.random.default_rng(2), PURPLE)
    assert match(dark, "usual") is not dark
    assert match(dark, "white") is dark  # its slide could not be fitted


def test_one_stain_is_degenerate():
    rng = np.random.default_rng(0)
    one = np.exp(-rng.gamma(2.0, 0.4, (64, 64, 1)) * ROSE) * 255
    assert fit_stains([np.rint(one).astype(np.uint8)]).degenerate


def test_matches_that_cannot_be(table):
    with pytest.raises(ValueError, match="'none' is not a slide of the table"):
        StainMatch.fit(table, target="none")
    with pytest.raises(ValueError, match="none of 1 slides shows two stains"):
        StainMatch.fit(table[table["slide"] == "white"])
    with pytest.raises(ValueError, match="the target's stains are degenerate"):
        StainMatch.fit(table, target="white")
    with pytest.raises(ValueError, match=r"slide 'new' was not fitted \(3 were\)"):
        StainMatch.fit(table)(np.zeros((2, 2, 3), np.uint8), "new")
