"""The papers' experiments: which can run, what the others lack, and their data.

    python tools/paper.py list             what can run, what is missing, where to ask
    python tools/paper.py target tl_vgg16  the file that snakemake is to make
    python tools/paper.py convert pannuke  a publisher's files made into what we read

``make book PROFILE=paper`` and ``make paper EXPERIMENT=tl_vgg16`` call it. An
experiment is a parameter file of ``profiles/paper``; its data are the parameters that
name data sets or paths. A data set lies in ``HISTO_DATA/<name>``, as its publisher
ships it; what is unpacked, cut or extracted from it goes to
``_build/cache/data/<name>`` (``HISTO_CACHE``) and can be made again. Nothing under
``HISTO_DATA`` is written.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import time
import zipfile
import zlib
from pathlib import Path

import yaml
from run_notebook import names, resolve

FACTS = Path("histo_utils/datasets.yaml")
# Parameters that are data, whatever they hold; others are if they name a data set.
DATA = {"mosaics", "slides", "slides_dir", "sites", "coordinates", "checkpoint"}
# Folders that the chapters read, and files or folders that these are made from.
NCT, VALIDATION = "NCT-CRC-HE-100K", "CRC-VAL-HE-7K"
LAYOUTS = {
    "kimia_path24": {("train", "test"): ["Kimia_Path24.h5"]},
    "kimia_path24c": {
        ("train",): ["[Tt]raining*.zip", "[Tt]raining*.rar", "[Tt]raining*/"],
        ("test",): ["[Tt]est*.zip", "[Tt]est*.rar", "[Tt]est ?*/"],
    },
    "nct_crc_he_100k": {(NCT,): [f"{NCT}.zip"]},
    "nct_crc_he_100k_nonorm": {(f"{NCT}-NONORM",): [f"{NCT}-NONORM.zip"]},
    "crc_val_he_7k": {(VALIDATION,): [f"{VALIDATION}.zip"]},
    "pannuke": {
        (f"fold{k}",): [f"Fold {k}/images/fold{k}/images.npy", f"fold_{k}.zip"]
        for k in (1, 2, 3)
    },
    "imagenet": {("train",): ["ILSVRC2012_img_train.tar"]},
    "kather_2016": {("Kather_texture_2016_image_tiles_5000",): ["*_5000.zip"]},
    "tcga_mosaics": {("*.parquet",): ["*.svs", "*/*.svs", "*.tif*", "*/*.tif*"]},
}
# Where the files may lie, too.
BESIDE = {
    "tcga_mosaics": ["tcga"],
    "crc_val_he_7k": ["nct_crc_he_100k", "nct_crc_he_100k_nonorm"],
}
# KimiaNet's patches; its share of a colour cluster is not known (Yottixel tried 5, 10,
# 15 % and called 15 the best). `mosaics` of an override file changes them.
MOSAICS = {"size": 1000, "mpp": 0.5, "overlap": 0.25, "fraction": 0.15, "keep": 0.2}
MADE_OF = {"tcga_mosaics": "tcga"}
GDC = "https://gdc.cancer.gov/resources-tcga-users/tcga-code-tables"
ASK = {
    "tcga/tissue_source_sites.tsv": f"{GDC}/tissue-source-site-codes, tab-separated",
    "kimia_path24c": "and its training archives, all as they are",
}
# What an earlier chapter trains: 10 takes 05's encoders, 11 takes 06's.
BEFORE = {"10": "05", "11": "06"}


def data_folder():
    return Path(os.environ.get("HISTO_DATA") or "data")


def converted_folder(name=""):
    """Where made data lie, as in `histo_utils.catalog`, which is slow to import."""
    return Path(os.environ.get("HISTO_CACHE") or "_build/cache") / "data" / name


def marker(name):
    """Return the file that says that a data set is converted as a whole."""
    return converted_folder(f"{name}.json").absolute()


def parameters(experiment):
    path = Path("profiles/paper", f"{experiment}.yaml")
    return (path.exists() and yaml.safe_load(path.read_text("utf8"))) or {}


def data_of(experiment):
    """List what an experiment reads: data sets, or paths below ``HISTO_DATA``."""
    facts, found = yaml.safe_load(FACTS.read_text("utf8")), []
    known = {*facts, *LAYOUTS}
    for key, value in parameters(experiment).items():
        first = str(value).split("/")[0]
        inside = first in known and first != value  # a path in a data set's folder
        if value and (key.endswith("dataset") or key in DATA or inside):
            found.append(first if first in LAYOUTS else str(value))
            # A published test set may be a data set of its own.
            found += facts.get(first, {}).get("parts", {}).values()
    return list(dict.fromkeys(found))


def sources(name):
    """Folders still to be made for a data set, and what each is made from."""
    homes = [data_folder() / one for one in (name, *BESIDE.get(name, []))]
    wanted = {}

    def lies_in(root, folders):
        return all(any(root.glob(folder)) for folder in folders)

    for folders, patterns in LAYOUTS.get(name, {}).items():
        # The chapters take all folds from one folder.
        together = sum(LAYOUTS[name], ()) if name == "pannuke" else folders
        if not any(lies_in(home, together) for home in homes):
            found = [p for home in homes for one in patterns for p in home.glob(one)]
            # Archives may have been removed after they were unpacked.
            if found or not lies_in(converted_folder(name), folders):
                wanted[folders] = sorted(dict.fromkeys(found))
    return wanted


def missing(name):
    """Say what is not there of a data set or a path; an empty list if all is."""
    if name in LAYOUTS:
        return [folders[0] for folders, found in sources(name).items() if not found]
    weights = Path(os.environ.get("HISTO_WEIGHTS") or "weights")  # of authors
    places = data_folder() / name, converted_folder(name), Path(name), weights / name
    there = any(p.is_file() or (p.is_dir() and any(p.iterdir())) for p in places)
    return [] if there else [name]


def to_convert(experiment):
    """List the data sets that must be converted before an experiment."""
    return [name for name in data_of(experiment) if sources(name)]


def can_run(experiment):
    return not any(missing(name) for name in data_of(experiment))


def before(experiment):
    """List the experiments that must run first.

    Those that `encoder` names by experiment or data set, else of the same name, else
    all of the chapter that trains.
    """
    chapter, _, own = experiment.partition(".")
    number, encoder = BEFORE.get(chapter[:2]), parameters(experiment).get("encoder")
    found = [one for one in names("paper") if number and one.startswith(number)]
    for wanted in filter(None, (encoder, own)):
        of = {one: (one.partition(".")[2], parameters(one)["dataset"]) for one in found}
        if named := [one for one in found if wanted in of[one]]:
            return named
    return found


def advice(name):
    """Say where to ask for a data set, and where to put it."""
    facts = yaml.safe_load(FACTS.read_text("utf8"))
    entry, place = facts.get(name), data_folder() / name
    if entry is None:
        owner = facts.get(name.split("/")[0], {})
        title = f"{owner['title']}: {name.split('/')[-1]}" if owner else name
        ask = f"    ask:  {ASK[name]}\n" if name in ASK else ""
        return f"{title}\n{ask}    put:  {place}\n"
    files = [file["name"] for file in entry.get("files", [])]
    fetched = f"python -c \"from histo_utils import catalog; catalog.fetch('{name}')\""
    how = f"{fetched} downloads it" if entry["access"] == "fetched" else entry["access"]
    lines = [f"ask:  {how} ({entry['homepage']}; {entry['licence']})"]
    lines += [f"put:  {place}{'/' + ', '.join(files) if files else '/'}"]
    lines += [f"      {ASK[name]}"] if name in ASK else []
    return f"{entry['title']}\n" + textwrap.indent("\n".join(lines), "    ") + "\n"


def report(experiments):
    """List what lacks data, one paragraph per data set."""
    lacking = {}
    for experiment in experiments:
        for name in filter(missing, data_of(experiment)):
            waiting = lacking.setdefault(MADE_OF.get(name, name), [])
            waiting += [experiment] if experiment not in waiting else []
    text = ""
    for name, waiting in lacking.items():
        part = f" ({', '.join(missing(name))})" if name in LAYOUTS else ""
        part = part if len(missing(name)) < len(LAYOUTS.get(name, ())) else ""
        text += advice(name).replace(
            "\n", f"{part}\n    for:  {', '.join(waiting)}\n", 1
        )
    return text


def listing():
    """Print what runs and what does not."""
    ready = [one for one in names("paper") if can_run(one)]
    many = f"{len(ready)} of {len(names('paper'))} experiments have their data"
    print(f"{many} in {data_folder()} (HISTO_DATA)", *ready, sep="\n  ")
    if lacking := report(names("paper")):
        print("The others lack these data:\n" + textwrap.indent(lacking, "  "), end="")


def target(name):
    """Return the file that `make paper` asks snakemake for."""
    if not name:
        known = "\n  ".join(names("paper"))
        raise SystemExit(f"make paper EXPERIMENT=<name>, one of\n  {known}")
    name = resolve(name, "paper")
    if not can_run(name):
        raise SystemExit(f"{name} lacks data in {data_folder()}:\n{report([name])}")
    return f"_build/executed/paper/{name}.ipynb"


# --- conversions: atomic, resumable, from the publishers' files


def unpack(archive, out, place=lambda path: path):
    """Unpack a zip or rar archive's files to ``out / place(path)``, atomically.

    ``place`` may return None for a file that is not wanted. A file that is there with
    the same content is not written again; one of the same name is kept beside it.
    """
    if archive.suffix == ".rar":
        return _unrar(archive, out, place)
    with zipfile.ZipFile(archive) as zipped:
        for item in zipped.infolist():
            # Entries of any archive stay inside the folder.
            path = Path(*(p for p in Path(item.filename).parts if p not in ("..", "/")))
            if item.is_dir() or "__MACOSX" in path.parts or not place(path):
                continue
            if (file := free(out / place(path), item.CRC)) is not None:
                with zipped.open(item) as packed:
                    copy(packed, file)


def free(file, crc):
    """Return where a file of this content goes; None if it is there."""
    for place in (file, file.with_stem(f"{file.stem}_{crc:08x}")):
        if not place.exists():
            return place
        if checksum(place) == crc:
            return None
    return None


def checksum(path):
    with path.open("rb") as file:
        crc = 0
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def copy(stream, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    with part.open("wb") as plain:
        shutil.copyfileobj(stream, plain, 1 << 20)
    part.replace(file)


def _unrar(archive, out, place):
    if not shutil.which("unrar"):
        raise SystemExit(
            f"{archive}: unrar is not installed; install it, or unpack the archive to "
            f"a folder of the same name beside it ({archive.with_suffix('').name})"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        subprocess.run(["unrar", "x", "-idq", archive, folder + "/"], check=True)
        copy_folder(Path(folder), out, place)


def copy_folder(folder, out, place):
    """Copy the files of an archive that was unpacked by hand."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        to = place(path.relative_to(folder.parent))
        file = to and free(out / to, checksum(path))
        if file:
            with path.open("rb") as stream:
                copy(stream, file)


