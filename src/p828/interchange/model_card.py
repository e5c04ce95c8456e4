"""The README.md of an exported model, filled from its run: how to load it, data, training, losses, configuration."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from p828.config import Config, DataConfig
from p828.errors import ConfigError, DataError
from p828.interchange.architectures.architecture import Architecture
from p828.interchange.architectures.own import OWN
from p828.model.costs import count_parameters
from p828.runs import records
from p828.runs.file_names import RECORDS_FILE
from p828.runs.train_state import TrainState

MOST_ROWS = 12  # of the table of losses
MOST_FILES = 8  # that a source's line names
TEMPLATE = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- p828
- mixture-of-experts
---

# {name}

A Mixture-of-Experts language model of {total} parameters, {active} of them active for a token. {origin}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

place = "."  # this directory, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(place{remote})
model = AutoModelForCausalLM.from_pretrained(place{remote})
{asking}
```

{architecture} The weights are in {dtype}. The context is {context} tokens.

## Data

{data}

{training}## Configuration

{configuration}

{whole}

## Licence

None is given yet: whoever publishes the model names one, in keeping with the licences of the data.
"""
WHOLE = "The whole configuration is in `config.toml`, as `p828 train` takes it."
MODEL_ALONE = (
    "`config.toml` has the model for `p828 train`; its other settings are p828's defaults, and not how it was trained."
)

CONTINUING = """\
ids = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))"""
ANSWERING = """\
messages = [{"role": "user", "content": "Who are you?"}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**ids, max_new_tokens=200)[0, ids["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""


def model_card(
    config: Config,
    progress: TrainState,
    seconds: float,
    versions: Any,
    curve: Sequence[dict[str, Any]],
    architecture: Architecture,
    dtype: str,
    answers: bool = False,
) -> str:
    """Markdown with the hub's metadata before it.

    Args:
        progress, seconds, versions: of the checkpoint.
        curve: records with a loss, as `curve_of` finds them.
        answers: whether it is shown how to ask the model rather than how to have a text continued.
    """
    parameters = count_parameters(config.model)
    its_code = "the code beside the weights, which `trust_remote_code=True` lets run"
    return TEMPLATE.format(
        name=_text(config.name or "A p828 model"),
        total=_short(parameters.total),
        active=_short(parameters.active),
        origin=_origin(config, progress),
        asking=ANSWERING if answers else CONTINUING,
        remote="" if architecture is not OWN else ", trust_remote_code=True",
        architecture=f"It is loaded as `{architecture.model_type}`, "
        + ("an architecture of transformers." if architecture is not OWN else f"by {its_code}."),
        dtype=dtype,
        context=f"{config.model.max_position_embeddings:,}",
        data="\n".join(_sources(config, progress)),
        training=_trained(config, progress, seconds, versions, curve) if progress.tokens else "",
        configuration=_table(_configuration(config)),
        whole=WHOLE if progress.tokens else MODEL_ALONE,
    )


def curve_of(run_directory: Path, last_step: int, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """The evaluations in a run's records up to a step; of a run without any, its steps.

    Empty where there are no records; `report` gets a line where they are damaged.
    """
    path = run_directory / RECORDS_FILE
    if not path.is_file():
        return []
    found: dict[str, dict[int, dict[str, Any]]] = {"eval": {}, "step": {}}
    try:
        for record in records.read(path):
            if record["kind"] in found and record["step"] <= last_step and isinstance(record.get("loss"), float):
                found[record["kind"]][record["step"]] = record
    except (ConfigError, DataError) as error:
        report(f"{error}; the model card has no curve")
        return []
    return list((found["eval"] or found["step"]).values())


def _origin(config: Config, progress: TrainState) -> str:
    if not progress.tokens and progress.step:
        return f"p828 imported it from an export of a run of {progress.step:,} steps, whose model card says more of it."
    if not progress.tokens:
        return "p828 did not train it; how it was trained is known where it comes from."
    start = f"the weights of `{_text(config.train.init_from)}`" if config.train.init_from else "scratch"
    return f"It was trained from {start} on {progress.tokens:,} tokens with p828."


def _sources(config: Config, progress: TrainState) -> Iterable[str]:
    if not progress.tokens:
        yield "What it was trained on is not known here."
        return
    counts = [*progress.source_tokens, *[0] * len(config.data.source_names)]
    for name, data, tokens in zip(config.data.source_names, config.data.sources, counts, strict=False):
        named = f"{_text(name)}: " if config.data.mixture else ""
        yield f"- {named}{_source(data)}; {tokens:,} tokens"
    validation = config.data.validation
    held_out = f"{validation.fraction:.3g} of the text was held out" if validation.kind == "held_out" else "other text"
    yield f"\nLosses on validation text are on text that was not trained on: {held_out}."


def _source(data: DataConfig) -> str:
    if data.source == "python":
        return "the Python standard library's source"
    if data.source == "hf":
        parts = [data.hub_name, data.hub_subset, data.hub_split, data.hub_revision]
        return "the hub's data set " + ", ".join(f"`{part}`" for part in parts if part)
    files = ", ".join(f"`{file}`" for file in data.files[:MOST_FILES])
    return f"files: {files}" + (f" and {len(data.files) - MOST_FILES} more" if len(data.files) > MOST_FILES else "")


def _trained(
    config: Config, progress: TrainState, seconds: float, versions: Any, curve: Sequence[dict[str, Any]]
) -> str:
    """The sections that an imported model has nothing for."""
    table = _table(_training(config, progress, seconds, versions))
    return f"## Training\n\n{table}\n\n## Losses\n\n{_losses(progress, curve)}\n\n"


def _training(config: Config, progress: TrainState, seconds: float, versions: Any) -> list[tuple[str, str]]:
    train, optimizer, schedule = config.train, config.optimizer, config.schedule
    rows = [
        ("steps", f"{progress.step:,} of {train.steps:,}"),
        ("tokens", f"{progress.tokens:,}, {config.tokens_per_step:,} a step on each rank"),
        ("documents to their end", f"{progress.documents:,}"),
        ("optimizer", f"AdamW, learning rate {optimizer.learning_rate:g}, betas {optimizer.betas}, "
                      f"weight decay {optimizer.weight_decay:g}"),
        ("schedule", f"{schedule.kind}, {schedule.warmup_steps:,} steps of warm-up"),
        ("time", f"{seconds / 3600:.3g} hours" if seconds >= 3600 else f"{seconds / 60:.3g} minutes"),
    ]  # fmt: skip
    if isinstance(versions, dict):
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return rows


def _losses(progress: TrainState, curve: Sequence[dict[str, Any]]) -> str:
    """The checkpoint's own losses, and a table of at most MOST_ROWS rows that are spread evenly over the curve."""
    lines = [
        f"{kind} loss {loss:.4f} nats per token"
        for kind, loss in (("Training", progress.loss), ("Validation", progress.validation_loss))
        if loss is not None
    ]
    text = "; ".join(lines) + f", at step {progress.step:,}." if lines else "None was recorded."
    if not curve:
        return f"{text} The run's records were not beside the checkpoint, so there is no curve."
    last = len(curve) - 1
    chosen = sorted({round(number * last / (MOST_ROWS - 1)) for number in range(MOST_ROWS)})
    kind = "validation" if curve[0]["kind"] == "eval" else "training"
    rows = ["| step | loss | perplexity | bits per byte |".replace("loss", f"{kind} loss"), "|---:|---:|---:|---:|"]
    for record in (curve[number] for number in chosen):
        numbers = (_number(record.get(key)) for key in ("loss", "perplexity", "bits_per_byte"))
        rows.append(f"| {record['step']:,} | " + " | ".join(numbers) + " |")
    return "\n".join([text, "", *rows])


