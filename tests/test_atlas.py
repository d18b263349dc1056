"""The atlas shows what the search found, whole, safely, and without the network."""

import base64
import itertools
import json
import re
import shutil
import subprocess
import time
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import histo_utils.atlas as module
from histo_utils.atlas import atlas, even_sample
from histo_utils.embeddings import Embeddings
from histo_utils.plots import colour_of
from histo_utils.protocols import leave_one_out

SPACES = {"two": {"metric": "euclidean", "standardised": True}}


@pytest.fixture
def pair(tmp_path):
    """Two encoders of 54 patches: six scans of six patients, three labels."""
    rng = np.random.default_rng(0)
    rows = []
    for slide in range(6):
        image = tmp_path / f"scan{slide}.png"
        pixels = rng.integers(0, 256, (120, 120, 3)) // 2 + 20 * slide
        Image.fromarray(pixels.astype(np.uint8)).save(image)
        rows += [
            {
                "image": str(image), "x": 40 * x, "y": 40 * y, "size": 40, "mpp": 0.5,
                "slide_mpp": 0.5, "slide": f"scan{slide}", "patient": f"p{slide}",
                "label": ("lung", "breast", "colon")[slide % 3],
                "preparation": "FFPE" if slide < 3 else None,
            }
            for y in range(3)
            for x in range(3)
        ]  # fmt: skip
    table = pd.DataFrame(rows)
    vectors = rng.standard_normal((2, len(table), 4)).astype(np.float32)
    return {
        name: Embeddings(v, table)
        for name, v in zip(("one", "two"), vectors, strict=True)
    }


