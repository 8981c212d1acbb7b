"""Where the texts of statistics come from, and how they become batches of rows."""

import random
import sys
import threading
import types

import pytest
import torch

import oracle
from helpers import FORWARD, LAYER, relative_error, rounding
from rome_fast import collect_statistics
from rome_fast.errors import ArgumentError, StatisticsError
from rome_fast.statistics import Corpus, collect, corpus, hub_dataset, reading
from rome_fast.statistics.reading import Place, Reading, made_ahead
from toys import BOS, D_FF, SENTENCES, toy_model

# C is quadratic in the keys, which lie in the first half of the model.
ALLOWED = 2 * rounding(torch.float32, FORWARD / 2)


@pytest.fixture
def small_batches(monkeypatch):
    """Many batches and several windows out of a toy's corpus."""
    monkeypatch.setitem(collect._BATCH_TOKENS, "cpu", 32)
    monkeypatch.setattr(reading, "_WINDOW_BATCHES", 4)


def read(tokenizer, texts, tokens=10_000, length=16, batch_tokens=32, start=None):
    reader = Reading(tokenizer, texts, "text", tokens, length, batch_tokens)
    return list(reader.windows(start or Place())), reader


# Files and folders


def test_text_files_are_parted_at_blank_lines(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffOne\ntwo\n\n \t\n\nthree\r\n\r\nvier ä\n".encode())
    assert list(Corpus.open(file)) == ["One\ntwo", "three", "vier ä"]


def test_json_lines_with_a_field_of_another_name(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a", "body": "x\\ny"}\n\n{"body": "z"}\n')
    assert list(Corpus.open(file, field="body")) == ["x\ny", "z"]
    with pytest.raises(ArgumentError, match=r'a\.jsonl, line 3: wanted a JSON object with a "text" field'):
        list(Corpus.open(file))


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"text": 3}', 'got int as "text"'), ("[1]", "wanted a JSON object"), ('{"text": "a"', "wanted a JSON object")],
)
def test_json_lines_that_are_none(line, message, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(ArgumentError, match=rf"a\.jsonl, line 2: .*{message}"):
        list(Corpus.open(file))


def test_json_is_never_read_as_text(tmp_path):
    """C would be that of the syntax."""
    for name in ("a.JSONL", "a.json"):
        (tmp_path / name).write_text('{"text": "fine"}\n{"text": "too"}\n')
        assert list(Corpus.open(tmp_path / name)) == ["fine", "too"]
    (tmp_path / "a.json").write_text('[\n{"text": "a list"}\n]\n')
    with pytest.raises(ArgumentError, match=r"a\.json, line 1: wanted a JSON object .* on every line"):
        list(Corpus.open(tmp_path / "a.json"))


def test_a_folder_is_read_recursively_in_order_without_hidden_files(tmp_path):
    for name in ("b/2.txt", "b/1.txt", "a/x/wiki_00", "c.txt", ".hidden/secret.txt", "b/.secret.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "b" / "3.jsonl").write_text('{"text": "b/3.jsonl"}\n')
    assert list(Corpus.open(tmp_path)) == ["a/x/wiki_00", "b/1.txt", "b/2.txt", "b/3.jsonl", "c.txt"]
    # Several places stay in the order given.
    assert list(Corpus.open(tmp_path / "c.txt", tmp_path / "a")) == ["c.txt", "a/x/wiki_00"]


def test_places_without_text_are_refused_at_once(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArgumentError, match=r"the folder .*empty holds no file"):
        Corpus.open(tmp_path / "empty")
    with pytest.raises(ArgumentError, match=r"none\.txt: cannot be read \(No such file"):
        Corpus.open(tmp_path / "none.txt")
    with pytest.raises(ArgumentError, match="got no file"):
        Corpus.open()


def test_bytes_that_are_not_utf_8_are_found_where_they_are(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes(b"fine\n\nM\xfcnchen\n")
    texts = Corpus.open(file)
    with pytest.raises(ArgumentError, match=r"latin\.txt: is not UTF-8 text \(byte 7, line 3\)"):
        list(texts)


@pytest.mark.parametrize("content", ["", "\n\n \n", "\ufeff"])
def test_an_empty_file_is_a_corpus_without_tokens(content, tmp_path, toy_tokenizers):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(StatisticsError, match=r"texts: got no tokens at all.*\(0 texts were read\)"):
        collect_statistics(toy_model("gpt2"), toy_tokenizers[False], Corpus.open(tmp_path / "a.txt"), [LAYER])


def test_an_error_of_the_reading_thread_is_raised_and_the_thread_ends(tmp_path, toy_tokenizers):
    (tmp_path / "a.txt").write_bytes(b"fine\n\n\xff\n")
    before = threading.active_count()
    with pytest.raises(ArgumentError, match="is not UTF-8 text"):
        collect_statistics(toy_model("gpt2"), toy_tokenizers[False], Corpus.open(tmp_path / "a.txt"), [LAYER])
    assert threading.active_count() == before


def test_a_file_gives_the_statistics_of_its_texts(tmp_path, toy_tokenizers, small_batches):
    model, tokenizer = toy_model("llama"), toy_tokenizers[True]
    (tmp_path / "a.txt").write_text("\n\n".join(SENTENCES))
    entry = collect_statistics(model, tokenizer, Corpus.open(tmp_path), [LAYER], 10_000).layers[LAYER]
    wanted, count = oracle.second_moment(model, tokenizer, SENTENCES, LAYER, 128)
    assert entry.tokens == count
    assert relative_error(entry.moment, wanted) < ALLOWED


# Data sets


def test_rows_of_a_data_set(toy_tokenizers):
    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    rows = [{"id": i, "body": sentence} for i, sentence in enumerate(SENTENCES[:4])]
    got = collect_statistics(model, tokenizer, rows, [LAYER], field="body").layers[LAYER]
    assert torch.equal(got.moment, collect_statistics(model, tokenizer, SENTENCES[:4], [LAYER]).layers[LAYER].moment)
    with pytest.raises(ArgumentError, match="texts: got an item of type dict, wanted str, or a mapping with a 'text'"):
        collect_statistics(model, tokenizer, rows, [LAYER])


def test_a_mapping_of_splits_is_no_data_set(toy_tokenizers):
    """Its keys are strings: the names of the splits would be the corpus."""
    with pytest.raises(ArgumentError, match=r"texts: got a mapping of train, test; choose one"):
        collect_statistics(toy_model("gpt2"), toy_tokenizers[False], {"train": [], "test": []}, [LAYER])


def test_a_data_set_of_the_hub_is_streamed(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        if arguments[0] == "no/such":
            raise FileNotFoundError("not on the hub")
        return [{"text": "a"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert hub_dataset("some/set") == [{"text": "a"}]
    assert hub_dataset("some/set:part", "test") == [{"text": "a"}]
    assert asked == [
        (("some/set", None), {"split": "train", "streaming": True}),
        (("some/set", "part"), {"split": "test", "streaming": True}),
    ]
    with pytest.raises(ArgumentError, match=r"got 'no/such', split 'train', .*FileNotFoundError: not on the hub"):
        hub_dataset("no/such")


def test_without_the_package_of_data_sets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ArgumentError, match=r"dataset: some/set needs the package datasets.*pip install datasets"):
        hub_dataset("some/set")


def test_a_data_set_that_ends_in_the_middle_is_one_error(toy_tokenizers):
    def rows():
        yield {"text": SENTENCES[0]}
        raise ConnectionResetError("by peer")

    with pytest.raises(StatisticsError, match=r"texts: cannot be read on \(ConnectionResetError: by peer\)"):
        collect_statistics(toy_model("gpt2"), toy_tokenizers[False], rows(), [LAYER])


@pytest.mark.parametrize("numbers", [{"tokens": 1e3}, {"tokens": True}, {"max_length": 12.0}, {"tokens": 0}])
def test_numbers_of_tokens_are_whole(numbers, toy_tokenizers):
    """Slicing by a float would fail at the last row, after all the work."""
    with pytest.raises(ArgumentError, match="wanted whole numbers of at least 1"):
        collect_statistics(toy_model("gpt2"), toy_tokenizers[False], SENTENCES, [LAYER], **numbers)


# Rows and batches


def test_the_digest_of_a_corpus_knows_where_texts_end(toy_tokenizers):
    digests = {read(toy_tokenizers[False], texts)[1].corpus.hexdigest() for texts in (["ab", "c"], ["a", "bc"])}
    assert len(digests) == 2


@pytest.mark.parametrize("bos", [False, True])
def test_every_token_is_in_one_row_of_one_window(bos, toy_tokenizers):
    """Behind BOS where the tokenizer puts it before texts: a model that knows it is never asked without."""
    tokenizer = toy_tokenizers[bos]
    windows, _ = read(tokenizer, SENTENCES)
    wanted, several = [], 0
    for sentence in SENTENCES:
        ids = tokenizer(sentence, add_special_tokens=False)["input_ids"]
        pieces = [ids[start : start + 16 - bos] for start in range(0, len(ids), 16 - bos)]
        wanted += [[BOS, *piece] if bos else piece for piece in pieces]
        several += len(pieces) > 1
    assert several
    assert [row for window in windows for row in window.rows] == wanted
    for window in windows:
        assert sorted(row for batch in window.batches(32) for row in batch) == sorted(window.rows)


def test_rows_behind_bos_take_as_many_tokens_as_they_may(toy_tokenizers):
    """Also where the last row has room for BOS alone, and where no row has room for more."""
    tokenizer = toy_tokenizers[True]
    ids = tokenizer(SENTENCES[0])["input_ids"]
    assert len(ids) > 12
    for tokens in range(1, 12):
        (window,), _ = read(tokenizer, [SENTENCES[0]], tokens=tokens, length=5)
        assert [token for row in window.rows for token in row] == [*ids[:5], BOS, *ids[5:9], BOS, *ids[9:]][:tokens]
    (window, *_), _ = read(tokenizer, [SENTENCES[0]], tokens=3, length=1)
    assert window.rows == [[token] for token in ids[:3]]
    # A text without a token of its own gives no row.
    (window,), _ = read(tokenizer, ["", SENTENCES[0]], tokens=3)
    assert window.rows == [ids[:3]]


def test_hardly_any_padding(toy_tokenizers):
    """Full rows stand together, without any; the rest loses a fifth at most."""
    random_lengths = random.Random(0)
    rows = [[7] * 128 for _ in range(200)] + [[7] * random_lengths.randint(1, 127) for _ in range(200)]
    random_lengths.shuffle(rows)
    batches = reading.Window(Place(), rows).batches(4096)
    padded = sum(len(batch) * len(batch[0]) for batch in batches)
    assert all(len(batch) * len(batch[0]) <= 4096 for batch in batches)
    assert sum(len(batch[0]) == len(batch[-1]) == 128 for batch in batches) == 6
    assert padded < 1.1 * sum(map(len, rows))
    # Short documents among long ones: a few batches end early rather than be filled up.
    mixed = [[7] * 128] * 20 + [[7] * 3] * 500
    assert [(len(b), len(b[0])) for b in reading.Window(Place(), mixed).batches(4096)] == [(20, 128), (500, 3)]
    assert [len(b[0]) for b in reading.Window(Place(), [[7] * 9] * 2).batches(4)] == [9, 9]


@pytest.mark.parametrize("bos", [False, True])
def test_reading_may_begin_at_any_window(bos, toy_tokenizers):
    windows, whole = read(toy_tokenizers[bos], SENTENCES, tokens=700)
    assert len(windows) > 1
    assert sum(len(row) for window in windows for row in window.rows) == 700
    for index, window in enumerate(windows):
        again, part = read(toy_tokenizers[bos], SENTENCES, tokens=700, start=window.start)
        assert again == windows[index:]
        assert part.corpus.hexdigest() == whole.corpus.hexdigest()


def test_other_texts_before_the_beginning_are_noticed(toy_tokenizers):
    start = read(toy_tokenizers[False], SENTENCES)[0][1].start
    assert start.texts > 1
    for texts in ([*SENTENCES[1:]], [SENTENCES[0] + "!", *SENTENCES[1:]], SENTENCES[:1]):
        with pytest.raises(StatisticsError, match="texts: got others than when the run began"):
            read(toy_tokenizers[False], texts, start=start)


def test_a_document_of_megabytes_is_read_in_parts(toy_tokenizers, monkeypatch):
    monkeypatch.setattr(reading, "MAX_CHARACTERS", 40)
    text = " ".join(SENTENCES[:3])
    read_parts = Reading(toy_tokenizers[False], [text, "x" * 100], "text", 10_000, 16, 32)._parts()
    parts = list(read_parts)
    assert "".join(parts) == text + "x" * 100
    assert all(0 < len(part) <= 40 for part in parts)
    # Cut before blanks, which belong to the word behind them; without any, where it must be.
    assert all(part.startswith(" ") for part in parts[1:-3])
    assert [len(part) for part in parts[-3:]] == [40, 40, 20]


def test_a_text_file_of_one_document_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "MAX_CHARACTERS", 40)
    (tmp_path / "a.txt").write_text("\n".join(SENTENCES))
    documents = list(Corpus.open(tmp_path / "a.txt"))
    assert documents == list(SENTENCES)


def test_half_a_surrogate_pair_is_no_text(toy_tokenizers):
    with pytest.raises(ArgumentError, match=r"texts: number 2 \(from 1\) is no Unicode text .*character 3"):
        collect_statistics(toy_model("gpt2"), toy_tokenizers[False], ["fine", "bad\ud800"], [LAYER])


def test_ten_tokens_per_dimension_by_default(toy_tokenizers):
    texts = SENTENCES * 2
    assert (
        collect_statistics(toy_model("gpt2"), toy_tokenizers[False], texts, [LAYER]).layers[LAYER].tokens == 10 * D_FF
    )


def test_items_are_made_ahead_but_not_far():
    made = []

    def items():
        for item in range(100):
            made.append(item)
            yield item

    with made_ahead(items()) as ready:
        assert [next(ready), next(ready)] == [0, 1]
    # One in the queue and one in the hands of the thread.
    assert len(made) <= 2 + reading._AHEAD + 1
