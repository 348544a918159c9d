"""The pages of docs/ and the READMEs: commands are taken by the parsers, links lead somewhere, the site builds."""

import html
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import doctor_picture
import page_picture
import pytest
from docs_commands import DOCUMENTS, ROOT, blocks, check, commands

from wave64 import OPS
from wave64.op import BACKENDS

DOCS = ROOT / "docs"
SPEC: Any = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
hooks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hooks)
MADE = {"reference.md": hooks.operators(), "decode_loop.md": hooks.decode_loop("")}
WANTED = {"python -m wave64 doctor", "python3 setup_rocm.py demo"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_are_taken_by_the_parsers_that_read_them(document, monkeypatch):
    for line in commands(document.read_text()):
        try:
            check(line, monkeypatch)
        except (SystemExit, Exception) as error:  # the parsers' own way to refuse; --help ends with 0
            if not (isinstance(error, SystemExit) and error.code == 0):
                pytest.fail(f"{document.name}: {line}: {error or type(error).__name__}")


def test_the_documents_have_commands_to_check():
    found = {line.partition("#")[0].strip() for document in DOCUMENTS for line in commands(document.read_text())}
    assert found >= WANTED
    assert len(found) > 80


@pytest.mark.parametrize("line", [
    "python -m wave64 doktor", "python -m wave64.launch_server --tensor 2", "python -m wave64 rpd top",
    "python3 setup_rocm.py deploy", "curl localhost:30000/v1/embeddings", "python docs/absent.py",
    "drun wave64:gfx942 serve --tp 0", "docker build -f docker/rocm.Dockerfile --build-arg ARCH=gfx942 .", "wavesix"])
def test_a_wrong_command_is_found(line, monkeypatch, capsys):
    with pytest.raises((SystemExit, AssertionError, Exception)) as raised:
        check(line, monkeypatch)
    assert raised.type in (SystemExit, AssertionError, FileNotFoundError)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_blocks_compile_and_those_marked_run(document):
    text = document.read_text()
    for language, content in blocks(text):
        if language == "python":
            more = "def served(): ..." if content.rsplit("\n", 2)[-2].startswith("@") else ""
            compile(content + more, document.name, "exec")
    for content in re.findall(r"<!-- run -->\n```python\n(.*?)```", text, re.DOTALL):
        exec(compile(content, document.name, "exec"), {})


def headings(text: str) -> set[str]:
    """Anchors, as mkdocs and GitHub make them of ASCII headings."""
    lines = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", line.lower())).strip("-") for line in lines}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        text = MADE.get(path) if document.parent == DOCS else None
        assert text is not None or file.is_file(), f"{document.name}: {target}"
        if anchor:
            assert anchor in headings(text or file.read_text()), f"{document.name}: {target}"


def test_every_operator_is_in_the_reference_with_its_contract():
    page = MADE["reference.md"]
    assert re.findall(r"^### `(\w+)`$", page, re.MULTILINE) != []
    for name, op in OPS.items():
        section = page.split(f"### `{name}`\n")[1].split("\n### ")[0]
        assert all(line.strip() in section for line in (op.__doc__ or "").splitlines())
        assert section.count(f"{name}(") >= 1
    assert "fused_add_rms_norm(x!, residual!, weight, eps=1e-06)" in page
    assert {name for names in hooks.GROUPS.values() for name in names} <= set(OPS)


def test_every_verb_is_in_the_documentation():
    from wave64.__main__ import MODULES

    text = "".join(document.read_text() for document in DOCUMENTS)
    names = [*MODULES, "check", "report"]
    assert [verb for verb in names if not re.search(rf"wave64[ .]{verb}\b", text)] == []


def test_each_of_thirty_symptoms_has_an_answer_with_a_way_to_look():
    text = (DOCS / "troubleshooting.md").read_text().split("\n## Also reported")[0]
    answers = re.split(r"^### .*$", text, flags=re.MULTILINE)[1:]
    assert len(answers) == 30
    for answer in answers:
        lines = answer.partition("\n## ")[0].strip().splitlines()
        assert 1 <= len(lines) <= 3, answer
        assert re.search(r"`[^`]+`|\]\(", answer), answer


def test_the_chinese_readme_shows_the_same_commands_and_pictures():
    def shown(name: str) -> tuple:
        text = (ROOT / name).read_text()
        code = [[line.partition(" #")[0].rstrip() for line in content.splitlines()] for _, content in blocks(text)]
        return code, re.findall(r"\]\((docs/[^)]+)\)", text), re.findall(r"^\| `?(\w+)`? \|", text, re.MULTILINE)

    english, chinese = shown("README.md"), shown("README.zh.md")
    assert chinese[:2] == english[:2]
    assert set(re.findall(r"`--[\w-]+", (ROOT / "README.zh.md").read_text())) <= set(
        re.findall(r"`--[\w-]+", (ROOT / "README.md").read_text()))
    named = [set(re.findall(r"`([\w./-]+\.(?:md|py|so)|gfx\d+\w*|--[\w-]+|demo-[\w-]+|WAVE64_[\w=]+|tests/\w+)`",
                            (ROOT / name).read_text())) for name in ("README.zh.md", "README.md")]
    assert named[0] == named[1] - {"README.zh.md"} | {"README.md"}
    numbered = [re.findall(r"^\| (\d) \|", (ROOT / name).read_text(), re.M) for name in ("README.zh.md", "README.md")]
    assert numbered[0] == numbered[1]
    rows = [[row for row in table if row in BACKENDS] for table in (chinese[2], english[2])]
    assert rows == [sorted(BACKENDS, key=rows[1].index)] * 2
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_doctors_picture_is_of_its_table_now():
    drawn = html.unescape(" ".join(re.findall(r"<text[^>]*>([^<]*)</text>", doctor_picture.FILE.read_text())))
    drawn = " ".join(drawn.split())
    for line in doctor_picture.lines():
        words = " ".join(re.sub(r"\033\[[\d;]*m", "", line).split())
        assert words in drawn, f"{words}: draw it anew: python tests/doctor_picture.py"


def test_the_pages_picture_is_of_the_page_now():
    drawn = page_picture.drawn_of(page_picture.FILE.read_bytes())
    assert drawn == page_picture.digest(), "page.html has changed: draw it anew: python tests/page_picture.py"


def test_every_picture_is_small_shown_in_the_readme_and_has_a_way_to_draw_it():
    pictures = {file.name: file.stat().st_size for file in DOCS.iterdir() if file.suffix in (".png", ".svg")}
    assert {"first_page.png", "trace.png", "doctor.svg"} <= set(pictures)
    assert {name: size for name, size in pictures.items() if size > 150 * 1024} == {}
    readme = re.findall(r"!\[[^\]]{20,}\]\(docs/([^)]+)\)", (ROOT / "README.md").read_text())
    assert sorted(readme) == sorted(pictures)
    drawn = (ROOT / "CONTRIBUTING.md").read_text().partition("## Pictures\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `docs/([^`]+)` \|", drawn, re.MULTILINE) == ["doctor.svg", "trace.png",
                                                                                     "first_page.png", "page.png"]


@pytest.mark.slow
def test_the_site_builds_with_search_and_asks_no_other_host(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install 'wave64[docs]'")
    built = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")],
                           cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert built.returncode == 0, built.stdout + built.stderr
    index = json.loads((tmp_path / "site/search/search_index.json").read_text())
    found = " ".join(page["text"] for page in index["docs"])
    assert all(words in found for words in ("mla_decode_rope", "e4m3fnuz", "--enable-dp-attention"))
    for page in Path(tmp_path / "site").rglob("*.html"):
        text = page.read_text()
        assert re.findall(r"<(?:script|img|iframe)[^>]*src=\"?(https?://[^\" >]+)", text) == [], page.name
        links = re.findall(r"<link[^>]*>", text)
        assert [link for link in links if "http" in link and "rel=canonical" not in link] == [], page.name
