"""The option that renews golden.json; known to pytest where this folder is named on its command line."""


def pytest_addoption(parser):
    parser.addoption("--renew-golden", action="store_true", help="write the measured figures to golden.json")
