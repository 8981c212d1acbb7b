"""Random models of real shapes: their sizes, their seeds, their tokenizers, and a bench of one."""

import json

import pytest
import torch

from helpers import relative_error
from rome_fast.bench.shapes import CONTEXTS, SHAPES, random_factor, random_model, repeated, tokenizer_for
from rome_fast.cli import main
from rome_fast.errors import ArgumentError
from rome_fast.models.rows import encode
from rome_fast.models.runner import Runner

CPU = torch.device("cpu")

# As published for the real models. The card of GPT-J says 6,053,381,344, of which transformers has
# 4096 · (2 · 50400 + 28 · (12 · 4096 + 7) + 2) + 50400.
PARAMETERS = {
    "gpt2-xl": 1_557_611_200,
    "gpt-j-6b": 6_050_882_784,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "qwen2-7b": 7_615_616_512,
    "mistral-7b": 7_248_023_552,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_shape_has_as_many_parameters_as_the_real_model_and_is_made_on_its_device(name):
    model = random_model(name, torch.device("meta"), torch.bfloat16)
    tensors = [*model.parameters(), *model.buffers()]
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert {t.device.type for t in tensors} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert {*PARAMETERS, "tiny"} == set(SHAPES)


def test_the_same_seed_gives_the_same_weights_and_the_callers_random_numbers_go_on():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    one, two, other = (random_model("tiny", CPU, torch.float32, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), wanted)
    for a, b, c in zip(one.parameters(), two.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dim() == 1 or not torch.equal(a, c)
    runner = Runner(one)
    logits = runner.head(runner.run(runner.embed(torch.tensor([[1, 2, 3]])), 0, 4))
    assert bool(torch.isfinite(logits).all())
    assert float(logits.detach().std()) > 1e-3


@pytest.mark.parametrize("width", [1, 7, 400])
def test_a_random_factor_is_that_of_a_well_conditioned_matrix(width):
    factor = random_factor(width, CPU)
    assert factor.dtype == torch.float64
    assert torch.equal(factor, factor.tril())
    product = factor @ factor.T
    # n u κ of a factorisation.
    allowed = width * 2**-53 * float(torch.linalg.cond(product))
    assert relative_error(torch.linalg.cholesky(product), factor) <= allowed
    assert float(torch.linalg.cond(factor @ factor.T)) < 100
    assert width == 1 or float(factor.tril(-1).abs().max()) > 0


def write_tokenizer(folder):
    """A file shaped like the demo model's: ids in the order of merging, special tokens first."""
    trained, _ = tokenizer_for(700, CONTEXTS)
    document = json.loads(trained.backend_tokenizer.to_str())
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return trained


def test_a_tokenizer_with_too_many_tokens_keeps_the_first_ones(empty_cache):
    trained = write_tokenizer(empty_cache / "SmolLM2-135M-Instruct")
    whole, what = tokenizer_for(5000, ["unused"])
    assert what == "SmolLM2's"
    assert len(whole) == len(trained) > 400
    cut, what = tokenizer_for(300, ["unused"])
    assert (len(cut), what) == (300, "the first 300 tokens of SmolLM2's")
    for text in (*CONTEXTS, "Ünïcode, 1999?"):
        ids = encode(cut, [text])[0].ids
        assert max(ids) < 300
        assert cut.decode(ids) == text
        # Fewer merges, so more tokens; and a merge is kept where its result is.
        assert len(ids) >= len(encode(whole, [text])[0].ids)
    assert len(encode(cut, [CONTEXTS[0]])[0].ids) < len(CONTEXTS[0])


def test_without_the_demos_model_a_tokenizer_is_trained_and_nothing_is_fetched(empty_cache):
    tokenizer, what = tokenizer_for(1024, [*CONTEXTS, "The Eiffel Tower"])
    assert "trained on the requests" in what
    assert not empty_cache.exists()
    ids = encode(tokenizer, ["The Eiffel Tower, 1889"])[0].ids
    assert tokenizer.decode(ids) == "The Eiffel Tower, 1889"
    assert len(ids) < 12
    assert max(ids) < 1024


def test_requests_are_repeated_up_to_the_count():
    assert repeated([1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]
    assert repeated([1, 2, 3], 2) == [1, 2]
    assert repeated([1, 2, 3], None) == [1, 2, 3]


def test_an_unknown_shape_is_refused_by_name():
    with pytest.raises(ArgumentError, match="shape: got 'llama-9', wanted one of gpt2-xl, "):
        random_model("llama-9", CPU, torch.float32)


@pytest.mark.parametrize("identity", [False, True])
def test_bench_of_a_shape(identity, tmp_path, empty_cache, capsys):
    file, edits = tmp_path / "report.json", tmp_path / "edits.jsonl"
    # One request over and over, so that all of them fit into one batch without padding.
    edits.write_text(json.dumps({"prompt": "{} is in", "subject": "The Eiffel Tower", "target_new": "Rome"}) + "\n")
    arguments = ["bench", "--shape", "tiny", "--edits", str(edits), "--batch", "2", "--no-quality"]
    arguments += ["--json", str(file)]
    # By default one batch.
    assert main(arguments + (["--identity"] if identity else ["--count", "3"])) == 0
    report = json.loads(file.read_text())
    assert (report["edits"], report["batch"], report["largest_batch"]) == (2 if identity else 3, 2, 2)
    assert report["statistics"] == ("identity" if identity else "random, of the right size")
    # A random model's edits take every step on every row.
    assert report["steps_per_edit"] == report["settings"]["steps"] == 25
    assert 1 <= report["flops_over_ideal"] < 1.2
    assert report["flops_per_second"] == pytest.approx(report["flops_per_edit"] / report["seconds_per_edit"])
    assert report["share_of_matrix_rate"] == pytest.approx(
        report["flops_per_second"] / report["roofline"]["matrix_rate"]
    )
    assert report["weight_bytes"] == 4 * sum(p.numel() for p in random_model("tiny", CPU, torch.float32).parameters())
    assert set(report["seconds_by_stage"]) == {"keys", "values", "update"}
    assert report["quality"] == {}
    assert f"statistics: {report['statistics']}" in " ".join(capsys.readouterr().out.split())


def test_a_shape_takes_no_model_beside_it(capsys, empty_cache):
    assert main(["bench", "some/model", "--shape", "tiny"]) == 2
    assert "shape: wanted without a model" in capsys.readouterr().err
