"""Statistics merged out of parts, solved with a ridge, exchanged as .npz files, listed and pruned in the cache."""

import copy
import re
import zipfile

import numpy as np
import pytest
import torch

import oracle
from helpers import END, FORWARD, LAYER, all_bits, changed, delta_w, edited, relative_error, rounding
from rome_fast import Statistics, collect_statistics
from rome_fast.cli import main
from rome_fast.errors import ArgumentError, StatisticsError
from rome_fast.models.fingerprint import Fingerprint
from rome_fast.models.runner import Runner
from rome_fast.statistics import LayerStatistics, collect, export_npz, import_npz, list_cache, prune_cache
from rome_fast.weights.files import locked
from toys import D_FF, SENTENCES, save_toy, toy_model

CPU = torch.device("cpu")
# C is quadratic in the keys, which lie in the first half of the model.
ALLOWED = 2 * rounding(torch.float32, FORWARD / 2)


@pytest.fixture
def model():
    return toy_model("llama")


@pytest.fixture
def tokenizer(toy_tokenizers):
    return toy_tokenizers[True]


def of_texts(model, tokenizer, texts, layers=(LAYER,)):
    return collect_statistics(model, tokenizer, texts, layers, 100_000)


def with_moment(moment, tokens=10_000):
    fingerprint = Fingerprint("llama", 4, 48, len(moment), torch.zeros(3))
    return LayerStatistics(LAYER, moment, tokens, fingerprint)


# Merging


def test_parts_are_merged_by_their_tokens(model, tokenizer):
    parts = [of_texts(model, tokenizer, texts) for texts in (SENTENCES[:3], SENTENCES[3:4], SENTENCES[4:])]
    merged = Statistics.merge(parts).layers[LAYER]
    whole = of_texts(model, tokenizer, SENTENCES).layers[LAYER]
    assert merged.tokens == whole.tokens
    assert relative_error(merged.moment, whole.moment) < ALLOWED
    assert merged.provenance["parts"] == "3"
    assert merged.provenance["dtype"] == "float32"
    # Not the mean of means.
    mean = sum(part.layers[LAYER].moment for part in parts) / 3
    assert relative_error(mean, whole.moment) > 0.01


def test_a_merge_takes_each_layer_from_the_parts_that_have_it(model, tokenizer, tmp_path):
    one, two = of_texts(model, tokenizer, SENTENCES[:3], (0, 1)), of_texts(model, tokenizer, SENTENCES[3:6], (1, 2))
    merged = Statistics.merge([one, two])
    assert torch.equal(merged.layers[0].moment, one.layers[0].moment)
    assert torch.equal(merged.layers[2].moment, two.layers[2].moment)
    assert merged.layers[1].tokens == one.layers[1].tokens + two.layers[1].tokens
    merged.save(tmp_path)
    assert Statistics.load(tmp_path).layers[1].tokens == merged.layers[1].tokens


def test_the_same_corpus_is_not_merged_twice(model, tokenizer):
    one, two = of_texts(model, tokenizer, SENTENCES[:3]), of_texts(model, tokenizer, SENTENCES[3:6])
    with pytest.raises(StatisticsError, match=rf"parts: layer {LAYER} has the corpus \w+… twice"):
        Statistics.merge([one, two, one])
    with pytest.raises(StatisticsError, match="twice"):
        Statistics.merge([Statistics.merge([one, two]), two])


def test_parts_of_different_models_are_refused_with_both_fingerprints(model, tokenizer):
    other = toy_model("llama", seed=1)
    parts = [of_texts(m, tokenizer, SENTENCES[:3]) for m in (model, other)]
    with pytest.raises(StatisticsError) as caught:
        Statistics.merge(parts)
    for m in (model, other):
        assert str(Fingerprint.of(Runner(m), LAYER)) in str(caught.value)
    with pytest.raises(ArgumentError, match="parts: got none"):
        Statistics.merge([])


