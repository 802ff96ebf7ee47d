"""Runs tests and writes what they show: docs/support.md, families by features, and docs/features.md.

    python .ci/make_support_matrix.py

The first holds `tests/test_families.py --all-families`, on tiny random models of every decoder family that the
installed transformers knows; the second the tests that .ci/features.toml names. No network is needed. It takes about
20 minutes on one core; `--families` and `--features` take results (JUnit XML, xunit1) of runs already made.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from family_checks import FEATURES, THETA_FACTOR  # noqa: E402

PACKAGES = ("transformers", "torch", "peft", "torchao", "bitsandbytes", "gguf", "liger_kernel", "accelerate", "trl")
CELLS = {"exact": "✓", "base cannot": "base", "refused": "refused", "not equal": "**not equal**"}


def run_tests(*arguments: str) -> ElementTree.Element:
    """The results of a run of pytest. Tests may fail: that is a result, too."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", *arguments, f"--junitxml={file}", "-o", "junit_family=xunit1"]
        subprocess.run(command, cwd=ROOT, check=False)
        return ElementTree.parse(file).getroot()


def versions() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package).split('+')[0]}")
        except metadata.PackageNotFoundError:
            continue
    return f"Python {platform.python_version()}, {', '.join(found)}, on a CPU."


def family_results(results: list[ElementTree.Element]) -> dict[str, dict[str, dict[str, str]]]:
    """What each test recorded, by family and feature."""
    families: dict[str, dict[str, dict[str, str]]] = {}
    for case in (case for result in results for case in result.iter("testcase")):
        family, _, feature = case.get("name").removeprefix("test_feature[").removesuffix("]").rpartition("-")
        recorded = {item.get("name"): item.get("value") for item in case.iter("property")}
        if "status" not in recorded:
            recorded = {"status": "not equal", "detail": f"the test itself failed: {case.find('*').get('message')}"}
        families.setdefault(family, {})[feature] = recorded
    return dict(sorted(families.items()))


