import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import save_file

from histo_utils.collection import __main__ as command
from histo_utils.collection import find, index_slides
from histo_utils.collection.__main__ import main
from histo_utils.collection.drawing import for_the_atlas
from histo_utils.collection.upkeep import process as process_of
from histo_utils.embeddings import Embeddings, load_embeddings
from histo_utils.encoders import embed, frozen
from histo_utils.mosaic import slide_mosaic
from histo_utils.patches import read_patch
from histo_utils.slides import open_slide

SMALL = "mobilenetv3_small_050"
NAMES = ("TCGA-AB-0001-01A", "TCGA-AB-0001-01B", "TCGA-CD-0002-01A", "ours")
FILES = ("vectors.npy", "patches.parquet")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of a small network, from a seed."""
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_file(frozen(SMALL, seed=0).network.network.state_dict(), path)
    return path


@pytest.fixture
def folder(phantoms, tmp_path):
    """Four phantoms as a folder of slides without a CSV; two are of one patient."""
    source, table = phantoms
    (tmp_path / "slides").mkdir()
    stained = table.loc[~table["pale"], "file"]  # a pale one warns, rightly
    for name, file in zip(NAMES, stained, strict=False):
        shutil.copy2(source / file, tmp_path / "slides" / f"{name}.tif")
    return tmp_path / "slides"


@pytest.fixture
def index(folder, weights, tmp_path):
    """Index the folder, in this process."""

    def run(out=tmp_path / "out", **how):
        how = {"encoder": SMALL, "weights": weights, "fraction": 0.1} | how
        with ThreadPoolExecutor(1) as pool:
            return index_slides(folder, out, executor=pool, progress=False, **how)

    return run


def archive_bytes(out):
    return [(out / "archive" / name).read_bytes() for name in FILES]


@pytest.mark.slow
def test_the_archive_holds_the_vectors_of_the_mosaics(folder, index, weights):
    done = index()
    archive = load_embeddings(done.archive)
    expected = []
    for name in sorted(p.name for p in folder.iterdir()):
        with open_slide(folder / name) as slide:
            patches = slide_mosaic(slide, size=224, mpp=0.5, fraction=0.1)
        chosen = patches[patches["in_mosaic"]]
        expected.append(chosen.assign(image=str(folder / name), slide=name[:-4]))
    expected = pd.concat(expected, ignore_index=True)
    columns = ["image", "slide", "x", "y", "size", "mpp"]
    pd.testing.assert_frame_equal(archive.table[columns], expected[columns])
    # Vectors patch by patch, read anew.
    one_by_one = embed(
        frozen(SMALL, weights), archive.table, batch_size=1, progress=False
    )
    np.testing.assert_allclose(archive.vectors, one_by_one.vectors, atol=1e-5)
    # Patients from TCGA's names; elsewhere the slide, and that is said.
    patients = archive.table.groupby("slide")["patient"].first()
    assert patients[list(NAMES)].tolist() == [
        "TCGA-AB-0001", "TCGA-AB-0001", "TCGA-CD-0002", "ours"
    ]  # fmt: skip
    assert "no patient is known for 1 of 4 slides" in " ".join(done.notes)
    report = done.report.set_index("slide")
    assert (report["status"] == "done").all() and not report["reused"].any()
    assert report["patches"].to_dict() == expected["slide"].value_counts().to_dict()
    assert done.worked_on == 4
    assert done.slides_an_hour == pytest.approx(4 * 3600 / done.seconds)
    size = sum(len(part) for part in archive_bytes(done.archive.parent))
    assert done.megabytes_a_slide == pytest.approx(size / 4e6)
    assert "TCGA-AB-0001" in done.atlas.read_text("utf-8")


@pytest.mark.slow
def test_slides_come_and_go(folder, index, tmp_path):
    out = tmp_path / "out"
    spare = (folder / f"{NAMES[2]}.tif").rename(tmp_path / "spare.tif")
    first = index()
    assert first.report["slide"].tolist() == sorted({*NAMES} - {NAMES[2]})
    drawn = first.atlas.stat().st_mtime_ns
    again, before = index(), archive_bytes(out)
    assert again.report["reused"].all() and again.worked_on == 0
    assert again.atlas.stat().st_mtime_ns == drawn and again.notes == first.notes
    # one comes
    spare.rename(folder / f"{NAMES[2]}.tif")
    added = index()
    assert added.worked_on == 1
    fresh = added.report.loc[~added.report["reused"], "slide"]
    assert fresh.tolist() == [NAMES[2]]
    index(tmp_path / "at once")
    assert archive_bytes(out) == archive_bytes(tmp_path / "at once")
    # and goes: from the archive, and with everything that was made of it
    (folder / f"{NAMES[2]}.tif").unlink()
    removed = index()
    assert removed.worked_on == 0 and len(removed.report) == 3
    assert archive_bytes(out) == before
    assert not list(out.rglob(f"*{NAMES[2]}*"))
    assert NAMES[2] not in removed.atlas.read_text("utf-8")


@pytest.mark.slow
def test_what_a_slide_was_made_with_decides(folder, index, weights, tmp_path):
    index()
    other = tmp_path / "other.safetensors"
    save_file(frozen(SMALL, seed=1).network.network.state_dict(), other)
    changed = index(weights=other)
    assert not changed.report["reused"].any()
    vectors = load_embeddings(changed.archive)
    expected = embed(
        frozen(SMALL, other), vectors.table.iloc[:2], batch_size=1, progress=False
    )
    np.testing.assert_allclose(vectors.vectors[:2], expected.vectors, atol=1e-5)
    assert not index(weights=other, fraction=0.05).report["reused"].any()
    # A file that was touched is another slide; vectors that were lost are made again.
    os.utime(folder / f"{NAMES[0]}.tif")
    shutil.rmtree(tmp_path / "out" / "vectors" / NAMES[1])
    report = index(weights=other, fraction=0.05).report.set_index("slide")
    assert (report["status"] == "done").all()
    assert report["reused"][list(NAMES)].tolist() == [False, False, True, True]


SLOWLY = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from histo_utils import collection, mosaic
from histo_utils.collection import vectors

def slow(work):
    return lambda *a, **k: (time.sleep(0.3), work(*a, **k))[1]

mosaic.slide_mosaic = slow(mosaic.slide_mosaic)
vectors.embed = slow(vectors.embed)
slides, out, encoder, weights = sys.argv[1:]
with ThreadPoolExecutor(1) as pool:
    collection.index_slides(slides, out, encoder=encoder, weights=weights,
                            fraction=0.1, executor=pool)
"""


