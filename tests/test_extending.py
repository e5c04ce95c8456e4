"""The changes of docs/extending.md: every diff applies, is small, trains, and computes what its section says.

Each `check_…` below runs in a process of its own, with a copy of the package that has that one change.
"""

import csv
import gzip
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import p828
from decoded import decoded
from oracles import leaves
from p828.cli.main import dispatch
from p828.config import Config, DataConfig, from_dict, validate
from p828.data.batch import Batch
from p828.data.text.open import open_in_order
from p828.engine.plain import PlainEngine
from p828.errors import ConfigError, DataError
from p828.inference.sampling_config import SamplingConfig
from p828.kernels.adamw import join_float32
from p828.model import backend
from p828.model.experts import Experts, SharedExperts
from p828.model.loss import IGNORE
from p828.model.router import Router, score
from p828.runs import records
from runs import run_config, start, tiny_values, write_toml
from tiny import tiny_config, tiny_model

DOCUMENT = Path(__file__).parents[1] / "docs" / "extending.md"
MOST_FILES = 3
STEPS: dict[str, Any] = {"train": {"steps": 3, "device": "cpu"}, "evaluation": {"every": 0, "prompts": []}}


def sections() -> dict[str, str]:
    """Text by heading."""
    _, *parts = re.split(r"^## ", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {heading: text for heading, _, text in (part.partition("\n") for part in parts)}


CHECKS = {
    "Another activation in the experts": "check_activation",
    "Another router score": "check_score",
    "Another kind of text": "check_csv",
    "Another optimizer": "check_lion",
    "Another number in the records": "check_top_share",
}


def test_every_section_is_checked() -> None:
    assert list(sections()) == list(CHECKS)


@pytest.mark.parametrize("heading", CHECKS)
def test_change(heading: str, tmp_path: Path) -> None:
    (diff,) = re.findall(r"^```diff\n(.*?)^```", sections()[heading], flags=re.MULTILINE | re.DOTALL)
    files = re.findall(r"^\+\+\+ b/(.*)$", diff, flags=re.MULTILINE)
    assert 1 <= len(files) == diff.count("diff --git ") <= MOST_FILES
    assert all(file.startswith("src/p828/") for file in files)
    clone, place = tmp_path / "clone", tmp_path / "place"
    source = Path(p828.__file__).parent
    shutil.copytree(source, clone / "src" / "p828")  # with what is compiled, which stays right for unchanged files
    place.mkdir()
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path)}  # as if no repository were around it
    applied = subprocess.run(
        ["git", "apply", "-"], cwd=clone, env=environment, input=diff, text=True, capture_output=True, check=False
    )
    assert applied.returncode == 0, applied.stderr
    in_a_process(clone / "src", CHECKS[heading], place)


def in_a_process(source: Path, check: str, place: Path) -> None:
    """Run a function of this file with the package in `source`, in the directory `place`."""
    code = f"import torch, test_extending; torch.manual_seed(0); test_extending.{check}()"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join((str(source), str(Path(__file__).parent))))
        process = start(cwd=place, launcher=("-c", code))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err


def train(toml: Path, *flags: str) -> int:
    return dispatch(["train", str(toml), *flags])


def steps_of(name: str) -> list[dict[str, Any]]:
    found = [line for line in records.read(Path("runs", name, "metrics.jsonl")) if line["kind"] == "step"]
    assert all(math.isfinite(line["loss"]) for line in found)
    return found


