"""Where the subject ends and the target begins, read back by decoding the tokens on either side.

The toys are byte-level, so that decoding a row's first tokens gives exactly the bytes they stand for.
"""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import oracle
from helpers import merging_tokenizer
from rome_fast import Edit
from rome_fast.errors import EditError, ModelError
from rome_fast.models.rows import check_tokenizer, edit_rows, encode, essence_row, needs_prefix
from toys import BOS, EOS, SENTENCES, toy_tokenizer

CONTEXT = "The weather is nice. "

EDITS = {
    "start": Edit("{} is a twin city of", "Chicago", "Melbourne"),
    "start, several tokens": Edit("{} plays the", "Steve Jobs", "violin"),
    "middle": Edit("The city of {} lies in", "Istanbul", "Rome"),
    "middle, within a word": Edit("The {}'s company makes", "Apple", "telephones, tablets and computers"),
    "end": Edit("The city of {}", "Danielle Darrieux", "Rome"),
    "many blanks": Edit("In {}  they   speak ", "Paris", "Rome"),
    "accents": Edit("The works of {} are", "Dvořák", "Czech"),
    "accent last": Edit("The works of {} are", "André", "Français"),
    "no blanks": Edit("{}の首都は", "東京", "日本"),
    "emoji": Edit("The meaning of {} is", "👩‍🚀", "🌙"),
    "the subject twice": Edit("Paris is not {}, it is", "Paris", "Rome"),
    "punctuation": Edit('He said "{}" and "', "Rome", "Paris"),
}
# Where it is not one space.
SEPARATORS = {"many blanks": "", "no blanks": "", "punctuation": ""}


def decode(tokenizer, ids):
    return tokenizer.decode(ids).removeprefix("<s>")


@pytest.mark.parametrize("context", ["", CONTEXT])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", EDITS)
def test_a_row_decodes_to_its_parts(name, bos, context, toy_tokenizers):
    edit, tokenizer = EDITS[name], toy_tokenizers[bos]
    (row,) = edit_rows(tokenizer, edit, [context])
    text = context + edit.text
    end = len(context) + edit.prompt.index("{}") + len(edit.subject)

    assert row.ids.count(BOS) == bos
    assert decode(tokenizer, row.ids) == text + SEPARATORS.get(name, " ") + edit.target
    assert list(row.ids[: row.target]) == tokenizer(text)["input_ids"]
    assert decode(tokenizer, row.labels) == SEPARATORS.get(name, " ") + edit.target
    assert row.inputs == row.ids[:-1]
    # The last token of the subject completes it and may reach further, but no earlier token does so.
    assert decode(tokenizer, row.ids[: row.subject + 1]).startswith(text[:end])
    assert not decode(tokenizer, row.ids[: row.subject]).startswith(text[:end])


@pytest.mark.parametrize("context", ["", CONTEXT])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", EDITS)
def test_a_row_is_that_of_the_oracle(name, bos, context, toy_tokenizers):
    edit, tokenizer = EDITS[name], toy_tokenizers[bos]
    (row,) = edit_rows(tokenizer, edit, [context])
    separator = SEPARATORS.get(name, " ")
    wanted = oracle.make_row(tokenizer, context, edit.prompt, edit.subject, edit.target, separator=separator)
    assert list(row.inputs) == wanted.input_ids
    assert row.subject == wanted.subject_position
    assert list(row.labels) == wanted.target_ids
    assert [row.target - 1 + i for i in range(len(row.labels))] == wanted.target_logits_at


def test_positions_counted_by_hand(toy_tokenizers):
    """Chicago | is| a| tw|in| city| of| M|el|bour|ne, with <s> before it or without."""
    for bos, tokenizer in toy_tokenizers.items():
        bare, prefixed = edit_rows(tokenizer, EDITS["start"], ["", "Rome is Paris. "])
        assert (bare.subject, bare.target, len(bare.ids)) == (0 + bos, 7 + bos, 11 + bos)
        # Rome| is| Paris|.| Chicago
        assert (prefixed.subject, prefixed.target, len(prefixed.ids)) == (4 + bos, 11 + bos, 15 + bos)


def test_a_character_of_three_tokens_ends_at_its_third(toy_tokenizers):
    """Six byte tokens for two characters: a subject found at the first token that covers it would end at 3."""
    (row,) = edit_rows(toy_tokenizers[False], EDITS["no blanks"], [""])
    assert row.subject == 5


def test_the_subject_is_where_the_template_says_and_not_where_its_text_comes_first(toy_tokenizers):
    """Paris| is| ...: a search for the subject's text would find position 0."""
    (row,) = edit_rows(toy_tokenizers[False], EDITS["the subject twice"], [""])
    assert row.subject > 2