def of_scan(part):
    """Where an image of Path24C goes: by its folder s0 … s23, else by its name."""

    def place(path):
        if path.suffix.lower() not in {".jpg", ".jpeg", ".png", ".tif"}:
            return None
        found = [re.fullmatch(r"s?(\d+)", folder) for folder in path.parts[:-1]]
        found = [*filter(None, [*found, re.match(r"s(\d+)_", path.name)])]
        if not found:
            raise SystemExit(
                f"{path}: not in a folder s0 to s23, nor named s<k>_<n>.jpg"
            )
        return Path(part, f"s{int(found[0][1])}", path.name)

    return place


def convert_path24c(wanted, out):
    for (part,), found in wanted.items():
        for path in found:
            if path.is_dir():
                copy_folder(path, out, of_scan(part))
            # A folder beside an archive is that archive, unpacked by hand.
            elif not path.with_suffix("").is_dir():
                unpack(path, out, of_scan(part))


def convert_path24(wanted, out):
    from histo_utils.readers.path24 import convert_path24

    print(convert_path24(wanted["train", "test"][0], out).to_string(index=False))


def convert_pannuke(wanted, out):
    from histo_utils.readers import class_folders

    def images(path):
        return path if "images" in path.parts else None  # no masks: 16 GB

    work = out.with_name(f"{out.name}_unpacked")
    for found in wanted.values():
        arrays = [path for path in found if path.suffix == ".npy"]
        if not arrays:
            unpack(found[0], work, images)
        class_folders.convert_pannuke(arrays[0].parents[3] if arrays else work, out)
        shutil.rmtree(work, ignore_errors=True)


