"""Whether the libraries of TensorBoard and trackio can be imported, where a configuration asks for them."""

import os

from p828.config import Config
from p828.doctor.check import Check
from p828.doctor.network import problem_at
from p828.errors import ConfigError
from p828.train.log.tracker import Tracker
from p828.train.log.trackers import asked_for


def check_trackers(config: Config | None) -> list[Check]:
    """A line for each; that of Weights & Biases is `network`'s."""
    asked = [] if config is None else asked_for(config.run_dir, config)
    return [_check(tracker) for tracker in asked if tracker.key != "wandb"]


def _check(tracker: Tracker) -> Check:
    """With the server that trackio's variable names, which may be out of reach: it keeps the rows then."""
    try:
        tracker.import_library()
    except ConfigError as error:
        text, _, remedy = str(error).partition("\n")
        return Check(tracker.key, "failure", text, remedy)
    text = "can be imported"
    address = os.environ.get("TRACKIO_SERVER_URL", "").partition("?")[0]  # a token for writing follows
    if tracker.key != "trackio" or not address or os.environ.get("TRACKIO_SPACE_ID"):
        return Check(tracker.key, "ok", text)
    if problem := problem_at(address):
        return Check(
            tracker.key, "warning", f"{text}; {address}: {problem}; rows are kept here, and sent by a later start",
            "start the server, or unset TRACKIO_SERVER_URL to keep runs on this machine",
        )  # fmt: skip
    return Check(tracker.key, "ok", f"{text}; {address} answers")
