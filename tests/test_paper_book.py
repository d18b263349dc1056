"""The papers' experiments by the commands of the running page, on miniatures."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import yaml
from miniatures import path24_h5, write_tree

from histo_utils import catalog, provenance

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import paper  # noqa: E402
import run_notebook  # noqa: E402

NAMES = sorted(path.stem for path in (ROOT / "profiles/paper").glob("*.yaml"))
COPIED = ("notebooks", "profiles", "tools", "_ext", "book", "histo_utils", "results")
FILES = ("Makefile", "Snakefile", "_config.yml", "_toc.yml", "tests/override.yaml")
FILES += ("CITATION.cff", "CHANGELOG.md", "LICENSE", "LICENSE-text.md")
FILES += ("pyproject.toml", "constraints.txt", "README.md")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """All papers' data in miniature under one folder, and what is true of them."""
    folder = tmp_path_factory.mktemp("papers") / "data"
    return folder, write_tree(folder)


def house(folder):
    """A copy of the repository, with this Python's tools as its .venv."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.rmtree(folder / "results/paper", ignore_errors=True)
    (folder / "tests").mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def make(folder, *words, data, **more):
    env = {k: v for k, v in os.environ.items() if k not in ("HISTO_WEIGHTS", "PROFILE")}
    env |= {"PYTHONPATH": str(folder), "HISTO_CACHE": str(folder / "_build/cache")}
    env |= {"OMP_NUM_THREADS": "1", "HISTO_DATA": str(data), "NO_COLOR": "1"}
    command = ["make", "-o", ".venv/installed", "--no-print-directory", *words]
    how = {"cwd": folder, "env": env, "text": True, "start_new_session": True}
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, **how, **out)


def said(process):
    text, _ = process.communicate()
    return process.returncode, text


# --- names and overrides


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tl_vg16", "unknown experiment 'tl_vg16'; did you mean: tl_vgg16"),
        ("04_pretrained_features.tl_vg", "mean: 04_pretrained_features.tl_vgg16"),
        ("04_pretrained_features", "04_pretrained_features.fe_inception_v3, 04_"),
        ("01_data_preparation", "has no run in the profile paper"),
        ("", "EXPERIMENT=<name>, one of"),
    ],
)
def test_an_experiment_is_named_or_the_nearest_are(name, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match=words.split("=")[0]) as error:
        paper.target(name)
    assert words in str(error.value)
    full = "04_pretrained_features.tl_vgg16"
    assert run_notebook.resolve("tl_vgg16", "paper") == full


def test_every_experiment_has_a_name_and_real_data(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in NAMES:
        if "." in name:
            assert "phantom" not in paper.data_of(name) and paper.data_of(name), name
    four = [f"05_gpu_fine_tuning.{name}" for name in ("I", "II", "III", "IV")]
    assert paper.before("10_slide_search.IV") == four[3:], "05 trains what 10 searches"
    assert paper.before("10_slide_search.all") == four and not paper.before(NAMES[0])


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({"epochs": {"head": 1, "tuned": 1, "scratch": 1}}, True),
        ({"seeds": [0], "c_values": [0.1], "workers": 0, "weights": "random"}, True),
        ({"network": "vgg11.tv_in1k", "patch_size": 64}, True),
        ({"network": "resnet18"}, False),
        ({"epochs": {"head": 1}}, False),
        ({"dataset": "phantom"}, False),
        ({"kinds": ["colour"]}, False),
        ({"c_values": [0.2]}, False),
        ({"patch_mpp": 0.25}, False),
        ({"per_class": 0}, False),
        ({"weights": "mine"}, False),
    ],
)
def test_an_override_changes_sizes_and_no_experiment(
    tmp_path, monkeypatch, change, fits
):
    monkeypatch.chdir(ROOT)
    name, path = "04_pretrained_features.tl_vgg16", tmp_path / "override.yaml"
    path.write_text(yaml.safe_dump({"04_pretrained_features": change}))
    given = paper.parameters(name)
    if fits:
        found = run_notebook.overridden(given, given, path, name)
        assert change.items() <= found.items()
        assert found["results"] == f"_build/results/paper/{name}.json"
    else:
        with pytest.raises(SystemExit, match="another experiment"):
            run_notebook.overridden(given, given, path, name)


def test_the_miniatures_override_keeps_every_experiment(monkeypatch):
    import papermill

    monkeypatch.chdir(ROOT)
    for name in NAMES:
        path = f"notebooks/{name.split('.')[0]}.ipynb"
        known = papermill.inspect_notebook(path)
        known = {k: yaml.safe_load(v["default"]) for k, v in known.items()}
        given = paper.parameters(name)
        run_notebook.overridden(given, known, "tests/override.yaml", name)


# --- where data lie, and what they are


def test_a_paper_run_on_phantoms_is_refused(tmp_path, phantoms, monkeypatch):
    """By what lies in the folder, whatever it is called."""
    copy = shutil.copytree(phantoms[0], tmp_path / "data/kimia_path24x")
    monkeypatch.setenv("HISTO_DATA", str(tmp_path / "data"))
    fact = catalog.data_hash(catalog.locate("kimia_path24x"))
    assert fact.startswith("synthetic sha256:")
    what = {"parameters": {}, "data": {"tcga": fact}, "seconds": 0}
    provenance.record({}, tmp_path / "demo.json", profile="demo", **what)
    with pytest.raises(ValueError, match=r"tcga holds phantoms.*profile demo"):
        provenance.record({}, tmp_path / "paper.json", profile="paper", **what)
    monkeypatch.setenv("HISTO_PROFILE", "paper")
    for name in ("phantom", "kimia_path24x", copy):
        with pytest.raises(ValueError, match="holds phantoms"):
            catalog.patch_table(name)
    assert not (tmp_path / "paper.json").exists()


def test_relative_paths_are_looked_up_under_histo_data(tmp_path, monkeypatch):
    monkeypatch.setenv("HISTO_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HISTO_CACHE", str(tmp_path / "cache"))
    for place in ("data/own/sub", "cache/data/made", "here"):
        (tmp_path / place).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert catalog.locate("own/sub") == tmp_path / "data/own/sub"
    assert catalog.locate("made") == tmp_path / "cache/data/made"
    assert catalog.locate("here") == Path("here")
    (tmp_path / "data/here").mkdir()
    assert catalog.locate("here") == tmp_path / "data/here"
    with pytest.raises(FileNotFoundError, match=r"own/none: no such .*HISTO_DATA"):
        catalog.locate("own/none")


def test_an_archive_that_was_unpacked_is_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("HISTO_DATA", str(tmp_path))
    monkeypatch.setattr(
        catalog.pooch, "retrieve", lambda *a, **k: pytest.fail("fetched")
    )
    (tmp_path / "kather_2016/Kather_texture_2016_image_tiles_5000").mkdir(parents=True)
    assert catalog.locate("kather_2016") == tmp_path / "kather_2016"


# --- publishers' files


@pytest.mark.slow
def test_publishers_files_are_converted_beside_them(tree, tmp_path, monkeypatch):
    folder, truth = tree
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HISTO_DATA", str(folder))
    monkeypatch.setenv("HISTO_CACHE", str(tmp_path))
    before = sorted(folder.rglob("*"))
    others = "pannuke", "kimia_path24", "kather_2016", "crc_val_he_7k", "imagenet"
    for name in (*truth["counts"], *others):
        assert paper.sources(name), name
        paper.convert(name)
        assert paper.marker(name).exists()
    for name, counts in truth["counts"].items():
        table = catalog.patch_table(name)
        assert table["split"].value_counts().to_dict() == counts, name
    assert set(catalog.patch_table("pannuke")["fold"]) == {1, 2, 3}
    assert set(catalog.patch_table("kimia_path24")["split"]) == {"train", "test"}
    assert len([*paper.converted_folder("imagenet").glob("train/n*/*.JPEG")]) == 24
    place = catalog.locate("kather_2016/Kather_texture_2016_image_tiles_5000")
    assert catalog.patch_table(place)["label"].nunique() == 8
    monkeypatch.setattr(paper, "MOSAICS", paper.MOSAICS | {"size": 128})
    paper.convert("tcga_mosaics")
    made = [*paper.converted_folder("tcga_mosaics").glob("*.parquet")]
    assert {path.stem for path in made} == set(truth["projects"])
    assert pd.read_parquet(made[0])["in_mosaic"].any()
    assert sorted(folder.rglob("*")) == before, "nothing of the user's is touched"


def test_an_interrupted_unpacking_goes_on_and_keeps_files_of_one_name(tmp_path):
    out, archives = tmp_path / "out", [tmp_path / f"{name}.zip" for name in "abc"]
    for path, text in zip(archives, (b"one", b"two", b"one"), strict=True):
        with zipfile.ZipFile(path, "w") as zipped:
            zipped.writestr("../evil/s1/s1_1.jpg", text)
            zipped.writestr("s2_1.jpg", text)
    (out / "train/s1").mkdir(parents=True)
    (out / "train/s1/s1_1.jpg.part").write_bytes(b"o")  # left by a killed run
    for _ in range(2):
        for path in archives:
            paper.unpack(path, out, paper.of_scan("train"))
    found = {p.relative_to(out): p.read_bytes() for p in out.rglob("*.jpg")}
    assert sorted(found.values()) == [b"one", b"one", b"two", b"two"]
    assert {path.parts[1] for path in found} == {"s1", "s2"}


def test_what_is_missing_is_listed_with_where_to_put_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HISTO_DATA", str(tmp_path))
    monkeypatch.setenv("HISTO_CACHE", str(tmp_path / "cache"))
    paper.listing()
    shown = capsys.readouterr().out
    assert f"0 of {len(NAMES)} experiments have their data in {tmp_path}" in shown
    assert "on request from KIMIA Lab (https://kimialab" in shown
    assert f"put:  {tmp_path}/kimia_path24/Kimia_Path24.h5" in shown
    path24_h5(tmp_path / "kimia_path24")
    assert paper.can_run("04_pretrained_features.tl_vgg16")
    assert paper.to_convert("04_pretrained_features.tl_vgg16") == ["kimia_path24"]


# --- the book


@pytest.mark.slow
def test_without_data_the_paper_book_is_built_and_says_so(tmp_path):
    folder = house(tmp_path / "house")
    status, text = said(make(folder, "book", "PROFILE=paper", data=tmp_path / "none"))
    assert status == 0, text
    assert f"0 of {len(NAMES)} experiments have their data" in text and "ask:" in text
    html = (folder / "_build/html/notebooks/01_data_preparation.html").read_text()
    assert "This chapter has no run in the profile paper" in html
    html = (folder / "_build/html/notebooks/04_pretrained_features.html").read_text()
    assert "make paper EXPERIMENT=04_pretrained_features.tl_vgg16" in html
    assert "real tissue edition" not in html.lower()


@pytest.fixture(scope="module")
def book(tree, tmp_path_factory):
    """`make book PROFILE=paper` on the tree of miniatures: its folder and its words."""
    folder = house(tmp_path_factory.mktemp("book") / "house")
    words = ["book", "PROFILE=paper", "OVERRIDE=tests/override.yaml"]
    status, text = said(make(folder, *words, data=tree[0]))
    assert status == 0, text
    return folder, text


def tables(folder):
    """What the experiments found, without what differs from run to run."""
    found = {}
    for path in sorted((folder / "_build/results/paper").glob("*.json")):
        found[path.stem] = json.loads(path.read_text())
        for key in ("provenance", "runs", "seconds"):
            found[path.stem].pop(key, None)
    return found


@pytest.mark.slow
def test_every_experiment_reaches_its_table(book):
    folder, text = book
    assert f"{len(NAMES)} of {len(NAMES)} experiments have their data" in text
    assert set(tables(folder)) == set(NAMES)
    assert not (folder / "results/paper").exists(), "miniatures are no results"
    for name in (name for name in NAMES if "." in name):
        assert f"] {name} " in text
        page = folder / f"_build/html/experiments/{name.replace('.', '-')}.html"
        assert "in miniature" in page.read_text()
    html = (folder / "_build/html/notebooks/04_pretrained_features.html").read_text()
    assert "../experiments/04_pretrained_features-tl_vgg16.html" in html


@pytest.mark.slow
def test_killed_in_the_middle_of_two_experiments_the_tables_are_the_same(book, tree):
    whole, folder = tables(book[0]), house(book[0].with_name("killed"))
    for name in ("04_pretrained_features.tl_vgg16", "05_gpu_fine_tuning.IV"):
        words = ["paper", f"EXPERIMENT={name}", "OVERRIDE=tests/override.yaml"]
        process = make(folder, *words, data=tree[0])
        runs = folder / "_build/cache" / name.split(".")[0]
        while process.poll() is None and not any(runs.rglob("last.pt")):
            time.sleep(0.2)
        assert process.poll() is None, f"killed too late: {process.communicate()}"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert name not in tables(folder)
        status, text = said(make(folder, *words, data=tree[0]))
        assert status == 0, text
        assert tables(folder)[name] == whole[name]