def convert_imagenet(wanted, out):
    """Unpack the training archive, which holds one archive per class."""
    for path in wanted["train",]:
        with tarfile.open(path) as whole:
            for item in whole:
                work = out / "train" / Path(item.name).stem
                if work.is_dir() or not item.isfile():
                    continue
                part = work.with_name(f".{work.name}")
                with tarfile.open(fileobj=whole.extractfile(item)) as one:
                    one.extractall(part, filter="data")
                part.rename(work)


def convert_archives(wanted, out):
    for found in wanted.values():
        for path in found:
            unpack(path, out)


def convert_tcga(wanted, out, override=None):
    """Extract the mosaics of all slides; those that fail are listed, and exit 1."""
    from histo_utils import catalog, mosaic

    how = MOSAICS | (override or {})
    slides = catalog.slide_table((data_folder() / "tcga").absolute())
    report = mosaic.extract_mosaics(slides, out, **how)
    failed = report[report["status"].eq("failed")]
    report.to_csv(out / "report.csv", index=False)
    if len(failed):
        first = failed.iloc[0]
        raise SystemExit(
            f"{len(failed)} of {len(report)} slides failed, first {first['slide']}: "
            f"{first['message']}; all are in {out / 'report.csv'}. Get them again, or "
            "take them out of the folder"
        )


