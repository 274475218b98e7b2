"""The pictures of pages in docs/, of the report in out/report.html and of a chat: ``make screenshots``."""

from __future__ import annotations

import re

from conftest import REPOSITORY, SHIPPED_PROFILE
from playwright.sync_api import expect
from test_pages import Visit, start_browser, start_chat

DOCS = REPOSITORY / "docs"
ANSWERS = 4


def main() -> None:
    with start_browser() as browser, start_chat(SHIPPED_PROFILE) as url:
        for suffix, width, height in (("", 1280, 1180), ("-phone", 390, 844)):
            with Visit(browser, width, height) as visit:
                visit.page.goto((REPOSITORY / "out" / "report.html").as_uri())
                expect(visit.page.locator(".plot .main-svg").first).to_be_attached()
                visit.page.wait_for_timeout(1000)
                visit.page.screenshot(path=DOCS / f"report{suffix}.png")
            with Visit(browser, width, height) as visit:
                visit.page.goto(url)
                visit.page.locator("#example input").click()
                visit.page.get_by_role("option", name="persona-1").click()
                message_box = visit.page.locator("#said textarea")
                for count in range(1, ANSWERS + 1):
                    expect(message_box).not_to_have_value("")
                    line = message_box.input_value()
                    visit.page.locator("#send").click()
                    expect(visit.page.locator("#capped [data-testid=bot]")).to_have_count(count, timeout=60_000)
                    # The next line of the example appears when this answer is complete.
                    expect(message_box).to_have_value(re.compile(f"^(?!{re.escape(line)}$).+"), timeout=60_000)
                visit.page.wait_for_timeout(2000)
                visit.page.screenshot(path=DOCS / f"chat{suffix}.png", full_page=True)


if __name__ == "__main__":
    main()
