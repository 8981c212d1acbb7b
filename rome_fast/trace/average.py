"""Average indirect effects by layer and by the role of a token, over requests."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROLES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)


@dataclass(frozen=True)
class Average:
    """Of one kind. A role that no request has is NaN."""

    mean: Tensor  # (layers, roles) fp64: over requests, of the mean over a request's tokens of that role
    error: Tensor  # standard error of that mean; NaN of fewer than two requests
    requests: tuple[int, ...]  # how many of them have each role


def roles_of(tokens: int, subject: range) -> list[str | None]:
    """The role of each token; None before the subject.

    A single token of the subject is its last one, and a single token behind it is the last of the prompt.
    """
    last = subject.stop - 1
    found: list[str | None] = [None] * tokens
    for token in range(subject.start, tokens):
        if token == last:
            role = "last subject token"
        elif token < last:
            role = "first subject token" if token == subject.start else "middle subject tokens"
        elif token == tokens - 1:
            role = "last token"
        else:
            role = "first subsequent token" if token == last + 1 else "further tokens"
        found[token] = role
    return found


def average(effects: Sequence[Tensor], subjects: Sequence[range]) -> Average:
    """The average over requests of effects (layers, tokens) each."""
    by_role: dict[str, list[Tensor]] = {role: [] for role in ROLES}
    for effect, subject in zip(effects, subjects, strict=True):
        roles = roles_of(effect.shape[1], subject)
        for role, own in by_role.items():
            tokens = [token for token, name in enumerate(roles) if name == role]
            if tokens:
                own.append(effect[:, tokens].mean(1))
    nothing = torch.full((len(effects[0]),), torch.nan, dtype=torch.float64)
    means, errors = [], []
    for own in by_role.values():
        stacked = torch.stack(own) if own else nothing[None]
        means.append(stacked.mean(0))
        errors.append(stacked.std(0) / len(own) ** 0.5 if len(own) > 1 else nothing)
    return Average(torch.stack(means, 1), torch.stack(errors, 1), tuple(map(len, by_role.values())))
