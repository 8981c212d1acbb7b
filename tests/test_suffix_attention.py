"""`suffix_attention` against a textbook loop in float64, forward and backward, and every argument it must refuse.

The loop takes one row, one head and one query at a time, with the softmax written out; its gradients are autograd's.
The error may be twice that of the same loop in the dtype that the op sums in, as the dtype of the results rounds it.
"""

import pytest
import torch
from rome_fast.kernels import reference, suffix_attention

from helpers import relative_error

NAN = float("nan")
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# rows, heads, key heads, time, head size, contexts, longest, middle (None for none); options
CASES = {
    "groups of heads": ((4, 6, 2, 3, 20, 3, 7, 5), {}),
    "one query, one context": ((3, 2, 2, 1, 8, 1, 6, None), {}),
    "contexts of no token": ((2, 2, 1, 4, 5, 2, 0, 3), {}),
    "nothing before": ((2, 3, 3, 3, 16, 1, 0, None), {}),
    "a middle of no token": ((2, 2, 2, 2, 7, 2, 4, 0), {}),
    "soft cap": ((3, 4, 2, 3, 12, 2, 7, 5), {"soft_cap": 1.5}),
    "window": ((3, 2, 1, 5, 9, 2, 7, 5), {"window": 4}),
    "a window of two": ((2, 2, 2, 3, 4, 2, 3, 2), {"window": 2}),
    "slopes": ((3, 4, 4, 3, 8, 2, 7, 5), {"slopes": True}),
    "several tiles of queries": ((2, 22, 2, 3, 33, 2, 5, 2), {"soft_cap": 2.0, "window": 7, "slopes": True}),
    "several tiles of keys": ((2, 4, 2, 18, 16, 2, 21, 17), {"window": 30}),
}
ALL_AT_ONCE = "several tiles of queries"


def arguments(sizes, dtype, options, seed=0):
    """Tensors and options of a call; what no row is to see is NaN. Rows see all of the past, nothing, and a part."""
    rows, heads, kv_heads, time, head_size, contexts, longest, middle = sizes
    torch.manual_seed(seed)

    def states(rows, heads, time):
        # Laid out as layers do, a position's heads side by side.
        return torch.randn(rows, time, heads, head_size).to(dtype).transpose(1, 2)

    def seen(size):
        found = torch.randint(0, size + 1, (rows,))
        found[0], found[-1] = size, 0
        return found

    query, key, value = (states(rows, h, time) for h in (heads, kv_heads, kv_heads))
    index, of_context = torch.arange(rows) % contexts, seen(longest)
    past = {name: states(contexts, kv_heads, longest) for name in ("context_keys", "context_values")}
    most = torch.zeros(contexts, dtype=torch.int64).scatter_reduce_(0, index, of_context, "amax")
    for x in past.values():
        x.transpose(1, 2)[torch.arange(longest) >= most.unsqueeze(1)] = NAN
    found = {"query": query, "key": key, "value": value, **past, "context_index": index, "context_seen": of_context}
    if middle is not None:
        found["middle_seen"] = seen(middle).flip(0)
        for name in ("middle_keys", "middle_values"):
            found[name] = states(rows, kv_heads, middle)
            found[name].transpose(1, 2)[torch.arange(middle) >= found["middle_seen"].unsqueeze(1)] = NAN
    found |= {"scale": head_size**-0.5, **options}
    if options.get("slopes"):
        found["slopes"] = torch.linspace(0.5, 0.1, heads)
    return found


def textbook(a, dtype):
    """softmax(scores) · values in a dtype, one query at a time."""

    def numbers(name):
        return a[name].to(dtype)

    query, key, value, context_keys, context_values = map(
        numbers, ("query", "key", "value", "context_keys", "context_values")
    )
    rows, heads, time, _ = query.shape
    group = heads // key.shape[1]
    out = []
    for row in range(rows):
        context, seen = int(a["context_index"][row]), int(a["context_seen"][row])
        own = int(a["middle_seen"][row]) if "middle_seen" in a else 0
        for head in range(heads):
            h = head // group
            for t in range(time):
                keys = [*context_keys[context, h, :seen], *key[row, h, : t + 1]]
                values = [*context_values[context, h, :seen], *value[row, h, : t + 1]]
                if own:
                    keys[seen:seen] = numbers("middle_keys")[row, h, :own]
                    values[seen:seen] = numbers("middle_values")[row, h, :own]
                position = len(keys) - 1
                first = max(0, position - a["window"] + 1) if a.get("window") else 0
                scores = a["scale"] * (torch.stack(keys[first:]) @ query[row, head, t])
                if a.get("soft_cap"):
                    scores = a["soft_cap"] * torch.tanh(scores / a["soft_cap"])
                if a.get("slopes") is not None:
                    distance = torch.arange(first, position + 1) - position
                    scores = scores + a["slopes"][head].to(dtype) * distance.to(dtype)
                weights = torch.exp(scores - scores.max())
                out.append((weights / weights.sum()) @ torch.stack(values[first:]))
    return torch.stack(out).view(query.shape)


