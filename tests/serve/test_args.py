"""Flags and the errors they can make: one line, naming flag, expected and got."""

import dataclasses

import pytest

from wave64.serve.args import ArgsError, ServerArgs, flag_of


def test_defaults_are_the_same_in_python_and_on_the_command_line():
    assert ServerArgs.from_cli([]) == ServerArgs()
    assert ServerArgs().model_path == "demo-llama"


def test_every_flag_sets_its_field():
    values = {"choices": lambda item: item.metadata["choices"][-1], str: "text", int: 1, float: 0.5}
    for item in dataclasses.fields(ServerArgs):
        kind, choices = item.metadata["kind"], item.metadata["choices"]
        value = True if kind is bool else choices[-1] if choices else values[kind]
        for flag in (flag_of(item.name), *item.metadata["aliases"]):
            args = ServerArgs.from_cli([flag] if kind is bool else [flag, str(value)])
            assert getattr(args, item.name) == value


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--tp", "2"], "--tp-size: tensor parallelism is not there yet, expected 1, got 2"),
        (["--port", "70000"], "--port: expected 1 to 65535, got 70000"),
        (["--port", "http"], "--port: invalid int value: 'http'"),
        (["--page-size=0"], "--page-size: expected at least 1, got 0"),
        (["--mem-fraction-static", "1.5"], "--mem-fraction-static: expected more than 0 and less than 1, got 1.5"),
        (["--chunked-prefill-size", "-2"], "--chunked-prefill-size: expected at least 1, got -2"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--enable-torch-compile"], "--enable-torch-compile: wave64 has no such flag; see --help"),
        (["--quantization", "fp8"], "--quantization: wave64 has no such flag"),
        (["--context-len", "5"], "--context-len: wave64 has no such flag; did you mean --context-length?"),
        (["demo-llama"], "expected a flag, got 'demo-llama'"),
    ],
)
def test_a_bad_flag_is_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as ended:
        ServerArgs.from_cli(argv)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_python_gets_the_same_checks():
    with pytest.raises(ArgsError, match="--dtype: expected one of"):
        ServerArgs(dtype="int8")
    with pytest.raises(ArgsError, match="--schedule-policy: expected one of fcfs, got 'lpm'"):
        ServerArgs(schedule_policy="lpm")