def support_page(families: dict[str, dict[str, dict[str, str]]]) -> str:
    by_status: dict[str, list[str]] = {"refused": [], "not tried": []}
    adapted = []
    for family, features in families.items():
        by_status.get(features["one angle"]["status"], adapted).append(family)
    lines = [
        "# Families of models",
        "",
        f"{versions()} Written by `python .ci/make_support_matrix.py` from the results of",
        "`pytest tests/test_families.py --all-families`; do not edit.",
        "",
        f"Of {len(families)} model types, {len(adapted)} are adapted, {len(by_status['refused'])} refused at "
        f"injection, and {len(by_status['not tried'])} not tried.",
        "Each is a tiny random model in float32 with automatic targets. The library has no list of families: the",
        "tests' knowledge of them (`tests/families.py`) is the sizes that make a model small.",
        "",
        "| feature | what is checked | bound | exact | base cannot | refused | not equal |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, feature in FEATURES.items():
        counts = Counter(families[family][name]["status"] for family in adapted)
        shown = [str(counts[status] or "") for status in CELLS]
        lines.append(f"| {name} | {feature.says} | {feature.bound:g} | {' | '.join(shown)} |")
    lines += [
        "",
        "Bounds are shares of the largest logit, unless the text says otherwise. *Base cannot*: the model without an",
        "adapter fails the same check, or has nothing to check. The mixture has three angles (1, 4 and 0.25 times the",
        f"model's own) of which every token picks two; the one angle is {THETA_FACTOR:g} times the model's own.",
        "",
        f"## Adapted ({len(adapted)})",
        "",
        "Layers: attention modules adapted; left out because they have no rotary embedding; outside the decoder",
        "(encoders of images and sound), where nothing is touched.",
        "",
        f"| family | adapted | left out | outside | {' | '.join(FEATURES)} |",
        "|---|---|---|---|" + "---|" * len(FEATURES),
    ]
    exceptions = []
    for family in adapted:
        features = families[family]
        layers = [features["one angle"].get(name) or "" for name in ("adapted", "left out", "outside")]
        layers = ["" if number == "0" else number for number in layers]
        cells = []
        for name in FEATURES:
            status, detail = features[name]["status"], features[name]["detail"]
            nothing_to_check = name == "positions of images" and status == "base cannot"
            cells.append("–" if nothing_to_check else CELLS[status])
            if status != "exact" and not nothing_to_check:
                exceptions.append(f"| {family} | {name} | {status} | {_one_line(detail)} |")
        lines.append(f"| {family} | {' | '.join(layers)} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Every cell that is not exact",
        "",
        "| family | feature | | figure or reason |",
        "|---|---|---|---|",
    ]
    lines += exceptions
    for status, title in (("refused", "Refused at injection"), ("not tried", "Not tried")):
        lines += ["", f"## {title} ({len(by_status[status])})", "", "| family | reason |", "|---|---|"]
        lines += [
            f"| {family} | {_one_line(families[family]['one angle']['detail'])} |" for family in by_status[status]
        ]
    return "\n".join(lines) + "\n"


def feature_page(sections: list[dict], results: list[ElementTree.Element]) -> str:
    lines = [
        "# Features",
        "",
        f"{versions()} Written by `python .ci/make_support_matrix.py` from the results of the tests that",
        "[features.toml](../.ci/features.toml) names; do not edit. In brackets: how many cases.",
    ]
    cases = [case for result in results for case in result.iter("testcase")]
    for section in sections:
        lines += ["", f"## {section['title']}", "", "| feature | result | tests |", "|---|---|---|"]
        for row in section["row"]:
            found = [case for case in cases if any(names(test, case) for test in row["tests"])]
            tests = ", ".join(f"`{test.partition('[')[0].removesuffix('::*')}`" for test in row["tests"])
            lines.append(f"| {row['feature']} | {_result_of(found)} | {tests} |")
    return "\n".join(lines) + "\n"


def names(test: str, case: ElementTree.Element) -> bool:
    """Whether `test` of .ci/features.toml means this case: a test or class, or `*`, perhaps with a parameter."""
    file, _, rest = test.partition("::")
    wanted, _, parameter = rest.removesuffix("]").partition("[")
    _, module, *owner = case.get("classname").split(".")
    own_name, _, parameters = case.get("name").removesuffix("]").partition("[")
    path = [*owner, own_name]
    if f"{module}.py" != file or (parameter and parameter not in parameters.split("-")):
        return False
    return wanted == "*" or wanted.split("::") == path[: len(wanted.split("::"))]


def _result_of(cases: list[ElementTree.Element]) -> str:
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case.find("skipped").get("message") for case in cases if case.find("skipped") is not None]
    passed = len(cases) - len(failed) - len(skipped)
    parts = [f"**failed** ({len(failed)})"] if failed else []
    parts += ["no result"] if not cases else []
    parts += [f"passed ({passed})"] if passed else []
    parts += [f"not run ({len(skipped)}): {_one_line(skipped[0])}"] if skipped else []
    return ", ".join(parts)


def _one_line(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= 160 else text[:160] + " ..."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", type=Path, nargs="+", help="results of test_families.py --all-families")
    parser.add_argument("--features", type=Path, nargs="+", help="results of the tests that features.toml names")
    options = parser.parse_args()
    sections = tomllib.loads((ROOT / ".ci" / "features.toml").read_text())["section"]
    files = sorted(
        {test.partition("::")[0] for section in sections for row in section["row"] for test in row["tests"]}
    )
    if options.families:
        families = [ElementTree.parse(file).getroot() for file in options.families]
    else:
        families = [run_tests("tests/test_families.py", "--all-families")]
    (ROOT / "docs" / "support.md").write_text(support_page(family_results(families)))
    if options.features:
        features = [ElementTree.parse(file).getroot() for file in options.features]
    else:
        features = [run_tests(*(f"tests/{file}" for file in files))]
    (ROOT / "docs" / "features.md").write_text(feature_page(sections, features))


if __name__ == "__main__":
    main()
