"""Whether a model and a tokenizer can be edited as they come: one error that says what they are and what would work.

Nothing is written, and nothing of size computed, before these questions are answered.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ArgumentError, CheckpointError, ModelError
from ..models.rows import check_tokenizer, encode

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
"""What a checkpoint may be loaded in, by name."""

_LOAD = "AutoModelForCausalLM.from_pretrained(…)"
_WHOLE = f"load it by {_LOAD} without device_map, or give the path of its checkpoint with memory='8GiB', say"
_QUANTISED = ("bitsandbytes.", "torch.ao.", "torchao.")


@contextmanager
def plain_modes() -> Iterator[None]:
    """Gradients, and products in the dtypes asked for, whatever modes of torch surround this block."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        default = torch.get_default_dtype()
        stack.callback(torch.set_default_dtype, default)
        torch.set_default_dtype(torch.float32)
        yield


def admit_model(model: Any, *, or_path: bool = False) -> TypeGuard[PreTrainedModel]:
    """True for a causal language model whose weights are all here as plain tensors; ModelError for anything else.

    `or_path` says in its message that the path of a checkpoint would do as well.
    """
    if not isinstance(model, PreTrainedModel):
        wanted = f"wanted a transformers PreTrainedModel{' or the path of a checkpoint' if or_path else ''}"
        raise ModelError(f"model: got {type(model).__name__}, {wanted}; {_remedy(model)}")
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"model: got {kind}, an encoder-decoder, wanted a decoder alone; load one by {_LOAD}")
    if model.get_output_embeddings() is None:
        raise ModelError(f"model: got {kind}, which has no language model head, wanted one with it; load it by {_LOAD}")
    for name, module in model.named_modules():
        _admit_module(kind, name, module)
    parameters = list(model.named_parameters())
    if absent := [name for name, parameter in parameters if parameter.is_meta]:
        raise ModelError(
            f"model: {len(absent)} of its weights are not in memory ({absent[0]}, …), as where accelerate has put them "
            f"on the disk or the CPU, or nothing was loaded; {_WHOLE}"
        )
    devices = sorted({str(parameter.device) for _, parameter in parameters})
    if len(devices) > 1:
        raise ModelError(f"model: got weights on {', '.join(devices)}, wanted one device; {_WHOLE}")
    return True


def _remedy(model: object) -> str:
    """How to come to the model inside of what came in place of one, or to any."""
    if hasattr(model, "peft_config"):
        return "merge the adapter, as in model = model.merge_and_unload(), and edit that"
    if "FullySharded" in type(model).__name__:
        return "edit the model before it is sharded, or its checkpoint"
    inside = [name for name in ("_orig_mod", "module", "model") if isinstance(getattr(model, name, None), nn.Module)]
    if inside:
        return f"edit what this wraps, whose weights are its own: model.{inside[0]}"
    return f"load one by {_LOAD}"


def _admit_module(kind: str, name: str, module: nn.Module) -> None:
    home = type(module).__module__
    if home.startswith("peft."):
        raise ModelError(
            f"model: {name} is of an adapter of peft ({type(module).__name__}), wanted a model without; load the "
            "adapter by PeftModel.from_pretrained(model, …), merge it by merge_and_unload() and edit what that returns"
        )
    weight = getattr(module, "weight", None)
    if home.startswith(_QUANTISED) or "qweight" in module._buffers:
        raise ModelError(_quantised(name, f"the quantised weights of a {home}.{type(module).__name__}"))
    if isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter) and weight.dim() > 1:
        if not _is_wide(weight):
            raise ModelError(_quantised(f"{name}.weight", f"dtype {weight.dtype}"))
        raise ModelError(
            f"model: {name}.weight is no parameter of {kind} but computed from others (pruning, a parametrization, a "
            "shard), wanted plain weights; make what was computed permanent, as parametrize.remove_parametrizations "
            "and prune.remove do"
        )
    for own, parameter in module.named_parameters(name, recurse=False):
        if parameter.dim() > 1 and not _is_wide(parameter):
            raise ModelError(_quantised(own, f"dtype {parameter.dtype}"))
        if type(parameter.data) is not Tensor:
            raise ModelError(
                f"model: {own} is a {type(parameter.data).__name__}, wanted a plain tensor; load the model as a whole, "
                "neither sharded nor quantised"
            )
        if parameter.is_inference():
            raise ModelError(
                f"model: {own} was made inside torch.inference_mode(), where no gradient is taken; load the model "
                "outside of it"
            )


