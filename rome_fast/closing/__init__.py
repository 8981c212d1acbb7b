"""Closing: the columns of edits become updates, layer by layer, and are judged before they are applied."""
