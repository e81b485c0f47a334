"""The page in a real browser; its pictures of itself are kept in build/serve-page."""

from __future__ import annotations

import base64
import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest
from PIL import Image

from tests.imports import ROOT
from tests.serving import KEY, LONG, PROMPT, Running, guarded_serving, serving, until

if TYPE_CHECKING:
    from playwright.sync_api import Browser

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]
SIZES = {"desktop": (1280, 800), "phone": (360, 740)}
PREVIEWS = """() => {
    window.seen = [];
    new MutationObserver(() => document.querySelectorAll(".preview").forEach((image) => {
        if (image.src && window.seen.at(-1)?.src !== image.src)
            window.seen.push({ src: image.src, scale: Number(image.dataset.scale) });
    })).observe(document.getElementById("now"), { subtree: true, childList: true, attributes: true });
}"""

MASKS = """() => {
    window.masks = [];
    const real = window.fetch;
    window.fetch = async (path, options) => {
        const mask = options?.body instanceof FormData && options.body.get("mask");
        if (mask) {
            const bytes = new Uint8Array(await mask.arrayBuffer());
            window.masks.push(btoa(String.fromCharCode(...bytes)));
        }
        return real(path, options);
    };
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


class Watched:
    """A tab, and what it should not have done."""

    def __init__(self, browser: Browser, url: str, size: str = "desktop") -> None:
        width, height = SIZES[size]
        self.context = browser.new_context(viewport={"width": width, "height": height})
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.errors: list[str] = []
        self.elsewhere: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("request", lambda asked: self._look_at(asked.url, url))
        self.page.goto(url)
        self.page.wait_for_selector("#model option", state="attached")

    def _look_at(self, asked: str, own: str) -> None:
        if not asked.startswith((f"{own}/", "data:", "blob:")):
            self.elsewhere.append(asked)

    def picture(self, number: int = 0) -> bytes:
        """Of the gallery, the last drawn first."""
        source = self.page.locator("#gallery img").nth(number).get_attribute("src")
        assert source is not None
        return base64.b64decode(source.partition("base64,")[2])

    def drawn(self, count: int) -> None:
        """Wait for so many pictures in the gallery."""
        self.page.wait_for_function("(n) => document.querySelectorAll('#gallery li').length === n", arg=count)

    def drop(self, name: str, data: bytes) -> None:
        """Drop a file on the page."""
        transfer = self.page.evaluate_handle(
            """([name, data]) => {
                const transfer = new DataTransfer();
                const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
                transfer.items.add(new File([bytes], name));
                return transfer;
            }""",
            [name, base64.b64encode(data).decode()],
        )
        self.page.dispatch_event("main", "drop", {"dataTransfer": transfer})

    def draws_for_long(self) -> None:
        """Ask for a picture that takes its time, and wait until it is seen."""
        self.page.fill("#prompt", PROMPT)
        self.page.click("#settings > summary")
        self.page.fill("#steps", LONG)
        self.page.click("#draw")
        self.page.wait_for_selector(".preview")

    def kept(self, name: str) -> None:
        """A picture of the page itself."""
        self.page.screenshot(path=kept_at(name), full_page=True)


@pytest.mark.parametrize("size", SIZES)
def test_a_picture_sharpens_and_can_be_drawn_again(browser: Browser, server: Running, size: str) -> None:
    tab = Watched(browser, server.url, size)
    page = tab.page
    page.evaluate(PREVIEWS)
    page.fill("#prompt", PROMPT)
    page.fill("#seed", "7")
    page.keyboard.press("Control+Enter")
    tab.drawn(1)
    seen = page.evaluate("window.seen")
    scales = [view["scale"] for view in seen]
    assert len({view["src"] for view in seen}) >= 3
    assert scales == sorted(scales)
    assert [tab.picture()] == server.drawn(seed=7)
    page.click("text=Draw again")
    tab.drawn(2)
    assert tab.picture(0) == tab.picture(1)
    page.fill("#n", "3")
    page.fill("#seed", "")
    page.click("#draw")
    tab.drawn(5)
    tab.kept(f"drawn-{size}")
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= SIZES[size][0], "nothing to scroll to the side"
    assert (tab.errors, tab.elsewhere) == ([], [])
    tab.context.close()


def test_stopping_and_same_seed(browser: Browser, server: Running) -> None:
    tab = Watched(browser, server.url)
    page = tab.page
    stopped = server.metrics()["hart_batches_stopped_total"]
    tab.draws_for_long()
    tab.kept("drawing")
    page.click("#stop")
    page.wait_for_selector("text=Stopped.")
    until(lambda: server.metrics()["hart_batches_stopped_total"] == stopped + 1)
    assert page.is_hidden("#stop")
    page.fill("#steps", "")
    page.click("#dice")
    seed = page.input_value("#seed")
    page.click("#draw")
    tab.drawn(1)
    page.fill("#seed", "1")
    page.click("text=Same seed, other prompt")
    assert page.input_value("#seed") == seed
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.reload()
    page.wait_for_selector("#model option", state="attached")
    assert page.input_value("#prompt") == PROMPT
    assert (tab.errors, tab.elsewhere) == ([], [])
    tab.context.close()


def test_what_is_asked_for_while_something_is_drawn_waits(browser: Browser, server: Running) -> None:
    """The drawing that goes on is not disturbed; what waits is listed, and can be taken back."""
    tab = Watched(browser, server.url)
    page = tab.page
    stopped = server.metrics()["hart_batches_stopped_total"]
    tab.draws_for_long()
    page.fill("#steps", "")
    for seed, prompt in ((1, "a blue star"), (2, "a green ring"), (3, "a yellow square " * 9)):
        page.fill("#seed", str(seed))
        page.fill("#prompt", prompt)
        page.keyboard.press("Control+Enter")
    assert page.locator("#queue li").count() == 3
    assert page.is_visible(".preview")
    tab.kept("waiting")
    page.locator("#queue li").nth(1).get_by_text("Remove").click()
    assert page.locator("#queue li").count() == 2
    page.click("#stop")
    tab.drawn(2)
    assert [tab.picture(1)] == server.drawn(prompt="a blue star", seed=1)
    page.wait_for_selector("text=The model reads no further than")
    assert page.is_hidden("#queue")
    assert server.metrics()["hart_batches_stopped_total"] == stopped + 1
    assert (tab.errors, tab.elsewhere) == ([], [])
    tab.context.close()


def test_a_dropped_picture_brings_its_settings(browser: Browser, server: Running) -> None:
    (data,) = server.drawn(prompt="a grün star", seed=11, guidance=2.5, steps=5, smooth=True)
    tab = Watched(browser, server.url)
    page = tab.page
    tab.drop("mine.png", data)
    page.wait_for_selector("text=mine.png are taken over")
    found = {name: page.input_value(f"#{name}") for name in ("prompt", "seed", "guidance", "steps", "smooth")}
    assert found == {"prompt": "a grün star", "seed": "11", "guidance": "2.5", "steps": "5", "smooth": "true"}
    page.click("#draw")
    tab.drawn(1)
    assert tab.picture() == data
    tab.drop("other.png", b"\x89PNG\r\n\x1a\n")
    page.wait_for_selector("text=other.png is no picture that can be read here")
    assert (tab.errors, tab.elsewhere) == ([], [])
    tab.context.close()


def given() -> tuple[np.ndarray, bytes]:
    """A picture of the model's size, which any step of a brush is seen on."""
    pixels = np.full((64, 64, 3), (40, 90, 200), np.uint8)
    pixels[::8] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return pixels, file.getvalue()