@pytest.mark.parametrize("bos", [False, True])
def test_a_row_without_a_target_is_read_whole(bos, toy_tokenizers):
    tokenizer, edit = toy_tokenizers[bos], EDITS["middle"]
    (row,) = edit_rows(tokenizer, edit, [""], target=False)
    assert row.target == len(row.ids)
    assert row.labels == ()
    assert row.inputs == row.ids
    assert decode(tokenizer, row.ids) == edit.text


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", EDITS)
def test_the_essence_row_stops_at_the_subject(name, bos, toy_tokenizers):
    edit, tokenizer = EDITS[name], toy_tokenizers[bos]
    row = essence_row(tokenizer, edit)
    assert decode(tokenizer, row.inputs) == edit.subject
    assert row.subject == len(row.ids) - 1
    assert row.labels == ()


def test_trailing_special_tokens_are_dropped(toy_tokenizers):
    """A tokenizer that closes every text with </s> would have the model predict what follows the end."""
    tokenizer = toy_tokenizer(bos=True)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    assert tokenizer("Rome")["input_ids"][-1] == EOS
    assert edit_rows(tokenizer, EDITS["start"], ["", CONTEXT]) == edit_rows(
        toy_tokenizers[True], EDITS["start"], ["", CONTEXT]
    )


def test_settings_of_the_tokenizer_cannot_reach_a_row(toy_tokenizers):
    """A saved tokenizer may truncate and pad, on either side, without being asked."""
    for side in ("left", "right"):
        tokenizer = toy_tokenizer(bos=True)
        tokenizer.padding_side = tokenizer.truncation_side = side
        tokenizer.model_max_length = 4
        tokenizer.backend_tokenizer.enable_truncation(4)
        tokenizer.backend_tokenizer.enable_padding(length=40, pad_id=2, pad_token="<pad>")
        assert edit_rows(tokenizer, EDITS["start"], ["", CONTEXT]) == edit_rows(
            toy_tokenizers[True], EDITS["start"], ["", CONTEXT]
        )


@pytest.mark.parametrize(
    ("name", "bos", "wanted"),
    [
        ("start", False, True),
        ("start", True, False),
        ("start, several tokens", False, False),
        ("middle", False, False),
        ("end", False, False),
    ],
)
def test_needs_prefix_only_where_the_subject_is_the_very_first_token(name, bos, wanted, toy_tokenizers):
    (row,) = edit_rows(toy_tokenizers[bos], EDITS[name], [""])
    assert needs_prefix(row) is wanted


def test_encode_keeps_the_order_and_takes_nothing(toy_tokenizers):
    tokenizer = toy_tokenizers[False]
    texts = ["Rome is Paris", "Rome", "Rome is"]
    assert [e.ids for e in encode(tokenizer, texts)] == [tokenizer(text)["input_ids"] for text in texts]
    assert encode(tokenizer, []) == []


# Tokenizers that change the text


NORMALIZERS = {
    "NFC": normalizers.NFC(),
    "NFD": normalizers.NFD(),
    "NFKC": normalizers.NFKC(),
    "lower case": normalizers.Lowercase(),
    "no accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
}
SUBJECTS = {
    "one code point": "Andr\u00e9",
    "two": "Andre\u0301",
    "three": "Vie\u0302\u0323t",
    "three at the end": "Vie\u0302\u0323",
    "Korean syllables": "\ud55c\uad6d",
    "their letters": "\u1112\u1161\u11ab\u1100\u116e\u11a8",
    "ligature": "of\ufb01",
    "emoji of several": "👩\u200d🚀",
    "emoji with a selector": "❤\ufe0f",
    "Arabic with a mark": "\u0645\u0635\u0631\u200f",
    "Hindi": "\u0926\u093f\u0932\u094d\u0932\u0940",
}


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("change", NORMALIZERS)
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_subject_ends_where_its_last_character_does_whatever_the_tokenizer_makes_of_it(name, change, bos):
    tokenizer = toy_tokenizer(bos)
    tokenizer.backend_tokenizer.normalizer = NORMALIZERS[change]
    edit = Edit("The works of {} are", SUBJECTS[name], "Rome")
    for context in ("", CONTEXT):
        (row,) = edit_rows(tokenizer, edit, [context])
        before = tokenizer(context + "The works of " + SUBJECTS[name])["input_ids"]
        # " are" begins with a blank, which no token of the toys has at its end.
        assert list(row.ids[: row.subject + 1]) == before
        assert list(row.ids[: row.target]) == tokenizer(context + edit.text)["input_ids"]
        assert tokenizer.decode(row.labels) == (" rome" if change == "lower case" else " Rome")


