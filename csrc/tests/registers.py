"""Owns the record of what each CUDA kernel takes: registers and spilled bytes, per architecture.

Knows nothing of the kernels, and needs no GPU: ptxas says it while CMake compiles. As ``launch COMMAND...`` it runs a
compilation and keeps what ptxas said beside the object. As ``compare GOLDEN FOLDER RELEASE`` it holds everything kept
under a build folder against the committed table; ``write`` with the same arguments makes a new one. Another release of
nvcc allocates registers in its own way, so that only spills are compared there.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SUFFIX = ".ptxas"
Table = dict[str, dict[str, str]]  # "stem kernel" -> architecture -> "registers/spilled bytes"

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")


def launch(command: list[str]) -> int:
    """Run the compiler; what ptxas reports goes into a file, everything else to the user."""
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    told = [line for line in done.stderr.splitlines() if line.startswith("ptxas info") or _SPILL.search(line)]
    sys.stderr.writelines(f"{line}\n" for line in done.stderr.splitlines() if line not in told)
    if done.returncode == 0 and "-o" in command:
        Path(command[command.index("-o") + 1] + SUFFIX).write_text("\n".join(told) + "\n")
    return done.returncode


def kernels(stem: str, text: str) -> Table:
    """What ptxas said of one source, by kernel."""
    found: Table = {}
    mangled = architecture = ""
    spilled = 0
    for line in text.splitlines():
        if entry := _ENTRY.search(line):
            mangled, architecture = entry.groups()
        elif spill := _SPILL.search(line):
            spilled = int(spill[1]) + int(spill[2])
        elif used := _USED.search(line):
            found.setdefault(mangled, {})[architecture] = f"{used[1]}/{spilled}"
    return dict(zip((f"{stem} {name}" for name in readable(list(found))), found.values(), strict=True))


def readable(names: list[str]) -> list[str]:
    """Kernels as the source calls them: template arguments, but neither namespaces nor parameters."""
    if not names:
        return []
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = (re.sub(r"deepcore::|\(anonymous namespace\)::|^void ", "", line) for line in plain.splitlines())
    return [line.split("(")[0].replace(", ", ",").replace(" >", ">") for line in short]


def measured(folder: Path) -> Table:
    """Everything that was kept under a build folder."""
    found: Table = {}
    for path in sorted(folder.rglob(f"*_cuda.cu*{SUFFIX}")):
        found.update(kernels(path.name.split("_cuda.cu")[0], path.read_text()))
    return found


def render(table: Table, made_by: str) -> str:
    """The committed form: a line per kernel."""
    architectures = sorted({name for row in table.values() for name in row}, key=lambda name: int(name[3:]))
    lines = [f"# nvcc {made_by}: registers/spilled bytes", "# stem kernel " + " ".join(architectures)]
    lines += [f"{key} {' '.join(row.get(name, '-') for name in architectures)}" for key, row in sorted(table.items())]
    return "\n".join(lines) + "\n"


def differences(golden: str, table: Table, made_by: str) -> list[str]:
    """What is not as recorded, one line each."""
    if f"# nvcc {made_by}:" in golden:
        old, new = set(golden.splitlines()), set(render(table, made_by).splitlines())
        return sorted([f"- {line}" for line in old - new] + [f"+ {line}" for line in new - old], key=lambda x: x[2:])
    spills = [(key, name, cell) for key, row in table.items() for name, cell in row.items()]
    return [f"{key} spills on {name}: {cell}" for key, name, cell in spills if not cell.endswith("/0")]


def main(arguments: list[str]) -> int:
    """Do what the module's docstring says."""
    what, *rest = arguments
    if what == "launch":
        return launch(rest)
    golden, folder, made_by = Path(rest[0]), Path(rest[1]), rest[2]
    table = measured(folder)
    if not table:
        sys.stderr.write(f"nothing was kept under {folder}: build the CUDA kernels first\n")
        return 1
    if what == "write":
        golden.write_text(render(table, made_by))
        return 0
    wrong = differences(golden.read_text(), table, made_by)
    if wrong:
        text = "\n".join(wrong)
        sys.stderr.write(f"{text}\nIf that is meant: python {sys.argv[0]} write {golden} {folder} {made_by}\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
