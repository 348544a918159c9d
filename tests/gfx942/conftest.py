"""The option that renews golden.json, known to pytest where this folder is named on its command line; and what the
tests here executed on the emulator, told at the end."""


def pytest_addoption(parser):
    parser.addoption("--renew-golden", action="store_true", help="write the measured figures to golden.json")


def pytest_terminal_summary(terminalreporter):
    ran = [value for report in terminalreporter.stats.get("passed", ()) if report.when == "call"
           for name, value in report.user_properties if name == "emulated"]
    kernels = {tuple(kernel) for value in ran for kernel in value["kernels"]}
    if kernels:
        instructions = sum(value["instructions"] for value in ran)
        objects = len({code for code, _ in kernels})
        terminalreporter.write_line(f"emulated: {objects} code objects, {len(kernels)} kernels, {instructions:,} wave "
                                    "instructions")