def check_activation() -> None:
    config = tiny_config(hidden_act="relu2", n_shared_experts=2)
    experts, shared = Experts(config), SharedExperts(config)
    for parameter in (*experts.parameters(), *shared.parameters()):
        torch.nn.init.normal_(parameter)
    x_TH, upstream_TH, weights_TK = torch.randn(9, 32, requires_grad=True), torch.randn(9, 32), torch.rand(9, 2)
    experts_TK = torch.rand(9, 8).argsort(1)[:, :2]
    actual_TH = experts(x_TH, weights_TK, experts.permutation(x_TH, experts_TK, None)) + shared(x_TH)
    actual_TH.backward(upstream_TH)

    (twin_TH,) = leaves(x_TH, dtype=torch.float64)
    expected_TH = expert(twin_TH, *(module.weight for module in (shared.gate_proj, shared.up_proj, shared.down_proj)))
    gate_EIH, up_EIH = experts.gate_up_proj.chunk(2, dim=1)
    for choice in range(2):
        found = [
            expert(x_H, gate_EIH[e], up_EIH[e], experts.down_proj[e])
            for x_H, e in zip(twin_TH, experts_TK[:, choice].tolist(), strict=True)
        ]
        expected_TH = expected_TH + weights_TK[:, choice, None].double() * torch.stack(found)
    expected_TH.backward(upstream_TH.double())
    # float32 sums of at most 48 terms, of numbers up to some thousands
    torch.testing.assert_close(actual_TH.double(), expected_TH, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(x_TH.grad.double(), twin_TH.grad, rtol=1e-5, atol=1e-2)

    check_decoded(hidden_act="relu2", n_shared_experts=2)
    gpu = torch.device("cuda", 0), torch.bfloat16
    assert not backend.has_decode_kernels(config, *gpu)
    assert backend.has_decode_kernels(tiny_config(dropout=0.1), *gpu)
    assert backend.experts_backend("relu2", *gpu, drops=False) == "grouped_mm"
    assert not backend.allows_cuda_graph(config, *gpu)
    assert backend.allows_cuda_graph(tiny_config(), *gpu)
    on_a_gpu = backend.remarks(config, *gpu)
    assert [line.partition(":")[0] for line in on_a_gpu] == ['model.hidden_act = "relu2"']
    with pytest.MonkeyPatch.context() as patch:  # the run's start says what it would on a GPU
        patch.setattr(backend, "remarks", lambda *_: on_a_gpu)
        assert train(write_toml(Path(), model={"hidden_act": "relu2"}, **STEPS)) == 0
    assert len(steps_of("tiny")) == 3
    said = [line for line in records.read(Path("runs/tiny/metrics.jsonl")) if line.get("event") == "remark"]
    assert [line["text"] for line in said] == on_a_gpu


def check_decoded(**changes: Any) -> None:
    """A decoder's tokens are the likeliest after a whole pass."""
    model = tiny_model(**changes)
    for sequence in decoded(model, [[1, 2, 3], [50], [7] * 9], SamplingConfig(temperature=0.0, max_new_tokens=6)):
        for end in range(sequence.prompt_length, len(sequence.ids)):
            with torch.no_grad():
                hidden_SH = model(torch.tensor([sequence.ids[:end]])).hidden_BSH[0]
            assert sequence.ids[end] == model.logits(hidden_SH[-1])[:97].argmax()


def expert(x_H: Tensor, gate_IH: Tensor, up_IH: Tensor, down_HI: Tensor) -> Tensor:
    gate_I, up_I = (x_H @ weight_IH.detach().double().T for weight_IH in (gate_IH, up_IH))
    return (gate_I.where(gate_I > 0, 0.0) ** 2 * up_I) @ down_HI.detach().double().T


def check_score() -> None:
    check_decoded(scoring_func="sqrtsoftplus")
    gpu = torch.device("cuda", 0), torch.bfloat16
    assert not backend.has_decode_kernels(tiny_config(scoring_func="sqrtsoftplus"), *gpu)
    router = Router(tiny_config(scoring_func="sqrtsoftplus"))
    torch.nn.init.normal_(router.weight)
    x_TH = torch.randn(50, 32, requires_grad=True)
    routing = router(x_TH)
    scores_TE = (1 + (x_TH.double() @ router.weight.double().T).exp()).log().sqrt()
    torch.testing.assert_close(routing.scores_TE.double(), scores_TE, rtol=1e-4, atol=1e-6)
    assert torch.equal(routing.experts_TK, scores_TE.topk(3).indices)
    chosen_TK = scores_TE.gather(1, routing.experts_TK)
    torch.testing.assert_close(
        routing.weights_TK.double(), chosen_TK / chosen_TK.sum(1, keepdim=True), rtol=1e-4, atol=0.0
    )
    logits = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], requires_grad=True)
    (gradient,) = torch.autograd.grad(score("sqrtsoftplus", logits).sum(), logits)
    assert gradient.isfinite().all()
    assert train(write_toml(Path(), model={"scoring_func": "sqrtsoftplus"}, **STEPS)) == 0
    assert len(steps_of("tiny")) == 3


