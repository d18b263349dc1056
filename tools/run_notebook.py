"""Run one chapter with papermill and keep a copy that says what made it.

    python tools/run_notebook.py 02_mosaic_extraction --profile tissue \
        --out _build/executed/tissue/02_mosaic_extraction.ipynb
    python tools/run_notebook.py 04_pretrained_features.tl_vgg16 --profile paper

Run it in the repository's root. In the profile paper a chapter runs once for each
experiment, ``profiles/paper/<chapter>.<experiment>.yaml``; ``tl_vgg16`` alone will do
where one chapter has it. It prints one line, ``[2/12] 02_mosaic_extraction 73 s``. The
copy appears under its name only when the run is complete; a failed run
leaves ``<name>.failed.ipynb`` beside it and exits with 1.
What papermill alone does not do: it refuses misspelt parameters, and it writes
profile, commit, date and the data that the results name into the copy's metadata
(``histo``).

``--override FILE`` is for miniatures of a paper's data: YAML, ``{"all", a chapter or
an experiment: {parameter: value}}``. It may change sizes, epochs, seeds and counts, and
nothing else (`allowed`); results then go to ``_build/results``.
"""

import argparse
import ast
import difflib
import hashlib
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import yaml

NOTEBOOKS, PROFILES = Path("notebooks"), Path("profiles")


def refuse_unknown(kind, names, known):
    """Stop with the nearest valid names if a name is not known."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            nearest = ", ".join(near or sorted(known))
            raise SystemExit(f"unknown {kind} '{name}'; did you mean: {nearest}?")


def names(profile):
    """List what runs in a profile: chapters, or ``<chapter>.<experiment>``."""
    known = {"demo", *(p.name for p in PROFILES.glob("*") if p.is_dir())}
    refuse_unknown("profile", [profile], known)
    if profile == "demo":  # the notebooks' own defaults
        return sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    return sorted(path.stem for path in (PROFILES / profile).glob("*.yaml"))


def resolve(name, profile):
    """Return the full name of a chapter or an experiment, or stop with the nearest."""
    known = names(profile)
    chapter, _, _ = name.rpartition(".")
    if name in known:
        return name
    found = [one for one in known if name in one.split(".")]
    if len(found) == 1:
        return found[0]
    if found:
        raise SystemExit(
            f"'{name}' is not one but {', '.join(found)}; name one of them"
        )
    if (NOTEBOOKS / f"{name}.ipynb").exists():
        raise SystemExit(f"{name} has no run in the profile {profile}")
    own = [one for one in known if one.split(".")[0] == chapter]
    parts = own or [*known, *(one.partition(".")[2] for one in known if "." in one)]
    refuse_unknown("experiment" if profile == "paper" else "chapter", [name], parts)


def read_parameters(name, profile, known):
    """Return a profile's parameters for a notebook whose parameters are `known`."""
    path = PROFILES / profile / f"{name}.yaml"
    values = (yaml.safe_load(path.read_text("utf8")) or {}) if path.exists() else {}
    refuse_unknown(f"parameter in {path}:", values, known)
    return {"profile": profile, **values} if "profile" in known else values


# Numbers that are part of a network, a loss or a protocol, and no size or count.
FIXED = {"out_indices", "front_stage", "sub_centres", "decay_at", "votes", "num_layers"}


def allowed(key, value, given):
    """Whether an override keeps what the experiment is: its method, data and protocol.

    Whole numbers are sizes, epochs, seeds and counts, unless `FIXED`, or 0 or below,
    which switch something off. A list of numbers may become shorter, a fraction stays
    one of those given. Weights may become random, a network one of its own family.
    """
    if value == given or key in ("workers", "svm_jobs", "devices", "precision", "seed"):
        return True
    if key in FIXED:
        return False
    if key == "weights":
        return value == "random"
    if key == "network":
        return family(value) == family(given)
    if isinstance(given, dict):
        same = isinstance(value, dict) and value.keys() == given.keys()
        return same and all(allowed("", value[k], given[k]) for k in given)
    if isinstance(given, list):
        shorter = isinstance(value, list) and 0 < len(value) <= len(given)
        whole = (
            shorter and len(value) == len(given) and all(map(is_count, value + given))
        )
        return whole or (shorter and all(one in given for one in value))
    return is_count(value) and is_count(given)


def is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def family(network):
    """Name timm's module of a network (vgg, densenet …); other networks have none."""
    from timm.models import is_model, model_entrypoint

    return model_entrypoint(network).__module__ if is_model(network) else network


