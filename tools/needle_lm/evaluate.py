"""Accuracy by context length: `python tools/needle_lm/evaluate.py MODEL_DIR --contexts 65536`.

Prints one line per context and seed; `--json FILE` keeps them, with every wrong answer.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from longattn.demo.driver import Settings, measure
from longattn.demo.report import Progress
from longattn.demo.runner import MODEL, Model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "model", type=Path, nargs="?", default=MODEL, help="folder of the weights (default: the package's)"
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192, 32768, 65536, 131072])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    model, results = Model(args.model), []
    stream = sys.stderr if sys.stderr.isatty() else None
    for context in args.contexts:
        for seed in args.seeds:
            questions = min(args.questions, context // 128)
            settings = Settings(context, questions, seed)
            result = measure(settings, settings.haystack(), model, progress=Progress(stream))
            results.append(result)
            accuracy = " ".join(f"{name} {value:.3f}" for name, value in result["accuracy"].items())
            wrong = ", ".join(f"{word} {code}: {said}" for word, code, said in result["contestants"]["exact"]["wrong"])
            print(
                f"{context} tokens, seed {seed}, {questions} asked: {accuracy}; errors: {wrong or 'none'}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
