"""Some of many requests, of every relation as large a share as of all of them."""

import random
from collections.abc import Sequence

from ..edits import Edit, checked_edits
from ..errors import ArgumentError


def stratified_sample(edits: Sequence[Edit], count: int, seed: int = 0) -> list[Edit]:
    """`count` of the edits in their order, drawn relation by relation without replacement.

    The strata are `Edit.relation`, and the prompt's template where a request has none. A stratum of n of N edits gets
    ⌊count·n / N⌋ of the sample, and what is left over goes to the largest remainders, among equal ones to the relation
    that comes first (Hamilton's method). The same seed draws the same edits.

    Raises ArgumentError for a count that is no whole number from 1 to the number of edits.
    """
    edits = checked_edits(edits)
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= len(edits):
        raise ArgumentError(f"sample: got {count!r} of {len(edits)} requests, wanted a whole number from 1 to that")
    strata: dict[tuple[str, str], list[int]] = {}
    for place, edit in enumerate(edits):
        key = ("template", edit.prompt) if edit.relation is None else ("relation", edit.relation)
        strata.setdefault(key, []).append(place)
    shares = [divmod(count * len(places), len(edits)) for places in strata.values()]
    sizes = [whole for whole, _ in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: -shares[i][1])
    for i in by_remainder[: count - sum(sizes)]:
        sizes[i] += 1
    draw = random.Random(seed)
    drawn = [place for places, size in zip(strata.values(), sizes, strict=True) for place in draw.sample(places, size)]
    return [edits[place] for place in sorted(drawn)]
