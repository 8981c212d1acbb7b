"""Edits as data: a ledger keeps requests and the values found for them, and closes them ever anew."""

from .entries import Entry, Event
from .ledger import Diff, Ledger, LedgerWarning

__all__ = ["Diff", "Entry", "Event", "Ledger", "LedgerWarning"]
