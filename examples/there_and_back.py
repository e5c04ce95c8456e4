"""A model leaves p828 and comes back: trained, exported, loaded by transformers, evaluated by lm-eval, answered by
llama.cpp, imported again and trained on.

    pip install 'p828[export,evaluate]' accelerate xllamacpp
    python examples/there_and_back.py DIRECTORY [--steps N]

Everything is written below DIRECTORY. Each stage is compared with p828's own numbers, and the first difference ends the
script with exit code 1. The model is small and has no sinks, so that transformers and llama.cpp each have its
architecture.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import p828

MODEL = {
    "vocab_size": 0, "hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "n_routed_experts": 8, "max_position_embeddings": 256,
    "attention_sinks": False,
}  # fmt: skip
PROMPT = "def "
NEW_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a new directory")
    parser.add_argument("--steps", type=int, default=60, help="of the first run; the second one has a third of them")
    given = parser.parse_args()
    given.directory.mkdir(parents=True)
    os.chdir(given.directory)
    train(given.steps)
    command("export", "runs/there", "there-hf")
    text = load_in_transformers()
    evaluate_in_lm_eval()
    command("export", "runs/there", "there.gguf")
    answer_in_llama_cpp(text)
    command("import", "there-hf", "--name", "back")
    train_on(given.steps // 3)
    print("there and back: every number is the same")


def command(*arguments: str) -> str:
    """Run a p828 command, show what it prints, and return it."""
    print(f"\n$ p828 {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "p828", *arguments], stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout, end="", flush=True)
    return done.stdout


def train(steps: int) -> None:
    overrides = {
        **{f"model.{name}": value for name, value in MODEL.items()},
        "name": "there", "tokenizer.vocab_size": 512, "tokenizer.training_megabytes": 1, "data.sequence_length": 128,
        "train.steps": steps, "train.gradient_accumulation": 1, "schedule.warmup_steps": steps // 10,
        "optimizer.learning_rate": 3e-3, "evaluation.rows": 16, "evaluation.prompts": [], "checkpoint.every": steps,
        "evaluation.bigram_baseline": False,
    }  # fmt: skip
    p828.train_run(p828.load_config("quickstart", overrides))


def load_in_transformers() -> str:
    """Its greedy continuation, which p828 gives, too."""
    model = AutoModelForCausalLM.from_pretrained("there-hf")
    tokenizer = AutoTokenizer.from_pretrained("there-hf")
    ids = tokenizer(PROMPT, return_tensors="pt")
    continued = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids["input_ids"].shape[1] :]
    text = tokenizer.decode(continued, skip_special_tokens=True)
    (expected,) = p828.load_run("runs/there").generate(PROMPT, temperature=0, max_new_tokens=NEW_TOKENS)
    check("transformers continues", text, expected)
    return text


def evaluate_in_lm_eval() -> None:
    """Bits per byte of a text, by lm-eval's own model and by p828's."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = Path("tasks").absolute()
    tasks.mkdir()
    (tasks / "text.jsonl").write_text(json.dumps({"text": "def add(a, b):\n    return a + b\n" * 4}) + "\n")
    (tasks / "own_text.yaml").write_text(
        "task: own_text\ndataset_path: json\ntest_split: test\noutput_type: loglikelihood_rolling\n"
        f'dataset_kwargs: {{data_files: {{test: "{tasks}/text.jsonl"}}, cache_dir: "{tasks}/cache"}}\n'
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list: [{metric: bits_per_byte}]\n'
    )
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": "there-hf", "dtype": "float32", "device": "cpu"},
        tasks=["own_text"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )
    theirs = found["results"]["own_text"]["bits_per_byte,none"]
    command("evaluate", "runs/there", "--tasks", "own_text", "--tasks-path", str(tasks), "--json", "tasks.json")
    ours = json.loads(Path("tasks.json").read_text())
    check_near("lm-eval measures, in bits per byte,", theirs, ours["tasks"]["own_text"]["bits_per_byte"])


def answer_in_llama_cpp(expected: str) -> None:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = "there.gguf"
    parameters.n_ctx, parameters.verbosity = 256, 0
    server = xllamacpp.Server(parameters)
    request = {"prompt": PROMPT, "n_predict": NEW_TOKENS, "temperature": 0.0}
    check("llama.cpp answers", server.handle_completions(request)["choices"][0]["text"], expected)


def train_on(steps: int) -> None:
    """A new run from the imported weights: its first loss is the first run's model's on the same tokens."""
    overrides = {
        "name": "on", "train.init_from": "runs/back", "train.steps": steps, "train.gradient_accumulation": 1,
        "schedule.warmup_steps": 1,
    }  # fmt: skip
    config = p828.load_config("runs/back", overrides)
    there = p828.load_run("runs/there")
    with p828.batches(config, there.tokenizer) as batches:
        expected = p828.loss(there.model, next(batches)).item()
    on = p828.train_run(config)
    first, *_ = (record["loss"] for record in on.records if record["kind"] == "step")
    check_near("the imported model's first loss is", first, expected)


def check(what: str, found: object, expected: object) -> None:
    print(f"{what} {found!r}")
    if found != expected:
        sys.exit(f"p828 has {expected!r}")


def check_near(what: str, found: float, expected: float) -> None:
    print(f"{what} {found:.6f}")
    if not math.isclose(found, expected, rel_tol=1e-5):
        sys.exit(f"p828 has {expected:.6f}")


if __name__ == "__main__":
    main()
