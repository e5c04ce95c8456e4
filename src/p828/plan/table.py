"""A plan as text."""

import textwrap
from collections.abc import Sequence

from p828.data.fractions import MANY_EPOCHS, short
from p828.model.costs import Parts, flops_per_token, parameters_by_part
from p828.plan.advice import Advice, offloaded_bytes
from p828.plan.amount import SourceAmount
from p828.plan.learning_rate import LAW, RANGE
from p828.plan.plan import EnginePlan, Plan

LABEL, COLUMN = 32, 12
TITLE = 14  # columns before a paragraph
Paragraph = tuple[str, str]  # title and text
NAMES = {"sharded": "the sharded engine", "deepspeed": "DeepSpeed"}
SAME_RATE = 0.1  # a learning rate is not told to be another within this share
SHOWN = 5e6  # bytes: what is less in every column is left out
PARTS = {
    "weights": "weights",
    "masters": "masters",
    "moments": "moments",
    "gradients": "gradient sums",
    "activations": "activations",
    "weight_gradients": "gradients of a micro-batch",
    "logits": "logits",
    "buckets": "reduction buckets",
    "gathered": "gathered weights",
    "workspace": "cuBLAS workspace",
    "recordings": "recordings (CUDA graphs)",
    "fragmentation": "fragmentation",
    "evaluation": "evaluation beside them",
    "context": "driver, kernels, NCCL",
}


def show(plan: Plan, advice: Advice, width: int) -> str:
    """In at most `width` columns, or as many as the longest word and a column of the table need."""
    blocks = (_model(plan), _run(plan), [("advice", sentence(plan, advice))])
    model, run, advised = ("\n".join(_paragraph(title, text, width) for title, text in block) for block in blocks)
    return "\n\n".join([model, *_engines(plan, width), run, "\n".join([advised, *_command(advice, width)])])


def _model(plan: Plan) -> list[Paragraph]:
    model, length = plan.config.model, plan.config.data.sequence_length
    total, active = plan.parameters
    by_part = ", ".join(f"{name} {short(count)}" for name, count in _named(parameters_by_part(model)) if count)
    flops = flops_per_token(model, length)
    return [
        (plan.config.name, f"{_words(total)} parameters, {_words(active)} active for a token: {by_part}"),
        ("FLOPs", f"{flops / 1e6:,.1f} M to train on a token of rows of {length:,}, attention over whole rows"),
        *(("note", remark) for remark in plan.remarks),
    ]