def with_gradients(run, a, outer):
    """Output, and the gradients of query, key and value for `outer`, that of the output."""
    leaves = [a[name].detach().requires_grad_() for name in ("query", "key", "value")]
    out = run(a | dict(zip(("query", "key", "value"), leaves, strict=True)))
    return [out.detach(), *torch.autograd.grad(out, leaves, outer.to(out.dtype))]


def assert_as_right_as(got, a, outer, plain_dtype, floor=0.0):
    """Output and gradients may have twice the error of the loop in `plain_dtype`, and `floor`."""
    wide = a | {name: a[name].double() for name in ("query", "key", "value")}
    exact = with_gradients(lambda b: textbook(b, torch.float64), wide, outer)
    plain = with_gradients(lambda b: textbook(b, plain_dtype).to(b["query"].dtype), a, outer)
    # Of a few numbers the loop may be right by chance; in float64 it is the oracle.
    floor += (64 if plain_dtype == torch.float64 else 4) * torch.finfo(plain_dtype).eps
    for name, one, usual, true in zip(("output", "query", "key", "value"), got, plain, exact, strict=True):
        error, limit = relative_error(one, true), 2 * relative_error(usual, true) + floor
        assert error <= limit, f"{name}: relative error {error:.2e}, limit {limit:.2e}"


def call(a):
    return suffix_attention(**a)


def unchecked(a):
    """The operator itself."""
    return torch.ops.rome_fast.suffix_attention(*(a.get(name) for name in reference.SuffixCall._fields))[0]


def summed_in(dtype):
    """What the op sums in; on a GPU 16-bit queries have products of 16-bit factors."""
    on_gpu = torch.get_default_device().type == "cuda"
    return dtype if on_gpu else torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_suffix_attention(name):
    sizes, options = CASES[name]
    a = arguments(sizes, torch.float32, options)
    outer = torch.randn_like(a["query"])
    assert_as_right_as(with_gradients(call, a, outer), a, outer, torch.float32)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["groups of heads", ALL_AT_ONCE])
def test_suffix_attention_in_every_dtype(name, dtype):
    sizes, options = CASES[name]
    a = arguments(sizes, dtype, options, seed=1)
    outer = torch.randn_like(a["query"])
    assert_as_right_as(with_gradients(call, a, outer), a, outer, summed_in(dtype))


def test_suffix_attention_of_rows_in_parts(monkeypatch):
    """As many rows at a time as fit, and one where none does."""
    sizes, options = CASES["groups of heads"]
    a = arguments(sizes, torch.float32, options)
    outer = torch.randn_like(a["query"])
    row_bytes = 2 * (7 + 5 + 3) * 20 * 4
    for limit in (1, 3 * row_bytes):
        monkeypatch.setattr(reference, "_GATHERED_BYTES", limit)
        assert_as_right_as(with_gradients(call, a, outer), a, outer, torch.float32)


def test_suffix_attention_of_nothing():
    sizes, options = CASES["groups of heads"]
    a = arguments(sizes, torch.float32, options)
    none = {name: x[:0] for name, x in a.items() if name.startswith(("query", "key", "value", "middle"))}
    none |= {name: a[name][:0] for name in ("context_index", "context_seen")}
    for b in (a | none, a | {name: a[name][:, :, :0] for name in ("query", "key", "value")}):
        out, *gradients = with_gradients(call, b, torch.zeros(b["query"].shape))
        assert out.shape == b["query"].shape
        assert [x.shape for x in gradients] == [b[name].shape for name in ("query", "key", "value")]


