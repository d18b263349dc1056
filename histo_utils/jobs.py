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
from multiprocessing import get_context, parent_process
from pathlib import Path

from threadpoolctl import threadpool_limits
from tqdm import tqdm

try:
    import resource
except ImportError:  # Windows has no such module; peak memory is not reported there
    resource = None

from histo_utils import provenance


def run_batch(work, jobs, out, executor=None, progress=True):
    """Call ``work(job, out)`` for every job, several at a time.

    Parameters
    ----------
    work : callable
        A module's function, so that other processes find it. Takes a job and the
        folder, writes what it makes there (temporary name, then rename) and returns a
        dict for the report; raises if the slide is bad.
    jobs : list of dict
        Each with ``name`` (its files are called so), ``image`` (path) and whatever
        ``work`` needs. Values must survive JSON: they decide whether a line found in
        ``out`` still holds.
    out : str or pathlib.Path
        Folder for the results; made if missing.
    executor : concurrent.futures.Executor, optional
        A pool of one process a core if not given.
    progress : bool
        Show a progress bar.

    Returns
    -------
    list of dict
        One line a job, in their order: what ``work`` returned with ``status``
        (``"done"`` unless ``work`` says otherwise, ``"failed"`` if it raised),
        ``message`` (errors and warnings), ``resumed``, ``seconds`` and ``peak_mb`` (the
        process's highest memory so far; missing on Windows).
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    lines = {job["name"]: _finished(job, out) for job in jobs}
    waiting = [job for job in jobs if lines[job["name"]] is None]
    done = len(jobs) - len(waiting)
    with tqdm(
        total=len(jobs), initial=done, unit="slide", disable=not progress, ascii=True
    ) as bar:
        for line in _lines(work, waiting, out, executor):
            lines[line["name"]] = line
            bar.update()
    return [lines[job["name"]] for job in jobs]


def _lines(work, jobs, out, executor):
    if not jobs:
        return
    if executor is not None:
        yield from _gather(work, jobs, out, executor, _lost)
        return
    with pool(min(os.cpu_count() or 1, len(jobs))) as workers:
        yield from _gather(work, jobs, out, workers, _alone)


def _gather(work, jobs, out, executor, after_a_death):
    futures = {executor.submit(_one, work, job, out): job for job in jobs}
    for future in as_completed(futures):
        try:
            yield future.result()
        except BrokenExecutor:
            yield after_a_death(work, futures[future], out)


def _alone(work, job, out):
    """Work on one job in a process of its own: a worker died, perhaps over another."""
    with pool(1) as workers:
        try:
            return workers.submit(_one, work, job, out).result()
        except BrokenExecutor:
            return _lost(work, job, out)


def _lost(_work, job, out):
    message = "the process that worked on it died (out of memory, or killed)"
    return _write(job, out, {"status": "failed", "message": message})


def pool(count):
    """Return a pool of so many processes, which end when this one is killed."""
    # Spawned, not forked: a notebook's process has threads, and a fork can hang.
    return ProcessPoolExecutor(count, get_context("spawn"), _end_with_parent)


def _end_with_parent():
    """Watch, in a worker, for the death of the process that started it.

    A killed parent tells nobody, and its workers would wait for work for ever.
    """

    def wait():
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _one(work, job, out):
    # An old line must not vouch for a new product if this process is killed between.
    (out / f"{job['name']}.json").unlink(missing_ok=True)
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as said, threadpool_limits(1):
        # One thread a process, because the processes already fill the cores.
        warnings.simplefilter("always", UserWarning)
        try:
            line = {"status": "done", **work(job, out)}
        except Exception as error:  # whatever is wrong with one slide is its report
            line = {"status": "failed", "message": f"{type(error).__name__}: {error}"}
    notes = [line.get("message", "")] + [str(w.message) for w in said]
    line["message"] = "; ".join(dict.fromkeys(filter(None, notes)))
    line["seconds"] = round(time.perf_counter() - start, 2)
    if resource:
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        line["peak_mb"] = round(kilobytes / 1024)
    return _write(job, out, line)


def _write(job, out, line):
    line = {"name": job["name"], "resumed": False, **line}
    whole = {**line, "job": _fingerprint(job)}
    with provenance.new_file(out / f"{job['name']}.json") as part:
        part.write_text(json.dumps(whole, indent=1, ensure_ascii=False), "utf-8")
    return line


def _finished(job, out):
    """Line of a job that needs no more work, else None."""
    try:
        line = json.loads((out / f"{job['name']}.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if line.pop("job", None) != _fingerprint(job) or line["status"] == "failed":
        return None
    return {**line, "resumed": True}


def _fingerprint(job):
    """Return what the result depends on, as JSON will give it back."""
    try:
        stat = os.stat(job["image"])
        file = [stat.st_size, stat.st_mtime_ns]
    except OSError:
        file = None
    return json.loads(json.dumps({**job, "file": file}, default=str))
