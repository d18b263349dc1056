"""Vectors of one slide's mosaic, and of all slides together."""

from __future__ import annotations

import functools

import numpy as np
import pandas as pd

from histo_utils.embeddings import Embeddings, load_embeddings
from histo_utils.encoders import embed, frozen

BATCH = 16  # patches; on two cores faster than 64


def vectors_of_slide(encoder, weights, job, out):
    """Embed a slide's mosaic, save it in ``out``: a piece of work for `run_batch`."""
    model = checked_encoder(encoder, weights, job["encoder"])
    patches = pd.read_parquet(out.parent / "mosaics" / f"{job['name']}.parquet")
    chosen = patches[patches["in_mosaic"]].drop(columns="in_mosaic")
    # Patients and labels are added when all is gathered: they may change by then.
    made = embed(model, chosen.assign(patient=job["name"]), batch_size=BATCH,
                 progress=False)  # fmt: skip
    (out / f"{job['name']}.json").unlink(missing_ok=True)  # it spoke for older vectors
    table = made.table.drop(columns="patient")
    table.attrs = {}  # holds seconds; the same work shall give the same bytes
    Embeddings(made.vectors, table).save(out / job["name"])
    return {"patches": len(made)}


@functools.lru_cache(maxsize=1)
def checked_encoder(name, weights, fingerprint):
    """Load the encoder once a process; it must be the one that was asked for."""
    model = frozen(name, weights)
    if model.fingerprint() != fingerprint:
        raise ValueError(
            f"{name}: the weights are not those that the run began with; were they "
            "replaced, or is HISTO_WEIGHTS another folder? Run again"
        )
    return model


def gather(slides, out):
    """Embeddings of all slides in the table's order, with its columns."""
    parts = []
    for row in slides.drop(columns=["image", "slide_mpp"]).to_dict("records"):
        part = load_embeddings(out / "vectors" / row["slide"])
        parts.append(Embeddings(part.vectors, part.table.assign(**row)))
    table = pd.concat([part.table for part in parts], ignore_index=True)
    return Embeddings(np.concatenate([part.vectors for part in parts]), table)