@pytest.mark.parametrize("layout", ["heads first", "positions first", "a slice", "expanded"])
def test_suffix_attention_of_any_layout(layout):
    """What comes out is laid out like what went in, so that layers need not copy it."""
    sizes, options = CASES["groups of heads"]
    a = arguments(sizes, torch.float32, options)
    for name in ("query", "key", "value", "context_keys", "middle_values"):
        x = a[name]
        if layout == "heads first":
            a[name] = x.contiguous()
        elif layout == "a slice":
            a[name] = torch.full((*x.shape[:3], 2 * x.shape[3]), NAN)[..., ::2].copy_(x)
    if layout == "expanded":
        a["query"], a["key"] = a["query"][:1].expand_as(a["query"]), a["key"][:1].expand_as(a["key"])
    outer = torch.randn(a["query"].shape)
    got = with_gradients(call, a, outer)
    assert_as_right_as(got, a, outer, torch.float32)
    for x, like in zip(got, (a["query"], a["query"], a["key"], a["value"]), strict=True):
        assert x.stride() == torch.empty_like(like).stride()


def test_a_window_of_one_shows_a_query_its_own_position():
    """Its weight is one, to the bit, and the score has no gradient but what the op rounds."""
    a = arguments((2, 4, 2, 3, 4, 2, 3, 2), torch.float32, {"window": 1})
    outer = torch.randn_like(a["query"])
    out, of_query, of_key, of_value = with_gradients(call, a, outer)
    assert torch.equal(out, a["value"].repeat_interleave(2, 1))
    # One addition.
    wanted = outer.double().unflatten(1, (2, 2)).sum(2)
    assert ((of_value - wanted).abs() <= torch.finfo(torch.float32).eps / 2 * wanted.abs()).all()
    # The difference of two inner products, of four terms each, which are equal.
    most = [float(x.norm(dim=3).max()) for x in (outer, a["value"], torch.cat([a["query"], a["key"]], 1))]
    bound = 2 * 4 * torch.finfo(torch.float32).eps * most[0] * most[1] * most[2] * a["scale"]
    assert of_query.abs().max() <= bound
    assert of_key.abs().max() <= 2 * bound


@pytest.mark.parametrize("options", [{}, {"soft_cap": 1.5}, {"window": 3}, {"slopes": True}], ids=str)
def test_suffix_attention_has_the_gradient_of_its_differences(options):
    a = arguments((2, 2, 1, 2, 3, 1, 2, 2), torch.float64, options)
    leaves = [a.pop(name).requires_grad_() for name in ("query", "key", "value")]
    assert torch.autograd.gradcheck(lambda *three: suffix_attention(*three, **a), leaves)


