"""The three ways onto a host, each from a folder that holds nothing else.

Building the bundle asks the package registry for wheels, as setting up .venv does.
"""

from __future__ import annotations

import asyncio
import os
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from service import ROOT, running, tables_for, write_settings
from waiting import eventually

from simulator import PretendDiscord
from spywatcher import __version__

HELLO = '"""Mine."""\nimport hikari\nfrom spywatcher import on\n\n@on(hikari.GuildTypingEvent, emit="hello")\ndef hello(event):\n    return {}\n'
SHIPPED = ("members", "messages", "presence")


@pytest.fixture
async def discord() -> AsyncIterator[PretendDiscord]:
    async with PretendDiscord() as discord:
        yield discord


@pytest.fixture(scope="session")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a fresh clone holds, so that nothing that is built here stays behind."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "plugins", folder / "plugins")
    files = ("simulator.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "Makefile")
    for path in [*ROOT.glob("spywatcher*.py"), *(ROOT / name for name in files)]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="session")
def bundle(copy: Path) -> Path:
    """dist/spywatcher.pyz, for this Python alone: one is built like several."""
    (copy / ".venv").symlink_to(Path(sys.prefix))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    command = ["make", "bundle", f"BUNDLE_PYTHONS={version}", "--assume-old=.venv/.bundle"]
    made = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return copy / "dist" / "spywatcher.pyz"


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the bundle unpacks itself the first time, for all tests."""
    return tmp_path_factory.mktemp("unpacked")


CREDENTIALS = f"[auth]\nsecret = '{'s' * 32}'\n[discord]\ntoken = 'MTExMTEx.abc.def'\n"


async def checked(command: Sequence[str | Path], folder: Path, **environment: str) -> str:
    """What `check` says, with the two settings that have no default."""
    settings = folder / "config.toml"
    if not settings.exists():
        settings.write_text(CREDENTIALS)
    return await output([*command, "check", "--settings"], folder, **environment)


async def output(command: Sequence[str | Path], folder: Path, **environment: str) -> str:
    """Run to the end in `folder`, with no module of this repository in reach."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    text = (await process.communicate())[0].decode()
    assert process.returncode == 0, text
    return text


