"""The page of `p828 serve` as someone uses it, in a browser that selenium drives."""

import json
import urllib.request
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

KEY = "a-key"
SECONDS = 60  # after which a test gives up


class Page:
    """Of a server that asks for `KEY`."""

    def __init__(self, driver: webdriver.Chrome, address: str) -> None:
        self.driver, self.address = driver, address

    def open(self) -> None:
        self.driver.get(self.address)
        self.until(lambda: self.at("key").is_displayed())
        assert self.at("error").text == "The server asks for its key."
        self.press("another" + Keys.ENTER)
        self.until(lambda: "has another key" in self.at("error").text)
        self.at("key").clear()
        self.at("key").send_keys(KEY + Keys.ENTER)
        self.until(lambda: self.at("modes").is_displayed())
        assert not self.at("key").is_displayed()
        assert not self.at("error").is_displayed()

    def at(self, name: str) -> WebElement:
        return self.driver.find_element(By.ID, name)

    def until(self, holds: Any) -> None:
        WebDriverWait(self.driver, SECONDS, poll_frequency=0.02).until(lambda driver: holds())

    def focused(self) -> WebElement:
        return self.driver.switch_to.active_element

    def press(self, *keys: str) -> None:
        """Keys go to whatever has the focus."""
        self.focused().send_keys(*keys)

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
        return self.elements(".token")

    def elements(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        """The text of each element, as it is and not as it is shown."""
        script = "return [...document.querySelectorAll(arguments[0])].map((found) => found.textContent)"
        texts: list[str] = self.driver.execute_script(script, selector)
        return texts

    def style(self, selector: str, name: str) -> str:
        return self.elements(selector)[0].value_of_css_property(name)

    def set_media(self, name: str, value: str) -> None:
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": name, "value": value}]})

    def set_size(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def read_server(self, path: str) -> str:
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            return response.read().decode()

    def ask_server(self, path: str, **body: object) -> Any:
        """The same server's answer in one piece, past the page."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            return json.load(response)
