#!/usr/bin/env bash
# Runs the tests of the C++ CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer. Everything is built in a
# temporary copy, so that the extension of the source tree stays as it is. Arguments go to pytest; without any, all tests
# that call an op are run on the C++ backend, but for those of load.
#
#   make asan                                   all of them
#   make asan ARGS="tests/ops/test_cpu.py -k holes" some
#
# PYTHON is an interpreter with torch and pytest (default: python3). ASAN_FOLDER is where the copy lies and stays, so that
# the next run compiles only what changed; by default it is a temporary folder.
set -euo pipefail
[[ $OSTYPE == linux* ]] || { echo "asan: this loads the sanitizers as Linux does, and runs nowhere else" >&2; exit 1; }
shopt -s extglob
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python3}")
[[ $python == /* ]] || python=$PWD/$python
compiler=${CXX:-c++}

if [[ -n ${ASAN_FOLDER:-} ]]; then
    mkdir -p "$ASAN_FOLDER"
    copy=$(cd "$ASAN_FOLDER" && pwd)
else
    copy=$(mktemp -d)
    trap 'rm -rf "$copy"' EXIT
fi
cp -rp csrc vgpo_kernels python tests benchmarks setup.py pyproject.toml README.md "$copy"
cd "$copy"
rm -f vgpo_kernels/_C*.so

# The last flags win: enough optimisation that the tests end, and line numbers. Types of torch's objects are not checked,
# for torch hides them. What is undefined is told and the tests go on; memory out of bounds ends them.
cat > compiler <<END
#!/usr/bin/env bash
exec $compiler "\$@" -O1 -g1 -fno-omit-frame-pointer \
    -fsanitize=address,undefined -fno-sanitize=vptr
END
chmod +x compiler
CXX=$copy/compiler VGPO_BUILD=cpu "$python" setup.py build_ext --inplace > build.log 2>&1 || { cat build.log; exit 1; }

# The interpreter is not instrumented, so the runtimes are loaded ahead of it; libstdc++ beside them, or its exceptions
# are thrown past AddressSanitizer's back. The interpreter never frees all that it has; that is no leak of ours.
preload=
for library in libasan.so libubsan.so libstdc++.so; do
    preload+="$($compiler -print-file-name=$library) "
done
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
export VGPO_TEST_BACKENDS=cpp PYTHONPATH="$copy:$copy/python:$copy/tests:$copy/tests/ops"
sanitized() { LD_PRELOAD=$preload "$python" "$@"; }

# A control: a tensor that claims more memory than it has. If reading it ends well, nothing below would be found either.
cat > control.py <<END
import ctypes, torch
from vgpo_kernels import _C
assert _C.__file__.startswith("$copy"), _C.__file__
malloc = ctypes.CDLL(None).malloc
malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
memory = (ctypes.c_char * 4096).from_address(malloc(4096 - 64))
_C.read_memory(torch.frombuffer(memory, dtype=torch.float32))
END
if sanitized control.py > control.log 2>&1 || ! grep -q heap-buffer-overflow control.log; then
    cat control.log
    echo "asan: the control was not caught, so the extension is not sanitized" >&2
    exit 1
fi
echo "asan: built with $("$compiler" --version | head -1); the control is caught"

(($#)) || set -- tests/ops/test_!(load|triton_*).py tests/project/test_benchmarks.py
# pytest leaves the descriptors alone: it would swallow what is told just before a test dies.
code=0
sanitized -m pytest -q -p no:cacheprovider --capture=sys "$@" 2>&1 | tee tests.log || code=$?
found=$(grep -Ec "runtime error:|ERROR: AddressSanitizer" tests.log || true)
echo "asan: $found reports"
exit $((code != 0 || found != 0))
