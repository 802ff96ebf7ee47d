"""Adapters and merged models whose files were damaged or made to do harm, and a judge of what comes of loading them.

Every case changes one file of tests/saved: its bytes, its JSON, or the header, shapes, kinds and values of its
weights. Right is either of two ends. The files are refused, with an error that says why, and the base model is as it
was. Or they are loaded, and then the model holds exactly what the files say, and computes what it did before where
they still say the same. (A flipped bit inside of a weight is another weight, which these formats cannot tell.)
"""

import contextlib
import json
import pickle
import resource
import shutil
import signal
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save
from transformers import AutoModelForCausalLM

from peft_moice import MoICELayer

SAVED = Path(__file__).parent / "saved"
FILES = {
    "adapter": ("adapter_config.json", "adapter_model.safetensors"),
    "cat": ("adapter_config.json", "adapter_model.safetensors"),
    "merged": ("config.json", "model.safetensors"),
}
DECISIVE = ("rope_bases", "base_multipliers", "top_k", "router_dim", "router_scope", "hidden_act", "members")
"""Fields of an adapter's config that change what it computes."""

CLEAR = (ValueError, TypeError, RuntimeError, OSError, ImportError, SafetensorError, pickle.UnpicklingError)
PASSED_ON = {"from_pretrained", "from_dict", "__init__", "__post_init__"}
"""Functions of this package that call those of the libraries, whose own errors come through them."""

MEMORY = 2**30
"""Bytes that loading may take beyond what the process has. The files have less than 200 kB."""
CPU_SECONDS = 60


@dataclass(frozen=True)
class Case:
    """One file, changed.

    Attributes:
        folder: which of tests/saved.
        file: its name.
        content: what it holds now.
        label: what was done to it.
    """

    folder: str
    file: str
    content: bytes
    label: str

    def __repr__(self) -> str:
        return f"{self.folder}/{self.file}: {self.label}"


NUMBERS = [0, -1, 1, 2, 3, 7, 2**20, 10**9, 2**63, 10**400, 0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf")]
TEXTS = ["", "x" * 10_000, "../../etc/passwd", "/etc/passwd", "\x00", "\ud800", "__class__", "head", "gelu", "moice"]
leaves = st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(TEXTS)
values = (
    st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    )
    | st.sampled_from([10**5, 2000]).map(lambda size: [float(index + 1) for index in range(size)])
    | st.integers(2, 40).map(lambda size: [10_000.0 * (index + 1) for index in range(size)])
)


