"""`p828 bench train`: time a training step of every system on every shape, and print the rows as they come."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from p828.bench.peers import left_out, peer_systems
from p828.bench.process import MeasurementFailed, check_writable, measure_apart
from p828.bench.rows import Row, make_row
from p828.bench.systems import (
    ROUTINGS,
    System,
    common_to_all,
    describe_changes,
    own_systems,
)
from p828.bench.table import best_of, header, show_breakdown, show_failure, show_ratios, show_row
from p828.config import Config
from p828.errors import RunFailed
from p828.files import write_atomic


@dataclass
class Bench:
    """What is asked for, and what was found so far."""

    device: str
    peers: tuple[str, ...]
    routings: tuple[str, ...]
    steps: int
    has_breakdown: bool
    json_path: Path | None
    benchmarks: Path | None = None
    """The repository's, where the peers' code is; None without peers."""
    machine: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)

    def run(self, shapes: dict[str, Config]) -> None:
        """Measure the machine, then every shape. Raises ConfigError if the rows cannot be written, RunFailed at the end
        if a system failed."""
        if self.json_path is not None:
            check_writable(self.json_path)
        try:
            self.machine = measure_apart({"kind": "machine", "device": self.device})
        except MeasurementFailed as failure:
            raise RunFailed(f"the matrix product could not be measured:\n{failure}") from None
        tflops = self.machine["matmul_flops"] / 1e12
        _print(f"{self.machine['device']}, torch {self.machine['torch']}")
        _print(f"{self.machine['matmul']}: {tflops:.3g} TFLOP/s, what MFU is a share of")
        _print("MFU and TFLOP/s count matrix products and attention within documents, the same")
        _print("for every system, also where its attention goes beyond them")
        for name, config in shapes.items():
            for routing in self.routings:
                self._run_shape(name, config, routing)
        if self.failed:
            raise RunFailed(f"{len(self.failed)} of {len(self.failed) + len(self.rows)} systems failed")

    def _run_shape(self, name: str, config: Config, routing: str) -> None:
        compared = common_to_all(config) if self.peers else config
        train, length = compared.train, compared.data.sequence_length
        _print(f"\n{name}: micro-batches of {train.micro_batch_size} × {length:,} tokens, {train.gradient_accumulation}"
               f" a step; {self.steps} steps")  # fmt: skip
        _print(ROUTINGS[routing])
        for change in describe_changes(config, compared):
            _print(f"for all: {change}")
        _print(f"\n{header()}")
        own, peers = own_systems(compared), []
        if self.benchmarks is not None:
            for line in left_out(self.peers, self.device, self.benchmarks):
                _print(line)
            peers = peer_systems(compared, self.peers, self.device, self.benchmarks)
        rows: list[Row] = []
        for system in [*peers, *own]:  # the peers first, so that p828's ratio can stand in its row
            row = self._measure(name, routing, system, has_breakdown=self.has_breakdown and system is own[0])
            if row is not None:
                rows.append(row)
                _print(show_row(row, best_of(rows) if row.framework == "p828" else None))
        _print()
        for line in show_ratios([r for r in rows if r.framework == "p828"], [r for r in rows if r.framework != "p828"]):
            _print(line)
        for row in rows:
            if row.breakdown:
                _print(f"\n{row.system}\n{show_breakdown(row.breakdown)}")

    def _measure(self, shape: str, routing: str, system: System, has_breakdown: bool) -> Row | None:
        """The system's row; None, and its last lines printed, when it failed."""
        job = {
            "kind": "system", "system": system.to_dict(), "routing": routing, "steps": self.steps,
            "breakdown": has_breakdown,
            "benchmarks": None if system.framework == "p828" else str(self.benchmarks),
        }  # fmt: skip
        row = None
        try:
            measured = measure_apart(job)
        except MeasurementFailed as failure:
            self.failed.append({"shape": shape, "routing": routing, "system": system.label, "error": str(failure)})
            _print(show_failure(system.label, str(failure)))
        else:
            row = make_row(
                shape, routing, system.label, system.framework, system.config, measured, self.machine["matmul_flops"]
            )
            self.rows.append(row)
        self._write_json()
        return row

    def _write_json(self) -> None:
        if self.json_path is not None:
            found = {"machine": self.machine, "rows": [row.to_dict() for row in self.rows], "failed": self.failed}
            write_atomic(self.json_path, json.dumps(found, indent=1) + "\n")


def _print(text: str = "") -> None:
    print(text, flush=True)
