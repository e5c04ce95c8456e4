"""Every setting of a run: frozen dataclasses, read from TOML, overridden by flags, checked once.

The attribute docstrings are the command line's help. A TOML may name another with `base = "60m"` and
changes only what it lists. Nothing here imports torch.
"""

import codecs
import dataclasses
import os
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro.conf

from p828.config_checks import MOST_TEXT, check_model, check_range, check_run, check_texts
from p828.config_values import build, flatten, shown, shown_path
from p828.errors import UserError, nearest
from p828.files import read_limited

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS = Path(__file__).parent / "configs"
RUN_FILE = "config.toml"  # in a run's directory
LARGEST_FILE = 2 * MOST_TEXT  # any configuration that `validate` accepts is shorter
MOST_DOTS = 200  # in a line: what tomllib takes for a key grows with the square of its parts
# The beginning of a text of several lines; a text of one line; a comment.
TEXT = re.compile(r"""\"{3}|'{3}|"(?:[^"\\]|\\.)*"|'[^']*'|\#.*""")
LONGEST_PATH = 4000
MAX_BASES = 8  # how deep `base` may nest; a cycle ends here
VOCABULARY_MULTIPLE = 128  # matrix products are fast with such sizes


@dataclass(frozen=True)
class RopeScaling:
    factor: float = 1.0
    """YaRN's context extension s; 1 is plain RoPE."""
    original_max_position_embeddings: int = 2048
    """Context, in tokens, that the unscaled frequencies were trained for."""
    beta_fast: float = 32.0
    """Dimensions that turn at least this often over the original context keep their frequency."""
    beta_slow: float = 1.0
    """Dimensions that turn at most this often over the original context are interpolated fully."""


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = 0
    """Rows of the embedding and of the output head; 0 takes the tokenizer's vocabulary, up to a multiple of 128."""
    hidden_size: int = 512
    """Width of the residual stream."""
    moe_intermediate_size: int = 768
    """Inner width of one expert."""
    num_hidden_layers: int = 1
    """Transformer layers."""
    num_attention_heads: int = 8
    """Query heads."""
    num_key_value_heads: int = 2
    """Key and value heads; each serves an equal share of the query heads."""
    head_dim: int = 64
    """Width of one head; even, for RoPE."""
    use_qk_norm: bool = False
    """RMSNorm on each head's queries and keys before RoPE."""
    attention_sinks: bool = True
    """One learned logit a head in the softmax's denominator."""
    attention_backend: Literal["auto", "reference", "flash"] = "auto"
    """`reference` is plain math, `flash` is fused; `auto` takes the fused one where the device has it."""
    mask_documents: bool = True
    """Documents packed into one row do not see each other."""
    max_position_embeddings: int = 4096
    """Longest context in tokens, in training and in generation."""
    rope_theta: float = 10000.0
    """RoPE's base."""
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    n_routed_experts: int = 4
    """Experts the router chooses from, in every layer."""
    n_shared_experts: int = 1
    """Experts applied to every token, computed as one of this many times the width."""
    num_experts_per_tok: int = 2
    """Routed experts chosen for a token."""
    n_group: int = 1
    """Groups the routed experts are split into."""
    topk_group: int = 1
    """Groups a token may choose from."""
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    """How router logits become scores."""
    norm_topk_prob: bool = True
    """Normalise the chosen experts' weights to sum to one."""
    routed_scaling_factor: float = 1.0
    """Factor on the routed experts' weights."""
    hidden_act: Literal["swiglu", "swiglu_of_product"] = "swiglu"
    """`swiglu`: silu(W1 x) * W3 x. `swiglu_of_product`: SwiGLU over the halves of W1 x * W3 x, both twice as wide."""
    dropout: float = 0.0
    """Share of an expert's inner activations dropped in training."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square in every RMSNorm."""
    tie_word_embeddings: bool = False
    """Use the embedding as the output head."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""


@dataclass(frozen=True)
class ValidationConfig:
    kind: Literal["held_out", "split", "files"] = "held_out"
    """`held_out`: a share of the training text; `split`: a split on the hub; `files`: other files."""
    share: float = 0.01
    """Share held out: of the documents, by hash; of few local documents the end of each."""
    files: tuple[str, ...] = ()
    """Validation files: paths, directories or globs, from the working directory; given, they imply the kind."""
    hub_name: str = ""
    """Hub data set of the validation split; empty means the training one."""
    hub_revision: str = ""
    """Commit, tag or branch of that data set; empty means the newest, which is then recorded and kept."""
    split: str = "validation"
    """Name of the validation split."""


@dataclass(frozen=True)
class SourceConfig:
    prepared: str = ""
    """Directory of tokens that `p828 prepare` writes and `p828 train` then reads in place of the source."""
    source: Literal["python", "files", "hf"] = "python"
    """`python`: this interpreter's standard library; `files`: local files; `hf`: a data set on the Hugging Face hub."""
    files: tuple[str, ...] = ()
    """Paths, directories or globs of .txt, .py, .md, .jsonl (.gz, .xz, .zst), from the working directory."""
    text_field: str = "text"
    """Field that holds the text in .jsonl lines and in hub rows."""
    hub_name: str = ""
    """Hub data set (codeparrot/codeparrot-clean), or a local directory in the hub's layout."""
    hub_subset: str = ""
    """Subset of the hub data set (`en` of allenai/c4)."""
    hub_revision: str = ""
    """Commit, tag or branch of the hub data set; empty means the newest, which is then recorded and kept."""
    hub_split: str = "train"
    """Split of the hub data set that is trained on."""