def chosen(tab: Watched, data: bytes, name: str = "mine.png") -> None:
    tab.page.click("#start > summary")
    tab.page.set_input_files("#picture", {"name": name, "mimeType": "image/png", "buffer": data})
    tab.page.wait_for_selector("#canvas")


def masks(tab: Watched) -> list[np.ndarray]:
    """Where the page's requests asked for something new, in those since :data:`MASKS`."""
    sent = tab.page.evaluate("window.masks")
    images = [Image.open(io.BytesIO(base64.b64decode(mask))).convert("RGBA") for mask in sent]
    return [np.asarray(image)[..., 3] == 0 for image in images]


@pytest.mark.parametrize(("size", "scheme"), [("desktop", "light"), ("phone", "dark")])
def test_a_part_is_painted_over_and_drawn_anew(
    browser: Browser, server: Running, size: str, scheme: Literal["light", "dark"]
) -> None:
    tab = Watched(browser, server.url, size)
    page = tab.page
    page.emulate_media(color_scheme=scheme)
    page.evaluate(MASKS)
    pixels, data = given()
    page.fill("#prompt", PROMPT)
    page.fill("#seed", "3")
    chosen(tab, data)
    page.click("#draw")
    page.wait_for_selector("text=mask: paint over what is to be drawn anew")
    page.locator("#canvas").scroll_into_view_if_needed()
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    left, top, wide, high = (box[side] for side in ("x", "y", "width", "height"))

    def painted(*points: tuple[float, float]) -> None:
        """A stroke through points of the picture, as shares of its sides."""
        for number, (x, y) in enumerate(points):
            page.mouse.move(left + x * wide, top + y * high)
            if not number:
                page.mouse.down()
        page.mouse.up()

    painted((0.9, 0.9), (0.1, 0.1))
    page.click("#undo")
    painted((0.1, 0.1), (0.2, 0.9))
    page.click("#clear")
    painted((0.25, 0.25), (0.75, 0.25), (0.75, 0.75))
    page.click("#eraser")
    painted((0.75, 0.75), (0.76, 0.76))
    page.click("#draw")
    tab.drawn(1)
    (drawn,) = masks(tab)
    assert drawn[16, 16], "where the stroke began"
    assert drawn[16, 48]
    assert not drawn[48, 48], "erased"
    assert not drawn[4:60, 4:10].any(), "cleared"
    assert not drawn[56:, 56:].any(), "taken back"
    assert 300 < drawn.sum() < 1500
    found = np.asarray(Image.open(io.BytesIO(tab.picture())))
    assert np.array_equal(found[~drawn], pixels[~drawn])
    assert not np.array_equal(found[drawn], pixels[drawn])
    tab.kept(f"painted-{size}")
    page.click("text=Compare")
    page.wait_for_selector("#compare[open]")
    page.locator("#divider").fill("20")
    assert "80%" in page.evaluate("document.getElementById('before').style.clipPath")
    page.wait_for_function("document.getElementById('before').naturalWidth === 64")
    page.screenshot(path=kept_at(f"compared-{size}"))
    page.click("#compare button")
    page.click("text=Draw again")
    tab.drawn(2)
    assert tab.picture(0) == tab.picture(1)
    first, second = masks(tab)
    assert np.array_equal(first, second)
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= SIZES[size][0], "nothing to scroll to the side"
    assert tab.elsewhere == []
    assert tab.errors == []
    tab.context.close()


