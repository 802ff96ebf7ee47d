#!/usr/bin/env bash
# Builds sdist and wheel, and makes sure that they are whole.
#
#     .ci/check_wheel.sh .venv/bin/python     # an environment with peft_moice[dev]
#
# - twine finds nothing to complain of, the README's rendering on PyPI included.
# - The unpacked sdist has what its tests need: they are all collected, and those that read the repository's files pass.
# - The wheel, in a new environment without constraints on anything but PyTorch, whose newest builds are gigabytes, runs
#   the README, where nothing of the repository is at hand.
#
# What it built stays in outputs/dist. TORCH_OPTIONS are pip's for PyTorch, as in the Makefile.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=$root/$1
rm -rf outputs/dist outputs/wheel
mkdir -p outputs/dist outputs/wheel/elsewhere
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

"$python" -m build --outdir outputs/dist . > outputs/wheel/build.log 2>&1 || { cat outputs/wheel/build.log; exit 1; }
"$python" -m twine check --strict outputs/dist/*

tar -xzf outputs/dist/*.tar.gz -C outputs/wheel --strip-components 1 --one-top-level=sdist
(
    cd outputs/wheel/sdist
    export PYTHONPATH=$PWD
    "$python" -m pytest -q -p no:cacheprovider --collect-only > ../collected.log || { tail -30 ../collected.log; exit 1; }
    "$python" -m pytest -q -p no:cacheprovider tests/test_docs.py tests/test_rooms.py tests/test_saved_files.py
    test -f Makefile -a -f mkdocs.yml -a -x .ci/run
)

"$python" -m venv outputs/wheel/venv
install="outputs/wheel/venv/bin/python -m pip install --quiet --disable-pip-version-check"
$install ${TORCH_OPTIONS:-} --constraint constraints.txt torch
for wheel in outputs/dist/*.whl; do $install "$wheel[plot,train]"; done
cd outputs/wheel/elsewhere
../venv/bin/python -c "
import pathlib, sys, peft_moice
here = pathlib.Path(peft_moice.__file__)
assert pathlib.Path(sys.prefix) in here.parents, here
missing = [name for name in ('py.typed', 'attention/native/kernels.h') if not (here.parent / name).is_file()]
assert not missing, missing
print('peft_moice', peft_moice.__version__, 'runs from its wheel')
"
../venv/bin/python "$root/.ci/run_snippets.py" "$root/README.md"
../venv/bin/python "$root/.ci/run_snippets.py" --commands "$root/README.md"
../venv/bin/peft-moice --version
