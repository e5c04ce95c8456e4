"""`p828 serve`: answer over HTTP with a trained model, as OpenAI's API does."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from p828.cli.flags import parse_given
from p828.cli.output import loading_pytorch
from p828.config.rules import check_path
from p828.errors import ConfigError, closed_after, reason, warn
from p828.files import read_limited
from p828.serve.http.host_check import local_hosts
from p828.serve.scheduling.limits import Limits
from p828.train.log.console import waiting
from p828.train.signals import graceful_shutdown

if TYPE_CHECKING:
    from p828.inference.load import LoadedModel
    from p828.serve.api.service import Service

USAGE = "p828 serve CHECKPOINT [--port N] [--host ADDRESS] [--api-key-file FILE] [--slots N] [--context TOKENS]"
DESCRIPTION = (
    f"{USAGE}\n\nAt /v1 as OpenAI's API: completions, chat/completions and models; at / a page for a browser. A key is "
    "read from --api-key-file, or from the environment variable P828_API_KEY; without one everybody is answered who "
    "reaches the address."
)
API_KEY_VARIABLE = "P828_API_KEY"
LONGEST_KEY = 4096  # bytes
SLOTS = {"cuda": 64, "cpu": 8}
PIECES = {"cuda": 2048, "cpu": 256}  # tokens of a prompt that are read between two steps, while other answers wait


@dataclass(frozen=True)
class Arguments:
    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A run's directory, for its newest checkpoint, or one checkpoint's."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 is reached from other machines."""
    port: int = 8000
    """0 takes a free one, and shows it."""
    api_key_file: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """File with the key that clients have to send."""
    slots: Annotated[int, tyro.conf.arg(help_behavior_hint="(default: 64 on a GPU, 8 on a CPU)")] = 0
    """Requests that are answered at a time; each has memory for --context tokens."""
    context: Annotated[int, tyro.conf.arg(metavar="TOKENS", help_behavior_hint="(default: the model's)")] = 0
    """Longest prompt and answer together."""
    max_waiting: int = Limits.max_waiting
    """Requests that wait for a slot; more are refused."""
    timeout: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = Limits.max_seconds
    """Longest that a request may take."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU if there is one."""


def run(arguments: list[str]) -> None:
    given, flags = parse_given(Arguments, arguments, prog="p828 serve", description=DESCRIPTION)
    check_path("CHECKPOINT", given.checkpoint)
    _check(given, flags)
    key = api_key(given)
    _load_libraries()
    _serve(given, key)


def _load_libraries() -> None:
    """Raises ConfigError where one is not installed."""
    try:
        with loading_pytorch():
            import p828.serve.api.service
            import p828.serve.http.app
            import p828.serve.http.server  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name}, which p828 serve needs, is not installed: pip install 'p828[serve]'"
        ) from error


def _serve(given: Arguments, key: str) -> None:
    from p828.inference.load import load_model
    from p828.serve.http.app import build_app
    from p828.serve.http.server import GRACE_SECONDS, Server, listen, url

    with listen(given.host, given.port) as listening:
        is_local = _is_local(listening.getsockname()[0])
        if not key and not is_local:
            warn(f"{given.host} is reached from other machines, and without --api-key-file everybody is answered")
        with waiting("loading the model", warn):
            loaded = load_model(given.checkpoint, given.device)
        service = _service(loaded, given)
        hosts = local_hosts(given.host) if is_local and not key else frozenset[str]()
        server = Server(build_app(service, key, hosts), service.scheduler)
        print("\n".join(_lines(loaded, service, given, url(listening))), flush=True)
        service.scheduler.start()
        words = f"answering what was accepted, for {GRACE_SECONDS:g} seconds at most"
        with closed_after(lambda: service.scheduler.close(0)), graceful_shutdown(server.stop, warn, words):
            server.run([listening])