@dataclass(frozen=True)
class MixedSource(SourceConfig):
    name: str = ""
    """What records and console call the source."""
    weights: tuple[float, ...] = (1.0,)
    """Shares of the tokens, relative to the other sources' weights: one for each of `data.mixture_steps`."""


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    mixture: Annotated[tuple[MixedSource, ...], tyro.conf.Suppress] = ()
    """Several sources in place of the one above, each a [[data.mixture]] with its keys, a name and weights."""
    mixture_steps: tuple[int, ...] = (0,)
    """Steps after which the mixture's next weights hold; the first is 0."""
    sequence_length: int = 2048
    """Tokens of a row that the model predicts; a row holds one more."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """`concatenate`: documents end to end; `best_fit`: as many as possible whole, the others in pieces that fill."""
    streams: int = 1
    """Parts that a source read as text is dealt to; give a multiple of the ranks, and each reads parts of its own."""
    block_documents: int = 1024
    """Documents that are read and shuffled together."""
    shuffle_rows: int = 1024
    """Rows that are shuffled together, so that a batch is not one long document; 1 keeps their order."""
    read_retries: int = 6
    """Attempts to read on after a failed read of a file or the hub, 1, 2, 4, ... seconds apart."""
    bad_records: Literal["stop", "skip"] = "stop"
    """What is done at a line, row or file that is no document: `stop`, saved, or `skip` it and count it."""
    max_document_megabytes: int = 16
    """Largest document: a longer line is a bad record; a larger text file is read in pieces, each a document."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    @property
    def sources(self) -> tuple["DataConfig", ...]:
        """Every source of the mixture as if it were the only one; without a mixture, this one."""
        keys = [f.name for f in dataclasses.fields(SourceConfig)]
        return tuple(
            dataclasses.replace(self, mixture=(), mixture_steps=(0,), **{key: getattr(mixed, key) for key in keys})
            for mixed in self.mixture
        ) or (self,)

    @property
    def source_names(self) -> tuple[str, ...]:
        return tuple(mixed.name for mixed in self.mixture) or (self.source,)


@dataclass(frozen=True)
class PrepareConfig:
    min_characters: int = 0
    """Shorter documents are left out."""
    max_characters: int = 0
    """Longer documents are left out; 0 keeps any."""
    drop_duplicates: bool = False
    """Of documents with the same text keep the first."""
    only_code: bool = False
    """Keep documents with lines of at most 1,000 characters, 100 in the mean, a quarter of all letters or digits."""
    shard_tokens: int = 100_000_000
    """Tokens after which a new shard begins."""


@dataclass(frozen=True)
class TokenizerConfig:
    name: str = "train"
    """`train` (byte-level BPE from the run's own source), the path of a tokenizer.json, or a name on the hub."""
    vocab_size: int = 4096
    """Vocabulary of a trained tokenizer; for another, only what sizes are told by before it is there."""
    training_megabytes: int = 64
    """Text that a tokenizer is trained on, at most."""
    eos_token: str = "<|endoftext|>"
    """Token that ends a document."""


@dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = 3e-4
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled decay of matrices; norms, biases and sinks have none."""
    decay_embeddings: bool = False
    """Decay the embedding too."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    moment_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What AdamW's moments are kept in; bfloat16 needs `train.dtype` bfloat16. `auto`: that, on CUDA, if it can be."""


@dataclass(frozen=True)
class ScheduleConfig:
    kind: Literal["cosine", "constant", "wsd"] = "cosine"
    """Shape after the linear warm-up; `wsd` is warm-up, stable, linear decay."""
    warmup_steps: int = 2000
    """Steps of linear warm-up."""
    decay_steps: int = 0
    """Last steps over which `wsd` decays."""
    min_lr_ratio: float = 0.1
    """Where `cosine` ends and `wsd` falls to, as a share of the peak."""


@dataclass(frozen=True)
class BalanceConfig:
    update_rate: float = 1e-3
    """Change of an expert's selection bias after a step."""
    sequence_loss_weight: float = 0.0
    """Weight of the sequence-wise auxiliary loss, for comparison."""
    z_loss_weight: float = 0.0
    """Weight of the router's z-loss, for comparison."""


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 100_000
    """Optimizer updates in the whole run."""
    tokens: float = 0.0
    """Tokens of the whole run, on all ranks, as 5e9: decides `train.steps`, rounded up, where it is not 0."""
    hours: float = 0.0
    """Hours of training, over all its starts, after which the run is complete, whatever `train.steps`; 0 is no end."""
    micro_batch_size: int = 8
    """Rows put through the model at once."""
    gradient_accumulation: int = 16
    """Micro-batches of a step, on each rank."""
    seed: int = 0
    """Seed of the weights, the data order and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the layers; master weights and router are float32. `auto`: bfloat16 on CUDA, float32 on a CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; `auto` compiles on CUDA."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""
    deterministic: bool = False
    """Only algorithms that give bit-equal results when repeated: p828's kernels all do, and cost no more for it."""


@dataclass(frozen=True)
class EvaluationConfig:
    every: int = 500
    """Steps between evaluations; 0 evaluates at the end only."""
    rows: int = 64
    """Validation rows, the same at every evaluation."""
    prompts: tuple[str, ...] = ()
    """Prompts continued at every evaluation."""
    max_new_tokens: int = 64
    """Tokens sampled for each prompt."""
    temperature: float = 0.8
    """Temperature of those samples; 0 is greedy."""
    patience: int = 0
    """Stop after this many evaluations without a better validation loss; 0 never stops early."""
    bigram_baseline: bool = False
    """Also compute what a bigram model of one epoch of training tokens, held in memory, gets on the validation rows."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 1000
    """Steps between checkpoints; the last step always makes one."""
    keep_last: int = 3
    """Newest checkpoints kept; the best one is kept besides."""


@dataclass(frozen=True)
class RollbackConfig:
    after_steps: int = 0
    """Bad steps in a row after which the run goes back to its newest checkpoint and past the data since; 0: never."""
    spike_nats: float = 1.0
    """A step is bad whose loss is that much above the usual of late, and one that is not finite."""
    limit: int = 3
    """Rollbacks in a run; where one more is due, it ends instead."""


@dataclass(frozen=True)
class DeepSpeedConfig:
    config: str = ""
    """A DeepSpeed configuration (a .json file, or zero1, zero2, zero3, zero3-offload) over the keys below."""
    stage: int = 1
    """ZeRO: 0 every rank holds all, 1 a share of the optimizer's state, 2 of gradients too, 3 of weights too."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """`cpu` keeps the optimizer's state in main memory and updates there; from stage 1 on."""
    offload_param: Literal["none", "cpu"] = "none"
    """`cpu` keeps the weights in main memory and fetches each layer's for its use; stage 3 only."""
    reduce_bucket_size: int = 50_000_000
    """Gradients, in numbers, that are reduced together."""
    allgather_bucket_size: int = 500_000_000
    """Updated weights, in numbers, that are gathered together."""
    overlap_comm: bool = True
    """Reduce gradients while the backward pass goes on."""
    timeout_seconds: int = 1800
    """Longest time without progress: then every rank's stack is written down and the run ended."""


