"""The page in a real browser, as a newcomer uses it. Needs Chromium, its driver and selenium."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from . import servers

webdriver = pytest.importorskip("selenium.webdriver", reason="the page's test needs selenium")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--disable-dev-shm-usage --window-size=1000,1400"
)
EVIL = '<img src=x onerror="document.title=1">'


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    program = next(filter(None, map(shutil.which, _BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no Chromium with its chromedriver here (apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in _FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield running
    running.quit()


@pytest.fixture(scope="module")
def folder(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, one of which has a training's curve, and one that means harm."""
    folder = tmp_path_factory.mktemp("page") / "prompts"
    shutil.copytree(place / "prompts", folder)
    history = [{"epoch": n, "loss": 2.0 / n, "dev_accuracy": 0.2 * n} for n in range(1, 5)]
    (folder / "mood" / "result.json").write_text(json.dumps({"history": history}))
    evil = servers.prompt(place, "mood")
    evil.template = f"[P*2] {{text}} [P] {EVIL}: [MASK]"
    evil.verbalizer = {EVIL: ("Paris",), "bad": ("Rome",)}
    evil.training = {"dev_accuracy": EVIL}
    evil.save(folder / "evil")
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with servers.serving(folder) as server:
        yield server.url


@pytest.fixture
def page(browser: Any, url: str) -> Any:
    """The page, freshly opened; afterwards nothing was fetched elsewhere and nothing went wrong."""
    browser.set_window_size(1000, 1400)
    browser.get_log("browser")
    browser.get("about:blank")
    browser.get(f"{url}/")
    _wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#about table tr"))
    yield browser
    fetched = browser.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert fetched and all(name.startswith(url) for name in fetched), fetched
    noise = [m for m in browser.get_log("browser") if "favicon" not in m["message"]]
    assert noise == []


def _wait(browser: Any, condition: Callable[[], Any]) -> Any:
    return WebDriverWait(browser, 200).until(lambda _: condition())


def _click(page: Any, text: str) -> None:
    page.find_element(By.XPATH, f"//button[text()='{text}']").click()


def _answers(page: Any, count: int) -> list[Any]:
    """The cards, when all have their answers."""

    def whole() -> Any:
        cards = page.find_elements(By.CSS_SELECTOR, "#answers section")
        idle = page.find_element(By.ID, "go").is_enabled()
        return cards if idle and len(cards) == count else None

    return list(_wait(page, whole))


