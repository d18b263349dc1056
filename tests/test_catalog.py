import hashlib
import http.server
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile

from histo_utils import catalog
from histo_utils.catalog import (
    Dataset,
    File,
    dataset,
    datasets,
    fetch,
    patch_table,
    slide_table,
)
from histo_utils.patches import read_patch

CONTENT = bytes(range(256)) * 4000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Serves ranges, notes where each began, and can break off in the middle."""

    begun, break_after = [], None

    def do_GET(self):
        begin = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.begun.append(begin)
        content = CONTENT[begin:]
        if not content:
            self.send_error(416)
            return
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: self.break_after])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    handler = type("Handler", (Ranges,), {"begun": [], "break_after": None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        handler.url = f"http://127.0.0.1:{served.server_address[1]}/toy.bin?download=1"
        yield handler
        served.shutdown()


@pytest.fixture
def toy(server, monkeypatch):
    """A data set of one file on the local server; returns a setter of its checksum."""

    def entry(checksum=DIGEST, url=""):
        url = server.url if url == "" else url
        file = File("toy.bin", f"sha256:{checksum}", len(CONTENT), url)
        toy = Dataset("toy", "Toy", "MIT", "-", "https://example.org", "-", "-",
                      "on request", (file,))  # fmt: skip
        monkeypatch.setitem(datasets(), "toy", toy)

    entry()
    return entry


def test_every_entry_says_what_a_reader_must_know(tmp_path):
    for name, entry in datasets().items():
        assert entry.name == name and entry.licence and entry.citation and entry.unit
        assert set(entry.parts.values()) <= set(datasets())
        assert bool(entry.parts) == bool(entry.layout)
        for file in entry.files:
            algorithm, digest = file.checksum.split(":")
            assert len(digest) == {"md5": 32, "sha256": 64}[algorithm]
            int(digest, 16)
    keys = ["title", "licence", "citation", "homepage", "content", "unit", "access"]
    whole = "toy:\n" + "".join(f"  {key}: words\n" for key in keys)
    files = "  files: [{name: a, checksum: 'md5:0'}]\n"
    path = tmp_path / "whole.yaml"
    path.write_text(whole + files)
    assert datasets(path)["toy"].files == (File("a", "md5:0"),)
    for change, message in (
        (("licence", "licences"), "toy: unknown key 'licences'; did you mean licence"),
        (("  unit: words\n", ""), "toy: no unit"),
        (("unit: words", "unit:"), "toy: no unit"),
        (("checksum", "checksums"), "a: unknown key 'checksums'; did you mean checks"),
        ((", checksum: 'md5:0'", ""), "a: no checksum"),
    ):
        path = tmp_path / f"{len(message)}{change[1][:4].strip()}.yaml"
        path.write_text((whole + files).replace(*change))
        with pytest.raises(ValueError, match=message):
            datasets(path)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match="did you mean monuseg"):
        dataset("monusec")
    with pytest.raises(ValueError, match="known are phantom"):
        patch_table("zzzzz")


def test_a_file_is_fetched_once_and_verified(toy, server, tmp_path):
    assert fetch("toy", tmp_path, progress=False) == tmp_path
    assert (tmp_path / "toy.bin").read_bytes() == CONTENT
    fetch("toy", tmp_path, progress=False)
    assert server.begun == [0]
    assert [p.name for p in tmp_path.iterdir()] == ["toy.bin"]


def test_an_interrupted_download_goes_on(toy, server, tmp_path):
    server.break_after = 300_000
    with pytest.raises(Exception, match=r"IncompleteRead|Connection"):
        fetch("toy", tmp_path, progress=False)
    assert not (tmp_path / "toy.bin").exists()
    server.break_after = None
    fetch("toy", tmp_path, progress=False)
    assert (tmp_path / "toy.bin").read_bytes() == CONTENT
    assert server.begun[0] == 0 and 0 < server.begun[-1] <= 300_000


def test_a_part_that_was_whole_is_taken(toy, server, tmp_path):
    (tmp_path / "toy.bin.part").write_bytes(CONTENT)
    fetch("toy", tmp_path, progress=False)
    assert (tmp_path / "toy.bin").read_bytes() == CONTENT


def test_a_wrong_checksum_removes_the_file_and_shows_both(toy, tmp_path):
    toy(checksum="0" * 64)
    with pytest.raises(ValueError, match=r"0{64}") as error:
        fetch("toy", tmp_path, progress=False)
    assert DIGEST in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_fetched_says_where_to_get_it(toy, tmp_path):
    toy(url=None)
    with pytest.raises(FileNotFoundError, match=r"on request \(https://example\.org"):
        fetch("toy", tmp_path)
    (tmp_path / "toy.bin").write_bytes(b"other")
    with pytest.raises(ValueError, match="expected " + DIGEST):
        fetch("toy", tmp_path)
    (tmp_path / "toy.bin").write_bytes(CONTENT)
    assert fetch("toy", tmp_path) == tmp_path


def test_slides_of_a_folder(write_slide, tmp_path):
    glass = np.full((300, 300, 3), 240, np.uint8)
    write_slide("TCGA-AB-1234-01Z-00-DX1.tif", glass)
    write_slide("other.tif", glass, mpp=None)
    (tmp_path / "notes.txt").write_text("not listed")
    table = slide_table(tmp_path, mpp=0.25)
    assert table["slide"].tolist() == ["TCGA-AB-1234-01Z-00-DX1", "other"]
    assert table["patient"][0] == "TCGA-AB-1234" and pd.isna(table["patient"][1])
    assert table["site"][0] == "AB" and pd.isna(table["site"][1])
    # a file that holds its scale keeps it
    assert np.isnan(table["slide_mpp"][0]) and table["slide_mpp"][1] == 0.25


def test_a_csv_beside_the_slides_wins(write_slide, tmp_path):
    write_slide("a.tif", np.full((300, 300, 3), 240, np.uint8), mpp=None)
    text = "file,patient,label,site,mpp\na.tif,p1,colon,NA,0.3\n"
    (tmp_path / "slides.csv").write_text(text)
    row = slide_table(tmp_path, mpp=0.25).iloc[0]
    assert (row["slide"], row["site"], row["slide_mpp"]) == ("a", "NA", 0.3)


def test_folders_without_slides(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        slide_table(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no slides in it"):
        slide_table(tmp_path)


@pytest.mark.slow
def test_phantoms_become_a_patch_table(phantoms):
    folder, slides = phantoms
    table = patch_table(folder, size=512)
    assert set(table["slide"]) == set(slides["slide"])
    assert set(table["label"]) <= set(slides["label"])
    assert (table["tissue"] >= 0.7).all()
    fine = table[table["slide_mpp"] == 0.25]
    assert len(fine) and np.gcd.reduce(fine["x"]) % 1024 == 0


@pytest.mark.tissue
def test_monuseg_has_sixteen_patches_a_patient(monuseg, monkeypatch):
    monkeypatch.setenv("HISTO_DATA", str(monuseg.parent))
    table = patch_table("monuseg")  # its files are those of the index
    assert len(table) == 43 * 16 and table["patient"].nunique() == 43
    assert table.groupby("patient").size().eq(16).all()
    patients = table.drop_duplicates("patient")
    assert patients["preparation"].value_counts().to_dict() == dict(FFPE=25, frozen=18)
    row = table.iloc[5]
    whole = tifffile.imread(row["image"])
    expected = whole[row["y"] : row["y"] + 250, row["x"] : row["x"] + 250]
    assert np.array_equal(read_patch(row), expected)


def test_verify_names_the_file_that_differs(tmp_path):
    (tmp_path / "a.tif").write_bytes(b"abc")
    digest = hashlib.sha256(b"abd").hexdigest()
    (tmp_path / "slides.csv").write_text(f"file,sha256\na.tif,{digest}\n")
    with pytest.raises(ValueError, match=rf"a\.tif: sha256 is .*expected {digest}"):
        catalog.verify(tmp_path)


@pytest.mark.tissue
def test_lc25000_keeps_its_source_tiles(lc25000, monkeypatch):
    monkeypatch.setenv("HISTO_DATA", str(lc25000.parent))
    table = patch_table("lc25000_lung")
    assert len(table) == 3698 and table["slide"].nunique() == 740
    assert table["patient"].isna().all()
    assert read_patch(table.iloc[0]).shape == (224, 224, 3)


def test_folders_for_data_and_what_was_trained(monkeypatch, tmp_path):
    monkeypatch.delenv("HISTO_DATA", raising=False)
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root / "notebooks")  # where JupyterLab runs a chapter
    assert catalog.data_folder() == root / "data"
    monkeypatch.setenv("HISTO_DATA", "elsewhere")
    assert catalog.data_folder() == Path("elsewhere")
    monkeypatch.setenv("HISTO_CACHE", str(tmp_path))
    place = catalog.trained_folder("yang", "/somewhere/monuseg")
    assert place == tmp_path / "trained" / "yang_scan_monuseg"
    assert place == catalog.trained_folder("yang", "monuseg", "scan")
    assert place != catalog.trained_folder("yang", "monuseg", "organ")


def test_a_data_hash_changes_with_the_data(tmp_path):
    (tmp_path / "a.svs").write_bytes(b"1")
    before = catalog.data_hash(tmp_path)
    assert before == catalog.data_hash(tmp_path)
    (tmp_path / "a.svs").write_bytes(b"22")
    assert catalog.data_hash(tmp_path) != before
    (tmp_path / "slides.csv").write_text("abc")
    digest = hashlib.sha256(b"abc").hexdigest()
    assert catalog.data_hash(tmp_path) == f"sha256:{digest}"
