"""The page in a real browser: Chromium without a window, driven by Playwright."""

from __future__ import annotations

import io
import shlex
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.shipped import PROMPT, Shipped, klora, pixels

from klora_compile.settings.read_options import ReadOptions

pytest.importorskip("gradio", reason="Gradio is not installed (extra tune)")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="Playwright is not installed (extra companions)"
)

#: Where systems keep the browser; none is downloaded.
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FIRST = {"rule": "klora", "steps": "2", "seed": "0", "prompt": PROMPT}
#: Milliseconds that anything on the page may take on a busy machine.
PATIENCE = 120_000
#: Seconds without a change after which nothing more is drawn.
QUIET = 1.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the PATH"),
]


@dataclass
class Served:
    """A page, and what its pipeline does."""

    address: str
    folder: Path
    desk: Any
    seconds: float = 0.0
    """How long each evaluation takes longer than it would."""
    fails: bool = False
    """Whether evaluations fail."""
    evaluations: int = 0
    at_once: list[int] = field(default_factory=list)
    """Numbers of generations at each evaluation."""


@pytest.fixture(scope="module")
def served(shipped: Shipped, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    from klora_compile.tuning.events import Events
    from klora_compile.tuning.opening import Opening
    from klora_compile.tuning.page import built, serve
    from klora_compile.tuning.repeating import Recipe

    folder, saved = shipped.artifact.parent, tmp_path_factory.mktemp("saved")
    files = [str(folder / f"{name}.safetensors") for name in ("fox", "ink")]
    desk = Opening(files[:1], files[1:], {}, ReadOptions(), str(shipped.model), device="cpu").desk()
    recipe = Recipe((*files, "--device", "cpu"), ("--model", str(shipped.model), "--device", "cpu"))
    page = built(Events(desk, FIRST, recipe, saved))
    found = Served(serve(page, "127.0.0.1", None, opened=False), saved, desk)
    running: list[None] = []

    def before(*_: Any) -> None:
        running.append(None)
        found.at_once.append(len(running))
        found.evaluations += 1
        time.sleep(found.seconds)
        running.pop()
        if found.fails:
            raise ValueError("no memory")

    desk._studio.pipe.unet.register_forward_pre_hook(before)
    yield found
    page.close(verbose=False)
    desk.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@dataclass
class Tab:
    """A tab with the page, and what one does there."""

    page: Any
    served: Served
    asked: list[str]
    """Every address that the tab asked for."""

    @classmethod
    def open(cls, browser: Any, served: Served) -> Tab:
        context = browser.new_context(viewport={"width": 1400, "height": 1200})
        context.set_default_timeout(PATIENCE)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page, asked = context.new_page(), []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(served.address, timeout=PATIENCE)
        tab = cls(page, served, asked)
        tab.wait_drawn()
        return tab

    def wait_drawn(self) -> None:
        self.page.wait_for_function(
            "() => document.querySelector('#status')?.innerText.includes('B: ')"
        )

    def picture(self, name: str = "picture") -> object:
        """The pixels that the browser has."""
        address = self.page.get_attribute(f"#{name} img", "src")
        return pixels(Image.open(io.BytesIO(self.page.request.get(address).body())))

    def source(self) -> str:
        return str(self.page.get_attribute("#picture img", "src"))

    def wait_other(self, source: str) -> None:
        """Wait for another picture, and until none follows: each press of a key may draw one."""
        self.page.wait_for_function(
            "(old) => document.querySelector('#picture img')?.getAttribute('src') !== old",
            arg=source,
        )
        before, since = None, time.monotonic()
        while before is None or time.monotonic() - since < QUIET:
            self.wait_drawn()
            now = self.source(), self.served.evaluations
            if now != before:
                before, since = now, time.monotonic()
            self.page.wait_for_timeout(50)

    def map(self) -> str:
        return str(self.page.inner_html("#map svg"))

    def slide(self, name: str, presses: int) -> None:
        slider = self.page.locator(f"#{name} input[type=range]")
        slider.focus()
        for _ in range(presses):
            slider.press("ArrowRight")

    def further(self, text: str) -> None:
        if not self.page.is_visible("#further textarea"):
            self.page.click("text=Further settings")
        self.page.fill("#further textarea", text)
        self.page.locator("#further textarea").blur()

    def wait_status(self, text: str) -> str:
        self.page.wait_for_function(
            "(text) => document.querySelector('#status').innerText.includes(text)", arg=text
        )
        return str(self.page.inner_text("#status"))


@pytest.fixture
def tab(browser: Any, served: Served) -> Iterator[Tab]:
    served.seconds = 0.0
    tab = Tab.open(browser, served)
    yield tab
    served.seconds = 0.0
    tab.page.context.close()


def by_commands(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.chdir(folder)
    for line in text.splitlines():
        result = klora(*shlex.split(line)[1:], "--force")
        assert result.exit_code == 0, result.output
    (picture,) = folder.glob("*.png")
    return pixels(picture)


def test_map_and_picture_follow_a_slider_and_the_copied_command_repeats_them(
    tab: Tab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, source, first = tab.map(), tab.source(), tab.picture()
    tab.slide("bias", 6)
    tab.page.wait_for_function(
        "(old) => document.querySelector('#map svg').innerHTML !== old", arg=before
    )
    tab.wait_other(source)
    tab.page.wait_for_function(
        "() => document.querySelector('#commands').innerText.includes('--bias 0.3')"
    )
    assert tab.picture() != first
    tab.page.click("#copy")
    copied = tab.page.evaluate("() => navigator.clipboard.readText()")
    assert tab.picture() == by_commands(copied, tmp_path, monkeypatch)
    assert tab.picture("plain") != tab.picture()
    tab.page.hover("#map .klora-layers rect >> nth=3", position={"x": 60, "y": 2})
    tab.page.wait_for_function(
        "() => document.querySelector('.klora-layer').innerText.includes('ratio ')"
    )
    outside = [
        u for u in tab.asked if "127.0.0.1" not in u and not u.startswith(("data:", "blob:"))
    ]
    assert outside == []


def test_one_goes_back_to_what_was_tried(tab: Tab) -> None:
    source = tab.source()
    tab.slide("weight-style", 4)
    tab.wait_other(source)
    weak, source = tab.picture(), tab.source()
    tab.slide("weight-style", 1)  # one press, so that the strip has nothing in between
    tab.wait_other(source)
    source = tab.source()
    tab.page.click("#strip button >> nth=1")
    tab.wait_other(source)
    assert tab.picture() == weak
    assert tab.page.input_value("#weight-style input[type=number]") == "1.2"


def test_a_bad_value_gives_a_sentence_and_the_page_goes_on(tab: Tab, served: Served) -> None:
    source, before = tab.source(), tab.picture()
    tab.further("bias=7")
    status = tab.wait_status("bias:")
    assert status.endswith("bias: expected a number from -1 to 1, found 7.0.")
    assert tab.picture() == before
    served.fails = True
    tab.further("seed=10")
    assert "Traceback" not in tab.wait_status("failed at prompt")
    served.fails = False
    tab.further("seed=11")
    tab.wait_other(source)
    assert tab.picture() != before


def test_stop_stops_and_the_next_picture_is_right(tab: Tab, served: Served) -> None:
    first = tab.picture()
    served.seconds, begun = 0.1, served.evaluations
    tab.further("steps=500")
    tab.page.wait_for_function("() => true")
    while served.evaluations < begun + 3:
        tab.page.wait_for_timeout(50)
    tab.page.click("#stop")
    tab.wait_status("stopped")
    assert served.evaluations < begun + 500
    assert tab.picture() == first
    served.seconds = 0.0
    source = tab.source()
    tab.further("seed=12")
    tab.wait_other(source)


def test_two_tabs_take_turns(tab: Tab, served: Served, browser: Any) -> None:
    other = Tab.open(browser, served)
    served.seconds = 0.05
    one, two = tab.source(), other.source()
    tab.further("seed=21\nsteps=12")
    other.further("seed=22\nsteps=12")
    tab.wait_other(one)
    other.wait_other(two)
    assert tab.picture() != other.picture()
    assert set(served.at_once) == {1}
    other.page.context.close()


def test_a_reload_in_mid_run_stops_it_and_shows_what_was_tried_last(
    tab: Tab, served: Served
) -> None:
    source = tab.source()
    tab.further("seed=31")
    tab.wait_other(source)
    last = tab.picture()
    served.seconds, begun = 0.1, served.evaluations
    tab.further("seed=32\nsteps=500")
    while served.evaluations < begun + 3:
        tab.page.wait_for_timeout(50)
    tab.page.reload(timeout=PATIENCE)
    tab.wait_drawn()
    assert tab.picture() == last
    assert served.evaluations < begun + 500
    served.seconds, source = 0.0, tab.source()
    tab.slide("bias", 2)
    tab.wait_other(source)


def test_a_saved_artifact_is_verified(tab: Tab, served: Served, shipped: Shipped) -> None:
    tab.page.fill("#name textarea, #name input", "mine")
    tab.page.click("#save")
    tab.page.wait_for_function("() => document.querySelector('#saved').innerText.includes('wrote')")
    path = served.folder / "mine.klora.safetensors"
    files = [path.parent / shipped.artifact.with_name(f"{n}.safetensors") for n in ("fox", "ink")]
    result = klora("verify", path, "--against", *files)
    assert result.exit_code == 0, result.output
    tab.page.click("#save")
    tab.page.wait_for_function(
        "() => document.querySelector('#saved').innerText.includes('exists')"
    )
