"""The command line as a person or a script meets it."""

import errno
import resource
import subprocess
import sys

import pytest

from weft import cli
from weft.errors import CheckpointError, ConfigError

HELP_SECONDS = 0.5


def run(*arguments, **options):
    command = [sys.executable, "-m", "weft.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, **options)


def exit_code(*arguments) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return caught.value.code or 0


def verb_that(action, monkeypatch):
    """Make `weft doctor` do `action`."""
    monkeypatch.setattr("weft.cli.doctor.doctor", action)


def raising(error):
    def action() -> None:
        raise error

    return action


def test_help_is_quick_and_names_every_verb():
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # processor time: on a machine that does nothing else it is what a person waits
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in cli.VERBS)
    assert min(seconds) <= HELP_SECONDS


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["doctor", "--help"], ["bake"]])
def test_help_and_usage_errors_import_no_torch(arguments):
    code = (
        "import sys; from weft.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'pyarrow', 'matplotlib'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_importing_weft_is_light():
    code = "import sys; before = set(sys.modules); import weft; print(len(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert int(done.stdout) < 60


def test_version():
    assert run("--version").stdout.strip() == "0.1.0"


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (["docto"], "unknown command or option 'docto'", "did you mean doctor?"),
        (["doctor", "--jsn"], "Unknown option: --jsn.", "did you mean --json?"),
        (["generate"], "requires an argument", "`weft generate --help` shows what it takes"),
        (["generate", "tiny", "hello", "--seed", "x"], "--seed", "`weft generate --help` shows what it takes"),
    ],
)
def test_a_mistyped_line_exits_2_with_three_lines(arguments, what, fix, capsys):
    assert exit_code(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["error", "where", "fix"]
    assert what in lines[0]
    assert fix in lines[2]


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (CheckpointError("tensor a is missing", where="m.safetensors", fix="copy it again"), 1,
         ["error: tensor a is missing", "where: m.safetensors", "fix: copy it again"]),
        (ConfigError("unknown key rnk", where="r.yaml", fix="did you mean rank?"), 2,
         ["error: unknown key rnk", "where: r.yaml", "fix: did you mean rank?"]),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 1,
         ["error: no space is left on the disk", "where: runs/x", "fix: free some space"]),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), 1,
         ["error: permission denied", "where: runs/x", "fix: choose a folder"]),
        (ZeroDivisionError("division by zero"), 1,
         ["error: unexpected ZeroDivisionError: division by zero", "where: weft doctor", "fix: run the same command"]),
        (KeyboardInterrupt(), 130, ["interrupted"]),
        (BrokenPipeError(), 0, []),
    ],
)  # fmt: skip
def test_what_a_person_reads_when_a_verb_fails(error, code, lines, monkeypatch, capfd):
    verb_that(raising(error), monkeypatch)
    assert exit_code("doctor") == code
    shown = capfd.readouterr().err.splitlines()
    assert len(shown) == len(lines)
    assert all(line.startswith(start) for line, start in zip(shown, lines, strict=True))


@pytest.mark.parametrize("arguments", [["--debug", "doctor"], ["doctor", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(arguments, monkeypatch, capsys):
    verb_that(raising(ConfigError("no")), monkeypatch)
    assert exit_code(*arguments) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.splitlines()[-3] == "error: no"


def test_debug_after_two_dashes_is_an_argument():
    assert cli._without_debug(["generate", "--", "--debug"]) == (["generate", "--", "--debug"], False)


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m weft.cli doctor --json | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
