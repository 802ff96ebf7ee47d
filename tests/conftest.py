"""Options of the test-suite."""


def pytest_addoption(parser):
    parser.addoption(
        "--all-families",
        action="store_true",
        help="check every feature on every family that transformers knows, for docs/make_support_matrix.py",
    )
