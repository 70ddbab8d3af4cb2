"""`weft serve`: one model, with adapters, behind an OpenAI-compatible server and a page; and how fast it is."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from weft.cli.loading import Loading
from weft.errors import UsageError, WeftError

NEEDED = ("fastapi", "httptools", "msgpack", "prometheus_client", "sse_starlette", "uvicorn")
app = App(name="serve", help="Serve a model to OpenAI clients and to a browser.")


@app.default
def serve(
    model: str,
    /,
    *,
    adapter: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    slots: int = 16,
    context: int | None = None,
    threads: int | None = None,
    key_file: Path | None = None,
    insecure: Annotated[bool, Parameter(negative=())] = False,
    public_url: str = "",
    drain: float = 30.0,
    config: Path | None = None,
    print_limits: Annotated[bool, Parameter(negative=())] = False,
    loading: Loading = Loading(),
) -> None:
    """Serve a model to OpenAI clients and to a browser, until it is interrupted.

    Parameters
    ----------
    model: str
        A name such as `tiny`, the folder of a model, or owner/name of a repository on the hub.
    adapter: tuple[str, ...]
        The folder of a trained adapter, or NAME=FOLDER; may be given several times. Callers choose by `model`.
    host: str
        Where to listen; others than this machine need a key.
    port: int
        0 finds a free one.
    slots: int
        Answers written at once by each model.
    context: int | None
        Positions of a prompt and its answer; by default as many as the model has.
    threads: int | None
        Of models on a CPU; by default OMP_NUM_THREADS, or half of the cores, as callers need the others.
    key_file: Path | None
        Keys of callers, one per line; by default the one in WEFT_API_KEY, if it is set.
    insecure: bool
        Let others in without keys.
    public_url: str
        http(s)://HOST[:PORT] put before the addresses of pictures, for pages that show them elsewhere.
    drain: float
        Seconds that answers under way may take to end once the server is asked to.
    config: Path | None
        A recipe with these settings and all limits.
    print_limits: bool
        Print every limit and its value, and end.
    """
    _check_installed()
    from weft.config import load_config
    from weft.serve.settings import ServeConfig, read_keys

    given = {
        "host": (host, "127.0.0.1"), "port": (port, 8000), "slots": (slots, 16), "context": (context, None),
        "threads": (threads, None), "key_file": (key_file, None), "insecure": (insecure, False),
        "public_url": (public_url, ""), "limits.drain_seconds": (drain, 30.0),
    }  # fmt: skip
    overrides = {name: value for name, (value, default) in given.items() if value != default}
    settings = load_config(ServeConfig, config, overrides)
    if print_limits:
        print(settings.limits.model_dump_json(indent=2))
        return
    keys, adapters = read_keys(settings), named(adapter)

    from weft.serve.models_process import ModelsConfig, in_process

    process = in_process(
        ModelsConfig(
            model=model, adapters=adapters, load=loading.config(), slots=settings.slots, context=settings.context,
            threads=settings.threads,
        )
    )  # fmt: skip
    # while it loads
    from weft.serve.app import Served, create_app
    from weft.serve.page import load_gradio
    from weft.serve.run import run_server
    from weft.serve.scheduler import Scheduler

    load_gradio()
    process.wait_until_loaded()
    limits = settings.limits
    scheduler = Scheduler(process, queue=limits.queue, queue_seconds=limits.queue_seconds)
    served = [Served(name) for name in process.models]
    addresses = create_app(scheduler, served, keys=keys, limits=limits, public_url=settings.public_url, page=True)
    names = ", ".join(process.models)
    run_server(
        addresses, scheduler, settings, say=lambda address: print(f"{names} at {address}", file=sys.stderr, flush=True)
    )


@app.command
def bench(
    model: str = "tiny",
    /,
    *,
    slots: int = 32,
    quick: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Measure a server on this machine: throughput, overload, and whether anything is lost or mixed up.

    The last line is JSON: throughput_32_over_1, overload_keep, reject_p99_ms, mixed_up, lost, rss_growth.

    Parameters
    ----------
    model: str
        A name such as `tiny`, the folder of a model, or owner/name of a repository on the hub.
    slots: int
        Answers written at once.
    quick: bool
        Within three minutes, on a small machine.
    """
    _check_installed("aiohttp")
    import asyncio
    import json
    from dataclasses import asdict

    from weft.serve.bench import FULL, QUICK, measure, serving, stand_back

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    command = [sys.executable, "-m", "weft.cli", "serve", model, "--port", "0", "--slots", str(slots)]
    with serving(command) as (url, process):
        stand_back()
        figures = asyncio.run(measure(url, process, model, QUICK if quick else FULL, say=say))
    print(json.dumps(asdict(figures)))


def _check_installed(*more: str) -> None:
    missing = [name for name in (*more, *NEEDED) if find_spec(name) is None]
    if missing:
        raise WeftError(f"a server needs {', '.join(missing)}", where="weft serve", fix="pip install 'weft[serve]'")


def named(adapters: tuple[str, ...]) -> dict[str, Path]:
    """NAME=FOLDER or FOLDER -> name -> folder; the name of a run is that of its folder."""
    found: dict[str, Path] = {}
    for given in adapters:
        name, equals, folder = given.partition("=")
        path = Path(folder if equals else given)
        own = name if equals else path.parent.name if path.name == "adapter" else path.name
        if not own or own in found:
            raise UsageError(f"two adapters are called {own!r}", where="--adapter", fix="name them: NAME=FOLDER")
        found[own] = path
    return found
