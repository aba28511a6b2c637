"""g++ and what it has built: the emulator's core, and each kernel, kept by the content they were made from."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CORE, WORDS = HERE / "core", HERE / "words"

_COMMON = ("-std=c++17", "-g1", "-gdwarf-4", "-fPIC", "-Wall", "-Wno-psabi", "-ffp-contract=off")
_CORE_FLAGS = (*_COMMON, "-O2", "-Wextra")
# The hooks of -fsanitize=thread see every load and store. -O1 keeps places in the source, and calls, apart.
_KERNEL_FLAGS = (
    *_COMMON, "-O1", "-fno-optimize-sibling-calls", "-Wno-unknown-pragmas", "-Wno-unused-variable",
    "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0",
)  # fmt: skip
# Undefined behaviour, in twice to four times the compile time.
_UNDEFINED = "-fsanitize=alignment,bounds,signed-integer-overflow,shift,integer-divide-by-zero,return"
_ATTRIBUTE = re.compile(r"__\w+__\s*\([^()]*\)")  # __launch_bounds__(...) and its like
_ENTRY = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(\w+)\s*\(')
_MACRO = re.compile(r"\s*#define (\w+)\((\w+)")
_LINE = re.compile(r'^#line (\d+) "kernels/([\w.]+)"$')


class BuildError(RuntimeError):
    """g++ refused a kernel."""


@functools.cache
def compiler() -> str | None:
    """GCC's C++ compiler: $CUPYFLASH_EMULATOR_CXX, or g++; None where there is none.

    Clang under g++'s name does not count: its hooks are other ones.
    """
    found = shutil.which(os.environ.get("CUPYFLASH_EMULATOR_CXX", "g++"))
    if found is None:
        return None
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    return None if version.returncode or "clang" in version.stdout else found


@functools.cache
def cache() -> Path:
    """Where builds are kept: $CUPYFLASH_EMULATOR_CACHE, or a folder in the user's cache, or a temporary one."""
    named = os.environ.get("CUPYFLASH_EMULATOR_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in (Path(named),) if named else (base / "cupyflash-emulator",):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            if named:
                raise
    return Path(tempfile.mkdtemp(prefix="cupyflash-emulator-"))


@functools.cache
def _compiler_identity() -> str:
    version = subprocess.run([_need_compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    return f"{platform.machine()}\n{version}"


def _need_compiler() -> str:
    found = compiler()
    if found is None:
        raise BuildError("the emulator needs g++")
    return found


@functools.cache
def _kernel_flags() -> tuple[str, ...]:
    """With -ftrivial-auto-var-init, since GCC 12: a register that nothing has written holds nonsense, not 0 by luck."""
    wish = "-ftrivial-auto-var-init=pattern"
    command = [_need_compiler(), wish, "-fsyntax-only", "-x", "c++", "-"]
    asked = subprocess.run(command, input="", capture_output=True, text=True, check=False)
    return _KERNEL_FLAGS if asked.returncode else (*_KERNEL_FLAGS, wish)


@functools.cache
def _headers() -> str:
    """All that a build may include."""
    paths = [*sorted(CORE.iterdir()), *sorted(WORDS.iterdir())]
    return "".join(f"{path.name}\n{path.read_text(encoding='utf-8')}" for path in paths)


def _build(stem: str, text: str, flags: tuple[str, ...]) -> Path:
    """Compile `text` to a library, unless one was made of the same."""
    key = hashlib.sha256("\0".join((_compiler_identity(), *flags, _headers(), text)).encode()).hexdigest()[:24]
    library = cache() / f"{stem}-{key}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=cache()) as folder:
        source, output = Path(folder) / "unit.cpp", Path(folder) / "unit.so"
        source.write_text(text, encoding="utf-8")
        compiled = source.with_suffix(".o")
        _run(stem, *flags, f"-I{WORDS}", f"-I{CORE}", "-c", str(source), "-o", str(compiled))
        _run(stem, "-shared", str(compiled), "-o", str(output), "-ldl")  # without the sanitizers' own libraries
        os.replace(output, library)  # another process may have been faster: its library is the same
    return library


def _run(stem: str, *arguments: str) -> None:
    done = subprocess.run([_need_compiler(), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{stem}: g++ says\n{done.stderr[:6000]}")


@functools.cache
def core() -> ctypes.CDLL:
    """The emulator itself."""
    library = ctypes.CDLL(str(_build("core", '#include "core.cpp"\n', _CORE_FLAGS)), mode=ctypes.RTLD_GLOBAL)
    u32, u64, pointer = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p
    signatures = {
        "emulator_allocate": (pointer, (u64,)),
        "emulator_data": (pointer, (pointer,)),
        "emulator_free": (None, (pointer,)),
        "emulator_configure": (None, (pointer, pointer, u32, u32, ctypes.c_int, ctypes.c_int, u32, u64)),
        "emulator_array": (ctypes.c_int, (ctypes.c_char_p, u64, ctypes.c_int)),
        "emulator_bind": (None, (pointer, u32, pointer, ctypes.c_int, pointer)),
        "emulator_written": (None, (pointer, pointer)),
        "emulator_encode_tiled": (
            ctypes.c_char_p,
            (pointer, ctypes.c_int, u32, pointer, pointer, pointer, pointer, pointer, *(ctypes.c_int,) * 4),
        ),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def for_cpu(text: str) -> str:
    """A kernel's text with the words that the emulator has under the same name taken from there.

    The text is what NVRTC gets, includes inlined under ``#line`` marks. What belongs to a replaced word is dropped;
    where it ends, behind what it includes, an #include takes its place, which g++ finds in words/.
    """
    parts: list[tuple[str, list[str]]] = [("", [])]
    for line in text.splitlines():
        mark = _LINE.match(line)
        if mark:
            parts.append((mark[2], []))
        parts[-1][1].append(line)
    last = {name: i for i, (name, _) in enumerate(parts)}
    lines: list[str] = []
    for i, (name, part) in enumerate(parts):
        if not name or not (WORDS / name).exists():
            lines += part
        elif last[name] == i:
            lines.append(f'#include "{name}"')
    return "\n".join(lines) + "\n"


def entry_points(text: str) -> tuple[str, ...]:
    """The kernels that a text defines, also through a macro whose first parameter is the kernel's name."""
    text = _ATTRIBUTE.sub("", text).replace("\\\n", " ")
    macros = [line for line in text.splitlines() if line.lstrip().startswith("#")]
    names = _ENTRY.findall("\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")))
    for line in macros:
        macro = _MACRO.match(line)
        if macro and macro[2] in _ENTRY.findall(line):
            names += re.findall(rf"^{macro[1]}\((\w+)", text, re.MULTILINE)
    return tuple(names)


def kernel(text: str, arch: int, undefined: bool) -> tuple[ctypes.CDLL, tuple[str, ...]]:
    """The library of a kernel's text for an architecture, and the entry points that it has.

    ``undefined``: with checks for undefined behaviour.
    """
    core()
    entries = entry_points(text)
    exports = "".join(f"EMULATOR_ENTRY({name})\n" for name in entries)
    flags = (*_kernel_flags(), _UNDEFINED) if undefined else _kernel_flags()
    head = f'#define __CUDA_ARCH__ {10 * arch}\n#include "device.h"\n#line 1 "kernels/{(*entries, "text")[0]}"\n'
    unit = f"{head}{for_cpu(text)}\n{exports}"
    return ctypes.CDLL(str(_build(entries[0] if entries else "kernel", unit, flags))), entries