def _is_wide(weight: Tensor) -> bool:
    """A float dtype that arithmetic is defined for: not one of those that only store quantised weights."""
    return weight.dtype.is_floating_point and weight.dtype.itemsize >= 2


def _quantised(name: str, what: str) -> str:
    return (
        f"model: {name} has {what}, wanted weights in bfloat16, float16, float32 or float64; load the model without "
        "quantisation"
    )


def admit_tokenizer(
    tokenizer: Any, model: PreTrainedModel | None = None, texts: Sequence[str] = (), *, offsets: bool = True
) -> TypeGuard[PreTrainedTokenizerBase]:
    """True for a tokenizer whose tokens of `texts` the model has; ModelError for anything else.

    It has to be a fast one unless nobody needs the `offsets` of its tokens.
    """
    kind = type(tokenizer).__name__
    wanted = f"wanted the model's {'fast ' if offsets else ''}tokenizer"
    if getattr(tokenizer, "tokenizer", None) is not None:
        raise ModelError(f"tokenizer: got {kind}, a processor, {wanted}; give the one inside, its .tokenizer")
    if type(tokenizer).__module__.startswith("tokenizers"):
        raise ModelError(
            f"tokenizer: got {kind} of the library tokenizers, {wanted}; wrap it, as in "
            "PreTrainedTokenizerFast(tokenizer_object=tokenizer)"
        )
    if tokenizer is None or isinstance(tokenizer, str | Path | PreTrainedModel):
        raise ModelError(f"tokenizer: got {kind}, {wanted}; load it by AutoTokenizer.from_pretrained(…)")
    if offsets:
        check_tokenizer(tokenizer)
    if model is not None:
        known = len(model.get_input_embeddings().get_parameter("weight"))
        largest = max((max(tokens.ids, default=0) for tokens in encode(tokenizer, texts)), default=0)
        if largest >= known:
            raise ModelError(
                f"tokenizer: got token {largest}, wanted ids below the model's {known}; use the model's own tokenizer"
            )
    return True


def admit_file(source: str | Path) -> None:
    """Raise CheckpointError, with what would work, for a path that is a file and no directory."""
    path = Path(source)
    if not path.is_file():
        return
    if path.suffix == ".gguf":
        remedy = (
            "GGUF holds quantised weights; give the folder of the safetensors checkpoint that it was made of, or have "
            "AutoModelForCausalLM.from_pretrained(folder, gguf_file=name) unpack them and edit that model in memory"
        )
    else:
        remedy = f"give the folder it lies in, {path.absolute().parent}" if path.suffix in _PARTS else "give a folder"
    raise CheckpointError(f"model: {path} is a file, wanted the directory of a checkpoint; {remedy}")


_PARTS = (".safetensors", ".json", ".bin", ".pt", ".pth", ".model")


def checked_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype that a checkpoint may be loaded in, by its name as well; ArgumentError for others."""
    if dtype is None or dtype in DTYPES.values():
        # What is among dtypes is one, which mypy cannot tell.
        return dtype  # type: ignore[return-value]
    found = DTYPES.get(dtype) if isinstance(dtype, str) else None
    if found is None:
        raise ArgumentError(
            f"dtype: got {dtype!r}, wanted one of {', '.join(DTYPES)}, or None for that of the checkpoint"
        )
    return found