def _check(given: Arguments, flags: dict[str, object]) -> None:
    """Raises ConfigError for a number out of range."""
    if not 0 <= given.port < 2**16:
        raise ConfigError(f"--port {given.port}: 0 to {2**16 - 1} is accepted")
    for name, least in (("slots", 1), ("context", 2)):  # a prompt of a token, and one more
        if name in flags and getattr(given, name) < least:
            raise ConfigError(f"--{name} {getattr(given, name)}: a whole number of at least {least} is accepted")
    if given.max_waiting < 0:
        raise ConfigError(f"--max-waiting {given.max_waiting}: a whole number of at least 0 is accepted")
    if not 0 < given.timeout < float("inf"):
        raise ConfigError(f"--timeout {given.timeout:g}: a number of seconds above 0 is accepted")


def api_key(given: Arguments) -> str:
    """From the file or the environment, not a flag, since every user of a machine sees all command lines."""
    if given.api_key_file:
        where = f"--api-key-file {given.api_key_file}"
        try:
            key = read_limited(Path(given.api_key_file), LONGEST_KEY).decode("ascii").strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{where}: cannot be read as a key: {reason(error)}") from None
    elif API_KEY_VARIABLE in os.environ:
        where, key = API_KEY_VARIABLE, os.environ[API_KEY_VARIABLE].strip()
    else:
        return ""
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{where}: a key of printable ASCII characters without spaces is accepted")
    return key


def _is_local(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _service(loaded: "LoadedModel", given: Arguments) -> "Service":
    """With a decoder whose memory is taken. Raises ConfigError where there is not enough, or the context is shorter."""
    from p828.inference.decode.decoder import Decoder
    from p828.model.backend import decode_dtype
    from p828.serve.api.service import Service
    from p828.serve.scheduling.metrics import Metrics
    from p828.serve.scheduling.room import check_cache
    from p828.serve.scheduling.scheduler import Scheduler
    from p828.system.device import is_out_of_memory

    model, device = loaded.config.model, loaded.model.head_weight.device
    slots = given.slots or SLOTS[device.type]
    context = given.context or model.max_position_embeddings
    if context > model.max_position_embeddings:
        raise ConfigError(
            f"--context {context}: at most {model.max_position_embeddings} is accepted, the model's context "
            "(model.max_position_embeddings)"
        )
    check_cache(model, slots, context, device, decode_dtype(device, loaded.dtype))
    tokenizer = loaded.tokenizer
    try:
        decoder = Decoder(
            loaded.model, tokenizer.vocab_size, tokenizer.eos_id, loaded.dtype, slots, context, PIECES[device.type]
        )
        with waiting("preparing each size of a step", warn):
            decoder.prepare()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"--slots {slots} of {context:,} tokens: out of memory; fewer --slots or a shorter --context is accepted"
        ) from None
    limits = Limits(slots, given.max_waiting, given.timeout)
    metrics = Metrics(loaded.config.name, context)
    scheduler = Scheduler(decoder, limits, metrics)
    return Service(scheduler, tokenizer, metrics, limits, loaded.config.name, int(time.time()), model.n_routed_experts)


def _lines(loaded: "LoadedModel", service: "Service", given: Arguments, address: str) -> list[str]:
    from p828.model.backend import decode_dtype
    from p828.serve.scheduling.room import cache_bytes

    model, device, context = loaded.config.model, loaded.model.head_weight.device, service.scheduler.max_length
    slots = service.limits.max_running
    dtype = decode_dtype(device, loaded.dtype)
    megabytes = cache_bytes(model, slots, context, dtype) / 1e6
    return [
        f"model    {service.model_name}, {loaded.path} (step {loaded.step})",
        f"device   {device.type} in {str(dtype).removeprefix('torch.')}",
        f"slots    {slots} of {context:,} tokens, {megabytes:,.0f} MB; {given.max_waiting:,} more requests may wait",
        f"page     {address}/",
        f"clients  {address}/v1 as base URL of OpenAI's API" + ("" if service.tokenizer.template else ", without chat"),
    ]