@pytest.mark.slow
def test_killed_twice_it_ends_as_if_undisturbed(folder, index, weights, tmp_path):
    out = tmp_path / "killed"
    for part in ("mosaics", "vectors"):
        command = [sys.executable, "-c", SLOWLY, folder, out, SMALL, weights]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(list((out / part).glob("*.json"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
        process.wait()
        finished = {p.stem for p in (out / part).glob("*.json")}
        assert 2 <= len(finished) < 4 and not (out / "archive").exists()
    # what a kill in the middle of writing leaves
    (out / "vectors" / f".ours.{process.pid}.new").mkdir()
    (out / f".archive.{process.pid}.old").mkdir()
    (out / "vectors" / "ours.json.part").write_text("half")
    resumed = index(out)
    reused = resumed.report.loc[resumed.report["reused"], "slide"]
    assert set(reused) == finished
    index()
    assert archive_bytes(out) == archive_bytes(tmp_path / "out")
    assert not list(out.rglob(".*")) and not list(out.rglob("*.part"))


@pytest.mark.slow
def test_bad_slides_by_the_command_line(folder, write_slide, weights, tmp_path):
    whole = (folder / f"{NAMES[0]}.tif").read_bytes()
    (folder / "cut.tif").write_bytes(whole[: len(whole) // 3])
    pixels = np.asarray(open_slide(folder / "ours.tif").read(0, 0, 1200, 0.5))
    write_slide("slides/bare.tif", pixels, mpp=None)
    arguments = [str(folder), str(tmp_path / "out"), "--encoder", SMALL,
                 "--weights", str(weights), "--processes", "1"]  # fmt: skip
    run = [sys.executable, "-m", "histo_utils.collection", *arguments]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "4 done, 0 without tissue, 2 failed; 0 reused" in done.stdout
    assert "bare: failed: MissingScaleError" in done.stdout and "--mpp" in done.stdout
    assert "cut: failed: " in done.stdout and "copy" in done.stdout
    archive = load_embeddings(tmp_path / "out" / "archive")
    assert set(archive.table["slide"]) == {*NAMES}


def test_an_explicit_mpp_is_for_slides_that_hold_none(
    folder, write_slide, weights, tmp_path, monkeypatch, capsys
):
    for name in NAMES[:3]:
        (folder / f"{name}.tif").unlink()
    pixels = np.asarray(open_slide(folder / "ours.tif").read(0, 0, 1200, 0.5))
    write_slide("slides/bare.tif", pixels, mpp=None)
    (folder / "text.svs").write_text("not a slide")
    monkeypatch.setattr(command, "pool", ThreadPoolExecutor)
    arguments = [str(folder), str(tmp_path / "out"), "--encoder", SMALL,
                 "--weights", str(weights), "--processes", "1"]  # fmt: skip
    assert main([*arguments, "--mpp", "0.4", "--allow-failures"]) == 0
    report = pd.read_csv(tmp_path / "out" / "report.csv").set_index("slide")
    assert report["status"].to_dict() == {
        "bare": "done", "ours": "done", "text": "failed"
    }  # fmt: skip
    assert report["mpp"][["bare", "ours"]].tolist() == pytest.approx([0.4, 0.5])
    assert report["mpp_source"][["bare", "ours"]].tolist() == [
        "given", "resolution tag"
    ]  # fmt: skip
    assert "2 done, 0 without tissue, 1 failed" in capsys.readouterr().out
    # Slide by slide, in a CSV; that one wins over what the file says.
    labels = tmp_path / "labels.csv"
    labels.write_text("file,mpp\nbare.tif,0.45\nours.tif,0.4\n")
    assert main([*arguments, "--labels", str(labels)]) == 1
    report = pd.read_csv(tmp_path / "out" / "report.csv").set_index("slide")
    assert report["mpp"][["bare", "ours"]].tolist() == [0.45, 0.4]
    (folder / "ours.tif").unlink()
    (folder / "bare.tif").unlink()
    assert main(arguments) == 2
    assert "not one of 1 slides" in capsys.readouterr().err
    assert not (tmp_path / "out" / "archive").exists()


def test_labels_cost_no_work(index, tmp_path):
    index()
    labels = tmp_path / "labels.csv"
    labels.write_text(
        f"slide,patient,label,site,grade\n{NAMES[0]},p1,a,NA,3\n{NAMES[1]},p2,a,,\n"
        f"{NAMES[2]},,b,,\nours,p2,b,,\nelsewhere,p9,a,,\n"
    )
    done = index(labels=labels)
    assert done.report["reused"].all() and done.worked_on == 0
    table = load_embeddings(done.archive).table.groupby("slide").first()
    table = table.loc[list(NAMES)]
    assert table["patient"].tolist() == ["p1", "p2", "TCGA-CD-0002", "p2"]
    assert table["label"].tolist() == ["a", "a", "b", "b"]
    assert table["site"].tolist()[:3] == ["NA", "AB", "CD"]
    assert table["grade"].tolist()[0] == "3"
    assert done.notes == [f"1 rows of {labels} name no slide of the folder"]
    labels.write_text("slide,label\nother,a\n")
    with pytest.raises(ValueError, match="'other', the folder 'TCGA-AB-0001-01A'"):
        index(labels=labels)
    labels.write_text("slide,label\nours,a\nours,b\n")
    with pytest.raises(ValueError, match="'ours' has two rows"):
        index(labels=labels)
    labels.write_text("name,label\nours,a\n")
    with pytest.raises(ValueError, match="expected slide or file"):
        index(labels=labels)


def test_an_image_of_ones_own_finds_its_place(index, tmp_path):
    out = index().archive.parent
    table = load_embeddings(out / "archive").table
    row = table.iloc[7]
    pixels = Image.fromarray(read_patch(row))
    pixels.save(tmp_path / "patch.png")
    found = find(out, tmp_path / "patch.png", k=3, mpp=0.5)
    place = ["slide", "x", "y"]
    assert found.loc[0, place].tolist() == row[place].tolist()
    assert found["distance"].is_monotonic_increasing and found["distance"][0] < 1e-6
    # Twice as fine, and with a rim: its middle is looked for, at the right scale.
    fine = Image.new("RGB", (500, 600), "white")
    fine.paste(pixels.resize((448, 448), Image.Resampling.NEAREST), (26, 76))
    fine.save(tmp_path / "fine.png")
    found = find(out, tmp_path / "fine.png", k=1, mpp=0.25)
    assert found.loc[0, ["x", "y"]].tolist() == [row["x"], row["y"]]
    with pytest.warns(UserWarning, match="patch.png holds no µm per pixel"):
        found = find(out, tmp_path / "patch.png", k=1)
    assert found["distance"][0] < 1e-6


def test_a_folder_is_one_collections(folder, index, weights, tmp_path):
    index()
    shutil.copytree(folder, tmp_path / "others")
    with pytest.raises(ValueError, match="is the collection of"):
        index_slides(tmp_path / "others", tmp_path / "out", encoder=SMALL,
                     weights=weights)  # fmt: skip
    with pytest.raises(ValueError, match="holds other files"):
        index(tmp_path)
    note = tmp_path / "out" / "collection.json"
    facts = json.loads(note.read_text())
    note.write_text(json.dumps(facts | {"running": process_of(os.getppid())}))
    with pytest.raises(ValueError, match=f"process {os.getppid()}"):
        index()
    note.write_text(json.dumps(facts | {"running": [os.getppid(), 1.0]}))
    assert index().worked_on == 0  # the number is another process's by now


def test_the_atlas_shows_what_can_be_searched():
    """A label of one patient has nothing to find; one patient searches its own."""
    for patients, labels, rows, exclude, said in (
        ("ppqq", "aaaa", 4, "patient", ""),
        ("pppp", "aabb", 4, "self", "one patient"),
        ("ppqq", "aabb", 4, "patient", "does not show labels"),
        ("pqrr", "aabb", 2, "patient", "not in the atlas: b"),
    ):
        table = pd.DataFrame({"patient": list(patients), "label": list(labels)})
        made = Embeddings(np.ones((4, 2), np.float32), table)
        shown, left_out, notes = for_the_atlas(made)
        assert (len(shown), left_out) == (rows, exclude)
        assert said in " ".join(notes)
