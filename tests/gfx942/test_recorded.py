"""The record of results says when one is no longer valid, and is itself of the emulator as it is."""

import json
from types import SimpleNamespace

import pytest
import recorded
from recorded import Record, code_of

HELD = {"triton": recorded.triton.__version__, "results": {"a": {"mark": "1", "told": {"instructions": 7}}}}


@pytest.fixture
def held() -> dict:
    return HELD | {"common": recorded.common()}


@pytest.fixture
def noted() -> SimpleNamespace:
    """What a test notes with record_property."""
    seen = []
    return SimpleNamespace(seen=seen, note=lambda *told: seen.append(told))


def test_the_record_is_of_this_emulator(record):
    if not record.comparable:
        pytest.skip(f"recorded.json is of Triton {record.held.get('triton')}, this is {recorded.triton.__version__}")
    assert record.current or record.renewing, \
        f"the emulator or the contract has changed, so all was obtained anew; renew recorded.json with {recorded.RENEW}"


def undrawn(record: Record) -> Record:
    record._drawn = lambda key: False
    return record


def test_a_valid_result_is_taken_as_it_is(held, noted):
    with undrawn(Record(held)).result("a", "1", noted.note) as entry:
        assert entry.told == {"instructions": 7}
    assert not entry.anew
    assert noted.seen == [("recorded", ("a", "1", {"instructions": 7}))]


def obtain(record: Record, key: str, mark: str, noted: SimpleNamespace, instructions: int) -> None:
    with record.result(key, mark, noted.note) as entry:
        assert entry.told is None
        entry.told = {"instructions": instructions}


@pytest.mark.parametrize("change", ["mark", "key", "no record"])
def test_what_is_not_valid_is_obtained_and_then_fails(change, held, noted):
    key, mark = {"mark": ("a", "2"), "key": ("b", "1")}.get(change, ("a", "1"))
    if change == "no record":
        held = held | {"results": {}}
    with pytest.raises(pytest.fail.Exception, match="no result of it as it is now; renew with"):
        obtain(undrawn(Record(held)), key, mark, noted, 7)
    obtain(undrawn(Record(held, renewing=True)), key, mark, noted, 8)
    assert noted.seen[-1] == ("recorded", (key, mark, {"instructions": 8}))


@pytest.mark.parametrize("change", [{"triton": "2.0"}, {"common": "another"}])
def test_of_another_compiler_or_emulator_all_is_obtained_and_nothing_compared(change, held, noted):
    """Another emulator fails once, not for every result."""
    obtain(Record(held | change), "a", "1", noted, 8)


@pytest.mark.parametrize("options", [{}, {"all_anew": True}])
def test_a_drawn_result_must_come_out_as_it_was(options, held, noted):
    record = Record(held, **options)
    if not options:
        record._drawn = lambda key: True
    with pytest.raises(AssertionError, match="a: obtained anew it is"):
        obtain(record, "a", "1", noted, 8)
    obtain(record, "a", "1", noted, 7)


@pytest.mark.parametrize(("told", "same"), [
    ({"instructions": 101, "rows": [["a", 1]]}, True), ({"instructions": 103, "rows": [["a", 1]]}, False),
    ({"instructions": 100, "rows": [["a", 2]]}, False), ({"instructions": 100}, False)])
def test_only_numbers_may_differ_and_little(told, same):
    assert recorded._same(told, {"instructions": 100, "rows": [["a", 1]]}) == same


def test_a_block_that_fails_keeps_nothing(held, noted):
    record = undrawn(Record(held))
    with pytest.raises(ZeroDivisionError), record.result("b", "1", noted.note):
        raise ZeroDivisionError
    assert noted.seen == []


def test_about_a_twentieth_is_drawn():
    drawn = sum(Record._drawn(f"key {i}") for i in range(4000))
    assert 100 < drawn < 300


