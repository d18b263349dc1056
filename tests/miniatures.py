"""Tiny versions of the papers' data, in the folders and files of the real thing.

Each function writes into a folder that it makes, and returns what a test needs to know.
The pictures are noise with a texture and a colour for each class: never evidence.
"""

from __future__ import annotations

import gzip
import pickle
import shutil
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image
from scipy.ndimage import gaussian_filter

from histo_utils.catalog import slide_table
from histo_utils.mosaic import extract_mosaics
from histo_utils.phantom import write_phantom_archive
from histo_utils.readers.class_folders import NCT_CLASSES

SIDE = 64  # px of a patch; the papers have 1000, 224 and 256
# Of a Path24 scan: 3 × 4 whole cells, and a rest below and to the right.
SCAN = (3 * SIDE + 20, 4 * SIDE + 10)
SITES = (
    "TSS Code\tSource Site\tStudy Name\tBCR\n"
    "05\tIndivumed\tLung adenocarcinoma\tIGC\n"
    "18\tPrincess Margaret Hospital (Canada)\tLung squamous cell carcinoma\tNCH\n"
    "NA\tnowhere\tUterine Carcinosarcoma\tNCH\n"
    "07\tTGen\tCell Line Control\tIGC\n"
)
TCGA_SITES = (("05", "LUAD"), ("18", "LUSC"))  # source-site codes and their projects


def grey_texture(shape, kind, rng):
    """Grey noise 40–200, coarser and darker from one kind to the next; uint8."""
    field = gaussian_filter(rng.standard_normal(shape), 1 + kind % 3)
    field = (field - field.mean()) / field.std()
    return np.clip(130 - 8 * (kind % 5) + 25 * field, 40, 200).astype(np.uint8)


def colour_texture(side, kind, rng):
    """RGB noise in pinks and purples, one hue per kind; uint8 (side, side, 3)."""
    tint = np.array([200, 120 + 15 * (kind % 4), 150 + 20 * (kind % 3)])
    dark = grey_texture((side, side), kind, rng)[..., None] / 200
    return np.rint(tint * dark + 20).astype(np.uint8)