# The ridge and the factor


def test_a_ridge_is_in_units_of_the_mean_diagonal(model, tokenizer):
    entry = of_texts(model, tokenizer, SENTENCES).layers[LAYER]
    c = entry.moment.double()
    factor = entry.factor(CPU, ridge=0.25)
    wanted = c + 0.25 * c.trace() / D_FF * torch.eye(D_FF, dtype=c.dtype)
    assert relative_error(factor @ factor.T, wanted) < rounding(torch.float64, 2 * D_FF)
    # And is not kept for a call without.
    assert relative_error(entry.factor(CPU) @ entry.factor(CPU).T, c) < rounding(torch.float64, 2 * D_FF)


def test_a_ridge_makes_few_tokens_usable(model, tokenizer, tmp_path):
    statistics = of_texts(model, tokenizer, SENTENCES[:2])
    entry = statistics.layers[LAYER]
    assert entry.tokens < D_FF
    with pytest.raises(StatisticsError, match=rf"it saw {entry.tokens} tokens for {D_FF} dimensions") as caught:
        entry.factor(CPU)
    ridge = float(re.search(r"ridge=([0-9e-]+) would do", str(caught.value))[1])
    statistics.with_ridge(ridge).save(tmp_path)
    loaded = Statistics.load(tmp_path)
    assert loaded.layers[LAYER].ridge == ridge
    assert torch.equal(loaded.layers[LAYER].factor(CPU), entry.factor(CPU, ridge=ridge))
    assert edited(model, tokenizer, END, method="c-rome", statistics=loaded).records[0].applied


def test_a_matrix_that_is_not_positive_definite_says_all_there_is_to_know():
    """The pivot is that of elimination by hand: 4 - 6²/4 = -5 in the third place."""
    moment = torch.diag(torch.tensor([1.0, 4.0, 4.0, 1.0, 1.0]))
    moment[1, 2] = moment[2, 1] = 6.0
    entry = with_moment(moment)
    with pytest.raises(
        StatisticsError,
        match=rf"C of layer {LAYER} is singular \(Cholesky stops at pivot 3 of 5, which is -5\.0e\+00 where the "
        r"diagonal is 2\.2e\+00 on average; it saw 10000 tokens for 5 dimensions\).*ridge=1e\+00 would do",
    ):
        entry.factor(CPU)
    assert entry.factor(CPU, ridge=1.0).isfinite().all()


def test_the_ridge_named_is_the_smallest_power_of_ten_that_does():
    moment = torch.eye(6)
    moment[5, 5] = -3e-5
    with pytest.raises(StatisticsError, match="ridge=1e-04 would do"):
        with_moment(moment).factor(CPU)
    with pytest.raises(StatisticsError, match="contains NaN"):
        with_moment(moment * float("nan")).factor(CPU)
    with pytest.raises(StatisticsError, match="none up to 1 would do"):
        with_moment(-torch.eye(6)).factor(CPU)


@pytest.mark.parametrize("ridge", [-1e-9, float("nan"), float("inf")])
def test_ridges_that_are_none(ridge, model, tokenizer):
    statistics = Statistics([with_moment(torch.eye(6))])
    with pytest.raises(ArgumentError, match="ridge: got"):
        statistics.with_ridge(ridge)
    with pytest.raises(ArgumentError, match="ridge: got"):
        statistics.layers[LAYER].factor(CPU, ridge=ridge)


def test_the_condition_number():
    """Against the eigenvalues; power iteration comes from below."""
    basis = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64))[0]
    moment = basis @ torch.diag(torch.logspace(0, 6, 60, dtype=torch.float64)) @ basis.T
    condition = with_moment((moment + moment.T) / 2).condition(CPU)
    assert 0.8e6 < condition < 1.0001e6


# .npz files