def test_only_what_is_code_counts():
    text = '"""A module."""\nimport os  # path\n\ndef f(x):\n    """Twice."""\n    # doubled\n    return 2 * x\n'
    assert code_of(text) == code_of(text.replace("Twice", "Doubles").replace("# doubled", "# so").replace("\n\n", "\n"))
    assert code_of(text) != code_of(text.replace("2 * x", "3 * x"))
    assert code_of('s = """\n# kept\n"""\n') != code_of('s = """\n"""\n')


def test_an_operator_s_sources_are_those_that_it_imports(monkeypatch):
    """mla_decode_rope's kernels are mla_decode's, whose splits are paged_attention's, too."""
    texts, read = {}, recorded.Path.read_text
    monkeypatch.setattr(recorded.Path, "read_text", lambda path: texts.setdefault(path, read(path)))
    recorded.sources.__wrapped__("mla_decode_rope")
    names = {path.name for path in texts}
    assert {"mla_decode_rope.py", "mla_decode.py", "mla_decode_cdna.py", "mla_decode_common.py", "splits.py"} <= names
    assert "topk.py" not in names
    before = recorded.sources.__wrapped__("mla_decode_rope")
    changed = next(path for path in texts if path.name == "splits.py")
    texts[changed] += "\nANOTHER = 1\n"
    assert recorded.sources.__wrapped__("mla_decode_rope") != before


def test_a_mark_tells_launches_apart(compiling):
    one = compiling.submit(recorded.mark, "rms_norm", ["7x768-torch.bfloat16"], "gfx942").result()
    assert one == compiling.submit(recorded.mark, "rms_norm", ["7x768-torch.bfloat16"], "gfx942").result()
    assert one != compiling.submit(recorded.mark, "rms_norm", ["7x768-torch.float16"], "gfx942").result()
    assert one != compiling.submit(recorded.mark, "rms_norm", ["7x768-torch.bfloat16"], "gfx950").result()
    assert one != compiling.submit(recorded.mark, "rms_norm", ["5x97-torch.bfloat16"], "gfx942").result()


def test_all_results_come_of_the_emulator_and_the_contract(monkeypatch):
    texts, read = {}, recorded.Path.read_text
    monkeypatch.setattr(recorded.Path, "read_text", lambda path: texts.setdefault(path, read(path)))
    before = recorded.common()
    names = {path.name for path in texts}
    assert {"run.py", "machine.py", "vector.py", "core.c", "matrix.h", "contract.py", "judge.py", "cost.py", "quant.py",
            "core.py", "races.py", "shrunken.py", "lower.py"} <= names
    assert not {"device.py", "step.py", "views.py"} & names
    for name in ("vector.py", "matrix.h"):
        changed = next(path for path in texts if path.name == name)
        kept, texts[changed] = texts[changed], texts[changed] + "\nANOTHER = 1\n"
        assert recorded.common() != before
        texts[changed] = kept
    assert recorded.common() == before


def test_what_is_written_is_read(tmp_path, monkeypatch, held):
    monkeypatch.setattr(recorded, "RECORD", tmp_path / "recorded.json")
    forms = {"s_endpgm SOPP": "000081bf", "s_nop SOPP": "000080bf"}
    recorded.write([("one", "1", {"instructions": 3}), ("two", "2", {"binaries": 1, "forms": forms})])
    recorded.write([("one", "4", {"instructions": 5})])
    again = recorded.read()
    assert again["results"]["one"] == {"mark": "4", "told": {"instructions": 5}}
    assert again["results"]["two"] == {"mark": "2", "told": {"binaries": 1, "forms": forms}}
    assert Record().current
    assert json.loads(recorded.RECORD.read_text())["results"]["two"]["told"]["forms"] == [0, 1]
    monkeypatch.setattr(recorded, "common", lambda: "another")
    recorded.write([("three", "1", {"instructions": 3})])
    assert list(recorded.read()["results"]) == ["three"]
