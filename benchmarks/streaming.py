"""Does editing a checkpoint larger than the budget keep to the budget, and does it read as fast as the disk gives?

Makes a Llama-shaped bfloat16 checkpoint of random weights in several shards (4.1 GB by default, deleted afterwards),
reads the checkpoint through the streamer and plainly, in turn, with the file's pages dropped from the cache before
each reading (cold) and left there (warm). Then a child process collects statistics and edits under the budget, with
contexts that are sampled and with some that are given, while its anonymous memory is measured from outside: it must
not exceed the budget, all other shards must stay as they are, and transformers must load the result. The words of the
corpus are as random as the weights: what is measured is the streaming.

    python benchmarks/streaming.py --memory 1.5GiB --edits 4
    python benchmarks/streaming.py --products float32   # as on a CPU without bfloat16 instructions
"""

import argparse
import filecmp
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rome_fast as rf
from rome_fast.opening import checkpoints
from rome_fast.updates import chains
from rome_fast.weights import Checkpoint, parse_bytes

_SHARD_BYTES = 1 << 30
_CHUNK_BYTES = 16 << 20
_POOL = 1_000_003
_SUBJECTS = ("Chicago", "Paris", "Vienna", "Toronto", "Berlin", "Madrid", "Moscow", "Melbourne")
_CONTEXTS = ("It rained all day . ", "The first step is to plan . ", "He plays the violin . ", "She lives in Rome . ")
_PROMPT, _TARGET = "The twin city of {} is", "Istanbul"


