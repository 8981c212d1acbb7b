"""Checkpoints of random weights with a tokenizer, and texts for them, made on the spot without a download."""

import random
import shutil
from pathlib import Path

import torch

import uninstalled  # noqa: F401  (it makes rome_fast importable)

# isort: split
from rome_fast.bench.command import REQUESTS
from rome_fast.bench.shapes import CONTEXTS, random_model, tokenizer_for
from rome_fast.edits import Edit, load_edits

_SHARD = "1GB"
_ROOM = 1.3  # times the weights, which must be free: shards that an edit changes are written again


def sentences() -> list[str]:
    """All that the package brings along in plain words."""
    out = [context.strip() for context in CONTEXTS]
    for edit in load_edits(REQUESTS):
        out += [
            f"{edit.text}{edit.continuation(edit.text, edit.target)}.",
            *edit.paraphrase_prompts,
            *edit.neighborhood_prompts,
        ]
    return out


def drawn_texts(words: int, seed: int = 0) -> list[str]:
    """Texts of 1 to 40 sentences drawn at random, of `words` words or some more; a word is a token at least."""
    drawn, known, out = random.Random(seed), sentences(), list[str]()
    while words > 0:
        out.append(" ".join(drawn.choices(known, k=drawn.randint(1, 40))))
        words -= out[-1].count(" ") + 1
    return out


def requests(count: int) -> list[Edit]:
    """The first built-in requests whose subject does not begin the text, which every method edits alike."""
    return [edit for edit in load_edits(REQUESTS) if not edit.prompt.startswith("{}")][:count]


def save_checkpoint(folder: Path, shape: str, device: torch.device, dtype: torch.dtype) -> int:
    """Write a model of a shape, made on `device`, with a tokenizer; returns the bytes of its weights.

    Raises SystemExit where there is no room for it. Not for several threads at once: transformers sets what is global.
    """
    model = random_model(shape, device, dtype)
    size = sum(parameter.nbytes for parameter in model.parameters())
    free = shutil.disk_usage(folder.parent).free
    if free < _ROOM * size:
        raise SystemExit(f"{folder.parent}: {free / 1e9:.1f} GB free, wanted {_ROOM * size / 1e9:.1f}")
    tokenizer, _ = tokenizer_for(model.config.vocab_size, sentences())
    model.save_pretrained(folder, max_shard_size=_SHARD)
    tokenizer.save_pretrained(folder)
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return size


def same_bytes(one: Path, other: Path) -> bool:
    """Whether every shard of a checkpoint has the same bytes in another one of as many."""
    shards = sorted(file.name for file in one.glob("*.safetensors"))
    if not shards or shards != sorted(file.name for file in other.glob("*.safetensors")):
        return False
    return all(_same(one / name, other / name) for name in shards)


def _same(one: Path, other: Path) -> bool:
    # Not by filecmp, which keeps what it found by size and time of the files.
    if one.samefile(other):
        return True
    if one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as mine, other.open("rb") as theirs:
        while piece := mine.read(1 << 24):
            if piece != theirs.read(1 << 24):
                return False
    return True
