"""A tokenizer.json tried out in a process of its own: reading one can crash, or take without end."""

import subprocess
import sys

import tokenizers

from p828.errors import ConfigError
from p828.files import MEBIBYTE

SECONDS, SECONDS_PER_MEBIBYTE = 15.0, 2.0  # twenty times what those in use take
LONGEST_CAUSE = 300  # characters of what a library says
SAMPLES = (
    "cat",
    "The cat isn't here: 1234 + 5.\n\tdef f(x):\n        return x  \r\n",
    "naïve Ångström 数据 한국어 🙂 \u0301\u200b\u2028\ufffd\U0010fffd\x00\x07",  # with characters that it may not know
    "",
    " ",
)
# The paths of this process, so that nothing of the working directory is imported.
PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from {module} import main; main()"


def try_out(text: str, where: str) -> None:
    """Read a tokenizer.json, encode and decode. Raises ConfigError in a line if that fails or takes too long."""
    limit = SECONDS + SECONDS_PER_MEBIBYTE * len(text) / MEBIBYTE
    try:
        tried = run_apart(__name__, text, limit)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{where}: not usable as a tokenizer: trying it out took over {limit:.0f} s") from None
    if tried.returncode:
        cause = " ".join(tried.stdout.decode("utf-8", "replace").split())
        raise ConfigError(f"{where}: {cause[:LONGEST_CAUSE] or f'not a tokenizer.json: exit code {tried.returncode}'}")


def run_apart(module: str, text: str, seconds: float) -> "subprocess.CompletedProcess[bytes]":
    """Run a module's `main` in a process of its own, with `text` on its standard input.

    Raises subprocess.TimeoutExpired once it has been ended for taking too long.
    """
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(module=module), *sys.path],
        input=text.encode("utf-8", "surrogatepass"), capture_output=True, timeout=seconds,
    )  # fmt: skip


def main() -> None:
    """Try what comes on standard input; what fails is said on standard output, with exit code 1."""
    stage = "not a tokenizer.json"
    try:
        inner = tokenizers.Tokenizer.from_str(sys.stdin.buffer.read().decode("utf-8"))
        stage = "not usable as a tokenizer"
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        known = set(inner.get_vocab(with_added_tokens=True).values())
        for sample in SAMPLES:
            ids = inner.encode(sample, add_special_tokens=False).ids
            if sample is SAMPLES[0] and not ids:
                raise ValueError("text becomes no tokens")
            if not known.issuperset(ids):
                raise ValueError("text becomes ids that are not in its vocabulary")
            inner.decode(ids)
        inner.decode(sorted(known)[:1000], skip_special_tokens=True)
    except BaseException as error:  # a panic of the library is no Exception
        print(f"{stage}: {error or type(error).__name__}")
        sys.exit(1)
