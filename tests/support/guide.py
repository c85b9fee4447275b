"""Running a guide as its reader does: Python in order, and `curl` against a server.

A line `$ docker run ... -v "$PWD/PATH:..." -e MODEL_NAME=NAME` has the server serve PATH as NAME.
A line `$ curl ...` is run by a shell; what follows it is the answer, in which numbers stand for any
number and `...` for any text. The ports are those of the server.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.servers import Server


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language and text of each fenced block that has a language."""
    for match in re.finditer(r"^```(\w+)\n(.*?)^```", page.read_text(), flags=re.S | re.M):
        yield match[1], match[2]


@dataclass(frozen=True)
class Reader:
    """A reader who follows a guide in a folder, with a server that can read the folder."""

    server: Server
    folder: Path
    _names: dict[str, Any] = field(default_factory=dict)

    def follow(self, page: Path) -> int:
        """Run every block; returns the number of commands that a shell ran."""
        commands = 0
        for language, text in blocks(page):
            if language == "python":
                exec(compile(self._at_ports(text), page.name, "exec"), self._names)
            elif language == "console":
                for command, shown in _commands(text):
                    commands += self._run(command, shown)
        return commands

    def _run(self, command: str, shown: str) -> bool:
        mounted = re.search(r'docker run .*"\$PWD/(\S+?):.*MODEL_NAME=(\w+)', command)
        if mounted:
            self.server.serve(mounted[2], self.folder / mounted[1])
            return False
        answer = subprocess.run(
            self._at_ports(command), shell=True, check=True, capture_output=True, text=True
        )
        check_form(_json(shown), json.loads(answer.stdout), command)
        return True

    def _at_ports(self, text: str) -> str:
        text = text.replace("localhost:8500", self.server.rpc)
        return text.replace("localhost:8501", self.server.rest)


def _commands(text: str) -> Iterator[tuple[str, str]]:
    for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
        command, _, shown = part.partition("\n")
        yield command, shown


def _json(shown: str) -> Any:
    return json.loads(shown.replace("{...}", '"..."'))


def check_form(shown: Any, received: Any, where: str) -> None:
    """The same keys, lengths, kinds and strings, whatever the numbers."""
    if isinstance(shown, str) and "..." in shown:
        pattern = ".*".join(map(re.escape, shown.split("...")))
        text = received if isinstance(received, str) else json.dumps(received)
        assert re.fullmatch(pattern, text, flags=re.S), (where, received)
    elif isinstance(shown, dict):
        assert isinstance(received, dict), (where, received)
        assert shown.keys() == received.keys(), (where, received)
        for key, value in shown.items():
            check_form(value, received[key], where)
    elif isinstance(shown, list):
        assert isinstance(received, list), (where, received)
        assert len(shown) == len(received), (where, received)
        for ours, theirs in zip(shown, received, strict=True):
            check_form(ours, theirs, where)
    elif isinstance(shown, (int, float)):
        assert isinstance(received, type(shown)), (where, received)
    else:
        assert shown == received, (where, received)
