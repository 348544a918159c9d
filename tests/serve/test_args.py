"""Flags and the errors they can make: one line, naming flag, expected and got."""

import dataclasses
from pathlib import Path

import flags_table
import pytest

from wave64.serve.args import ONLY, REFUSED, WITHOUT_EFFECT, ArgsError, ServerArgs, flag_of, without_effect


def test_defaults_are_the_same_in_python_and_on_the_command_line():
    assert ServerArgs.from_cli([]) == ServerArgs()
    assert ServerArgs().model_path == "demo-llama"


def test_every_flag_sets_its_field():
    values = {"choices": lambda item: item.metadata["choices"][-1], str: "text", int: 1, float: 0.5}
    for item in dataclasses.fields(ServerArgs):
        kind, choices = item.metadata["kind"], item.metadata["choices"]
        value = True if kind is bool else choices[-1] if choices else values[kind]
        value = "host:7" if item.name == "dist_init_addr" else value
        others = ["--tp=2", "--nnodes=2", "--dist-init-addr=a:1"] if item.name == "node_rank" else []
        others += ["--ssl-certfile=c"] if item.name == "ssl_keyfile" else []
        for flag in (flag_of(item.name), *item.metadata["aliases"]):
            args = ServerArgs.from_cli(others + ([flag] if kind is bool else [flag, str(value)]))
            assert getattr(args, item.name) == ((value,) if item.default == () else value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--tp", "0"], "--tp-size: expected at least 1, got 0"),
        (["--tp", "4", "--ep", "3"], "--ep-size: expected a divisor of --tp-size, 4, got 3"),
        (["--dp-size", "2", "--tp", "2", "--nnodes", "2", "--dist-init-addr", "a:1"],
         "--dp-size: expected 1 or --enable-dp-attention where hosts are several, or torchrun's, got 2; a router"),
        (["--tp", "2", "--dp-size", "4", "--enable-dp-attention"],
         "--dp-size: expected a divisor of --tp-size, 2, got 4"),
        (["--watchdog-timeout", "0"], "--watchdog-timeout: expected more than 0, got 0.0"),
        (["--hicache-ratio", "0"], "--hicache-ratio: expected more than 0, got 0"),
        (["--enable-hierarchical-cache", "--disable-radix-cache"], "--enable-hierarchical-cache: expected the prefix"),
        (["--enable-deterministic-inference", "--enable-dp-attention", "--dp-size=2", "--tp=2"],
         "--enable-deterministic-inference: expected no --enable-dp-attention: a group's tokens"),
        (["--cuda-graph-bs", "4", "0"], "--cuda-graph-bs: expected sizes of at least 1, got 0"),
        (["--cuda-graph-max-bs", "0"], "--cuda-graph-max-bs: expected at least 1, got 0"),
        (["--max-prefill-ms", "-1"], "--max-prefill-ms: expected at least 0, got -1.0"),
        (["--rank-timeout", "nan"], "--rank-timeout: expected more than 0, got nan"),
        (["--attention-backend", "fa3"], "--attention-backend: invalid choice: 'fa3' (choose from "),
        (["--request-timeout", "0"], "--request-timeout: expected more than 0, got 0.0"),
        (["--port", "70000"], "--port: expected 1 to 65535, got 70000"),
        (["--port", "http"], "--port: invalid int value: 'http'"),
        (["--page-size=0"], "--page-size: expected at least 1, got 0"),
        (["--mem-fraction-static", "1.5"], "--mem-fraction-static: expected more than 0 and less than 1, got 1.5"),
        (["--chunked-prefill-size", "-2"], "--chunked-prefill-size: expected at least 1, got -2"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--with-lorax"], "--with-lorax: wave64 has no such flag; see --help"),
        (["--enable-lora"], "--enable-lora: adapters are not applied; merge them"),
        (["--quantization", "awq"], "--quantization: invalid choice: 'awq' (choose from "),
        (["--lora-paths", "a", "--tp=1", "--quantizaton=fp8"],
         "merge them into the checkpoint; --quantizaton: wave64 has no such flag"),
        (["--grammar-backend", "outlines"], "--grammar-backend: expected llguidance, got outlines: it says"),
        (["--pp-size", "2"], "--pp-size: expected 1, got 2: every rank has all layers"),
        (["--nnodes", "2"], "--nnodes: expected a divisor of --tp-size, 1, got 2"),
        (["--nnodes", "2", "--tp", "2"], "--dist-init-addr: expected host:port of host 0, where the ranks meet, got"),
        (["--nnodes", "2", "--tp", "2", "--dist-init-addr", "a"], "--dist-init-addr: expected host:port, got 'a'"),
        (["--node-rank", "1"], "--node-rank: expected 0 to 0, as --nnodes says, got 1"),
        (["--base-gpu-id", "-1"], "--base-gpu-id: expected at least 0, got -1"),
        (["--schedule-conservativeness", "much"], "--schedule-conservativeness: invalid float value: 'much'"),
        (["--context-len", "5"], "--context-len: wave64 has no such flag; did you mean --context-length?"),
        (["--tp", "1", "demo-llama"], "expected a flag, got 'demo-llama'"),
    ],
)
def test_a_bad_flag_is_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as ended:
        ServerArgs.from_cli(argv)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


