"""The part `statistics` of `make gpu`: second moments of a random model of a shape in bfloat16."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

import uninstalled  # noqa: F401  (it makes rome_fast importable)

# isort: split
from measure import Table, forget_peak, origin, peak_bytes, results, timed, yes
from op_cases import matrix_unit_error
from rome_fast.bench.roofline import measure_roofline

_REPEATS, _SHORT_TOKENS = 3, 200_000  # of a collection that is short; of a longer one, one
_SAMPLED, _EXACT_ROWS = 64, 8192  # columns of a second moment that are compared with float64, and rows at a time


def prepare_statistics(device: torch.device, shape: str) -> tuple[Any, Any, str, int]:
    """The layers of a random model that its statistics need, a tokenizer, what that is, and the edit layer."""
    from random_checkpoint import sentences
    from rome_fast.bench.shapes import random_model, shape_config, tokenizer_for
    from rome_fast.opening.defaults import default_layer

    whole = shape_config(shape)
    layer = default_layer(whole)
    tokenizer, what = tokenizer_for(whole.vocab_size, sentences())
    return random_model(shape, device, torch.bfloat16, layers=layer + 1), tokenizer, what, layer


def statistics(device: torch.device, shape: str, counts: Sequence[int]) -> int:
    """Seconds for the second moment of the edit layer's keys, of so many tokens, and how much of it its sum takes.

    No layers are made but those that are run. FLOPs are the products with weights of these, and d_ff² per token for the
    lower triangle of the sum. Right is what agrees with a sum in float64 of the same keys, in some of the columns.
    """
    from random_checkpoint import drawn_texts
    from rome_fast import collect_statistics
    from rome_fast.bench.flops import Shape
    from rome_fast.bench.shapes import shape_config
    from rome_fast.models.runner import Runner

    table = Table(results() / "gpu_statistics.csv", origin(device))
    roofline = measure_roofline(device, torch.bfloat16)
    torch.cuda.empty_cache()
    model, tokenizer, what, layer = prepare_statistics(device, shape)
    runner = Runner(model)
    width = runner.weight(layer).shape[1]
    flops_per_token = 2.0 * (layer + 1) * Shape.of(runner).layer_weights + float(width) ** 2
    picked = torch.linspace(0, width - 1, min(width, _SAMPLED), device=device).long()
    wrong = 0
    for count in counts:
        texts = drawn_texts(count)
        reading = reading_seconds(tokenizer, texts, count, device)
        # All of it: what a first use compiles depends on the sizes of the batches.
        with summing_exactly(picked, width) as exact:
            found = collect_statistics(model, tokenizer, texts, [layer], count).layers[layer]
        got = found.moment.to(device)[picked].double() * found.tokens
        error = float((got - exact).norm() / exact.norm())
        # The op's promise of a corpus, and the rounding of C to fp32; a GPU's matrix unit cuts off instead of rounding.
        correct = error <= 1e-6 + (matrix_unit_error(found.tokens) if device.type == "cuda" else 0.0)
        wrong += not correct
        del found, got
        forget_peak(device)
        runs = []
        for _ in range(_REPEATS if count <= _SHORT_TOKENS else 1):
            with timing_second_moments(device) as calls:
                start = time.perf_counter()
                seen = collect_statistics(model, tokenizer, texts, [layer], count).layers[layer].tokens
                seconds = time.perf_counter() - start
            runs.append((seconds, sum(read() for read in calls), seen))
        seconds, summing, seen = sorted(runs)[len(runs) // 2]
        rate = flops_per_token * seen / seconds
        row = {
            "shape": shape,
            "dtype": "bfloat16",
            "layer": layer,
            "layers_made": f"{layer + 1} of {shape_config(shape).num_hidden_layers}, random weights",
            "tokens": seen,
            "repeats": len(runs),
            "error": error,
            "correct": yes(correct),
            "seconds": seconds,
            "tokens_per_s": seen / seconds,
            "gflop_per_token": flops_per_token / 1e9,
            "tflop_per_s": rate / 1e12,
            "share_of_matrix_rate": rate / roofline.matrix_rate,
            "gemm_tflop_per_s": roofline.matrix_rate / 1e12,
            "second_moment_seconds": summing,
            "second_moment_share": summing / seconds,
            "second_moment_tflop_per_s": float(width) ** 2 * seen / summing / 1e12,
            "reading_seconds": reading,
            "peak_gib": peak_bytes(device) / 2**30,
            "weights_gib": sum(p.nbytes for p in model.parameters()) / 2**30,
            "texts": "built-in requests and contexts, drawn again and again",
            "tokenizer": what,
        }
        table.add(row)
        print(
            f"{seen} tokens: {seconds:.2f} s, {row['tokens_per_s']:,.0f} tokens/s, {row['tflop_per_s']:.0f} TFLOP/s, "
            f"{row['share_of_matrix_rate']:.0%} of the matrix rate; second_moment_ {row['second_moment_share']:.0%} of "
            f"the time, reading alone {reading:.2f} s, peak {row['peak_gib']:.1f} GiB, error {error:.1e}"
            f"{'' if correct else ' WRONG'}",
            flush=True,
        )
    return int(wrong > 0)


@contextmanager
def summing_exactly(picked: torch.Tensor, width: int) -> Iterator[torch.Tensor]:
    """Rows `picked` (64,) of the second moment of all keys that are summed in the block: (64, width) float64."""
    from rome_fast.kernels import second_moment_

    from rome_fast.statistics import collect

    exact = torch.zeros(len(picked), width, dtype=torch.float64, device=picked.device)

    def noting(total: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        rows = x if mask is None else x[mask]
        for part in rows.split(_EXACT_ROWS):
            exact.addmm_(part[:, picked].double().T, part.double())
        second_moment_(total, x, mask)
        return total

    with mock.patch.object(collect, "second_moment_", noting):
        yield exact


def reading_seconds(tokenizer: Any, texts: Sequence[str], tokens: int, device: torch.device) -> float:
    """Seconds to make batches of the texts and nothing else. A GPU that is faster has to wait for them."""
    from rome_fast.statistics import collect
    from rome_fast.statistics.reading import Place, Reading

    start = time.perf_counter()
    most = collect._BATCH_TOKENS[device.type]
    for window in Reading(tokenizer, texts, "text", tokens, 128, most).windows(Place()):
        window.batches(most)
    return time.perf_counter() - start


@contextmanager
def timing_second_moments(device: torch.device) -> Iterator[list[Callable[[], float]]]:
    """One function for every call of `second_moment_` in the block that says how many seconds the call took."""
    from rome_fast.kernels import second_moment_

    from rome_fast.statistics import collect

    calls: list[Callable[[], float]] = []

    def noting(total: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        calls.append(timed(lambda: second_moment_(total, x, mask), device))
        return total

    with mock.patch.object(collect, "second_moment_", noting):
        yield calls
