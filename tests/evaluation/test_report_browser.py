"""The report as a person meets it: loaded from disk in a headless browser and used."""

import base64
import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from report_demo import demo_report

from clip_jax.evaluation import report

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"
)
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --window-size=1440,1000"
)


@pytest.fixture(scope="module")
def demo() -> report.Report:
    return demo_report()


@pytest.fixture(scope="module")
def page_url(demo, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    report.write_report(path, demo)
    return path.as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, page_url):
    """The page, freshly loaded, light, 1440 wide; after the test its console must be empty."""
    emulate(browser, width=1440, scheme="light")
    browser.get(page_url)
    browser.execute_script("localStorage.clear(); delete document.documentElement.dataset.theme")
    yield browser
    assert browser.get_log("browser") == []


def emulate(browser, *, width: int, scheme: str) -> None:
    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    media = [{"name": name, "value": value} for name, value in features.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})


def find(page, css: str):
    return page.find_element(By.CSS_SELECTOR, css)


def texts(page, css: str) -> list[str]:
    return [element.text for element in page.find_elements(By.CSS_SELECTOR, css)]


def point_at(page, css: str, x: float, y: float) -> None:
    """Moves the mouse to (x, y) of the element, both from 0 to 1."""
    element = find(page, css)
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    size = element.size
    offset = round((x - 0.5) * (size["width"] - 1)), round((y - 0.5) * (size["height"] - 1))
    ActionChains(page, duration=0).move_to_element_with_offset(element, *offset).perform()


def luminance(color: str) -> float:
    """Relative luminance of a computed colour (WCAG 2.2), for the contrast between two."""
    channels = [float(c) for c in re.findall(r"[\d.]+", color)[:3]]
    linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(first: str, second: str) -> float:
    low, high = sorted([luminance(first), luminance(second)])
    return (high + 0.05) / (low + 0.05)


def test_asks_for_nothing_but_itself(page, page_url):
    page.get_log("performance")  # empties it of the browser's own start
    page.refresh()
    messages = " ".join(entry["message"] for entry in page.get_log("performance"))
    asked = set(re.findall(r'"Network\.requestWillBeSent".*?"request":.*?"url":"([^"]*)', messages))
    assert {url for url in asked if not url.startswith("data:")} == {page_url}


def test_search_shows_the_best_pictures(page, demo):
    gallery = demo.gallery
    query = next(i for i in range(1, 300) if gallery.top_images[i, 2] == i)
    find(page, "#query").send_keys(gallery.captions[query])
    assert find(page, "#result q").text == gallery.captions[query]
    top = gallery.top_images[query]
    assert texts(page, ".tile-caption") == [" ".join(gallery.captions[i].split()) for i in top]
    cosines = [text.split()[0] for text in texts(page, ".tile-line")]
    assert cosines == [f"{score:.3f}" for score in gallery.top_scores[query]]
    assert find(page, "#result .badge").text == "rank 3"
    marked = page.find_elements(By.CSS_SELECTOR, ".tiles > li")
    assert [m.get_attribute("class") for m in marked] == ["", "", "right", "", "", "", "", ""]


def test_search_filters_all_captions_and_says_when_none_fits(page, demo):
    word = demo.gallery.captions[150].split()[-1].lower()
    expected = sum(word in caption.lower() for caption in demo.gallery.captions)
    find(page, "#query").send_keys(word.upper())
    assert find(page, "#count").text.startswith(f"{expected} matching")
    assert all(word in chip.lower() for chip in texts(page, ".chip"))
    shown = find(page, "#result q").text
    find(page, "#query").send_keys(Keys.ARROW_DOWN)
    assert (find(page, "#result q").text != shown) == (expected > 1)
    find(page, "#query").clear()
    find(page, "#query").send_keys("zzzz<b>")
    assert "No caption contains “zzzz<b>”" in find(page, "#count").text
    assert texts(page, ".chip") == []


