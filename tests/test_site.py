"""The built site: every name has its page, every link its target, every page its width.

`make docs-test` builds it first.
"""

import functools
import html.parser
import http.server
import inspect
import os
import pathlib
import shutil
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest

import jaxlosses as jl

pytestmark = pytest.mark.site

SITE = pathlib.Path(__file__).parent.parent / "build" / "site"
PAGES = sorted(
    str(path.relative_to(SITE))
    for path in SITE.glob("**/*.html")
    if not {"_modules", "_static"} & set(path.relative_to(SITE).parts)
    and path != SITE / "index.html"  # which leads to the first page
)
# Whatever comes first: a path given, what a system installs, what playwright has.
BROWSERS = (os.environ.get("BROWSER"), "chromium", "chromium-browser", "google-chrome")

WIDER_THAN_THE_SCREEN = """() => {
    const page = document.documentElement;
    return page.scrollWidth - page.clientWidth;
}"""


class Targets(html.parser.HTMLParser):
    """The ids of a page, and what it links to and loads."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed((SITE / page).read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids |= {value for value in (given.get("id"), given.get("name")) if value}
        href, source = given.get("href"), given.get("src")
        if href:
            (self.loaded if tag == "link" else self.links).append(href)
        if source:
            self.loaded.append(source)


targets = functools.cache(Targets)


def test_there_is_a_site() -> None:
    assert "notebooks/index.html" in PAGES
    assert 'url=notebooks/index.html"' in (SITE / "index.html").read_text("utf-8")


def test_every_public_name_has_its_page() -> None:
    names = {
        f"jaxlosses.{name}"
        for name, value in vars(jl).items()
        if name[0] != "_" and not inspect.ismodule(value)
    }
    of_testing = vars(jl.testing).items()
    names |= {
        f"jaxlosses.testing.{name}"
        for name, value in of_testing
        if name[0] != "_" and inspect.getmodule(value) is jl.testing
    }
    pages = {pathlib.Path(page).stem for page in PAGES}
    assert names - pages == set()


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page: str) -> None:
    for link in targets(page).links:
        url = urllib.parse.urlsplit(link)
        if url.scheme or url.netloc:
            assert url.scheme in {"https", "mailto"}, link
            continue
        path = urllib.parse.unquote(url.path)
        place = (SITE / page).parent / path if path else SITE / page
        assert place.exists(), link
        if url.fragment and place.suffix == ".html":
            ids = targets(str(place.resolve().relative_to(SITE.resolve()))).ids
            assert urllib.parse.unquote(url.fragment) in ids, link


@pytest.mark.parametrize("page", PAGES)
def test_a_page_loads_nothing_from_elsewhere(page: str) -> None:
    for source in targets(page).loaded:
        url = urllib.parse.urlsplit(source)
        assert not url.netloc or url.scheme == "data", source


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    found = [path for name in BROWSERS if name and (path := shutil.which(name))]
    with sync_api.sync_playwright() as playwright:
        own = pathlib.Path(playwright.chromium.executable_path)
        if not found and not own.exists():
            pytest.skip("no browser: `playwright install chromium`, or set BROWSER")
        browser = playwright.chromium.launch(
            executable_path=found[0] if found else None,
            args=["--no-sandbox", "--disable-background-networking"],
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Handler, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_as_wide_as_the_screen_and_say_no_error(
    browser: Any, address: str, width: int, scheme: str
) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme
    )
    # Nothing comes from the network.
    context.route(
        "**/*",
        lambda route: (
            route.continue_()
            if route.request.url.startswith((address, "data:"))
            else route.abort()
        ),
    )
    tab, errors, found = context.new_page(), [], []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on(
        "console",
        lambda message: errors.append(message.text) if message.type == "error" else 0,
    )
    for page in PAGES:
        errors.clear()
        tab.goto(address + page)
        wide = tab.evaluate(WIDER_THAN_THE_SCREEN)
        if wide > 0 or errors:
            found.append((page, wide, list(errors)))
    context.close()
    assert not found