def sentencepiece_tokenizer(legacy, normalizer=None):
    """As Llama 2's or 3's makers convert theirs: a blank before every text, bytes for what has no token."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    own = [normalizer] if normalizer else []
    if legacy:
        blanks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence([*own, *blanks])
    else:
        backend.normalizer = normalizers.Sequence(own)
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    blank, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([blank, decoders.ByteFallback(), decoders.Fuse(), strip])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    backend.train_from_iterator(SENTENCES, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("prompt", "subject", "target", "separator"),
    [
        ("The city of {} is in", "Paris", "Rome", " "),
        ("The city of {} is in ", "Paris", "Rome", ""),
        ("The city of {} is in\n", "Paris", "Rome", ""),
        ("The city of {} (", "Paris", "Rome", ""),
        ("{}の首都は", "東京", "日本", ""),
        ("Q: {}?\nA:", "Andre\u0301", "Rome", " "),
        ("The {}", "👩\u200d🚀", "Rome", " "),
    ],
)
def test_a_target_behind_sentencepieces_dummy_blank(prompt, subject, target, separator, legacy):
    """The tokens of the target apart would begin with a blank of their own."""
    tokenizer = sentencepiece_tokenizer(legacy)
    edit = Edit(prompt, subject, target)
    for context in ("", CONTEXT):
        (row,) = edit_rows(tokenizer, edit, [context])
        text = context + edit.text
        assert list(row.ids[: row.target]) == tokenizer(text)["input_ids"]
        assert tokenizer.decode(row.ids).removeprefix("<s>").removeprefix(" ") == text + separator + target
        assert tokenizer.decode(row.ids[: row.subject + 1]).rstrip().endswith(subject)
        assert not tokenizer.decode(row.ids[: row.subject]).rstrip().endswith(subject)


def test_a_target_that_only_the_whole_word_has_tokens_for_is_refused():
    """Wordpieces: "able" behind "un" is a token that no text begins with, and apart it is another word."""
    vocabulary = {token: i for i, token in enumerate(["[UNK]", "it", "is", "un", "##able", "able", "unable"])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    (row,) = edit_rows(tokenizer, Edit("{} is", "it", "able"), [""])
    assert tokenizer.convert_ids_to_tokens(row.ids) == ["it", "is", "able"]
    with pytest.raises(EditError, match=r"target 'able': got no token from the tokenizer that continues 'it is un'"):
        edit_rows(tokenizer, Edit("{} is un", "it", "able", separator=""), [""])


def unigram_tokenizer(unknown="[UNK]"):
    """Without letters beyond those of English, and without bytes for them."""
    pieces = ["\u2581", *"abcdefghijklmnopqrstuvwxyzR", "\u2581Rome", "\u2581is"]
    vocabulary = [(unknown, 0.0), *((piece, -float(2 - (len(piece) > 1))) for piece in pieces)]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=unknown, eos_token=unknown)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit("{} is in", "Rome", "Z\u00fcrich"), r"target ' Z\u00fcrich': got '\[UNK\]', by which .*; spell it"),
        (Edit("{} is in", "Rome", "\u6771\u4eac"), r"target '\u6771\u4eac': got '\[UNK\]'"),
        (Edit("{} is in", "Rome", "\u00fc [UNK]", separator=""), r"target '\u00fc \[UNK\]': got '\[UNK\]'"),
        (Edit("{} is in", "\u6771\u4eac", "rome"), r"subject '\u6771\u4eac': got '\[UNK\]', by which"),
    ],
)
def test_what_the_tokenizer_writes_as_unknown_is_refused(edit, message):
    """The model would be made to say "[UNK]", or to say the target of every word that it does not know."""
    with pytest.raises(EditError, match=message):
        edit_rows(unigram_tokenizer(), edit, [""])


def test_a_token_for_the_unknown_may_stand_elsewhere_and_be_meant():
    tokenizer = unigram_tokenizer()
    unknown = tokenizer.unk_token_id
    (row,) = edit_rows(tokenizer, Edit("\u6771\u4eac {} \u00fc", "Rome", "rome [UNK]"), [""])
    assert (row.ids.count(unknown), row.labels.count(unknown)) == (3, 1)
    # As GPT-2's, which is its end of text as well.
    (row,) = edit_rows(tokenizer, Edit("{} is", "Rome", "rome", end=True), [""])
    assert row.labels[-1] == unknown == tokenizer.eos_token_id


# Special tokens in the text


@pytest.mark.parametrize("bos", [False, True])
def test_a_text_that_begins_with_bos_gets_one_and_contexts_stand_behind_it(bos, toy_tokenizers):
    tokenizer = toy_tokenizers[bos]
    edit = Edit("<s>[INST] The city of {} [/INST]", "Paris", "Rome")
    bare, prefixed = edit_rows(tokenizer, edit, ["", CONTEXT])
    for row, context in ((bare, ""), (prefixed, CONTEXT)):
        text = f"<s>{context}[INST] The city of Paris [/INST]"
        assert list(row.ids[: row.target]) == toy_tokenizer(bos=False)(text)["input_ids"]
        assert row.ids.count(BOS) == 1
        assert tokenizer.decode(row.labels) == "Rome"
    assert [e.ids for e in encode(tokenizer, ["<s>Rome", "Rome"])] == [[BOS, 349], [BOS, 349] if bos else [349]]


@pytest.mark.parametrize("bos", [False, True])
def test_the_end_of_text_is_the_last_token_of_a_target_that_has_it(bos, toy_tokenizers):
    tokenizer = toy_tokenizers[bos]
    (row,) = edit_rows(tokenizer, Edit("The city of {} lies in", "Paris", "Rome", end=True), [""])
    (same,) = edit_rows(tokenizer, Edit("The city of {} lies in", "Paris", "Rome", end="</s>"), [""])
    (without,) = edit_rows(tokenizer, Edit("The city of {} lies in", "Paris", "Rome"), [""])
    assert row == same
    assert row.ids == (*without.ids, EOS)
    assert row.target == without.target


# Faults


def test_a_context_that_merges_with_the_prompt_is_refused():
    """The subject's position and the shared keys of the context would both be wrong."""
    tokenizer = merging_tokenizer((".", " "), (". ", "T"))
    edit = Edit("The {} is", "moon", "round")
    with pytest.raises(EditError, match=r"context 'It rained\. ': its last token merges with the prompt.*'moon'"):
        edit_rows(tokenizer, edit, ["", "It rained. "])
    # A token that only covers the context's own blank does no harm.
    assert len(edit_rows(tokenizer, edit, ["", "It rained! "])) == 2
    assert len(edit_rows(merging_tokenizer((".", " ")), edit, ["It rained. "])) == 1


