"""What the arguments of `rome-fast trace` mean, and the run itself."""

import argparse
import csv
import hashlib
import io
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .. import assets
from ..bench.command import REQUESTS
from ..edits import Edit, load_edits
from ..errors import ArgumentError, EditError
from ..models.fingerprint import Fingerprint
from ..models.rows import edit_rows, encode
from ..models.runner import Runner
from ..opening import checkpoints
from ..report.trace import can_draw, heat_map
from ..runs.costs import about, flops_per_second, layer_flops
from ..runs.parts import Parts
from ..runs.processes import own_device
from ..weights.files import atomic_write
from .average import ROLES, Average, average
from .causal import Kind, causal_trace, draw_noise, embedding_deviation, kinds_of, layer_passes, predicted

Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class Prompt:
    """A request as it is traced."""

    edit: Edit
    ids: list[int]
    subject: range


def prompt_of(runner: Runner, tokenizer: PreTrainedTokenizerBase, edit: Edit) -> tuple[Prompt, int | None]:
    """The prompt's tokens and, where the request says what is true, the first token of that."""
    true = edit.target_true
    (row,) = edit_rows(tokenizer, replace(edit, target=true or edit.target), [""], max_length=runner.max_length)
    spans = encode(tokenizer, [edit.text], special=edit.user_at is None)[0].spans
    first = next(i for i, (_, stop) in enumerate(spans) if stop > edit.subject_at)
    return Prompt(edit, list(row.ids[: row.target]), range(first, row.subject + 1)), row.labels[0] if true else None


def run_trace(arguments: argparse.Namespace, advance: Advance, say: Callable[[str], None]) -> dict[str, Any]:
    """Trace requests, or go on with that, and write effects.csv, trace.json and, where it can be drawn, heatmap.png."""
    for name in ("count", "samples", "window", "threads"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ArgumentError(f"{name}: got {getattr(arguments, name)}, wanted at least 1")
    if not arguments.noise > 0:
        raise ArgumentError(f"noise: got {arguments.noise}, wanted a number above 0")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    edits = load_edits(arguments.edits or REQUESTS, arguments.on_error, arguments.duplicates)
    own = arguments.model is None
    model, tokenizer, directory = checkpoints.load(
        assets.model_dir(say) if own else arguments.model,
        device=own_device(arguments.device),
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
    )
    runner = Runner(model)
    prompts, unknown = _known(runner, tokenizer, edits, arguments.count)
    if not prompts:
        raise ArgumentError(
            f"edits: the model answers none of {unknown} requests with their target_true; trace requests that it knows"
        )
    say(f"{len(prompts)} requests whose answer the model knows; {unknown} others left out")
    deviation = embedding_deviation(runner, [p.ids for p in prompts], [p.subject for p in prompts])
    kinds, hidden_size = kinds_of(runner), runner.model.config.get_text_config().hidden_size
    place = Parts(
        arguments.out,
        "trace",
        {
            "model": directory.name,
            "fingerprint": str(Fingerprint.of(runner, len(runner.layers) - 1)),
            "dtype": str(model.dtype).removeprefix("torch."),
            "requests": len(prompts),
            "edits_sha256": hashlib.sha256("\n".join(p.edit.text for p in prompts).encode()).hexdigest(),
            "samples": arguments.samples,
            "noise": arguments.noise,
            "deviation": deviation,
            "window": arguments.window,
            "seed": arguments.seed,
        },
    )
    _say_cost(runner, prompts, kinds, arguments, say)
    traced = []
    for number, prompt in enumerate(prompts):
        found = place.get(f"{number:05d}")
        if found is None:
            # By the text, so that a request's noise is the same whatever else is traced.
            seed = arguments.seed + zlib.crc32(prompt.edit.text.encode())
            shape = (arguments.samples, len(prompt.subject), hidden_size)
            noise = draw_noise(shape, arguments.noise * deviation, seed)
            one = causal_trace(runner, prompt.ids, prompt.subject, noise, kinds, arguments.window)
            found = place.keep(
                f"{number:05d}",
                {
                    "prompt": prompt.edit.prompt,
                    "subject": prompt.edit.subject,
                    "tokens": [tokenizer.decode([token]) for token in prompt.ids],
                    "subject_tokens": [prompt.subject.start, prompt.subject.stop],
                    "answer": tokenizer.decode([one.answer]),
                    "clean": one.clean,
                    "corrupted": one.corrupted,
                    "effects": {kind: effect.tolist() for kind, effect in one.effects.items()},
                },
            )
        traced.append(found)
        advance(len(traced), len(prompts))
    return _report(arguments, place, traced, kinds, runner, say)


def _known(
    runner: Runner, tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit], count: int
) -> tuple[list[Prompt], int]:
    """The first `count` requests whose true answer is the model's own, or that name none; how many others came before.

    The effect on an answer that is wrong says where a guess comes from, not a fact.
    """
    prompts: list[Prompt] = []
    unknown = 0
    for edit in edits:
        try:
            prompt, answer = prompt_of(runner, tokenizer, edit)
        except EditError:
            unknown += 1  # its answer has no token of its own
            continue
        if answer in (None, predicted(runner, prompt.ids)):
            prompts.append(prompt)
            if len(prompts) == count:
                break
        else:
            unknown += 1
    return prompts, unknown


