"""The report in a real browser: it draws, moves, answers and asks for nothing."""

import json
import shutil
import time
from pathlib import Path

import pytest

from refusal_lens.report.page import write_report

BROWSER, DRIVER = (
    shutil.which("chromium") or shutil.which("google-chrome"),
    shutil.which("chromedriver"),
)
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs Chromium and its driver (chromium, chromium-driver)"
)
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def report(quick_results, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return write_report(quick_results("specific"), folder / "report.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def folded(browser, report):
    """The report, opened anew at desktop width, its first figure drawn and the logs emptied."""
    browser.set_window_size(1200, 900)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(report.as_uri())
    wait_for(browser, "return document.body.dataset.drawn")
    return browser


@pytest.fixture
def page(folded):
    """The report with every question opened, and every figure drawn."""
    folded.execute_script(
        "for (const details of document.querySelectorAll('details')) details.open = true"
    )
    wait_for(folded, "return document.body.dataset.drawn === '14'")
    return folded


def wait_for(browser, script: str, seconds: float = 20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := browser.execute_script(script):
            return found
        time.sleep(0.05)
    raise AssertionError(f"never true: {script}")


def test_every_figure_draws(page):
    drawn = page.execute_script(
        "return [...document.querySelectorAll('.chart')].map(chart =>"
        " [chart.id, chart.querySelectorAll('.main-svg').length,"
        " chart.querySelectorAll('path, rect.bg, image').length, chart.offsetHeight])"
    )
    assert len(drawn) == 14
    for name, layers, marks, height in drawn:
        assert layers > 0, name
        assert marks > 3, name
        assert height > 200, name


def test_nothing_is_requested_but_the_file_and_the_console_is_empty(folded, report):
    messages = [json.loads(entry["message"])["message"] for entry in folded.get_log("performance")]
    requested = {
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    }
    assert {url for url in requested if not url.startswith(("data:", "blob:"))} == {report.as_uri()}
    assert folded.get_log("browser") == []


def test_the_first_screen_has_the_verdict_one_figure_and_one_table(folded):
    bottoms = folded.execute_script(
        "return [...document.querySelectorAll('.verdict, .chart, table')]"
        ".filter(each => !each.closest('details:not([open])'))"
        ".map(each => each.getBoundingClientRect().bottom)"
    )
    assert len(bottoms) == 3
    assert max(bottoms) < 900
    assert folded.execute_script("return document.body.dataset.drawn") == "1"


def test_with_every_question_open_the_page_stays_below_6000_pixels(folded):
    folded.set_window_size(1280, 900)
    folded.execute_script(
        "for (const details of document.querySelectorAll('.question')) details.open = true"
    )
    wait_for(folded, "return document.body.dataset.drawn === '12'")
    height = folded.execute_script("return document.documentElement.scrollHeight")
    assert height < 6000


def test_a_figure_has_one_slider(page):
    assert page.execute_script("return document.querySelectorAll('.slider-container').length") == 0
    assert len(page.find_elements("css selector", "input[type=range]")) == 4


def test_the_slider_tells_the_numbers_of_its_layer(page):
    figure = page.find_element("css selector", "figure:has(#figure-projections-refusal)")
    told = "return arguments[0].querySelector('.told').textContent"
    assert "layer 20; AUROC" in page.execute_script(told, figure)
    page.execute_script(
        "const input = arguments[0].querySelector('input');"
        "input.value = 3; input.dispatchEvent(new Event('input'))",
        figure,
    )
    assert "layer 3; AUROC" in page.execute_script(told, figure)


def test_the_layers_can_be_reached_by_the_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    figure = page.find_element("css selector", "figure:has(#figure-plane)")
    slider = figure.find_element("css selector", "input[type=range]")
    first = "document.getElementById('figure-plane').data[0].x[0]"
    before = page.execute_script(f"return {first}")
    slider.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    wait_for(page, f"return {first} !== {before}")
    assert figure.find_element("css selector", "output").text == slider.get_attribute("value")


def test_hover_tells_the_numbers_of_a_layer(folded):
    from selenium.webdriver.common.action_chains import ActionChains

    chart = folded.find_element("id", "figure-cosine")
    folded.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    drag = chart.find_element("css selector", ".nsewdrag")
    ActionChains(folded).move_to_element(drag).perform()
    text = wait_for(
        folded,
        "const hover = document.querySelector('#figure-cosine .hoverlayer');"
        "return hover && hover.textContent",
    )
    assert "layer" in text


def test_on_a_phone_nothing_is_wider_than_the_screen(folded):
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    folded.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    name = "document.querySelector('header p')"
    try:
        own = folded.execute_script(f"return {name}.textContent")
        for text in (own, "models/two_separate_refusals_of_a_model_with_a_long_name_in_a_folder"):
            folded.execute_script(f"{name}.textContent = arguments[0]", text)
            assert folded.execute_script("return document.documentElement.scrollWidth") <= 390
        folded.execute_script(f"{name}.textContent = arguments[0]", own)
        left, right = folded.execute_script(
            "const chart = document.getElementById('figure-cosine').getBoundingClientRect();"
            "return [chart.left, chart.right]"
        )
        assert (left >= 0, right <= 390) == (True, True)  # every layer is in view
    finally:
        folded.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_dark_is_dark_and_follows_the_system(folded):
    background = "return document.getElementById('figure-cosine').layout.template.layout"
    light = folded.execute_script(f"{background}.paper_bgcolor")
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    folded.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    wait_for(folded, f"{background}.paper_bgcolor !== '{light}'")


def test_it_prints(folded):
    assert len(folded.execute_cdp_cmd("Page.printToPDF", {})["data"]) > 100_000
