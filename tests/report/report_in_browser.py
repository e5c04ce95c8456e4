"""A report's page in headless Chromium."""

from typing import Any

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

WAIT_SECONDS = 60  # for a busy machine


class ReportPage:
    def __init__(self, browser: webdriver.Chrome) -> None:
        self.browser = browser

    def open(self, address: str) -> None:
        self.browser.get(address)
        self.wait()

    def wait(self, condition: str = "true") -> None:
        """Until the page has drawn what it shows, and a JavaScript condition holds."""
        script = f"return document.body?.dataset.drawn === 'yes' && ({condition})"
        WebDriverWait(self.browser, WAIT_SECONDS).until(lambda browser: browser.execute_script(script))

    def run(self, script: str) -> Any:
        return self.browser.execute_script(script)

    def click(self, selector: str) -> None:
        self.browser.find_element(By.CSS_SELECTOR, selector).click()
        self.wait()

    def text(self, selector: str) -> str:
        return self.browser.find_element(By.CSS_SELECTOR, selector).text

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def drag(self, chart: str, start: int, width: int) -> None:
        """Press in a chart at `start` pixels from its middle, and release `width` pixels to the right."""
        over = self.browser.find_element(By.CSS_SELECTOR, f"#chart-{chart} .u-over")
        actions = ActionChains(self.browser).move_to_element_with_offset(over, start, 0)
        actions.click_and_hold().move_by_offset(width, 0).release().perform()
        self.wait()

    def point_at(self, selector: str, across: float, down: float) -> None:
        """Move the pointer to a place in an element, in parts of its width and height."""
        element = self.browser.find_element(By.CSS_SELECTOR, selector)
        self.browser.execute_script("arguments[0].scrollIntoView({ block: 'center' })", element)
        size = element.size
        right, below = (round((part - 0.5) * size[side]) for part, side in ((across, "width"), (down, "height")))
        ActionChains(self.browser).move_to_element_with_offset(element, right, below).perform()

    def press(self, *keys: str) -> None:
        """Press keys where the focus is."""
        ActionChains(self.browser).send_keys(*keys).perform()

    def shown_range(self, chart: str) -> tuple[float, float]:
        """From where to where a chart's axis reaches, as the page's own chart says."""
        script = "const { plot } = page.charts.find((one) => one.about.id === arguments[0]);"
        script += "return [plot.scales.x.min, plot.scales.x.max]"
        low, high = self.browser.execute_script(script, chart)
        return low, high

    def swatches(self, chart: str) -> dict[str, str]:
        """How the legend shows each of a chart's curves, by its name: the style of its swatch."""
        script = "const rows = [...document.querySelectorAll(`#chart-${arguments[0]} .u-series:not(.band)`)].slice(1);"
        script += "const of = (row, name) => row.querySelector(name);"
        script += "return rows.map((row) => [of(row, '.u-label').textContent, of(row, '.u-marker').style.cssText])"
        return dict(self.browser.execute_script(script, chart))

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.browser.get_log("browser")]