def test_a_miss_shows_the_picture_it_should_have_found(page, demo):
    gallery = demo.gallery
    right = (gallery.top_images == np.arange(len(gallery.captions))[:, None]).any(axis=1)
    find(page, "#query").send_keys(gallery.captions[np.flatnonzero(~right)[0]])
    assert find(page, "#result .badge").text == "miss"
    assert find(page, ".wanted .thumb").is_displayed()


def test_surprise_and_pictures_lead_to_other_queries(page, demo):
    captions = set(demo.gallery.captions)
    seen = set()
    for _ in range(5):
        find(page, "#surprise").click()
        seen.add(find(page, "#result q").text)
    assert len(seen) > 1
    assert seen <= captions
    caption = texts(page, ".tile-caption")[4]
    page.find_elements(By.CSS_SELECTOR, ".tile")[4].click()
    assert find(page, "#result q").text == caption


def test_a_hostile_caption_is_only_text(page, demo):
    find(page, "#query").send_keys("onerror")
    assert find(page, "#result q").text == demo.gallery.captions[0]
    assert page.find_elements(By.CSS_SELECTOR, "img, q b") == []


def test_thumbnails_show_the_right_part_of_the_atlas(page, demo):
    """The centre pixels of a tile on the screen against the picture that it stands for."""
    tile = find(page, ".tile .thumb")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", tile)
    shot = Image.open(io.BytesIO(base64.b64decode(tile.screenshot_as_base64))).convert("RGB")
    query = demo.gallery.featured[0]
    thumbnails = demo.gallery.images.astype(float)
    size = thumbnails.shape[1]
    shown = np.asarray(shot.resize((size, size)), float)
    inside = slice(size // 6, -size // 6)  # clear of the rounded corners and the outline
    difference_N = np.abs(thumbnails - shown)[:, inside, inside].mean(axis=(1, 2, 3))
    assert difference_N.argmin() == demo.gallery.top_images[query, 0]
    assert difference_N.min() < 12  # of 255: scaling blurs edges


def test_theme_toggle_changes_the_colours_and_is_kept(page):
    def colors() -> tuple[str, str, str]:
        return tuple(
            page.execute_script(
                """
                const style = getComputedStyle(document.body);
                const copy = new OffscreenCanvas(1, 1).getContext("2d");
                copy.drawImage(document.querySelector("#matrix"), -4, -30);
                const pixel = copy.getImageData(0, 0, 1, 1).data;
                return [style.backgroundColor, style.color, String(pixel)];
                """
            )
        )

    light = colors()
    find(page, "#theme").click()
    dark = colors()
    assert all(a != b for a, b in zip(light, dark, strict=True))
    assert luminance(light[0]) > 0.8
    assert luminance(dark[0]) < 0.05
    assert contrast(*light[:2]) > 12
    assert contrast(*dark[:2]) > 12
    page.refresh()
    assert colors() == dark
    find(page, "#theme").click()
    assert colors() == light


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_small_text_has_contrast(page, scheme):
    emulate(page, width=1440, scheme=scheme)
    pairs = page.execute_script(
        """
        const back = (e) => { for (; e; e = e.parentElement) {
          const c = getComputedStyle(e).backgroundColor; if (c.startsWith("rgb(")) return c; } };
        return ["header .summary", ".score-chance", ".score-chance b", ".head p", ".facts dt",
          ".tile-line span", ".tile-caption", ".note", ".confusion .said dd:nth-child(2)",
          ".chip[aria-pressed=true]", "td:nth-child(3)", ".tree > div code", "footer div"]
          .map((s) => [s, document.querySelector(s)])
          .map(([s, e]) => [s, getComputedStyle(e).color, back(e)]);
        """
    )
    for name, color, background in pairs:
        assert contrast(color, background) >= 4.5, (name, color, background)  # WCAG 2.2 AA


def test_smoothing_changes_the_strong_line_only(page):
    def paths() -> list[str]:
        return [find(page, f".chart path.{c}").get_attribute("d") for c in ("strong", "raw")]

    before = paths()
    slider = find(page, "#smooth")
    slider.send_keys(Keys.END)
    assert find(page, ".controls output").text == "0.99"
    after = paths()
    assert after[0] != before[0]
    assert after[1] == before[1]
    slider.send_keys(Keys.HOME)
    assert find(page, ".chart path.strong").get_attribute("d") == before[1]  # 0: the values
    assert page.find_elements(By.CSS_SELECTOR, ".chart path.raw") == []


def test_crosshair_reads_the_curve(page, demo):
    find(page, "#smooth").send_keys(Keys.HOME)
    point_at(page, ".chart svg", 0.999, 0.5)
    tip = find(page, ".chart .tip")
    assert tip.is_displayed()
    losses = {line["step"]: line["loss"] for line in demo.metrics if "loss" in line}
    assert tip.text.split("\n")[0] == "Step 4,000"
    assert float(tip.text.split("\n")[-1]) == pytest.approx(losses[4000], rel=1e-3)
    crosses = page.find_elements(By.CSS_SELECTOR, "#curves > .charts .cross")
    assert len(crosses) == 6 + 3  # every open chart shows the same place
    find(page, ".chart svg").send_keys(Keys.ARROW_LEFT)
    assert tip.text.startswith("Step 3,990")


def test_axis_and_log_switches_redraw(page):
    def labels() -> list[str]:
        return texts(page, ".chart:first-child text")

    steps = labels()
    find(page, "[data-axis=samples]").click()
    samples = labels()
    assert "4000" in steps
    assert "4M" in samples
    find(page, "#log").click()
    assert "1" in labels()
    assert "0.5" not in samples


def test_matrix_reads_the_pair_under_the_mouse(page, demo):
    matrix, captions = demo.similarity.matrix, demo.similarity.captions
    row, column = 5, 17
    point_at(page, "#matrix", (column + 0.5) / 24, (row + 0.5) / 24)
    reading = find(page, "#reading").text
    assert f"{matrix[row, column]:.3f}" in reading
    assert f"“{captions[column]}”" in reading
    assert f"“{captions[row]}”" in reading
    find(page, "#matrix").send_keys(Keys.ARROW_DOWN)
    assert f"{matrix[row + 1, column]:.3f}" in find(page, "#reading").text


def test_configuration_opens_and_is_copied(page, demo):
    buttons = page.find_elements(By.CSS_SELECTOR, ".tools button")
    assert not find(page, "#config details details").is_displayed()
    buttons[1].click()
    assert find(page, "#config details details").is_displayed()
    assert "0.98" in find(page, "#config").text
    buttons[0].click()
    WebDriverWait(page, 3).until(lambda _: buttons[0].text == "Copied")
    find(page, "#query").send_keys(Keys.CONTROL, "v")
    pasted = find(page, "#query").get_attribute("value")
    assert json.loads(pasted) == json.loads(json.dumps(demo.config))


@pytest.mark.parametrize("width", [320, 390, 768, 1440])
def test_nothing_hangs_over_the_edge(page, width):
    emulate(page, width=width, scheme="light")
    page.refresh()
    find(page, ".tools button:nth-child(2)").click()  # the opened configuration too
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    wide = page.execute_script(
        """
        const scrolls = (e) => e.closest(".matrix-scroll, nav, .chips, .skip, .hidden");
        return [...document.querySelectorAll("main *, header *")]
          .filter((e) => !scrolls(e) && e.getBoundingClientRect().right > innerWidth + 1)
          .map((e) => e.outerHTML.slice(0, 120));
        """
    )
    assert wide == []


def test_a_report_without_parts_runs_without_errors(browser, tmp_path):
    empty = report.Report(
        title="Empty",
        summary="",
        run={},
        metrics=[],
        scores=[],
        gallery=None,
        confusions=[],
        similarity=report.Similarity(images=[0, 1], captions=["a", "b"], matrix=np.eye(2)),
        config={},
        environment={},
        attribution=[],
    )
    report.write_report(tmp_path / "r.html", empty)
    browser.get((tmp_path / "r.html").as_uri())
    assert "No set of pictures" in find(browser, "#gallery-section").text
    assert "1.000" in find(browser, "#reading").text  # a matrix without pictures has numbers
    assert browser.get_log("browser") == []
