"""The kernels' library: compiled once, loaded only if intact, and left out, with a warning, where it cannot be had."""

import hashlib
import logging
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from test_operator import inputs, mix

from peft_moice.attention.native import library

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(isinstance(library.load(), str), reason=f"the kernels cannot be had here: {library.load()}"),
]


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path) -> Path:
    """Nothing is loaded, and nothing was ever compiled. Returns the folder for what is compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(library.FLAGS, "-O0")
    library.load.cache_clear()
    yield tmp_path / "peft_moice"
    library.load.cache_clear()


def mixed(implementation: str = "native") -> torch.Tensor:
    return mix(implementation, *inputs(), backend="sdpa")[0]


def assert_works() -> None:
    torch.testing.assert_close(mixed(), mixed("reference"), rtol=1e-5, atol=1e-6)


def load_again():
    library.load.cache_clear()
    return library.load()


def compiled(folder: Path) -> Path:
    """The library that is kept in `folder`, after it was loaded for the first time."""
    assert_works()
    (made,) = folder.glob("*.so")
    return made


def test_it_is_compiled_once_for_the_same_flags_into_a_private_folder(fresh, monkeypatch):
    before = os.umask(0)
    try:
        made = compiled(fresh)
    finally:
        os.umask(before)
    assert not any(stat.S_IMODE(path.stat().st_mode) & 0o022 for path in (fresh, made))
    first_time = made.stat().st_mtime_ns
    load_again()
    assert_works()
    assert made.stat().st_mtime_ns == first_time
    assert sorted(path.suffix for path in fresh.iterdir()) == [".sha256", ".so"]
    monkeypatch.setenv(library.FLAGS, "-O1")
    load_again()
    assert_works()
    assert len(list(fresh.glob("*.so"))) == 2 and made.exists()


def exchange(path: Path) -> None:
    """Another library, whose checksum fits."""
    source = path.parent / "other.c"
    source.write_text("int other(void) { return 1; }\n")
    assert os.system(f"cc -shared -fPIC {source} -o {path}") == 0
    source.unlink()
    path.with_suffix(".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: os.truncate(path, 1000),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        lambda path: path.with_suffix(".sha256").unlink(),
        lambda path: path.chmod(0o777),
        exchange,
    ],
    ids=["truncated", "zeros", "no checksum", "others may write", "exchanged"],
)
def test_what_was_not_compiled_here_is_not_loaded(fresh, spoil):
    made = compiled(fresh)
    # What is loaded stays as it is only if another file takes its place.
    shutil.copy(made, fresh / "copy")
    os.replace(fresh / "copy", made)
    spoil(made)
    assert not isinstance(load_again(), str)
    assert_works()
    assert library._is_intact(made)


@pytest.mark.parametrize("obstacle", ["others can write", "a file", "no home"])
def test_without_a_folder_of_its_own_it_is_kept_nowhere(fresh, monkeypatch, tmp_path, obstacle):
    if obstacle == "others can write":
        fresh.mkdir()
        fresh.chmod(0o777)
    elif obstacle == "a file":
        fresh.write_text("not a folder")
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert_works()
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("CC", "no-such-compiler", "there is no C compiler"),
        ("CC", "false", "false .* failed"),
        ("CC", "true", "No such file"),
        ("CC", 'cc "-O2', "No closing quotation"),
        (library.FLAGS, "-no-such-flag", "no-such-flag"),
        (library.SWITCH, "0", "PEFT_MOICE_NATIVE is 0"),
    ],
)
def test_without_it_another_implementation_is_chosen(fresh, monkeypatch, caplog, variable, value, reason):
    monkeypatch.setenv(variable, value)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(mixed("auto"), mixed("reference"), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=f"native implementation cannot be used: .*{reason}"):
        mixed()
    messages = [record.getMessage() for record in caplog.records]
    if variable == library.SWITCH:
        assert not messages
    else:
        (message,) = messages
        assert "PEFT_MOICE_NATIVE=0" in message and "CC" in message
    assert not list(fresh.glob("*.so"))


def test_a_compiler_may_speak_any_language(fresh, monkeypatch, tmp_path):
    """Messages in another encoding than UTF-8."""
    compiler = tmp_path / "compiler"
    compiler.write_bytes(b"#!/bin/sh\nprintf '\\377\\376 \\351\\n' >&2; printf '\\377\\n'\nexec cc \"$@\"\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CC", str(compiler))
    assert not isinstance(load_again(), str)
    assert_works()
