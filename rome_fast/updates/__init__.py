"""What edits changed: deltas, in memory and on disk, and the way back."""
