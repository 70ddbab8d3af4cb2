"""The same server on several machines: Ray Serve starts replicas, each an engine and its addresses, behind one port.

    serve run weft.serve.ray_serve:build model=tiny replicas=2 gpus=1 key_file=keys.txt

Every machine sees the same folders: models, adapters and keys. A replica knows nothing of the others. All that they
share are the pictures that are fetched by address, since whoever fetches one is sent to any of them.
"""

import logging
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, NonNegativeFloat, PositiveInt

from weft.backbones.loading import LoadConfig
from weft.config import Config
from weft.errors import UsageError, WeftError
from weft.serve.app import Served, create_app
from weft.serve.files import Files
from weft.serve.hosts import in_thread
from weft.serve.limits import Limits
from weft.serve.models import load_models
from weft.serve.scheduler import Scheduler
from weft.serve.settings import PublicUrl, ServeConfig, read_keys

if TYPE_CHECKING:
    from ray.serve import Application

log = logging.getLogger(__name__)
FILES = "files"
"""The name of the actor that keeps pictures."""
FILE_SECONDS = 2.0
"""A replica waits so long for it, and answers nobody meanwhile."""
SPARE = 64
"""Requests to one replica beside those that run or wait in its line: for a picture, for its health."""
LAST_WORDS_SECONDS = 0.5
"""A replica whose models stopped working has so long to say it to all who wait; then it ends, and there is another."""


class ReplicasConfig(Config):
    """What every replica serves, and what it needs for that."""

    model: str
    """A name such as `tiny`, a folder, or owner/name of a repository on the hub."""
    adapters: dict[str, Path] = Field(default_factory=dict)
    """Name -> the folder of a trained adapter."""
    load: LoadConfig = LoadConfig()
    replicas: PositiveInt = 1
    cpus: NonNegativeFloat = 1
    """Of each replica."""
    gpus: NonNegativeFloat = 0
    """The same; with any, the model is put on the first of them."""
    slots: PositiveInt = 16
    """Answers written at once by each model of a replica."""
    context: PositiveInt | None = None
    """Positions of a prompt and its answer; None: as many as the model has."""
    key_file: Path | None = None
    """Keys of callers, one per line. Default: the environment variable WEFT_API_KEY, where the replicas run."""
    insecure: bool = False
    """Without keys, everybody who reaches the cluster may ask."""
    public_url: PublicUrl = ""
    """http(s)://HOST[:PORT] put before the addresses of pictures, for pages that show them elsewhere."""
    limits: Limits = Limits()
    """Of each replica: `replicas` times as many requests may wait, and as often may a key ask."""

    def keys(self) -> list[str]:
        """
        Raises:
            UsageError: there are none, and they are needed; or they cannot be read.
        """
        keys = read_keys(ServeConfig(key_file=self.key_file))
        if not keys and not self.insecure:
            # where a cluster listens is its own affair: others are taken to reach it
            raise UsageError(
                "others can reach the replicas, and no key protects them",
                where="key_file",
                fix="name a file of keys, set WEFT_API_KEY where the replicas run, or say insecure=true",
            )
        return keys

    @property
    def requests(self) -> int:
        """That one replica takes at the same time; its own line is full before that."""
        waiting = 4 * self.slots if self.limits.queue is None else self.limits.queue
        return (1 + len(self.adapters)) * self.slots + waiting + SPARE


class SharedFiles(Files):
    """Pictures of all replicas, in an actor that outlives each of them. Where it cannot be asked, a replica's own."""

    def put(self, data: bytes, owner: str) -> str:
        try:
            return str(_ask("put", data, owner))
        except Exception as error:  # whatever it is, an answer is not lost for it
            log.warning("a picture is kept by one replica alone: %s", type(error).__name__)
            return super().put(data, owner)

    def get(self, identity: str, owner: str) -> bytes | None:
        try:
            found = _ask("get", identity, owner)
        except Exception as error:
            log.warning("pictures of other replicas cannot be had: %s", type(error).__name__)
            found = None
        return super().get(identity, owner) if found is None else found


def _ask(method: str, *given: Any) -> Any:
    import ray
    from ray import serve

    # by its name each time: where it died, there is another one
    actor = serve.get_deployment_actor(FILES)
    return ray.get(getattr(actor, method).remote(*given), timeout=FILE_SECONDS)


class Replica:
    """The models, the thread that runs them, and the addresses."""

    def __init__(self, config: ReplicasConfig) -> None:
        keys, limits = config.keys(), config.limits
        device = "cuda:0" if config.gpus else "cpu"  # Ray shows a replica its own GPUs only
        models = load_models(config.model, config.adapters, config.load, device=device)
        host = in_thread(models, slots=config.slots, context=config.context)
        self._scheduler = Scheduler(host, queue=limits.queue, queue_seconds=limits.queue_seconds)
        files = SharedFiles(limits.file_seconds, limits.files_bytes)
        self._addresses = create_app(
            self._scheduler, [Served(name) for name in models], keys=keys, limits=limits, files=files,
            public_url=config.public_url,
        )  # fmt: skip
        self._scheduler.start()
        threading.Thread(target=self._end_with_models, daemon=True).start()

    def __serve_build_asgi_app__(self) -> Any:
        return self._addresses

    def _end_with_models(self) -> None:
        # Ray would find it ill by asking, but after seconds; meanwhile it is the one with the shortest line
        while self._scheduler.failure is None:
            time.sleep(0.1)
        time.sleep(LAST_WORDS_SECONDS)
        os._exit(1)


def build(config: ReplicasConfig) -> "Application":
    """What `serve.run`, `serve run` and `serve deploy` start.

    Raises:
        WeftError: Ray Serve is not installed.
        UsageError: there are no keys, and nobody said that none are needed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported: it would report over the network
    try:
        import ray
        from ray import serve
        from ray.serve.config import BackpressureConfig, DeploymentActorConfig
    except ImportError as error:
        raise WeftError("several replicas need the package ray[serve]", fix="pip install 'weft[ray]'") from error

    config.keys()  # refused here, not in every replica
    limits = config.limits
    files = DeploymentActorConfig(
        name=FILES,
        actor_class=ray.remote(Files),
        init_args=(limits.file_seconds, limits.files_bytes),
        actor_options={"num_cpus": 0},
    )
    deployment = serve.deployment(
        name="weft",
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpus},
        max_ongoing_requests=config.requests,
        max_queued_requests=config.requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        graceful_shutdown_timeout_s=limits.drain_seconds,
        graceful_shutdown_wait_loop_s=min(1.0, limits.drain_seconds),
        max_constructor_retry_count=3,
        deployment_actors=[files],
        # what is asked for is nobody's affair
        logging_config={"enable_access_log": False},
    )
    return deployment(serve.ingress()(Replica)).bind(config)
