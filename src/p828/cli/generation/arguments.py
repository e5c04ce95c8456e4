"""The flags of `p828 generate`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from p828.inference.sampling_config import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class Arguments(SamplingConfig):
    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A run's directory, for its newest checkpoint, or one checkpoint's."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; an empty one begins a document."""
    prompts: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Text file with a prompt a line, or .jsonl file with "prompt" or "messages" in each line."""
    output: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """New JSON Lines file, with a line for each prompt. A command that was killed goes on where it was."""
    chat: bool = False
    """Answer each prompt as a user's message, and with --interactive what you type as one conversation."""
    system: str = ""
    """With --chat, a system message before the user's."""
    interactive: bool = False
    """Continue the lines that you type, until the end of input (Ctrl-D); Ctrl-C stops an answer."""
    experts: bool = False
    """Show which experts the tokens went through, the load of each expert, and Project 828's statistics."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU if there is one."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text that ends the continuation, and is cut off."""
