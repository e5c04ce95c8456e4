"""The page of `p828 serve` in headless Chromium, before a server that answers with a model which knows some HTML."""

import json
import math
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

import p828
from chat_templates import talk
from conversations import chat_config, write_conversations
from p828.api import train_run
from runs import start

KEY = "a key"
MARKUP = "<b>red</b> 🙂 <img src=x onerror=alert(1)>\n<i>"
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--window-size=1200,800",
]  # fmt: skip
SECONDS = 60  # after which a test gives up

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> p828.Run:
    """A run that answers "Colours?" with markup, and "Sing!" without an end."""
    place = tmp_path_factory.mktemp("run")
    train = {"steps": 80, "micro_batch_size": 4, "gradient_accumulation": 1}
    model = {"max_position_embeddings": 4096}
    config = chat_config(place, train=train, model=model, data={"sequence_length": 64}, checkpoint={"every": 100})
    write_conversations(place / "talk.jsonl", [talk("Colours?", MARKUP)] * 12 + [talk("Sing!", "la " * 40)] * 4)
    run = train_run(config)
    assert run.answer("Colours?", temperature=0) == MARKUP
    return run


@pytest.fixture(scope="module")
def address(run: p828.Run) -> Iterator[str]:
    process = start("serve", str(run.path), "--port", "0", "--api-key", KEY, cwd=run.path)
    yield ""


class Page:
    """The page as someone uses it."""

    def __init__(self, driver: webdriver.Chrome, address: str) -> None:
        self.driver, self.address = driver, address

    def open(self) -> None:
        self.driver.get(self.address)
        self.until(lambda: self.at("key").is_displayed())
        self.at("key").send_keys(KEY + "\t")
        self.until(lambda: self.at("modes").is_displayed())

    def at(self, name: str) -> WebElement:
        return self.driver.find_element(By.ID, name)

    def until(self, holds: Any) -> None:
        WebDriverWait(self.driver, SECONDS, poll_frequency=0.02).until(lambda driver: holds())

    def press(self, *keys: str) -> None:
        """Keys go to whatever has the focus."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def choose(self, mode: str, **settings: object) -> None:
        self.driver.find_element(By.CSS_SELECTOR, f"[value={mode}]").click()
        for name, value in settings.items():
            self.driver.execute_script("document.getElementById(arguments[0]).value = arguments[1]", name, value)

    def ask(self, prompt: str) -> None:
        self.at("prompt").send_keys(prompt)
        self.press(Keys.CONTROL, Keys.ENTER)

    def wait(self) -> None:
        """Until the answer is whole."""
        self.until(lambda: self.at("send").is_enabled())

    def tokens(self) -> list[WebElement]:
        return self.driver.find_elements(By.CLASS_NAME, "token")

    def texts(self, selector: str) -> list[str]:
        """The text of each element, as it is and not as it is shown."""
        script = "return [...document.querySelectorAll(arguments[0])].map((found) => found.textContent)"
        texts: list[str] = self.driver.execute_script(script, selector)
        return texts

    def ask_server(self, path: str, **body: object) -> Any:
        """The same server's answer in one piece, past the page."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            return json.load(response)
