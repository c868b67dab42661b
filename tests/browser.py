"""A real browser for tests of pages, and a hand that uses the local page in it as a person does."""

import base64
import io
import re
import shutil
import time
from contextlib import contextmanager

import numpy as np
from PIL import Image

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


def texts(html):
    """The words of a piece of HTML, its pictures left out."""
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


@contextmanager
def chromium():
    """A browser without a window, ended in all cases; the name of any other machine leads nowhere."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for word in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1300,1000",
                 "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"):  # fmt: skip
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        browser.set_page_load_timeout(60)
        yield browser
    finally:
        browser.quit()


class Hand:
    """Uses the page as a person does."""

    def __init__(self, browser, url):
        self.browser, self.url = browser, url
        browser.get(url)
        self.wait(lambda: self.all("#pictures input[type=file]"))

    def all(self, css):
        """What is seen of a kind; what takes files never is."""
        found = self.browser.find_elements("css selector", css)
        return [one for one in found if "type=file" in css or one.is_displayed()]

    def wait(self, until, seconds=20):
        end = time.monotonic() + seconds
        while not (found := until()):
            assert time.monotonic() < end, texts(self.browser.page_source)[-2000:]
            time.sleep(0.05)
        return found

    def drop(self, paths):
        self.all("#pictures input[type=file]")[0].send_keys("\n".join(map(str, paths)))
        self.wait(lambda: len(self.all("#pictures .thumbnail-item")) == len(paths))

    def write(self, prompt):
        (box,) = self.all("#prompt textarea")
        box.clear()
        box.send_keys(prompt)

    def click(self):
        self.all("#ask-button")[0].click()

    def tab(self, name):
        next(one for one in self.all("button[role=tab]") if one.text == name).click()

    def said(self, number, name="said"):
        return [one.text for one in self.all(f"#card-{number} .{name}")]

    def html(self, number):
        return "".join(one.get_attribute("outerHTML") for one in self.all(f"#card-{number} .answer-card"))

    def maps(self, number):
        """The pictures that a card shows."""
        sources = [one.get_attribute("src") for one in self.all(f"#card-{number} .maps img")]
        return [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in sources]

    def right(self, px):
        """How far to the right the page reaches, in px, on a screen as wide as given."""
        screen = {"width": px, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        time.sleep(0.3)
        seen = "[...document.querySelectorAll('.block, .answer-card, .answer-card *')]"
        edges = f"document.documentElement.scrollWidth, ...{seen}.map(e => e.getBoundingClientRect().right)"
        return self.browser.execute_script(f"return Math.max({edges})")


def light(image):
    return np.asarray(image.convert("L"), dtype=float).mean()
