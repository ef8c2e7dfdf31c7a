"""A test marked `each_level` (cases.py) runs once for each instruction set of this machine."""

from collections.abc import Iterator

import pytest

from models.kernels import cpu


@pytest.fixture
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.level()
    cpu.use_level(request.param)
    yield request.param
    cpu.use_level(before)


@pytest.fixture(autouse=True)
def _threads_restored() -> Iterator[None]:
    before = cpu.threads()
    yield
    cpu.set_threads(before)
