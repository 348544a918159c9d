"""One tiny model and one server around it for all tests that ask over HTTP."""

import pytest
from helpers_server import POOL, make_model, make_tokenizer, serve


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def server(model_folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with serve(model_folder, log, "--max-total-tokens", str(POOL), "--served-model-name", "tiny") as running:
        yield running
        assert running.stop() == 0
    assert "Traceback" not in log.read_text(), "whatever clients did, no defect of the server may show"