def path24_h5(folder, n_scans=3, seed=0):
    """Kimia Path24's HDF5 file: scans with whitened test places, and test patches.

    In each scan the cell at (0, 0) is bright ground; the one at (0, 1) is ground but
    for 0.8 % (homogeneous) and the one at (0, 2) but for 1.2 % (kept). One test place
    lies across four cells; one lies at the lower edge, below the grid's end, and is
    white too.

    Returns ``file``, ``places`` (label to list of (y, x), px), ``kept`` (label to the
    set of (y, x) of the training patches), ``scans`` (label to the raw scan),
    ``targets`` and ``side``.
    """
    import h5py

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    places = [(SIDE + 30, 2 * SIDE - 20), (SCAN[0] - SIDE, 0)]
    cells = {(y, x) for y in range(0, 3 * SIDE, SIDE) for x in range(0, 4 * SIDE, SIDE)}
    # Worked out by hand: the first place spans rows 94–157 and columns 108–171, so the
    # cells of rows 1, 2 and columns 1, 2; the second rows 148–211, columns 0–63.
    lost = {(1, 1), (1, 2), (2, 1), (2, 2), (2, 0), (0, 0), (0, 1)}
    kept = cells - {(row * SIDE, column * SIDE) for row, column in lost}
    truth = {"places": {}, "kept": {}, "scans": {}, "targets": [], "side": SIDE}
    patches = []
    truth["file"] = folder / "Kimia_Path24.h5"
    with h5py.File(truth["file"], "w") as file:
        for number in range(n_scans):
            scan = grey_texture(SCAN, number, rng)
            ground = rng.integers(235, 250, (SIDE, 3 * SIDE), np.uint8)
            for column, share in ((1, 0.008), (2, 0.012)):
                cell = ground[:, column * SIDE : (column + 1) * SIDE]
                some = rng.permutation(SIDE**2)[: round(share * SIDE**2)]
                cell[some // SIDE, some % SIDE] = 100
            scan[:SIDE, : 3 * SIDE] = ground
            for y, x in places:
                scan[y + 9 : y + 12, x + 9 : x + 12] = 245  # a little ground in it
                place = np.s_[y : y + SIDE, x : x + SIDE]
                patches.append(scan[place].copy())
                truth["targets"].append(number)
                scan[place] = 255
            file[f"scan{number}/data"] = scan
            file[f"scan{number}/thumbnail"] = scan[::8, ::8]
            label = f"s{number}"
            truth["places"][label], truth["kept"][label] = places, kept
            truth["scans"][label] = scan
        file["test_data/patches"] = np.stack(patches)
        file["test_data/targets"] = np.array(truth["targets"])
    return truth


def path24_rgb(folder, n_classes=3, n_train=4, n_test=2, seed=0):
    """KIMIAPath24_RGB: ``Training/s<k>`` and ``RGBPatches-test/s<k>``; its folder."""
    counts = {"Training": n_train, "RGBPatches-test": n_test}
    return _colour_parts(Path(folder) / "KIMIAPath24_RGB", counts, n_classes, seed)


def path24c(folder, n_classes=3, n_train=4, n_test=2, seed=0):
    """Path24C, unpacked into ``train/s<k>`` and ``test/s<k>``; its folder.

    One training file is there twice, as when the release's archives overlap.
    """
    counts = {"train": n_train, "test": n_test}
    place = _colour_parts(Path(folder) / "kimia_path24c", counts, n_classes, seed)
    first = place / "train" / "s0" / "s0_0.jpg"
    first.with_name("s0_900.jpg").write_bytes(first.read_bytes())
    return place


def nct_crc(folder, n_train=3, n_test=1, seed=0):
    """NCT-CRC-HE-100K and CRC-VAL-HE-7K, nine classes each; the folder of both."""
    folder, rng = Path(folder) / "nct_crc_he_100k", np.random.default_rng(seed)
    for name, count in (("NCT-CRC-HE-100K", n_train), ("CRC-VAL-HE-7K", n_test)):
        for kind, label in enumerate(NCT_CLASSES):
            (folder / name / label).mkdir(parents=True)
            for _ in range(count):
                letters = "".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), 8))
                own = f"TCGA-{letters}" if name.startswith("CRC") else letters
                path = folder / name / label / f"{label}-{own}.tif"
                tifffile.imwrite(path, colour_texture(SIDE, kind, rng))
    return folder


def gdc(folder, n_slides=4, seed=0):
    """Phantoms with TCGA's names, each in a folder of its own, as the GDC's tool does.

    With the table of source sites. Returns slide name to project.
    """
    folder = Path(folder)
    made = folder.with_name(f".{folder.name}")
    projects = {}
    for i, file in enumerate(write_phantom_archive(made, n_slides, seed)["file"]):
        code, project = TCGA_SITES[i % 2]
        own = f"{i:08x}-0000-4000-8000-000000000000"
        name = f"TCGA-{code}-{1000 + i}-01Z-00-DX1.{own}"
        (folder / own / "logs").mkdir(parents=True)
        (made / file).rename(folder / own / f"{name}.svs")
        projects[name] = project
    shutil.rmtree(made)
    (folder / "tissue_source_sites.tsv").write_text(SITES)
    return projects


def tcga(folder, n_slides=4, size=128, seed=0):
    """Phantoms with TCGA's names, a table of labels, and the mosaics of chapter 02.

    Half of the slides are from each of two source sites, so of two projects. The
    slides are real pyramids; their pixels are phantoms.

    Returns ``slides`` and ``mosaics`` (folders), ``sites`` (path of a table of source
    sites) and ``projects`` (slide name to project).
    """
    folder = Path(folder)
    named, sites = folder / "slides", folder / "slides" / "tissue_source_sites.tsv"
    projects = gdc(named, n_slides, seed)
    with ThreadPoolExecutor(1) as executor:
        extract_mosaics(
            slide_table(named), folder / "mosaics", executor, progress=False,
            size=size, mpp=0.5, overlap=0.25, fraction=0.1,
        )  # fmt: skip
    return {
        "slides": named, "mosaics": folder / "mosaics", "sites": sites,
        "projects": projects,
    }  # fmt: skip


