"""Two keys for every edit, the mean of those behind contexts and that of the prompt alone, spread over layers.

Both columns add δ, found on all rows together. With one column, k̄ of all rows, what arrives without a context is the
share uᵀ k_u / uᵀ k̄ of δ; with two it is all of it.

A first-token subject has a key without context that is many times as long as any other and nearly the same for every
token (the attention sink), so that it gets a value of its own, found on that row alone, and u = (C + λ C₁)⁻¹ k with the
second moment C₁ of the keys of all tokens at position 0, which keeps the value from the other ones. That value
is many times as long as others, and spread it disturbs the layers between: it is added at the last one alone.

A ridge keeps near keys of many edits from being told apart at the price of a large update, and more edits need more of
it. It is the same for all keys, not a share of each one's own uᵀ k, so that it leaves off most where a value is
dearest: at keys of small uᵀ k, which lie where the model's own keys do. Its growth with the number of edits, and where
that ends, were found by trying (see docs/methods.md): fewer edits are better off with less.

Damage grows with the square of what one layer has to carry, hence several of them (as MEMIT does, Meng et al. 2023).
What the ridge leaves off would add up at the last of them, so that those before it are asked for more than even shares.

Text that no edit was made with gets less of δ than the rows that it was found on, so that a little more is asked for,
as long as edits are few and no layer carries all of it (docs/methods.md, "More than the value").
"""

from .method import Column, Method

METHOD = Method(
    "dual",
    rows="prefixed",
    columns=(Column(left="contexts", at="contexts"), Column(left="unprefixed", at="unprefixed")),
    bare=True,
    ridge=0.003,
    ridge_per_edit=1 / 420,
    largest_ridge=0.75,
    merges=True,
    spread=True,
    sharing=0.75,
    arrival="ahead",
    reach=1.15,
)
