"""A run's plan: what it takes on given GPUs, and how it had best be trained there."""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from p828.config import Config
from p828.distributed.engine_of_processes import is_left_to_p828
from p828.errors import ConfigError
from p828.model.costs import Parameters, count_parameters, flops_per_token, parameters_by_part
from p828.plan.amount import SourceAmount, source_amounts
from p828.plan.links import LinkBytes, link_bytes
from p828.plan.peak import Memory, copy_for_saving, peak
from p828.plan.room import largest_micro_batch, recomputing
from p828.plan.setup import STAGES, Setup, configured_stage, deepspeed_setup, plain_setup, setup_of
from p828.plan.speed import StepTime, assumed_rate, step_time
from p828.plan.state import training_state
from p828.system.cards import Card

HOST_GPUS = 8  # of one host at most, as HGX boards have them


class Machine(NamedTuple):
    """What the run is to be trained on."""

    card: Card
    gpus: int = 1
    rate: float = 0.0
    """Share of the card's datasheet that its matrix products reach; 0: what p828 reached on an H100."""
    rate_from: str = ""
    """Where the rate is from, in words."""
    gpu_hour_price: float = 0.0
    kilowatt_hour_price: float = 0.0
    hosts: int = 1
    """That have the GPUs, each as many."""


@dataclass(frozen=True)
class EnginePlan:
    """One engine with the configuration's micro-batches."""

    setup: Setup
    memory: Memory
    fits: bool
    largest_micro_batch: int
    """Sequences that fit; 0 for none."""
    largest_recomputing: int
    """The same with `train.gradient_checkpointing`."""
    links: LinkBytes
    time: StepTime
    saves_beside_training: bool
    """Whether there is room for the copy that checkpoints are written from while training goes on."""

    def to_json(self) -> dict[str, Any]:
        return {
            "engine": self.setup.engine,
            "stage": self.setup.stage,
            "gpus": self.setup.ranks,
            "shards": self.setup.shards,
            "fits": self.fits,
            "memory_bytes": {**self.memory.parts(), "total": self.memory.total},
            "allocated_bytes": self.memory.allocated,
            "reserved_bytes": self.memory.reserved,
            "peak_is_in": self.memory.moment,
            "largest_micro_batch": self.largest_micro_batch,
            "largest_micro_batch_with_gradient_checkpointing": self.largest_recomputing,
            "link_bytes_a_step": self.links.total,
            "host_link_bytes_a_step": self.links.between_hosts,
            "step_seconds": self.time.seconds,
            "step_seconds_by_part": self.time._asdict(),
            "saves_beside_training": self.saves_beside_training,
        }


@dataclass(frozen=True)
class Plan:
    config: Config
    """As it would be trained on the machine: the step's batch divided among the GPUs."""
    machine: Machine
    parameters: Parameters
    engines: list[EnginePlan]
    """Plain, then ZeRO 1 to 3."""
    configured: EnginePlan
    """The one that the configuration asks for; on several GPUs, where it names none, the lowest stage that fits."""
    sources: list[SourceAmount]
    remarks: list[str]

    @property
    def tokens_per_step(self) -> int:
        """On all GPUs."""
        return self.config.tokens_per_step * self.machine.gpus

    @property
    def tokens(self) -> int:
        return self.config.train.steps * self.tokens_per_step

    @property
    def hours(self) -> float:
        """Of training; evaluations and saves are not counted."""
        return self.config.train.steps * self.configured.time.seconds / 3600

    @property
    def kilowatt_hours(self) -> float:
        """Of the GPUs alone, at their power limit."""
        return self.hours * self.machine.gpus * self.machine.card.watts / 1000

    @property
    def cost(self) -> float:
        """Of the GPUs' hours and their energy, in the unit of the prices; 0 without a price."""
        rent = self.machine.gpu_hour_price * self.hours * self.machine.gpus
        return rent + self.machine.kilowatt_hour_price * self.kilowatt_hours

    def to_json(self) -> dict[str, Any]:
        model, length = self.config.model, self.config.data.sequence_length
        return {
            "name": self.config.name,
            "gpu": self.machine.card.name,
            "gpus": self.machine.gpus,
            "hosts": self.machine.hosts,
            "gpu_memory_bytes": self.machine.card.memory_bytes,
            "parameters": {**self.parameters._asdict(), "by_part": parameters_by_part(model)._asdict()},
            "flops_per_token": flops_per_token(model, length),
            "sequence_length": length,
            "micro_batch_size": self.config.train.micro_batch_size,
            "gradient_accumulation": self.config.train.gradient_accumulation,
            "gradient_checkpointing": self.config.train.gradient_checkpointing,
            "tokens_per_step": self.tokens_per_step,
            "steps": self.config.train.steps,
            "tokens": self.tokens,
            "tokens_per_parameter": self.tokens / self.parameters.total,
            "tokens_per_active_parameter": self.tokens / self.parameters.active,
            "rate": {"share_of_datasheet": self.machine.rate, "from": self.machine.rate_from},
            "engines": [engine.to_json() for engine in self.engines],
            "configured": self.configured.to_json(),
            "hours": self.hours,
            "kilowatt_hours": self.kilowatt_hours,
            "cost": self.cost or None,
            "sources": [{**dataclasses.asdict(source), "epochs": source.epochs} for source in self.sources],
            "remarks": self.remarks,
        }


