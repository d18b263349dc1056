"""The atlas: one HTML page on which to look at what retrieval found.

A score says how often the nearest neighbour is right; only looking says what was taken
for what. The page holds its pictures, data and script, so it opens from a disk, asks
the network for nothing, and can be sent to a pathologist as one file.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from histo_utils import provenance
from histo_utils.colours import colour_of
from histo_utils.embeddings import Embeddings
from histo_utils.patches import ASSIGNMENTS, REQUIRED, check_patches, read_patch
from histo_utils.protocols import leave_one_out

LIMIT = 10_000_000  # bytes of a page: what still goes by mail
QUERIES = 200  # offered where the caller names none
LARGE = 2.5  # side of a query's picture, in thumbnails
QUALITIES = (85, 75, 60, 45)  # of WebP, tried in turn; below, nuclei lose their edges
SHOWN = ("label", "preparation", "slide_mpp")  # used by the page besides REQUIRED


def atlas(
    embeddings, path, *, k=8, queries=None, exclude="patient", spaces=None,
    thumbnail=96, title="Atlas of retrieved patches", note="", progress=True,
) -> Path:  # fmt: skip
    """Write a page that shows queries and what each encoder found for them.

    Parameters
    ----------
    embeddings : Embeddings or dict of str to Embeddings
        One encoder, or several by name, of the **same** patch table, which needs a
        ``label``; ``preparation`` is shown where it is there.
    path : str or pathlib.Path
        Of the page; its folder is made if missing.
    k : int
        Neighbours shown.
    queries : sequence of int, optional
        Rows of the table that can be picked. If not given, an even sample over labels
        and slides (`even_sample`) of 200 or as many as fit into `LIMIT`.
    exclude : {"self", "touching", "slide", "patient"}
        What a query may not find.
    spaces : dict, optional
        Encoder to options of `protocols.leave_one_out` (``metric``, ``standardised``,
        ``index``, ``rerank``); cosine distance where an encoder is not named.
    thumbnail : int
        Side of a neighbour's picture in px; a query's is 2.5 times as large.
    title, note : str
        Heading of the page, and a line under it.
    progress : bool
        Show a progress bar while patches are read.

    Returns
    -------
    pathlib.Path
        The page, of at most 10 MB. Pictures are WebP of the best quality that fits.

    Raises
    ------
    ValueError
        Tables that differ or lack columns, rows that do not exist, a page that is too
        large at the lowest quality; and as `protocols.leave_one_out` does. An old page
        at ``path`` is kept then.
    """
    path = Path(path)
    encoders = (
        {"embeddings": embeddings}
        if isinstance(embeddings, Embeddings)
        else dict(embeddings)
    )
    spaces = spaces or {}
    table = _shared_table(encoders)
    _check(encoders, path, spaces, thumbnail)
    given = queries is not None
    rows = _checked_rows(queries, table) if given else even_sample(table, QUERIES)
    searches = {}
    for name, space in encoders.items():
        options = spaces.get(name, {"metric": "cosine"})
        searches[name] = leave_one_out(space, k, exclude, **options), _words(options)
    kept = {"k": int(k), "exclude": exclude, "thumbnail": int(thumbnail)}
    pixels = {}
    while True:
        data = _contents(table, np.sort(rows), searches) | kept
        _read(table, data, thumbnail, pixels, progress)
        for quality in QUALITIES:
            pictures = {row: _data_uri(pixels[row], quality) for row in data["patches"]}
            page = _page(data, pictures, quality, title, note).encode()
            if len(page) <= LIMIT:
                break
        else:
            if given or len(rows) == 1:
                raise ValueError(
                    f"{len(rows)} queries with {len(pictures)} pictures make a page of "
                    f"{len(page) / 1e6:.1f} MB at the lowest quality "
                    f"({QUALITIES[-1]}); expected at most {LIMIT / 1e6:.1f} MB: give "
                    "fewer queries=, a smaller k= or a smaller thumbnail="
                )
            rows = rows[: len(rows) // 2]  # an even sample stays one when cut
            continue
        break
    with provenance.new_file(path) as part:
        part.write_bytes(page)
    return path


def even_sample(table, n):
    """Choose rows so that labels, and slides within a label, get equal shares.

    The first rows of a sample are an even sample, too. Within a slide the order is
    drawn, since the first patches of a grid lie side by side.

    Parameters
    ----------
    table : pandas.DataFrame
        With ``label`` and ``slide``.
    n : int
        Fewer where the table has fewer.

    Returns
    -------
    numpy.ndarray
        Row positions.

    Examples
    --------
    >>> slides = pd.DataFrame({"label": list("aaaab"), "slide": list("xxxyz")})
    >>> sorted(slides["slide"][even_sample(slides, 3)])
    ['x', 'y', 'z']
    """
    order = np.random.default_rng(0).permutation(len(table))
    drawn = table[["label", "slide"]].reset_index(drop=True).iloc[order]
    for unit in (["label", "slide"], ["label"]):
        turn = drawn.groupby(unit, sort=False).cumcount()
        drawn = drawn.iloc[np.argsort(turn.to_numpy(), kind="stable")]
    return drawn.index.to_numpy()[:n]


def _shared_table(encoders):
    """Return the table of all encoders; say where they differ."""
    if not encoders:
        raise ValueError("no embeddings were given; expected at least one encoder's")
    (first, space), *others = encoders.items()
    table = space.table
    for name, other in others:
        if len(other.table) != len(table):
            raise ValueError(
                f"{name!r} has {len(other.table)} patches, {first!r} has {len(table)}; "
                "one atlas shows one patch table: embed the same rows with both"
            )
        for column in (*REQUIRED, *SHOWN):
            if (column in table) != (column in other.table):
                raise ValueError(
                    f"only one of {first!r} and {name!r} has a column {column!r}; "
                    "embed the same patch table with both"
                )
            if column not in table:
                continue
            a, b = (_objects(t[column]) for t in (table, other.table))
            differs = ~((a == b) | (a.isna() & b.isna())).to_numpy(bool)
            if differs.any():
                row = int(differs.argmax())
                raise ValueError(
                    f"row {row} has {column} {a[row]!r} in {first!r} and {b[row]!r} in "
                    f"{name!r}; one atlas shows one patch table: embed the same rows "
                    "in the same order with both"
                )
    # A patient in two splits matters to a score, not to looking.
    check_patches(table.drop(columns=[c for c in ASSIGNMENTS if c in table]))
    if "label" not in table or table["label"].isna().any():
        raise ValueError(
            "the table has no column 'label', or gaps in it; the page marks who shares "
            "the query's: add labels or leave those rows out (Embeddings.take)"
        )
    return table


def _objects(values):
    return values.astype(object).where(values.notna(), None)


def _check(encoders, path, spaces, thumbnail):
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of an HTML file in it")
    unknown = [name for name in spaces if name not in encoders]
    if unknown:
        raise ValueError(
            f"spaces= names {unknown[0]!r}, which is not among the embeddings; they "
            f"are {', '.join(map(repr, encoders))}"
        )
    if thumbnail < 16:
        raise ValueError(f"thumbnail={thumbnail}; expected 16 px or more")


def _checked_rows(queries, table):
    rows = np.asarray(queries)
    if rows.ndim != 1 or not len(rows) or not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(
            f"queries are {rows.dtype} of shape {rows.shape}; expected a list of row "
            "positions, at least one"
        )
    outside = rows[(rows < 0) | (rows >= len(table))]
    if len(outside):
        raise ValueError(
            f"query {outside[0]} is outside 0 … {len(table) - 1}; give row positions "
            "of the patch table"
        )
    return np.unique(rows)


def _words(options):
    """Say what distances mean, as `search.Archive` takes the options."""
    plain = options.get("index") == "barcode" and options.get("rerank") is None
    metric = options.get("metric") or ("hamming" if plain else "cosine")
    words = {"hamming": "Hamming", "euclidean": "Euclidean"}.get(metric, metric)
    return f"{words} distance" + (", standardised" * bool(options.get("standardised")))


def _contents(table, rows, searches):
    """Everything on the page but the pictures, as JSON takes it."""
    found = []
    for name, (outcomes, distance) in searches.items():
        part = outcomes.iloc[rows]
        wrong = (part["label"] != part["predicted"]).to_numpy(bool)
        found.append(
            {
                "name": str(name),
                "distance": distance,
                "hits": np.stack(part["neighbours"]).tolist(),
                "distances": np.stack(part["distances"]).tolist(),
                "failures": rows[wrong].tolist(),
            }
        )
    shown = sorted({*rows.tolist()}.union(*(h for e in found for h in e["hits"])))
    labels = sorted(table["label"].unique(), key=str)
    code = {label: i for i, label in enumerate(labels)}
    patches = {}
    for row in shown:
        patch = table.iloc[row]
        side = patch["size"] * patch["mpp"]
        patches[row] = {
            "label": code[patch["label"]],
            "slide": str(patch["slide"]),
            "patient": str(patch["patient"]),
            "um": None if pd.isna(side) else round(float(side), 2),
        }
        if "preparation" in table:
            known = not pd.isna(patch["preparation"])
            patches[row]["preparation"] = str(patch["preparation"]) if known else None
    return {
        "archive": {"patches": len(table), "patients": table["patient"].nunique()},
        "labels": [{"name": str(n), "colour": colour_of(n)} for n in labels],
        "queries": rows.tolist(),
        "encoders": found,
        "patches": patches,
    }


def _read(table, data, thumbnail, pixels, progress):
    """Bring each patch into ``pixels`` at its size on the page; read none twice."""
    large = {*data["queries"]}
    for row in tqdm(
        data["patches"], desc="atlas", unit="patch", ascii=True, disable=not progress
    ):
        image = pixels.get(row) or Image.fromarray(read_patch(table.iloc[row]))
        side = min(image.width, int(thumbnail * (LARGE if row in large else 1)))
        pixels[row] = image.resize((side, side), Image.Resampling.LANCZOS)


def _data_uri(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _page(data, pictures, quality, title, note):
    """Fill the template; whatever the caller wrote is text there, never markup."""
    patches = {
        row: patch | {"image": pictures[row]} for row, patch in data["patches"].items()
    }
    contents = json.dumps(
        data | {"patches": patches, "quality": quality},
        allow_nan=False,
        separators=(",", ":"),
    )
    parts = {
        "title": html.escape(title),
        "note": html.escape(note),
        # In a script element only "<" could end it or open a comment.
        "data": contents.replace("<", "\\u003c"),
    }
    template = resources.files("histo_utils").joinpath("atlas.html").read_text("utf8")
    for tag in ("style", "script"):
        # The page's policy lets run what has these hashes, and nothing else.
        body = re.search(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        parts[tag] = f"'sha256-{digest}'"
    # In one pass, so that a title with a placeholder in it stays as it is.
    return re.sub(r"@@(\w+)@@", lambda place: parts[place[1]], template)