def test_a_row_that_is_no_number_spoils_no_other():
    """A context that two rows share, of which one sees what is NaN."""
    sizes, options = CASES["groups of heads"]
    a = arguments(sizes, torch.float32, options)
    wanted = call(a)
    a["context_index"] = torch.tensor([0, 1, 2, 0])
    a["context_seen"][3] = 6
    a["context_keys"], a["context_values"] = a["context_keys"].clone(), a["context_values"].clone()
    a["context_keys"][0, :, 6], a["context_values"][0, :, 6] = NAN, NAN
    a["value"][1, 0, 0, 0] = NAN
    got, *gradients = with_gradients(call, a, torch.ones_like(a["query"]))
    assert got[0].isnan().all()
    assert got[1, :3, :, 0].isnan().all()
    assert not got[1, 3:].isnan().any()
    assert torch.equal(got[2], wanted[2])
    assert not any(x[2:].isnan().any() for x in (got, *gradients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_with_a_number_out_of_range_is_nan(dtype):
    """On a GPU, and where torch.compile traces, nothing looks at the numbers before."""
    a = arguments((7, 2, 1, 3, 4, 3, 7, 5), dtype, {})
    outer = torch.randn_like(a["query"])
    right = with_gradients(unchecked, a, outer)
    wrong = [("context_index", 2**40), ("context_index", -1), ("context_seen", 8), ("context_seen", -1)]
    for row, (name, number) in enumerate([*wrong, ("middle_seen", 6), ("middle_seen", -(2**40))]):
        a[name][row] = number
    for one, two in zip(with_gradients(unchecked, a, outer), right, strict=True):
        assert one[:6].isnan().all()
        assert torch.equal(one[6], two[6])


def test_two_runs_are_equal_to_the_bit():
    sizes, options = CASES[ALL_AT_ONCE]
    a = arguments(sizes, torch.float32, options)
    outer = torch.randn_like(a["query"])
    for one, two in zip(with_gradients(call, a, outer), with_gradients(call, a, outer), strict=True):
        assert torch.equal(one, two)


def test_a_gradient_of_the_gradient_is_refused():
    """Without a word it would be that of a constant."""
    sizes, options = CASES["groups of heads"]
    a = arguments(sizes, torch.float32, options)
    a["query"] = a["query"].requires_grad_()
    (gradient,) = torch.autograd.grad(call(a).sum(), a["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="have no second derivative"):
        torch.autograd.grad(gradient.sum(), a["query"])


REFUSED = [
    ({"query": torch.ones(4, 6, 3)}, ValueError, r"query: got shape \(4, 6, 3\), wanted 4 dim"),
    ({"query": torch.ones(4, 6, 3, 20).int()}, TypeError, "query: got dtype torch.int32"),
    (
        {"query": torch.ones(4, 5, 3, 20)},
        ValueError,
        "query: got 5 heads of size 20, wanted a multiple of the 2 of key",
    ),
    ({"key": torch.ones(4, 2, 3, 20).half()}, TypeError, "key: got dtype torch.float16, wanted one of float32"),
    ({"key": torch.ones(4, 2, 2, 20)}, ValueError, "key: got 2 positions, wanted 3"),
    ({"value": torch.ones(3, 2, 3, 20)}, ValueError, "value: got 3 rows, wanted 4"),
    ({"value": torch.ones(4, 2, 3, 16)}, ValueError, "value: got 16 elements per head, wanted 20"),
    ({"context_keys": torch.ones(3, 6, 7, 20)}, ValueError, "context_keys: got 6 key heads, wanted 2"),
    ({"context_values": torch.ones(2, 2, 7, 20)}, ValueError, "context_values: got 2 contexts, wanted 3"),
    ({"context_values": torch.ones(3, 2, 6, 20)}, ValueError, "context_values: got 6 positions, wanted 7"),
    ({"context_index": torch.zeros(4).int()}, TypeError, "context_index: got dtype torch.int32"),
    ({"context_index": torch.zeros(3).long()}, ValueError, "context_index: got 3 entries, wanted 4"),
    ({"context_index": torch.tensor([0, 1, 2, 3])}, ValueError, "context_index: got 0 to 3, wanted 0 to 2"),
    ({"context_seen": torch.tensor([0, -1, 2, 3])}, ValueError, "context_seen: got -1 to 3, wanted 0 to 7"),
    ({"context_seen": torch.ones(4, device="meta").long()}, ValueError, "context_seen: got device meta"),
    ({"middle_keys": None}, ValueError, "middle_keys: got None, wanted all three of the middle or none"),
    ({"middle_keys": torch.ones(3, 2, 5, 20)}, ValueError, "middle_keys: got 3 rows, wanted 4"),
    ({"middle_values": torch.ones(4, 2, 6, 20)}, ValueError, "middle_values: got 6 positions, wanted 5"),
    ({"middle_seen": torch.tensor([0, 6, 2, 3])}, ValueError, "middle_seen: got 0 to 6, wanted 0 to 5"),
    ({"slopes": torch.ones(2)}, ValueError, "slopes: got 2 entries, wanted 6"),
    ({"scale": NAN}, ValueError, "scale: got nan, wanted a finite number"),
    ({"soft_cap": 0.0}, ValueError, "soft_cap: got 0.0, wanted a finite number above 0, or None"),
    ({"window": 0}, ValueError, "window: got 0, wanted at least 1"),
    (
        {"context_keys": torch.ones(3, 2, 7, 20, requires_grad=True)},
        ValueError,
        "context_keys: wants a gradient, and what is frozen gets none; detach it",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSED)
def test_what_suffix_attention_refuses(change, error, message):
    sizes, options = CASES["groups of heads"]
    a = arguments(sizes, torch.float32, options)
    call(a)
    with pytest.raises(error, match=message):
        call(a | change)