def _engines(plan: Plan, width: int) -> list[str]:
    """A heading, and a table of all engines or, in a narrow terminal, of a few at a time."""
    train, card = plan.config.train, plan.machine.card
    recomputed = ", activations recomputed" if train.gradient_checkpointing else ""
    rows = f"micro-batches of {train.micro_batch_size} x {plan.config.data.sequence_length:,} tokens{recomputed}"
    head = f"in GB on each {card.name}, which has {card.memory_bytes / 1e9:.1f}; {rows}"
    fit = max((width - LABEL) // COLUMN, 1)
    tables = [_table(plan, plan.engines[start : start + fit]) for start in range(0, len(plan.engines), fit)]
    return [_paragraph("memory", head, width), *("\n".join(lines) for lines in tables)]


def _table(plan: Plan, engines: Sequence[EnginePlan]) -> list[str]:
    lines = [_line("", [engine.setup.name for engine in engines])]
    lines.append(_line("engine", [engine.setup.engine for engine in engines]))
    lines.append(_line("GPUs", [str(engine.setup.ranks) for engine in engines]))
    if plan.machine.hosts > 1:
        lines.append(_line("that share a replica", [str(engine.setup.shards) for engine in engines]))
    for part, label in PARTS.items():
        values = [engine.memory.parts()[part] for engine in engines]
        if max(values) >= SHOWN:
            lines.append(_line(label, [f"{value / 1e9:.2f}" for value in values]))
    lines += [
        _line("together", [f"{engine.memory.total / 1e9:.2f}" for engine in engines]),
        _line("fits", ["yes" if engine.fits else "no" for engine in engines]),
        _line("most of it in the", _moments(engines)),
        _line("largest micro-batch", [_size(engine.largest_micro_batch) for engine in engines]),
    ]
    if not plan.config.train.gradient_checkpointing:
        lines.append(_line("the same, recomputing", [_size(engine.largest_recomputing) for engine in engines]))
    lines += [
        _line("seconds a step", [f"{engine.time.seconds:.3g}" for engine in engines]),
        _line("GB over a GPU's links a step", [f"{engine.links.total / 1e9:.3g}" for engine in engines]),
        *([_line("GB a host sends in a step", _between(engines))] if plan.machine.hosts > 1 else []),
        _line("room for a copy when saving", ["yes" if engine.saves_beside_training else "no" for engine in engines]),
    ]
    return lines


def _run(plan: Plan) -> list[Paragraph]:
    steps, machine = plan.config.train.steps, plan.machine
    setup, total, active = plan.configured.setup, *plan.parameters
    gpus = f"{machine.gpus} GPU{'s' if machine.gpus > 1 else ''}"
    rate = plan.tokens_per_step / plan.configured.time.seconds
    fits = "" if plan.configured.fits else ", if it fitted"
    lines = [
        (
            "the run",
            f"{steps:,} steps of {plan.tokens_per_step:,} tokens: {short(plan.tokens)} tokens, "
            f"{plan.tokens / total:.3g} for a parameter, {plan.tokens / active:.3g} for an active one",
        ),
        (
            "time",
            f"{_duration(plan.hours)} with {setup.name} on {gpus}{fits}, {rate:,.0f} tokens a second, at "
            f"{machine.rate:.1%} of the datasheet's FLOP/s ({machine.rate_from}); evaluations and checkpoints are not "
            "counted",
        ),
        ("energy", f"{_rounded(plan.kilowatt_hours)} kWh at most, by the GPUs alone"),
    ]
    if plan.cost:
        lines.append(("cost", f"{plan.cost:,.2f}, in the unit of the price"))
    return [*lines, *(("data", _source(source)) for source in plan.sources)]


def _source(source: SourceAmount) -> str:
    if source.tokens is None or source.epochs is None:
        planned = f"{source.name}: {short(source.planned)} tokens are trained on"
        return f"{planned}; how many there are is not known: {source.how}"
    many = f", above {MANY_EPOCHS}, where repeated text teaches less and less" if source.epochs > MANY_EPOCHS else ""
    times = f"gone through {_rounded(source.epochs)} times{many}"
    return f"{source.name}: {short(source.tokens)} tokens ({source.how}), {times}"


def sentence(plan: Plan, advice: Advice) -> str:
    """The recommendation."""
    if advice.setup is None:
        gpus = f"{plan.machine.gpus} {plan.machine.card.name}"
        more = f"with ZeRO 3 on {advice.gpus_needed} it would" if advice.gpus_needed else "nor on more of them"
        return f"it does not fit on {gpus}, not even recomputing or offloaded; {more}. {_law(plan, advice)}"
    setup = advice.setup
    engine = "the plain engine" if setup.stage is None else f"{NAMES[setup.engine]} at ZeRO stage {setup.stage}"
    step = "" if setup.offload_optimizer else f", {advice.step_seconds:.3g} s a step"
    if setup.offload_optimizer:
        engine += f" (slow: {offloaded_bytes(plan) / 1e9:,.0f} GB are in main memory)"
    recomputing = " and gradient checkpointing" if advice.gradient_checkpointing else ""
    return (
        f"train with {engine}{recomputing}, micro-batches of {advice.micro_batch_size} and an accumulation of "
        f"{advice.gradient_accumulation}: {advice.memory_bytes / 1e9:.1f} GB{step}. {_law(plan, advice)}"
    )


def _law(plan: Plan, advice: Advice) -> str:
    """The learning rate, with what is known of it."""
    given = plan.config.optimizer.learning_rate
    beside = f"; the configuration has {given:.2g}" if abs(given / advice.learning_rate - 1) > SAME_RATE else ""
    outside = f"; {advice.caveat}" if advice.caveat else ""
    best = f"AdamW's best rate by OLMo-core's fit of 2026-06 is {advice.learning_rate:.2g} ({LAW}){beside}"
    return f"{best}. The fit is of {RANGE}{outside}."


def _command(advice: Advice, width: int) -> list[str]:
    if advice.setup is None:
        return []
    return textwrap.wrap(
        advice.flags, _at_least(width), initial_indent=" " * TITLE, subsequent_indent=" " * TITLE,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _paragraph(title: str, text: str, width: int) -> str:
    begin = f"{title} " if len(title) >= TITLE else f"{title:<{TITLE}}"
    return textwrap.fill(
        text, _at_least(width), initial_indent=begin, subsequent_indent=" " * TITLE, break_on_hyphens=False
    )


def _at_least(width: int) -> int:
    return max(width, TITLE + 10)


def _line(label: str, cells: list[str]) -> str:
    return f"{label:<{LABEL}}{''.join(f'{cell:>{COLUMN}}' for cell in cells)}".rstrip()


def _between(engines: Sequence[EnginePlan]) -> list[str]:
    return [f"{engine.links.between_hosts / 1e9:.3g}" for engine in engines]


def _moments(engines: Sequence[EnginePlan]) -> list[str]:
    """Short enough for a column: whose pass it is, and which way."""
    return [
        engine.memory.moment.replace("last layer's ", "last ").replace("first layer's ", "first ")
        .replace("backward pass", "back").replace("forward pass", "forward")
        for engine in engines
    ]  # fmt: skip


def _named(parts: Parts) -> list[tuple[str, float]]:
    return [(name.replace("_", " "), count) for name, count in parts._asdict().items()]


def _words(count: float) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _rounded(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _size(sequences: int) -> str:
    return f"{sequences:,}" if sequences else "none"


def _duration(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    if hours >= 2:
        return f"{hours:.1f} hours"
    return f"{hours * 60:.0f} minutes" if hours >= 1 / 30 else f"{_rounded(hours * 3600)} seconds"