RECIPE = ["--trust-remote-code", "--enable-torch-compile", "--torch-compile-max-bs", "8", "--enable-mixed-chunk",
          "--nnodes", "1", "--node-rank", "0", "--sampling-backend=pytorch", "--page-size", "32",
          "--schedule-conservativeness", "0.3"]  # fmt: skip


def test_flags_of_recipes_that_change_nothing_are_taken_and_named():
    assert ServerArgs.from_cli(RECIPE) == ServerArgs(page_size=32)
    said = without_effect(RECIPE)
    assert "--trust-remote-code: changes nothing here, the code of a checkpoint is never run" in said
    assert {line.split(":")[0] for line in said} == {
        "--trust-remote-code", "--enable-torch-compile", "--torch-compile-max-bs", "--enable-mixed-chunk",
        "--sampling-backend", "--schedule-conservativeness"}  # fmt: skip
    assert without_effect(["--page-size", "32"]) == []


@pytest.mark.parametrize("flag", [*WITHOUT_EFFECT, *ONLY])
def test_each_of_them_is_taken(flag):
    kind = WITHOUT_EFFECT[flag][0] if flag in WITHOUT_EFFECT else ONLY[flag][0]
    value = [] if kind is None else [str(ONLY[flag][1] if flag in ONLY else 3)]
    assert ServerArgs.from_cli([flag, *value]) == ServerArgs()


def test_no_flag_is_both_ours_and_without_effect():
    ours = {flag for item in dataclasses.fields(ServerArgs) for flag in (flag_of(item.name), *item.metadata["aliases"])}
    assert not ours & {*WITHOUT_EFFECT, *ONLY, *REFUSED}
    assert len({*WITHOUT_EFFECT, *ONLY, *REFUSED}) == len(WITHOUT_EFFECT) + len(ONLY) + len(REFUSED)


def test_a_model_path_may_come_first():
    assert ServerArgs.from_cli(["demo-deepseek", "--port", "7"]) == ServerArgs(model_path="demo-deepseek", port=7)


def test_the_table_of_flags_is_that_of_the_code():
    """Renew it by `python tests/serve/flags_table.py`."""
    assert flags_table.FILE.read_text() == flags_table.text()


def test_a_repeatable_flag_keeps_all_its_values():
    args = ServerArgs.from_cli(["--ignore-config-key", "a", "--ignore-config-key", "b.c"])
    assert args.ignore_config_key == ("a", "b.c")
    assert ServerArgs.from_cli([]).ignore_config_key == (), "nothing is left over from the call before"
    assert ServerArgs.from_cli(["--cuda-graph-bs", "1", "8", "--tp", "1"]).cuda_graph_bs == (1, 8)


def test_python_gets_the_same_checks():
    with pytest.raises(ArgsError, match="--dtype: expected one of"):
        ServerArgs(dtype="int8")
    with pytest.raises(ArgsError, match="--schedule-policy: expected one of fcfs, lpm, got 'dfs'"):
        ServerArgs(schedule_policy="dfs")
    assert ServerArgs(chunked_prefill_size=-1).chunked_prefill_size == -1, "whole prompts"


def test_names_in_python_are_taken_as_flags_are():
    assert ServerArgs.from_names({"model_path": "x", "tp": 2}).tp_size == 2
    assert ServerArgs.from_names(dict(model_path="x", trust_remote_code=True, pp_size=1)) == ServerArgs(model_path="x")
    for name, words in {"tensor_paralel_size": "did you mean --tensor-parallel-size", "xyz": "see --help",
                        "lora_paths": "adapters are not applied"}.items():
        with pytest.raises(ArgsError, match=f"^{flag_of(name)}: .*{words}"):
            ServerArgs.from_names({"model_path": "x", name: "y"})
    with pytest.raises(ArgsError, match="--tp-size: expected int, got '2'"):
        ServerArgs.from_names({"model_path": Path("x"), "tp_size": "2"})
    with pytest.raises(ArgsError, match="--pp-size: expected 1, got 2"):
        ServerArgs.from_names({"model_path": "x", "pp_size": 2})
