import json
import os
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import pytest

from histo_utils.jobs import run_batch


def work(job, out):
    """What the tests let run_batch do; found by other processes in this module."""
    if job["do"] == "raise":
        raise ValueError("bad slide")
    if job["do"] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if job["do"] == "warn":
        warnings.warn("take care", stacklevel=1)
    if job["do"] == "pid":
        (out / f"{os.getpid()}.pid").touch()
        time.sleep(120)
    if job["do"] == "slow":
        time.sleep(0.4)
    with (out / "calls.txt").open("a") as calls:
        calls.write(job["name"] + "\n")
    return {"squared": job["value"] ** 2}


def jobs(*kinds):
    return [
        {"name": f"s{i}", "image": "none", "do": kind, "value": i}
        for i, kind in enumerate(kinds)
    ]


def test_one_bad_slide_never_stops_the_others(tmp_path):
    lines = run_batch(work, jobs("", "raise", "warn", ""), tmp_path, progress=False)
    assert [line["status"] for line in lines] == ["done", "failed", "done", "done"]
    assert [line.get("squared") for line in lines] == [0, None, 4, 9]
    assert lines[1]["message"] == "ValueError: bad slide"
    assert lines[2]["message"] == "take care"
    assert all(line["seconds"] >= 0 and line["peak_mb"] > 10 for line in lines)


@pytest.mark.slow
def test_a_worker_that_dies_costs_one_slide(tmp_path):
    lines = run_batch(work, jobs("", "die", "", ""), tmp_path, progress=False)
    assert [line["status"] for line in lines] == ["done", "failed", "done", "done"]
    assert "died" in lines[1]["message"]


def test_finished_work_is_not_repeated_and_failed_work_is(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        first = jobs("", "raise", "")
        run_batch(work, first, tmp_path, pool, progress=False)
        mended = [first[0], {**first[1], "do": ""}, first[2]]
        lines = run_batch(work, mended, tmp_path, pool, progress=False)
        assert [line["resumed"] for line in lines] == [True, False, True]
        assert [line["squared"] for line in lines] == [0, 1, 4]
        changed = [mended[0], mended[1], {**mended[2], "value": 5}]
        lines = run_batch(work, changed, tmp_path, pool, progress=False)
    assert [line["resumed"] for line in lines] == [True, True, False]
    calls = (tmp_path / "calls.txt").read_text().split()
    assert calls == ["s0", "s2", "s1", "s2"]


def test_a_half_written_line_is_work_to_do(tmp_path):
    (tmp_path / "s0.json").write_text('{"name": "s0", "status": "do')
    with ThreadPoolExecutor(1) as pool:
        (line,) = run_batch(work, jobs(""), tmp_path, pool, progress=False)
    assert (line["status"], line["resumed"]) == ("done", False)
    assert json.loads((tmp_path / "s0.json").read_text())["status"] == "done"


def test_a_changed_slide_is_worked_on_again(tmp_path):
    image = tmp_path / "slide.tif"
    image.write_text("1")
    job = [{"name": "s", "image": str(image), "do": "", "value": 1}]
    out = tmp_path / "out"
    with ThreadPoolExecutor(1) as pool:
        run_batch(work, job, out, pool, progress=False)
        assert run_batch(work, job, out, pool, progress=False)[0]["resumed"]
        image.write_text("another slide")
        assert not run_batch(work, job, out, pool, progress=False)[0]["resumed"]


def start(tmp_path, call):
    """Start a Python process that makes one call with this module's names."""
    lines = (
        "import sys; sys.path.insert(0, sys.argv[1])",
        "from test_jobs import *",
        "if __name__ == '__main__':",
        f"    out = Path(sys.argv[2]); {call}",
    )
    (tmp_path / "run.py").write_text("\n".join(lines))
    here = str(Path(__file__).parent)
    command = [sys.executable, str(tmp_path / "run.py"), here, str(tmp_path)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def wait(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on(tmp_path):
    call = "run_batch(work, jobs(*['slow'] * 6), out, ThreadPoolExecutor(1))"
    process = start(tmp_path, call)
    wait((tmp_path / "s1.json").exists)
    process.kill()
    process.wait()
    finished = len(list(tmp_path.glob("s?.json")))
    assert 2 <= finished < 6
    with ThreadPoolExecutor(1) as pool:
        lines = run_batch(work, jobs(*["slow"] * 6), tmp_path, pool, progress=False)
    assert sum(line["resumed"] for line in lines) == finished
    assert [line["squared"] for line in lines] == [i**2 for i in range(6)]


def test_an_old_line_does_not_vouch_for_work_that_was_cut_off(tmp_path):
    old = {"name": "s0", "image": "none", "do": "", "value": 7}
    with ThreadPoolExecutor(1) as pool:
        run_batch(work, [old], tmp_path, pool, progress=False)
        seen = []
        run_batch(partial(watching, seen), jobs(""), tmp_path, pool, progress=False)
    assert seen == [False]  # the line of value 7 was gone while value 0 was worked on


def watching(seen, job, out):
    seen.append((out / f"{job['name']}.json").exists())
    return {}


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(tmp_path):
    process = start(tmp_path, "run_batch(work, jobs('pid', 'pid'), out)")
    wait(lambda: list(tmp_path.glob("*.pid")))
    workers = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert workers and all(psutil.pid_exists(pid) for pid in workers)
    process.kill()
    process.wait()
    wait(lambda: not any(map(psutil.pid_exists, workers)))
    assert not any(map(psutil.pid_exists, workers))


@pytest.mark.slow
def test_a_dask_cluster_is_an_executor_like_another(tmp_path):
    distributed = pytest.importorskip(
        "distributed", reason="needs the extra: pip install histo_utils[cluster]"
    )
    with distributed.Client(processes=False, n_workers=1, dashboard_address=None) as c:
        lines = run_batch(
            work, jobs("", "raise", ""), tmp_path, c.get_executor(), progress=False
        )
    assert [line["status"] for line in lines] == ["done", "failed", "done"]
