"""Launch configurations: the tables that ship, how one is chosen from them, and the tuner that writes them."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import scikit_build_core.build

from wave64 import OPS, arch, platform, tuning
from wave64.backends import import_hopper_kernels
from wave64.testing import compile as compiling  # noqa: F401 - imports every launcher
from wave64.testing import predict, problems, sampled, tune

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(tuning.FOLDER.glob("*/**/*.json"))
IDS = ["-".join(f.relative_to(tuning.FOLDER).with_suffix("").parts) for f in FILES]
#: What every operator that chooses has a table of its own for; gfx90a and the rest may use their fallback arch's.
OWN = ("gfx942", "gfx950", "gfx1100", "sm_90", "sm_80", tuning.INTERPRETER)


@dataclasses.dataclass(frozen=True)
class Config:
    block: int
    waves: int = 4
    options: dict = dataclasses.field(default_factory=dict)


TUNING = tuning.Tuning("op", config=Config, key=dict, buckets={}, candidates=lambda arch, **key: [Config(1)],
                       work=lambda config, **key: 1)


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Writes tables of an operator `op` into a folder of the test's own, which launches then read."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tuning, "_chosen", {})

    def put(*rows, arch="gfx942", op="op", **more):
        file = tmp_path / arch / f"{op}.json"
        file.parent.mkdir(exist_ok=True)
        content = {"op": op, "arch": arch, "sources": [{"from": "here", "chosen_by": "person"}],
                   "rows": [{"when": when, "config": config, "source": 0} for when, config in rows], **more}
        file.write_text(json.dumps(content))
        tuning.read.cache_clear()
        return file

    yield put
    tuning.read.cache_clear()


def choose(name="gfx942", **key):
    with platform.target(name):
        return TUNING.choose(**key)


def tuning_for(table):
    """What reads the table. Hopper's kernels are registered here only so far as this Triton has what they are written
    in; the tables are read all the same."""
    if table.backend == "hopper" and (why := import_hopper_kernels()):
        pytest.skip(why)
    return tune.tuning_of(OPS[table.op], table.backend)


# ---- the tables that ship

@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_a_table_means_something(file):
    table = tuning.read(file)
    assert tuning.table_file(table.op, table.backend, table.arch) == file
    assert table.arch in {*arch.ARCHS, *OWN}
    made = tuning_for(table)
    assert (made.op, made.backend) == (table.op, table.backend)
    key = made.key(**next(case for case in OPS[table.op].cases() if not case.large).make())
    for row in table.rows:
        tuning.build(made.config, row, file)
        assert set(row.when) <= set(key), row
        for name, wanted in row.when.items():
            low = wanted[0] if isinstance(wanted, list) and wanted[0] is not None else wanted
            assert isinstance(wanted, list) or type(low) is type(key[name]), row
    assert file.read_text() == tune.dump(table), "written by another than the tuner"


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_a_row_says_who_chose_it(file):
    """Figures are the tuner's, and so is the command of their source; a person chose the rows without them."""
    table = tuning.read(file)
    for row in table.rows:
        made = table.sources[row.source]
        assert bool(row.measured) == (made["from"] in ("timings", "predicted times", "static figures")), row
        assert bool(row.measured) == ("python -m wave64.testing.tune " in made.get("command", "")), row
        assert bool(row.measured) != (made.get("chosen_by") == "person"), row
        assert len(row.why) <= 160, "an essay belongs in the header of the kernel's file"


@pytest.mark.parametrize("op", tune.tunable())
def test_operators_have_tables_and_candidates(op):
    made = tune.tuning_of(OPS[op])
    for name in OWN:
        assert tuning.table_file(made.op, "triton", name).exists()
    for b in tune.buckets(OPS[op], arch.lookup("gfx942"), [""]):
        assert isinstance(b.candidates[0].config, made.config)
        for name in ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201", "gfx908", "sm_90", "sm_80", "sm_120"):
            configs = list(made.candidates(arch.lookup(name), **b.key))
            assert 4 <= len(configs) <= 25, (name, str(b))
            assert all(one != other for i, one in enumerate(configs) for other in configs[:i])
            assert all(made.work(config, **b.key) > 0 for config in configs)


