"""The page at `/` in a headless browser: live requests, their tokens coloured by depth."""

import re
import shutil
import signal

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")

from .test_server import post, start  # noqa: E402

BROWSER = shutil.which("chromium-headless-shell") or shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs apt-get install chromium-headless-shell"),
]


@pytest.mark.parametrize("key", [None, "secret"])
def test_the_page_shows_requests_as_they_run(key, tmp_path):
    process, url = start(*([key] if key else []))
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    messages = []
    try:
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 900, "height": 700})
            page.on("console", lambda message: messages.append(message.text))
            page.on("pageerror", lambda error: messages.append(str(error)))
            page.goto(f"{url}/?key={key}" if key else url, wait_until="domcontentloaded")
            page.wait_for_selector("#legend span:nth-child(3)")
            assert page.inner_text("#state") == "Waiting for requests."
            body = {"prompt": "the cat", "max_tokens": 40, "n": 2, "ignore_eos": True}
            assert post(url, body, **headers)[0] == 200
            page.wait_for_selector("article.ended:nth-child(2)")
            assert page.inner_text("#state") == ""
            assert page.locator("article").count() == 2
            headings = page.locator("article header").all_inner_texts()
            assert all(re.fullmatch(r"request \d+(, continuation 1)?: length", h) for h in headings)
            spans = page.locator("article pre span")
            depths = spans.evaluate_all("spans => spans.map(span => span.title)")
            colours = spans.evaluate_all("spans => spans.map(span => span.style.background)")
            assert set(depths) <= {"depth 1", "depth 2", "depth 3"}
            by_depth = dict(zip(depths, colours, strict=True))
            assert len(set(by_depth.values())) == len(by_depth)
            legend = page.locator("#legend span").evaluate_all(
                "spans => spans.map(span => span.style.background)"
            )
            assert all(legend[int(depth[-1]) - 1] == colour for depth, colour in by_depth.items())
            # A server that comes back numbers its requests anew.
            page.evaluate("events.dispatchEvent(new Event('error'))")
            assert page.inner_text("#state") == "No connection."
            again = "new MessageEvent('start', {data: '{\"recursions\": 3}'})"
            page.evaluate(f"events.dispatchEvent({again})")
            assert page.inner_text("#state") == ""
            page.evaluate("show({request: 0, index: 0, text: 'x', depths: [1], end: null})")
            assert page.locator("article").count() == 3
            page.screenshot(path=tmp_path / "page.png")
            browser.close()
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert messages == []