def contents(page):
    """What the page's script reads."""
    text = page.read_text("utf8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script', text)
    return json.loads(found[1])


def picture(patch):
    kind, code = patch["image"].split(",")
    assert kind == "data:image/webp;base64"
    return Image.open(BytesIO(base64.b64decode(code)))


def test_page_holds_what_the_search_found(pair, tmp_path):
    page = atlas(
        pair, tmp_path / "new/atlas.html", k=5, spaces=SPACES, thumbnail=16,
        progress=False,
    )  # fmt: skip
    data = contents(page)
    assert data["queries"] == list(range(54))
    assert [e["name"] for e in data["encoders"]] == ["one", "two"]
    distances = [e["distance"] for e in data["encoders"]]
    assert distances == ["cosine distance", "Euclidean distance, standardised"]
    table = pair["one"].table
    for found, options in zip(
        data["encoders"], ({"metric": "cosine"}, SPACES["two"]), strict=True
    ):
        outcomes = leave_one_out(pair[found["name"]], 5, "patient", **options)
        assert found["hits"] == np.stack(outcomes["neighbours"]).tolist()
        assert found["distances"] == np.stack(outcomes["distances"]).tolist()
        wrong = outcomes["label"] != outcomes["predicted"]
        assert found["errors"] == np.flatnonzero(wrong).tolist()
    for row, patch in data["patches"].items():
        line, label = table.iloc[int(row)], data["labels"][patch["label"]]
        assert label == {"name": line["label"], "colour": colour_of(line["label"])}
        assert (patch["slide"], patch["patient"]) == (line["slide"], line["patient"])
        assert patch["preparation"] == ("FFPE" if int(row) < 27 else None)
        assert patch["um"] == 20.0
        # in one order, whatever Python's hash seed: the page is the same to the byte
        assert [*patch][:5] == ["label", "um", "slide", "patient", "preparation"]
    assert data["archive"] == {"patches": 54, "patients": 6}
    pair["one"].table.loc[3, "patient"] = None  # a missing patient stays missing
    page = atlas(pair["one"], page, k=5, exclude="slide", thumbnail=16, progress=False)
    assert contents(page)["patches"]["3"]["patient"] is None
    assert not list(page.parent.glob("*.part"))


def test_errors_by_hand(pair, tmp_path):
    """Four patches on a line; each one's nearest of another patient is known."""
    table = pair["one"].table.iloc[[0, 9, 27, 36]].reset_index(drop=True)
    # 0 is nearest to the 1 of another label, 1 to 0; 10 and 13 to each other
    line, space = np.float32([[0], [1], [10], [13]]), {"metric": "euclidean"}
    for labels, wrong in ((["a", "b"] * 2, [0, 1, 2, 3]), (["a", "a", "b", "b"], [])):
        along = {"one": Embeddings(line, table.assign(label=labels))}
        page = atlas(
            along, tmp_path / "a.html", k=2, spaces={"one": space}, progress=False
        )
        (found,) = contents(page)["encoders"]
        assert found["hits"] == [[1, 2], [0, 2], [3, 1], [2, 1]]
        assert found["distances"] == [[1, 10], [1, 9], [3, 9], [3, 12]]
        assert found["errors"] == wrong


def test_only_what_is_shown_is_on_the_page_at_its_size(pair, tmp_path):
    page = atlas(
        pair["one"], tmp_path / "a.html", k=2, queries=[7, 3], thumbnail=16,
        progress=False,
    )  # fmt: skip
    data = contents(page)
    hits = {row for line in data["encoders"][0]["hits"] for row in line}
    assert {int(row) for row in data["patches"]} == {3, 7} | hits
    sides = {int(row): picture(patch).size for row, patch in data["patches"].items()}
    # 16 px; a query's picture is 2.5 times as large, which is the patch's own 40 px
    assert sides == {row: (40, 40) if row in (3, 7) else (16, 16) for row in sides}
    original = module.read_patch(pair["one"].table.iloc[3]).astype(float)
    shown = np.asarray(picture(data["patches"]["3"]).convert("RGB"), float)
    assert abs(shown.mean(axis=(0, 1)) - original.mean(axis=(0, 1))).max() < 4


def test_even_sample_is_even_and_so_are_its_beginnings():
    table = pd.DataFrame(
        {
            "label": ["a"] * 90 + ["b"] * 10,
            "slide": ["x"] * 60 + ["y"] * 30 + ["z"] * 10,
        }
    )
    rows = even_sample(table, 40)
    for n in (4, 8, 16, 20):
        part = table.iloc[rows[:n]]
        assert part["label"].value_counts().to_dict() == {"a": n // 2, "b": n // 2}
        slides = part["slide"].value_counts()
        assert slides["x"] == slides["y"] == n // 4
    assert table["label"].iloc[rows].value_counts().to_dict() == {"a": 30, "b": 10}
    assert len({*even_sample(table, 1000)}) == 100


def test_nothing_in_a_table_becomes_markup(pair, tmp_path):
    wicked = """</script><script>alert("1")</script><!-- ' & \\ @@data@@ \u2028"""
    table = pair["one"].table
    table = table.assign(
        label=table["label"].replace("lung", wicked + "L"),
        slide=table["slide"] + wicked,
        preparation=wicked,
    )
    space = Embeddings(pair["one"].vectors, table)
    page = atlas(
        {wicked: space}, tmp_path / "a.html", k=2, queries=[0], title=wicked,
        note=wicked, progress=False,
    )  # fmt: skip
    data = contents(page)
    assert wicked + "L" in [label["name"] for label in data["labels"]]
    assert data["patches"]["0"]["slide"] == "scan0" + wicked
    assert data["encoders"][0]["name"] == wicked
    html = page.read_text("utf8")
    assert html.count("<script") == html.count("</script>") == 2
    assert "<!--" not in html
    assert html.count("&lt;/script&gt;&lt;script&gt;alert(&quot;1&quot;)") == 3
    assert html.count("@@data@@") > 3  # kept where it was written, never filled in
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", html)
    assert "default-src 'none'; img-src data:;" in html


def test_a_page_that_is_too_large_loses_quality_then_queries(
    pair, tmp_path, monkeypatch
):
    path = tmp_path / "a.html"

    def made(limit, **options):
        monkeypatch.setattr(module, "LIMIT", limit)
        atlas(pair["one"], path, k=2, progress=False, **options)
        assert path.stat().st_size <= limit
        return contents(path)

    best = made(10_000_000)
    assert (best["quality"], len(best["queries"])) == (85, 54)
    lower = made(path.stat().st_size - 1)
    assert (lower["quality"], len(lower["queries"])) == (75, 54)
    monkeypatch.setattr(module, "QUALITIES", (75,))
    limit = path.stat().st_size - 1
    fewer = made(limit)
    labels = [fewer["patches"][str(q)]["label"] for q in fewer["queries"]]
    assert sorted(map(labels.count, range(3))) == [9, 9, 9]
    # queries that the caller named are not dropped in silence, and the old page stays
    old = path.read_bytes()
    with pytest.raises(ValueError, match=r"54 queries with 54 pictures .* 0\.1 MB"):
        made(limit, queries=range(54))
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.glob("a.html*")] == ["a.html"]


def test_what_does_not_fit_together_is_refused(pair, tmp_path):
    one, path = pair["one"], tmp_path / "a.html"
    table = one.table

    def refused(match, embeddings=one, **options):
        with pytest.raises(ValueError, match=match):
            atlas(embeddings, path, progress=False, **options)
        assert not path.exists()

    def beside(other):
        vectors = one.vectors[: len(other)]
        return {"one": one, "other": Embeddings(vectors, other)}

    refused("'other' has 53 patches, 'one' has 54", beside(table.iloc[:53]))
    moved = table.assign(x=table["x"] + (table.index == 4))
    refused(r"row 4 has x 40 in 'one' and 41 in 'other'", beside(moved))
    refused("row 0 has label 'lung' in 'one'", beside(table.drop(columns="label")))
    refused("no column 'label'", Embeddings(one.vectors, table.drop(columns="label")))
    refused("no column image", Embeddings(one.vectors, table.drop(columns="image")))
    refused("no embeddings", {})
    refused("names 'oen'.* are 'one', 'two'", pair, spaces={"oen": {}})
    refused("query 54 is outside 0 … 53", queries=[0, 54])
    refused(r"queries are float64 of shape \(0,\)", queries=[])
    refused("thumbnail=8", thumbnail=8)
    refused("k=46 is larger than the 45", k=46)
    with pytest.raises(ValueError, match="is a folder; give the name"):
        atlas(one, tmp_path)


class Browser:
    """A page in headless Chromium, driven by its own DevTools messages."""

    def __init__(self, folder):
        websocket = pytest.importorskip(
            "websocket", reason="needs websocket-client: pip install .[book]"
        )
        names = ("chromium", "chromium-browser", "google-chrome")
        program = next(filter(None, map(shutil.which, names)), None)
        if program is None:
            pytest.skip(f"needs a browser: install one of {', '.join(names)}")
        flags = "headless no-sandbox disable-gpu no-first-run disable-dev-shm-usage "
        flags += "disable-background-networking disable-component-update "
        flags += "remote-debugging-port=0 remote-allow-origins=*"
        flags = [f"--{flag}" for flag in flags.split()]
        flags += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder}"]
        self.process = subprocess.Popen(
            [program, *flags, "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            port = self.wait(lambda: self.written(folder / "DevToolsActivePort"))
            self.numbers, self.events, self.session = itertools.count(), [], None
            self.socket = websocket.create_connection(
                f"ws://127.0.0.1:{port[0]}{port[1]}", timeout=60
            )
            target = self.send("Target.createTarget", url="about:blank")["targetId"]
            attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
            self.session = attached["sessionId"]
            for domain in ("Page", "Network", "Runtime", "Log"):
                self.send(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    @staticmethod
    def written(path):
        lines = path.read_text().split() if path.exists() else []
        return lines if len(lines) == 2 else None

    @staticmethod
    def wait(condition, seconds=60):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := condition():
                return found
            time.sleep(0.05)
        raise TimeoutError("the browser did not get there")

    def send(self, method, **parameters):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.socket.send(json.dumps(message))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def run(self, script):
        done = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def open(self, url):
        self.events.clear()
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=url)
        self.wait(lambda: self.run("document.readyState") == "complete")
        self.wait(lambda: self.run("location.href") != "about:blank")
        self.wait(lambda: self.run("document.readyState") == "complete")

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def narrow(self, width, scheme):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1}
        self.send("Emulation.setDeviceMetricsOverride", mobile=width < 600, **size)
        scheme = {"name": "prefers-color-scheme", "value": scheme}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def requested(self):
        """URLs that the page requests, but those that it carries itself."""
        sent = [
            e["params"]["request"]["url"]
            for e in self.events
            if e["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in sent if not url.startswith(("data:", "about:"))]

    def complaints(self):
        errors = ("Runtime.exceptionThrown", "Log.entryAdded")
        return [e["params"] for e in self.events if e["method"] in errors]

    def close(self):
        if hasattr(self, "socket"):
            self.socket.close()
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture
def browser(tmp_path):
    chromium = Browser(tmp_path / "user")
    yield chromium
    chromium.close()


def test_a_reader_finds_the_neighbours(pair, tmp_path, browser):
    evil = "<b>colon</b> & 'more'"
    table = pair["one"].table
    table = table.assign(label=table["label"].replace("colon", evil))
    both = {name: Embeddings(e.vectors, table) for name, e in pair.items()}
    page = atlas(both, tmp_path / "a.html", k=4, spaces=SPACES, progress=False)
    data = contents(page)
    failed = data["encoders"][1]["errors"]
    row = failed[5]
    browser.narrow(1400, "light")
    browser.open(f"{page.as_uri()}#query={row}&wrong=two")

    def status():
        return browser.run("document.querySelector('#status').textContent")

    def check_query(row):
        line, preparation = table.iloc[row], "FFPE" if row < 27 else "not known"
        facts = "[...document.querySelectorAll('#facts dd')].map(d => d.textContent)"
        names = [line["label"], line["patient"], line["slide"]]
        shown = [*names, preparation, "20 × 20 µm", str(row)]
        assert browser.run(facts) == shown
        assert browser.run("picture.src") == data["patches"][str(row)]["image"]
        found = browser.run(
            "[...document.querySelectorAll('#encoders section')].map(s => [...s."
            "querySelectorAll('li')].map(li => [Number(li.dataset.row), li.className,"
            " li.querySelector('.same, .other').textContent, li.innerText,"
            " li.querySelector('img').src]))"
        )
        assert len(found) == 2
        for items, encoder in zip(found, data["encoders"], strict=True):
            assert [item[0] for item in items] == encoder["hits"][row]
            for item, distance in zip(items, encoder["distances"][row], strict=True):
                hit, mark, sign, text, source = item
                near, lines = table.iloc[hit], text.split("\n")
                same = near["label"] == line["label"]
                assert mark == ("same" if same else "other")
                assert sign == ("✓ same label" if same else "✗ other label")
                assert {near["label"], near["patient"]} <= set(lines)
                said = next(w for w in lines if w.startswith("distance"))
                assert float(said.split()[1]) == pytest.approx(distance, rel=0.005)
                assert source == data["patches"][str(hit)]["image"]

    check_query(row)
    assert status() == f"Query 6 of {len(failed)}: {table['label'][row]}"
    bar = "document.querySelector('#bar span')"
    assert browser.run(f"{bar}.textContent") == "5 µm"  # the longest below 20/3
    width = browser.run(f"{bar}.offsetWidth / picture.offsetWidth")
    assert width == pytest.approx(5 / 20, abs=0.01)

    browser.press("ArrowRight")
    check_query(failed[6])
    browser.press("ArrowLeft")
    browser.press("ArrowLeft")
    check_query(failed[4])
    assert browser.run("location.hash") == f"#query={failed[4]}&wrong=two"

    browser.press("/")
    assert browser.run("document.activeElement.id") == "label"
    browser.run(
        f"label.value = {json.dumps(evil)}; label.dispatchEvent(new Event('change'))"
    )
    left = [i for i in failed if table["label"][i] == evil]
    assert status() == f"Query 1 of {len(left)}: {evil}"
    linked = browser.run("location.href")
    browser.run("document.querySelector('#previous').click()")
    check_query(left[-1])  # before the first comes the last
    assert browser.run("document.querySelectorAll('main b').length") == 0
    browser.open(linked)
    check_query(left[0])
    browser.run(
        "wrong.value = ''; wrong.dispatchEvent(new Event('change'));"
        "scan.value = 'scan5'; scan.dispatchEvent(new Event('change'))"
    )
    assert status() == f"Query 1 of 9: {evil}"
    check_query(45)
    browser.run("document.querySelector('#all').open = true")
    browser.wait(lambda: browser.run("strip.children.length") == 9)
    browser.run("strip.children[3].click()")
    check_query(48)

    assert browser.complaints() == []
    assert browser.requested() == [linked.split("#")[0]]


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (400, "dark")])
def test_page_suits_the_screen(pair, tmp_path, browser, width, scheme):
    page = atlas(pair, tmp_path / "a.html", k=4, progress=False)
    browser.narrow(width, scheme)
    browser.open(page.as_uri())
    assert browser.run("document.documentElement.scrollWidth") <= width
    tops = browser.run(
        "[...document.querySelectorAll('#encoders section')].map(s => s.offsetTop)"
    )
    assert (tops[0] == tops[1]) == (width == 1400)  # side by side, or stacked
    small = (
        "[...document.querySelectorAll('button, select, summary')]"
        ".filter(e => e.offsetParent && e.getBoundingClientRect().height < 44).length"
    )
    bare = "[...document.images].filter(i => !i.alt || !i.naturalWidth).length"
    assert browser.run(small) == browser.run(bare) == 0
    assert browser.run("document.images.length") == 9

    def brightness():
        colour = browser.run("getComputedStyle(document.body).backgroundColor")
        return np.mean([int(c) for c in re.findall(r"\d+", colour)[:3]])

    assert (brightness() > 200) == (scheme == "light")
    browser.run("theme.click()")
    assert (brightness() > 200) == (scheme == "dark")


def test_a_request_would_be_seen_and_is_forbidden(pair, tmp_path, browser):
    """A log without a planted request would prove nothing."""
    page = atlas(pair["one"], tmp_path / "a.html", k=1, queries=[0], progress=False)
    html = page.read_text("utf8")
    canary = "http://canary.invalid/x.png"
    planted = html.replace("<footer", f'<img src="{canary}"><footer')
    page.write_text(planted, "utf8")
    browser.open(page.as_uri())
    assert "Content Security Policy" in json.dumps(browser.complaints())
    page.write_text(re.sub(r"<meta http-equiv.*?>\n", "", planted), "utf8")
    browser.open(page.as_uri())
    assert browser.requested() == [page.as_uri(), canary]