def paths(document: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value of a JSON document is."""
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in inner:
        yield (*here, key)
        yield from paths(value, (*here, key))


@st.composite
def changed_json(draw: Any, content: bytes) -> tuple[bytes, str]:
    document = json.loads(content)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        path = draw(st.sampled_from(list(paths(document))))
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        verb = draw(st.sampled_from(["set", "set", "set", "drop", "add", "wrap"]))
        if verb == "drop":
            del parent[path[-1]]
        elif verb == "wrap":
            parent[path[-1]] = [parent[path[-1]]]
        elif verb == "add" and isinstance(parent, dict):
            parent[draw(st.sampled_from(TEXTS) | st.text(max_size=5))] = draw(values)
        else:
            parent[path[-1]] = draw(values)
    return json.dumps(document).encode(), f"{verb} {path}"


@st.composite
def changed_bytes(draw: Any, content: bytes) -> tuple[bytes, str]:
    verb = draw(st.sampled_from(["flip", "flip", "cut", "extend", "empty", "noise", "deep", "encode"]))
    if verb == "flip":
        # Half of the flips hit the beginning, where formats keep what they say of themselves.
        place = draw(st.integers(0, min(1500, len(content) - 1)) | st.integers(0, len(content) - 1))
        data = bytearray(content)
        data[place] ^= 1 << draw(st.integers(0, 7))
        return bytes(data), f"flip at {place}"
    if verb == "cut":
        length = draw(st.integers(0, len(content)))
        return content[:length], f"cut to {length}"
    if verb == "deep":
        depth = draw(st.sampled_from([100, 900, 10**5]))
        return b'{"a":' * depth + b"1" + b"}" * depth, f"nested {depth} deep"
    others = {
        "extend": content + draw(st.binary(min_size=1, max_size=64)),
        "empty": b"",
        "noise": draw(st.binary(max_size=4096)),
        "encode": content.decode("latin-1").encode("utf-16"),
    }
    return others[verb], verb


@st.composite
def changed_header(draw: Any, content: bytes) -> tuple[bytes, str]:
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    names = sorted(set(header) - {"__metadata__"})
    first, second = draw(st.lists(st.sampled_from(names), min_size=2, max_size=2, unique=True))
    verb = draw(st.sampled_from(["swap", "swap", "shape", "dtype", "offsets", "rename", "drop", "length", "metadata"]))
    if verb == "swap":
        header[first], header[second] = header[second], header[first]
    elif verb == "shape":
        shape = header[first]["shape"]
        shapes = [shape[::-1], [*shape, 1], [sum(shape)], [shape[0] * 2, *shape[1:]]]
        shapes += [[10**9, 10**9], [], [0], [-1], [2**62, 4]]
        header[first]["shape"] = draw(st.sampled_from(shapes))
    elif verb == "dtype":
        header[first]["dtype"] = draw(st.sampled_from(["F64", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "X"]))
    elif verb == "offsets":
        header[first]["data_offsets"] = draw(st.sampled_from([[0, 0], [0, 2**60], [8, 4], [0, len(data)], [-4, 0]]))
    elif verb == "rename":
        names = ["../../x", first.replace("0", "1"), f"{first}.x", "", second]
        header[draw(st.sampled_from(names))] = header.pop(first)
    elif verb == "drop":
        del header[first]
    elif verb == "metadata":
        header["__metadata__"] = draw(st.sampled_from([{}, {"format": "np"}, {"format": "x"}, {"a": "b" * 10**5}, 3]))
    encoded = json.dumps(header).encode()
    length = draw(st.sampled_from([2**63, 10**9, 0, 7])) if verb == "length" else len(encoded)
    return length.to_bytes(8, "little") + encoded + data, f"{verb} {first}"


@st.composite
def changed_tensors(draw: Any, content: bytes) -> tuple[bytes, str]:
    with_routers = sorted(name for name in load(content) if "moice_router" in name)
    tensors = load(content)
    name = draw(st.sampled_from(with_routers) | st.sampled_from(sorted(tensors)))
    verb = draw(st.sampled_from(["value", "value", "dtype", "shape", "swap", "drop", "add"]))
    if verb == "value":
        place = draw(st.integers(0, tensors[name].numel() - 1))
        bad = st.sampled_from([float("nan"), float("inf"), float("-inf"), 1e38, 0.0])
        tensors[name].view(-1)[place] = draw(bad)
    elif verb == "dtype":
        kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.complex64]
        tensors[name] = tensors[name].to(draw(st.sampled_from(kinds)))
    elif verb == "shape":
        turned = tensors[name].reshape(tensors[name].shape[::-1])
        tensors[name] = draw(st.sampled_from([turned, tensors[name][None], tensors[name][:1].clone(), torch.zeros(0)]))
    elif verb == "swap":
        other = draw(st.sampled_from(sorted(tensors)))
        tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()
    elif verb == "drop":
        del tensors[name]
    else:
        tensors[draw(st.sampled_from(["../../x", f"{name}.x", name.replace("0", "9")]))] = tensors[name].clone()
    return save(tensors, {"format": "pt"}), f"{verb} {name}"


@st.composite
def cases(draw: Any) -> Case:
    """Any change to any of the files."""
    folder = draw(st.sampled_from(sorted(FILES)))
    config, weights = FILES[folder]
    changes = [(config, changed_json), (config, changed_json), (config, changed_bytes)]
    changes += [(weights, change) for change in (changed_bytes, changed_header, changed_tensors)]
    file, change = draw(st.sampled_from(changes))
    content, label = draw(change((SAVED / folder / file).read_bytes()))
    return Case(folder, file, content, label)


class Judge:
    """Loads cases into one base model, and knows what the unchanged files give."""

    def __init__(self) -> None:
        self.expected = load_file(SAVED / "expected.safetensors")
        self.base = self._new_base()

    def __call__(self, case: Case) -> str:
        """What came of `case`, in a word or two.

        Raises:
            AssertionError: something that must not.
        """
        with tempfile.TemporaryDirectory() as folder, _limits():
            shutil.copytree(SAVED / case.folder, folder, dirs_exist_ok=True)
            Path(folder, case.file).write_bytes(case.content)
            judge = self._merged if case.folder == "merged" else self._adapter
            return judge(case, Path(folder))

    def _new_base(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(SAVED / "base").eval()

    def _logits(self, model: Any) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(self.expected["input_ids"]).logits
        return logits

    def _adapter(self, case: Case, folder: Path) -> str:
        before = self._logits(self.base)
        try:
            model = PeftModel.from_pretrained(self.base, str(folder)).eval()
        except Exception as error:
            half_loaded = _layers_of(self.base)
            if half_loaded:
                self.base = self._new_base()
            _check_error(error)
            assert not half_loaded, f"{type(error).__name__}, and {half_loaded} are left in the base model"
            assert torch.equal(self._logits(self.base), before), "refused, but the base model computes something else"
            return f"refused: {type(error).__name__}"
        try:
            said, meant = json.loads((folder / case_config(case)).read_text()), model.peft_config["default"].to_dict()
            for field in DECISIVE:
                assert field not in said or said[field] in (None, meant[field]), f"{field} is {meant[field]}"
            stored = load_file(folder / "adapter_model.safetensors")
            for name, parameter in model.named_parameters():
                if ".moice_router." in name:
                    value = stored[name.replace(".moice_router.default.", ".moice_router.")]
                    assert torch.equal(parameter, value.float()), f"{name} is not what is stored"
            same = _same_json(said, case, DECISIVE) and _same_tensors(stored, case)
            return self._compared(model, case, same)
        finally:
            model.unload()
            if _layers_of(self.base):
                self.base = self._new_base()
                raise AssertionError(f"unloading leaves layers in the base model ({model.peft_config})")

    def _merged(self, case: Case, folder: Path) -> str:
        try:
            model = AutoModelForCausalLM.from_pretrained(folder).eval()
        except Exception as error:
            _check_error(error)
            return f"refused: {type(error).__name__}"
        said = json.loads((folder / case_config(case)).read_text())
        if said.get("model_type") != "moice":
            return "another model"
        assert json.loads(json.dumps(model.config.moice)) == said["moice"], "the routers are not those described"
        with safe_open(folder / "model.safetensors", "pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.nan_to_num(), stored[name].to(parameter.dtype).nan_to_num()), name
        same = _same_json(said, case, (*said, *_original(case))) and _same_tensors(stored, case)
        return self._compared(model, case, same)

    def _compared(self, model: Any, case: Case, same: bool) -> str:
        logits = self._logits(model)
        if not same:
            return "loaded as written"
        torch.testing.assert_close(logits, self.expected[case.folder], rtol=0, atol=2e-6)
        return "the same values"


def _layers_of(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, MoICELayer)]


def case_config(case: Case) -> str:
    return FILES[case.folder][0]


def _original(case: Case) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((SAVED / case.folder / case_config(case)).read_text())
    return config


def _same_json(said: dict[str, Any], case: Case, fields: tuple[str, ...]) -> bool:
    original = _original(case)
    return all(
        said.get(field) == original.get(field) for field in {*fields, *(original if fields != DECISIVE else ())}
    )


def _same_tensors(stored: dict[str, torch.Tensor], case: Case) -> bool:
    original = load_file(SAVED / case.folder / FILES[case.folder][1])
    return all(name in stored and torch.equal(stored[name], value) for name, value in original.items())


def _check_error(error: Exception) -> None:
    """Raise unless `error` tells its reader something, or is another library's own."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "/peft_moice/" in frame.filename]
    if not isinstance(error, CLEAR) and ours and ours[-1].name not in PASSED_ON:
        raise AssertionError(f"an unclear {type(error).__name__} in {ours[-1].name}: {error}") from error
    if ours and ours[-1].name not in PASSED_ON and len(str(error)) > 20_000:
        raise AssertionError(f"a message of {len(str(error))} characters") from error
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        raise AssertionError(f"more than {MEMORY} bytes asked for") from error


class _Hangs(BaseException):
    pass


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Bounds the memory and the processor time of the block."""

    def stop(*_: Any) -> None:
        raise _Hangs(f"not done after {CPU_SECONDS} seconds of the processor")

    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)
