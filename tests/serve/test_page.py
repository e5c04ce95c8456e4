"""The page of `p828 serve` in headless Chromium, before a server that answers with a model which knows some HTML."""

import itertools
import math
import re
from collections.abc import Iterator

import pytest
from page_in_use import KEY, Page
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from serving import serving

import p828
from chat_templates import talk
from conversations import chat_config, write_conversations
from headless import chromium, needs_chromium
from p828.api import train_run
from runs import start

MARKUP = "<b>red</b> 🙂 <img src=x onerror=alert(1)>\n<i>"
SONG = "la " * 60
CUT_OFF = "Cut off after max tokens."

pytestmark = [
    needs_chromium,
    pytest.mark.xdist_group("page"),  # one browser and one model for all
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> p828.Run:
    """A run that answers "Colours?" with markup, and sings without an end."""
    place = tmp_path_factory.mktemp("run")
    train = {"steps": 100, "micro_batch_size": 4, "gradient_accumulation": 1}
    model = {"max_position_embeddings": 4096}
    config = chat_config(place, train=train, model=model, data={"sequence_length": 64}, checkpoint={"every": 100})
    talks = [talk("Colours?", MARKUP)] * 12 + [talk("Sing!", SONG)] * 4 + [talk("Sing!", "la", "Go on!", SONG)] * 4
    write_conversations(place / "talk.jsonl", talks)
    run = train_run(config)
    assert run.answer("Colours?", temperature=0) == MARKUP
    return run


@pytest.fixture(scope="module")
def address(run: p828.Run) -> Iterator[str]:
    with serving(run.path, KEY) as served:
        yield served.url + "/"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with chromium(tmp_path_factory.mktemp("browser")) as driver:
        yield driver


@pytest.fixture
def page(browser: webdriver.Chrome, address: str) -> Iterator[Page]:
    """Opened anew. At the end nothing has come from elsewhere, and the console has no complaint."""
    page = Page(browser, address)
    page.open()
    yield page
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert {"page.css", "page.js"} <= {name.removeprefix(address) for name in loaded}
    assert all(name.startswith(address) for name in loaded)
    said = [entry["message"] for entry in browser.get_log("browser")]
    assert [line for line in said if "the server responded with a status of 4" not in line] == []


def test_an_answer_comes_with_the_probability_of_each_token(page: Page) -> None:
    page.choose("completion", max_tokens=40, temperature=1.5, seed=3)
    page.ask("la")
    page.wait()
    wanted = {"prompt": "la", "max_tokens": 40, "temperature": 1.5, "seed": 3, "logprobs": 5}
    (choice,) = page.ask_server("v1/completions", **wanted)["choices"]
    assert "".join(page.texts(".token")) == choice["text"]
    probabilities = [math.exp(value) for value in choice["logprobs"]["token_logprobs"]]
    levels = [sum(p >= least for least in (0.02, 0.1, 0.3, 0.6, 0.9)) for p in probabilities]
    assert [int(token.get_attribute("data-level") or "") for token in page.tokens()] == levels
    assert len(set(levels)) > 1
    speed = re.fullmatch(r"(\d+) tokens, [\d.]+ tokens/s, first after \d+ ms", page.at("speed").text)
    assert speed is not None
    assert int(speed[1]) == len(levels)


def test_a_focused_token_tells_its_alternatives_and_experts(page: Page) -> None:
    """Sending, reaching a token and reading of it, by keys alone."""
    page.choose("completion", max_tokens=12, temperature=0)
    page.ask("la")
    page.wait()
    (choice,) = page.ask_server("v1/completions", prompt="la", max_tokens=12, temperature=0, logprobs=5, experts=True)[
        "choices"
    ]
    for _ in range(10):
        page.press(Keys.SHIFT, Keys.TAB, Keys.NULL)
        if page.focused().get_attribute("role") == "option":
            break
    page.press(Keys.END)
    page.press(Keys.HOME)
    page.press(Keys.ARROW_RIGHT)
    page.press(Keys.ARROW_RIGHT)
    page.press(Keys.ARROW_LEFT)
    focused = page.focused()
    assert focused.id == page.tokens()[1].id
    assert focused.get_attribute("tabindex") == "0"
    assert [token.get_attribute("tabindex") for token in page.tokens()].count("0") == 1
    likeliest = sorted(choice["logprobs"]["top_logprobs"][1].items(), key=lambda item: -item[1])
    assert page.texts("#likeliest th") == [text.replace(" ", "␣").replace("\n", "⏎") for text, _ in likeliest]
    shares = [math.exp(value) for _, value in likeliest]
    shown = [float(text.strip("< %")) / 100 for text in page.texts("#likeliest .number")]
    assert shown == pytest.approx(shares, abs=0.001)
    assert logprob_shown(choice["logprobs"]["token_logprobs"][1]) in page.at("token").text
    assert page.texts("#experts td:nth-child(2)") == [" ".join(map(str, layer)) for layer in choice["experts"][1]]
    strips = page.driver.execute_script(
        "return [...document.querySelectorAll('.strip')].map((strip) => [...strip.children].map((i) => i.title))"
    )
    assert strips == [[f"expert {expert}" for expert in layer] for layer in choice["experts"][1]]
    page.press(Keys.HOME)
    assert choice["experts"][0] is None
    assert "reading the prompt gave this token" in page.at("token").text


def test_markup_is_text_whoever_wrote_it(page: Page) -> None:
    page.choose("chat", temperature=0)
    page.ask("Colours?")
    page.wait()
    assert page.texts(".answer") == [MARKUP]
    assert page.texts(".end") == ["The model ended its answer."]
    texts = page.texts(".token")
    emoji = next(index for index, text in enumerate(texts) if "🙂" in text)
    assert texts[emoji - 1] == ""  # some of its bytes, without text of their own
    assert texts[-1] == ""
    page.tokens()[-1].click()
    assert page.at("token").text.startswith("<|im_end|>")
    page.choose("completion", max_tokens=3)
    page.ask(MARKUP.replace("🙂", ":)"))  # chromedriver types no characters beyond the first 65,536
    page.wait()
    assert page.texts(".asked") == [MARKUP.replace("🙂", ":)")]
    assert page.elements("main b, main img, main i:not(.break, .strip i)") == []


def test_no_script_but_the_page_s_own_runs(page: Page) -> None:
    page.driver.execute_script("document.body.append(Object.assign(document.createElement('script'), {text: 'x = 1'}))")
    assert page.driver.execute_script("return typeof x") == "undefined"
    entry = page.driver.get_log("browser")[-1]
    assert "violates the following Content Security Policy" in entry["message"]


def test_a_conversation_goes_on_until_a_new_one(page: Page) -> None:
    page.choose("chat", temperature=0, max_tokens=20)
    page.ask("Colours?")
    page.wait()
    page.ask("Sing!")
    page.wait()
    assert page.texts(".asked") == ["Colours?", "Sing!"]
    first, second = page.texts(".answer")
    messages = talk("Colours?", first, "Sing!")
    wanted = {"messages": messages, "temperature": 0, "max_tokens": 20, "logprobs": True}
    (choice,) = page.ask_server("v1/chat/completions", **wanted)["choices"]
    assert second == choice["message"]["content"]
    page.elements(".turn:last-child .token")[0].click()
    assert logprob_shown(choice["logprobs"]["content"][0]["logprob"]) in page.at("token").text
    page.at("forget").click()
    assert page.texts(".turn") == []
    page.ask("Sing!")
    page.wait()
    alone = page.ask_server("v1/chat/completions", messages=talk("Sing!"), temperature=0, max_tokens=20)
    assert page.texts(".answer") == [alone["choices"][0]["message"]["content"]]


def test_a_conversation_left_while_it_is_answered_is_forgotten(page: Page) -> None:
    page.choose("chat", temperature=0, max_tokens=1)
    page.ask("Sing!")
    page.wait()
    page.choose("chat", max_tokens=4000)
    page.ask("Go on!")
    page.until(lambda: "la la" in page.texts(".answer")[1])
    page.at("forget").click()
    page.wait()
    page.choose("chat", max_tokens=3)
    page.ask("Colours?")
    page.wait()
    wanted = {"messages": talk("Colours?"), "temperature": 0, "max_tokens": 3, "logprobs": True}
    (choice,) = page.ask_server("v1/chat/completions", **wanted)["choices"]
    page.tokens()[0].click()
    assert logprob_shown(choice["logprobs"]["content"][0]["logprob"]) in page.at("token").text


def test_escape_stops_the_answer_here_and_at_the_server(page: Page) -> None:
    page.choose("chat", temperature=0, max_tokens=4000)
    page.ask("Sing!")
    page.until(lambda: len(page.tokens()) > 5)
    page.press(Keys.ESCAPE)
    page.wait()
    assert page.texts(".end") == ["Stopped."]
    assert len(page.tokens()) < 3000
    running = re.compile(r"^vllm:num_requests_running\{.*\} 0\.0$", re.MULTILINE)
    page.until(lambda: running.search(page.read_server("metrics")))
    page.at("forget").click()
    page.choose("chat", max_tokens=5)
    page.ask("Sing!")
    page.wait()
    assert page.texts(".end") == [CUT_OFF]


def test_what_the_server_refuses_is_shown(page: Page) -> None:
    page.choose("completion", max_tokens=3, temperature=0, top_p=0)
    page.ask("la")
    page.wait()
    assert page.at("error").text == "top_p = 0.0: a fraction above 0 and up to 1 is accepted (400)"
    page.choose("completion", top_p=1)
    page.ask("la")
    page.wait()
    assert not page.at("error").is_displayed()
    assert page.texts(".end") == [CUT_OFF]


def test_a_server_that_dies_is_told_and_the_answer_kept(browser: webdriver.Chrome, run: p828.Run) -> None:
    (run.path / "key").write_text(KEY)
    flags = ["--port", "0", "--api-key-file", "key", "--device", "cpu"]
    with start("serve", str(run.path), *flags, cwd=run.path) as server:
        assert server.stdout is not None
        try:
            page = Page(browser, next(line.split()[1] for line in server.stdout if line.startswith("page")))
            page.open()
            page.choose("chat", temperature=0, max_tokens=4000)
            page.ask("Sing!")
            page.until(lambda: len(page.tokens()) > 5)
        finally:
            server.kill()
        page.wait()
    assert page.at("error").text == "The server cannot be reached."
    assert page.texts(".end") == ["Ended by an error."]
    assert page.texts(".answer")[0].startswith("la la")
    browser.get_log("browser")  # Chromium's own line about it


def test_settings_out_of_range_are_not_sent(page: Page) -> None:
    page.choose("completion", temperature=-1)
    page.ask("la")
    assert page.at("settings").get_attribute("open") is not None
    assert page.focused().get_attribute("id") == "temperature"
    assert page.tokens() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_levels_differ_in_lightness_and_are_readable(page: Page, scheme: str) -> None:
    """Contrast by WCAG 2.2, whose least for text is 4.5."""
    page.set_media("prefers-color-scheme", scheme)
    ground = relative_luminance(page.style("body", "background-color"))
    assert (ground > 0.5) == (scheme == "light")
    luminances = [ground]
    for level in range(4, -1, -1):
        swatch = f"#legend [data-level='{level}']"
        luminances.append(relative_luminance(page.style(swatch, "background-color")))
        assert contrast(luminances[-1], relative_luminance(page.style(swatch, "color"))) >= 4.5
    assert luminances == sorted(luminances, reverse=scheme == "light")
    assert all(contrast(one, next_one) > 1.1 for one, next_one in itertools.pairwise(luminances))
    lines = [page.style(f"#legend [data-level='{level}']", "border-bottom") for level in range(4)]
    assert len(set(lines)) == 4
    for quiet in ("#model", ".hint", "#send"):
        behind = page.style(quiet, "background-color") if quiet == "#send" else page.style("body", "background-color")
        assert contrast(relative_luminance(page.style(quiet, "color")), relative_luminance(behind)) >= 4.5


def test_a_phone_shows_all_of_it(page: Page) -> None:
    page.set_size(360, 740)
    page.choose("chat", max_tokens=60, temperature=0)
    page.ask("Sing!")
    page.wait()
    assert not page.at("detail").is_displayed()
    page.tokens()[30].click()
    assert page.at("detail").is_displayed()
    line = page.focused().rect["y"]
    page.press(Keys.ARROW_UP)
    assert page.focused().rect["y"] < line
    page.press(Keys.ARROW_DOWN)
    assert page.focused().rect["y"] == line
    page.at("settings").click()
    assert page.driver.execute_script("return document.documentElement.scrollWidth") == 360
    for name in ("answers", "detail", "prompt", "send", "stop", "speed", "temperature"):
        box = page.at(name).rect
        assert 0 <= box["x"] < box["x"] + box["width"] <= 360, name
        assert box["height"] > 0, name
        assert box["y"] + box["height"] <= 740, name
    page.at("close").click()
    assert not page.at("detail").is_displayed()


def logprob_shown(logprob: float) -> str:
    number = f"{logprob:.3f}".replace("-", "−")
    return f"(log-probability {number})"


def relative_luminance(colour: str) -> float:
    """Of "rgb(…)", by WCAG 2.2."""
    channels = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)
