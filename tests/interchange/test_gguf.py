import json
import resource
import shlex
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_server import continued, running, tokenized, written
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

import p828
from exported import EOS, letters, logits, save_model
from p828.cli.main import dispatch
from p828.config import ModelConfig, RopeScaling, TokenizerConfig
from p828.data.tokenizer.chat_template import built_in
from p828.data.tokenizer.division import CL100K, QWEN2
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokenizer.training import train_tokenizer
from p828.errors import ConfigError, DataError, RunFailed
from p828.interchange.architectures.llama_cpp import architecture_of
from p828.interchange.gguf import export_gguf
from p828.kernels.adamw import split_float32
from p828.model.precision import matrices
from p828.model.transformer import Transformer
from tiny import tiny_config, tiny_model

ROWS, TOKENS = 320, 40
PROMPT = [5, 290, 17, 44, 260, 9]
PLAIN = {"attention_sinks": False, "vocab_size": ROWS, "max_position_embeddings": 128}
OF_TEXT = {**PLAIN, "vocab_size": 640}
WAYS_OUT = "A model that is trained with --model.attention-sinks False or --model.n-shared-experts 0 is in one"
WITH_SINKS = {"attention_sinks": True, "n_shared_experts": 0}
HARD = [
    "", " ", "  ", "\n", "\r\n\r\n", "\t\t\n  x", "a  b   c \n\n  d \r\n e\t\f\v", "trailing   ", "   \n   \n",
    "    return x", "it's IT'S I'LL we'Re they'vE 'twas 'd 'x don't'll", "''s", "x''", "ÀÉ'S À'S 'é ’s",
    "1234567890 3.14e-10 ½ Ⅷ ٣٤٥ 一二三", "a1b2 3c", "naïve café cafe\u0301 Ångström ﬁ ß ẞ İ ı",
    "日本語のテキスト 한국어 ไทย हिन्दी עִבְרִית العَرَبِيَّة", "👩\u200d👩\u200d👦 🏳\ufe0f\u200d🌈 e\u20e3 \u200d\u200b\ufeff",
    "\u00a0x\u2003y\u3000z\u0085w\u2028v", "a\x00b\x1b[0m\x7f", "if(a==b){return!c;}//…\n\n\n#!$%&/()=?`´^°",
    "<|endoftext|> <|x|>", "__init__ snake_case CamelCase kebab-case a.b.c/d\\e", "=" * 300,
    "\ud7ff\ue000\ufffd\U0001f600\U0010ffff",
]  # fmt: skip
WORDS = "the model reads tokens and the router chooses experts for each of them, it's 12 of 345.\n\n    x = y  # z\r\n"


def trained(vocab_size: int = 600) -> Tokenizer:
    """With merges from the hard strings, so that a text divided elsewhere becomes other tokens."""
    return train_tokenizer(TokenizerConfig(vocab_size=vocab_size), [*HARD * 3, *[WORDS] * 20])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return trained(300)


def exported(
    directory: Path, model: Transformer, tokenizer: Tokenizer, dtype: Any = "float32"
) -> tuple[Path, Transformer]:
    """The file, and the model that it holds: tokens that are no whole characters are never its greedy choice.

    llama.cpp's server joins such a token with those behind it and then has no probabilities of it.
    """
    cut = [i for i in range(tokenizer.vocab_size) if "\ufffd" in tokenizer.decode([i]) or i == tokenizer.eos_id]
    with torch.no_grad():
        model.head_weight[cut] = 0
    file = directory / "model.gguf"
    export_gguf(save_model(directory / "run", model, tokenizer), file, dtype)
    return file, model


