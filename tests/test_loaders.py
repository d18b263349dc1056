import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from histo_utils import patches
from histo_utils.loaders import PatchDataset, Preprocessing, colour, grey, loader
from histo_utils.stains import StainMatch, fit_stains

SIZE = 32
PURPLE, PINK = np.array([0.65, 0.70, 0.29]), np.array([0.07, 0.99, 0.11])


def stained(rng, haematoxylin, eosin, strength=1.0, side=128):
    """An image of two stains in random amounts, a fifth of it clear glass."""
    amount = rng.gamma(2.0, 0.35, (side, side, 2)) * strength
    amount[: side // 5] = 0
    density = amount @ np.stack([haematoxylin, eosin])
    return np.rint(255 * np.exp(-density)).astype(np.uint8)


def table_of(folder, images):
    """Write images (sides a multiple of SIZE) and cut each into a patch table."""
    rows = []
    for name, image in images.items():
        path = folder / f"{name}.png"
        Image.fromarray(image).save(path)
        rows += [
            {"image": str(path), "x": x, "y": y, "slide": name, "patient": name}
            for y in range(0, image.shape[0], SIZE)
            for x in range(0, image.shape[1], SIZE)
        ]
    return pd.DataFrame(rows).assign(size=SIZE, mpp=0.5, slide_mpp=0.5, label="a")


@pytest.fixture
def table(tmp_path):
    rng = np.random.default_rng(0)
    strange = np.array([0.45, 0.60, 0.66])
    images = {
        "usual": stained(rng, PURPLE, PINK),
        "blue and pale": stained(rng, strange, PINK, 0.6),
        "white": np.full((64, 64, 3), 255, np.uint8),
    }
    return table_of(tmp_path, images)


def test_items_are_the_patches_in_table_order(table):
    data = PatchDataset(table)
    assert len(data) == len(table)
    for i in (0, 7, len(table) - 1):
        tensor, position = data[i]
        pixels = patches.read_patch(table.iloc[i])
        assert position == i and tensor.dtype == torch.float32
        np.testing.assert_allclose(
            tensor.numpy(), pixels.transpose(2, 0, 1) / 255, atol=1e-6
        )


def test_nothing_is_opened_before_it_is_asked_for(table):
    bad = table.assign(image=[*table["image"][:-1], "gone.png"])
    data = PatchDataset(bad)
    assert len(pickle.dumps(data)) < 100_000
    assert data[0][0].shape == (3, SIZE, SIZE)
    with pytest.raises(Exception, match=r"gone\.png"):
        data[len(bad) - 1]


def test_a_pickled_data_set_gives_the_same(table):
    match = StainMatch.fit(table)
    first = PatchDataset(table, match, Preprocessing(size=16))
    second = pickle.loads(pickle.dumps(first))
    for i in (0, 20, len(table) - 1):
        assert torch.equal(first[i][0], second[i][0])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_give_what_one_process_gives(table, start):
    some = table.iloc[:20]
    patches.read_patch(some.iloc[0])  # open in the parent: a fork inherits it
    alone = loader(some, grey, batch_size=6)
    shared = loader(some, grey, batch_size=6, workers=2, start=start)
    for (a, i), (b, j) in zip(alone, shared, strict=True):
        assert torch.equal(a, b) and torch.equal(i, j)


def test_order_depends_on_the_seed_alone(table):
    def order(**options):
        made = loader(table, batch_size=5, shuffle=True, **options)
        return [torch.cat([p for _, p in made]).tolist() for _ in range(2)]

    torch.manual_seed(1)
    first = order(seed=3)
    torch.manual_seed(2)
    assert order(seed=3) == first
    assert order(seed=4) != first and first[0] != first[1]
    assert sorted(first[0]) == list(range(len(table)))
    plain = torch.cat([p for _, p in loader(table, batch_size=5)])
    assert plain.tolist() == list(range(len(table)))


def test_preprocessing_by_hand():
    image = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    made = Preprocessing((0.1, 0.2, 0.3), (0.5, 0.25, 2.0))(image)
    for c, (mean, std) in enumerate(zip((0.1, 0.2, 0.3), (0.5, 0.25, 2), strict=True)):
        by_hand = (image[..., c] / 255 - mean) / std
        np.testing.assert_allclose(made[c].numpy(), by_hand, atol=1e-6)
    half = Preprocessing((0.5,) * 3, (0.5,) * 3, size=2)(image)
    small = np.asarray(Image.fromarray(image).resize((2, 2), Image.Resampling.BILINEAR))
    expected = small.transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(half.numpy(), expected, atol=1e-6)


def test_grey_is_grey():
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    made = grey(image)
    assert made.shape == image.shape and made.dtype == np.uint8
    assert (made[..., 0] == made[..., 1]).all() and (made[..., 1] == made[..., 2]).all()
    luma = image @ np.array([0.299, 0.587, 0.114])
    assert abs(made[..., 0] - luma).max() <= 1
    assert (grey(made) == made).all()
    assert colour(image) is image


def test_stain_matching_moves_a_slide_towards_the_target(table):
    match = StainMatch.fit(table, target="usual")
    assert match.degenerate == ("white",)
    by_slide = {
        slide: np.stack([patches.read_patch(r) for r in rows.to_dict("records")])
        for slide, rows in table.groupby("slide")
    }
    moved = np.stack([match(p, "blue and pale") for p in by_slide["blue and pale"]])
    goal = by_slide["usual"].mean((0, 1, 2))
    before = abs(by_slide["blue and pale"].mean((0, 1, 2)) - goal).max()
    after = abs(moved.mean((0, 1, 2)) - goal).max()
    assert before > 25 and after < before / 4
    # the target's own tiles stay what they were, up to the plane of two stains
    own = np.stack([match(p, "usual") for p in by_slide["usual"]])
    assert abs(own.astype(int) - by_slide["usual"]).mean() < 2


def test_stain_fit_finds_the_stains_of_the_slide():
    fit = fit_stains([stained(np.random.default_rng(1), PURPLE, PINK)])
    assert not fit.degenerate
    for found, true in zip(fit.stains, (PURPLE, PINK), strict=True):
        cosine = found @ true / np.linalg.norm(true)
        assert np.degrees(np.arccos(min(1, cosine))) < 8


def test_fit_is_one_for_a_slide_not_for_a_tile(table):
    match = StainMatch.fit(table, target="usual")
    rows = table[table["slide"] == "blue and pale"]
    tiles = [patches.read_patch(row) for row in rows.to_dict("records")]
    wide = np.concatenate(tiles[-4:], axis=1)
    together = match(wide, "blue and pale")
    apart = np.concatenate([match(t, "blue and pale") for t in tiles[-4:]], axis=1)
    np.testing.assert_array_equal(together, apart)


def test_white_tiles_and_degenerate_slides_are_left_alone(table):
    match = StainMatch.fit(table, target="usual")
    white = np.full((16, 16, 3), 250, np.uint8)
    assert match.untouched(white, "usual")
    assert match(white, "usual") is white
    dark = stained(np.random.default_rng(2), PURPLE, PINK)
    assert not match.untouched(dark, "usual")
    assert match.untouched(dark, "white")  # its slide could not be fitted
    assert match(dark, "white") is dark


def test_one_stain_is_degenerate():
    rng = np.random.default_rng(0)
    one = np.exp(-rng.gamma(2.0, 0.4, (64, 64, 1)) * PINK) * 255
    assert fit_stains([np.rint(one).astype(np.uint8)]).degenerate


def test_identity_follows_the_fit(table):
    first, again = StainMatch.fit(table), StainMatch.fit(table)
    assert first.identity == again.identity
    assert StainMatch.fit(table, target="usual").identity != first.identity


def test_bad_input(table):
    with pytest.raises(ValueError, match="the patch table is empty"):
        PatchDataset(table.iloc[:0])
    with pytest.raises(ValueError, match="batch_size=0, workers=0; expected 1"):
        loader(table, batch_size=0)
    with pytest.raises(ValueError, match="unknown interpolation 'cubic'; valid are"):
        Preprocessing(interpolation="cubic")
    with pytest.raises(ValueError, match="the deviations above 0"):
        Preprocessing(std=(1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="'none' is not a slide of the table"):
        StainMatch.fit(table, target="none")
    only_white = table[table["slide"] == "white"]
    with pytest.raises(ValueError, match="none of 1 slides shows two stains"):
        StainMatch.fit(only_white)
    with pytest.raises(ValueError, match="the target's stains are degenerate"):
        StainMatch.fit(table, target="white")
    with pytest.raises(ValueError, match=r"slide 'new' was not fitted \(3 were\)"):
        StainMatch.fit(table)(np.zeros((2, 2, 3), np.uint8), "new")
