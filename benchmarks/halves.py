"""The two halves of a text, for `pruning.py`: one to train on, the other to report on.

Writes train.txt, report-prompts.txt and report.txt into a folder; a line is a document.
"""

import argparse
from pathlib import Path

SHORTEST, SHORTEST_PROMPT, REPORTED = 100, 400, 220_000
"""Characters: of a line that counts, of one that gives a prompt, of the text to report on."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="WikiText-2's validation split, as it is")
    parser.add_argument("--out", type=Path, default=Path())
    arguments = parser.parse_args()
    every = (line.strip() for line in arguments.text.read_text(encoding="utf-8").split("\n"))
    lines = [line for line in every if len(line) > SHORTEST]
    first, second = lines[: len(lines) // 2], lines[len(lines) // 2 :]
    prompts = [line for line in second if len(line) > SHORTEST_PROMPT]
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("train", "\n".join(first) + "\n"),
        ("report-prompts", "\n".join(prompts) + "\n"),
        ("report", "\n".join(second)[:REPORTED]),
    ):
        path = arguments.out / f"{name}.txt"
        path.write_text(text, encoding="utf-8")
        print(path, len(text), "characters")


if __name__ == "__main__":
    main()
