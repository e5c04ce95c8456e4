"""Runs on conversations: the loss, what they learn, kills, and what they keep of the chat template."""

import dataclasses
import io
import itertools
import json
import shutil
from pathlib import Path

import pytest
import tomli_w
import torch

import p828
from chat_templates import TEMPLATES, talk
from conversations import chat_config, chat_values, colours, write_conversations
from oracles import assert_near, naive_loss
from p828.api import build_engine, train_run
from p828.cli.main import dispatch
from p828.data.build import tokenizer_of
from p828.data.loader import open_loader
from p828.data.text.conversation_packing import ConversationPacker
from p828.data.text.open import open_training
from p828.errors import ConfigError
from p828.model.transformer import Transformer
from runs import start, wait_for_step, write_text
from same_run import assert_same_run


def test_loss_and_gradients_are_those_of_the_conversations_one_by_one(tmp_path: Path) -> None:
    """A step on all conversations, packed, and each alone in float64."""
    config = chat_config(tmp_path)
    tokenizer = tokenizer_of(config)
    documents = open_training(config.data, 0, epochs=1, template=tokenizer.template)
    rows = len(list(ConversationPacker(documents, tokenizer, config.data.sequence_length)))
    train = dataclasses.replace(config.train, micro_batch_size=1, gradient_accumulation=rows)
    engine = build_engine(dataclasses.replace(config, train=train), tokenizer)
    twin = Transformer(dataclasses.replace(engine.model.config, attention_backend="reference"))
    twin.load_state_dict(engine.model.state_dict())
    twin.double()
    with open_loader(config.data, train, tokenizer, mask_documents=True) as loader:
        batches = [next(loader) for _ in range(rows)]
    targets = sum(batch.num_targets for batch in batches)
    for batch in batches:
        engine.forward_backward(batch, targets)
    gradients = {name: engine.gradients.sums[p].clone() for name, p in engine.model.named_parameters()}

    assert tokenizer.template is not None
    encoded = tokenizer.encode_marked([tokenizer.template.marked(messages) for messages in colours()])
    nats, count = torch.zeros((), dtype=torch.float64), 0
    for tokens in encoded:
        ids = torch.from_numpy(tokens["id"].copy())
        wanted = torch.where(torch.from_numpy(tokens["is_target"].copy()), ids, -100)[1:]
        hidden = twin(ids[None, :-1], dtype=torch.float64).hidden_BSH[0]
        nats = nats + naive_loss(hidden, twin.head_weight, wanted)
        count += int((wanted != -100).sum())
    assert count == targets
    loss = nats / count
    loss.backward()
    assert engine.gradients.totals["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in twin.named_parameters():
        # float32 over the rows of a step, on the largest gradients of order 1
        assert_near(gradients[name], parameter.grad, 1e-5)


def test_rows_without_a_target_are_trained_on_and_change_no_loss(tmp_path: Path) -> None:
    """A question longer than a row leaves rows that the assistant says nothing in."""
    config = chat_config(tmp_path, data={"sequence_length": 24, "shuffle_rows": 1})
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch_size=1))
    tokenizer, lines = tokenizer_of(config), []
    write_conversations(tmp_path / "talk.jsonl", [talk("012345" * 10, "red")])
    engine = build_engine(config, tokenizer)
    with open_loader(config.data, config.train, tokenizer, mask_documents=True) as loader:
        for batch in itertools.islice(loader, 6):
            engine.forward_backward(batch, max(batch.num_targets, 1))
            result = engine.step(1e-3)
            assert result.applied
            lines.append((batch.num_targets, result.loss))
    assert (0, 0.0) in lines
    assert any(targets > 0 and loss > 1 for targets, loss in lines)


