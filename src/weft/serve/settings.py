"""What a server is told before it starts: where it listens, to whom, and how much it does at once."""

import ipaddress
import os
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt

from weft.config import Config
from weft.errors import UsageError
from weft.serve.limits import Limits

KEY_VARIABLE = "WEFT_API_KEY"
PublicUrl = Annotated[str, Field(pattern=r"^(https?://[^/\s]+)?$")]


class ServeConfig(Config):
    """Where a server listens, to whom, and how much it does at once."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    """0: any that is free."""
    slots: PositiveInt = 16
    """Answers written at once by each model."""
    context: PositiveInt | None = None
    """Positions of a prompt and its answer; None: as many as the model has."""
    threads: PositiveInt | None = None
    """Of models on a CPU; None: OMP_NUM_THREADS, or half of the cores, as callers need the others."""
    key_file: Path | None = None
    """Keys of callers, one per line. Default: the environment variable WEFT_API_KEY, if it is set."""
    insecure: bool = False
    """Listen on an address that others reach, without keys."""
    public_url: PublicUrl = ""
    """http(s)://HOST[:PORT] put before the addresses of pictures, for pages that show them elsewhere."""
    limits: Limits = Limits()


def read_keys(config: ServeConfig) -> list[str]:
    """
    Raises:
        UsageError: the file cannot be read or is empty; or others could reach the server, and it has no keys.
    """
    if config.key_file is not None:
        try:
            lines = config.key_file.read_text().splitlines()
        except OSError as error:
            raise UsageError(f"the keys cannot be read: {error.strerror}", where=str(config.key_file)) from error
        keys = [line.strip() for line in lines if line.strip()]
        if not keys:
            raise UsageError("the file of keys is empty", where=str(config.key_file), fix="write one key per line")
    else:
        keys = [key] if (key := os.environ.get(KEY_VARIABLE, "").strip()) else []
    if not keys and not config.insecure and not _is_loopback(config.host):
        raise UsageError(
            f"{config.host} can be reached by others, and no key protects it",
            where="--host",
            fix=f"set {KEY_VARIABLE}, give --key-file, or say --insecure",
        )
    return keys


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
