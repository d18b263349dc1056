"""Shared test data: phantoms, and the real tissue where HISTO_DATA names it."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden():
    return GOLDEN


def _tissue(part):
    folder = Path(os.environ.get("HISTO_DATA", "data")) / part
    if not folder.is_dir():
        pytest.skip(
            f"no real tissue: {folder} is missing; set HISTO_DATA to its parent"
        )
    return folder


@pytest.fixture(scope="session")
def real_slides():
    return _tissue("slides")


@pytest.fixture(scope="session")
def monuseg():
    return _tissue("monuseg")


@pytest.fixture(scope="session")
def lc25000():
    return _tissue("lc25000_lung")


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """Folder and slide table of eight phantoms."""
    from histo_utils.phantom import write_phantom_archive

    folder = tmp_path_factory.mktemp("phantoms")
    table = write_phantom_archive(folder, n_scans=8)
    return folder, table


@pytest.fixture
def write_slide(tmp_path):
    """Return a function that writes an array as a tiled TIFF that OpenSlide opens."""

    def write(name, pixels, mpp=0.5, levels=1):
        path = tmp_path / name
        resolution = None if mpp is None else (1e4 / mpp, 1e4 / mpp)
        with tifffile.TiffWriter(path) as tiff:
            for level in range(levels):
                step = 2**level
                tiff.write(
                    pixels[::step, ::step],
                    tile=(256, 256), photometric="rgb", metadata=None,
                    subfiletype=int(level > 0), compression="deflate",
                    resolution=resolution and tuple(r / step for r in resolution),
                    resolutionunit="CENTIMETER" if resolution else "NONE",
                )  # fmt: skip
        return path

    return write


@pytest.fixture
def patches():
    """Twelve patches of four patients; no files behind them."""
    return pd.DataFrame(
        {
            "image": "none.svs", "size": 100, "mpp": 0.5, "slide_mpp": 0.5,
            "x": np.tile([0, 100, 300], 4), "y": 0,
            "slide": np.repeat(["s0", "s1", "s2", "s3"], 3),
            "patient": np.repeat(["p0", "p1", "p2", "p3"], 3),
            "label": np.repeat(["a", "b", "a", "b"], 3),
            "site": np.repeat(["A", "A", "B", "B"], 3),
        }
    )  # fmt: skip


@pytest.fixture
def bench_archive():
    """Embeddings: eight slides of eight patients, 4 × 4 patches each, two labels."""
    from histo_utils.embeddings import Embeddings

    y, x = (grid.ravel() * 250 for grid in np.mgrid[0:4, 0:4])
    slide = np.repeat(np.arange(8), 16)
    table = pd.DataFrame(
        {
            "image": "none", "x": np.tile(x, 8), "y": np.tile(y, 8), "size": 250,
            "mpp": 0.25, "slide_mpp": 0.25, "slide": slide.astype(str),
            "patient": slide, "label": np.array(["a", "b"])[slide % 2],
            "fold": slide // 2, "site": np.array(["A", "B"])[slide // 4],
        }
    )  # fmt: skip
    rng = np.random.default_rng(0)
    own = rng.standard_normal((8, 5))[slide]
    vectors = own + rng.standard_normal((128, 5))
    return Embeddings(vectors.astype(np.float32), table)