def overridden(parameters, defaults, path, name):
    """Return parameters with an override's values, or stop at one that may not be."""
    read = yaml.safe_load(Path(path).read_text("utf8")) or {}
    chapters = [p.stem for p in NOTEBOOKS.glob("*.ipynb")]
    known = ["all", "mosaics", *chapters, *names("paper")]
    refuse_unknown(f"section in {path}:", read, known)
    # What is for all reaches the chapters that have it.
    values = {k: v for k, v in read.get("all", {}).items() if k in defaults}
    values |= read.get(name.split(".")[0], {}) | read.get(name, {})
    refuse_unknown(f"parameter in {path}:", values, defaults)
    given = defaults | parameters
    for key, value in values.items():
        if not allowed(key, value, given[key]):
            raise SystemExit(
                f"{path}: {name} has {key} = {given[key]!r}, and {value!r} would make "
                "it another experiment; an override may change sizes, epochs, seeds, "
                "counts: not a network's family, the loss, the data, the protocol"
            )
    return parameters | values | {"results": f"_build/results/paper/{name}.json"}


def git(*words):
    """Return what git prints, or None outside a repository."""
    done = subprocess.run(["git", *words], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def origin(profile):
    """Return what the status line of the page says about a run."""
    # Results are written by the runs themselves, so they do not count as changes.
    changes = git("status", "--porcelain", "--", ".", ":!results")
    return {
        "profile": profile,
        "commit": git("rev-parse", "--verify", "-q", "HEAD") or "unknown",
        "dirty": bool(changes),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def code_of(source):
    """Hash a chapter's code without parameters and comments; runs are kept by it."""
    cells = [
        "".join(cell["source"])
        for cell in json.loads(source.read_text("utf8"))["cells"]
        if cell["cell_type"] == "code"
        and "parameters" not in cell["metadata"].get("tags", [])
    ]
    code = ast.dump(ast.parse("\n".join(cells)))
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def execute(source, part, parameters):
    """Run a notebook into `part`; return the error's text, or None."""
    import papermill

    try:
        papermill.execute_notebook(
            source,
            part,
            parameters,
            cwd=".",
            progress_bar=False,
            # A progress bar leaves its last line, not one line per step.
            coalesce_streams=True,
            # Every kernel warns that it talks over unencrypted local sockets.
            extra_arguments=["--log-level=CRITICAL"],
        )
    except papermill.PapermillExecutionError as error:
        return f"cell [{error.exec_count}]{error}"
    except Exception as error:  # the kernel died, or did not start
        return f"{type(error).__name__}: {error}"
    return None


def data_of(results):
    """Return the data that a results file names, with their hashes; else None."""
    path = Path(results or "")
    if not path.is_file():
        return None
    made = json.loads(path.read_text("utf8")).get("provenance", {}).get("data", {})
    return {Path(name).name: of for name, of in made.items()}


def write_origin(path, facts):
    """Add the `histo` block to a copy's metadata."""
    notebook = json.loads(path.read_text("utf8"))
    notebook["metadata"]["histo"] = facts
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf8")
    return notebook["metadata"]["papermill"]["duration"]


def run(name, profile, out=None, override=None):
    """Run one chapter or experiment; return the exit status."""
    name = resolve(name, profile)
    import papermill

    source = NOTEBOOKS / f"{name.split('.')[0]}.ipynb"
    known = papermill.inspect_notebook(source)
    parameters = read_parameters(name, profile, known)
    defaults = {key: ast.literal_eval(one["default"]) for key, one in known.items()}
    if override:
        parameters = overridden(parameters, defaults, override, name)

    out = out or Path("_build/executed", profile, f"{name}.ipynb")
    out.parent.mkdir(parents=True, exist_ok=True)
    part, failed = (out.with_suffix(f".{s}.ipynb") for s in ("part", "failed"))
    failed.unlink(missing_ok=True)
    os.environ["HISTO_PROFILE"] = profile
    os.environ["HISTO_CHAPTER"] = code_of(source)
    facts = origin(profile)
    results = (defaults | parameters).get("results")
    error = execute(source, part, parameters)
    if error is not None:
        if part.exists():
            part.replace(failed)
        print(f"{name} ({profile}) FAILED in {error}\nsee {failed}", file=sys.stderr)
        return 1
    facts |= {"data": data_of(results), "results": results, "override": bool(override)}
    seconds = write_origin(part, facts)
    part.replace(out)
    place = f"[{names(profile).index(name) + 1}/{len(names(profile))}]"
    print(f"{place} {name} {seconds:.0f} s", flush=True)
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="02_mosaic_extraction, or an experiment: tl_vgg16")
    parser.add_argument("--profile", default="demo", help="default: demo")
    parser.add_argument("--out", type=Path, help="where the executed copy goes")
    parser.add_argument("--override", help="YAML file of smaller sizes, for miniatures")
    options = parser.parse_args()
    return run(options.name, options.profile, options.out, options.override)


if __name__ == "__main__":
    raise SystemExit(main())
