"""The page as a person uses it: headless Chromium drops files, asks, and looks.

The README's picture, after `make demo`:
python tests/hub/test_demo_browser.py runs/demo demo/clips/media/val/0000/val-000000.mp4 "Which …?" docs/demo/page.png
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

pytest.importorskip("gradio", reason="no Gradio: pip install -e '.[demo]'")
webdriver = pytest.importorskip("selenium.webdriver", reason="no Selenium: pip install selenium")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from fvlm.hub.demo import Viewer  # noqa: E402
from fvlm.hub.demo_page import served  # noqa: E402
from fvlm.hub.opening import open_model  # noqa: E402

MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
LOADED_FROM = "return performance.getEntriesByType('resource').map(entry => entry.name)"
IS_DRAWN = "const it = document.getElementById('time-line'); return it && it.complete && it.naturalWidth > 0 && it.src"

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}: Debian's chromium and chromium-driver")


class Visitor:
    """Someone at the page's address with a browser."""

    def __init__(self, browser: webdriver.Chrome, address: str):
        self.browser = browser
        browser.get(address)
        self.wait(lambda: self.all("#file input[type=file]"))

    def all(self, selector: str) -> list:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, until: Callable, seconds: float = 30):
        return WebDriverWait(self.browser, seconds, 0.05).until(lambda _: until())

    def drop(self, file: Path) -> None:
        for clear in self.all("#file button[aria-label=Clear]"):
            clear.click()
        (dropped,) = self.wait(lambda: self.all("#file input[type=file]"))
        dropped.send_keys(str(file))

    def about(self) -> str:
        """What the page says of the dropped file, once it says something."""
        return self.wait(lambda: self.all("#about")[0].text)

    def message(self) -> str:
        """The message that popped up; it is closed."""
        said = self.wait(lambda: " ".join(toast.text for toast in self.all("[data-testid=toast-body]")))
        self.all("[data-testid=toast-close]")[0].click()
        self.wait(lambda: not self.all("[data-testid=toast-body]"))
        return said

    def ask(self, question: str) -> None:
        (box,) = self.all("#question textarea, #question input")
        box.clear()
        box.send_keys(question)
        self.all("#ask")[0].click()

    def answer(self) -> str:
        return self.all("#answer textarea")[0].get_attribute("value")

    def drawn(self) -> str | None:
        """The time line's picture, once it is on the screen."""
        return self.browser.execute_script(IS_DRAWN)

    def choose(self, dropdown: str, option: str) -> None:
        self.all(f"#{dropdown} input")[0].click()
        self.wait(lambda: [x for x in self.all(f"#{dropdown} [role=option]") if x.text.strip("✓ \n") == option])[
            0
        ].click()


@contextmanager
def chromium(folder: str) -> Iterator[webdriver.Chrome]:
    """A browser that reaches this machine only."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (
        "headless=new",
        "no-sandbox",  # continuous integration runs as root
        "disable-dev-shm-usage",
        "window-size=1100,1150",
        "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"user-data-dir={folder}",
    ):
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield browser
    finally:
        browser.quit()


@pytest.fixture(scope="module")
def visitor(exported, tmp_path_factory):
    viewer = Viewer(open_model(str(exported)), seconds=60)
    with served(viewer, "tiny") as address, chromium(str(tmp_path_factory.mktemp("browser"))) as browser:
        visitor = Visitor(browser, address)
        visitor.address, visitor.viewer = address, viewer
        yield visitor


def test_a_wrong_file_then_a_clip_asked_about_and_looked_into(visitor, clip, tmp_path):
    (tmp_path / "notes.mp4").write_text("These are notes, and no video. " * 20)
    visitor.drop(tmp_path / "notes.mp4")
    assert "notes.mp4: neither a picture nor a video" in visitor.message()

    visitor.drop(clip)
    assert visitor.about() == "clip.mp4: a video of 4.0 s, 4 frames of it looked at"
    visitor.ask("Which shape is it?")
    lengths = []
    visitor.wait(lambda: lengths.append(len(visitor.answer())) or visitor.drawn())
    assert len(set(lengths)) > 2  # it was read while it grew
    expected = list(visitor.viewer.answer(visitor.viewer.read(clip), "Which shape is it?", "autoregressive", 128))
    assert visitor.answer() == expected[-1]

    mean = visitor.drawn()
    visitor.choose("head", "2")
    one = visitor.wait(lambda: visitor.drawn() not in (None, False, mean) and visitor.drawn())
    visitor.choose("layer", "1")
    visitor.wait(lambda: visitor.drawn() not in (None, False, mean, one))

    elsewhere = [name for name in visitor.browser.execute_script(LOADED_FROM) if not name.startswith(visitor.address)]
    assert [name for name in elsewhere if not name.startswith("data:")] == []


def screenshot(model: str, clip: str, question: str, out: str) -> None:
    """The page with an answer and its time line, as a picture."""
    viewer = Viewer(open_model(model))
    with TemporaryDirectory() as folder, served(viewer, f"`{model}`") as address, chromium(folder) as browser:
        visitor = Visitor(browser, address)
        visitor.drop(Path(clip).resolve())
        visitor.about()
        visitor.ask(question)
        visitor.wait(visitor.drawn, 300)
        browser.set_window_size(1100, 1330)  # all of it, for eight frames and less
        browser.save_screenshot(out)


if __name__ == "__main__":
    screenshot(*sys.argv[1:])
