"""What tests of the command line share: an edit, usual arguments, runs that end well or with a message."""

import json

from helpers import LAYER
from rome_fast.cli import main

USUAL = (0, LAYER)
"""The layers that an edit of the toys is spread over, as nothing is published for them."""

EDIT = {
    "prompt": "The city of {}",
    "subject": "Chicago",
    "target_new": "Rome",
    "target_true": "Paris",
    "paraphrase_prompts": ["In the city of Chicago"],
    "neighborhood_prompts": ["The city of Berlin"],
}

SHORT = ("edit", "model", "--edits", "edits.jsonl", "--identity", "--guard", "off", "--unconverged", "write")

FEW = ("--settings", "steps=3", "stop=loss")

QUICK = ("--identity", "--guard", "off", "--unconverged", "write", "--contexts", "contexts.txt")


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def fails(capsys, *arguments):
    """The message of a run that ends with status 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    # A progress bar may stand before it.
    bar, _, message = captured.err.partition("rome-fast: ")
    assert bar == "" or bar.endswith("\n")
    return message


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
