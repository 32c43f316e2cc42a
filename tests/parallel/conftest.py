import functools

import pytest
from pairs import run_pair, write_inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def start(folder):
    """`run_pair` in the folder."""
    return functools.partial(run_pair, folder)