@pytest.mark.parametrize(
    ("merge", "edit", "prompt", "answer"),
    [
        (("s", " "), Edit("The {} is", "moon", "round"), "The moon is", " round"),
        (("n", " "), Edit("The {}", "moon", "is round"), "The moon", " is round"),
        ((" ", "r"), Edit("The {} is ", "moon", "round"), "The moon is ", "round"),
        (("9", "8"), Edit("{} is 19", "It", "84", separator=""), "It is 19", "84"),
    ],
)
def test_a_target_that_would_merge_with_the_prompt_goes_on_behind_its_own_tokens(merge, edit, prompt, answer):
    """As for a program that tokenises the prompt and reads off the next tokens; it was refused, or the prompt cut."""
    tokenizer = merging_tokenizer(merge)
    (row,) = edit_rows(tokenizer, edit, [""])
    assert tokenizer(prompt + answer)["input_ids"] != list(row.ids)
    assert row.ids == tuple(tokenizer(prompt)["input_ids"] + tokenizer(answer)["input_ids"])
    assert tokenizer.convert_ids_to_tokens(row.labels) == list(answer)
    # A letter is a token here, but for the merged ones, which are not in the prompt.
    assert row.subject == edit.subject_at + len(edit.subject) - 1


def dropping_tokenizer(bos=False):
    """A toy tokenizer that drops every ~."""
    tokenizer = toy_tokenizer(bos)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    return tokenizer


@pytest.mark.parametrize("bos", [False, True])
def test_a_subject_without_a_token_is_refused(bos):
    with pytest.raises(EditError, match=r"subject '~': got no token from the tokenizer, wanted at least one"):
        edit_rows(dropping_tokenizer(bos), Edit("{} is in", "~", "Rome"), [""])


@pytest.mark.parametrize("bos", [False, True])
def test_a_subject_whose_last_character_has_no_token_is_refused(bos):
    """Its end would otherwise be taken from another character."""
    with pytest.raises(EditError, match=r"subject 'Paris~': got no token"):
        edit_rows(dropping_tokenizer(bos), Edit("The {} is in", "Paris~", "Rome"), [""])


def test_a_row_that_is_too_long_is_refused_before_it_runs(toy_tokenizers):
    """Counted without the last target token, which is never an input: 10 tokens here."""
    tokenizer, edit = toy_tokenizers[False], EDITS["start"]
    assert len(edit_rows(tokenizer, edit, [""], max_length=10)) == 1
    with pytest.raises(EditError, match=r"subject 'Chicago': got 10 tokens .*wanted at most the 9"):
        edit_rows(tokenizer, edit, [""], max_length=9)
    with pytest.raises(EditError, match=r"got 14 tokens with its context"):
        edit_rows(tokenizer, edit, ["", "Rome is Paris. "], max_length=13)


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match=r"tokenizer: got Slow without character offsets, wanted a fast tokenizer"):
        check_tokenizer(Slow())
