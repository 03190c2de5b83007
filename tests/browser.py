"""A real headless Chromium for the tests of pages: Debian's, driven by Playwright."""

import contextlib
import os
import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# as root, in a container and without a network
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--autoplay-policy=no-user-gesture-required"]


def find_chromium():
    """The path of a Chromium: the environment variable CHROMIUM, or one on the path; None without one."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def open_page(address, *flags):
    """Start Chromium with `flags`, open a page in it; yields Playwright's Page, and ends the browser.

    `page.problems` lists what the page has written to its console as errors, and exceptions that nobody caught.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=[*FLAGS, *flags])
        with contextlib.closing(browser):
            page, problems = browser.new_page(viewport={"width": 1100, "height": 1000}), []
            page.problems = problems
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
            page.set_default_timeout(60_000)
            page.goto(address)
            yield page
