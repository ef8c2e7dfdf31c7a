from pathlib import Path

import pytest
import torch

from models.kernels import cpu
from tests.train.tasks import write_task


@pytest.fixture(autouse=True)
def _threads():
    """The command sets the threads of the whole process."""
    before = torch.get_num_threads(), cpu.threads()
    yield
    torch.set_num_threads(before[0])
    cpu.set_threads(before[1])


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a made-up data set; not to be written to."""
    return write_task(tmp_path_factory.mktemp("task"))
