"""The phantom archive: what is planted is there, and a stopped run resumes."""

import hashlib
import os
import signal
import subprocess
import sys
import time

import numpy as np
import openslide
import pandas as pd
import pytest
from PIL import Image
from scipy import ndimage

from histo_utils import phantom
from histo_utils.phantom import plan_scan, write_phantom_archive

# The fixture `phantoms`: 8 scans with every class at both sites, two pens, a fold, the
# pale scan and a 40x scan.


@pytest.fixture(scope="session")
def scans(phantoms):
    """Slide -> image, nuclei and tissue mask, every µm one pixel of level 0."""
    folder, table = phantoms
    read = {}
    for row in table.itertuples():
        step = round(1 / row.mpp)
        with openslide.OpenSlide(folder / row.file) as slide:
            image = np.asarray(slide.read_region((0, 0), 0, slide.dimensions))
        image = image[::step, ::step, :3].copy()
        nuclei = np.asarray(Image.open(folder / row.nuclei_mask))[::step, ::step]
        tissue = np.asarray(Image.open(folder / row.tissue_mask))
        tissue = np.repeat(np.repeat(tissue, 4, 0), 4, 1)
        read[row.slide] = image, nuclei, tissue
    return read


@pytest.fixture
def tiny(monkeypatch):
    """Stand-in pictures, where only the writing of files is tested."""

    def render(scan, index, seed):
        rng = np.random.default_rng([seed, index])
        image = rng.integers(0, 255, (512, 512, 3), np.uint8)
        return image, image[..., 0] > 99, image[::8, ::8, 1] > 99

    monkeypatch.setattr(phantom, "_render", render)


def hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_openslide_reads_what_was_written(phantoms):
    folder, table = phantoms
    for row in table.itertuples():
        with openslide.OpenSlide(folder / row.file) as slide:
            assert slide.level_count == 3
            assert slide.level_downsamples == (1, 4, 16)
            width, height = slide.dimensions
            assert slide.level_dimensions[1] == (width // 4, height // 4)
            for axis in "xy":
                mpp = float(slide.properties[f"openslide.mpp-{axis}"])
                assert mpp == pytest.approx(row.mpp, rel=1e-6)
            assert slide.properties["openslide.level[0].tile-width"] == "256"
            assert "not tissue" in slide.properties["tiff.ImageDescription"]
        assert row.mpp * row.objective == 10
        assert 900 < width * row.mpp < 1450
        with Image.open(folder / row.nuclei_mask) as mask:
            assert (mask.mode, mask.size) == ("1", (width, height))
        with Image.open(folder / row.tissue_mask) as mask:
            assert mask.mode == "1"
            assert mask.size == (width * row.mpp / 4, height * row.mpp / 4)


def test_table_is_saved_whole(phantoms):
    folder, table = phantoms
    assert " ".join(table) == (
        "file slide patient label site preparation mpp objective pen folded pale "
        "nuclei_mask tissue_mask"
    )
    pd.testing.assert_frame_equal(pd.read_csv(folder / "slides.csv"), table)
    listed = {*table.file, *table.nuclei_mask, *table.tissue_mask}
    assert set(hashes(folder)) == listed | {"slides.csv", "phantom.json"}


def test_design_of_24():
    plan = pd.DataFrame([plan_scan(i) for i in range(24)])
    assert plan.slide.nunique() == 24
    assert plan.patient.nunique() == 16
    assert (pd.crosstab(plan.label, plan.site) == 3).all(axis=None)
    owners = plan.groupby(["label", "site"]).patient.nunique()
    assert len(owners) == 8
    assert (owners == 2).all()
    assert (plan.groupby("patient")[["label", "site"]].nunique() == 1).all(axis=None)
    assert sorted(plan.patient.value_counts()) == [1] * 8 + [2] * 8
    pens = {"none": 20, "green": 2, "blue": 1, "black": 1}
    assert plan.pen.value_counts().to_dict() == pens
    assert (plan.folded.sum(), plan.pale.sum(), (plan.mpp == 0.25).sum()) == (3, 1, 4)
    assert plan[plan.mpp == 0.25].label.nunique() == 4
    again = {plan_scan(i).patient for i in range(24, 48)}
    assert len(again) == 16 and not again & set(plan.patient)


def test_masks_fit_the_image(phantoms, scans):
    """Haematoxylin absorbs red, eosin hardly: red density shows nuclei."""
    for row in phantoms[1].itertuples():
        image, nuclei, tissue = scans[row.slide]
        red = -np.log(np.maximum(image[..., 0], 1) / 245)
        inside, outside = red[nuclei].mean(), red[tissue & ~nuclei].mean()
        assert inside > 2.2 * outside, row.slide
        assert (nuclei & ~tissue).sum() < 0.005 * nuclei.sum()
        assert 0.05 < nuclei[tissue].mean() < 0.6
        assert 0.4 < tissue.mean() < 0.9
        assert image[tissue, 1].mean() < 215
        if row.pen == "none":
            ground = image[~ndimage.binary_dilation(tissue, iterations=6)]
            assert 225 < ground.mean() < 252  # white, and not exactly 255
            assert (ground.min(1) > 200).mean() > 0.999


def test_pen_is_neither_tissue_nor_nuclei(phantoms, scans):
    pens = phantoms[1].query("pen != 'none'")
    assert list(pens.pen) == ["green", "blue"]
    for row in pens.itertuples():
        image, nuclei, tissue = scans[row.slide]
        red, green, blue = (image[..., c].astype(int) for c in range(3))
        other = {"green": green, "blue": blue}[row.pen]
        ink = (red < 50) & (other > red + 30)
        ink = ndimage.binary_opening(ink, iterations=10)
        assert ink.sum() > 5000  # µm²
        core = ndimage.binary_erosion(ink, iterations=6)
        assert not tissue[core].any()
        assert not nuclei[core].any()
        near = ndimage.binary_dilation(ink, iterations=30) & ~ink
        bare = image.min(2) > 200
        assert tissue[near].mean() > 0.1  # the stroke crosses the tissue edge
        assert (bare & ~tissue)[near].mean() > 0.05  # … on to the glass


def test_pale_and_fold(phantoms, scans):
    table = phantoms[1].set_index("slide")
    density = {
        name: -np.log(np.maximum(image[tissue], 1) / 245).mean()
        for name, (image, _, tissue) in scans.items()
    }
    pale = table.index[table.pale].item()
    assert density[pale] < 0.6 * min(v for k, v in density.items() if k != pale)
    fold = table.index[table.folded].item()
    image, _, tissue = scans[fold]
    smooth = ndimage.gaussian_filter(image[..., 1].astype(float), 5)
    dark = smooth < 0.6 * np.median(smooth[tissue])
    assert dark.sum() > 3000  # µm²
    assert tissue[dark].mean() > 0.98


def nearest_agrees(features, labels):
    """Share of rows whose nearest other row has their label."""
    features = (features - features.mean(0)) / features.std(0)
    far = np.linalg.norm(features[:, None] - features[None], axis=2)
    np.fill_diagonal(far, np.inf)
    return (labels[far.argmin(1)] == labels).mean()


def test_site_rules_colour_and_class_rules_texture(phantoms, scans):
    table = phantoms[1]
    colour, shape = [], []
    for row in table.itertuples():
        image, nuclei, tissue = scans[row.slide]
        colour.append(image[tissue].mean(0))
        pieces, n = ndimage.label(nuclei)
        area = ndimage.sum_labels(nuclei, pieces, np.arange(1, n + 1))
        edge = (nuclei & ~ndimage.binary_erosion(nuclei)).sum() / nuclei.sum()
        clear = ndimage.gaussian_filter(nuclei.astype(np.float32), 6)[tissue].std()
        dense = nuclei.sum() / tissue.sum()
        shape.append([dense, np.log(np.median(area)), edge, clear])
    usual = ~table.pale.to_numpy()  # weak staining is a planted outlier of colour
    colour, shape = np.array(colour), np.array(shape)
    site, label = table.site.to_numpy(), table.label.to_numpy()
    # Means on 7 and 8 slides: chance is 18/42 for the site and 8/56 for the class.
    assert nearest_agrees(colour[usual], site[usual]) >= 0.75
    assert nearest_agrees(shape, label) >= 0.75


@pytest.mark.parametrize("nth", [1, 4, 10])
def test_interrupted_run_resumes(tiny, tmp_path, monkeypatch, nth):
    """Stop at the nth rename (note, then 3 files a scan): same files in the end."""
    write_phantom_archive(tmp_path / "calm", n_scans=4)
    calls, rename = [], os.replace

    def stop(source, target):
        calls.append(target)
        if len(calls) == nth:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            write_phantom_archive(tmp_path / "stopped", n_scans=4)
    half = hashes(tmp_path / "stopped")
    calm = hashes(tmp_path / "calm")
    assert "slides.csv" not in half
    assert half == {name: calm[name] for name in half}  # nothing half-written
    assert len(half) == nth - 1
    times = {n: (tmp_path / "stopped" / n).stat().st_mtime_ns for n in half}
    write_phantom_archive(tmp_path / "stopped", n_scans=4)
    assert hashes(tmp_path / "stopped") == calm
    done = [name for name in times if name.endswith(".tif")]
    assert all((tmp_path / "stopped" / n).stat().st_mtime_ns == times[n] for n in done)


@pytest.mark.slow
def test_killed_process_resumes(phantoms, tmp_path):
    """SIGKILL while the third scan is made; a part of a dead process is left too."""
    code = (
        "import sys; from histo_utils.phantom import write_phantom_archive; "
        "write_phantom_archive(sys.argv[1], n_scans=3)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    limit = time.monotonic() + 60
    while not (tmp_path / "images/phantom_001.tif").exists():
        assert time.monotonic() < limit
        time.sleep(0.005)
    time.sleep(0.1)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "slides.csv").exists()
    node = phantom.platform.node()
    part = tmp_path / f"images/.phantom_002.tif.{node}.{child.pid}.part"
    part.write_bytes(b"half")
    assert len(write_phantom_archive(tmp_path, n_scans=3)) == 3
    ours, theirs = hashes(tmp_path), hashes(phantoms[0])
    scans = [name for name in theirs if name[-5] in "012" and "phantom_" in name]
    assert len(scans) == 9
    assert set(ours) == {*scans, "slides.csv", "phantom.json"}
    assert {k: ours[k] for k in scans} == {k: theirs[k] for k in scans}


def test_lost_file_is_made_again(tiny, tmp_path):
    write_phantom_archive(tmp_path, n_scans=2)
    before = hashes(tmp_path)
    (tmp_path / "tissue_masks/phantom_001.png").unlink()
    write_phantom_archive(tmp_path, n_scans=2)
    assert hashes(tmp_path) == before


def test_other_archive_is_refused(tiny, tmp_path):
    write_phantom_archive(tmp_path, n_scans=2, seed=3)
    before = hashes(tmp_path)
    with pytest.raises(ValueError, match=r"holds.*'n_scans': 2, 'seed': 3") as error:
        write_phantom_archive(tmp_path, n_scans=2, seed=4)
    assert "'seed': 4} was wanted; pass another folder" in str(error.value)
    with pytest.raises(ValueError, match="'n_scans': 5"):
        write_phantom_archive(tmp_path, n_scans=5, seed=3)
    assert hashes(tmp_path) == before
    (tmp_path / "phantom.json").write_text("{")
    with pytest.raises(ValueError, match="unreadable"):
        write_phantom_archive(tmp_path, n_scans=2, seed=3)
    (tmp_path / "phantom.json").unlink()
    with pytest.raises(ValueError, match=r"slides\.csv without phantom\.json"):
        write_phantom_archive(tmp_path, n_scans=2, seed=3)


def test_numbers_out_of_range(tmp_path):
    for wrong in ({"n_scans": 0}, {"n_scans": 2.5}, {"seed": -1}, {"seed": 0.5}):
        name, value = next(iter(wrong.items()))
        with pytest.raises(ValueError, match=f"{name}={value}: pass a whole number"):
            write_phantom_archive(tmp_path / "none", **wrong)
    assert not (tmp_path / "none").exists()