def check_csv() -> None:
    texts = [path.read_text() for path in sorted(Path(tiny_values(Path())["data"]["files"][0]).parent.glob("*.txt"))]
    texts = [f'{text}, "{number}"\n\nan naïve "end"' for number, text in enumerate(texts)]
    for ending in (".jsonl", ".csv", ".csv.gz"):
        Path(f"of{ending}").mkdir()
    with open("of.jsonl/a.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"body": text}) + "\n" for text in texts)
    with open("of.csv/a.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "body"], *enumerate(texts)])
    Path("of.csv.gz/a.csv.gz").write_bytes(gzip.compress(Path("of.csv/a.csv").read_bytes()))
    for name, steps in (("jsonl", 6), ("csv", 3), ("csv", 6), ("csv.gz", 6)):  # the second one of .csv goes on
        # Blocks that begin within the file, of one part of it or the other.
        data = {"files": [f"of.{name}"], "text_field": "body", "block_documents": 7, "streams": 2}
        toml = write_toml(Path(), **{**STEPS, "data": {**tiny_values(Path())["data"], **data}})
        assert train(toml, "--name", name, "--train.steps", str(steps)) == 0
    expected = [line["rows"] for line in steps_of("jsonl")]
    assert len(set(expected)) == 6
    assert [line["rows"] for line in steps_of("csv")] == [line["rows"] for line in steps_of("csv.gz")] == expected

    Path("a.csv").write_text("id,text\n1,a\n2\n3,c\n")
    with pytest.raises(DataError, match=r"a\.csv, row 2: field 'text' \(data\.text_field\) holds NoneType"):
        list(open_in_order(DataConfig(source="files", files=("a.csv",))))
    assert list(open_in_order(DataConfig(source="files", files=("a.csv",), bad_records="skip"))) == ["a", "c"]
    Path("a.csv").write_bytes(b"id,text\n1,\xff\n")
    with pytest.raises(DataError, match=r"a\.csv: cannot be read"):
        list(open_in_order(DataConfig(source="files", files=("a.csv",))))


def check_lion() -> None:
    lion = {"kind": "lion", "learning_rate": 2.0**-7, "betas": [0.9, 0.99], "weight_decay": 0.5, "max_grad_norm": 0.1}
    for dtype in ("float32", "bfloat16"):
        check_updates(run_config(Path(), optimizer=lion, train={"dtype": dtype, "device": "cpu"}))

    values = {**STEPS, "optimizer": lion, "schedule": {"kind": "constant", "warmup_steps": 0}}
    toml = write_toml(Path(), **values)
    for name, steps in (("cut", 2), ("cut", 4), ("whole", 4)):
        assert train(toml, "--name", name, "--train.steps", str(steps)) == 0
    assert [line["loss"] for line in steps_of("cut")] == [line["loss"] for line in steps_of("whole")]
    assert train(toml, "--name", "cut", "--optimizer.kind", "adamw") == 2
    for engine in ("deepspeed", "sharded"):
        with pytest.raises(ConfigError, match=f'kind = "lion": with engine = "{engine}", "adamw" is accepted'):
            validate(from_dict({"name": "x", "engine": engine, "optimizer": lion}, "x"))


def check_updates(config: Config) -> None:
    """Three updates against the rule in float64."""
    engine, rate = PlainEngine(config), config.optimizer.learning_rate
    parameters = dict(engine.model.named_parameters())
    momenta = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in parameters.items()}
    for _ in range(3):
        engine.forward_backward(random_batch(), 64)
        gradients = {name: engine.gradients.sums[p].double() for name, p in parameters.items()}
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
        assert norm > 0.1  # so that they are clipped
        before = masters_of(engine)
        assert engine.step(rate).applied
        for name, weight in masters_of(engine).items():
            gradient, decay = gradients[name] * 0.1 / norm, 0.5 if is_decayed(name, before[name]) else 0.0
            direction = 0.9 * momenta[name] + 0.1 * gradient
            expected = before[name] - rate * (direction.sign() + decay * before[name])
            # Where the direction is a rounding of float32, its sign may be the other one.
            certain = (direction == 0) | (direction.abs() > 1e-6 * gradient.abs().max())
            assert certain.double().mean() > 0.99
            torch.testing.assert_close(weight[certain], expected[certain], rtol=1e-6, atol=1e-7)
            momenta[name] = 0.99 * momenta[name] + 0.01 * gradient


def masters_of(engine: PlainEngine) -> dict[str, Tensor]:
    masters = engine.masters.state_dict()
    return {
        name: (join_float32(*masters[name]) if name in masters else parameter.detach()).double()
        for name, parameter in engine.model.named_parameters()
    }


def is_decayed(name: str, weight: Tensor) -> bool:
    return weight.ndim >= 2 and "embed_tokens" not in name


def random_batch() -> Batch:
    tokens = torch.randint(300, (2, 33))
    positions = torch.arange(32).expand(2, -1).contiguous()
    documents = torch.zeros_like(positions, dtype=torch.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:].clone(), positions, documents, 64)


def check_top_share() -> None:
    engine = PlainEngine(run_config(Path(), train={"device": "cpu"}))
    for layer in engine.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight)
    routings: list[list[Tensor]] = [[], []]
    for layer, found in zip(engine.model.layers, routings, strict=True):
        layer.mlp.gate.register_forward_hook(lambda gate, given, routing, found=found: found.append(routing.logits_TE))
    batches = [random_batch() for _ in range(2)]
    batches[1].targets_BS[0] = IGNORE
    for batch in batches:
        engine.forward_backward(batch, 96)
    result = engine.step(1e-3)
    has_target_T = torch.cat([batch.targets_BS.flatten() for batch in batches]) != IGNORE
    for actual, logits in zip(result.numbers()["router_top_share"], routings, strict=True):
        scores_TE = torch.cat(logits)[has_target_T].double().sigmoid()
        expected = (scores_TE / scores_TE.sum(dim=1, keepdim=True)).max(dim=1).values.mean().item()
        assert math.isclose(actual, expected, rel_tol=1e-5)
        assert 0.3 < expected < 0.9

    assert train(write_toml(Path(), **STEPS)) == 0
    for line in steps_of("tiny"):
        # The first routers are nearly blind, so that all experts' scores are nearly the same.
        assert all(0.25 <= share < 0.27 for share in line["router_top_share"])
