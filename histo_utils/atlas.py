"""The atlas: one HTML page on which to look at what retrieval found.

A score says how often the nearest neighbour is right; only looking says what was
confused with what. The page holds its pictures, data and script: it opens from a disk,
needs no network, and can be sent to a pathologist as one file.
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
from histo_utils.embeddings import Embeddings
from histo_utils.patches import ASSIGNMENTS, REQUIRED, check_patches, read_patch
from histo_utils.plots import colour_of
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
        One encoder, or several by name, of the **same** patch table with a ``label``.
    path : str or pathlib.Path
        Of the page; its folder is made if missing.
    k : int
        Neighbours shown.
    queries : sequence of int, optional
        Rows of the table that can be picked; default: an even sample (`even_sample`) of
        200, or as many as fit into `LIMIT`.
    exclude : {"self", "touching", "slide", "patient"}
        What a query may not find.
    spaces : dict, optional
        Encoder to options of `protocols.leave_one_out`; default: cosine distance.
    thumbnail : int
        Side of a neighbour's picture in px; a query's is 2.5 times as large.
    title, note : str
        Heading of the page, and a line under it.

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
    path, spaces = Path(path), spaces or {}
    if isinstance(embeddings, Embeddings):
        embeddings = {"embeddings": embeddings}
    table = _shared_table(embeddings)
    rows = even_sample(table, QUERIES) if queries is None else np.unique(queries)
    _check(table, embeddings, path, spaces, thumbnail, rows)
    options = {name: spaces.get(name, {"metric": "cosine"}) for name in embeddings}
    outcomes = {
        name: leave_one_out(space, k, exclude, **options[name])
        for name, space in embeddings.items()
    }
    shown = {"k": int(k), "exclude": exclude, "thumbnail": int(thumbnail)}
    pixels, page, text = {}, None, {"title": title, "note": note}
    while page is None:
        data = _contents(table, np.sort(rows), outcomes, options) | shown
        for row in tqdm(
            data["patches"], desc="atlas", unit="patch", ascii=True,
            disable=not progress,
        ):  # fmt: skip
            image = pixels.get(row) or Image.fromarray(read_patch(table.iloc[row]))
            side = int(thumbnail * (LARGE if row in data["queries"] else 1))
            side = min(image.width, side)
            pixels[row] = image.resize((side, side), Image.Resampling.LANCZOS)
        for quality in QUALITIES:
            pictures = {row: _data_uri(pixels[row], quality) for row in data["patches"]}
            made = _page(data, pictures, quality, text).encode()
            if len(made) <= LIMIT:
                page = made
                break
        else:
            if queries is not None or len(rows) == 1:
                raise ValueError(
                    f"{len(rows)} queries with {len(pictures)} pictures make a page of "
                    f"{len(made) / 1e6:.1f} MB at the lowest quality "
                    f"({QUALITIES[-1]}); expected at most {LIMIT / 1e6:.1f} MB: give "
                    "fewer queries=, a smaller k= or a smaller thumbnail="
                )
            rows = rows[: len(rows) // 2]  # an even sample stays one when cut
    with provenance.new_file(path) as part:
        part.write_bytes(page)
    return path


def even_sample(table, n) -> np.ndarray:
    """Positions of n rows, equal shares of labels and of slides in them; also if cut.

    Examples
    --------
    >>> slides = pd.DataFrame({"label": list("aaaab"), "slide": list("xxxyz")})
    >>> sorted(slides["slide"][even_sample(slides, 3)])
    ['x', 'y', 'z']
    """
    # in random order within a slide, since the first patches of a grid lie side by side
    order = np.random.default_rng(0).permutation(len(table))
    sample = table[["label", "slide"]].reset_index(drop=True).iloc[order]
    for unit in (["label", "slide"], ["label"]):
        turn = sample.groupby(unit, sort=False).cumcount()
        sample = sample.iloc[np.argsort(turn.to_numpy(), kind="stable")]
    return sample.index.to_numpy()[:n]


def _shared_table(encoders):
    """Return the table of all encoders; say where they differ."""
    if not encoders:
        raise ValueError("no embeddings were given; expected at least one encoder's")
    (first, space), *others = encoders.items()
    table, columns = space.table, [*REQUIRED, *SHOWN]
    for name, other in others:
        if len(other.table) != len(table):
            raise ValueError(
                f"{name!r} has {len(other.table)} patches, {first!r} has {len(table)}; "
                "one atlas shows one patch table: embed the same rows with both"
            )
        a, b = (t.reindex(columns=columns).astype(object).reset_index(drop=True)
                for t in (table, other.table))  # fmt: skip
        a, b = (t.where(t.notna(), None) for t in (a, b))
        differs = ((a != b) & ~(a.isna() & b.isna())).to_numpy(bool)
        if differs.any():
            row, column = np.argwhere(differs)[0]
            raise ValueError(
                f"row {row} has {columns[column]} {a.iloc[row, column]!r} in {first!r} "
                f"and {b.iloc[row, column]!r} in {name!r}; one atlas shows one patch "
                "table: embed the same rows in the same order with both"
            )
    # A patient in two splits matters to a score, not to looking.
    check_patches(table.drop(columns=[c for c in ASSIGNMENTS if c in table]))
    if "label" not in table or table["label"].isna().any():
        raise ValueError(
            "the table has no column 'label', or gaps in it; the page marks who shares "
            "the query's: add labels or leave those rows out (Embeddings.take)"
        )
    return table


def _check(table, encoders, path, spaces, thumbnail, rows):
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
    if not len(rows) or not np.issubdtype(rows.dtype, np.integer):
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


def _words(options):
    """Say what distances mean, as `search.Archive` takes the options."""
    plain = options.get("index") == "barcode" and options.get("rerank") is None
    metric = options.get("metric") or ("hamming" if plain else "cosine")
    words = {"hamming": "Hamming", "euclidean": "Euclidean"}.get(metric, metric)
    return f"{words} distance" + (", standardised" * bool(options.get("standardised")))


def _contents(table, rows, outcomes, options):
    """Everything on the page but the pictures, as JSON takes it."""
    found = []
    for name, part in outcomes.items():
        part = part.iloc[rows]
        wrong = (part["label"] != part["predicted"]).to_numpy(bool)
        found.append({
            "name": str(name), "distance": _words(options[name]),
            "hits": np.stack(part["neighbours"]).tolist(),
            "distances": np.stack(part["distances"]).tolist(),
            "errors": rows[wrong].tolist(),
        })  # fmt: skip
    shown = sorted({*rows.tolist()}.union(*(h for e in found for h in e["hits"])))
    labels = sorted(table["label"].unique(), key=str)
    patches = {}
    for row in shown:
        patch = table.iloc[row]
        side = patch["size"] * patch["mpp"]
        patches[row] = {
            "label": labels.index(patch["label"]),
            "um": None if pd.isna(side) else round(float(side), 2),
        }
        for name in ("slide", "patient", "preparation"):
            if name in table:
                told = not pd.isna(patch[name])
                patches[row][name] = str(patch[name]) if told else None
    return {
        "archive": {"patches": len(table), "patients": table["patient"].nunique()},
        "labels": [{"name": str(n), "colour": colour_of(n)} for n in labels],
        "queries": rows.tolist(), "encoders": found, "patches": patches,
    }  # fmt: skip


def _data_uri(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _page(data, pictures, quality, text):
    """Fill the template; whatever the caller wrote is text there, never markup."""
    patches = {row: p | {"image": pictures[row]} for row, p in data["patches"].items()}
    data = data | {"patches": patches, "quality": quality}
    contents = json.dumps(data, allow_nan=False, separators=(",", ":"))
    # In a script element only "<" could end it or open a comment.
    parts = {"data": contents.replace("<", "\\u003c")}
    parts |= {name: html.escape(words) for name, words in text.items()}
    template = resources.files("histo_utils").joinpath("atlas.html").read_text("utf8")
    for tag in ("style", "script"):
        # The page's policy lets run what has these hashes, and nothing else.
        body = re.search(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        parts[tag] = f"'sha256-{digest}'"
    # In one pass, so that a title with a placeholder in it stays as it is.
    return re.sub(r"@@(\w+)@@", lambda place: parts[place[1]], template)
