"""Run one chapter with papermill and keep a copy that says what made it.

    python tools/run_notebook.py 02_mosaic_extraction --profile tissue \
        --out _build/executed/tissue/02_mosaic_extraction.ipynb

Run it in the repository's root. It prints one line, ``[2/12] 02_mosaic_extraction
73 s``. The copy appears under its name only when the run is complete; a failed run
leaves ``<name>.failed.ipynb`` beside it and exits with 1.
What papermill alone does not do: it refuses misspelt parameters, and it writes
profile, commit and date into the copy's metadata (``histo``).
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


def read_parameters(name, profile, known):
    """Return a profile's parameters for a notebook whose parameters are `known`."""
    path = PROFILES / profile / f"{name}.yaml"
    values = (yaml.safe_load(path.read_text("utf8")) or {}) if path.exists() else {}
    refuse_unknown(f"parameter in {path}:", values, known)
    return {"profile": profile, **values} if "profile" in known else values


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


def write_origin(path, facts):
    """Add the `histo` block to a copy's metadata."""
    notebook = json.loads(path.read_text("utf8"))
    notebook["metadata"]["histo"] = facts
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf8")
    return notebook["metadata"]["papermill"]["duration"]


def run(name, profile, out):
    """Run one chapter; return the exit status."""
    chapters = sorted(p.stem for p in NOTEBOOKS.glob("*.ipynb"))
    refuse_unknown("chapter", [name], chapters)
    known_profiles = {"demo", *(p.name for p in PROFILES.glob("*") if p.is_dir())}
    refuse_unknown("profile", [profile], known_profiles)
    import papermill

    source = NOTEBOOKS / f"{name}.ipynb"
    parameters = read_parameters(name, profile, papermill.inspect_notebook(source))

    out.parent.mkdir(parents=True, exist_ok=True)
    part, failed = (out.with_suffix(f".{s}.ipynb") for s in ("part", "failed"))
    failed.unlink(missing_ok=True)
    os.environ["HISTO_PROFILE"] = profile
    os.environ["HISTO_CHAPTER"] = code_of(source)
    facts = origin(profile)
    error = execute(source, part, parameters)
    if error is not None:
        if part.exists():
            part.replace(failed)
        print(f"{name} ({profile}) FAILED in {error}\nsee {failed}", file=sys.stderr)
        return 1
    seconds = write_origin(part, facts)
    part.replace(out)
    place = f"[{chapters.index(name) + 1}/{len(chapters)}]"
    print(f"{place} {name} {seconds:.0f} s", flush=True)
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="notebook, as 02_mosaic_extraction")
    parser.add_argument("--profile", default="demo", help="default: demo")
    parser.add_argument("--out", type=Path, help="where the executed copy goes")
    options = parser.parse_args()
    folder = Path("_build/executed", options.profile)
    out = options.out or folder / f"{options.name}.ipynb"
    return run(options.name, options.profile, out)


if __name__ == "__main__":
    raise SystemExit(main())