def released_file(file, total, count, **more):
    """As the released code writes it: names and types, by hand."""
    np.savez(
        file,
        **{
            "mom2.constructor": "util.runningstats.SecondMoment()",
            "mom2.count": count,
            "mom2.mom2": total,
            "mom2.split_batch": True,
            "sample_size": 100000,
            **more,
        },
    )
    return file


def test_a_released_file_edits_like_the_sum_it_holds(model, tokenizer, tmp_path):
    """The file has the SUM of k kᵀ in fp32 and the number of tokens."""
    moment, count = oracle.second_moment(model, tokenizer, SENTENCES, LAYER, 64)
    file = released_file(tmp_path / "a.npz", (moment * count).float().numpy(), count)
    statistics = import_npz(file, model, LAYER)
    entry = statistics.layers[LAYER]
    assert entry.tokens == count
    # Rounded to fp32 as a sum, and again when it was divided.
    assert relative_error(entry.moment, moment) < torch.finfo(torch.float32).eps
    assert entry.provenance == {"imported": "a.npz"}
    by_hand = Statistics([LayerStatistics(LAYER, entry.moment, count, Fingerprint.of(Runner(model), LAYER))])
    before = all_bits(model)
    updates = [delta_w(edited(copy.deepcopy(model), tokenizer, END, statistics=s)) for s in (statistics, by_hand)]
    assert torch.equal(*updates)
    assert changed(model, before) == []
    without = delta_w(edited(copy.deepcopy(model), tokenizer, END, statistics="identity"))
    assert relative_error(updates[0], without) > 0.1


def test_written_and_read_again(model, tokenizer, tmp_path):
    entry = of_texts(model, tokenizer, SENTENCES).layers[LAYER]
    export_npz(entry, tmp_path / "a.npz", sample_size=26)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as content:
        assert str(content["mom2.constructor"]) == "util.runningstats.SecondMoment()"
        assert int(content["sample_size"]) == 26
        assert int(content["mom2.count"]) == entry.tokens
        assert content["mom2.mom2"].dtype == np.float32
        wanted = entry.moment.double() * entry.tokens
        # The product and the number of tokens are both rounded to fp32, on the way back the quotient as well.
        assert relative_error(torch.from_numpy(content["mom2.mom2"]), wanted) < torch.finfo(torch.float32).eps
    again = import_npz(tmp_path / "a.npz", model, LAYER).layers[LAYER]
    assert relative_error(again.moment, entry.moment) < 2 * torch.finfo(torch.float32).eps


def test_a_file_of_another_width_is_refused_with_the_shapes(model, tmp_path):
    file = released_file(tmp_path / "a.npz", np.eye(96, dtype=np.float32), 1000)
    actual = re.escape(str(Fingerprint.of(Runner(model), LAYER)))
    shapes = r"shape \(96, 96\) \(model {}\), wanted \(80, 80\) .*{}"
    with pytest.raises(StatisticsError, match=shapes.format("not named in the file", actual)):
        import_npz(file, model, LAYER)
    other = Fingerprint("llama", 4, 48, 96, torch.zeros(3))
    export_npz(LayerStatistics(LAYER, torch.eye(96), 1000, other), file, 26)
    with pytest.raises(StatisticsError, match=shapes.format(re.escape(str(other)), actual)):
        import_npz(file, model, LAYER)


def test_a_file_that_names_another_model_is_refused_with_both(model, tokenizer, tmp_path):
    other = toy_model("llama", seed=1)
    export_npz(of_texts(other, tokenizer, SENTENCES).layers[LAYER], tmp_path / "a.npz", 26)
    names = [re.escape(str(Fingerprint.of(Runner(m), LAYER))) for m in (other, model)]
    with pytest.raises(StatisticsError, match=rf"got statistics of model {names[0]}, wanted {names[1]}"):
        import_npz(tmp_path / "a.npz", model, LAYER)