def difference(model: Transformer, file: Path) -> tuple[int, float]:
    """Greedy tokens that are the model's own, and the largest difference of a log-probability, in nats."""
    tokens, found = continued(running(file), PROMPT, TOKENS, ROWS)
    assert len(tokens) == TOKENS
    expected = logits(model, torch.tensor([PROMPT + tokens]))[0, len(PROMPT) - 1 : -1].log_softmax(dim=-1)
    return sum(a == b for a, b in zip(tokens, expected.argmax(dim=-1).tolist(), strict=True)), (
        (found - expected).abs().max().item()
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_qk_norm": True, "num_key_value_heads": 4, "tie_word_embeddings": True, "n_shared_experts": 2},
        {"rope_scaling": RopeScaling(4.0, 16), "use_qk_norm": True},  # 46 tokens, past the original context of 16
        {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
        {"n_group": 4, "topk_group": 4, "num_experts_per_tok": 1, "norm_topk_prob": False},
        {"scoring_func": "softmax", "rope_theta": 5e5, "rms_norm_eps": 1e-2},
        {**WITH_SINKS, "rope_theta": 5e5},
        {**WITH_SINKS, "n_group": 2, "tie_word_embeddings": True, "num_hidden_layers": 1},
        {"n_shared_experts": 0},
    ],
    ids=str,
)
def test_llama_cpp_has_the_models_tokens_and_probabilities(
    tmp_path: Path, tokenizer: Tokenizer, changes: dict[str, Any]
) -> None:
    file, model = exported(tmp_path, tiny_model(**{**PLAIN, **changes}), tokenizer)
    agreed, worst = difference(model, file)
    assert agreed == TOKENS
    assert worst <= 3e-5  # float32 sums in other orders, of logits up to 6: 5e-6 was measured, a wrong key gives 0.1


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Any model that one of the architectures is, of odd sizes too."""
    kv_heads, experts, groups = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3, 8, 48])), 1
    changes: dict[str, Any] = {
        "hidden_size": draw(st.sampled_from([8, 32, 40])),
        "moe_intermediate_size": draw(st.sampled_from([1, 7, 24])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "head_dim": draw(st.sampled_from([2, 8, 10])),
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * draw(st.sampled_from([1, 2, 4])),
        "rope_theta": draw(st.sampled_from([100.0, 1e4, 1e6])),
        "tie_word_embeddings": draw(st.booleans()),
        "n_routed_experts": experts,
    }
    if experts % 8 == 0:
        groups = draw(st.sampled_from([1, 2, 4]))
    topk_group = draw(st.integers(1, groups))
    most = min(experts // groups * topk_group, 4)
    changes |= {"n_group": groups, "topk_group": topk_group, "num_experts_per_tok": draw(st.integers(1, most))}
    if draw(st.booleans()):
        return {**changes, **WITH_SINKS, "attention_sinks": draw(st.booleans())}
    scaling = st.builds(RopeScaling, st.sampled_from([1.5, 4.0, 32.0]), st.sampled_from([8, 16, 64]))
    return changes | {
        "n_shared_experts": draw(st.integers(1, 3)),
        "use_qk_norm": draw(st.booleans()),
        "scoring_func": draw(st.sampled_from(["sigmoid", "softmax"])),
        "norm_topk_prob": draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "rope_scaling": draw(st.one_of(st.just(RopeScaling()), scaling)),
    }


def test_llama_cpp_has_any_models_tokens_and_probabilities(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer
) -> None:
    @settings(max_examples=10, deadline=None, derandomize=True)
    @given(configurations())
    def is_equal(changes: dict[str, Any]) -> None:
        model = tiny_model(**{**PLAIN, **changes})
        file, model = exported(tmp_path_factory.mktemp("any"), model, tokenizer)
        agreed, worst = difference(model, file)
        assert agreed == TOKENS
        assert worst <= 3e-5

    is_equal()


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.03), ("float16", 0.004)])
def test_fewer_bits(tmp_path: Path, tokenizer: Tokenizer, dtype: Any, tolerance: float) -> None:
    """llama.cpp rounds what enters a product, too, to 8 bits or 11. Here p828 has the rounded weights in float32."""
    file, model = exported(tmp_path, tiny_model(**PLAIN), tokenizer, dtype)
    with torch.no_grad():
        for _, parameter in matrices(model):
            parameter.copy_(split_float32(parameter)[0] if dtype == "bfloat16" else parameter.half())
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    kinds = {name: tensor.tensor_type.name for name, tensor in read.items()}
    kept = ("norm.weight", "ffn_gate_inp.weight", "exp_probs_b.bias")
    matrix = {"bfloat16": "BF16", "float16": "F16"}[dtype]
    assert kinds == {name: "F32" if name.endswith(kept) else matrix for name in kinds}
    stored = torch.from_numpy(read["blk.1.ffn_down_exps.weight"].data.copy()).view(getattr(torch, dtype))
    assert torch.equal(stored.float(), model.layers[1].mlp.experts.down_proj)
    _, worst = difference(model, file)
    assert worst <= tolerance


def of_pattern(pattern: Any, keeps_tokens: bool = False) -> Tokenizer:
    """The trained vocabulary behind another pattern; GPT-2's is the library's own."""
    spec = json.loads(trained().to_json())
    vocabulary = spec["model"]["vocab"]
    spec["added_tokens"][0]["id"] = len(vocabulary)  # the end token, behind the others as in those libraries' files
    vocabulary["unmerged"] = vocabulary.pop(EOS)  # a whole piece only with `ignore_merges`
    inner = tokenizers.Tokenizer.from_str(json.dumps(spec))
    level: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split: Any = None if pattern is None else pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    inner.pre_tokenizer = level if pattern is None else pre_tokenizers.Sequence([split, level])
    inner.model.ignore_merges = keeps_tokens
    inner.add_tokens(["kebab-case", "\n#"])
    return Tokenizer(inner, EOS)


@pytest.mark.parametrize(
    "made",
    [trained, lambda: of_pattern(None), lambda: of_pattern(QWEN2), lambda: of_pattern(CL100K),
     lambda: of_pattern(CL100K, True)],
    ids=["p828", "gpt-2", "qwen2", "dbrx", "llama-bpe"],
)  # fmt: skip
def test_llama_cpp_makes_the_same_tokens_of_hard_text(tmp_path: Path, made: Any) -> None:
    tokenizer: Tokenizer = made()
    file, _ = exported(tmp_path, tiny_model(**OF_TEXT), tokenizer)
    server = running(file)
    for text in [*HARD, "unmerged\nunmerged", "".join(HARD), "".join(reversed(HARD))]:
        assert tokenized(server, text) == tokenizer.encode(text), text


# llama.cpp has the characters of Unicode 15.1, and Python up to 3.12 those of 15.0 or before.
KNOWN = st.characters(exclude_categories=["Cs", "Cn"])
PIECE = st.one_of(st.sampled_from(HARD), st.text(KNOWN, max_size=4), st.sampled_from(list(" \n\r\t'sSdLl1a.é")))


def test_llama_cpp_makes_the_same_tokens_of_any_text(tmp_path: Path) -> None:
    tokenizer = trained()
    file, _ = exported(tmp_path, tiny_model(**OF_TEXT), tokenizer)
    server = running(file)

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(st.lists(PIECE, max_size=8).map("".join).filter(lambda text: "'ſ" not in text))
    def is_equal(text: str) -> None:
        assert tokenized(server, text) == tokenizer.encode(text)

    is_equal()


@pytest.mark.parametrize("name", ["chatml", "zephyr"])
def test_llama_cpp_writes_conversations_as_the_chat_template_does(tmp_path: Path, name: str) -> None:
    inner = tokenizers.Tokenizer.from_str(trained().to_json())
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = Tokenizer(inner, EOS)
    tokenizer.template = built_in(name, EOS, tokenizer.special_tokens)
    file, _ = exported(tmp_path, tiny_model(**OF_TEXT), tokenizer)
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": role, "content": f"{text} it's"} for role, text in zip(roles, HARD[6:], strict=False)]
    server = running(file)
    text = written(server, messages)
    assert text == tokenizer.template.render(messages, add_generation_prompt=True)
    (marked,) = tokenizer.encode_marked([tokenizer.template.prompt(messages)])
    assert tokenized(server, text, has_special_tokens=True) == marked["id"].tolist()
    ends = {"chatml": tokenizer.inner.token_to_id("<|im_end|>"), "zephyr": None}[name]
    field = gguf.GGUFReader(file).fields.get("tokenizer.ggml.eot_token_id")
    assert (field and field.contents()) == ends


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"attention_sinks": True}, ["glm4moe: sinks;", rf"mimo2: shared expert\. {WAYS_OUT}$"]),
        ({**WITH_SINKS, "use_qk_norm": True}, ["glm4moe: sinks, no shared expert;", "mimo2: norms on q and k\\."]),
        ({"hidden_act": "swiglu_of_product"}, ["glm4moe: swiglu_of_product;", "mimo2: .*, swiglu_of_product$"]),
        ({**WITH_SINKS, "scoring_func": "softmax"}, ["mimo2: softmax router\\."]),
        ({**WITH_SINKS, "norm_topk_prob": False}, ["mimo2: norm_topk_prob = false\\."]),
        ({**WITH_SINKS, "routed_scaling_factor": 2.0}, ["mimo2: routed_scaling_factor\\."]),
        ({**WITH_SINKS, "rope_scaling": RopeScaling(2.0, 64)}, ["mimo2: YaRN\\."]),
        ({"rope_scaling": RopeScaling(2.0, 64, beta_fast=16.0)}, ["glm4moe: YaRN's beta_fast but 32;"]),
        ({"rope_scaling": RopeScaling(2.0, 64, beta_slow=2.0)}, ["glm4moe: YaRN's beta_slow but 1;"]),
        ({"num_hidden_layers": 513}, ["glm4moe: more than 512 layers;"]),
    ],
    ids=str,
)  # fmt: skip
def test_what_stands_in_the_way_is_named(changes: dict[str, Any], named: list[str]) -> None:
    config: ModelConfig = tiny_config(**{**PLAIN, **changes})
    for words in named:
        with pytest.raises(ConfigError, match=rf"^llama.cpp has no architecture [^\n]*\nNot in .*{words}"):
            architecture_of(config)


def with_normalizer() -> Tokenizer:
    inner = tokenizers.Tokenizer.from_str(trained().to_json())
    nfc: Any = normalizers.NFC()
    inner.normalizer = nfc
    return Tokenizer(inner, EOS)


def with_stripping_token() -> Tokenizer:
    inner = tokenizers.Tokenizer.from_str(trained().to_json())
    inner.add_tokens([AddedToken("<x>", lstrip=True, normalized=False)])
    return Tokenizer(inner, EOS)


@pytest.mark.parametrize(
    "made, words",
    [
        (letters, "a WordLevel model"),
        (lambda: of_pattern(r"\w+|\W+"), "a pre-tokenizer with another pattern"),
        (with_normalizer, r"a normalizer \(NFC\)"),
        (with_stripping_token, "added tokens that take spaces or whole words"),
    ],
    ids=["words", "pattern", "normalizer", "stripping"],
)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(tmp_path: Path, made: Any, words: str) -> None:
    run = save_model(tmp_path / "run", tiny_model(**OF_TEXT), made())
    with pytest.raises(ConfigError, match=rf"^tokenizer: llama.cpp does not have it: {words}\nAccepted is byte-level"):
        export_gguf(run, tmp_path / "model.gguf", "float32")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = tiny_model(**PLAIN)
    run = save_model(tmp_path / "run", model, tokenizer)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(RunFailed, match=r"model.gguf: cannot be written: "):
            export_gguf(run, tmp_path / "model.gguf", "float32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with torch.no_grad():
        model.layers[1].mlp.experts.down_proj[3, 2, 1] = 7e4
    large = save_model(tmp_path / "large", model, tokenizer)
    with pytest.raises(DataError, match=r"^model.layers.1.mlp.experts.down_proj: float16 has no 70000,"):
        export_gguf(large, tmp_path / "model.gguf", "float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "run"]


def test_the_command(tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    run, file = save_model(tmp_path / "run", tiny_model(**PLAIN), tokenizer), tmp_path / "a new/model.gguf"
    assert dispatch(["export", str(run), str(file), "--dtype", "float16"]) == 0
    out = capsys.readouterr().out
    assert "exported as    glm4moe of llama.cpp\nweights        float16, " in out
    assert shlex.split(out.partition("run it with")[2])[:3] == ["llama-completion", "-m", str(file)]
    fields = gguf.GGUFReader(file).fields
    assert fields["general.name"].contents() == "run"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert fields["tokenizer.ggml.tokens"].contents()[-1] == f"<unused {ROWS - 1}>"
    content = file.read_bytes()
    assert dispatch(["export", str(run), str(file)]) == 2
    assert "model.gguf: is there already; a new name is accepted" in capsys.readouterr().err
    assert file.read_bytes() == content
    assert p828.load_run(run).export_gguf(tmp_path / "same.gguf", "float16").architecture == "glm4moe"
    assert (tmp_path / "same.gguf").read_bytes() == content
    assert dispatch(["export", str(run), str(file / "inside.gguf")]) == 2
    assert "inside.gguf: cannot be made: Not a directory" in capsys.readouterr().err
    assert dispatch(["export", str(run), str(tmp_path / "other.gguf"), "--native-only"]) == 2
    assert "--native-only: accepted for a directory" in capsys.readouterr().err
    assert not (tmp_path / "other.gguf").exists()
    assert dispatch(["export", str(run), str(tmp_path / "directory"), "--dtype", "float16"]) == 2
    assert "--dtype float16: accepted for a file whose name ends in .gguf" in capsys.readouterr().err
