"""The experts that continuations went through, noted as their tokens come."""

import shutil
import sys

from p828.cli.generation.expert_tables import load_table, statistics, token_table
from p828.cli.output import show
from p828.inference.decode.sequence import NewToken
from p828.inference.expert_use import ExpertLoads, ExpertUse, prompt_use
from p828.inference.generate import Piece, Prompt
from p828.inference.load import LoadedModel


class ExpertRecord:
    """Of each prompt while it is continued; the loads of all, once they have ended."""

    def __init__(self, loaded: LoadedModel) -> None:
        config = loaded.model.config
        self._loaded = loaded
        self._loads = ExpertLoads(config.num_hidden_layers, config.n_routed_experts)
        self._tokens: dict[int, list[NewToken]] = {}
        self._last: tuple[ExpertUse, int] | None = None
        """The prompt that ended last, and its length in tokens."""

    def take(self, piece: Piece, prompt: Prompt) -> None:
        self._tokens.setdefault(piece.place, []).append(piece.token)
        if piece.completion is not None:
            self.end(piece.place, prompt)

    def end(self, place: int, prompt: Prompt) -> None:
        """The prompt gets no more tokens."""
        tokenizer, dtype = self._loaded.tokenizer, self._loaded.dtype
        use = prompt_use(self._loaded.model, prompt.ids, tokenizer.eos_id, dtype)
        self._last = use, len(use.ids)
        for token in self._tokens.pop(place, []):
            use.add(token)
        self._loads.add(use)

    def show_tokens(self) -> None:
        """The table of the prompt that ended last."""
        if self._last is not None:
            use, prompt_length = self._last
            _show(token_table(self._loaded.tokenizer, use, prompt_length, _width()))

    def show_loads(self) -> None:
        """Of all prompts together."""
        if self._loads.tokens:
            _show(load_table(self._loads, _width()))
            _show(statistics(self._loads, _width()))


def _width() -> int:
    """Of the terminal; what is no terminal takes lines of any length."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 10**6


def _show(lines: list[str]) -> None:
    show("\n".join(["", *lines]), end="\n")