def test_kill_9_while_training_on_conversations_changes_nothing(tmp_path: Path) -> None:
    """With a source of text beside them, and several streams."""
    values = chat_values(tmp_path)
    own = {key: values["data"].pop(key) for key in ("source", "files", "messages_field")}
    text = {"name": "text", "weights": [0.5], "source": "files", "files": [str(write_text(tmp_path / "text", 20))]}
    values["data"] |= {"mixture": [{"name": "talk", "weights": [1.0], **own}, text], "streams": 2}
    values |= {"train": {**values["train"], "steps": 30}, "checkpoint": {"every": 7}}
    path = tmp_path / "chat.toml"
    path.write_text(tomli_w.dumps(values))
    arguments = ["train", str(path), "--runs-dir", str(tmp_path / "runs"), "--name"]
    assert dispatch([*arguments, "whole"]) == 0
    for step in (4, 18):
        process = start(*arguments, "killed", cwd=tmp_path)
        wait_for_step(process, step)
        process.kill()
        process.communicate()
    assert dispatch([*arguments, "killed"]) == 0
    assert_same_run(tmp_path / "runs" / "whole", tmp_path / "runs" / "killed", step=30)
    last = [line for line in p828.load_run(tmp_path / "runs" / "whole").records if line["kind"] == "step"][-1]
    assert sum(last["source_tokens"].values()) == last["tokens"]
    assert last["source_tokens"]["talk"] > last["source_tokens"]["text"] > 0


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> p828.Run:
    """A run that knows everyone's colour."""
    train = {"steps": 120, "micro_batch_size": 8, "gradient_accumulation": 1}
    place, model = tmp_path_factory.mktemp("learned"), {"attention_sinks": False}  # which glm4_moe has not
    return train_run(chat_config(place, train=train, model=model, checkpoint={"every": 100}))


def test_a_start_says_how_conversations_are_written(learned: p828.Run) -> None:
    said = (learned.path / "log.txt").read_text()
    assert "conversations are written by the chat template chatml; an answer ends in '<|im_end|>'" in said


def test_a_run_learns_to_answer(learned: p828.Run, capsys: pytest.CaptureFixture[str]) -> None:
    for messages in colours(12):
        assert learned.answer(messages[:-1], temperature=0) == messages[-1]["content"]
    asked = ["--prompt", "Ka?", "--prompt", "Ri?", "--temperature", "0"]
    assert dispatch(["generate", str(learned.path), "--prompt", "ab", "--max-new-tokens", "1"]) == 0
    assert "p828: trained on conversations: --chat asks it, and here its text is continued\n" in capsys.readouterr().err
    assert dispatch(["generate", str(learned.path), "--chat", *asked]) == 0
    out, err = capsys.readouterr()
    assert out == "--- 1: Ka?\nred\n--- 2: Ri?\nblue\n"
    assert "trained on conversations" not in err


