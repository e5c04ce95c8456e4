"""Whether Python, PyTorch and the packages that p828 needs are there, in versions that it was made for."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import InvalidRequirement, Requirement

from p828.config import Config
from p828.doctor.check import Check

OLDEST, NEWEST = (3, 10), (3, 12)  # Python's, as CONTRIBUTING.md says


def check_versions(config: Config | None) -> list[Check]:
    """p828 itself, Python, PyTorch, and every other package. `config` says which of the optional ones are needed."""
    return [_python(), _torch(), _packages(config)]


def _python() -> Check:
    shown = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    own = sys.version_info[:2]
    if own < OLDEST:
        return Check("python", "failure", shown, "install Python 3.10, 3.11 or 3.12")
    if own > NEWEST:
        return Check("python", "warning", f"{shown}: newer than what p828 is tested with", "use Python 3.10 to 3.12")
    return Check("python", "ok", shown)


def _torch() -> Check:
    """PyTorch with what it was built for, and Triton, which the GPU's kernels are written in."""
    try:
        import torch
    except (ImportError, OSError) as error:  # one of its libraries may be missing
        return Check("pytorch", "failure", f"cannot be imported: {error}", "install PyTorch (https://pytorch.org)")
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
    text = f"{torch.__version__}, built for {built_for}"
    if not torch.version.cuda:
        return Check("pytorch", "ok", text)
    try:
        return Check("pytorch", "ok", f"{text}; Triton {version('triton')}; NCCL {_nccl()}")
    except PackageNotFoundError:
        return Check("pytorch", "failure", f"{text}; without Triton", "pip install triton, which the GPU kernels need")


def _nccl() -> str:
    import torch

    return ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "not tried without a GPU"


def _packages(config: Config | None) -> Check:
    """Every package that the installed p828 asks for, and those of the parts that `config` uses."""
    try:
        required = [Requirement(text) for text in requires("p828") or ()]
    except (PackageNotFoundError, InvalidRequirement):
        return Check("packages", "warning", "p828 is not installed, so what it needs is not known", "pip install .")
    extras = _extras(config)
    wanted = [one for one in required if _is_wanted(one, extras)]
    complaints = [problem for one in wanted if (problem := _problem(one))]
    if not complaints:
        parts = f", with {' and '.join(extras)}" if extras else ""
        return Check("packages", "ok", f"p828 {version('p828')} and the {len(wanted)} packages that it needs{parts}")
    names = " ".join(f"'p828[{extra}]'" for extra in extras) or "p828"
    return Check("packages", "failure", "; ".join(complaints), f"pip install --upgrade {names}, or pip install .")


def _extras(config: Config | None) -> list[str]:
    """The optional parts of p828 that a run of this configuration needs."""
    if config is None:
        return []
    needs_lm_eval = any(not name.startswith("cloze_") for name in config.evaluation.tasks)
    return [
        *(["deepspeed"] if config.engine == "deepspeed" else []),
        *(["evaluate"] if needs_lm_eval else []),
        *(["tensorboard"] if config.trackers.tensorboard else []),
        *(["trackio"] if config.trackers.trackio else []),
    ]


def _is_wanted(requirement: Requirement, extras: list[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ["", *extras])


def _problem(requirement: Requirement) -> str:
    """What is wrong with the installed version; empty if nothing is."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return f"{requirement.name} is missing"
    if requirement.specifier.contains(found, prereleases=True):
        return ""
    return f"{requirement.name} {found} is not {requirement.specifier}"