@dataclass(frozen=True)
class WandbConfig:
    mode: Literal["off", "online", "offline"] = "off"
    """Weights & Biases: `online` needs an account, `offline` writes into the run's directory."""
    project: str = "p828"
    """Weights & Biases project."""


@dataclass(frozen=True)
class Config:
    name: str = ""
    """The run's name; empty means the configuration's."""
    runs_dir: str = "runs"
    """Directory that holds the runs."""
    engine: Literal["plain", "deepspeed"] = "plain"
    """`plain` trains on one device; `deepspeed` on one or more, each with a process of its own."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    rollback: RollbackConfig = field(default_factory=RollbackConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def tokens_per_step(self) -> int:
        """On each rank."""
        return self.train.micro_batch_size * self.train.gradient_accumulation * self.data.sequence_length


def with_steps(config: Config, ranks: int) -> Config:
    """With the `train.steps` that `train.tokens` asks for, if it does, so that steps alone say how long a run is."""
    if not config.train.tokens:
        return config
    steps = -(-int(config.train.tokens) // (config.tokens_per_step * ranks))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=max(steps, 1), tokens=0.0))


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load(name_or_path: str) -> Config:
    """Read a preset, a TOML file with its bases, or a run's directory. Raises UserError; does not `validate`."""
    return load_given(name_or_path)[0]


def load_given(name_or_path: str) -> tuple[Config, frozenset[str]]:
    """As `load`, and the dotted keys that the user's own TOML files give.

    A preset's keys are not the user's, nor are those of a file that lists nearly all there are, as a run's config.toml
    and the output of `--dry-run` do.
    """
    path = Path(name_or_path)
    is_named = path.suffix == ".toml" or name_or_path in ("", *preset_names())
    is_run = not is_named and _is_directory(path)
    if is_run and not (path / RUN_FILE).is_file():
        raise UserError(f"{shown(name_or_path)} is a directory, but no run: it holds no {RUN_FILE}")
    try:
        values, given = _merged_toml(str(path / RUN_FILE) if is_run else name_or_path)
        config = from_dict(values, RUN_FILE if is_run else path.name)
    except RecursionError:
        raise UserError(f"{name_or_path}: cannot be read: nested too deeply") from None
    if is_run:  # which may have been moved
        path = path if path.name not in ("", "..") else path.resolve()
        config = dataclasses.replace(config, name=path.name, runs_dir=str(path.parent))
    return config if config.name else dataclasses.replace(config, name=path.stem), given


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that no file can have
        return False


def from_dict(values: Mapping[str, Any], where: str) -> Config:
    """Build a Config from nested plain values, as TOML gives them. Raises UserError naming the key."""
    return build(Config, values, where)


# What a source's or the validation's key says about its kind when that is not given.
_SOURCE_IS = {"files": "files", "hub_name": "hf"}
_VALIDATION_IS = {"files": "files", "hub_name": "split", "split": "split", "share": "held_out"}


def implied(given: Collection[str], before: Collection[str] = ()) -> dict[str, str]:
    """What keys that are given together imply: dotted key to value, for `data.source` and its like.

    `before` are keys given where these stand above. Raises UserError if the given keys imply different kinds.
    """
    found: dict[str, tuple[str, str]] = {}
    for key in sorted(given):
        table, _, name = key.rpartition(".")
        if table == "data.validation":
            kind, value = "data.validation.kind", _VALIDATION_IS.get(name)
        elif table == "data" or table.startswith("data.mixture["):
            kind, value = f"{table}.source", _SOURCE_IS.get(name)
        else:
            continue
        if value is None or kind in given:
            continue
        if kind in found and found[kind][0] != value:
            raise UserError(f"{found[kind][1]} and {key} are both given: {kind} says which one is meant")
        found[kind] = value, key
    is_validation_given = any(key.startswith("data.validation.") for key in (*given, *before))
    if "data.files" in given and not is_validation_given:  # a preset's split belongs to the preset's source
        found["data.validation.kind"] = "held_out", "data.files"
    return {kind: value for kind, (value, _) in found.items()}


