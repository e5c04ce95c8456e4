"""Conversations from a file or the hub to rows: what is refused, and what the rows hold."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_templates import talk
from conversations import chat_config, colours, write_conversations
from p828.api import load_config
from p828.config import DataConfig, ValidationConfig, validate
from p828.data.batch import NO_TARGET, PADDING
from p828.data.build import tokenizer_of, validation_batches
from p828.data.loader import open_loader
from p828.data.text.conversation_packing import ConversationPacker
from p828.data.text.open import open_in_order, open_training, open_validation
from p828.data.text.shard import BadRecord
from p828.data.tokenizer.chat_template import built_in
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.errors import ConfigError
from runs import run_config

GOOD = talk("a?", "b")


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_of(chat_config(tmp_path_factory.mktemp("chat")))


def data_of(path: Path, **changes: Any) -> DataConfig:
    validation = ValidationConfig(kind="files", files=(str(path),))
    fields = {"source": "files", "files": (str(path),), "messages_field": "messages", "sequence_length": 40}
    return DataConfig(**{**fields, "validation": validation, **changes})


BAD: list[tuple[Any, str]] = [
    ({"text": "a"}, "no field 'messages' (data.messages_field); fields here: text"),
    (["a"], "a JSON object with the field 'messages' is accepted, not list"),
    ({"messages": "a"}, "field 'messages' (data.messages_field) holds a text: a list of messages is accepted"),
    ({"messages": []}, "holds a list without entries: a list of messages is accepted"),
    ({"messages": ["a", "b"]}, "message 1 is a text: an object with role and content is accepted"),
    (
        {"messages": [{"from": "human", "value": "a"}]},
        "message 1 has no role, as 'from' and 'value': system, developer",
    ),
    ({"messages": [*talk("a"), {"role": "assistent", "content": "b"}]}, "role 'assistent'"),
    ({"messages": [*talk("a"), {"role": "assistent", "content": "b"}]}, "did you mean assistant?"),
    ({"messages": [{"role": 5, "content": "a"}]}, "message 1 has the role '5'"),
    ({"messages": [*talk("a", "b"), {"role": "user", "content": ["c"]}]}, "message 3: content is a list: text is"),
    ({"messages": [*talk("a"), {"role": "assistant", "content": 5}]}, "message 2: content is a number: text is"),
    ({"messages": [{"role": "user"}, *talk("a", "b")]}, "message 1 (user) has no content"),
    ({"messages": talk("a", " \n")}, "message 2: the assistant says nothing"),
    ({"messages": [*talk("a"), {"role": "assistant", "content": None}]}, "message 2: the assistant says nothing"),
    ({"messages": talk("a")}, "no message is the assistant's, so there is nothing to learn to say"),
    ({"messages": talk("a", "b")[1:]}, "the conversation begins with the assistant, which answers nothing"),
    ({"messages": [*talk("a"), {"role": "assistant", "tool_calls": [{}]}]}, "refuses it: this chat template writes no"),
]


@pytest.mark.parametrize("line, said", BAD)
def test_a_line_that_is_no_conversation_is_a_bad_record(tmp_path: Path, line: Any, said: str) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"messages": GOOD}, line, {"messages": GOOD}])))
    documents = open_in_order(data_of(path))
    with pytest.raises(BadRecord, match=re.escape(f"{path}:2: ") + ".*" + re.escape(said)):
        list(documents)
    skipping = open_in_order(data_of(path, bad_records="skip"))
    assert len(list(skipping)) == 2
    assert skipping.bad_records == 1


def test_what_the_template_raises_is_a_bad_record(tmp_path: Path) -> None:
    template = built_in("zephyr", "</s>", ["</s>"])
    path = write_conversations(tmp_path / "talk.jsonl", [GOOD])
    (text,) = open_in_order(data_of(path), template=template)
    assert text == "<|user|>\na?\ufdd0</s>\n<|assistant|>\n\ufdd1b\ufdd0</s>\ufdd2\n"


def test_conversations_are_in_jsonl_files(tmp_path: Path) -> None:
    (tmp_path / "talk.txt").write_text("hello")
    with pytest.raises(ConfigError, match=r"data\.files: .*talk\.txt: with data\.messages_field, \.jsonl files are"):
        open_in_order(data_of(tmp_path / "talk.txt"))


@pytest.mark.parametrize(
    "data, said",
    [
        ({"source": "python"}, 'data.messages_field = "messages": accepted with data.source = "files" or "hf"'),
        ({"prepared": "x"}, 'data.messages_field = "messages": accepted without data.prepared'),
    ],
)
def test_a_configuration_that_cannot_be(tmp_path: Path, data: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        validate(chat_config(tmp_path, data=data | {"messages_field": "messages", "files": ["x"]}))


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("data.text_field", "body", 'accepted without data.messages_field = "messages", whose messages are the text'),
        ("data.packing", "best_fit", "accepted without data.messages_field; a row holds whole conversations"),
        ("data.source", "python", 'messages_field = "messages": accepted with data.source = "files" or "hf"'),
    ],
)
def test_keys_that_change_nothing_of_conversations_are_refused(key: str, value: str, said: str) -> None:
    given = {"data.files": ["talk.jsonl"], "data.messages_field": "messages", key: value}
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config("quickstart", given)


def test_the_hub_gives_the_same_conversations(tmp_path: Path) -> None:
    write_conversations(tmp_path / "hub" / "train.jsonl", colours(8))
    (tmp_path / "hub" / "train.jsonl").open("a").write('{"messages": [{"role": "user", "content": "a"}]}\n')
    local = data_of(tmp_path / "hub" / "train.jsonl", bad_records="skip")
    hub = data_of(tmp_path, source="hf", hub_name=str(tmp_path / "hub"), bad_records="skip")
    found = open_in_order(hub)
    assert list(found) == list(open_in_order(local))
    assert found.bad_records == 1
    with pytest.raises(BadRecord, match=r"row 9: no message is the assistant's"):
        list(open_in_order(data_of(tmp_path, source="hf", hub_name=str(tmp_path / "hub"))))


def rows_of(path: Path, tokenizer: Tokenizer, length: int) -> list[Any]:
    documents = open_training(data_of(path), seed=0, epochs=1, template=tokenizer.template)
    return list(ConversationPacker(documents, tokenizer, length))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(12, 60))
@settings(max_examples=15)
def test_every_conversation_is_whole_in_a_row_if_it_fits(
    tmp_path_factory: pytest.TempPathFactory, chat_tokenizer: Tokenizer, lengths: list[int], length: int
) -> None:
    conversations = [talk(f"{n}?", "ab" * n) for n in lengths]
    path = write_conversations(tmp_path_factory.mktemp("rows") / "talk.jsonl", conversations)
    template = chat_tokenizer.template
    assert template is not None
    encoded = chat_tokenizer.encode_marked([template.marked(messages) for messages in conversations])
    expected = sorted((tokens["id"].tolist(), tokens["is_target"].tolist()) for tokens in encoded)
    found, pieces = [], []
    for row in rows_of(path, chat_tokenizer, length):
        assert row.tokens.shape == row.is_target.shape == (length + 1,)
        assert not row.is_target[row.document_ids == PADDING].any()
        for document in range(row.document_ids.max() + 1):
            of_document = row.document_ids == document
            piece = row.tokens[of_document].tolist(), row.is_target[of_document].tolist()
            (found if len(piece[0]) <= length and piece[0][0] == expected[0][0][0] else pieces).append(piece)
    fitting = [one for one in expected if len(one[0]) <= length]
    assert sorted(one for one in found if one in fitting) == fitting
    tokens = sum(len(ids) for ids, _ in [*found, *pieces])
    assert tokens == sum(len(ids) for ids, _ in expected), "every token once"


def test_a_split_conversation_goes_on_without_a_target_at_its_beginning(
    tmp_path: Path, chat_tokenizer: Tokenizer
) -> None:
    path = write_conversations(tmp_path / "talk.jsonl", [talk("a?", "b" * 100), talk("c?", "d")])
    rows = rows_of(path, chat_tokenizer, 29)
    assert sum(row.documents for row in rows) == 2
    assert sum(row.split_documents for row in rows) == 1
    for row in rows:
        assert not row.is_target[np.flatnonzero(np.diff(row.document_ids, prepend=-1))].any()


def test_targets_of_a_batch_are_what_the_assistant_says(tmp_path: Path) -> None:
    config = chat_config(tmp_path)
    tokenizer = tokenizer_of(config)
    said = {f"{messages[i]['content']}" for messages in colours() for i in range(1, len(messages), 2)}
    with open_loader(config.data, config.train, tokenizer, mask_documents=True) as batches:
        for _, batch in zip(range(20), batches, strict=False):
            targets, documents = batch.targets_BS, batch.document_ids_BS
            assert batch.num_targets == (targets != NO_TARGET).sum()
            assert batch.source_tokens == ((documents != PADDING).sum(),)
            assert batch.num_targets < batch.source_tokens[0]
            for row in range(len(targets)):
                runs = np.split(targets[row].numpy(), np.flatnonzero(np.diff(targets[row] == NO_TARGET)) + 1)
                texts = {tokenizer.decode(run) for run in runs if run[0] != NO_TARGET}
                assert texts <= said
                ends = [run[-1] for run in runs if run[0] != NO_TARGET]
                assert set(ends) == {tokenizer.end_ids[1]}


def test_validation_counts_the_assistants_tokens_and_bytes_alone(tmp_path: Path) -> None:
    config = chat_config(tmp_path)
    tokenizer = tokenizer_of(config)
    batches = validation_batches(config.data, tokenizer, True, rows=100, micro_batch_size=2)
    said = [message["content"] for messages in colours() for message in messages if message["role"] == "assistant"]
    assert sum(batch.text_bytes for batch in batches) == sum(len(text.encode()) for text in said)
    assert sum(batch.num_targets for batch in batches) == sum(len(tokenizer.encode(text)) + 1 for text in said)


def test_a_tokenizer_without_a_template_writes_no_conversations(tmp_path: Path) -> None:
    config = chat_config(tmp_path)
    tokenizer = tokenizer_of(run_config(tmp_path))
    assert tokenizer.template is None
    with pytest.raises(ConfigError, match="the run's tokenizer has no chat template"):
        open_loader(config.data, config.train, tokenizer, mask_documents=True)


def test_the_held_out_conversations_are_whole_and_not_trained_on(tmp_path: Path) -> None:
    conversations = [talk(f"what is {n}?", f"it is {n * n}") for n in range(60)]
    path = write_conversations(tmp_path / "talk.jsonl", conversations)
    data = data_of(path, validation=ValidationConfig(fraction=0.3))
    training, held_out = set(open_training(data, 0, epochs=1)), set(open_validation(data))
    assert training.isdisjoint(held_out)
    assert training | held_out == set(open_in_order(data))
