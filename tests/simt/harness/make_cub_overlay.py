"""Makes the installed CUB run under the SIMT harness.

Copies its few headers that hold inline PTX into a folder that the compiler searches first, with a
call of ptx_words.h in place of each `asm` statement (or a run-time error naming the PTX, should a
kernel ever reach it). Runs when CMake configures; nothing of CUB is stored.

Usage: make_cub_overlay.py CCCL_INCLUDE_FOLDER OVERLAY_FOLDER
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

HEADERS = (
    "cub/util_ptx.cuh",
    "cub/util_device.cuh",
    "cub/warp/specializations/warp_scan_shfl.cuh",
    "cub/warp/specializations/warp_reduce_shfl.cuh",
    "cub/thread/thread_operators.cuh",
    "cub/thread/thread_load.cuh",
    "cub/thread/thread_store.cuh",
    "cub/detail/strong_load.cuh",
    "cub/detail/strong_store.cuh",
    "thrust/system/cuda/detail/core/triple_chevron_launch.h",
)
SPECIAL_REGISTERS = """#pragma once
#include <cuda/std/detail/__config>
_LIBCUDACXX_BEGIN_NAMESPACE_CUDA_PTX
inline unsigned get_sreg_laneid() { return ::simt::lane_id(); }
inline unsigned get_sreg_warpid() { return ::simt::warp_id(); }
inline unsigned get_sreg_lanemask_lt() { return ::simt::lanes_below(); }
inline unsigned get_sreg_lanemask_le() { return ::simt::lanes_up_to(); }
inline unsigned get_sreg_lanemask_gt() { return ~::simt::lanes_up_to(); }
inline unsigned get_sreg_lanemask_ge() { return ~::simt::lanes_below(); }
_LIBCUDACXX_END_NAMESPACE_CUDA_PTX
"""


def top_level(text: str) -> Iterator[tuple[int, str]]:
    """Yields position and value of each character outside strings and brackets.

    An opening bracket counts as inside; so does its closing one, unless nothing opened it.
    """
    depth, quoted, i = 0, False, 0
    while i < len(text):
        c = text[i]
        if quoted:
            if c == "\\":
                i += 1
            quoted = c != '"'
        elif c == '"':
            quoted = True
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
            if depth < 0:
                yield i, c
        elif depth == 0:
            yield i, c
        i += 1


def split(text: str, separator: str) -> list[str]:
    """Splits at a separator outside strings and brackets; `::` does not separate."""
    cuts = [
        i
        for i, c in top_level(text)
        if c == separator and text[i : i + 2] != "::" and text[i - 1 : i + 1] != "::"
    ]
    return [text[a:b] for a, b in zip([0, *(i + 1 for i in cuts)], [*cuts, len(text)], strict=True)]


def asm_statements(text: str) -> Iterator[tuple[int, int, str]]:
    """Yields begin, end and body of each `asm volatile(body)`."""
    for match in re.finditer(r"\basm\s*(?:volatile)?\s*\(", text):
        length = next(i for i, c in top_level(text[match.end() :]) if c == ")")
        end = match.end() + length
        yield match.start(), end + 1, text[match.end() : end]


def translate(body: str) -> str:
    """The C++ expression that does what one asm statement does."""
    parts = split(body.replace("\\\n", " "), ":")
    literals = [s for s in re.findall(r'"(?:[^"\\]|\\.)*"|#\w+', parts[0]) if s[0] == '"']
    ptx = re.sub(r"\s+", " ", "".join(s[1:-1] for s in literals).replace("\\n", " ")).strip()
    operands = [
        match.group(1).strip()
        for part in parts[1:3]
        for operand in split(part, ",")
        if (match := re.match(r'\s*"[^"]*"\s*\((.*)\)\s*$', operand, re.S))
    ]
    if match := re.search(r"shfl\.sync\.(up|down)\.b32", ptx):
        adds = "add." in ptx
        function = "ptx_shuffle_add" if adds else "ptx_shuffle"
        arguments = [*operands[1:4], operands[-1] if adds else operands[4]]
        call = f"::simt::{function}<::simt::WarpOp::kShuffle{match[1].title()}>"
        return f"{operands[0]} = {call}({', '.join(arguments)})"
    if "vote.ballot" in ptx and "not.b32" in ptx:
        return f"{operands[0]} = ::simt::ptx_ballot_bit({operands[1]}, {operands[2]})"
    if ptx.startswith("bfe.u32"):
        return f"{operands[0]} = ::simt::ptx_bit_field({', '.join(operands[1:4])})"
    if match := re.match(r"sh([lr])\.b32", ptx):
        shift = "<<" if match[1] == "l" else ">>"
        return f"{operands[0]} = ({operands[2]}) > 31 ? 0 : ({operands[1]}) {shift} ({operands[2]})"
    if ptx == "exit;":
        return "::simt::exit_thread()"
    if match := re.match(r"ld\.[\w.]*?(?:\.v([24]))?\.[bus](8|16|32|64) .*, \[", ptx):
        count = int(match[1] or 1)
        arguments = [operands[count], *operands[:count]]
        return f"(::simt::ptx_load<uint{match[2]}_t>({', '.join(arguments)}))"
    if match := re.match(r"st\.[\w.]*?(?:\.v[24])?\.[bus](8|16|32|64) \[", ptx):
        return f"(::simt::ptx_store<uint{match[1]}_t>({', '.join(operands)}))"
    if re.match(r"\{ \.reg \.u8 datum; ld\.", ptx):
        return f"(::simt::ptx_load<uint8_t>({operands[1]}, {operands[0]}))"
    if re.search(r"st\.[\w.]*u8 \[", ptx) and "datum" in ptx:
        return f"(::simt::ptx_store<uint8_t>({operands[0]}, {operands[1]}))"
    if ptx.startswith(("fence", "membar")):
        return "(void)0"
    message = ptx.replace('"', "'").replace("\\", "")
    return f'::simt::fail("inline PTX is not emulated: {message}")'


def rewrite(header: str) -> str:
    """The header with every asm statement and every `kernel<<<...>>>(` replaced."""
    out, last = "", 0
    for begin, end, body in asm_statements(header):
        out += header[last:begin] + translate(body).replace("\n", " ")
        last = end
    return re.sub(r"\b(\w+)<<<([^>]*)>>>\(", r"::simt::launch_kernel(\1, \2, ", out + header[last:])


def main(cccl: Path, overlay: Path) -> None:
    for name in HEADERS:
        text = rewrite((cccl / name).read_text())
        if name == "cub/util_device.cuh":  # its launcher is for CUDA compilers only
            text = text.replace("#if _CCCL_HAS_CUDA_COMPILER() && !_CCCL_COMPILER(NVRTC)", "#if 1")
        write(overlay / name, text)
    # The special registers are declared for nvcc only.
    write(overlay / "cuda/__ptx/instructions/get_sreg.h", SPECIAL_REGISTERS)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:  # an unchanged file recompiles nothing
        path.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