def main() -> None:
    arguments = _arguments()
    if arguments.child:
        _edit(arguments)
        return
    needed = 2.2 * _parameters(arguments)
    folder = Path(tempfile.mkdtemp(prefix="rome-fast-streaming-", dir=arguments.folder))
    try:
        if shutil.disk_usage(folder).free < needed + (8 << 30):
            raise SystemExit(f"{folder}: fewer than {needed / 1e9 + 8:.0f} GB free")
        size = _make(folder / "model", arguments)
        print(f"checkpoint of {size / 1e9:.2f} GB, {arguments.layers} layers, bfloat16", flush=True)
        report: dict[str, Any] = {"bytes": size, "torch": torch.__version__, "threads": arguments.threads}
        report |= _measure_reading(folder / "model", arguments)
        if not arguments.reading_only:
            report["contexts given"] = _measure_edit(folder, arguments, [])
            report["contexts sampled"] = _measure_edit(folder, arguments, ["--sampled"])
        print(json.dumps(report, indent=2))
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    finally:
        shutil.rmtree(folder)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="1.5GiB")
    parser.add_argument("--edits", type=int, default=4, choices=range(1, len(_SUBJECTS) + 1))
    parser.add_argument("--contexts", type=int, default=2, choices=range(1, len(_CONTEXTS) + 1), help="where given")
    parser.add_argument("--steps", type=int, default=20, help="loss evaluations per value")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--products", choices=["auto", "float32"], default="auto", help="dtype of products")
    parser.add_argument("--tokens", type=int, default=4096, help="of the statistics; 0 for C = I (default: 4096)")
    parser.add_argument("--layers", type=int, default=44)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layer", type=int, default=7, help="edit layer")
    parser.add_argument("--repeats", type=int, default=3, help="of each reading")
    parser.add_argument("--folder", type=Path, help="where to put the checkpoint (default: the temporary folder)")
    parser.add_argument("--reading-only", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sampled", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _config(arguments: argparse.Namespace) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 11 // 4,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=max(1, arguments.hidden // 512),
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def _shapes(arguments: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    config = _config(arguments)
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}


def _parameters(arguments: argparse.Namespace) -> int:
    return sum(torch.Size(shape).numel() for shape in _shapes(arguments).values())


def _make(directory: Path, arguments: argparse.Namespace) -> int:
    """Write the checkpoint; every tensor is a stretch of one pool of random numbers."""
    directory.mkdir()
    _config(arguments).save_pretrained(directory)
    words = sorted({word for text in (*_CONTEXTS, *_SUBJECTS, _PROMPT, _TARGET, "a") for word in text.split()})
    # Whatever a model of random weights says is a word, or sampled contexts would be empty.
    words += [f"w{i}" for i in range(len(words) + 1, _config(arguments).vocab_size)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(directory)

    shapes = _shapes(arguments)
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    pool = (torch.randn(max(sizes.values()) + _POOL, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    shards: list[list[str]] = [[]]
    for name, count in sizes.items():
        if sum(sizes[other] for other in shards[-1]) + count > _SHARD_BYTES // 2:
            shards.append([])
        shards[-1].append(name)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        tensors = {}
        for name in names:
            start = len(weight_map) * 7919 % _POOL
            shape = shapes[name]
            # Norms are gains, all else is random.
            tensors[name] = pool[start : start + sizes[name]].view(shape).clone() if len(shape) > 1 else _ones(shape)
            weight_map[name] = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, directory / weight_map[names[0]], {"format": "pt"})
    # What is still to be written would slow the first reading down.
    os.sync()
    index = {"metadata": {"total_size": 2 * sum(sizes.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return 2 * sum(sizes.values())


def _ones(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


def _measure_reading(directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """GB/s of the layers' files, plainly and through the streamer, interleaved; median and range."""
    outline = checkpoints.outline(directory, memory=arguments.memory, layer=arguments.layer, identity=True)
    if outline.parts is None:
        raise SystemExit("the checkpoint fits the budget; make it larger or the budget smaller")
    paths = [header.path for header in Checkpoint.open(directory).shards.values()]
    rates: dict[str, list[float]] = {}

    def plain() -> float:
        buffer, count, start = bytearray(_CHUNK_BYTES), 0, time.perf_counter()
        for path in paths:
            with path.open("rb", buffering=0) as file:
                while got := file.readinto(buffer):
                    count += got
        return count / (time.perf_counter() - start) / 1e9

    blocks = len(outline.parts.blocks)

    def streamed() -> float:
        stream = outline.stream()
        _drop(paths if cold else [])
        start, before = time.perf_counter(), stream.bytes_read
        for index in range(blocks):
            stream.take(index)
        rate = (stream.bytes_read - before) / (time.perf_counter() - start) / 1e9
        stream.close()
        return rate

    for cold in (True, False):
        for _ in range(arguments.repeats):
            for name, measure in (("plain", plain), ("streamed", streamed)):
                _drop(paths if cold else [])
                rates.setdefault(f"{name}, {'cold' if cold else 'warm'}", []).append(measure())
    for name, found in rates.items():
        print(f"{name}: {statistics.median(found):.2f} GB/s ({min(found):.2f} to {max(found):.2f})", flush=True)
    return {"gb_per_s": {name: sorted(found) for name, found in rates.items()}}


def _drop(paths: list[Path]) -> None:
    """Let the system forget what it holds of these files."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _measure_edit(folder: Path, arguments: argparse.Namespace, extra: list[str]) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], *extra, "--child", str(folder)]
    child = subprocess.Popen(command)
    peak = 0
    while child.poll() is None:
        peak = max(peak, _anonymous_bytes(child.pid))
        time.sleep(0.005)
    if child.returncode:
        raise SystemExit(f"the edit ended with status {child.returncode}")
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    chains.verify(folder / "edited")
    changed = _changed_shards(folder / "model", folder / "edited")
    if len(changed) != 1:
        raise SystemExit(f"changed {changed}, wanted the one shard of the edited weight")
    model = AutoModelForCausalLM.from_pretrained(folder / "edited", dtype="auto")
    if not bool(torch.isfinite(model(torch.arange(8).unsqueeze(0)).logits).all()):
        raise SystemExit("the edited model's logits are not finite")
    shutil.rmtree(folder / "edited")
    budget = parse_bytes(arguments.memory)
    if arguments.tokens:
        print(f"statistics of {arguments.tokens} tokens in {report['statistics_seconds']:.0f} s", flush=True)
    contexts = report["stages"]["contexts"]
    print(
        f"{arguments.edits} edits, contexts {'sampled' if extra else 'given'}: {report['seconds']:.0f} s, of them "
        f"{contexts:.0f} s ({contexts / report['seconds']:.0%}) and {report['contexts_passes']} passes for contexts; "
        f"{report['bytes_read'] / 1e9:.1f} GB read; anonymous memory at most {peak / 2**30:.2f} GiB of a budget of "
        f"{budget / 2**30:.2f} GiB ({report['anonymous_before'] / 2**30:.2f} GiB before the edit)",
        flush=True,
    )
    if peak > budget:
        raise SystemExit("the budget was exceeded")
    return report | {"peak_anonymous_bytes": peak, "budget_bytes": budget}


def _changed_shards(before: Path, after: Path) -> list[str]:
    return [
        file.name
        for file in sorted(before.glob("*.safetensors"))
        if not file.samefile(after / file.name) and not filecmp.cmp(file, after / file.name, shallow=False)
    ]


def _statistics(arguments: argparse.Namespace) -> rf.Statistics | Literal["identity"]:
    if not arguments.tokens:
        return "identity"
    rng = random.Random(0)
    words = [word for text in (*_CONTEXTS, *_SUBJECTS, _TARGET) for word in text.split()]
    texts = (" ".join(rng.choices(words, k=100)) for _ in range(arguments.tokens // 100 + 1))
    found = rf.collect_statistics(
        arguments.child / "model", None, texts, [arguments.layer], arguments.tokens, memory=arguments.memory
    )
    # There are fewer tokens than dimensions.
    return found.with_ridge(0.01)


def _edit(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    if arguments.products == "float32":
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported"):
            setattr(torch.cpu, name, lambda: False)
    before, start = _anonymous_bytes(os.getpid()), time.perf_counter()
    statistics = _statistics(arguments)
    collected, read, start = time.perf_counter() - start, [0], time.perf_counter()
    lock, passes = threading.Lock(), 0

    def count_pass(module: torch.nn.Module, *_: Any) -> None:
        nonlocal passes
        passes += isinstance(module, LlamaForCausalLM)

    def on_read(count: int, _rate: float) -> None:
        with lock:
            read[0] = count

    # Only while contexts are sampled a model is called as a whole.
    torch.nn.modules.module.register_module_forward_hook(count_pass)
    result = rf.apply_edits(
        arguments.child / "model",
        [rf.Edit(_PROMPT, subject, _TARGET) for subject in _SUBJECTS[: arguments.edits]],
        statistics=statistics,
        layer=arguments.layer,
        contexts=None if arguments.sampled else _CONTEXTS[: arguments.contexts],
        settings=rf.ValueSettings(steps=arguments.steps, stop="loss"),
        guard="off",
        unconverged="write",
        measure=False,
        memory=arguments.memory,
        out=arguments.child / "edited",
        link="hard",
        on_read=on_read,
    )
    report = {
        "statistics_tokens": arguments.tokens,
        "statistics_seconds": collected,
        "seconds": time.perf_counter() - start,
        "stages": result.seconds,
        "contexts_passes": passes,
        "bytes_read": read[0],
        "anonymous_before": before,
    }
    (arguments.child / "report.json").write_text(json.dumps(report), encoding="utf-8")


def _anonymous_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/status", encoding="ascii") as lines:
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)
    except OSError:
        return 0  # it has just ended


if __name__ == "__main__":
    main()
