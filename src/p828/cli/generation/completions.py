"""Completions in the order of their prompts, as text on standard output or as lines of a file."""

from collections.abc import Callable, Sequence
from typing import Protocol

from p828.cli.generation.asking import Asking
from p828.cli.generation.expert_record import ExpertRecord
from p828.cli.generation.speed import Speed
from p828.cli.output import show
from p828.errors import warn
from p828.inference.completions_file import CompletionsFile
from p828.inference.generate import Completion, Piece, Prompt
from p828.inference.prompts import GivenPrompt
from p828.system.slow_count import SlowCount
from p828.train.log.console import waiting


class Output(Protocol):
    def take(self, piece: Piece) -> None:
        """Get one more token of a prompt, in any order of the prompts."""


class Printed:
    """Each text as it comes, after those of the prompts before it, under a line with its prompt if there are more."""

    def __init__(self, prompts: Sequence[GivenPrompt], note: Callable[[Completion], None]) -> None:
        self._prompts, self._note = prompts, note
        self._current = 0
        self._held: dict[int, list[str]] = {}
        self._completions: dict[int, Completion] = {}
        self._begin()

    def take(self, piece: Piece) -> None:
        self._held.setdefault(piece.place, []).append(piece.text)
        if piece.completion is not None:
            self._completions[piece.place] = piece.completion
        while True:
            if text := "".join(self._held.pop(self._current, [])):
                show(text)
            completion = self._completions.pop(self._current, None)
            if completion is None:
                return
            show("", end="\n")
            self._note(completion)
            self._current += 1
            self._begin()

    def _begin(self) -> None:
        if 1 < len(self._prompts) > self._current:
            show(f"--- {self._current + 1}: {self._prompts[self._current].shown}", end="\n")


class Written:
    """A line of the file for each prompt, in their order; those of an earlier start are there."""

    def __init__(self, prompts: Sequence[GivenPrompt], file: CompletionsFile) -> None:
        self._prompts, self._file = prompts, file
        self._earlier = file.done
        self._waiting: dict[int, Completion] = {}
        self._count = SlowCount(warn, f"{{:,}} of {len(prompts):,} prompts are done")

    def take(self, piece: Piece) -> None:
        if piece.completion is None:
            return
        self._waiting[self._earlier + piece.place] = piece.completion
        while (completion := self._waiting.pop(self._file.done, None)) is not None:
            given = self._prompts[self._file.done].fields
            result = {
                "text": completion.text,
                "finish_reason": completion.finish_reason,
                "tokens": len(completion.ids),
            }
            self._file.write({**given, **result})
        self._count.to(self._file.done)


def complete(asking: Asking, prompts: Sequence[Prompt], output: Output) -> None:
    """Continue all prompts, as many together as have room; the speed, and the experts if wanted, come at the end."""
    experts = ExpertRecord(asking.loaded, keeps_tokens=len(prompts) == 1) if asking.wants_experts else None
    with asking.open_decoder([len(prompt.ids) for prompt in prompts]) as decoder:
        speed = Speed()
        for piece in asking.pieces(decoder, prompts):
            speed.note(piece)
            output.take(piece)
            if experts is not None:
                experts.take(piece)
    warn(str(speed))
    if experts is not None:
        with waiting("passing over the prompts for their experts", warn):
            experts.end(prompts)
        if len(prompts) == 1:
            experts.show_tokens()
        experts.show_loads()
