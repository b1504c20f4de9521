"""The documentation as a site: it is built without a warning, and in a browser its search works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import fedzge_flwr
from fedzge_flwr import Settings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ROOT = next(folder for folder in Path(__file__).parents if (folder / "mkdocs.yml").exists())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it: what would be a warning is an error."""
    place = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(place)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert built.returncode == 0, built.stderr
    return place


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """Where the site is served, on loopback."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_every_public_name_is_documented(site: Path) -> None:
    pages = [page.read_text() for page in (site / "api").glob("*.html")]
    for name in fedzge_flwr.__all__:
        anchor = f'id="fedzge_flwr.{name}"'
        assert sum(anchor in page for page in pages) == 1, name


def test_what_lies_elsewhere_has_pages(site: Path) -> None:
    """The examples, the changelog and the report are part of the navigation."""
    front = (site / "index.html").read_text()
    examples = [f"examples/{path.parent.name}.html" for path in ROOT.glob("examples/*/README.md")]
    assert len(examples) >= 3
    for page in (*examples, "changelog.html", "report.html"):
        assert (site / page).exists()
        assert f'href="{page}"' in front, page
    assert 'src="report-fashionmnist.html"' in (site / "report.html").read_text()
    assert (site / "report-fashionmnist.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: make browser installs it, as root")
def test_the_search_finds_a_setting(address: str) -> None:
    """From the front page to the setting's row, with nothing from elsewhere and no error."""
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(10_000)
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))

        page.goto(f"{address}/index.html")
        box = page.get_by_role("textbox", name="Search")
        box.click()
        # One query: results of earlier letters would be replaced under the click.
        box.fill("generator-shar")
        box.press_sequentially("e")
        results = page.locator("a.md-search-result__link")
        found = results.and_(page.locator("[href*='configuration.html'][href*='#']"))
        found.first.click()

        page.wait_for_url("**/configuration.html*")
        row = page.locator("tr", has=page.get_by_text("generator-share", exact=True))
        expect(row).to_be_in_viewport()
        expect(row).to_contain_text(str(Settings().images.generator_share))
        browser.close()
    assert said == []
    assert {url for url in asked if not url.startswith((f"{address}/", "data:"))} == set()
