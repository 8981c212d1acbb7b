"""Products in another dtype than the weights': their precision, their memory, and what an edit makes of them."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from helpers import MIDDLE, SETTINGS, START, delta_w, edited, relative_error, rounding
from rome_fast import ValueSettings
from rome_fast.errors import ArgumentError
from rome_fast.models import products
from rome_fast.models.runner import Runner
from rome_fast.search.values import compute_dtype
from toys import toy_model

HALF = (torch.bfloat16, torch.float16)
BF16_ROUNDING = torch.finfo(torch.bfloat16).eps / 2
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def layer_of(kind, dtype, *, bias=True):
    layer = nn.Linear(48, 80, bias=bias) if kind == "linear" else Conv1D(80, 48)
    nn.init.normal_(layer.weight)
    return layer.to(dtype).requires_grad_(False)


def exact(kind, layer, x):
    weight = layer.weight.double().T if kind == "linear" else layer.weight.double()
    bias = 0 if layer.bias is None else layer.bias.double()
    return x.double() @ weight + bias, weight


@pytest.mark.parametrize("parts", [1, 3, 1000])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_products_in_fp32_of_16_bit_weights(kind, dtype, parts, monkeypatch):
    monkeypatch.setattr(products, "_PART_OF_CPU", 48 * 80 // parts)
    layer, x = layer_of(kind, dtype), torch.randn(2, 5, 48).to(dtype).requires_grad_()
    with products.in_dtype(torch.float32, dtype):
        out = layer(x)
    upstream = torch.randn(2, 5, 80).to(dtype)
    (gradient,) = torch.autograd.grad(out, [x], upstream)
    wanted, weight = exact(kind, layer, x)
    assert (out.dtype, gradient.dtype) == (dtype, dtype)
    # Nothing but the rounding of the result, and of the bias added to it: u each.
    assert relative_error(out, wanted) < 2 * torch.finfo(dtype).eps / 2
    assert relative_error(gradient, upstream.double() @ weight.T) < torch.finfo(dtype).eps / 2


def test_a_layer_without_bias_and_one_row():
    layer, x = layer_of("linear", torch.bfloat16, bias=False), torch.randn(48).bfloat16()
    with products.in_dtype(torch.float32, torch.bfloat16):
        assert relative_error(layer(x), exact("linear", layer, x)[0]) < torch.finfo(torch.bfloat16).eps / 2


def test_products_in_bfloat16_of_fp32_weights():
    layer, x = layer_of("linear", torch.float32), torch.randn(7, 48)
    with products.in_dtype(torch.bfloat16, torch.float32):
        out = layer(x)
    error = relative_error(out, exact("linear", layer, x)[0])
    assert out.dtype == torch.float32
    # Two factors and the product are rounded; a hundredth of that would be fp32.
    assert 0.1 * BF16_ROUNDING < error < 3 * BF16_ROUNDING


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize(("dtype", "weights"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_weights_converted_once_give_the_same_bits(kind, dtype, weights, monkeypatch):
    monkeypatch.setattr(products, "_PART_OF_CPU", 48 * 30)
    layer, x = layer_of(kind, weights), torch.randn(7, 48).to(weights).requires_grad_()
    upstream, copies, results = torch.randn(7, 80).to(weights), products.Copies(), []
    for kept in (None, copies, copies):
        with products.in_dtype(dtype, weights, kept):
            out = layer(x)
        results.append((out, *torch.autograd.grad(out, [x], upstream)))
    converted = copies.of(layer.weight if kind == "conv1d" else layer.weight.t(), dtype)
    assert converted.dtype == dtype
    converted.zero_()
    with products.in_dtype(dtype, weights, copies):
        assert torch.equal(layer(x), layer.bias.expand(7, -1))
    for out, gradient in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_a_result_in_fp32_is_not_rounded_to_the_dtype_of_its_product(weights, kept, device):
    layer, x = layer_of("linear", weights).to(device), torch.randn(7, 48, device=device).to(weights).requires_grad_()
    with products.in_dtype(torch.bfloat16, weights, products.Copies() if kept else None, torch.float32):
        out = layer(x)
    # On a GPU the factors of an fp32 model are rounded; the bias is added to their product as it is.
    factors = torch.bfloat16 if device == "cuda" else weights
    weight = layer.weight.to(factors).double()
    wanted = x.to(factors).double() @ weight.T + layer.bias.double()
    assert out.dtype == torch.float32
    assert relative_error(out, wanted) < rounding(torch.float32, 48)
    upstream = torch.randn(7, 80, device=device)
    (gradient,) = torch.autograd.grad(out, [x], upstream)
    assert gradient.dtype == weights
    assert relative_error(gradient, upstream.double() @ weight) < 3 * BF16_ROUNDING


def test_no_converted_weight_is_kept_for_the_backward_pass():
    layer, x = layer_of("linear", torch.bfloat16), torch.randn(7, 48).bfloat16().requires_grad_()
    with products.in_dtype(torch.float32, torch.bfloat16):
        out = layer(x)
    (saved,) = out.grad_fn.next_functions[0][0].saved_tensors
    assert saved.data_ptr() == layer.weight.data_ptr()


def test_what_is_not_a_frozen_weight_of_that_dtype_is_left_alone():
    trained, x = layer_of("linear", torch.bfloat16).requires_grad_(), torch.randn(7, 48).bfloat16()
    other, y = layer_of("linear", torch.float32), torch.randn(7, 48)
    with products.in_dtype(torch.float32, torch.bfloat16):
        trained(x).sum().backward()
        inside = other(y)
    assert trained.weight.grad is not None
    assert torch.equal(inside, other(y))


@pytest.mark.parametrize(
    ("stored", "setting", "fast", "wanted"),
    [
        ("float32", "auto", False, "float32"),
        ("float32", "auto", True, "bfloat16"),
        ("float32", "bfloat16", False, "bfloat16"),
        ("float32", "float32", True, "float32"),
        ("bfloat16", "auto", False, "float32"),
        ("bfloat16", "auto", True, "bfloat16"),
        ("float16", "auto", False, "float32"),
        ("float64", "auto", True, "float64"),
    ],
)
def test_the_dtype_chosen(stored, setting, fast, wanted, monkeypatch):
    for module in ("models.products", "search.values"):
        monkeypatch.setattr(f"rome_fast.{module}.multiplies_fast", lambda device, dtype: fast)
    model = toy_model("llama", dtype=getattr(torch, stored))
    settings = ValueSettings(compute_dtype=setting)
    assert compute_dtype(Runner(model), settings) == getattr(torch, wanted)


def test_an_unknown_dtype_is_an_error():
    with pytest.raises(ArgumentError, match="compute_dtype 'int8', wanted one of 'auto', 'float32'"):
        ValueSettings(compute_dtype="int8")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_edit_with_products_in_bfloat16(kind, toy_tokenizers):
    """Keys stay exact, so the update points where it should; its length is that of a δ found with rough gradients."""
    model = toy_model(kind)
    found = {}
    for dtype in ("float32", "bfloat16"):
        settings = replace(SETTINGS, compute_dtype=dtype)
        result = edited(model, toy_tokenizers[False], [START, MIDDLE], settings=settings)
        found[dtype] = delta_w(result)
        assert result.report()["compute_dtype"] == dtype
        result.revert()
    # Sums are made in fp32: of each step's gradient, ten products per layer in the three that follow are left, backward
    # twice; a hundredth of it would be fp32.
    allowed = rounding(torch.bfloat16, 3 * 10 * 3)
    assert allowed / 100 < relative_error(found["bfloat16"], found["float32"]) < 2 * allowed


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_edit_of_a_bfloat16_model_multiplies_in_fp32_by_itself(kind, toy_tokenizers, monkeypatch):
    """On a CPU without instructions for bfloat16."""
    monkeypatch.setattr(products, "multiplies_fast", lambda device, dtype: False)
    model = toy_model(kind, dtype=torch.bfloat16)
    result = edited(model, toy_tokenizers[False], [START])
    assert result.report()["compute_dtype"] == "float32"
    assert result.report()["dtype"] == "bfloat16"