CONVERSIONS = {
    "kimia_path24": convert_path24,
    "kimia_path24c": convert_path24c,
    "imagenet": convert_imagenet,
    "pannuke": convert_pannuke,
    "tcga_mosaics": convert_tcga,
}


def convert(name, override=None):
    """Make the folders that the chapters read, then the marker."""
    wanted, out, start = sources(name), converted_folder(name), time.perf_counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    more = (yaml.safe_load(Path(override).read_text("utf8")) if override else {}) or {}
    more = [more.get("mosaics")] if name == "tcga_mosaics" else []
    CONVERSIONS.get(name, convert_archives)(wanted, out, *more)
    files = sorted({path for found in wanted.values() for path in found})
    made = {
        "from": {path.name: as_published(name, path) for path in files},
        **({"mosaics": MOSAICS | (more[0] or {})} if more else {}),
    }
    part = marker(name).with_suffix(".part")
    part.write_text(json.dumps(made, indent=1), "utf8")
    part.replace(marker(name))
    print(f"[data] {name} {time.perf_counter() - start:.0f} s", flush=True)


def as_published(name, path):
    """Compare a file with its published checksum; None where none is known."""
    from histo_utils.catalog import datasets
    from histo_utils.provenance import file_hash

    files = datasets()[name].files if name in datasets() else ()
    for file in (one for one in files if one.name == path.name):
        algorithm, digest = file.checksum.split(":")
        if (found := file_hash(path, algorithm)) != digest:
            print(f"[data] {path}: {algorithm} is {found}, published is {digest}")
        return found == digest
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["list", "target", "convert"])
    parser.add_argument("name", nargs="?", default="")
    parser.add_argument("--override", help="file of smaller sizes, for miniatures")
    options = parser.parse_args()
    if options.what == "list":
        listing()
    elif options.what == "target":
        print(target(options.name))
    else:
        convert(options.name, options.override)


if __name__ == "__main__":
    sys.exit(main())
