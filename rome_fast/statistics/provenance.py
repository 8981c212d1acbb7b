"""What statistics were made with: model, tokenizer and software, as they are recorded in their files."""

import hashlib
import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..models.runner import Runner
from ..opening.checkpoints import versions

# Where a model was loaded from, in which dtype and by which software, changes none of its keys but by rounding.
_NOT_OF_THE_MODEL = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")


def origin_of(runner: Runner, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Digests of config and tokenizer, dtype, kind of device, and versions."""
    config: dict[str, Any] = runner.model.config.to_dict()
    config = {name: value for name, value in config.items() if name not in _NOT_OF_THE_MODEL}
    return {
        "config_sha256": _digest(json.dumps(config, sort_keys=True, default=str)),
        "tokenizer_sha256": _digest(_vocabulary(tokenizer)),
        "dtype": str(runner.dtype).removeprefix("torch."),
        "device": runner.device.type,
        **versions(),
    }


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    # Truncation and padding are what it was last called with.
    content = tokenizer.get_vocab() if fast is None else json.loads(fast.to_str()) | {"truncation": 0, "padding": 0}
    return json.dumps(content, sort_keys=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