def _configuration(config: Config) -> list[tuple[str, str]]:
    model = config.model
    scaling = model.rope_scaling
    experts = f"{model.n_routed_experts} a layer, {model.num_experts_per_tok} for a token"
    shared = f" and {model.n_shared_experts} for all" if model.n_shared_experts else ""
    groups = f", from {model.topk_group} of {model.n_group} groups" if model.n_group > 1 else ""
    heads = f"{model.num_attention_heads} heads of {model.head_dim}, {model.num_key_value_heads} for keys and values"
    extras = [
        name for name, is_on in (("sinks", model.attention_sinks), ("norms on q and k", model.use_qk_norm)) if is_on
    ]
    yarn = (
        f", YaRN by {scaling.factor:g} from {scaling.original_max_position_embeddings:,}" if scaling.factor > 1 else ""
    )
    return [
        ("layers", f"{model.num_hidden_layers} of width {model.hidden_size}"),
        ("attention", ", ".join([heads, *extras])),
        ("positions", f"RoPE with base {model.rope_theta:g}{yarn}"),
        ("experts", f"{experts}{groups}{shared}, of width {model.moe_intermediate_size}, `{model.hidden_act}`"),
        ("router", f"{model.scoring_func}, with a balance bias"),
        ("vocabulary", f"{model.vocab_size:,} rows"),
    ]


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {_text(value)} |" for key, value in rows)])


def _text(value: str) -> str:
    """A user's text within a line of Markdown and within a table."""
    return " ".join(value.split()).replace("|", "\\|")


def _number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, int | float) else ""


def _short(number: int) -> str:
    for size, word in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:,}"
