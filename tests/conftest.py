"""Fixtures of all tests."""

import functools
import gc

import pytest
import torch
from rome_fast.kernels import native

import oracle
from helpers import LAYER
from rome_fast.models.fingerprint import Fingerprint
from rome_fast.models.runner import Runner
from rome_fast.search.search import Search
from rome_fast.statistics import LayerStatistics, Statistics
from toys import SENTENCES, toy_model, toy_tokenizer


def pytest_addoption(parser):
    group = parser.getgroup("other CPUs", "what the tests would meet on another CPU; see also `make portability`")
    group.addoption("--native", metavar="SET", help="instruction set of the native kernels: generic, avx2, avx512")
    group.addoption(
        "--bfloat16", choices=("on", "off"), help="take products with bfloat16 weights in it, or in float32"
    )


def pytest_configure(config):
    if config.getoption("--native"):
        native.select(config.getoption("--native"))


def pytest_collection_finish():
    """What is imported stays: looking for garbage in it, as often, is a fifth of the time, and forks would copy it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def pytest_sessionfinish():
    """What is frozen at the end of a process counts as lost to those libraries that look."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every test, whichever tests run before it."""
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True, scope="session")
def products_in_fp32(pytestconfig):
    """Values of fp32 models are optimised in fp32 by default, also on machines that multiply bfloat16 faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rome_fast.search.values.multiplies_fast", lambda device, dtype: False)
        if wanted := pytestconfig.getoption("--bfloat16"):
            fast = wanted == "on"
            patch.setattr(
                "rome_fast.models.products.multiplies_fast", lambda device, dtype: fast and dtype == torch.bfloat16
            )
        yield


@pytest.fixture(scope="session")
def toy_tokenizers():
    """The toy tokenizers by whether they add BOS. Shared: not to be changed."""
    return {bos: toy_tokenizer(bos) for bos in (False, True)}


@pytest.fixture(scope="session")
def toy_moment(toy_tokenizers):
    """A function of (kind, bos, layer) that returns C of a toy model, float64 and well conditioned, and its tokens."""

    @functools.cache
    def moment(kind, bos, layer=LAYER):
        c, tokens = oracle.second_moment(toy_model(kind), toy_tokenizers[bos], SENTENCES[:8], layer, 64)
        return c + 0.01 * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype), tokens

    return moment


@pytest.fixture(scope="session")
def toy_statistics(toy_moment):
    """A function of (model, bos, layer) that returns the Statistics of a toy model in the dtype fit for it."""

    def statistics(model, bos, layer=LAYER):
        moment, tokens = toy_moment(model.config.model_type, bos, layer)
        runner = Runner(model)
        dtype = torch.promote_types(runner.dtype, torch.float32)
        return Statistics([LayerStatistics(layer, moment.to(dtype), tokens, Fingerprint.of(runner, layer))])

    return statistics


@pytest.fixture
def found(monkeypatch):
    """A list that gets what is found for every group of edits."""
    groups, find = [], Search.find

    def kept(search, group):
        groups.append(find(search, group))
        return groups[-1]

    monkeypatch.setattr(Search, "find", kept)
    return groups


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """An empty folder in place of the user's cache."""
    monkeypatch.setenv("ROME_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def one_thread(monkeypatch):
    """Those of torch and of the tokenizer do not survive a fork."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