def _merged_toml(name_or_path: str, depth: int = 0) -> tuple[dict[str, Any], frozenset[str]]:
    """The values of a preset or file over those of its bases, and the dotted keys that the user's own files give."""
    if len(name_or_path) > LONGEST_PATH:
        raise UserError(f"no file {shown(name_or_path)}: at most {LONGEST_PATH} characters are accepted")
    path, known = Path(name_or_path), preset_names()
    is_preset = path.suffix != ".toml"
    if is_preset:
        path = PRESETS / f"{name_or_path}.toml"
        if name_or_path not in known:
            if os.path.isfile(name_or_path):
                raise UserError(
                    f"{shown(name_or_path)} is no configuration: a preset, a .toml file or a run's directory is "
                    "accepted. Text is given besides, as in p828 train quickstart --data.files FILE"
                )
            raise UserError(
                f"no preset {shown(name_or_path)}{nearest(name_or_path[:80], known)} Presets: {', '.join(known)}; "
                "or give the path of a .toml file or a run's directory"
            )
    values = _read_toml(path)
    base = values.pop("base", None)
    if base is not None and (not isinstance(base, str) or depth == MAX_BASES):
        raise UserError(
            f"{path}: base = {shown(base)}: give a preset's name or a .toml file, nested at most {MAX_BASES} deep"
        )
    given = frozenset(_keys(values))
    is_whole = len(given) > len(flatten(Config())) / 2
    if base is None:
        below: dict[str, Any] = {}
        before: frozenset[str] = frozenset()
    else:
        below, before = _merged_toml(str(path.parent / base) if base.endswith(".toml") else base, depth + 1)
    if not is_whole:
        _set(values, implied(given, before))
    return _merge(below, values), before if is_whole or is_preset else before | given


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        content = read_limited(path, LARGEST_FILE)
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
            raise ValueError("it is UTF-16 or no text; TOML is UTF-8 text")
        text = content.decode("utf-8-sig")  # some editors put a byte order mark before it
        _check_dots(text)
        return tomllib.loads(text)
    except FileNotFoundError:
        raise UserError(f"no file {shown_path(path)}") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}: cannot be read as TOML: line {line} holds the byte 0x{content[error.start]:02x}, "
            "which is not UTF-8; save the file as UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"{shown_path(path)}: cannot be read as TOML: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # not TOML, a number too long, or a name that no file can have
        raise UserError(f"{shown_path(path)}: cannot be read as TOML: {error}") from None


def _check_dots(text: str) -> None:
    """Raises ValueError if a line has more than `MOST_DOTS` in its keys; after a text of several lines, anywhere."""
    is_plain = True
    for line in text.split("\n"):
        if is_plain:
            keys = TEXT.sub(lambda found: found[0] if found[0] in ('"""', "'''") else "", line)
            is_plain = '"""' not in keys and "'''" not in keys
        if (keys if is_plain else line).count(".") > MOST_DOTS:
            raise ValueError(f"a line has more than {MOST_DOTS} dots")


def _keys(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys of nested tables; `key[0].inner` in a list of tables."""
    keys: list[str] = []
    for name, value in values.items():
        if isinstance(value, dict):
            keys += _keys(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for i, item in enumerate(value):
                keys += _keys(item, f"{prefix}{name}[{i}].")
        else:
            keys.append(prefix + name)
    return keys


def _set(values: dict[str, Any], changes: Mapping[str, str]) -> None:
    """Put values at dotted keys, making the tables that they need."""
    for key, value in changes.items():
        *tables, last = key.split(".")
        table = values
        for name in tables:
            list_name, _, number = name.rstrip("]").partition("[")
            table = table[list_name][int(number)] if number else table.setdefault(name, {})
        table[last] = value


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def with_vocabulary(config: Config, vocab_size: int = 0) -> Config:
    """The configuration with a `model.vocab_size` of 0 replaced: by a tokenizer's `vocab_size` rounded up.

    Before there is a tokenizer, `tokenizer.vocab_size` stands for it. A number that was given stays.
    """
    if config.model.vocab_size:
        return config
    rows = rounded_vocabulary(vocab_size or config.tokenizer.vocab_size)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=rows))


def rounded_vocabulary(vocab_size: int) -> int:
    """Rows of the model's embedding for so many tokens."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def validate(config: Config) -> None:
    """Check what types cannot say. Raises UserError with the first key that is wrong and what it accepts."""
    flat = flatten(config)
    for key, value in flat.items():
        check_range(key, value)
    check_texts(flat)
    check_model(config.model)
    check_run(with_steps(config, 1))
