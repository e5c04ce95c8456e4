"""The presets as a table that a terminal of 60 columns holds."""

import textwrap

from p828.config import load, with_vocabulary
from p828.config.files import PRESETS, preset_names
from p828.model.costs import count_parameters

WIDTH = 60


def presets_table() -> str:
    """Of each preset: parameters, those active for a token, longest context, data, and what it is for."""
    lines = [f"{'preset':<13}{'parameters':>10}{'active':>10}{'context':>9}  data"]
    for name in preset_names():
        config = with_vocabulary(load(name))
        parameters = count_parameters(config.model)
        data = config.data.hub_name.rpartition("/")[2] or {"python": "stdlib"}.get(config.data.source, "files")
        lines.append(
            f"{name:<13}{parameters.total / 1e6:>8,.1f} M{parameters.active / 1e6:>8,.1f} M"
            f"{config.model.max_position_embeddings:>9,}  {data[:16]}"
        )
        lines += textwrap.wrap(_purpose(name), WIDTH, initial_indent="    ", subsequent_indent="    ")
    lines += ["", "p828 train NAME trains one; p828 train NAME --dry-run", "prints every setting of it."]
    return "\n".join(lines)


def _purpose(name: str) -> str:
    """What a preset's file says about itself in its first line."""
    first = (PRESETS / f"{name}.toml").read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip()
