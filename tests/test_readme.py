"""The commands in the documentation name files, options, modules and make targets that exist."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("bundles/*/docs/README.md"))]


def commands(page: Path) -> list[str]:
    """Shell commands of a page's code blocks, continued lines joined, comments dropped."""
    found = []
    for block in re.findall(r"```(?:bash)?\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.sub(r"\s#.*", "", line).strip()
            if command.startswith(("python ", "make ", "torchrun ")):
                found.append(command)
    return found


def bundle_commands() -> list[tuple[str, str]]:
    return [
        (str(page.relative_to(ROOT)), command)
        for page in PAGES
        for command in commands(page)
        if "monai.bundle run" in command and "--bundle_root" not in command
    ]


@pytest.mark.parametrize(("page", "command"), bundle_commands())
def test_bundle_commands_name_files_and_options_that_exist(page: str, command: str) -> None:
    words = shlex.split(command)
    listed = words[words.index("--config_file") + 1]
    files = ast.literal_eval(listed) if listed.startswith("[") else [listed]
    keys: set[str] = set()
    for file in files:
        keys |= set(json.loads((ROOT / file).read_text(encoding="utf-8")))
    ours = words[words.index("run") + 1 :]
    options = {word.removeprefix("--").split("#")[0] for word in ours if word.startswith("--")} - {"config_file"}
    assert options <= {key.lstrip("+").split("#")[0] for key in keys}, f"{page}: {options - keys}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"^make ((?:[a-z-]+ ?)+)", text, flags=re.MULTILINE))
    named |= set(re.findall(r"`make ([a-z-]+)`", text))
    words = {word for group in named for word in group.split()}
    assert {"demo", "test"} <= words
    assert words <= targets


def test_modules_exist() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    modules = set(re.findall(r"python -m ((?:common|benchmarks)\.[\w.]+)", text))
    assert modules
    for module in modules:
        assert importlib.util.find_spec(module) is not None, module


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"
