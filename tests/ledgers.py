"""What tests of the ledger share: edits, ways of making one, and its parts compared."""

from dataclasses import replace

import torch

from helpers import (
    CONTEXTS,
    END,
    LAYER,
    MIDDLE,
    SETTINGS,
    START,
    bits,
    relative_error,
)
from rome_fast import Edit
from toys import toy_model

# START begins with its subject, which has a value of its own in `dual`; the last one is a chat's, with a head.
SEVERAL = (
    START,
    MIDDLE,
    END,
    Edit("{} is a company that makes", "Apple", "telephones, tablets and computers"),
    Edit("Snow fell. The museum of {}", "Vienna", "Paris", user_at=11, separator=" "),
)

OTHERS = tuple(replace(edit, target="Berlin") for edit in SEVERAL)

MADE = {
    "one layer": {"method": "c-rome", "layer": LAYER},
    "spread": {"method": "dual", "layers": [0, 1, 2], "layer": None},
    "memit": {"method": "memit", "layers": [0, 1], "layer": None},
}

USUAL = {"statistics": "identity", "contexts": CONTEXTS, "settings": SETTINGS, "guard": "off", "unconverged": "write"}


def bytes_of(delta):
    return {f"{n}.{s}": bytes(bits(getattr(u, s))) for n, u in delta.updates.items() for s in ("left", "right")}


def asked(ledger, **state):
    return {(entry.edit.text, entry.edit.target) for entry in ledger.entries(**state)}


def requests(edits):
    return {(edit.text, edit.target) for edit in edits}


def difference(delta, wanted):
    assert delta.updates.keys() == wanted.updates.keys()
    return max(relative_error(u.dense(), wanted.updates[name].dense()) for name, u in delta.updates.items())


def fresh(make, pool, name, edits):
    """A ledger in which there was never anything but these edits, with the values of the pool."""
    ledger = make(name)
    ledger._store.append("add", [], None, None, added=of_pool(pool, edits), values=values_of(pool, edits))
    return ledger


def of_pool(pool, edits):
    known = {(e.edit.text, e.edit.target): e for event in pool.log() for e in event.added}
    return [known[edit.text, edit.target] for edit in edits]


def values_of(pool, edits):
    return pool._store.values(pool.log(), [entry.id for entry in of_pool(pool, edits)])


def copy_of_base():
    return toy_model("llama", dtype=torch.float64)
