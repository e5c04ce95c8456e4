"""The experts that continuations went through, noted as their tokens come."""

import shutil
import sys
from collections.abc import Sequence

from p828.cli.generation.expert_tables import load_table, statistics, token_table
from p828.cli.output import show
from p828.inference.decode.sequence import NewToken
from p828.inference.expert_use import ExpertLoads, ExpertUse, prompt_use
from p828.inference.generate import Piece, Prompt
from p828.inference.load import LoadedModel


class ExpertRecord:
    """Of continuations while their tokens come, and of their prompts once all have ended; the loads of all."""

    def __init__(self, loaded: LoadedModel, keeps_tokens: bool) -> None:
        config = loaded.model.config
        self._loaded = loaded
        self._loads = ExpertLoads(config.num_hidden_layers, config.n_routed_experts)
        self._tokens: list[NewToken] | None = [] if keeps_tokens else None
        """Those of a prompt that is continued alone; of several only the loads are kept."""
        self._last: tuple[ExpertUse, int] | None = None
        """The prompt that ended last, and its length in tokens."""

    def take(self, piece: Piece) -> None:
        if piece.token.experts_LK is not None:
            self._loads.add_token(piece.token.experts_LK)
        if self._tokens is not None:
            self._tokens.append(piece.token)

    def end(self, prompts: Sequence[Prompt]) -> None:
        """The prompts get no more tokens. Each is passed over here, so that no text waits for it."""
        for prompt in prompts:
            use = prompt_use(self._loaded.model, prompt.ids, self._loaded.tokenizer.eos_id, self._loaded.dtype)
            self._loads.add(use)
            self._last = use, len(use.ids)
            for token in self._tokens or ():
                use.add(token)
        if self._tokens is not None:
            self._tokens = []

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