def tcga_luad(folder, n_patients=12, seed=0):
    """Slides, STAR counts and MAFs of TCGA-LUAD as the GDC's tool leaves them.

    Patients of five source sites, one phantom slide each; CD274 follows the patient's
    number, KRAS is mutated in every second one. A file of normal tissue (11A) must not
    be read. Returns the folder ``tcga_luad``.
    """
    place, made = Path(folder) / "tcga_luad", Path(folder) / "luad_phantoms"
    rng, sheet = np.random.default_rng(seed), []
    table = write_phantom_archive(made, n_scans=n_patients, seed=seed)

    def put(name, patient, sample, text=None):
        number = f"{len(sheet):08x}-0000-4000-8000-000000000000"
        sheet.append(f"{number}\t{name}\t{patient}\t{patient}-{sample}")
        path = place / number / name
        path.parent.mkdir(parents=True)
        if text is not None:
            with (
                gzip.open(path, "wt") if name.endswith("gz") else path.open("w") as file
            ):
                file.write(text)
        return path

    for i, file in enumerate(table["file"]):
        patient = f"TCGA-{('05', '38', '44', '50', '55')[i % 5]}-{4000 + i}"
        slide = f"{patient}-01Z-00-DX1.{i:08X}-0000-4000-8000-000000000000.svs"
        (made / file).rename(put(slide, patient, "01Z"))
        for sample, cd274 in (("01A", 2.0**i - 1), ("11A", 999)):
            lines = [
                "# gene-model: GENCODE v36",
                "gene_id\tgene_name\tgene_type\tunstranded\ttpm_unstranded",
                "N_unmapped\t\t\t812\t",
                f"ENSG00000120217.14\tCD274\tprotein_coding\t9\t{cd274}",
                f"ENSG00000153563.16\tCD8A\tprotein_coding\t9\t{rng.gamma(2):.4f}",
            ]
            name = f"{i:04x}{sample}.rna_seq.augmented_star_gene_counts.tsv"
            put(name, patient, sample, "\n".join(lines) + "\n")
        rows = ["#version gdc-1.0.0", "Hugo_Symbol\tVariant_Classification\tx"]
        rows += ["KRAS\tMissense_Mutation\t"] * (i % 2) + ["TP53\tSilent\t"]
        name = f"{i:04x}.wxs.aliquot_ensemble_masked.maf.gz"
        put(name, patient, f"01A, {patient}-10A", "\n".join(rows) + "\n")
    head = "File ID\tFile Name\tCase ID\tSample ID"
    text = "\n".join([head, *sheet]) + "\n"
    (place / "gdc_sample_sheet.2026-01-01.tsv").write_text(text)
    return place


def pannuke(folder, n=4, seed=0):
    """PanNuke's three folds: ``images.npy`` (float64) and ``types.npy``; the folder."""
    folder, rng = Path(folder) / "pannuke", np.random.default_rng(seed)
    tissues = ["Adrenal_gland", "Bile-duct", "Breast", "Colon"]
    for k in (1, 2, 3):
        place = folder / f"Fold {k}" / "images" / f"fold{k}"
        place.mkdir(parents=True)
        kinds = np.arange(n) % len(tissues)
        pixels = np.stack([colour_texture(SIDE, kind, rng) for kind in kinds])
        np.save(place / "images.npy", pixels.astype(np.float64))
        np.save(place / "types.npy", np.array(tissues)[kinds])
    return folder


