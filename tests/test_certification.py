"""Implementations prove themselves on the user's device before they are used there."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from test_attention_call import call as make_call
from test_operator import attend

from peft_moice.attention import certification, reference
from peft_moice.attention.certification import Certificates, certify, find_fault, find_fault_apart
from peft_moice.rope import RotaryLayout

CPU, LAYOUT = torch.device("cpu"), RotaryLayout(0, 16, False)


def stand_in(change=lambda output, call: output, why_not=None) -> SimpleNamespace:
    """The reference, with its output changed."""

    def run(call):
        output, probs = reference.run(call)
        return change(output, call), probs

    return SimpleNamespace(why_not=lambda call: why_not, run=run)


def fail(output, call):
    raise RuntimeError("the compiler gave up")


def fault_of(candidate, dtype=torch.float32) -> str | None:
    return find_fault(candidate, CPU, dtype, LAYOUT, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_right_is_found_right(dtype):
    assert fault_of(stand_in(), dtype) is None
    # Rounding is no fault.
    assert fault_of(stand_in(lambda output, call: output * (1 + torch.finfo(dtype).eps)), dtype) is None


@pytest.mark.parametrize(
    ("candidate", "fault"),
    [
        (stand_in(lambda output, call: 1.01 * output), "the output is off by"),
        (stand_in(lambda output, call: output + torch.nan), "the output is off by nan"),
        (stand_in(lambda output, call: output + call.value.sum() - call.value.sum().detach()), "gradient of value is"),
        (stand_in(lambda output, call: output + 0.5 * (call.gates - call.gates.detach()).sum()), "gradient of gates"),
        (stand_in(fail), "RuntimeError: the compiler gave up, on Problem"),
        (stand_in(why_not="it is tired"), "it refuses the problem: it is tired"),
    ],
)
def test_what_is_wrong_is_found_wrong(candidate, fault):
    assert fault in fault_of(candidate)


def test_a_fault_that_shows_under_masks_only_is_found():
    def forget_the_mask(output, call):
        return reference.run(dataclasses.replace(call, attention_mask=None))[0]

    assert "mask='boolean'" in fault_of(stand_in(forget_the_mask))


@pytest.fixture
def certificates(tmp_path):
    asked = []

    def find(name, *args):
        asked.append(name)
        return "it is wrong" if name == "wrong" else None

    kept = Certificates(tmp_path / "folder" / "certificates.json", find)
    kept.asked = asked
    return kept


def test_a_verdict_is_found_once_and_remembered_on_disk(certificates, caplog):
    with caplog.at_level(logging.WARNING, certification.__name__):
        for _ in range(2):
            assert certificates.fault("right", make_call()) is None
            assert certificates.fault("wrong", make_call()) == "it is wrong"
    assert certificates.asked == ["right", "wrong"]
    assert [record.getMessage().partition("'")[0] for record in caplog.records] == [
        "MoICE compares its implementation ",
        "MoICE compares its implementation ",
        "MoICE does not use its implementation ",
    ]
    later = Certificates(certificates.path, lambda *args: pytest.fail("asked again"))
    assert later.fault("wrong", make_call()) == "it is wrong"
    # Another dtype is another question.
    with pytest.raises(pytest.fail.Exception):
        later.fault("wrong", make_call(query=make_call().query.double(), key=make_call().key.double()))


@pytest.mark.parametrize("text", ["", "[1, 2", "[]", "\x00"])
def test_a_damaged_file_is_written_anew(certificates, text):
    certificates.path.parent.mkdir()
    certificates.path.write_text(text)
    assert certificates.fault("wrong", make_call()) == "it is wrong"
    assert list(json.loads(certificates.path.read_text()).values()) == ["it is wrong"]


def test_a_folder_that_cannot_be_written_costs_the_memory_only(tmp_path):
    (tmp_path / "file").write_text("")
    kept = Certificates(tmp_path / "file" / "certificates.json", lambda *args: None)
    assert kept.fault("right", make_call()) is None


def slow(output, call):
    time.sleep(0.05)
    return output


def test_the_fastest_is_taken_and_a_failing_one_never(certificates, caplog):
    candidates = {"slow": stand_in(slow), "fast": stand_in(), "failing": stand_in(fail)}
    state = torch.get_rng_state()
    with caplog.at_level(logging.INFO, certification.__name__):
        assert certificates.fastest(candidates, make_call()) == "fast"
    assert torch.equal(state, torch.get_rng_state())
    assert "failing inf ms" in caplog.text
    # Remembered: under other speeds the same names are not timed again.
    swapped = dict(zip(candidates, [stand_in(), stand_in(slow), stand_in()], strict=True))
    assert certificates.fastest(swapped, make_call()) == "fast"
    assert certificates.fastest({"only": stand_in(fail)}, make_call()) == "only"


def test_answers_cost_next_to_nothing_later(certificates, monkeypatch):
    """Every layer asks in every pass; names of devices and versions are put together for the first one only."""
    candidates = {"slow": stand_in(slow), "fast": stand_in()}
    first = certificates.fault("right", make_call()), certificates.fastest(candidates, make_call())
    monkeypatch.setattr(certification, "_key", lambda *parts: pytest.fail("put together again"))
    assert (certificates.fault("right", make_call()), certificates.fastest(candidates, make_call())) == first


def test_timing_leaves_the_graph_of_the_pass_alone(certificates):
    """As under gradient checkpointing, which counts what a pass saves."""
    saved = []
    query = make_call().query.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        certificates.fastest({"one": stand_in(), "other": stand_in()}, make_call(query=query, attend=attend))
    assert not saved


@pytest.mark.slow
def test_it_is_tried_in_a_process_of_its_own():
    environment = {"TRITON_INTERPRET": "0"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        assert "it is for CUDA" in find_fault_apart("triton", CPU, torch.float32, LAYOUT, 16)
        assert find_fault_apart("reference", CPU, torch.float32, LAYOUT, 16) is None
        crashed = find_fault_apart("no_such_module", CPU, torch.float32, LAYOUT, 16)
    assert "ended with status 1: ModuleNotFoundError" in crashed


@pytest.mark.slow
def test_the_kernels_in_the_interpreter_are_right():
    script = (
        "import torch; from peft_moice.attention.certification import certify\n"
        "print([v.fault for v in certify('cpu', [torch.float32], [16])])"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    if "Triton is not installed" in done.stdout:
        pytest.skip("Triton is not installed")
    assert done.stdout.splitlines()[-1] == "[None, None]", done.stdout + done.stderr


def test_a_table_of_verdicts():
    verdicts = certify("cpu", [torch.float32], [8], ["reference"])
    assert [(verdict.name, verdict.layout.interleaved, verdict.fault) for verdict in verdicts] == [
        ("reference", False, None),
        ("reference", True, None),
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_no_table():
    with pytest.raises(ValueError, match="PyTorch finds no GPU for the device 'cuda'"):
        certify()
