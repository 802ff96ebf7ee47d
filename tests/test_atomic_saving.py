"""What was saved before is whole as long as what is saved now is not: on a full disk, and between any two renames."""

import contextlib
import os
import resource
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_models import adapted_model, decide, load, logits_of

from peft_moice.files import atomic
from peft_moice.files.atomic import staged, write_text

pytestmark = pytest.mark.slow


FULL = r"(?i)file too large|FileTooLarge|os error 27"


@contextlib.contextmanager
def no_file_over(size: int):
    """Writes fail once a file has `size` bytes, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("size", [0, 100, 1000, 9000])
def test_an_adapter_on_a_full_disk(llama, tmp_path, size):
    model = adapted_model(llama)
    model.peft_config["default"].revision = "x" * 10_000  # the weights take about 3,000 bytes
    model.save_pretrained(tmp_path)
    expected, before = logits_of(model), contents(tmp_path)
    decide(model, seed=1)
    with no_file_over(size), pytest.raises(Exception, match=FULL):
        model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(llama), tmp_path)
    after = contents(tmp_path)
    assert after.keys() == before.keys(), "something is left over"
    # Weights come first. Where they fit, the config that did not is the one that was there, which is the same.
    changed = {name for name in before if before[name] != after[name] and name != "README.md"}
    assert changed == ({"adapter_model.safetensors"} if size == 9000 else set())
    assert torch.equal(logits_of(again), logits_of(model) if changed else expected)


def test_a_merged_model_on_a_full_disk(llama, tmp_path):
    model = adapted_model(llama).merge_and_unload()
    model.save_pretrained(tmp_path)
    before = contents(tmp_path)
    model.model.embed_tokens.weight.data.add_(1)
    for size in (0, 100, 3000, 30_000):
        with no_file_over(size), pytest.raises(Exception, match=FULL):
            model.save_pretrained(tmp_path)
        assert contents(tmp_path) == before


class Killed(BaseException):
    pass


def test_a_merged_model_is_whole_between_any_two_renames(llama, tmp_path, monkeypatch):
    old, new = (adapted_model(llama) for _ in range(2))
    decide(new, seed=1)
    old, new = old.merge_and_unload(), new.merge_and_unload()
    outcomes = (logits_of(old), logits_of(new))
    replace, seen = os.replace, []

    for moment in range(1, 100):
        old.save_pretrained(tmp_path)
        calls = iter(range(1, 1000))

        def stop_at(*names, calls=calls, moment=moment):
            if next(calls) == moment:
                raise Killed
            replace(*names)

        monkeypatch.setattr(atomic.os, "replace", stop_at)
        try:
            new.save_pretrained(tmp_path)
            break
        except Killed:
            pass
        finally:
            monkeypatch.setattr(atomic.os, "replace", replace)
        found = logits_of(load(tmp_path))
        seen.append(next(index for index, logits in enumerate(outcomes) if torch.equal(found, logits)))
    assert len(seen) > 5 and seen == sorted(seen)
    assert torch.equal(logits_of(load(tmp_path)), outcomes[1])


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o640)
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new" * 10_000 + "\ud800")
    assert path.read_text() == "old"
    write_text(path, "ä\n")
    assert path.read_bytes() == "ä\n".encode()
    assert path.stat().st_mode & 0o777 == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_block_that_raises_changes_nothing(tmp_path):
    (tmp_path / "model.safetensors").write_text("old")
    with pytest.raises(Killed), staged(tmp_path, obsolete=".*") as staging:
        (staging / "model.safetensors").write_text("new")
        raise Killed
    assert contents(tmp_path) == {"model.safetensors": b"old"}
    with staged(tmp_path, obsolete=r"model.*") as staging:
        (staging / "model-1.safetensors").write_text("new")
        (staging / "inner").mkdir()
        (staging / "inner" / "file").write_text("inner")
    assert contents(tmp_path) == {"model-1.safetensors": b"new", "inner/file": b"inner"}
