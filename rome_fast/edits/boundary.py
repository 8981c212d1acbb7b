"""What stands between a prompt and its target where nobody says: one space, or nothing."""

import re
import unicodedata

# The first word of the names of characters whose scripts put no spaces between words.
_UNSPACED = (
    *("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HALFWIDTH", "FULLWIDTH", "BOPOMOFO", "YI", "THAI", "LAO", "KHMER"),
    *("MYANMAR", "TIBETAN", "JAVANESE", "BALINESE", "TAI", "NEW TAI", "TANGUT", "NUSHU"),
)
_CLOSING = ".,:;!?…%‰°†‡′″،؛؟۔।॥։"
_QUOTES = "\"'`*"
# Marks that open and close alike, or that languages use the one way and the other: the odd ones of a line open.
_PAIRED = (
    *(r'"', r"[«»]", r"[“”„]", r"`+", r"(?<=[^\s*])\*+|\*+(?=[^\s*])"),
    r"(?<!\w)['‘’‚]|['‘’‚](?!\w)",  # not an apostrophe within a word
)
# `<|im_end|>`, `</s>`, `[/INST]`: what follows such a mark follows at once.
_MARKUP = re.compile(r"(<[^<>\s]+>|\[/?INST\]|\[/[A-Z_]+\])$")


def boundary(text: str, target: str) -> str:
    """The separator of a prompt, its subject filled in, and its target: `" "` or `""`.

    One space behind a letter, a digit, a symbol or a closing mark, where the target begins with a letter, a digit or a
    symbol of a script that spaces its words, or with an opening mark, a sign or a currency before one. Nothing behind
    white space, an opening mark, a currency, a slash, hyphen, underscore, `=` and their like, behind markup such as a
    special token, and on either side of Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan and their like.
    """
    return " " if _ends_word(_visible(text)) and _begins_word(_visible(target)) else ""


def _visible(text: str) -> str:
    """Without joiners, directional marks and variation selectors, which have no width and no part in this."""
    return "".join(
        c for c in text if (unicodedata.category(c) != "Cf" or c == "\u200b") and not "\ufe00" <= c <= "\ufe0f"
    )


def _ends_word(text: str) -> bool:
    if not text or text[-1].isspace() or text[-1] == "\u200b" or _MARKUP.search(text):
        return False
    last, line = text[-1], text.rsplit("\n", 1)[-1]
    for marks in _PAIRED:
        if re.search(f"(?:{marks})$", line):
            # Of a word that ends in s the mark may be an apostrophe, as in `the boys'`; in `l'` it is an article's.
            return len(re.findall(marks, line)) % 2 == 0 or bool(re.search(r"\w[sxz]['’]$", line))
    if last in "+#":  # C++, C#
        return bool(re.search(r"[^\W\d_][+#]+$", line))
    closes = last in _CLOSING or unicodedata.category(last) in ("Pe", "Pf")
    return _is_word(last) or (closes and not _is_unspaced(last))


def _begins_word(target: str) -> bool:
    for i, character in enumerate(target):
        if _is_word(character):
            return True
        opens = character in _QUOTES or unicodedata.category(character) in ("Ps", "Pi", "Pf", "Sc")
        signs = character in "-−–+±~≈." and target[i + 1 : i + 2].isdigit()
        if _is_unspaced(character) or not (opens or signs or character in "#@¿¡§"):
            return False
    return False


def _is_word(character: str) -> bool:
    """A letter, digit, accent or symbol, as ☾ or an emoji, of no script that runs its words together."""
    kind = unicodedata.category(character)
    return (kind[0] in "LNM" or kind == "So") and not _is_unspaced(character)


def _is_unspaced(character: str) -> bool:
    """Of such a script, or a mark that has its space within."""
    return "\u3000" <= character <= "\u303f" or unicodedata.name(character, "").startswith(_UNSPACED)
