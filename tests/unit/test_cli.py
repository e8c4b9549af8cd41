"""Owns the tests of the ``deepcore`` command itself: dispatch, laziness, exit codes, messages.

Knows nothing of what the sub-commands do.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from deepcore import __version__, cli
from deepcore.errors import ConfigError

REPO = Path(__file__).resolve().parents[2]


class FakeCommand:
    """Stands in for a module of deepcore/cli/; ``effect`` is raised, or returned as the exit code."""

    def __init__(self, effect: int | BaseException = 0) -> None:
        self.effect, self.seen = effect, argparse.Namespace()

    def add_parser(self, subparsers: cli.SubParsers) -> None:
        subparsers.add_parser("run", help="fake").add_argument("--nproc", type=int, default=1)

    def run(self, args: argparse.Namespace) -> int:
        self.seen = args
        if isinstance(self.effect, BaseException):
            raise self.effect
        return self.effect


def use(monkeypatch: pytest.MonkeyPatch, effect: int | BaseException = 0) -> FakeCommand:
    command = FakeCommand(effect)
    monkeypatch.setattr(cli, "_load", lambda name: command)
    return command


def shell(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deepcore", *words], capture_output=True, text=True, timeout=60, cwd=REPO, check=False
    )


def test_arguments_reach_the_command_and_its_exit_code_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    command = use(monkeypatch, 7)
    assert cli.main(["run", "--nproc", "3"]) == 7
    assert (command.seen.command, command.seen.nproc) == ("run", 3)


def test_argv_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    command = use(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["deepcore", "run", "--nproc", "5"])
    assert cli.main() == 0
    assert command.seen.nproc == 5


def test_a_user_error_is_a_message_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, ConfigError("the config is empty", got="{}", do="give it a batch size"))
    assert cli.main(["run"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("deepcore: error: the config is empty\n")
    assert err.endswith("give it a batch size\n")
    assert "Traceback" not in err


def test_our_own_fault_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, AssertionError("ours"))
    with pytest.raises(AssertionError, match="ours"):
        cli.main(["run"])


def test_interrupting_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    use(monkeypatch, KeyboardInterrupt())
    assert cli.main(["run"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["run", "--nproc", "many"], ["run", "--bogus"], ["--bogus"], ["--", "run"]])
def test_wrong_arguments_end_with_2_and_a_usage_line(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch)
    assert cli.main(words) == 2
    assert capsys.readouterr().err.startswith("usage: deepcore")


def test_a_misspelt_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["confg"]) == 2
    err = capsys.readouterr().err
    assert "confg" in err
    assert "run 'deepcore config'" in err
    assert cli.main(["xyz"]) == 2
    assert "deepcore --help" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    for name, summary in cli.COMMANDS.items():
        assert f"    {name}" in out
        assert summary in " ".join(out.split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"deepcore {__version__}\n"


def test_the_module_is_the_command() -> None:
    done = shell("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"deepcore {__version__}\n", "")


def test_a_failing_command_line_has_its_code_and_no_traceback() -> None:
    done = shell("confg")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_one_command_imports_neither_torch_nor_the_others(name: str) -> None:
    code = (
        "import sys; from deepcore.cli import COMMANDS, main; code = main([sys.argv[1], '--help']); "
        "loaded = {m for m in sys.modules if m.startswith('deepcore.cli.')} & {f'deepcore.cli.{c}' for c in COMMANDS}; "
        "sys.stderr.write(f'{code} {sorted(loaded)} {\"torch\" in sys.modules}')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name], capture_output=True, text=True, timeout=60, cwd=REPO, check=False
    )
    assert done.stderr == f"0 ['deepcore.cli.{name}'] False"
    assert f"usage: deepcore {name}" in done.stdout


def test_a_reader_that_leaves_early_is_no_error() -> None:
    code = (
        "import sys; from deepcore import cli\n"
        "class Talker:\n"
        "    def add_parser(self, subparsers): subparsers.add_parser('run')\n"
        "    def run(self, args):\n"
        "        for _ in range(100000): sys.stdout.write('line\\n')\n"
        "        return 0\n"
        "cli._load = lambda name: Talker()\n"
        "sys.exit(cli.main(['run']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == cli.FAILED
