"""Write the README's chapter list and results from notebooks and results files.

python tools/readme.py            # rewrites README.md
python tools/readme.py --check    # exit status 1 if it would change
"""

import json
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
INTERVAL = "{score:.2f} [{low:.2f}, {high:.2f}]"
DIFFERENCE = "{difference:+.2f} [{low:+.2f}, {high:+.2f}], detectable {detectable:.2f}"


def chapters(root=ROOT):
    """One table row a notebook: number, title, Colab link."""
    config = yaml.safe_load((root / "_config.yml").read_text("utf-8"))["repository"]
    where = config["url"].removeprefix("https://github.com/") + "/blob/main"
    rows = ["| | chapter | run it |", "|---|---|---|"]
    for path in sorted((root / "notebooks").glob("[0-9]*.ipynb")):
        cells = json.loads(path.read_text("utf-8"))["cells"]
        title = re.search(r"^# (.+)$", "".join(cells[0]["source"]), re.MULTILINE)[1]
        colab = (
            f"https://colab.research.google.com/github/{where}/notebooks/{path.name}"
        )
        name = f"[{title}](notebooks/{path.name})"
        rows.append(f"| {path.name[:2]} | {name} | [Colab]({colab}) |")
    return "\n".join(rows)


def results(root=ROOT):
    """One table row a headline, each from its results file; missing files: not run."""
    rows = ["| question | answer | n | from |", "|---|---|---|---|"]
    for name, question, read in HEADLINES:
        path = root / "results" / "tissue" / f"{name}.json"
        if path.exists():
            found = json.loads(path.read_text("utf-8"))
            answer, n = read(found)
            made = found["provenance"]
            source = f"`{path.name}`, {made['date'][:10]}, `{made['commit']}`"
        else:
            answer, n, source = "not run", "", f"`{path.name}`"
        rows.append(f"| {question} | {answer} | {n} | {source} |")
    return "\n".join(rows)


def _colour(column):
    def read(found):
        row = found["colour"][column]
        score = INTERVAL.format(score=row["P@1"], low=row["low"], high=row["high"])
        return f"{score}, chance {row['by chance']:.2f}", f"{row['patients']} patients"

    return read


def _nuclei(method):
    def read(found):
        score = found["cellularity"][method]["test"]
        return INTERVAL.format(**score["patches"]), f"{score['regions']} regions"

    return read


def _bench(system, task):
    def read(found):
        score = found["colour_table"][system][task]
        return INTERVAL.format(**score), f"{score['n']} patients"

    return read


def _at(*path):
    """Read a score, or a difference, and its patients, by the keys that lead to it."""

    def read(found):
        for key in path:
            found = found[key]
        if "score" in found:
            return INTERVAL.format(**found), f"{found['n']} patients"
        return DIFFERENCE.format(**found), f"{found['n']} patients"

    return read


def _preparation(found):
    score = found["confounders"]["network"]["preparation"]
    chance = found["confounders"]["by_chance"]["preparation"]
    return f"{INTERVAL.format(**score)}, chance {chance:.2f}", f"{score['n']} patients"


def _cutoff(found):
    cut = found["audit"]["cutoff"]
    return f"{cut['mean']:.1%} ± {cut['sd']:.1%}", f"{cut['n']} random embeddings"


HEADLINES = (
    (
        "03_measuring_retrieval",
        "Recognising the scan without touching patches, P@1: a colour histogram",
        _bench("histogram", "scan_not_touching"),
    ),
    (
        "03_measuring_retrieval",
        "… frozen ImageNet MobileNetV2",
        _bench("network", "scan_not_touching"),
    ),
    (
        "03_measuring_retrieval",
        "Recognising the organ of another patient, P@1: a colour histogram",
        _bench("histogram", "organ"),
    ),
    (
        "03_measuring_retrieval",
        "… frozen ImageNet MobileNetV2",
        _bench("network", "organ"),
    ),
    (
        "07_metric_learning",
        "Trained by the multi-similarity loss (Yang 2019), scan without touching",
        _at("scores", "multi_similarity", "scan_not_touching"),
    ),
    (
        "07_metric_learning",
        "… minus the colour histogram",
        _at("differences", "multi_similarity − histogram", "scan_not_touching"),
    ),
    (
        "09_retrieval_evaluation",
        "… organ of another patient by MAP@R, minus the frozen start",
        _at("differences_from_start", "map_at_r", "organ", "yang"),
    ),
    (
        "08_feature_fusion_neck",
        "Feature-fusion neck (LGFFEM), scan without touching",
        _at("scores", "neck", "scan_apart"),
    ),
    (
        "08_feature_fusion_neck",
        "… the same heads without the neck, minus with it",
        _at("ablation", "no neck", "scan_apart"),
    ),
    (
        "05_gpu_fine_tuning",
        "Trained on the most cellular patches (KimiaNet), organ",
        _at("scores", "i_most_cellular", "P@1"),
    ),
    (
        "05_gpu_fine_tuning",
        "… minus as many random patches",
        _at("cellular_against_random"),
    ),
    (
        "06_two_step_fine_tuning",
        "Fine-tuned in two steps (FTX-2048), organ",
        _at("scores", "organ, nearest neighbour, FTX"),
    ),
    (
        "06_two_step_fine_tuning",
        "… minus the ImageNet features",
        _at("differences", "organ, nearest neighbour: FTX − IMGNET"),
    ),
    (
        "04_pretrained_features",
        "Fine-tuned and asked in grey (Kieffer 2017), scan",
        _at("trained", "tuned, grey", "share right"),
    ),
    (
        "04_pretrained_features",
        "… minus its head alone, the network frozen",
        _at("against", "tuned, grey", "its head"),
    ),
    (
        "10_slide_search",
        "Slides by barcodes, organ by the majority of three slides",
        _at("horizontal", "mobilenetv2", "barcodes", "majority"),
    ),
    (
        "03_measuring_retrieval",
        "The frozen network's nearest other patient has the same preparation",
        _preparation,
    ),
    (
        "03_measuring_retrieval",
        'A published "Recall@1" metric, given random vectors',
        _cutoff,
    ),
    (
        "01_data_preparation",
        "Does the nearest other patient's patch in mean colour show the same organ?",
        _colour("label"),
    ),
    (
        "01_data_preparation",
        "… the same preparation (paraffin or frozen)?",
        _colour("preparation"),
    ),
    (
        "02_mosaic_extraction",
        "Rank correlation of estimated nuclear area with experts', test regions, ours",
        _nuclei("ours"),
    ),
    (
        "02_mosaic_extraction",
        "… Macenko's stains with Otsu's threshold",
        _nuclei("Macenko"),
    ),
    ("02_mosaic_extraction", "… one fixed threshold", _nuclei("fixed")),
)


def written(text, root=ROOT):
    """Return the README with both parts written anew."""
    for name, part in (("chapters", chapters(root)), ("results", results(root))):
        pattern = rf"(<!-- {name}: [^>]*-->\n).*?(<!-- /{name} -->)"
        text = re.sub(pattern, lambda m, p=part: f"{m[1]}{p}\n{m[2]}", text, flags=re.S)
    return text


def main():
    readme = ROOT / "README.md"
    before = readme.read_text("utf-8")
    after = written(before)
    if "--check" in sys.argv:
        raise SystemExit(
            "README.md is stale: run tools/readme.py" if after != before else 0
        )
    readme.write_text(after, "utf-8")


if __name__ == "__main__":
    main()
