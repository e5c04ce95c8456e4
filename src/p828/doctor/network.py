"""Whether the Hugging Face hub and Weights & Biases can be reached, and what works without them."""

import os
import threading

from p828.config import Config
from p828.doctor.check import Check, Status

ANSWER_WITHIN = 5.0  # seconds for a request
WITHIN = 8.0  # seconds in all: to find an address by its name has no limit of its own
LONGEST_CAUSE = 160  # characters


def check_network(config: Config | None) -> list[Check]:
    """The hub and W&B. Being offline is a warning: a run on local files needs neither."""
    return [_hub(config), _wandb(config)]


def _hub(config: Config | None) -> Check:
    from huggingface_hub import constants, get_token

    name = "hugging face hub"
    if constants.HF_HUB_OFFLINE:
        return Check(name, "ok", "not asked, as HF_HUB_OFFLINE is set: what is in the cache can be read")
    problem = problem_at(f"{constants.ENDPOINT}/api/models?limit=1")
    if not problem:
        account = "logged in" if get_token() else "without an account, which public data needs none of"
        return Check(name, "ok", f"{constants.ENDPOINT} answers; {account}")
    works = "local files, prepared data and tokenizers that are trained, local or in the cache still work"
    if config is not None and not _needs_hub(config):
        works = "this configuration needs nothing from it"
    return Check(
        name, "warning", f"{constants.ENDPOINT}: {problem}; {works}",
        "with a filled cache: HF_HUB_OFFLINE=1; a mirror: HF_ENDPOINT; a proxy: HTTPS_PROXY",
    )  # fmt: skip


def _needs_hub(config: Config) -> bool:
    """Whether its data or its tokenizer may come from there."""
    data = config.data
    is_read = any(source.source == "hf" and not source.prepared for source in data.sources)
    name = config.tokenizer.name
    is_named = name != "train" and not os.path.exists(os.path.expanduser(name))
    return is_read or is_named or (data.validation.kind == "split" and not data.prepared)


def _wandb(config: Config | None) -> Check:
    name, mode = "weights & biases", "off" if config is None else config.wandb.mode
    try:
        import wandb
    except ImportError as error:
        status: Status = "warning" if mode == "off" else "failure"
        return Check(name, status, f"cannot be imported: {error}; every run keeps its own records", "pip install wandb")
    settings = wandb.Settings()
    try:
        settings.update_from_env_vars(dict(os.environ))
    except ValueError as error:
        text = "a variable WANDB_… of the environment is not taken: " + " ".join(str(error).split())[:LONGEST_CAUSE]
        return Check(name, "warning" if mode == "off" else "failure", text, "mend the variable, or unset it")
    address = str(settings.base_url)
    problem = problem_at(address)
    if problem:
        works = {"online": "the run would be recorded offline", "offline": "the run is recorded offline anyway"}
        return Check(
            name, "warning", f"{address}: {problem}; {works.get(mode, 'every run keeps its own records')}",
            "later: wandb sync RUN/wandb/offline-run-*; a server of your own: WANDB_BASE_URL",
        )  # fmt: skip
    if mode == "online" and not _has_key(address):
        remedy = 'run `wandb login` or set WANDB_API_KEY, or give wandb.mode "offline"'
        return Check(name, "failure", f"{address} answers, and there is no key for it", remedy)
    return Check(name, "ok", f"{address} answers")


def _has_key(address: str) -> bool:
    """Whether the environment or a .netrc has one."""
    import netrc
    from urllib.parse import urlsplit

    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(urlsplit(address).hostname or "")
    except (OSError, netrc.NetrcParseError):
        return False
    return found is not None


def problem_at(address: str, within: float = WITHIN) -> str:
    """Why this address does not answer, in a line; empty if it does. Any answer but a server's error counts."""
    found: list[str] = []
    asking = threading.Thread(target=lambda: found.append(_asked(address)), daemon=True)
    asking.start()
    asking.join(within)
    return found[0] if found else f"no answer within {within:g} seconds"


def _asked(address: str) -> str:
    """By the HTTP library that huggingface_hub uses, with the proxies and certificates of the environment."""
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # httpx or httpx2, as it uses

    try:
        answer = httpx.get(address, timeout=ANSWER_WITHIN, follow_redirects=True)
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, ImportError) as error:  # of a proxy of another kind
        text = " ".join(str(error).split()) or type(error).__name__
        return f"cannot be reached ({text[:LONGEST_CAUSE]})"
    return f"answers with error {answer.status_code}" if answer.status_code >= 500 else ""
