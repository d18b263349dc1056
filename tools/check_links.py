"""Check built pages offline: dead files, dead anchors, assets from other sites.

Links to other sites are left alone (the weekly workflow looks at those); assets from
other sites are errors. Use: python tools/check_links.py _build/html
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ASSETS = {"script", "img", "iframe", "source", "video", "audio", "embed"}
FETCHED = {"stylesheet", "icon", "preload", "preconnect", "manifest"}


class Page(HTMLParser):
    """The anchors, links and assets of one page."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.assets = {"", "top"}, [], []
        self.feed(path.read_text("utf8"))

    def handle_starttag(self, tag, attrs):
        """Sort one tag into the lists."""
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        if tag in ASSETS and attrs.get("src"):
            self.assets.append(attrs["src"])
        elif tag == "link" and FETCHED & set((attrs.get("rel") or "").split()):
            self.assets.append(attrs["href"])
        elif tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])


def findings(path, pages):
    """Yield what is wrong with the links and assets of one page."""
    page = pages[path]
    for link in page.links + page.assets:
        url = urlsplit(link)
        target = (path.parent / unquote(url.path)).resolve() if url.path else path
        if url.scheme or url.netloc:
            if link in page.assets and url.scheme != "data":
                yield f"fetched from another site: {link}"
        elif not target.is_file():
            yield f"no such file: {link}"
        elif target in pages and unquote(url.fragment) not in pages[target].ids:
            yield f"no such anchor: {link}"


def main():
    root = Path(sys.argv[1]).resolve()
    pages = {p: Page(p) for p in root.rglob("*.html") if "_static" not in p.parts}
    bad = [f"{p.relative_to(root)}: {f}" for p in pages for f in findings(p, pages)]
    print(*bad, f"{len(pages)} pages, {len(bad)} findings", sep="\n")
    return bool(bad) or not pages


if __name__ == "__main__":
    raise SystemExit(main())
