"""Rows of aiter_targets.py: how a launch's few executed workgroups stand for all, and what verdicts mean."""

import dataclasses
import json
import re
from pathlib import Path

import aiter_targets
import pytest
import torch
from aiter_targets import Row, floor_us, rows_stored, table
from aiter_work import with_table

from wave64 import OPS
from wave64.testing import predict, sampled
from wave64.testing.cost import usages, waves_per_simd
from wave64.testing.sparse import empty

ROW = Row("gfx942", "gemm", "a product", theirs=10.0, ours=9.0, floor=5.0, by="memory", backend="hip")


@pytest.mark.parametrize(("ours", "allowed", "verdict"), [
    (10.0, 1.0, "reached"), (10.4, 1.05, "reached"), (10.4, 1.0, "tie: memory"), (12.1, 1.0, "missed: memory")])
def test_a_verdict_is_by_the_target_and_the_models_error(ours, allowed, verdict):
    assert dataclasses.replace(ROW, ours=ours, allowed=allowed).verdict == verdict


def test_a_floor_is_memory_at_its_peak_or_the_fewest_matrix_cycles():
    busy = predict.Work("gfx942", 304, 304, 4, 1, {"matrix": 4 * 2100.0}, 0, 0, 0)
    assert floor_us("gfx942", [[busy], [busy, busy]], 0) == pytest.approx(1.0)
    assert floor_us("gfx942", [[busy], [busy]], 5300e3 * 2) == pytest.approx(2.0)


def test_a_few_workgroups_stand_for_all():
    """Norms of rows that are alike: what 4 of 64 say is what all say."""
    args = dict(x=torch.zeros(64, 768, dtype=torch.bfloat16), weight=torch.ones(768, dtype=torch.bfloat16), eps=1e-6)
    (few,), (all_,) = (sampled.works(OPS["rms_norm"], "hip", args, "gfx942", blocks) for blocks in (4, 64))
    assert (few.executed, all_.executed, few.blocks) == (4, 64, all_.blocks)
    assert few.work.cycles == all_.work.cycles
    assert (few.work.blocks, few.work.chain) == (all_.work.blocks, all_.work.chain)
    assert few.work.lines == pytest.approx(all_.work.lines, rel=0.1)  # where allocations begin in a line differs
    assert few.work.once == pytest.approx(all_.work.once, rel=0.05)


def test_workgroups_are_as_many_as_touch_what_is_known_to_be_touched():
    work = predict.Work("gfx942", 304, 90, 4, 1, {"matrix": 7.0}, 1e6, 3e6, 2)
    known = sampled.Sample("one", 4, 100, work, 0, 1e4).of_bytes(1.8e6)
    assert (known.work.blocks, known.work.once, known.work.lines) == (180, 1.8e6, 6e6)
    assert (known.work.cycles, known.work.chain) == (work.cycles, 2)


