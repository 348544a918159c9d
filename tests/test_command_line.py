"""`python -m wave64 VERB`: every tool by one name."""

import importlib.metadata
import importlib.util
import subprocess
import sys
from typing import Any

import pytest

from wave64.__main__ import MODULES, main


def test_every_verb_is_listed_and_leads_to_a_module_that_runs_itself(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    for verb, (module, _) in MODULES.items():
        assert verb in shown.split()
        spec: Any = importlib.util.find_spec(module)
        runs = module if spec.submodule_search_locations is None else f"{module}.__main__"
        loader: Any = importlib.util.find_spec(runs).loader
        source = loader.get_source(runs)
        assert 'if __name__ == "__main__":' in source


def test_a_verb_runs_its_module_with_the_rest_of_the_line():
    command = [sys.executable, "-m", "wave64", "step", "gfx941"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "invalid choice: 'gfx941'" in done.stderr


def test_hashes_are_printed_by_report_and_without_a_verb(capsys):
    assert main(["--hashes"]) == 0
    alone = capsys.readouterr().out
    assert main(["report", "--hashes"]) == 0
    assert main(["--hashes", "report"]) == 0
    assert capsys.readouterr().out == 2 * alone


def test_an_unknown_verb_names_those_there_are(capsys):
    with pytest.raises(SystemExit):
        main(["chekc"])
    assert "check-emulated" in capsys.readouterr().err


def test_the_command_is_installed():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="wave64")
    assert script.value == "wave64.__main__:main"