def _say_cost(
    runner: Runner,
    prompts: Sequence[Prompt],
    kinds: Sequence[Kind],
    arguments: argparse.Namespace,
    say: Callable[[str], None],
) -> None:
    layers, samples = len(runner.layers), arguments.samples
    passes = sum(layer_passes(layers, len(p.ids), p.subject.start, samples, kinds, arguments.window) for p in prompts)
    runs = sum(samples * layers * len(kinds) * (len(p.ids) - p.subject.start) for p in prompts)
    flops = passes * layer_flops(runner)
    seconds = flops / flops_per_second(runner)
    say(f"{runs:,} restored runs, {flops / 1e12:.3g} TFLOP: about {about(seconds)} on {runner.device}")


def _report(
    arguments: argparse.Namespace,
    place: Parts,
    traced: Sequence[dict[str, Any]],
    kinds: Sequence[Kind],
    runner: Runner,
    say: Callable[[str], None],
) -> dict[str, Any]:
    subjects = [range(*each["subject_tokens"]) for each in traced]
    averages = {
        kind: average([torch.tensor(t["effects"][kind], dtype=torch.float64) for t in traced], subjects)
        for kind in kinds
    }
    clean, corrupted = (sum(t[name] for t in traced) / len(traced) for name in ("clean", "corrupted"))
    report = {
        "conditions": place.conditions | {"device": str(runner.device), "versions": checkpoints.versions()},
        "clean": clean,
        "corrupted": corrupted,
        "roles": list(ROLES),
        "average": {kind: _numbers(a.mean) for kind, a in averages.items()},
        "standard_error": {kind: _numbers(a.error) for kind, a in averages.items()},
        "requests_with_role": list(next(iter(averages.values())).requests),
        "requests": list(traced),
    }
    say(f"wrote {place.write('trace.json', report)}")
    atomic_write(arguments.out / "effects.csv", _csv(averages).encode())
    say(f"wrote {arguments.out / 'effects.csv'}")
    for kind, found in averages.items():
        say(_peak(kind, found))
    if can_draw():
        conditions = (
            f"{place.conditions['model']}, {place.conditions['dtype']}: {len(traced)} requests, "
            f"{arguments.samples} noise samples of {arguments.noise:g} σ; P(answer) {clean:.2f}, corrupted "
            f"{corrupted:.2f}"
        )
        heat_map(averages, arguments.window, conditions, arguments.out / "heatmap.png")
        say(f"wrote {arguments.out / 'heatmap.png'}")
    else:
        say("no heat map: it wants matplotlib, which `pip install matplotlib` installs")
    return report


def _peak(kind: Kind, found: Average) -> str:
    mean = torch.nan_to_num(found.mean, nan=-torch.inf)
    layer, role = divmod(int(mean.argmax()), len(ROLES))
    last = ROLES.index("last subject token")
    subject = int(mean[:, last].argmax())
    return (
        f"{kind}: largest average effect {float(mean[layer, role]):.3f} at layer {layer}, {ROLES[role]}; of the last "
        f"subject token {float(mean[subject, last]):.3f} at layer {subject}"
    )


def _numbers(values: torch.Tensor) -> list[list[float | None]]:
    """JSON has no NaN."""
    return [[None if value != value else value for value in row] for row in values.tolist()]


def _csv(averages: dict[Kind, Average]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["kind", "layer", "role", "average_indirect_effect", "standard_error", "requests"])
    for kind, found in averages.items():
        for layer, (means, errors) in enumerate(zip(found.mean.tolist(), found.error.tolist(), strict=True)):
            for role, mean, error, count in zip(ROLES, means, errors, found.requests, strict=True):
                if count:
                    writer.writerow([kind, layer, role, f"{mean:.6g}", f"{error:.6g}", count])
    return out.getvalue()
