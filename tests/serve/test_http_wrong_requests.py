"""Requests that are refused: always with a status, and a line that names what is wrong and what is accepted."""

import http.client
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import NAME, Served, connected, rest_of, save_tiny, serving

from p828.serve.api.fields import UNSUPPORTED
from p828.serve.api.requests import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from p828.serve.http.body import MOST_BYTES
from p828.serve.http.host_check import local_hosts

PATHS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]
JSON = {"Content-Type": "application/json"}
TALK = [{"role": "user", "content": "hi"}]


def refused(response: httpx.Response) -> dict[str, Any]:
    """The error of a response that is OpenAI's shape."""
    assert 400 <= response.status_code < 500, response.text
    error: dict[str, Any] = response.json()["error"]
    assert {*error} == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 700
    return error


@pytest.mark.parametrize(
    "fields, param, expected",
    [
        ({}, "prompt", "prompt is missing"),
        ({"prompt": 5}, "prompt", "prompt = 5: a text, a list of texts"),
        ({"prompt": []}, "prompt", r"prompt = \[\]: a text"),
        ({"prompt": ["a", 5]}, "prompt", "a list of token ids, or a list of such lists is accepted"),
        ({"prompt": [[1], "a"]}, "prompt", "is accepted"),
        ({"prompt": [True]}, "prompt", "is accepted"),
        ({"prompt": [5, 290]}, "prompt", r"the token id 290 is given: 0 to \d+ are accepted"),
        ({"prompt": [-1]}, "prompt", "token id -1"),
        ({"prompt": [10**4000]}, "prompt", "token id 1000"),
        ({"prompt": ["a"] * 129}, "prompt", "129 of them and n = 1 are given: at most 128"),
        ({"prompt": "cat " * 200}, "prompt", r"the prompt has \d+ tokens: at most 127 are accepted"),
        ({"prompt": "a", "n": 0}, "n", "n = 0: at least 1 is accepted"),
        ({"prompt": "a", "n": 129}, "n", "at most 128"),
        ({"prompt": "a", "best_of": 2}, "best_of", "answers are not ranked"),
        ({"prompt": "a", "best_of": 10**4000}, "best_of", "…: answers are not ranked"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens", "at least 0"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "accepted with echo"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", "a whole number is accepted"),
        ({"prompt": "a", "max_tokens": 10**400}, "max_tokens", "…: at most"),
        (
            {"prompt": "a", "temperature": -1},
            "temperature",
            "temperature = -1.0: a finite number of at least 0 is accepted",
        ),
        ({"prompt": "a", "temperature": "1"}, "temperature", "temperature = '1': a number is accepted"),
        ({"prompt": "a", "temperature": True}, "temperature", "a number is accepted"),
        ({"prompt": "a", "top_p": 0}, "top_p", "a fraction above 0 and up to 1"),
        ({"prompt": "a", "top_k": -1}, "top_k", "at least 0"),
        ({"prompt": "a", "min_p": 2}, "min_p", "a fraction from 0 to 1"),
        ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty", "from 0.001 to 1000"),
        (
            {"prompt": "a", "seed": 2**63},
            "seed",
            "a whole number from -9223372036854775808 to 9223372036854775807 is accepted",
        ),
        ({"prompt": "a", "stop": 5}, "stop", "a text or a list of texts"),
        ({"prompt": "a", "stop": ["a", ""]}, "stop", "of 1 to 256 characters"),
        ({"prompt": "a", "stop": ["a"] * 17}, "stop", "at most 16"),
        ({"prompt": "a", "stop": "a" * 257}, "stop", "1 to 256 characters"),
        ({"prompt": "a", "stream": 1}, "stream", "true or false is accepted"),
        ({"prompt": "a", "stream_options": {}}, "stream_options", "accepted with stream = true"),
        ({"prompt": "a", "stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown field"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "at most 20"),
        ({"prompt": "a", "logprobs": True}, "logprobs", "a whole number"),
        ({"prompt": "a", "echo": "yes"}, "echo", "true or false"),
        ({"prompt": "a", "temprature": 1}, "temprature", "did you mean temperature"),
        ({"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias", "not supported by this server"),
        ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty", "= 0.5: not supported by this server; 0 is"),
        ({"prompt": "a", "presence_penalty": False}, "presence_penalty", "0 is accepted"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
        ({"prompt": "a", "guided_json": {}}, "guided_json", "leave it out"),
        ({"prompt": "a", "user": 5}, "user", "text is accepted"),
    ],
)
def test_a_wrong_field_of_a_completion_is_named(
    http: httpx.Client, fields: dict[str, Any], param: str, expected: str
) -> None:
    error = refused(http.post("/v1/completions", json=fields))
    assert error["param"] == param
    assert re.search(expected, error["message"]), error["message"]


@pytest.mark.parametrize(
    "fields, param, expected",
    [
        ({}, "messages", "messages is missing"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hi"}, "messages", "a list is accepted"),
        ({"messages": ["hi"]}, "messages[0]", "an object is accepted"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role", "is missing"),
        ({"messages": [{"role": "human", "content": "hi"}]}, "messages[0].role", "'system', 'developer', 'user'"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "no content is given"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "text is accepted"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", '"type": "text"'),
        ({"messages": [{**TALK[0], "name": "me"}]}, "messages[0].name", "unknown field"),
        ({"messages": [*TALK, {"role": "assistant", "tool_calls": [{}]}]}, "messages", "writes no tool_calls"),
        ({"messages": [{"role": "user", "content": "hi " * 100}]}, "messages", "at most 127 are accepted"),
        ({"messages": TALK, "tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"messages": TALK, "response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"messages": TALK, "max_tokens": 0}, "max_tokens", "at least 1"),
        ({"messages": TALK, "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "says otherwise"),
        ({"messages": TALK, "top_logprobs": 1}, "top_logprobs", "accepted with logprobs"),
        ({"messages": TALK, "logprobs": 1}, "logprobs", "true or false"),
        ({"messages": TALK, "prompt": "a"}, "prompt", "unknown field 'prompt'"),
    ],
)
def test_a_wrong_field_of_a_chat_is_named(
    http: httpx.Client, fields: dict[str, Any], param: str, expected: str
) -> None:
    error = refused(http.post("/v1/chat/completions", json=fields))
    assert (error["param"], expected in error["message"]) == (param, True), error["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_what_the_template_refuses_tells_no_path_of_the_server(http: httpx.Client, path: str) -> None:
    messages = [*TALK, {"role": "assistant", "tool_calls": [{}]}]
    error = refused(http.post(path, json={"messages": messages}))
    assert error["message"] == "messages: the chat template refuses them: this chat template writes no tool_calls"


@pytest.mark.parametrize(
    "path, fields, expected",
    [
        ("/tokenize", {}, "prompt or messages is accepted"),
        ("/tokenize", {"prompt": "a", "messages": TALK}, "one of them"),
        ("/tokenize", {"messages": TALK, "add_generation_prompt": False}, "= false: true is accepted"),
        ("/detokenize", {"tokens": [1, "a"]}, "a list of token ids is accepted"),
        ("/detokenize", {"tokens": [290]}, "the token id 290 is given"),
    ],
)
def test_wrong_tokens_are_named(http: httpx.Client, path: str, fields: dict[str, Any], expected: str) -> None:
    assert expected in refused(http.post(path, json=fields))["message"]


@pytest.mark.parametrize(
    "body, expected",
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", r"a JSON object is accepted"),
        (b"null", "the body is null: a JSON object"),
        (b"\xff\xfe", "not UTF-8 text: byte 0"),
        (b'{"prompt": NaN}', "the body is not JSON: NaN is not a finite number"),
        (b'{"prompt": "a", "prompt": "b"}', 'the body is not JSON: "prompt" is given twice, as "a" and as "b"'),
        (b'{"prompt": "\\ud800"}', "half a surrogate pair"),
        (b'{"\\udc00": 1}', "half a surrogate pair"),
        (
            b'{"prompt": ' + b"9" * 5000 + b"}",
            "a number of 5,000 digits: at most 4,300 are accepted",
        ),
        (b'{"prompt": "a", "temperature": 1e999}', "1e999 is not a finite number"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"prompt": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}", "nested too deeply"),
        (b"{" + b",".join(b'"k%d":1' % n for n in range(50_000)) + b"}", "unknown field 'k0'"),
        (b'{"prompt": "a", "%s": 1}' % (b"k" * 500_000), "unknown field"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_no_request_is_refused(http: httpx.Client, body: bytes, expected: str) -> None:
    response = http.post("/v1/completions", content=body, headers=JSON)
    assert expected in refused(response)["message"]


def test_only_json_is_read(http: httpx.Client) -> None:
    """So a page of elsewhere cannot ask by a browser's form."""
    for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}):
        response = http.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
        assert response.status_code == 415
        assert "application/json is accepted" in refused(response)["message"]
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert http.post("/tokenize", content=b'{"prompt": "a"}', headers=headers).status_code == 200


def test_paths_and_methods_that_are_not_there(http: httpx.Client) -> None:
    assert http.get("/v1/embeddings").status_code == 404
    response = http.get("/v1/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert refused(response)["message"] == "'GET' '/v1/completions': POST is accepted"
    assert http.request("BREW", "/health").status_code == 405


def test_a_body_that_is_too_large_is_refused(http: httpx.Client, served: Served) -> None:
    response = http.post("/v1/completions", content=b'{"prompt": "' + b"a" * MOST_BYTES + b'"}', headers=JSON)
    assert response.status_code == 413
    assert "at most 1,048,576 bytes" in refused(response)["message"]

    def pieces() -> Iterator[bytes]:
        for _ in range(20):
            yield b"a" * (MOST_BYTES // 10)

    assert http.post("/v1/completions", content=pieces(), headers=JSON).status_code == 413
    assert http.get("/health").json() == {"status": "ok"}


def test_a_large_prompt_that_is_accepted_by_size_is_refused_by_its_tokens(http: httpx.Client) -> None:
    ids = [1] * 300_000
    assert "the prompt has 300,000 tokens" in refused(http.post("/v1/completions", json={"prompt": ids}))["message"]
    assert http.post("/detokenize", json={"tokens": ids}).status_code == 200
    text = "the cat " * 120_000
    assert "tokens: at most 127" in refused(http.post("/v1/completions", json={"prompt": text}))["message"]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = {
    path: sorted({*kind.model_fields, *UNSUPPORTED} - {"model"})
    for path, kind in zip(PATHS, [CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest], strict=True)
}
SENSIBLE: dict[str, Any] = {"prompt": "a", "messages": TALK, "tokens": [1], "max_tokens": 1}


def ask_anything(http: httpx.Client, path: str, data: st.DataObject) -> None:
    """A request with some fields of any value, which is answered or refused."""
    names = data.draw(st.lists(st.sampled_from(FIELDS[path]) | st.text(max_size=6), max_size=3))
    sensible = {name: value for name, value in SENSIBLE.items() if name in FIELDS[path]}
    body = {**sensible, **{name: data.draw(ANYTHING) for name in names}}
    response = http.post(path, content=json.dumps(body).encode(), headers=JSON)
    if response.status_code != 200:
        refused(response)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_of_any_field_is_answered_or_refused(http: httpx.Client, path: str, data: st.DataObject) -> None:
    ask_anything(http, path, data)


@pytest.mark.long
@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_many_values_of_any_field_are_answered_or_refused(http: httpx.Client, path: str, data: st.DataObject) -> None:
    ask_anything(http, path, data)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1e300},
        {"temperature": 1e-300},
        {"top_p": 1e-300},
        {"min_p": 1},
        {"top_k": 2**31 - 1},
        {"repetition_penalty": 1000},
        {"repetition_penalty": 0.001, "temperature": 1e-4},
        {"seed": -(2**63)},
        {"max_tokens": 2**31 - 1},
        {"stop": ["\U0001f642" * 256] * 16},
    ],
)
def test_the_ends_of_what_is_accepted_are_answered(http: httpx.Client, fields: dict[str, Any]) -> None:
    response = http.post("/v1/completions", json={"prompt": "the cat", "max_tokens": 4, "logprobs": 1, **fields})
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] >= 1


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=64) | st.text(max_size=64).map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes_are_refused(http: httpx.Client, content: bytes) -> None:
    refused(http.post("/v1/completions", content=content, headers=JSON))


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nz\r\n",
    ],
    ids=range(6),
)
def test_what_is_no_http_is_answered_so(served: Served, http: httpx.Client, request_bytes: bytes) -> None:
    with connected(served) as connection:
        connection.sendall(request_bytes)
        head, _, content = rest_of(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    error = refused(httpx.Response(400, content=content))
    assert error["message"] == "this is no request of HTTP/1.1, or its head has more than 16,384 bytes"
    assert http.get("/health").status_code == 200


def test_a_key_is_asked_for(chat_run: Path) -> None:
    with serving(chat_run, api_key="a-key") as own, httpx.Client(base_url=own.url) as client:
        for header in (None, "a-key", "Bearer", "Bearer a-kez", "Bearer a-key2", "Basic a-key", "Bearer ä"):
            headers = {} if header is None else {"Authorization": header.encode()}
            for path in ("/v1/models", "/metrics", "/v1/completions", "/tokenize", "/nowhere"):
                response = client.get(path, headers=headers)
                assert response.status_code == 401, (header, path)
                assert response.headers["www-authenticate"] == "Bearer"
                refused(response)
        for path in ("/", "/health", "/page.js"):
            assert client.get(path).status_code == 200, path
        headers = {"Authorization": "Bearer a-key"}
        assert client.get("/v1/models", headers=headers).json()["data"][0]["id"] == NAME
        assert client.post("/tokenize", json={"prompt": "a"}, headers=headers).json()["count"] == 1


def test_a_request_to_another_name_is_refused(chat_run: Path) -> None:
    """A browser sends one where a page of elsewhere has made its own name lead here."""
    with serving(chat_run, hosts=local_hosts("My-Machine")) as own, httpx.Client(base_url=own.url) as client:
        port = own.url.rpartition(":")[2]
        for name in ("localhost", "127.0.0.1", "[::1]", "my-machine", "LOCALHOST"):
            for host in (name, f"{name}:{port}", f"{name}:1"):
                assert client.get("/health", headers={"Host": host}).status_code == 200, host
        for host in (
            "elsewhere.com",
            f"elsewhere.com:{port}",
            "localhost.elsewhere.com",
            "127.0.0.2",
            "[::2]",
            "",
            ":",
        ):
            for path in ("/health", "/", "/v1/models", "/v1/completions", "/nowhere"):
                response = client.get(path, headers={"Host": host})
                assert response.status_code == 403, (host, path)
                assert refused(response)["code"] == "wrong_host"
        accepted = "127.0.0.1, [::1], localhost, my-machine are accepted, with any port, as the server has no key"
        line = client.get("/", headers={"Host": "elsewhere.com"}).json()["error"]["message"]
        assert line == f"Host: 'elsewhere.com' is given: {accepted}"
    assert "[::1%1]" in local_hosts("::1%1")


def test_a_run_without_a_template_does_not_chat(tmp_path: Path) -> None:
    with serving(save_tiny(tmp_path / "run", chat=False)) as own, httpx.Client(base_url=own.url) as client:
        for path, fields in (("/v1/chat/completions", {"messages": TALK}), ("/tokenize", {"messages": TALK})):
            error = refused(client.post(path, json=fields))
            assert "has no chat template: it was not trained on conversations" in error["message"]
        assert client.get("/v1/models").json()["data"][0]["chat"] is False


def test_texts_and_tokens_go_both_ways(served: Served, http: httpx.Client) -> None:
    tokenizer = served.loaded.tokenizer
    text = "the cat 🙂 <|endoftext|>"
    found = http.post("/tokenize", json={"prompt": text, "return_token_strs": True, "model": NAME}).json()
    assert found["tokens"] == tokenizer.encode(text)
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 128)
    assert found["token_strs"][:2] == ["the", " cat"]
    assert http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    asked = http.post("/tokenize", json={"messages": TALK}).json()
    assert asked["token_strs"] is None
    chat = http.post("/v1/chat/completions", json={"messages": TALK, "max_tokens": 1}).json()
    assert asked["count"] == chat["usage"]["prompt_tokens"]


def test_head_and_expectations(served: Served) -> None:
    """curl asks first whether it may send a body of more than a kilobyte."""
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"))
    body = json.dumps({"prompt": "a"}).encode()
    connection.request("POST", "/tokenize", body, {**JSON, "Expect": "100-continue"})
    assert connection.getresponse().status == 200
    connection.close()