@pytest.mark.parametrize("op", ["fp8_block_scaled_mm", "fp8_scaled_mm", "fused_moe"])
def test_fp8_products_on_gfx950_have_instructions_of_16_rows(op):
    """Reading the sum of one of 32 rows takes 20 wait states, of which LLVM may leave one out."""
    made, table = OPS[op], tuning.table(op, arch.lookup("gfx950"))
    configs = [tuning.build(tune.tuning_of(made).config, row, table.file) for row in table.rows]
    configs += [c.config for b in tune.buckets(made, arch.lookup("gfx950"), [""]) for c in b.candidates[1:]]
    assert {config.options["matrix_instr_nonkdim"] for config in configs} == {16}


def test_launchers_that_choose_are_known():
    assert {"prefill_attention", "varlen_attention", "paged_attention", "mla_decode", "mla_decode_rope"} <= set(
        tune.tunable())


def test_a_wheel_holds_every_table(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = {"wheel.cmake": "false", "build-dir": str(tmp_path / "build")}
    name = scikit_build_core.build.build_wheel(str(tmp_path), settings)
    with zipfile.ZipFile(tmp_path / name) as wheel:
        held = set(wheel.namelist())
    assert {f"wave64/tuned/{f.relative_to(tuning.FOLDER).as_posix()}" for f in FILES} <= held


# ---- choosing

def test_the_first_row_that_fits_is_chosen(tables):
    tables(({"n": [None, 16], "wide": True}, {"block": 1}), ({"n": [17, 64]}, {"block": 2}), ({"n": 100}, {"block": 3}),
           ({"n": [65, None], "kind": "fp8"}, {"block": 4}), ({}, {"block": 5, "waves": 8}))

    def block(n, wide=False, kind=""):
        return choose(n=n, wide=wide, kind=kind).block

    assert [block(n, wide=True) for n in (0, 16, 17, 64, 65, 100)] == [1, 1, 2, 2, 5, 3]
    assert [block(n, kind="fp8") for n in (16, 17, 100, 101)] == [5, 2, 3, 4]
    assert choose(n=70, wide=False, kind="") == Config(5, 8)


def test_an_architecture_without_a_table_uses_its_fallbacks(tables):
    for i, name in enumerate(OWN):
        tables(({}, {"block": i}), arch=name)
    chosen = {name: OWN[choose(name).block] for name in (
        "gfx90a", "gfx942:sramecc+", "gfx950", "gfx908", "gfx1030", "gfx1201", "sm_90", "sm_80", "sm_89", "sm_120")}
    assert chosen == {
        "gfx90a": "gfx942", "gfx942:sramecc+": "gfx942", "gfx950": "gfx950", "gfx908": "gfx1100", "gfx1030": "gfx1100",
        "gfx1201": "gfx1100", "sm_90": "sm_90", "sm_80": "sm_80", "sm_89": "sm_80", "sm_120": "sm_80"}
    tables(({}, {"block": -1}), arch="gfx90a")
    tuning._chosen.clear()
    assert choose("gfx90a").block == -1


@pytest.mark.skipif(platform.arch() is not None, reason="there is a GPU here")
def test_without_a_gpu_the_interpreters_table_serves(tables):
    tables(({}, {"block": 7}), arch=tuning.INTERPRETER)
    assert TUNING.choose().block == 7


def test_what_is_chosen_cannot_be_changed(tables):
    tables(({}, {"block": 1, "options": {"size": 16}}), ({}, {"block": 2}))
    first = choose(n=1)
    with pytest.raises(TypeError):
        first.options["size"] = 32
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.block = 2  # pyright: ignore[reportAttributeAccessIssue]  # what is tested
    assert dict(**choose(n=1).options) == {"size": 16}
    assert dataclasses.replace(first, block=3) == Config(3, options={"size": 16})
    tables(({}, {"block": 1}))
    tuning._chosen.clear()
    with pytest.raises(TypeError):  # nor what is empty by default
        choose(n=1).options["size"] = 32


def test_a_choice_can_be_forced(tables):
    tables(({}, {"block": 1}))
    with TUNING.forced(Config(9)):
        assert choose().block == 9
        with TUNING.forced(Config(8)):
            assert choose().block == 8
        assert choose().block == 9
        with platform.target("gfx942"), pytest.raises(tuning.TunedTableError):
            dataclasses.replace(TUNING, backend="hopper").choose()  # another backend's choice is not forced
    assert choose().block == 1


@pytest.mark.parametrize(("rows", "more", "words"), [
    ([({}, {"blocks": 1})], {}, "config: blocks: expected fields among block, waves, options"),
    ([({}, {"waves": 1})], {}, "block"),
    ([({"m": 1}, {"block": 1}), ({}, {"block": 1})], {}, "m: expected a name in the tuning key: n"),
    ([({"n": 2}, {"block": 1})], {}, "expected a last row that fits every call"),
    ([], {}, "expected a last row that fits every call"),
    ([({"n": [1]}, {"block": 1}), ({}, {"block": 1})], {}, "row 1: n: expected [low, high], got [1]"),
    ([({}, {"block": 1})], {"sources": [{"from": "here"}]}, "row 1: expected either `measured` or a source with"),
    ([({}, {"block": 1})], {"rows": [{"when": {}, "config": {}, "source": 0, "measured": {"us": {}}}]}, "got both"),
    ([({}, {"block": 1})], {"sources": []}, "row 1: source: expected an index into 0 sources, got 0"),
    ([({}, {"block": 1})], {"extra": 1}, "expected a table of launch configurations"),
    ([({}, {"block": 1})], {"rows": [{"whenever": {}}]}, "expected a table of launch configurations"),
])
def test_what_a_table_cannot_mean_is_told(tables, rows, more, words):
    file = tables(*rows, **more)
    with pytest.raises(tuning.TunedTableError, match=re.escape(words)) as told:
        choose(n=1)
    assert str(file) in str(told.value)


def test_a_missing_table_is_told(tables):
    with pytest.raises(tuning.TunedTableError, match=r"op: no launch configuration: .*gfx90a/op.*, .*gfx942/op.json"):
        choose("gfx90a")


# ---- the tuner

def test_buckets_are_ranges_of_the_key():
    made = tune.tuning_of(OPS["prefill_attention"])
    assert tune.ranges((16, 64)) == [[None, 16], [17, 64], [65, None]]
    key = {"head_dim": 128, "fp32": False, "capped": True, "max_seqlen_q": 17}
    assert tune.bucket(made, key) == {**key, "head_dim": [65, 128], "max_seqlen_q": [17, 64]}


def figures(**changes):
    return {"spills": 0, "scratch_bytes": 0, "lds_bytes": 0, "waves_per_simd": 2.0, "block_waves": 4, "vgpr": 100,
            "loop": {"valu": 100}, "matrix": {}, **changes}


def judged(*changes):
    config = tune.tuning_of(OPS["prefill_attention"]).config
    made = [tune.Candidate(config(16 * (i + 1), 32, 4, 1), figures=figures(**c)) for i, c in enumerate(changes)]
    b = tune.Bucket(OPS["prefill_attention"], "triton", {}, {"max_seqlen_q": 4096}, [], made)
    tune.judge_figures(b, arch.lookup("gfx942"))
    return b


def test_machine_code_that_spills_or_does_not_fit_is_refused():
    b = judged({}, {"spills": 1}, {"scratch_bytes": 8}, {"lds_bytes": 2**17}, {"waves_per_simd": 1.0})
    words = ("spills 1 registers", "8 bytes of scratch", "LDS 131072 bytes, gfx942 has 65536", "1 waves per SIMD")
    assert all(word in c.reason for word, c in zip(words, b.candidates[1:], strict=True))
    assert tune.chosen(b) is b.candidates[0]
    assert "refused: block_m=32: spills 1 registers" in tune.report(b)


def test_of_nearly_as_few_instructions_most_waves_decide():
    b = judged({"loop": {"valu": 50}}, {"loop": {"valu": 102}, "waves_per_simd": 4.0},
               {"loop": {"valu": 200}, "waves_per_simd": 8.0})
    assert [round(c.score, 4) for c in b.candidates] == [0.3906, 0.3984, 0.5208]
    assert tune.chosen(b) is b.candidates[1]


def launch(us, conflicts=1.0):
    """One whose vector instructions take about so many microseconds longer than starting it."""
    vector = us * 4 * 2100 / predict.CONSTANTS.vector
    cycles = {"matrix": 0, "vector": vector, "transcendental": 0, "lds": 100 * conflicts}
    work = predict.Work("gfx942", 304, 304, 4, 1, cycles, 0, 0, 0)
    return sampled.Sample("one", 2, 304, work, 100, 0)


def test_launches_rank_by_their_predicted_times_one_after_another():
    alone, both = tune.ranking([launch(50)]), tune.ranking([launch(50, 2.0), launch(20)])
    assert alone["predicted_us"] == pytest.approx(50 + predict.CONSTANTS.start, rel=1e-3)
    assert both["predicted_us"] == pytest.approx(70 + 2 * predict.CONSTANTS.start, rel=1e-3)
    assert (alone["by"], alone["conflicts"], both["conflicts"]) == ("matrix and vector", 1.0, 1.5)


def test_what_was_executed_ranks_by_predicted_time_and_the_present_one_stays_where_it_is_near():
    slow, fast = tune.ranking([launch(80)]), tune.ranking([launch(10)])
    b = judged({"loop": {"valu": 50}, **slow}, {"loop": {"valu": 100}, **fast})
    assert tune.chosen(b) is b.candidates[1]
    row = tune.row_of(b, b.candidates[1])
    assert row.measured == {"predicted_us": round(fast["predicted_us"], 4), "by": "matrix and vector",
                            "conflicts": 1.0, "vgpr": 100, "lds_bytes": 0, "waves_per_simd": 2.0}
    assert "predicted us, by, LDS conflicts" in tune.report(b)
    b = judged(slow, {**fast, "waves_per_simd": 0.5})  # what few waves cost is in the time
    assert tune.chosen(b) is b.candidates[1]
    near = tune.ranking([launch(10.3)])
    b = judged({**near}, {**fast, "waves_per_simd": 8.0})
    assert tune.chosen(b) is b.candidates[0]


def test_predicted_choices_keep_the_models_hash():
    assert tune.source("a command", timed=False, executed=True)["model"] == predict.fingerprint()
    assert "model" not in tune.source("a command", timed=False)


@pytest.mark.parametrize("name", ["gfx942", "gfx950"])
def test_every_row_has_a_small_problem_whose_key_it_fits(name):
    for op in tune.tunable():
        made = tune.tuning_of(OPS[op])
        table = made.table(arch.lookup(name))
        for row in table.rows:
            key = problems.typical(table, row)
            with platform.target(name):
                drawn = made.key(**problems.problem(op, key, rows=32).make())
            alike = key.keys() - {"m", "pairs", "per_expert", "max_seqlen_q", "num_seqs", "rows"}
            assert {part: drawn[part] for part in alike} == {part: key[part] for part in alike}


def test_where_none_leaves_two_waves_the_best_of_them_is_chosen():
    assert tune.chosen(judged({"waves_per_simd": 1.0}, {"waves_per_simd": 1.0})).config.block_m == 32


def test_times_decide_and_a_wrong_result_is_never_chosen(monkeypatch):
    op = OPS["prefill_attention"]
    config, cases = tune.tuning_of(op).config, [case for case in op.cases() if case.id in ("whole", "chunk")]
    made = [tune.Candidate(config(*shape)) for shape in ((16, 16, 1, 1), (32, 32, 1, 1), (48, 16, 1, 1))]
    b = tune.Bucket(op, "triton", {}, {"max_seqlen_q": 64}, cases, made)
    ms = iter([1.0, 1.5, 2.0, 1.0])  # of the first two on one case, then on the other: in all the second is faster
    monkeypatch.setattr(tune.timing, "median_ms", lambda *args: next(ms))
    tune.time_bucket(b, 0.0)
    assert [c.us for c in made] == [{"whole": 1000, "chunk": 2000}, {"whole": 1500, "chunk": 1000}, {}]
    assert tune.chosen(b) is made[1]
    assert made[1].score == pytest.approx(1.5**0.5)
    assert made[2].reason.startswith("whole: ")  # 48 rows are no power of two
    monkeypatch.setattr(tune, "SLACK", 0)
    wrong = tune.Bucket(op, "triton", {}, {"max_seqlen_q": 64}, cases, [tune.Candidate(made[0].config)])
    tune.time_bucket(wrong, 0.0)
    assert "wrong: result 0 is" in wrong.candidates[0].reason
    assert tune.chosen(wrong) is None


def test_new_measurements_replace_those_of_the_same_bucket_only():
    made = tune.tuning_of(OPS["prefill_attention"])
    old, new = {"from": "old"}, {"from": "new"}
    ours, other, gone = ({"max_seqlen_q": r} for r in ([None, 16], [65, None], [None, 20]))
    rows = [tuning.Row(when, {"block_m": 1}, 0, {"us": {}}) for when in (ours, other, gone)]
    by_hand = [tuning.Row(when, {"block_m": 9}, 0) for when in (ours, {})]  # the first would never be reached
    before = tuning.Table(Path("x"), "prefill_attention", "gfx942", (old,), (*rows, *by_hand))
    after = tune.merged(before, "gfx90a", [tuning.Row(ours, {"block_m": 2}, 0, {"us": {}})], new, made)
    assert [(r.when, r.config["block_m"], after.sources[r.source]) for r in after.rows] == [
        (other, 1, old), (ours, 2, new), ({}, 9, old)]
    assert after.arch == "gfx90a"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A run of the tuner for gfx942, of two small candidates; without the interpreter, hence in another process."""
    folder = tmp_path_factory.mktemp("tuned")
    code = """if True:
        import sys
        from dataclasses import replace
        from wave64 import OPS
        from wave64.testing import tune
        from wave64.triton_ops import prefill_attention as kernels
        some = [kernels.Config(16, 16, waves, 1) for waves in (1, 2)]
        backends = OPS["prefill_attention"].backends
        fewer = replace(kernels.TUNING, candidates=lambda arch, **key: iter(some))
        backends["triton"] = replace(backends["triton"], tuning=fewer)
        sys.exit(tune.main(sys.argv[1:]))"""
    done = subprocess.run(
        [sys.executable, "-c", code, "prefill_attention", "--arch", "gfx942", "--case", "32x4", "--jobs", "0",
         "--write", str(folder)], capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"})
    assert done.returncode == 0, done.stderr
    return folder / "gfx942" / "prefill_attention.json", done.stdout


def test_the_tuner_writes_a_table_that_loads(tuned):
    file, out = tuned
    table = tuning.read(file)
    shipped = tuning.read(tuning.FOLDER / "gfx942" / "prefill_attention.json")
    row, = (row for row in table.rows if row.when.get("max_seqlen_q") == [None, 16])  # the shipped one is replaced
    assert row.measured["waves_per_simd"] >= 2
    assert tuning.build(tune.tuning_of(OPS["prefill_attention"]).config, row, file).block_m == 16
    assert [r.config for r in table.rows if not r.measured] == [
        r.config for r in shipped.rows if not r.measured and r.when != row.when]
    made = table.sources[row.source]
    assert (made["from"], made["model"]) == ("predicted times", predict.fingerprint())
    assert row.measured["predicted_us"] > predict.CONSTANTS.start
    assert made["command"] == "python -m wave64.testing.tune prefill_attention --arch gfx942 --case 32x4 --write"
    assert file.read_text() == tune.dump(table)
    assert "waves per SIMD" in out


@pytest.mark.parametrize(("arguments", "words"), [
    (["rms_norm"], "rms_norm: expected some of"),
    (["prefill_attention", "--arch", "sm_75"], "--arch sm_75: timings need that GPU"),
    (["prefill_attention", "--arch", "gfx942", "--case", "none"], "no large case of prefill_attention named none"),
])
def test_the_tuner_refuses_in_words(arguments, words, capsys):
    with pytest.raises(SystemExit):
        tune.main(arguments)
    assert words in capsys.readouterr().err