def _predict(url: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
    found = servers.post(f"{url}/v1/prompts/{name}/predict", json=body).json()
    return dict(found["predictions"][0])


def test_three_clicks_lead_to_probabilities(page: Any, url: str) -> None:
    _click(page, "mood")
    field = page.find_element(By.NAME, "text")
    field.click()
    field.send_keys("it rains in Oslo")
    _click(page, "Ask")
    (card,) = _answers(page, 1)
    right = _predict(url, "mood", {"fields": {"text": "it rains in Oslo"}})
    assert card.find_element(By.CLASS_NAME, "text").text == right["answer"]
    bars = [bar.text.split("\n") for bar in card.find_elements(By.CLASS_NAME, "bar")]
    best_first = sorted(right["probabilities"].items(), key=lambda item: -item[1])
    assert bars == [[label, f"{100 * share:.1f} %"] for label, share in best_first]
    width = card.find_element(By.CSS_SELECTOR, ".best i").get_attribute("style")
    assert float(width.split(":")[1].strip(" %;")) == pytest.approx(
        100 * right["probability"], 0.01
    )


def test_two_prompts_and_the_words_alone_stand_side_by_side(page: Any, url: str) -> None:
    _click(page, "capital")
    page.find_element(By.NAME, "country").send_keys("France")
    page.find_element(By.ID, "by-hand").click()
    other = page.find_element(By.ID, "other")
    other.find_element(By.XPATH, "option[text()='mood']").click()
    assert page.find_element(By.NAME, "country").get_attribute("value") == "France"
    page.find_element(By.NAME, "text").send_keys("Oslo")
    _click(page, "Ask")
    cards = {c.find_element(By.TAG_NAME, "h2").text: c for c in _answers(page, 3)}
    assert set(cards) == {"capital", "capital without virtual tokens", "mood"}
    france = {"fields": {"country": "France"}}
    by_hand = {**france, "virtual_tokens": False}
    wanted: list[tuple[str, str, dict[str, Any]]] = [
        ("capital", "capital", france),
        ("capital without virtual tokens", "capital", by_hand),
        ("mood", "mood", {"fields": {"text": "Oslo"}}),
    ]
    for title, name, body in wanted:
        shown = cards[title].find_element(By.CLASS_NAME, "text").get_attribute("textContent")
        assert shown == _predict(url, name, body)["answer"]
    places = [card.rect for card in cards.values()]
    assert len({place["y"] for place in places}) == 1 and len({p["x"] for p in places}) == 3


def test_a_fault_is_told_in_its_place(page: Any, place: Path, folder: Path) -> None:
    servers.prompt(place, "mood").save(folder / "passing")
    try:
        _wait(
            page,
            lambda: page.refresh() or page.find_elements(By.XPATH, "//button[text()='passing']"),
        )
        _click(page, "passing")
        shutil.rmtree(folder / "passing")
        asked = lambda: (_click(page, "Ask"), _answers(page, 1))[1][0]  # noqa: E731
        card = _wait(page, lambda: (c := asked()).find_elements(By.CLASS_NAME, "wrong") and c)
        assert "there is no prompt 'passing' here" in card.text
    finally:
        shutil.rmtree(folder / "passing", ignore_errors=True)
        page.get_log("browser")  # a 404 is noise there


def test_a_prompt_shows_its_template_words_and_curve(page: Any, url: str) -> None:
    _click(page, "mood")
    _wait(page, lambda: page.find_elements(By.CSS_SELECTOR, "#about polyline"))
    assert len(page.find_elements(By.CSS_SELECTOR, "#about polyline")) == 2
    assert [m.text for m in page.find_elements(By.CSS_SELECTOR, "#about mark")] == ["[P*2]", "[P]"]
    rows = page.find_elements(By.CSS_SELECTOR, "#about tr")
    words = servers.get(f"{url}/v1/prompts/mood").json()["virtual_tokens"]
    assert len(rows) == 1 + len(words)
    assert f"{words[0]['nearest'][0][1]:.2f}" in rows[1].text


def test_what_a_prompt_is_called_is_text_and_no_markup(page: Any) -> None:
    _click(page, "evil")
    page.find_element(By.NAME, "text").send_keys(EVIL)
    _click(page, "Ask")
    (card,) = _answers(page, 1)
    assert EVIL in card.text and EVIL in page.find_element(By.ID, "about").text
    assert page.find_elements(By.TAG_NAME, "img") == []
    assert page.title == "Try a prompt · ptuning"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_on_a_phone_in_light_and_dark(page: Any, scheme: str) -> None:
    metrics = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    try:
        _click(page, "mood")
        page.find_element(By.ID, "by-hand").click()
        page.find_element(By.NAME, "text").send_keys("word" * 60)
        _click(page, "Ask")
        _answers(page, 2)
        script = "return [document.documentElement.scrollWidth, innerWidth]"
        whole, seen = page.execute_script(script)
        assert whole <= seen == 360
        for button in page.find_elements(By.TAG_NAME, "button"):
            assert not button.is_displayed() or button.rect["height"] >= 40
        for selector in ("body", "h2", ".soft", ".ask", ".bar p", "mark", "a"):
            assert _contrast(page, selector) >= 4.5, selector
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def _contrast(page: Any, selector: str) -> float:
    """WCAG's ratio between an element's text and what is behind it."""
    ink, back = page.execute_script(
        """const element = document.querySelector(arguments[0]);
        let behind = element, color = "";
        for (; behind; behind = behind.parentElement) {
          color = getComputedStyle(behind).backgroundColor;
          if (color !== "rgba(0, 0, 0, 0)") break;
        }
        return [getComputedStyle(element).color, color]""",
        selector,
    )
    one, other = sorted((_luminance(ink), _luminance(back)), reverse=True)
    return (one + 0.05) / (other + 0.05)


def _luminance(color: str) -> float:
    parts = [float(p) / 255 for p in color[color.index("(") + 1 : -1].split(",")[:3]]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_a_server_with_a_key_shows_nothing_before_it(browser: Any, place: Path) -> None:
    with servers.serving(place / "prompts", "--api-key", servers.KEY) as server:
        browser.get(f"{server.url}/")
        _wait(browser, lambda: browser.find_element(By.ID, "key").is_displayed())
        assert not browser.find_element(By.ID, "open").is_displayed()
        browser.find_element(By.ID, "key").send_keys("another")
        _click(browser, "Open")
        _wait(browser, lambda: browser.find_element(By.ID, "unlock-error").text)
        field = browser.find_element(By.ID, "key")
        field.clear()
        field.send_keys(servers.KEY)
        _click(browser, "Open")
        _wait(browser, lambda: browser.find_elements(By.XPATH, "//button[text()='mood']"))
        assert not field.is_displayed()
        browser.get(f"{server.url}/docs")
        _wait(browser, lambda: "/v1/prompts/{name}/predict" in browser.page_source)
        browser.get_log("browser")
