"""Plan the papers' experiments before any is run: data, memory, disk, hours.

    python tools/plan.py [--gpu-memory GB] [--markdown]

Networks are built as their chapters build them; a step of each is counted (cost.py):

    GB    = 4 B · (weights + trained · (1 + optimiser's states)) + saved + reserve
    hours = (FLOPs / rate + bytes / bandwidth + decoding / workers) / 3600

Rates are measured on this machine on one small network, or are a GPU's published ones
times an assumed utilisation (--markdown).
"""

import argparse
import ast
import json
import math
import os
import sys
from pathlib import Path

import torch
import yaml
from cost import cost, measured
from trainings import stages

from histo_utils import catalog
from histo_utils.readers.class_folders import PARTS, SUFFIXES

USE = 0.4  # share of a GPU's published peaks that is assumed to be reached
GPU = "A100 40 GB"  # 19.5 and 312 TFLOP/s in 32 and 16 bits, 1,555 GB/s; published
A100 = {32: 19.5e12 * USE, 16: 312e12 * USE, "bytes": 1.555e12 * USE, "GB": 40}
A100["megapixel"] = 0.03  # s to decode one as JPEG, measured on the book's machine
RESERVE = 1e9  # bytes: the CUDA context and working space


def read_experiment(path):
    """Chapter's name, and an experiment's parameters over the notebook's defaults."""
    chapter = path.name.removesuffix(".yaml").split(".")[0]
    notebook = json.loads(Path("notebooks", f"{chapter}.ipynb").read_text("utf8"))
    (cell,) = (
        c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", [])
    )
    tree = ast.parse("".join(cell["source"])).body
    given = {x.target.id: ast.literal_eval(x.value) for x in tree}
    return chapter, given | (yaml.safe_load(path.read_text("utf8")) or {})


def counts_of(name, published=False):
    """Whether a data set is there; its images by part, their side in px, and its GB."""
    known = catalog.datasets().get(Path(name).name)
    facts = dict(known.images) if known else {}
    if not facts and "rgb" in name.lower():  # no other count of these is published
        facts = dict(catalog.datasets()["kimia_path24c"].images)
    side, size, disk, seen = facts.pop("side", 0), facts.pop("gb", math.nan), 0, {}
    parts = {folder: part for _, names in PARTS for folder, part in names.items()}
    for root in (catalog.data_folder(), catalog.cache_folder() / "data"):
        for place, _, files in [] if published else os.walk(root / name):
            disk += sum(Path(place, f).stat().st_size for f in files)
            steps = Path(place).relative_to(root / name).parts
            part = parts.get(steps[0]) if steps else None
            part = part if part in ("train", "test") else "train"  # PanNuke's folds
            images = sum(Path(f).suffix.lower() in SUFFIXES for f in files)
            if steps and images:
                seen[part] = seen.get(part, 0) + images
    return disk > 0, seen or facts, side, disk / 1e9 if disk else float(size)


def plan(path, gpu, rates, published=False):
    """One row of the table: what an experiment needs."""
    chapter, p = read_experiment(path)
    there, n, side, disk = counts_of(p["dataset"], published)
    other = p.get("test_dataset")
    if other and other != p["dataset"]:
        found, theirs, _, more = counts_of(other, published)
        there, disk = there and found, disk + more
        n = n | {"test": theirs.get("test", 0)}
    precision, devices = p.get("precision", "32-true"), p.get("devices", 1)
    speed = rates[16 if "16" in precision else 32]
    found, decoded = stages(chapter[:2], p, n)
    if not sum(n.values()):  # nobody says how many
        found = [s._replace(train=math.nan, forward=math.nan) for s in found]
    hours, steps, trained, need, advice = 0.0, 0, 0, 0, ""
    for s in found:
        batch = max(1, s.batch // devices)
        c = cost(json.dumps(s.network), batch, precision)
        fixed = 4 * (c.weights + c.trained * (1 + s.states)) + RESERVE
        turns = s.runs * s.epochs * (p.get("steps") or s.train / s.batch)
        seconds = turns * (c.flops / speed + c.bytes / rates["bytes"])
        once = c.forward[0] / speed + c.forward[1] / rates["bytes"]
        hours += (seconds + s.forward / batch * once) / 3600
        steps, trained = steps + turns, max(trained, c.trained)
        need = max(need, fixed + c.saved)
        if fixed + c.saved > gpu * 1e9:
            most = int((gpu * 1e9 - fixed) / (c.saved / batch))
            times = math.ceil(batch / max(1, most))
            pairs = chapter.startswith("07")  # accumulate is refused
            advice = f"batch {batch // times}, accumulate {times}"
            advice = f"devices {times}" if pairs else advice
            advice = advice if most > 0 else "a smaller input_size"
    small = p.get("resize") or (p.get("input_size") if chapter[:2] == "08" else 0)
    if small and small < side:  # large tiles are resized once, then read small
        decoded = sum(n.values()) + decoded * (small / side) ** 2
    decode = decoded * rates["megapixel"] * side**2 / 1e6 / max(1, p.get("workers", 0))
    data = {} if published else {"data": "found" if there else "not found"}
    return {"experiment": path.stem, **data,
        "images": " + ".join(f"{v:,}" for v in n.values()) or "unknown",
        "steps": f"{steps:,.0f}", "trained, M": trained / 1e6, "GPU GB": need / 1e9,
        "disk GB": disk, "decode h": decode / 3600, "training h": hours,
        "if it does not fit": advice}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu-memory", type=float, help="GB; of this GPU, else 24")
    parser.add_argument("--markdown", action="store_true", help=f"for an {GPU}")
    options = parser.parse_args()
    here = torch.cuda.is_available() and torch.cuda.mem_get_info()[1] / 1e9
    gpu, rates = options.gpu_memory or here or 24, A100
    if options.markdown:
        gpu = A100["GB"]
    else:
        rates = measured()
    rows = []
    for path in sorted(Path("profiles/paper").glob("*.yaml")):
        row = plan(path, gpu, rates, published=options.markdown)
        rows.append([f"{x:,.1f}" if isinstance(x, float) else x for x in row.values()])
        rows[-1] = ["unknown" if x == "nan" else x for x in rows[-1]]
    rows = [list(row), *rows]
    if options.markdown:
        rows.insert(1, ["---"] * len(row))
        print(*("| " + " | ".join(row) + " |" for row in rows), sep="\n")
        return 0
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip())
    print(
        f"For a GPU of {gpu:g} GB; measured here: {rates[32] / 1e9:.0f} GFLOP/s, "
        f"{rates['bytes'] / 1e9:.0f} GB/s, {rates['megapixel'] * 1e3:.0f} ms to decode "
        "a megapixel"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
