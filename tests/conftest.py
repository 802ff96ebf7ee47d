"""Options of the test-suite."""

from hypothesis import settings

# The same examples in every run, so that a failure is the change's.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption(
        "--all-families",
        action="store_true",
        help="check every feature on every family that transformers knows, for docs/make_support_matrix.py",
    )
