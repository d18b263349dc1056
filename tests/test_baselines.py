import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from histo_utils import baselines
from histo_utils.baselines import grey_histogram, mean_rgb, nuclear_area, rgb_histogram
from histo_utils.embeddings import Embeddings
from histo_utils.protocols import Split
from histo_utils.stains import cellularity

SIZE, MPP = 64, 0.5


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Three patches of one image: flat pink, noise, pink with violet discs."""
    rng = np.random.default_rng(0)
    image = np.empty((SIZE, 3 * SIZE, 3), np.uint8)
    image[:] = (232, 170, 205)
    image[:, SIZE : 2 * SIZE] = rng.integers(0, 256, (SIZE, SIZE, 3))
    y, x = np.mgrid[:SIZE, : 3 * SIZE]
    for cx, cy in ((140, 12), (160, 30), (180, 50), (150, 50)):
        image[(x - cx) ** 2 + (y - cy) ** 2 < 64] = (88, 52, 140)
    path = tmp_path_factory.mktemp("baselines") / "region.png"
    Image.fromarray(image).save(path)
    table = pd.DataFrame({"image": str(path), "x": [0, SIZE, 2 * SIZE], "y": 0})
    table = table.assign(size=SIZE, mpp=MPP, slide_mpp=MPP, slide="s", patient="p")
    table.attrs["pixels"] = [image[:, i * SIZE : (i + 1) * SIZE] for i in range(3)]
    return table


def test_mean_rgb(table):
    made = mean_rgb(table)
    assert made.vectors.shape == (3, 3)
    for vector, image in zip(made.vectors, table.attrs["pixels"], strict=True):
        by_loops = [np.mean([p[c] for row in image for p in row]) for c in range(3)]
        np.testing.assert_allclose(vector, np.array(by_loops) / 255, rtol=1e-6)
    assert made.table["x"].tolist() == table["x"].tolist()


@pytest.mark.parametrize("bins", [1, 3, 4, 8])
def test_rgb_histogram_equals_numpy(table, bins):
    made = rgb_histogram(table, bins)
    assert made.vectors.shape == (3, bins**3)
    np.testing.assert_allclose(made.vectors.sum(axis=1), 1, rtol=1e-6)
    for vector, image in zip(made.vectors, table.attrs["pixels"], strict=True):
        edges = [np.linspace(0, 256, bins + 1)] * 3
        counts, _ = np.histogramdd(image.reshape(-1, 3).astype(float), edges)
        np.testing.assert_allclose(vector, counts.ravel() / SIZE**2, atol=1e-7)
    root = rgb_histogram(table, bins, root=True).vectors
    np.testing.assert_allclose(root**2, made.vectors, atol=1e-6)
    white = rgb_histogram(table, bins, transform=lambda image, slide: image * 0 + 255)
    assert (white.vectors[:, -1] == 1).all()


def test_place_of_a_colour_in_the_histogram(table):
    flat = rgb_histogram(table).vectors[0]
    assert flat[(3 * 4 + 2) * 4 + 3] == 1  # (232, 170, 205) // 64


def test_grey_histogram_equals_numpy(table):
    made = grey_histogram(table, 16).vectors
    for vector, image in zip(made, table.attrs["pixels"], strict=True):
        grey = image.reshape(-1, 3) @ np.array([0.299, 0.587, 0.114])
        counts, _ = np.histogram(grey, 16, (0, 256))
        np.testing.assert_allclose(vector**2, counts / SIZE**2, atol=1e-6)
    with pytest.raises(ValueError, match="bins=0; expected 1 to 256"):
        grey_histogram(table, 0)


def test_nuclear_area(table):
    made = nuclear_area(table)
    assert made.vectors.shape == (3, 1)
    for (value,), image in zip(made.vectors, table.attrs["pixels"], strict=True):
        assert value == pytest.approx(cellularity(image, mpp=MPP), abs=1e-6)
    assert made.vectors[2, 0] > made.vectors[0, 0]


def test_bad_input(table):
    for baseline in (mean_rgb, rgb_histogram, nuclear_area):
        with pytest.raises(ValueError, match="the patch table is empty"):
            baseline(table.iloc[:0])
    for bins in (0, 257):
        with pytest.raises(ValueError, match=f"bins={bins}; expected 1 to 256"):
            rgb_histogram(table, bins)


def probed(y, c_values, gap=1.5):
    """Predictions for the last of three parts: training, validation, test."""
    rng, part = np.random.default_rng(0), np.arange(60) // 20
    x = rng.standard_normal((60, 90)).astype(np.float32)
    truth = np.array(["a", "b", "c"])[np.arange(60) % 3]
    x[:, 0] += gap * (truth == "b")
    x[:, 1] += gap * (truth == "c")
    split = Split("organ", part == 0, part == 1, part < 2, part == 2)
    made = Embeddings(x, pd.DataFrame({"label": truth if y is None else y}))
    return baselines.logistic_probe(made, split, c_values), made, split


def test_logistic_probe_is_the_plain_classifier_and_never_sees_test_labels():
    said, made, split = probed(None, [0.01])
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    x, y = made.vectors, made.table["label"].to_numpy()
    expected = plain.fit(x[split.gallery], y[split.gallery]).predict(x[split.test])
    assert (said == expected).mean() > 0.94  # solvers stop a little apart
    other = np.where(split.test, "a", y)
    assert (probed(other, [1e-4, 0.01])[0] == probed(None, [1e-4, 0.01])[0]).all()


def test_logistic_probe_takes_the_smallest_of_equally_good_constants():
    wide = {"gap": 50.0}
    many, one = (probed(None, c, **wide)[0] for c in ([10.0, 1.0, 5.0], [1.0]))
    assert (many == one).all()
