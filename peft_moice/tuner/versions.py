"""Whether the installed torch, transformers and peft are versions that the tests were run with."""

import importlib.metadata
import warnings
from collections.abc import Iterable

from packaging.requirements import Requirement

_TESTED = ("torch", "transformers", "peft")


def warn_of_untested_versions() -> None:
    """Warn if torch, transformers or peft lie outside of the versions that this package's own metadata allows.

    Pip keeps to them unless told otherwise. Nothing is said without metadata, as in a checkout that was not installed.
    """
    try:
        requirements = importlib.metadata.requires("peft_moice") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for requirement in untested(requirements):
        name, version = requirement.name, importlib.metadata.version(requirement.name)
        warnings.warn(
            f"{name} {version} is installed, but peft_moice is tested with {name}{requirement.specifier}. Install one "
            "of these, or make sure with `peft_moice.check(model)` that the adapter takes effect.",
            stacklevel=3,
        )


def untested(requirements: Iterable[str]) -> list[Requirement]:
    """Those of `requirements`, in the form of a package's metadata, that an installed version does not meet."""
    found = []
    for requirement in map(Requirement, requirements):
        if requirement.name not in _TESTED or requirement.marker is not None:
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found.append(requirement)
    return found
