"""What data sets exist: licence, citation, files, and what counts as one unit."""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class File:
    """One file to fetch: its name, checksum (``algorithm:digest``), bytes and URL."""

    name: str
    checksum: str
    size: int | None = None
    url: str | None = None


@dataclass(frozen=True)
class Dataset:
    """What a reader must know of a data set before using it."""

    name: str
    title: str
    licence: str
    citation: str
    homepage: str
    content: str
    unit: str  # what may be called independent: the unit of n
    access: str  # how to get it
    files: tuple[File, ...] = ()


def _zenodo(record, name, checksum, size=None):
    url = f"https://zenodo.org/records/{record}/files/{name}?download=1"
    return File(name, checksum, size, url)


def _pannuke(fold, sha256):
    url = f"https://warwick.ac.uk/fac/cross_fac/tia/data/pannuke/fold_{fold}.zip"
    return File(f"fold_{fold}.zip", f"sha256:{sha256}", None, url)


_ENTRIES = (
    Dataset(
        name="phantom",
        title="Phantom archive",
        licence="MIT, as the code that generates it",
        citation="this book",
        homepage="histo_utils/phantom.py",
        content="generated slides: 4 tissue classes, 2 sites, 16 patients, 24 scans",
        unit="patient (synthetic: never evidence)",
        access="generated on the spot",
    ),
    Dataset(
        name="monuseg",
        title="MoNuSeg 2018",
        licence="CC BY-NC-SA 4.0",
        citation="Kumar et al. 2017, 2020",
        homepage="https://monuseg.grand-challenge.org/",
        content="43 H&E regions of 1000×1000 px at 0.25 µm/px, 8 organs, nuclei masks",
        unit="patient (43, one region each)",
        access="download from the homepage; indexed here by slides.csv with checksums",
    ),
    Dataset(
        name="slides",
        title="Two open slides",
        licence="CC0 (CMU-1); GDC open access (TCGA-CR-7395)",
        citation="OpenSlide test data; TCGA Research Network",
        homepage="https://openslide.cs.cmu.edu/download/openslide-testdata/",
        content="a skin section at 0.499 µm/px; a frozen section without µm/px",
        unit="slide (2: for showing, not for measuring)",
        access="CMU-1 is fetched; TCGA-CR-7395-01A-01-TS1 from portal.gdc.cancer.gov",
        files=(
            File(
                "CMU-1-Small-Region.svs",
                "sha256:"
                "ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7",
                1_938_955,
                "https://openslide.cs.cmu.edu/download/openslide-testdata/Aperio/"
                "CMU-1-Small-Region.svs",
            ),
        ),
    ),
    Dataset(
        name="lc25000_lung",
        title="LC25000, lung subset",
        licence="Borkowski et al. 2019: free use with citation",
        citation="Borkowski et al. 2019",
        homepage="https://github.com/tampapath/lung_colon_image_set",
        content="3,698 lung tiles of 224×224 px, 3 classes, augmented from 740 tiles",
        unit="source tile (no patient or slide ids)",
        access="download from the homepage; source tiles from LC25000-clean",
    ),
    Dataset(
        name="kimia_path24",
        title="Kimia Path24",
        licence="end-user agreement, non-commercial research",
        citation="Babaie et al. 2017",
        homepage="https://kimialab.uwaterloo.ca/kimia/index.php/pathology-images-kimia-path24/",
        content="24 slides, 1,325 test patches of 1000×1000 px at 0.5 µm/px, grey",
        unit="slide (24; one slide is one class)",
        access="on request from KIMIA Lab",
        files=(File("Kimia_Path24.h5", "md5:aeb54db89aaf28455e06770d20bd1307"),),
    ),
    Dataset(
        name="kimia_path24c",
        title="Kimia Path24C",
        licence="end-user agreement, non-commercial research",
        citation="Shafiei et al. 2021",
        homepage="https://github.com/KimiaLabMayo/kimia_path24",
        content="22,591 training and 1,325 test patches in colour, 24 slides",
        unit="slide (24; one slide is one class)",
        access="download from the homepage (Git LFS, 6.9 GB) under the agreement",
        files=(
            File(
                "Test patches.zip",
                "sha256:"
                "c427a591199a71ef4eda510a2f85493617c29b37f4e99b27d69d396434bca97e",
                229_868_289,
            ),
        ),
    ),
    Dataset(
        name="nct_crc_he_100k",
        title="NCT-CRC-HE-100K",
        licence="CC BY 4.0",
        citation="Kather et al. 2018",
        homepage="https://zenodo.org/records/1214456",
        content="100,000 colorectal tiles of 224×224 px, Macenko-normalised, 9 tissues",
        unit="tile (patient ids not published)",
        access="fetched",
        files=(
            _zenodo(
                1214456,
                "NCT-CRC-HE-100K.zip",
                "md5:6fd702d11df6292bc054397ae038a464",
                11_690_284_003,
            ),
        ),
    ),
    Dataset(
        name="nct_crc_he_100k_nonorm",
        title="NCT-CRC-HE-100K, colours as scanned",
        licence="CC BY 4.0",
        citation="Kather et al. 2018",
        homepage="https://zenodo.org/records/1214456",
        content="the same 100,000 tiles without colour normalisation",
        unit="tile (patient ids not published)",
        access="fetched",
        files=(
            _zenodo(
                1214456,
                "NCT-CRC-HE-100K-NONORM.zip",
                "md5:035777cf327776a71a05c95da6d6325f",
                None,
            ),
        ),
    ),
    Dataset(
        name="crc_val_he_7k",
        title="CRC-VAL-HE-7K",
        licence="CC BY 4.0",
        citation="Kather et al. 2018",
        homepage="https://zenodo.org/records/1214456",
        content="7,180 colorectal tiles of 224×224 px of 50 other patients, 9 tissues",
        unit="tile (patient ids not published)",
        access="fetched",
        files=(
            _zenodo(
                1214456,
                "CRC-VAL-HE-7K.zip",
                "md5:2fd1651b4f94ebd818ebf90ad2b6ce06",
                800_276_929,
            ),
        ),
    ),
    Dataset(
        name="kather_2016",
        title="Kather texture 2016",
        licence="CC BY 4.0",
        citation="Kather et al. 2016",
        homepage="https://zenodo.org/records/53169",
        content="5,000 colorectal tiles of 150×150 px at 0.495 µm/px, 8 classes",
        unit="slide (from the file name)",
        access="fetched",
        files=(
            _zenodo(
                53169,
                "Kather_texture_2016_image_tiles_5000.zip",
                "md5:0ddbebfc56344752028fda72602aaade",
            ),
        ),
    ),
    Dataset(
        name="pannuke",
        title="PanNuke",
        licence="CC BY-NC-SA 4.0",
        citation="Gamper et al. 2019, 2020",
        homepage="https://warwick.ac.uk/fac/cross_fac/tia/data/pannuke/",
        content="7,901 patches of 256×256 px at 0.25 µm/px, 19 tissues, nuclei masks",
        unit="patch (no patient ids)",
        access="fetched",
        files=(
            _pannuke(
                1, "6e19ad380300e8ce9480f9ab6a14cc91fa4b6a511609b40e3d70bdf9c881ed0b"
            ),
            _pannuke(
                2, "5bc540cc509f64b5f5a274d6e5a245527dbd3e6d3155d43555115c5d54709b07"
            ),
            _pannuke(
                3, "c14d372981c42f611ebc80afad01702b89cad8c1b3089daa31931cf5a4b1a39d"
            ),
        ),
    ),
    Dataset(
        name="tcga",
        title="TCGA diagnostic slides",
        licence="GDC open access, TCGA data use policies",
        citation="TCGA Research Network",
        homepage="https://portal.gdc.cancer.gov/",
        content="whole slides of 33 cancer types; KimiaNet used 8,611 of 30 types",
        unit="patient; source sites are nested in studies",
        access="GDC portal or its transfer tool; then use the folder as a data set",
    ),
)
DATASETS = {entry.name: entry for entry in _ENTRIES}


def dataset(name):
    """Look up a data set's licence, citation, homepage, files and unit of n.

    Raises
    ------
    ValueError
        For an unknown name; the message holds the nearest ones.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(
            f"unknown data set {name!r}; {hint}known are {', '.join(DATASETS)}; a "
            "folder of one's own slides is given by its path"
        )
    return DATASETS[name]