def test_workgroups_that_search_long_for_work_and_find_none_do_not_count():
    """Of 320 each of 40 sequences has as many; the rest have to add up the splits of all to know."""
    seqs, keys, page = 40, 512, 64
    args = dict(q=torch.zeros(seqs, 128, 576, dtype=torch.bfloat16), scale=0.1, kv_lora_rank=512,
                kv_cache=empty((seqs * keys // page, page, 576), torch.bfloat16, torch.device("cpu")),
                page_table=torch.arange(seqs * keys // page, dtype=torch.int32).view(seqs, -1),
                seq_lens=torch.full((seqs,), keys, dtype=torch.int32))
    decode, = sampled.works(OPS["mla_decode"], "hip", args, "gfx942", 1, parts=("rows",), probes=320)
    assert decode.blocks == 320
    assert decode.work.blocks in range(seqs, 320, seqs)


def test_all_workgroups_are_what_the_whole_call_counts():
    whole, = usages("rms_norm", "hip", "7x768-torch.bfloat16", "gfx942").values()
    case = next(case for case in OPS["rms_norm"].cases() if case.id == "7x768-torch.bfloat16")
    each, = sampled.works(OPS["rms_norm"], "hip", case.make(), "gfx942", 64)
    known = predict.work_of(whole, waves_per_simd(whole))
    assert each.work.cycles == known.cycles
    assert (each.work.blocks, each.work.chain) == (known.blocks, known.chain)
    assert each.work.lines == pytest.approx(known.lines, rel=0.1)


def test_workgroups_without_work_do_not_count():
    """Experts that no token chose leave blocks of a grid empty."""
    case = dict(dtype=torch.float8_e4m3fnuz)
    ids = torch.zeros(40, 1, dtype=torch.int32)  # one of 8 experts has all pairs
    args = dict(x=torch.zeros(40, 2048, dtype=torch.bfloat16), w13=torch.zeros(8, 256, 2048).to(case["dtype"]),
                w2=torch.zeros(8, 2048, 128).to(case["dtype"]), topk_weights=torch.ones(40, 1), topk_ids=ids,
                w13_scale=torch.ones(8, 2, 16), w2_scale=torch.ones(8, 16, 1), block_shape=[128, 128])
    up, = (each for each in sampled.works(OPS["fused_moe"], "hip", args, "gfx942", 4) if "_up_" in each.kernel)
    assert 0 < up.work.blocks < up.blocks


def test_rows_that_are_kept_are_shown():
    """AITER.md has the table of targets.json."""
    rows = rows_stored()
    assert {(each.arch, each.family) for each in rows} == {
        (arch, family) for arch in ("gfx942", "gfx950") for family in aiter_targets.FAMILIES}
    shown = Path(aiter_targets.__file__).with_name("AITER.md").read_text()
    assert table(rows) in shown, "python tests/bench/aiter_targets.py --plot tests/bench/aiter.png prints it"


def test_the_table_of_a_document_is_replaced():
    lines = table([ROW]).splitlines()
    text = "\n".join(["a", "", *table([dataclasses.replace(ROW, what="before")] * 2).splitlines(), "", "b", ""])
    assert with_table(text, lines) == "\n".join(["a", "", *lines, "", "b", ""])


def test_kernels_that_are_not_wanted_are_not_counted():
    """Of experts the products; sorting, which they go by, is executed all the same."""
    args = dict(x=torch.zeros(40, 2048, dtype=torch.bfloat16), w13=torch.zeros(8, 256, 2048).to(torch.float8_e4m3fnuz),
                w2=torch.zeros(8, 2048, 128).to(torch.float8_e4m3fnuz), topk_weights=torch.ones(40, 1),
                topk_ids=torch.zeros(40, 1, dtype=torch.int32), w13_scale=torch.ones(8, 2, 16),
                w2_scale=torch.ones(8, 16, 1), block_shape=[128, 128])
    all_, few = (sampled.works(OPS["fused_moe"], "hip", args, "gfx942", 4, parts=parts) for parts in (("",), ("_up_",)))
    assert [(each.kernel, each.work.cycles) for each in few] == [
        (each.kernel, each.work.cycles) for each in all_ if "_up_" in each.kernel]
    assert len(few) < len(all_)


def test_pieces_of_work_have_names_of_their_own():
    """By which a process finds one, and `--only` some."""
    for arch in ("gfx942", "gfx950"):
        theirs = aiter_targets.Theirs(None, arch)
        names = [what for family in aiter_targets.FAMILIES.values() for what, _ in family(theirs)]
        assert len(names) == len(set(names)) == 4 + 5 + 6 + 5 + 2


def test_rows_of_a_family_replace_those_before(tmp_path, monkeypatch):
    monkeypatch.setattr(aiter_targets, "STORED", tmp_path / "targets.json")
    aiter_targets.write([ROW, dataclasses.replace(ROW, family="pa")])
    aiter_targets.write([dataclasses.replace(ROW, what="another", ours=8.12345)])
    kept = json.loads((tmp_path / "targets.json").read_text())["rows"]
    assert [(each["family"], each["what"], each["ours"]) for each in kept] == [
        ("gemm", "another", 8.12), ("pa", "a product", 9.0)]


def test_a_picture_has_a_panel_for_each_architecture(tmp_path):
    picture = pytest.importorskip("aiter_picture", reason="matplotlib, of the extra bench, is not installed")
    rows = [ROW, dataclasses.replace(ROW, arch="gfx950")]
    picture.draw(rows[:1], tmp_path / "one.png")
    picture.draw(rows, tmp_path / "two.png")
    one, two = ((tmp_path / name).read_bytes() for name in ("one.png", "two.png"))
    assert re.match(rb"\x89PNG", one)
    widths = [int.from_bytes(png[16:20], "big") for png in (one, two)]
    assert widths[1] == pytest.approx(2 * widths[0], abs=2)
