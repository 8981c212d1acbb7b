"""The search: an edit's rows, the keys of them, and the value that makes the model say the target."""