def write_tree(folder, n_slides=6):
    """Write all papers' data in miniature, as published, under one ``HISTO_DATA``.

    Folders have the names of datasets.yaml. Kimia_Path24.h5; Path24C's archives, which
    overlap; KIMIAPath24_RGB; NCT-CRC-HE-100K unpacked and CRC-VAL-HE-7K zipped;
    PanNuke's arrays, one fold zipped; ImageNet's archive of archives; TCGA slides as
    the GDC's tool leaves them; KimiaNet's pickles of coordinates; Kather 2016 zipped;
    endometrium in class folders.

    Returns ``counts`` (images per data set and part) and ``projects`` (of slides).
    """
    folder = Path(folder)
    path24_h5(folder / "kimia_path24")
    path24_rgb(folder, n_train=10)
    work = folder / ".work"
    place = path24c(work, n_train=10)
    _zip(place / "test", folder / "kimia_path24c/Test patches.zip")
    _zip(place / "train/s0", folder / "kimia_path24c/training-s0-part2.zip", "s0")
    _zip(place / "train", folder / "kimia_path24c/Training patches--1.zip")
    place = nct_crc(work, n_train=10, n_test=2)
    (folder / place.name).mkdir()
    (place / "NCT-CRC-HE-100K").rename(folder / place.name / "NCT-CRC-HE-100K")
    name = "CRC-VAL-HE-7K"
    _zip(place / name, folder / f"crc_val_he_7k/{name}.zip", name)
    place = pannuke(folder)
    _zip(place / "Fold 3", place / "fold_3.zip", "Fold 3")
    shutil.rmtree(place / "Fold 3")
    for kind, label in enumerate(("n01440764", "n01443537")):
        for i in range(12):
            path = work / "imagenet" / f"{label}/{label}_{i}.JPEG"
            _tile(path, SIDE, SIDE, kind)
        with tarfile.open(work / f"{label}.tar", "w") as tar:
            tar.add(path.parent, ".")
    (folder / "imagenet").mkdir()
    with tarfile.open(folder / "imagenet/ILSVRC2012_img_train.tar", "w") as tar:
        for path in sorted(work.glob("n*.tar")):
            tar.add(path, path.name)
    projects = gdc(folder / "tcga", n_slides)
    _coordinates(folder / "kimianet", [*projects])
    kinds = ("TUMOR", "STROMA", "COMPLEX", "LYMPHO")
    kinds += ("DEBRIS", "MUCOSA", "ADIPOSE", "EMPTY")
    name = "Kather_texture_2016_image_tiles_5000"
    for kind, label in enumerate(kinds):
        for i in range(3):  # of three slides
            file = f"{kind:02x}{i}_CRC-Prim-HE-0{i + 1}.tif_Row_1_Col_{i}.tif"
            _tile(work / name / f"{kind + 1:02d}_{label}" / file, SIDE, SIDE, kind)
    _zip(work / name, folder / f"kather_2016/{name}.zip", name)
    for kind, label in enumerate(("NE", "EP", "EH", "EA")):
        for i in range(5):
            _tile(folder / "endometrium" / label / f"{label}_{i}.jpg", 80, 60, kind)
    shutil.rmtree(work)
    counts = {"kimia_path24c": {"train": 30, "test": 6}}
    return {"counts": counts, "projects": projects}


def _coordinates(folder, slides):
    """KimiaNet's three pickles: slide file name to its patches' (x, y) at level 0."""
    folder.mkdir(parents=True)
    for i, part in enumerate(("Train", "Validation", "Test")):
        places = {f"{name}.svs": [(0, 0), (192, 192)] for name in slides[2 * i :: 6]}
        places |= {f"{name}.svs": [(0, 192)] for name in slides[2 * i + 1 :: 6]}
        name = f"KimiaNet_{part}_SlideFileNames_to_PatchCoords.pickle"
        (folder / name).write_bytes(pickle.dumps(places))


def _tile(path, width, height, kind):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([kind, len(path.name), width])
    Image.fromarray(colour_texture(width, kind, rng)[:height]).save(path)


def _zip(folder, archive, inside=""):
    """Zip a folder's files, below ``inside`` in the archive."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w") as zipped:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            zipped.write(path, Path(inside) / path.relative_to(folder))


def _colour_parts(folder, counts, n_classes, seed):
    rng = np.random.default_rng(seed)
    for part, count in counts.items():
        for kind in range(n_classes):
            place = folder / part / f"s{kind}"
            place.mkdir(parents=True)
            for i in range(count):
                picture = Image.fromarray(colour_texture(SIDE, kind, rng))
                picture.save(place / f"s{kind}_{i}.jpg", quality=95)
    return folder
