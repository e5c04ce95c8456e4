"""What pyproject.toml accepts is what `make test-oldest` runs the tests with."""

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
OF_DEVELOPERS = {"dev", "peers"}  # whose lower bounds promise nothing to a user


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [lines for extra, lines in project["optional-dependencies"].items() if extra not in OF_DEVELOPERS]
    return [Requirement(line) for lines in (project["dependencies"], *extras) for line in lines]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_the_oldest_accepted_version_is_tested(requirement: Requirement) -> None:
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    tested = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    (lowest,) = [one.version for one in requirement.specifier if one.operator == ">="]
    version = tested[canonicalize_name(requirement.name)]
    assert f"{version}.".startswith(f"{lowest}."), f"{requirement}, tested with {version}"