def make_plan(config: Config, machine: Machine) -> Plan:
    """`config` has the model's vocabulary. `train.steps` is settled for one rank or all, as `with_steps` has it.

    Raises ConfigError for what is not planned: another arithmetic than bfloat16 on a GPU.
    """
    _check(config)
    remarks = list(_remarks(config))
    if not machine.rate:
        machine = machine._replace(rate=assumed_rate(config), rate_from="p828's on an H100")
    is_chosen = machine.gpus > 1 and is_left_to_p828(config, machine.gpus)  # as training does, by the plan
    config, line = _on_all(config, machine.gpus)
    remarks += line
    if machine.hosts > 1:
        remarks.append("time counts the links between hosts as if they were those between GPUs")
    elif machine.gpus > HOST_GPUS:
        remarks.append(f"more than {HOST_GPUS} GPUs of one host: give --hosts, if several have them")
    stage = configured_stage(config, machine.gpus)
    setups = [plain_setup(config), *(setup_of(config, number, machine.gpus, machine.hosts) for number in STAGES)]
    engines = [engine_plan(config, setup, machine) for setup in setups]
    if is_chosen:
        configured = next((engine for engine in engines[1:] if engine.fits), engines[-1])
    elif stage == 0:
        configured = engine_plan(config, deepspeed_setup(config, 0, machine.gpus, machine.hosts), machine)
    else:
        configured = next(engine for engine in engines if engine.setup.stage == stage)
    config, ended = _within_hours(config, configured.time.seconds)
    sources = source_amounts(config, machine.gpus)
    return Plan(config, machine, count_parameters(config.model), engines, configured, sources, remarks + ended)


def engine_plan(config: Config, setup: Setup, machine: Machine) -> EnginePlan:
    train, card = config.train, machine.card
    memory = peak(config, setup, train.micro_batch_size)
    # A step has as many tokens whichever engine trains it.
    accumulation = train.gradient_accumulation * (machine.gpus // setup.ranks)
    links = link_bytes(setup, count_parameters(config.model).total, accumulation)
    state = training_state(config.model, config.optimizer, setup)
    largest = largest_micro_batch(config, setup, card.memory_bytes)
    return EnginePlan(
        setup,
        memory,
        memory.total <= card.memory_bytes,
        largest,
        largest if train.gradient_checkpointing else largest_micro_batch(recomputing(config), setup, card.memory_bytes),
        links,
        step_time(config, setup, card, links, train.micro_batch_size, accumulation, machine.rate),
        memory.total + copy_for_saving(state) + 2**30 <= card.memory_bytes,  # checkpointing.SPARE_BYTES
    )


def _on_all(config: Config, gpus: int) -> tuple[Config, list[str]]:
    """A configuration of the plain engine sharded over several GPUs, with the same tokens a step, and a line on it."""
    before = config.train.gradient_accumulation
    if gpus == 1:
        return config, []
    if config.engine != "plain":
        return config, [f"on {gpus} GPUs with train.gradient_accumulation {before} on each"]
    train = dataclasses.replace(config.train, gradient_accumulation=max(round(before / gpus), 1))
    divided = dataclasses.replace(config, engine="sharded", train=train)
    line = (
        f'on {gpus} GPUs with engine = "sharded", train.gradient_accumulation {train.gradient_accumulation} on each '
        f"in place of {before}"
    )
    if divided.tokens_per_step * gpus != config.tokens_per_step:
        line += f": a step has {divided.tokens_per_step * gpus:,} tokens in place of {config.tokens_per_step:,}"
    return divided, [line]


def _within_hours(config: Config, step_seconds: float) -> tuple[Config, list[str]]:
    """With the steps that `train.hours` has time for, and a line if these are fewer."""
    steps = int(config.train.hours * 3600 / step_seconds)
    if not config.train.hours or steps >= config.train.steps:
        return config, []
    line = f"train.hours = {config.train.hours:g} ends the run after about {steps:,} of {config.train.steps:,} steps"
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=max(steps, 1))), [line]


def _check(config: Config) -> None:
    train = config.train
    if train.device == "cpu":
        raise ConfigError('train.device = "cpu": p828 plan is about GPUs; "auto" or "cuda" is accepted')
    if train.dtype == "float32":
        raise ConfigError('train.dtype = "float32": p828 plan is about bfloat16; "auto" or "bfloat16" is accepted')
    if config.model.attention_backend == "reference":
        raise ConfigError(
            'model.attention_backend = "reference": p828 plan is about fused attention; "auto" or "flash" is accepted'
        )
    for key in ("head_dim", "hidden_size", "moe_intermediate_size"):
        width = getattr(config.model, key)
        if width % 8:  # as model/backend.py's check_widths
            raise ConfigError(f"model.{key} = {width}: in bfloat16 on a GPU, a multiple of 8 is accepted")


def _remarks(config: Config) -> list[str]:
    found = []
    if config.model.dropout:
        found.append("model.dropout: the experts run on plain code then, which keeps more than is counted here")
    if config.optimizer.moment_dtype == "float32":
        found.append("optimizer.moment_dtype = float32: the plain engine's moments take twice what bfloat16 ones do")
    return found
