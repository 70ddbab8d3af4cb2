"""The Dockerfile, read and not built: what it copies exists, what it runs is what the Makefile runs, nobody is root.

Its shell lines run in a shell with a stand-in for Python, its health check asks a server, its command gets to the door.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from weft.cli import main

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
EXTRAS = PROJECT["project"]["optional-dependencies"]


def instructions() -> list[tuple[str, str]]:
    """(name, what follows it) of each, with continued lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in text.splitlines()) if name]


def of(name: str) -> list[str]:
    return [rest for each, rest in instructions() if each == name]


def copied() -> list[str]:
    """Of the build's context."""
    return [source for rest in of("COPY") for source in rest.split()[:-1]]


def shell(line: str, tmp_path: Path, **settings: str) -> tuple[list[list[str]], str]:
    """What a RUN line calls Python with, and the constraints that pip would find in its environment."""
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\n"
        "import json, os, sys\n"
        "print(json.dumps([sys.argv[1:], os.environ.get('PIP_CONSTRAINT', '')]))\n"
    )
    python.chmod(0o700)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **settings}
    said = subprocess.run(["sh", "-euc", line], env=env, check=True, capture_output=True, text=True).stdout
    calls = [json.loads(each) for each in said.splitlines()]
    return [words for words, _ in calls], ",".join(constraint for _, constraint in calls)


def test_every_instruction_is_one_that_docker_knows():
    known = {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    names = [name for name, _ in instructions()]
    assert set(names) == known
    assert names[:2] == ["ARG", "FROM"]


def test_both_devices_are_stages_and_the_last_one_is_chosen_by_name():
    *stages, last = of("FROM")
    named = [re.fullmatch(r"(\S+) AS (\w+)", stage).groups() for stage in stages]
    assert [name for _, name in named] == ["base", "cpu", "cuda"]
    assert [source for source, _ in named[1:]] == ["base", "base"]
    assert (last, of("ARG")[0]) == ("${DEVICE}", "DEVICE=cpu")


def test_its_python_is_the_one_that_is_pinned():
    version = re.search(r"Python (3\.\d+)", (ROOT / "constraints.txt").read_text())[1]
    assert of("FROM")[0].startswith(f"python:{version}-")


def test_what_it_copies_exists_and_is_all_that_is_sent_to_it():
    assert all((ROOT / path).exists() for path in copied())
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    assert sorted(line[1:] for line in lines if line[0] == "!") == sorted(copied())
    assert not any(re.search(r"key|secret|token|\.env", path, re.IGNORECASE) for path in copied())


def test_an_image_can_be_built_from_the_source_that_is_published():
    published = set(PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"])
    always = {"pyproject.toml", *PROJECT["project"]["license-files"]}
    assert {"Dockerfile", ".dockerignore", *copied()} <= published | always


def test_torch_is_installed_as_the_makefile_does(tmp_path):
    made = re.search(r"python (-m pip install .* torch==\S+)", (ROOT / "Makefile").read_text())[1]
    line = next(line for line in of("RUN") if "torch==" in line)
    ((words,), _) = shell(line, tmp_path)
    assert words == made.split()
    assert words[-1] == f"torch=={PINS['torch']}"
    ((words,), _) = shell(line, tmp_path, TORCH_INDEX="https://wheels.example/cpu")
    assert words == [*made.split()[:-1], "--extra-index-url", "https://wheels.example/cpu", made.split()[-1]]


@pytest.mark.parametrize("device, more", [("cpu", set()), ("cuda", {"triton", "quantize"})])
def test_the_package_is_installed_with_extras_that_there_are(device, more, tmp_path):
    stages = DOCKERFILE.read_text().split("\nFROM ")
    stage = next(each for each in stages if each.startswith(f"base AS {device}\n"))
    extras = re.search(r"EXTRAS=(\S+)", stage)[1]
    line = next(line for line in of("RUN") if "EXTRAS" in line)
    ((words,), constraint) = shell(line, tmp_path, EXTRAS=extras)
    assert words == ["-m", "pip", "install", "--quiet", "--constraint", "constraints.txt", f".[{extras}]"]
    # the packages that build it follow the environment alone
    assert constraint == "/build/constraints.txt"
    assert "/build" in of("WORKDIR")
    assert set(extras.split(",")) == {"serve", "page", "diffusion", "sentencepiece"} | more
    assert set(extras.split(",")) <= EXTRAS.keys()


def test_everything_that_is_run_is_looked_at_above():
    assert [line.split()[0] for line in of("RUN")] == ["python", "PIP_CONSTRAINT=/build/constraints.txt", "useradd"]


def test_it_runs_as_somebody_without_rights():
    (user,) = of("USER")
    assert user.isdecimal() and int(user) >= 1000  # by number: so Kubernetes can see that it is not root
    assert f"--uid {user} " in next(line for line in of("RUN") if line.startswith("useradd"))
    names = [name for name, _ in instructions()]
    assert "RUN" not in names[names.index("USER") :] and "COPY" not in names[names.index("USER") :]


def test_it_starts_a_server_that_others_reach_and_asks_for_keys(monkeypatch, capsys):
    (entry,), (default,) = of("ENTRYPOINT"), of("CMD")
    words = [*json.loads(entry), *json.loads(default)]
    assert words[0] == "weft"
    monkeypatch.delenv("WEFT_API_KEY", raising=False)
    with pytest.raises(SystemExit) as end:
        main(words[1:])
    assert end.value.code == 2
    assert "0.0.0.0 can be reached by others, and no key protects it" in capsys.readouterr().err


class Answers(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self):
        self.send_response(self.status if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_its_health_is_the_servers(tmp_path):
    (check,) = of("HEALTHCHECK")
    options, _, words = check.partition(" CMD ")
    assert {name for name, _ in (option.split("=") for option in options.split())} == {
        "--interval", "--timeout", "--start-period", "--retries",
    }  # fmt: skip
    python, *arguments = json.loads(words)
    assert (python, of("EXPOSE")) == ("python", ["8000"])
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = [each.replace("8000", str(server.server_port)) for each in arguments]
        assert here != arguments
        found = []
        for status in (200, 500):
            Answers.status = status
            found.append(subprocess.run([sys.executable, *here]).returncode)
        server.shutdown()
    found.append(subprocess.run([sys.executable, *here], stderr=subprocess.DEVNULL).returncode)
    assert found == [0, 1, 1]


def test_no_secret_and_no_index_stands_in_it():
    text = DOCKERFILE.read_text()
    assert "://" not in text
    assert not re.search(r"(?:KEY|TOKEN|PASSWORD|SECRET)\S*=", text)
    assert {rest.partition("=")[2] for rest in of("ARG")} == {"cpu", ""}


def test_the_commands_of_the_guide_are_for_this_file():
    text = (ROOT / "docs" / "guides" / "serving.md").read_text()
    text = text.replace("\\\n", " ")
    lines = [shlex.split(line) for line in text.splitlines() if line.startswith("docker ")]
    builds = [words for words in lines if words[1] == "build"]
    given = {words[words.index("--build-arg") + 1] for words in builds if "--build-arg" in words}
    assert given == {"DEVICE=cuda"}
    assert {each.partition("=")[0] for each in given} <= {rest.partition("=")[0] for rest in of("ARG")}
    assert all(words[-1] == "." for words in builds)
    port = of("EXPOSE")[0]
    runs = [words for words in lines if words[1] == "run"]
    assert runs
    assert all(words[words.index("--publish") + 1].endswith(f":{port}") for words in runs)
