"""Other libraries' models: the repository has them in `benchmarks/peers`, the installed package does not."""

import importlib
import sys
from pathlib import Path
from typing import Any

import p828
from p828.bench.systems import System
from p828.config import Config
from p828.errors import ConfigError, did_you_mean

FOLDER = Path("benchmarks") / "peers"


def find_peers() -> Path:
    """The repository's `benchmarks`: in the working directory, or beside the package. Raises ConfigError."""
    for repository in (Path.cwd(), Path(p828.__file__).parents[2]):
        if (repository / FOLDER / "systems.py").is_file():
            return repository / FOLDER.parent
    raise ConfigError(
        f"--peers: there is no {FOLDER} here; other libraries' models are in p828's repository: run it there"
    )


def check_peers(peers: tuple[str, ...], device: str, benchmarks: Path, module: str = "systems") -> None:
    """Raises ConfigError for a peer that is unknown, not installed, or cannot run here.

    `module` has those that are asked for: `systems`, which train, or `generators`.
    """
    systems = _module(benchmarks, module)
    for peer in peers:
        if peer not in systems.PEERS:
            raise ConfigError(f"--peers {peer}{did_you_mean(peer, systems.PEERS)} Accepted: {', '.join(systems.PEERS)}")
        if reason := systems.missing(peer, device):
            raise ConfigError(f"--peers {peer}: {reason}")


def peer_systems(config: Config, peers: tuple[str, ...], device: str, benchmarks: Path) -> list[System]:
    """What is timed of the peers."""
    found: list[System] = _module(benchmarks, "systems").peer_systems(config, peers, device)
    return found


def peer_generators(config: Config, peers: tuple[str, ...], device: str, benchmarks: Path) -> list[System]:
    """What is timed of the peers' generation."""
    found: list[System] = _module(benchmarks, "generators").peer_systems(config, peers, device)
    return found


def peer_generator(system: System, benchmarks: Path) -> Any:
    """A peer's `p828.bench.generation.generator.Generator`."""
    return _module(benchmarks, f"{system.options['module']}").build(system)


def peer_step(system: System, routing: str, benchmarks: Path) -> Any:
    """A peer's optimizer step: a `p828.bench.step.Step`."""
    return _module(benchmarks, "step").PeerStep(system, routing)


def left_out(peers: tuple[str, ...], device: str, benchmarks: Path) -> list[str]:
    """A line for each row that would be there if something else were installed."""
    lines: list[str] = _module(benchmarks, "systems").left_out(peers, device)
    return lines


def _module(benchmarks: Path, name: str) -> Any:
    if str(benchmarks) not in sys.path:
        sys.path.insert(0, str(benchmarks))
    return importlib.import_module(f"peers.{name}")
