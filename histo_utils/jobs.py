"""Work through many slides: in parallel, resumable, one bad slide never stops it.

Each slide leaves one line, ``<name>.json``, written last and to a temporary name first:
where it lies, the slide is finished.
"""

from __future__ import annotations

import json
import os
import threading
import time
import warnings
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from multiprocessing import get_context, parent_process
from pathlib import Path

from threadpoolctl import threadpool_limits
from tqdm import tqdm

from histo_utils import provenance

try:
    import resource
except ImportError:  # Windows has no such module; peak memory is not reported there
    resource = None


def run_batch(work, jobs, out, executor=None, progress=True):
    """Call ``work(job, out)`` for every job, several at a time.

    Parameters
    ----------
    work : callable
        A module's function, so that other processes find it. Writes what it makes
        (temporary name, then rename), returns a dict for the report, raises if the
        slide is bad.
    jobs : list of dict
        Each with ``name`` (of its files), ``image`` (path) and what ``work`` needs.
        Values must survive JSON: they decide whether a line found in ``out`` holds.
    out : str or pathlib.Path
        Folder for the results; made if missing.
    executor : concurrent.futures.Executor, optional
        Where the jobs run: one process per core if not given, or
        ``dask.distributed.Client(...).get_executor()`` for a cluster.
    progress : bool
        Show a progress bar.

    Returns
    -------
    list of dict
        One line per job, in their order: what ``work`` returned with ``status``
        (``"done"`` unless ``work`` says otherwise, ``"failed"`` if it raised),
        ``message`` (errors and warnings), ``resumed``, ``seconds`` and ``peak_mb`` (the
        process's highest memory so far; missing on Windows).
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    lines = {job["name"]: _finished(job, out) for job in jobs}
    waiting = [job for job in jobs if lines[job["name"]] is None]
    n_processes = max(1, min(os.cpu_count() or 1, len(waiting)))
    with pool(n_processes) if executor is None else nullcontext(executor) as running:
        futures = {running.submit(_one, work, job, out): job for job in waiting}
        for future in tqdm(
            as_completed(futures), total=len(jobs), initial=len(jobs) - len(waiting),
            unit="slide", disable=not progress, ascii=True,
        ):  # fmt: skip
            job = futures[future]
            lines[job["name"]] = _result(future, work, job, out, retry=executor is None)
    return [lines[job["name"]] for job in jobs]


def _result(future, work, job, out, retry):
    """Line of a job, also if a worker died, perhaps over another job."""
    try:
        return future.result()
    except BrokenExecutor:
        if retry:
            with pool(1) as own:
                return _result(own.submit(_one, work, job, out), work, job, out, False)
        message = "the process that worked on it died (out of memory, or killed)"
        return _write(job, out, {"status": "failed", "message": message})


def pool(count):
    """Return a pool of so many processes, which end when this one is killed."""
    # Spawned, not forked: a notebook's process has threads, and a fork can hang.
    return ProcessPoolExecutor(count, get_context("spawn"), _end_with_parent)


def _end_with_parent():
    """End this worker when its parent dies: a killed parent tells nobody."""

    def wait():
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _one(work, job, out):
    """Work on one job and write its line, whatever is wrong with the slide."""
    # An old line must not vouch for a new product if this process is killed between.
    (out / f"{job['name']}.json").unlink(missing_ok=True)
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as said, threadpool_limits(1):
        # One thread per process, because the processes already fill the cores.
        warnings.simplefilter("always", UserWarning)
        try:
            line = {"status": "done", **work(job, out)}
        except Exception as error:
            line = {"status": "failed", "message": f"{type(error).__name__}: {error}"}
    notes = [line.get("message", "")] + [str(w.message) for w in said]
    line["message"] = "; ".join(dict.fromkeys(filter(None, notes)))
    line["seconds"] = round(time.perf_counter() - start, 2)
    if resource:
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        line["peak_mb"] = round(kilobytes / 1024)
    return _write(job, out, line)


def _write(job, out, line):
    """Write a job's line, with what it depends on."""
    line = {"name": job["name"], "resumed": False, **line}
    text = json.dumps({**line, "job": _key(job)}, indent=1, ensure_ascii=False)
    with provenance.new_file(out / f"{job['name']}.json") as part:
        part.write_text(text, "utf-8")
    return line


def _finished(job, out):
    """Line of a job that needs no more work, else None."""
    try:
        line = json.loads((out / f"{job['name']}.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if line.pop("job", None) != _key(job) or line["status"] == "failed":
        return None
    return {**line, "resumed": True}


def _key(job):
    """Return what the result depends on, as JSON will give it back."""
    try:
        stat = os.stat(job["image"])
        file = [stat.st_size, stat.st_mtime_ns]
    except OSError:
        file = None
    return json.loads(json.dumps({**job, "file": file}, default=str))