def test_a_file_of_messages_is_answered(learned: p828.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --chat, since a line says what it is; a text beside messages needs it."""
    asked, output = tmp_path / "asked.jsonl", tmp_path / "answers.jsonl"
    lines = [{"messages": messages[:-1], "wanted": messages[-1]["content"]} for messages in colours(6)]
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["generate", str(learned.path), "--prompts", str(asked), "--temperature", "0"]
    assert dispatch([*flags, "--output", str(output)]) == 0
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["text"], line["finish_reason"]) for line in answers] == [(line["wanted"], "end") for line in lines]
    assert [line["messages"] for line in answers] == [line["messages"] for line in lines]
    assert dispatch([*flags, "--prompt", "Ri?"]) == 2
    assert dispatch([*flags, "--prompt", "Ri?", "--chat"]) == 0
    assert capsys.readouterr().out.startswith(f"6 completions in {output}\n--- 1: Ri?\nblue\n--- 2: ")


def test_what_is_typed_is_one_conversation(
    learned: p828.Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second question is only ever asked behind a first one."""
    monkeypatch.setattr("sys.stdin", io.StringIO("Ri?\nAnd Ka?\n"))
    assert dispatch(["generate", str(learned.path), "--chat", "--interactive", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "blue\nred\n"


def test_a_conversation_that_outgrows_the_context_slides(
    learned: p828.Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["generate", str(learned.path), "--chat", "--interactive", "--temperature", "0", "--max-new-tokens", "4"]
    lines = learned.config.model.max_position_embeddings // 4
    for more, refuses in (([], True), (["--slide"], False)):
        monkeypatch.setattr("sys.stdin", io.StringIO("Ri?\n" * lines))
        assert dispatch([*flags, *more]) == 0
        out, err = capsys.readouterr()
        assert ("the conversation so far is part of it" in err) == refuses
        assert (len(out.splitlines()) < lines) == refuses
    messages = [*colours(1)[0][:-1] * lines]
    assert learned.answer(messages, temperature=0, slide=True, max_new_tokens=5)
    with pytest.raises(ConfigError, match="the prompt has"):
        learned.answer(messages, temperature=0)


def test_records_of_a_run_on_conversations(learned: p828.Run) -> None:
    *_, before, last = (line for line in learned.records if line["kind"] == "step")
    assert 0 < last["targets"] < last["tokens"] - before["tokens"]
    (amount,) = (line["sources"][0] for line in learned.records if line["kind"] == "data")
    template = learned.tokenizer.template
    assert template is not None
    encoded = learned.tokenizer.encode_marked([template.marked(messages) for messages in colours()])
    assert amount["tokens"] == sum(map(len, encoded))
    assert amount["epochs"] == pytest.approx(120 * learned.config.tokens_per_step / amount["tokens"])


def test_an_export_answers_in_transformers_with_its_template(learned: p828.Run, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from p828.interchange.export import export_model

    export_model(learned.path, tmp_path / "export", native_only=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    for messages in colours(6):
        asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_tensors="pt")
        found = model.generate(**asked, max_new_tokens=20, do_sample=False)[0, asked["input_ids"].shape[1] :]
        assert tokenizer.decode(found) == learned.answer(messages[:-1], temperature=0) + "<|im_end|>"


def test_what_a_run_keeps_of_its_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of one's own, whose markers become tokens; it is in the run and in each checkpoint, and stays the same."""
    monkeypatch.chdir(tmp_path)
    Path("phi.jinja").write_text(TEMPLATES["phi"])
    config = chat_config(
        tmp_path, tokenizer={"chat_template": "phi.jinja"}, train={"steps": 2}, checkpoint={"every": 1}
    )
    run = train_run(config)
    assert "<|end|>" in run.tokenizer.special_tokens
    kept = json.loads((run.path / "tokenizer_config.json").read_text())
    assert kept["chat_template"] == TEMPLATES["phi"]
    checkpoint = run.path / "checkpoints" / "step_00000002"
    assert json.loads((checkpoint / "tokenizer_config.json").read_text()) == kept
    shutil.copytree(checkpoint, tmp_path / "alone")
    assert p828.load_run(tmp_path / "alone").tokenizer.template is not None

    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3))
    Path("phi.jinja").write_text("something else")  # the run has its own
    (run.path / "tokenizer_config.json").unlink()
    train_run(longer)
    assert json.loads((run.path / "tokenizer_config.json").read_text()) == kept
    (run.path / "tokenizer_config.json").write_text(json.dumps({**kept, "chat_template": TEMPLATES["qwen"]}))
    with pytest.raises(ConfigError, match="trained with another chat template than the run's"):
        train_run(longer)


def test_a_tokenizer_from_elsewhere_brings_its_template_or_gets_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trained = tokenizer_of(chat_config(tmp_path, tokenizer={"chat_template": "zephyr"}))
    trained.save(tmp_path / "base" / "tokenizer.json")
    named = {"tokenizer": {"name": str(tmp_path / "base")}}
    plain = tokenizer_of(chat_config(tmp_path, **named))
    assert plain.template is not None
    assert plain.template.end_token == "<|endoftext|>"
    assert plain.end_ids == (plain.eos_id,)
    with pytest.raises(ConfigError, match='chat_template = "chatml": the tokenizer has no special token'):
        tokenizer_of(chat_config(tmp_path, tokenizer={"name": str(tmp_path / "base"), "chat_template": "chatml"}))
    with pytest.raises(ConfigError, match=r"'chatlm': chatml, zephyr or the path .* did you mean chatml"):
        tokenizer_of(chat_config(tmp_path, tokenizer={"chat_template": "chatlm"}))

    own = "{% for m in messages %}{{ bos_token + m.role + m.content + eos_token }}{% endfor %}"
    own += "{% if add_generation_prompt %}{{ bos_token }}assistant{% endif %}"
    config = {"chat_template": [{"name": "default", "template": own}], "bos_token": {"content": "<b>"}}
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = tokenizer_of(chat_config(tmp_path, **named))
    assert theirs.template is not None
    assert theirs.template.render(talk("a", "b")) == "<b>usera<|endoftext|><b>assistantb<|endoftext|>"
    (tmp_path / "base" / "chat_template.jinja").write_text(TEMPLATES["plain"])
    newer = tokenizer_of(chat_config(tmp_path, **named))
    assert newer.template is not None
    assert newer.template.render(talk("a", "b")) == "USER: a\n\nASSISTANT: b\n\n"
    cannot = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "base" / "chat_template.jinja").write_text(cannot)
    with pytest.raises(ConfigError, match=r"chat_template\.jinja: the chat template cannot be trained with: nothing"):
        tokenizer_of(chat_config(tmp_path, **named))
    (tmp_path / "base" / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja: not a chat template, line 1"):
        tokenizer_of(chat_config(tmp_path, **named))