def test_a_mask_is_painted_with_keys(browser: Browser, server: Running) -> None:
    """And the picture that comes of it is what the next one starts from."""
    tab = Watched(browser, server.url)
    page = tab.page
    page.evaluate(MASKS)
    page.fill("#prompt", PROMPT)
    chosen(tab, given()[1])
    page.wait_for_function("document.activeElement.id === 'canvas'")
    for key in ("[", "ArrowLeft", "Space", "Space", "Control+z", "Shift+ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    page.keyboard.press("Control+Enter")
    tab.drawn(1)
    (drawn,) = masks(tab)
    rows, columns = np.nonzero(drawn)
    side = 0.12 * 64
    assert abs(rows.max() - rows.min() + 1 - side) < 2, "as large as the brush"
    assert abs(columns.max() - columns.min() + 1 - 1.25 * side) < 2, "and as far as it went"
    assert abs(rows.mean() - 31.5) < 1
    first = tab.picture()
    page.click("text=Change a part")
    page.wait_for_selector("#given:has-text('seed')")
    page.select_option("#how", "vary")
    page.fill("#vary", "9")
    page.click("#draw")
    page.wait_for_selector("text=vary: expected 1 to 4")
    page.fill("#vary", "3")
    page.fill("#seed", "5")
    page.click("#draw")
    tab.drawn(2)
    answer = server.edit({"image": first}, vary=3, seed=5).json()["data"][0]["b64_json"]
    assert tab.picture() == base64.b64decode(answer)
    page.click("#no-picture")
    page.click("#draw")
    tab.drawn(3)
    assert [tab.picture()] == server.drawn(seed=5)
    assert all("400" in error for error in tab.errors), "the browser's own word for a refusal"
    tab.context.close()


def test_any_picture_can_be_dropped(browser: Browser, server: Running) -> None:
    """One that was drawn here brings its settings, and both are offered."""
    tab = Watched(browser, server.url)
    page = tab.page
    wide = io.BytesIO()
    Image.new("RGB", (300, 100), "red").save(wide, "JPEG")
    tab.drop("photo.jpg", wide.getvalue())
    page.wait_for_selector("text=photo.jpg, 300 x 100")
    page.fill("#prompt", PROMPT)
    page.fill("#seed", "4")
    page.select_option("#fit", "contain")
    page.click("#draw")
    tab.drawn(1)
    assert np.asarray(Image.open(io.BytesIO(tab.picture())))[32, 32, 0] > 200, "bars are drawn, it is kept"
    (data,) = server.drawn(seed=11, guidance=2.5)
    tab.drop("ours.png", data)
    page.wait_for_selector("text=Settings of ours.png are taken over")
    assert page.input_value("#guidance") == "2.5"
    assert "photo.jpg" in page.inner_text("#given")
    page.click("#offer")
    page.wait_for_selector("text=ours.png, 64 x 64")
    assert page.is_hidden("#offer")
    assert (tab.errors, tab.elsewhere) == ([], [])
    tab.context.close()


def kept_at(name: str) -> Path:
    folder = ROOT / "build" / "serve-page"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.png"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("n", "11", "n: expected 1 to 10, found 11"),
        ("guidance", "-1", "guidance: expected 0 to 1000"),
        ("prompt", " ", "prompt 1 is empty"),
        ("seed", str(2**53), "seed: a page knows numbers up to"),
    ],
)
def test_what_is_refused_stands_beside_its_field(
    browser: Browser, server: Running, field: str, value: str, said: str
) -> None:
    tab = Watched(browser, server.url)
    page = tab.page
    page.fill("#prompt", PROMPT)
    page.click("#settings > summary")
    page.fill(f"#{field}", value)
    page.click("#draw")
    page.wait_for_selector(f"#form .error[data-field={field}]:not(:empty)")
    assert said in page.inner_text(f"#form .error[data-field={field}]")
    assert page.evaluate("document.activeElement.id") == field
    if field == "guidance":
        tab.kept("refused")
    assert tab.elsewhere == []
    assert all("400" in error for error in tab.errors), "the browser's own word for a refusal"
    tab.context.close()


