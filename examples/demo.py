"""`python -m examples.demo` (or `make demo`): the whole product on text that this machine already has.

Collects the docstrings of the installed Python packages, trains a model that tells from a sentence which function it is
about, packs it, asks it a few questions and leaves it running behind a web page. Everything goes to runs/demo; a second
call finds the model there and only serves it.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from examples.docstrings import collect

FOLDER = Path("runs/demo")
DATA, RUN, BUNDLE = FOLDER / "data", FOLDER / "run", FOLDER / "bundle"

# Sized for minutes on two cores. Most functions have one sentence only, so rare labels are given weight, and a bag of words
# learns from so little more than a transformer does. `python -m train --help` says what each flag means.
TRAINING = """
    --encoder small --small-layers 0 --small-width 256 --max-length 32 --intermediate 0
    --connectivity shared --fan-in 64 --dense-labels 2% --head-init imprinted --weight-positives
    --epochs 10 --encoder-lr 1e-2 --head-lr 3e-3 --eval-every 10
"""
QUESTIONS = [
    "sort an array along an axis",
    "parse a JSON string",
    "singular value decomposition",
    "copy a whole directory tree",
    "run a command and capture its output",
    "shortest path between two nodes of a graph",
    "apply a 2D convolution to an image",
    "open a URL",
]
ANSWERS = 3


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument(
        "--port", type=int, default=8000, help="port of the page; 0 or a busy one: any free port (default: 8000)"
    )
    parser.add_argument("--no-serve", action="store_true", help="end after the answers")
    options = parser.parse_args()
    started = time.monotonic()
    try:
        if BUNDLE.exists():
            print(f"Found the model of an earlier run in {BUNDLE}. To train it anew, delete {FOLDER}.")
        else:
            make_bundle()
        server, address = serve(0 if options.no_serve else free_port(options.port))
        try:
            show_accuracy()
            show_answers(address)
            print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes.")
            if not options.no_serve:
                print(f"Try it yourself: {address}\nCtrl-C ends the server.", flush=True)
                server.wait()
        finally:
            server.terminate()
            server.wait()
    except KeyboardInterrupt:
        print("\nStopped.")
    except subprocess.CalledProcessError as error:
        print(f"error: {' '.join(map(str, error.cmd[1:3]))} failed with exit code {error.returncode}", file=sys.stderr)
        return 1
    return 0


def make_bundle() -> None:
    """Corpus, training and export, each into its own folder under runs/demo."""
    title("Collecting the docstrings of the installed packages")
    corpus = collect()
    corpus.write(DATA)
    text, ids = corpus.test[len(corpus.test) // 2]
    print(
        f"{len(corpus.labels):,} labels, {len(corpus.train):,} sentences to train on, {len(corpus.test):,} held out, such as:"
    )
    print(f"  {text}\n  → {', '.join(ids)}")
    title("Training")
    shutil.rmtree(RUN, ignore_errors=True)  # of a run that was cut short
    run("train", "--data", DATA, "--out", RUN, *TRAINING.split())
    title("Packing the model")
    run("export", RUN, "--out", BUNDLE, "--name", "docstrings")


def run(module: str, *arguments: str | Path) -> None:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    print("$ python", *command[1:], flush=True)
    subprocess.run(command, check=True)


def serve(port: int) -> tuple[subprocess.Popen[str], str]:
    """A server on `port` (0 takes a free one) that is ready, and its address."""
    title("Serving")
    command = [sys.executable, "-m", "serve", str(BUNDLE), "--port", str(port)]
    print("$ python", *command[1:], flush=True)
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    for line in server.stdout:  # the first line names the address once the model is loaded
        print(line, end="", flush=True)
        if address := re.search(r"http://\S+", line):
            return server, address[0]
    raise subprocess.CalledProcessError(server.wait(), command)


def free_port(wanted: int) -> int:
    """`wanted` if nothing listens there, otherwise 0."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", wanted)) == 0:
            print(f"Port {wanted} is taken; using another one.")
            return 0
    return wanted


def show_accuracy() -> None:
    title("Accuracy on the held-out sentences")
    rows = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in reversed(rows) if row["kind"] == "eval")
    names = ["P@1", "P@3", "P@5", "recall@10"]
    print("".join(f"{name:>11}" for name in names))
    print("".join(f"{last[name]:>11.3f}" for name in names))
    print("\nP@k: the share of right labels among the k best. A sentence has two right ones, its function and the module,")
    print("so P@3 ends at .667 and P@5 at .400. recall@10: the share of the right ones that are among the ten best.")


def show_answers(address: str) -> None:
    title("A few questions")
    body = json.dumps({"inputs": QUESTIONS, "top_k": ANSWERS}).encode()
    request = urllib.request.Request(address + "predict", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        predictions = json.load(response)["predictions"]
    for question, prediction in zip(QUESTIONS, predictions, strict=True):
        print(f"\n{question}")
        for label in prediction["labels"]:
            print(f"  {label['score']:6.1%}  {label['id']:<40} {label['name'][:60]}")


def title(text: str) -> None:
    print(f"\n── {text} " + "─" * max(0, 76 - len(text)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
