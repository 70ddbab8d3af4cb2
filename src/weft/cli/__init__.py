"""The `weft` command: one file per verb. A verb parses, calls one function of the library, and prints.

Verbs are imported when they are called, and import torch when they run: `weft --help` needs neither. The order of parts
on a line is `weft VERB ARGUMENTS OPTIONS`; `--debug`, anywhere, shows the traceback of an error.

Exit codes: 0 done, 1 the work failed, 2 the command line or a recipe is wrong, 130 interrupted, 143 terminated.
"""

import difflib
import errno
import os
import sys
import traceback
from collections.abc import Sequence

from cyclopts import App, CycloptsError, UnknownCommandError

from weft import __version__
from weft.errors import UsageError, WeftError

VERBS = {
    "demo": ("weft.cli.demo:demo", "Data, training, stories, scores and a report, on this machine, in minutes."),
    "data": ("weft.cli.data:app", "Build, check, view, import and export training data made of illustrated documents."),
    "train": ("weft.cli.train:train", "Teach a model to answer with text and pictures, as a recipe says."),
    "generate": ("weft.cli.generate:generate", "Answer a prompt of text and pictures with text and pictures."),
    "eval": ("weft.cli.evaluate:app", "Answer a benchmark, score the answers, compare models, and report."),
    "serve": ("weft.cli.serve:app", "Serve a model to OpenAI clients and to a browser."),
    "adapter": ("weft.cli.adapter:app", "Inspect, verify, merge and export what training wrote."),
    "models": ("weft.cli.models:app", "List released models and what they take, look into one, convert a pickled one."),
    "doctor": ("weft.cli.doctor:doctor", "What is installed, what fits on this machine, and what to do about it."),
}
"""Name of a verb -> where it is, and its line in the help."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command line and exit."""
    tokens, debug = _without_debug(sys.argv[1:] if arguments is None else list(arguments))
    try:
        code = build_app()(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except BrokenPipeError:
        # the reader, such as `head`, has seen enough; without this the interpreter complains when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        if debug:
            traceback.print_exception(error)
        explained = explain(error)
        print(f"error: {explained.what}", file=sys.stderr)
        print(f"where: {explained.where or 'weft ' + ' '.join(tokens[:1])}", file=sys.stderr)
        print(f"fix: {explained.fix or 'mend what is named there, then run the same command again'}", file=sys.stderr)
        code = explained.exit_code
    sys.exit(code)


def build_app() -> App:
    """The verbs as cyclopts knows them; none is imported yet."""
    app = App(
        name="weft",
        help="Teach a vision-language generalist to write illustrated documents.",
        help_epilogue="`weft VERB --help` says more. `--debug`, anywhere on the line, shows the traceback of an error.",
        suppress_keyboard_interrupt=False,
        help_format="plaintext",  # Markdown would cost 50 ms
        version=__version__,
    )
    for order, (name, (place, summary)) in enumerate(VERBS.items()):
        # an App carries its own help and name; a function takes them from here
        app.command(place, name=name, help=summary, sort_key=order)
    return app


def _without_debug(tokens: list[str]) -> tuple[list[str], bool]:
    """Take `--debug` out of the options; after `--` it is an argument."""
    end = tokens.index("--") if "--" in tokens else len(tokens)
    kept = [token for token in tokens[:end] if token != "--debug"]
    return kept + tokens[end:], len(kept) < end


def explain(error: Exception) -> WeftError:
    """Any error as what, where and fix."""
    match error:
        case WeftError():
            return error
        case CycloptsError():
            return _explain_usage(error)
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return WeftError(
                "no space is left on the disk; what was being written is not there, what was complete still is",
                where=_file_of(error),
                fix="free some space, then run the same command again",
            )
        case FileExistsError() | NotADirectoryError() | IsADirectoryError():
            return WeftError("a file stands where a folder is needed", where=_file_of(error), fix="name another place")
        case OSError(errno=errno.EROFS | errno.ENAMETOOLONG | errno.ELOOP):
            return WeftError(f"cannot write there: {error.strerror}", where=_file_of(error), fix="name another place")
        case PermissionError():
            return WeftError("permission denied", where=_file_of(error), fix="choose a folder that you may write to")
        case _:
            first = str(error).partition("\n")[0]
            again = "run the same command with --debug and report what it prints"
            return WeftError(f"unexpected {type(error).__name__}: {first}", fix=again)


def _explain_usage(error: CycloptsError) -> UsageError:
    if isinstance(error, UnknownCommandError) and not error.command_chain:
        # cyclopts would import every verb to make its suggestion
        unknown = (error.unused_tokens or [""])[0]
        near = difflib.get_close_matches(unknown, VERBS, n=1)
        fix = f"did you mean {near[0]}?" if near else f"use one of {', '.join(VERBS)}"
        return UsageError(f"unknown command or option {unknown!r}", where="command line", fix=fix)
    verb = " ".join(error.command_chain or ())
    command = f"weft {verb}".strip()
    what, _, hint = " ".join(str(error).split()).partition("Did you mean")
    fix = f"did you mean{hint}" if hint else f"`{command} --help` shows what it takes"
    return UsageError(what.strip(), where=f"command line of `{command}`", fix=fix)


def _file_of(error: OSError) -> str | None:
    return None if error.filename is None else str(error.filename)