def seconds_of_children() -> float:
    """For which processes worked that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def plugins_in(text: str) -> set[str]:
    return set(re.findall(r"^(\w+):$", text, re.MULTILINE))


# ---- one file


async def test_the_bundle_runs_without_any_package_and_starts_quickly_the_second_time(
    bundle: Path, unpacked: Path, tmp_path: Path
) -> None:
    # -I and -S: neither this environment's packages nor the user's.
    command = [sys.executable, "-I", "-S", bundle, "--version"]
    await output(command, tmp_path, SHIV_ROOT=str(unpacked))
    worked = seconds_of_children()
    text = await output(command, tmp_path, SHIV_ROOT=str(unpacked))
    assert text == f"SpyWatcher {__version__}\n"
    assert seconds_of_children() - worked < 3


async def test_the_bundle_brings_its_plugins(bundle: Path, unpacked: Path, tmp_path: Path) -> None:
    text = await checked([sys.executable, bundle], tmp_path, SHIV_ROOT=str(unpacked))
    assert set(SHIPPED) <= plugins_in(text)


def test_the_bundle_brings_the_page_with_what_it_needs_of_others(bundle: Path) -> None:
    with zipfile.ZipFile(bundle) as archive:
        names = {name.partition("/dashboard/")[2] for name in archive.namelist()}
    assert {
        "static/index.html",
        "static/main.js",
        "vendor/socket.io.js",
        "vendor/uplot.js",
    } <= names


async def test_settings_and_plugins_of_the_working_directory_apply_to_the_bundle(
    bundle: Path, unpacked: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text(f"[server]\nport = 4711\n{CREDENTIALS}")
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "hello.py").write_text(HELLO)
    text = await checked([sys.executable, bundle], tmp_path, SHIV_ROOT=str(unpacked))
    assert "server.port = 4711" in text
    assert {*SHIPPED, "hello"} <= plugins_in(text)


async def test_a_plugin_of_ones_own_stands_in_for_the_shipped_one_of_its_name(
    bundle: Path, unpacked: Path, tmp_path: Path
) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "messages.py").write_text(HELLO)
    text = await checked([sys.executable, bundle], tmp_path, SHIV_ROOT=str(unpacked))
    assert "messages:\n  sends     hello\n" in text
    assert re.search(
        rf"plugin messages: {tmp_path}/plugins/messages.py replaces /\S+/messages.py", text
    )


async def test_the_bundle_serves(
    bundle: Path, unpacked: Path, tmp_path: Path, discord: PretendDiscord
) -> None:
    write_settings(tmp_path, tables_for(discord))
    command = ["/usr/bin/env", f"SHIV_ROOT={unpacked}", sys.executable, str(bundle)]
    async with running(tmp_path, command=command) as service:
        await discord.wait_for_bot()

        async def is_ready() -> bool:
            return (await service.get("/health/ready")).code == 200

        await eventually(is_ready)


def test_no_path_of_the_machine_that_built_it_is_in_the_bundle(bundle: Path) -> None:
    needle = str(bundle.parent.parent).encode()
    with zipfile.ZipFile(bundle) as archive:
        assert [name for name in archive.namelist() if needle in archive.read(name)] == []


# ---- files copied, packages installed


async def test_what_the_readme_copies_is_enough(tmp_path: Path) -> None:
    for path in ROOT.glob("spywatcher*.py"):
        shutil.copy(path, tmp_path)
    settings = (
        (ROOT / "config.toml")
        .read_text("utf-8")
        .replace('secret = ""', f'secret = "{"s" * 32}"', 1)
    )
    (tmp_path / "config.toml").write_text(
        settings.replace('token = ""', 'token = "MTExMTEx.abc.def"', 1)
    )
    shutil.copytree(ROOT / "plugins", tmp_path / "plugins")
    text = await checked([sys.executable, "spywatcher.py"], tmp_path)
    assert set(SHIPPED) <= plugins_in(text)
    assert '"message:new"' in await output([sys.executable, "spywatcher.py", "types"], tmp_path)


async def test_a_plain_copy_serves_from_any_folder(tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(ROOT / "spywatcher.py", tmp_path / "app")
    shutil.copytree(ROOT / "plugins", tmp_path / "app" / "plugins")
    command = [sys.executable, "../app/spywatcher.py"]
    assert set(SHIPPED) <= plugins_in(await checked(command, tmp_path / "elsewhere"))


async def test_a_folder_of_plugins_that_is_not_there_is_named(tmp_path: Path) -> None:
    shutil.copy(ROOT / "spywatcher.py", tmp_path)
    with pytest.raises(AssertionError, match=r"plugins\.folders: .*plugins is no folder"):
        await checked([sys.executable, "spywatcher.py"], tmp_path)


# ---- installed


@pytest.fixture(scope="session")
def installed(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install .` makes of this repository; the dependencies are those of this environment."""
    [wheel] = (bundle.parent.parent / "build" / "bundle").glob("spywatcher-*.whl")
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


async def test_an_installed_server_has_a_command_and_its_plugins(
    installed: Path, tmp_path: Path
) -> None:
    command = [installed / "bin" / "spywatcher"]
    text = await checked(command, tmp_path, PYTHONPATH=str(installed))
    assert set(SHIPPED) <= plugins_in(text)


async def test_an_installed_server_says_its_version(installed: Path, tmp_path: Path) -> None:
    command = [installed / "bin" / "spywatcher", "--version"]
    text = await output(command, tmp_path, PYTHONPATH=str(installed))
    assert text == f"SpyWatcher {__version__}\n"
