"""`p828 bench generate`: time how every system continues prompts, and print the rows as they come."""

import json
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from p828.bench.generation.rows import Row, best_peer, make_row, to_dict
from p828.bench.generation.table import header, show_failure, show_row
from p828.bench.generation.workload import Workload
from p828.bench.peers import peer_generators
from p828.bench.process import MeasurementFailed, check_writable, measure_apart, results_apart
from p828.bench.systems import System, common_to_all, describe_changes
from p828.config import Config
from p828.errors import RunFailed
from p828.files import write_atomic


@dataclass
class GenerateBench:
    """What is asked for, and what was found so far."""

    device: str
    peers: tuple[str, ...]
    work: Workload
    json_path: Path | None
    benchmarks: Path | None = None
    """The repository's, where the peers' code is; None without peers."""
    machine: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)

    def run(self, shapes: dict[str, Config]) -> None:
        """Measure memory, then every shape. Raises ConfigError if the rows cannot be written, RunFailed at the end if
        a system failed at something."""
        if self.json_path is not None:
            check_writable(self.json_path)
        try:
            self.machine = measure_apart({"kind": "memory", "device": self.device})
        except MeasurementFailed as failure:
            raise RunFailed(f"the rate of memory could not be measured:\n{failure}") from None
        rate = self.machine["bytes_per_second"]
        _print(f"{self.machine['device']}, torch {self.machine['torch']}")
        _print(f"memory: {rate / 1e9:,.4g} GB/s, the faster of reading and copying a large buffer")
        _print("of memory: the share of that rate at which a step reads the weights it needs, for")
        _print("the experts if routing is even, and the keys and values of all its sequences")
        for name, config in shapes.items():
            self._run_shape(name, config)
        if self.failed:
            raise RunFailed(f"{len(self.failed)} of {len(self.failed) + len(self.rows)} measurements failed")

    def _run_shape(self, name: str, config: Config) -> None:
        compared = self.work.with_context(same_model(config) if self.peers else config)
        _print(
            f"\n{name}: prompts of {self.work.prompt_length:,} tokens, {self.work.new_tokens:,} steps; random weights"
        )
        for change in describe_changes(config, compared):
            _print(f"for all: {change}")
        peers = []
        if self.benchmarks is not None:
            peers = peer_generators(compared, self.peers, self.device, self.benchmarks)
        for system in [*peers, System("p828", "p828", compared)]:  # p828 last, so that its ratio can stand in its rows
            _print(f"\n{header()}\n{system.label}")
            self._measure(name, system)

    def _measure(self, shape: str, system: System) -> None:
        """Add and print the system's rows. What it fails at is printed, and the rest tried in a new process."""
        is_own = system.framework == "p828"
        items = self.work.items(recomputes=is_own)
        while items:
            job = {
                "kind": "generation", "system": system.to_dict(), "work": self.work.to_dict(),
                "items": [item.to_dict() for item in items], "benchmarks": None if is_own else str(self.benchmarks),
            }  # fmt: skip
            dtype = ""
            try:
                with closing(results_apart(job)) as results:
                    for found in results:
                        if "item" not in found:
                            dtype = found["dtype"]
                            continue
                        items.pop(0)
                        self._add(shape, system, dtype, found)
            except MeasurementFailed as failure:
                failed = items if not dtype else items[:1]  # without one it could not be built
                items = items[len(failed) :]
                self._fail(shape, system, ", ".join(map(str, failed)), str(failure))

    def _add(self, shape: str, system: System, dtype: str, found: dict[str, Any]) -> None:
        rate = self.machine["bytes_per_second"]
        row = make_row(shape, system.label, system.framework, system.config.model, dtype, found, rate)
        self.rows.append(row)
        _print(show_row(row, best_peer(self.rows, row) if system.framework == "p828" else None))
        self._write_json()

    def _fail(self, shape: str, system: System, items: str, said: str) -> None:
        self.failed.append({"shape": shape, "system": system.label, "item": items, "error": said})
        _print(show_failure(items, said))
        self._write_json()

    def _write_json(self) -> None:
        if self.json_path is not None:
            found = {"machine": self.machine, "rows": [to_dict(row) for row in self.rows], "failed": self.failed}
            write_atomic(self.json_path, json.dumps(found, indent=1) + "\n")


def same_model(config: Config) -> Config:
    """The nearest configuration that every system computes exactly: without sinks, besides."""
    common = common_to_all(config)
    return replace(common, model=replace(common.model, attention_sinks=False))


def _print(text: str = "") -> None:
    print(text, flush=True)
