"""Fake servers for the tests of the SGLang engine."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxrl_llm.rollout.sglang import SGLangEngine
from tests.rollout.fake_sglang import FakeServer
from tests.rollout.sglang_engines import SAMPLER, engine


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer(SAMPLER) as server:
        yield server


@pytest.fixture
def other() -> Iterator[FakeServer]:
    with FakeServer(SAMPLER) as server:
        yield server


@pytest.fixture
def two(server: FakeServer, other: FakeServer, tmp_path: Path) -> Iterator[SGLangEngine]:
    """Two servers with weights."""
    with engine([server, other], tmp_path) as made:
        made.publish("one", 0)
        yield made
