"""Options of the test-suite."""

from hypothesis import settings

# Property tests draw the same examples in every run, so that a failure can be had again.
settings.register_profile("seeded", derandomize=True)
settings.load_profile("seeded")


def pytest_addoption(parser):
    parser.addoption(
        "--all-families",
        action="store_true",
        help="check every feature on every family that transformers knows, for docs/make_support_matrix.py",
    )
