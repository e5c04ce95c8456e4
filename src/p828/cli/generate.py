"""`p828 generate`: continue prompts with a trained model, or answer messages."""

from p828.cli.flags import parse, shown_word
from p828.cli.generation.arguments import Arguments
from p828.cli.output import loading_pytorch
from p828.config.rules import check_path
from p828.errors import ConfigError

USAGE = (
    "p828 generate CHECKPOINT --prompt TEXT [--prompt TEXT ...] [--prompts FILE] [--output FILE] [--chat] "
    "[--interactive] [--experts] [--temperature T ...]"
)
DESCRIPTION = (
    f"{USAGE}\n\nOne prompt's text is shown as it is generated; several are continued together. With --chat, which "
    "needs a run that was trained on conversations, each prompt is a user's message, and what is shown the answer."
)


def run(arguments: list[str]) -> None:
    given = parse(Arguments, arguments, prog="p828 generate", description=DESCRIPTION)
    named = {argument.partition("=")[0] for argument in arguments}
    for flag, path in (("--prompts", given.prompts), ("--output", given.output)):
        if path or flag in named:
            check_path(flag, path)
    _check(given)
    with loading_pytorch():
        from p828.cli.generation.session import generate
    generate(given)


def _check(given: Arguments) -> None:
    """Raises ConfigError for flags that do not go together."""
    has_prompts = bool(given.prompt or given.prompts)
    if not has_prompts and not given.interactive:
        raise ConfigError("nothing to continue: give --prompt TEXT, --prompts FILE or --interactive")
    if given.slide and given.experts:
        raise ConfigError("--slide: accepted without --experts, since tokens that are read again have new experts")
    if given.output and not has_prompts:
        raise ConfigError(f"--output {shown_word(given.output)}: accepted with --prompt or --prompts")
    check_path("CHECKPOINT", given.checkpoint)