class Trap:
    """Pickled; loading it would be noticed."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


GOOD = np.eye(D_FF, dtype=np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mom2.mom2": GOOD}, "mom2.count missing"),
        ({"mom2.count": 5}, "mom2.mom2 missing"),
        ({"mom2.mom2": np.array([[Trap()]], dtype=object), "mom2.count": 5}, "cannot be read as an .npz file"),
        ({"mom2.mom2": GOOD, "mom2.count": np.array(Trap(), dtype=object)}, "cannot be read as an .npz file"),
        ({"mom2.mom2": GOOD, "mom2.count": 0}, "wanted floating-point sums over at least one"),
        ({"mom2.mom2": GOOD, "mom2.count": float("nan")}, "wanted floating-point sums over at least one"),
        ({"mom2.mom2": GOOD, "mom2.count": float("inf")}, "wanted floating-point sums over at least one"),
        ({"mom2.mom2": GOOD, "mom2.count": np.ones(2)}, "wanted floating-point sums over at least one"),
        ({"mom2.mom2": GOOD.astype(int), "mom2.count": 5}, "wanted floating-point sums over at least one"),
        ({"mom2.mom2": GOOD * np.nan, "mom2.count": 5}, "contains NaN or infinity"),
        ({"mom2.mom2": np.tri(D_FF), "mom2.count": 5}, "not symmetric"),
        ({"mom2.mom2": GOOD, "mom2.count": 5, "rome_fast.fingerprint": "{"}, "its fingerprint is unreadable"),
    ],
)
def test_files_that_are_no_second_moments(arrays, message, model, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(StatisticsError, match=rf"a\.npz: .*{re.escape(message)}") as caught:
        import_npz(tmp_path / "a.npz", model, LAYER)
    assert str(caught.value).count("a.npz") == 1


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and then nothing", b"\x93NUMPY\x01\x00", b"no zip at all"])
def test_files_that_are_no_npz(content, model, tmp_path):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(StatisticsError, match=r"a\.npz: cannot be read"):
        import_npz(tmp_path / "a.npz", model, LAYER)
    with pytest.raises(StatisticsError, match=r"none\.npz: cannot be read"):
        import_npz(tmp_path / "none.npz", model, LAYER)
    np.save(tmp_path / "array.npy", GOOD)
    with pytest.raises(StatisticsError, match=r"array\.npy: got a single array, wanted an .npz file with [^()]*$"):
        import_npz(tmp_path / "array.npy", model, LAYER)


def test_a_damaged_npz(model, tmp_path):
    file = released_file(tmp_path / "a.npz", GOOD, 1000)
    with zipfile.ZipFile(file) as archive:
        place = archive.getinfo("mom2.mom2.npy").header_offset + 1000
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(StatisticsError, match=r"a\.npz: cannot be read .*CRC"):
        import_npz(file, model, LAYER)


# The command line


@pytest.fixture
def toy(tmp_path, toy_tokenizers, monkeypatch, empty_cache):
    """A folder to work in, with a model and two parts of a corpus."""
    monkeypatch.chdir(tmp_path)
    save_toy("model", toy_model("gpt2"), toy_tokenizers[False])
    (tmp_path / "one.txt").write_text("\n\n".join(SENTENCES[:13]))
    (tmp_path / "two.txt").write_text("\n\n".join(SENTENCES[13:]))
    return tmp_path


def run(*arguments, status=0):
    assert main([str(argument) for argument in arguments]) == status


def test_parts_are_merged_on_the_command_line(toy, capsys):
    for part in ("one", "two"):
        run("statistics", "model", "--corpus", f"{part}.txt", "--out", part, "--tokens", 9999, "--ridge", 1e-6)
    run("statistics", "model", "--corpus", "one.txt", "two.txt", "--out", "whole", "--tokens", 9999)
    run("statistics", "model", "--merge", "one", "two", "--out", "merged", "--ridge", 1e-5)
    assert "condition number" in capsys.readouterr().out
    merged, whole = (Statistics.load(name).layers[LAYER] for name in ("merged", "whole"))
    assert relative_error(merged.moment, whole.moment) < ALLOWED
    assert (merged.ridge, Statistics.load("one").layers[LAYER].ridge, whole.ridge) == (1e-5, 1e-6, 0.0)
    run("statistics", "model", "--merge", "one", "one", status=2)
    assert "twice" in capsys.readouterr().err


def test_released_files_on_the_command_line(toy):
    run("statistics", "model", "--corpus", "one.txt", "two.txt", "--out", "stats")
    (toy / "files").mkdir()
    run("statistics", "model", "--export", "files", "--out", "stats", "--sample-size", 26)
    file = toy / "files" / f"transformer.h.{LAYER}.mlp.c_proj_float32_mom2_26.npz"
    run("statistics", "model", "--import", file, "--layers", LAYER, "--out", "again")
    again, first = (Statistics.load(name).layers[LAYER] for name in ("again", "stats"))
    assert again.tokens == first.tokens
    assert relative_error(again.moment, first.moment) < ALLOWED


def test_few_tokens_are_kept_but_announced_as_unusable(toy, capsys):
    run("statistics", "model", "--corpus", "one.txt", "--tokens", 60)
    assert re.search(r"layer 1: no edit can use it as it is: .*60 tokens for 80 dimensions", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model: got none"),
        (["model"], "corpus: got none, wanted --corpus FILE or --dataset NAME"),
        (["model", "--corpus", "one.txt", "--dataset", "x/y"], "dataset: got both"),
        (["model", "--corpus", "one.txt", "--ridge", "-1"], "ridge: got -1.0"),
        (["model", "--import", "a.npz", "--layers", "0", "1"], r"layers: got \[0, 1\], wanted the one layer"),
        (["model", "--export", "nowhere"], "export: the folder nowhere does not exist"),
        (["other", "--prune"], "prune: got other, wanted some of nothing in"),
    ],
)
def test_faults_of_the_command_line(arguments, message, toy, capsys):
    run("statistics", *arguments, status=2)
    assert re.search(message, capsys.readouterr().err)


def test_the_cache_is_listed_and_pruned(toy, capsys, empty_cache, toy_statistics):
    run("statistics", "--list")
    assert "0 layers in" in capsys.readouterr().out
    cache = empty_cache / "statistics"
    toy_statistics(toy_model("gpt2"), False).save(cache / "good")
    toy_statistics(toy_model("llama"), True).save(cache / "damaged")
    file = cache / "damaged" / f"layer-{LAYER}.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (cache / "good" / "unfinished-0123456789ab" / "rank-0-of-1").mkdir(parents=True)
    (cache / "good" / "unfinished-0123456789ab" / "rank-0-of-1" / "snapshot-0.safetensors").write_bytes(b"x")

    damaged, good = list_cache()
    assert "damaged" in damaged.problem
    assert (good.layer, good.width, good.problem) == (LAYER, D_FF, "")
    assert good.model == str(Fingerprint.of(Runner(toy_model("gpt2")), LAYER))
    run("statistics", "--list")
    text = capsys.readouterr().out
    assert re.search(rf"good +layer {LAYER} .* {good.tokens} tokens, {good.tokens / D_FF:.1f} per dimension", text)
    assert re.search(r"damaged .* unusable: .*damaged", text)

    run("statistics", "--prune")
    assert [path.name for path in cache.iterdir()] == ["good"]
    assert [path.name for path in (cache / "good").iterdir()] == [f"layer-{LAYER}.safetensors"]
    with pytest.raises(ArgumentError, match="prune: got best, wanted some of good"):
        prune_cache(["good", "best"])
    run("statistics", "good", "--prune")
    assert list(cache.iterdir()) == []


def test_what_a_run_is_writing_is_not_pruned(empty_cache):
    """Hours of work may be in it, and whoever holds the lock would go on writing to a folder that is gone."""
    cache = empty_cache / "statistics"
    snapshots = cache / "model" / "unfinished-0123456789ab" / "rank-0-of-1"
    snapshots.mkdir(parents=True)
    partial = cache / "model" / ".layer-1.safetensors.0123456789abcdef.partial"
    partial.mkdir()
    for names in ([], ["model"]):
        with locked(snapshots):
            assert prune_cache(names) == ([] if names else [partial])
            assert snapshots.exists()
    assert prune_cache() == [snapshots.parent]
    assert not (cache / "model").exists()


def test_the_cache_gives_what_is_of_most_tokens(model, tokenizer, empty_cache):
    """Folders of the cache end in a fingerprint, whose order says nothing."""
    cache = empty_cache / "statistics"
    wanted = of_texts(model, tokenizer, SENTENCES)
    of_texts(model, tokenizer, SENTENCES[:2]).save(cache / "a")
    wanted.save(cache / "b")
    of_texts(model, tokenizer, SENTENCES[:5]).save(cache / "c")
    of_texts(toy_model("llama", seed=1), tokenizer, SENTENCES * 2).save(cache / "d")
    found = Statistics.cached(Runner(model), [LAYER])
    assert torch.equal(found.layers[LAYER].moment, wanted.layers[LAYER].moment)


def test_few_tokens_do_not_replace_many(toy, capsys):
    run("statistics", "model", "--corpus", "one.txt", "two.txt", "--out", "stats", "--tokens", 300)
    before = (toy / "stats" / f"layer-{LAYER}.safetensors").read_bytes()
    run("statistics", "model", "--corpus", "one.txt", "--out", "stats", "--tokens", 299, status=2)
    assert re.search(r"out: stats/layer-0\.safetensors has C of 300 tokens, which one of 299 would replace",
                     capsys.readouterr().err)  # fmt: skip
    run("statistics", "model", "--corpus", "one.txt", "--out", "few", "--tokens", 100)
    run("statistics", "model", "--merge", "few", "--out", "stats", status=2)
    assert (toy / "stats" / f"layer-{LAYER}.safetensors").read_bytes() == before


def test_the_limit_of_a_study_outlives_better_statistics(toy):
    run("statistics", "model", "--corpus", "one.txt", "--out", "stats", "--tokens", 200)
    statistics = Statistics.load("stats")
    statistics.layers[LAYER].collapse_limit = 1.25
    statistics.save("stats")
    run("statistics", "model", "--corpus", "one.txt", "two.txt", "--out", "stats", "--tokens", 300, "--ridge", 1e-6)
    entry = Statistics.load("stats").layers[LAYER]
    assert (entry.tokens, entry.ridge, entry.collapse_limit) == (300, 1e-6, 1.25)


def test_what_statistics_were_made_with_is_in_their_files(toy):
    for name, length in (("one", 16), ("two", 32)):
        run("statistics", "model", "--corpus", "one.txt", "--out", name, "--max-length", length, "--tokens", 200)
    one, two = (Statistics.load(name).layers[LAYER].provenance for name in ("one", "two"))
    assert (one.pop("max_length"), two.pop("max_length")) == ("16", "32")
    assert one == two
    software = {"rome_fast", "torch", "transformers", "python"}
    assert set(one) == {"config_sha256", "tokenizer_sha256", "corpus_sha256", "dtype", "device"} | software
    assert one["torch"] == torch.__version__


def test_progress_in_a_log_is_a_line_per_tenth(toy, capsys, monkeypatch):
    monkeypatch.setitem(collect._BATCH_TOKENS, "cpu", 32)
    run("statistics", "model", "--corpus", "one.txt", "two.txt", "--tokens", 800, "--device", "cpu")
    lines = re.findall(r"^(\d+) of 800 tokens, [\d,]+/s, \d:\d\d:\d\d left$", capsys.readouterr().err, re.MULTILINE)
    assert len(lines) == 10
    assert lines[-1] == "800"
