"""The report in headless Chromium: on a desk and on a phone, light and dark, without a network."""

from __future__ import annotations

import re
import shutil
import subprocess
from html import escape

import pytest
from hostile import write_hostile
from report_runs import write_comparison

matplotlib_image = pytest.importorskip("matplotlib.image")

from grade.commands.report import run_report  # noqa: E402  matplotlib is an extra
from grade.report.style import _SETTINGS  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
DARK = "--blink-settings=preferredColorScheme=0"
LIGHT = "--blink-settings=preferredColorScheme=1"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_comparison(folder / "compare-x", {"grade-ste": [0.80, 0.81], "ppo": [0.60, 0.61]})
    patch = pytest.MonkeyPatch()
    patch.setitem(_SETTINGS, "pdf.fonttype", 3)
    yield run_report(folder / "compare-x")
    patch.undo()


def chromium(path, profile, *options):
    """Load a page; (standard output, what the page wrote to its console)."""
    profile.mkdir(exist_ok=True)
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            "--enable-logging=stderr",
            f"--user-data-dir={profile}",
            *options,
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


def test_the_page_loads_without_an_error(page, tmp_path):
    dom, console = chromium(page, tmp_path / "profile", "--dump-dom")
    assert console == []  # nothing refused by the page's own policy, nothing missing
    assert "Final comparison" in dom and dom.count("<svg") > 10 and "grade-ste" in dom


def test_a_hostile_page_shows_texts_and_runs_none(tmp_path):
    """Prompts, names of methods and settings that would be markup or programs."""
    folder, output = write_hostile(tmp_path / "<script>document.title='owned'"), tmp_path / "page"
    dom, console = chromium(run_report(folder, output), tmp_path / "profile", "--dump-dom")
    assert console == [] and "<script" not in dom and "<img" not in dom
    assert "<title>&lt;script&gt;document.title='owned'</title>" in dom
    for words in ("onerror=alert(1)", "HYPERLINK", "漢字かな", "مرحبا", r"\input{/etc/passwd}", r"$\frac{$"):
        assert words in dom


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_but_tables_is_wider_than_the_screen(page, tmp_path, width):
    """In a frame, because Chromium's own window has at least 500 pixels."""
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{escape(page.read_text("utf-8"))}">'
        "</iframe><script>document.querySelector('iframe').onload = event => {"
        "const page = event.target.contentDocument;"
        "const widths = [...page.querySelectorAll('figure svg')].map(e => e.getBoundingClientRect().width);"
        "document.body.dataset.seen = [page.documentElement.scrollWidth, page.documentElement.clientWidth,"
        "Math.min(...widths)].join(' ') }</script>",
        encoding="utf-8",
    )
    dom, _ = chromium(frame, tmp_path / "profile", "--dump-dom")
    wide, screen, figure = map(float, re.search(r'data-seen="([^"]+)"', dom)[1].split())
    assert wide <= screen and width - 20 <= screen <= width  # a scroll bar may stand beside it
    assert figure >= 0.85 * min(screen, 500)


@pytest.mark.parametrize("scheme, width", [(LIGHT, 1280), (DARK, 390)], ids=["light", "dark phone"])
def test_paper_and_ink_follow_the_colour_scheme(page, tmp_path, scheme, width):
    shot = tmp_path / "shot.png"
    chromium(page, tmp_path / "profile", f"--screenshot={shot}", f"--window-size={width},3000", scheme)
    pixels = matplotlib_image.imread(shot)[..., :3]
    assert pixels.shape[:2] == (3000, width)
    paper = pixels[0, 0].mean()
    assert paper > 0.95 if scheme == LIGHT else paper < 0.15
    # Text and axes, at the other end of the scale, are there to be read.
    contrast = abs(pixels.mean(2) - paper)
    assert 0.01 < (contrast > 0.6).mean() < 0.3