def test_classes_are_chosen_from_a_list(browser: Browser, demo_bundle: Path, var_bundle: Path) -> None:
    """And a picture of one brings it, its model and its settings back."""
    with serving("--engine", demo_bundle, "--engine", var_bundle, "--threads", 1) as server:
        tab = Watched(browser, server.url)
        page = tab.page
        name = server.get("/v1/models").json()["data"][1]["id"]
        names = server.get(f"/v1/models/{name}").json()["class_names"]
        assert page.is_hidden("#label")
        page.select_option("#model", name)
        page.wait_for_selector("#classes option", state="attached")
        assert page.locator("#classes option").count() == len(names)
        assert page.is_hidden("#prompt")
        page.click("#settings > summary")
        assert page.is_hidden("#steps")
        page.fill("#label", "no such class")
        page.click("#draw")
        page.wait_for_selector("#form .error[data-field=label]:not(:empty)")
        page.fill("#label", names[2])
        page.fill("#seed", "5")
        page.click("#draw")
        tab.drawn(1)
        assert [tab.picture()] == server.drawn(prompt="", model=name, label=2, seed=5)
        tab.kept("classes")
        page.reload()
        page.wait_for_selector("#model option", state="attached")
        tab.drop("class.png", server.drawn(prompt="", model=name, label=1, seed=6)[0])
        page.wait_for_function("document.getElementById('seed').value === '6'")
        assert page.input_value("#label") == names[1]
        assert page.input_value("#model") == name
        assert tab.elsewhere == []
        tab.context.close()


def test_the_key_is_asked_for_and_kept_in_the_tab(
    browser: Browser, demo_bundle: Path, tmp_path: Path
) -> None:
    with guarded_serving(demo_bundle, tmp_path) as server:
        context = browser.new_context(color_scheme="dark")
        page = context.new_page()
        page.goto(server.url)
        for key in ("wrong", KEY):
            page.wait_for_selector("#key-dialog[open]")
            page.fill("#key", key)
            page.keyboard.press("Enter")
            page.wait_for_selector("#key-dialog", state="hidden") if key == KEY else None
        page.wait_for_selector("#model option", state="attached")
        page.fill("#prompt", PROMPT)
        page.click("#draw")
        page.wait_for_selector("#gallery img")
        stored = page.evaluate(
            "[Object.values(sessionStorage), Object.values(localStorage), document.cookie]"
        )
        assert KEY in stored[0]
        assert stored[1:] == [[], ""]
        assert re.search(r"\d+x\d+", page.inner_text("#model"))
        context.close()
