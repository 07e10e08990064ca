"""The file's own promises: the map at its top is true, and sections depend upwards only."""

import ast
import dis
import re
import subprocess
import sys
from collections.abc import Iterator
from types import CodeType

import pytest
from service import ROOT

import spywatcher

FILE = ROOT / "spywatcher.py"
SOURCE = FILE.read_text("utf-8")
BANNERS = re.findall(r"^# -{10,} (.+)$", SOURCE, re.MULTILINE)


def lines_of_sections() -> dict[int, str]:
    """The section that each line number stands in; nothing for what comes before the first."""
    sections: dict[int, str] = {}
    for number, line in enumerate(SOURCE.splitlines(), 1):
        banner = re.match(r"# -{10,} (.+)$", line)
        sections[number] = banner[1] if banner else sections.get(number - 1, "")
    return sections


def loads(code: CodeType) -> Iterator[tuple[int, str]]:
    """Line and name of each module-level name that runs in `code`; postponed annotations do not."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_NAME", "LOAD_GLOBAL") and instruction.positions:
            yield instruction.positions.lineno or 0, instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from loads(constant)


def definitions(code: CodeType) -> dict[str, int]:
    """Where each module-level name gets its value first."""
    stores = [i for i in dis.get_instructions(code) if i.opname == "STORE_NAME" and i.positions]
    return {i.argval: i.positions.lineno or 0 for i in reversed(stores) if i.positions}


def test_the_map_lists_the_sections_in_their_order():
    listed = SOURCE.split("each using only those above it:\n")[1].split('\n"""')[0]
    assert re.findall(r"^    (\S.*?)  ", listed, re.MULTILINE) == BANNERS


def test_a_section_uses_only_sections_above_it():
    code = compile(SOURCE, "spywatcher.py", "exec", dont_inherit=True)
    defined, sections = definitions(code), lines_of_sections()
    order = ["", *BANNERS]
    wrong = [
        f"line {line}: {sections[line]} uses {name} of {sections[defined[name]]}"
        for line, name in loads(code)
        if name in defined and order.index(sections[line]) < order.index(sections[defined[name]])
    ]
    assert wrong == []


def test_a_section_opens_with_what_it_is_for():
    lines = SOURCE.splitlines()
    for number, line in enumerate(lines):
        if re.match(r"# -{10,} ", line):
            comment = [text for text in lines[number + 1 : number + 9] if text.startswith("#")]
            assert 2 <= len(comment) <= 7, line


@pytest.mark.parametrize("name", spywatcher.__all__)
def test_what_plugins_may_import_is_documented(name):
    text = getattr(spywatcher, name).__doc__ or ""
    assert re.search(r"^ {8}\S", text, re.MULTILINE), "an example is missing"


def test_all_is_sorted_and_complete():
    assert spywatcher.__all__ == sorted(spywatcher.__all__)
    plugins = "\n".join(path.read_text("utf-8") for path in ROOT.glob("plugins/**/*.py"))
    imported = re.findall(r"^from spywatcher import (\([^)]+\)|.+)$", plugins, re.MULTILINE)
    names = {name for line in imported for name in re.findall(r"\w+", line)}
    assert names <= set(spywatcher.__all__)


WATCHED_IMPORT = """
import importlib, sys, threading
for name in {modules}: importlib.import_module(name)
opened = []
def watch(event, args):
    quiet = event == "open" and (str(args[0]).endswith((".py", ".pyc")) or ".pyc." in str(args[0]))
    if event.startswith(("open", "socket.", "subprocess.", "sqlite3.")) and not quiet:
        opened.append((event, str(args)))
sys.addaudithook(watch)
import spywatcher
assert not opened, opened
assert threading.active_count() == 1
assert not any(name.startswith("spywatcher_plugins") for name in sys.modules)
"""


def test_importing_opens_nothing_and_starts_nothing():
    found = re.findall(r"^(?:import|from) ([\w.]+)", SOURCE, re.MULTILINE)
    modules = [name for name in found if name != "__future__"]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED_IMPORT.format(modules=modules)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_no_function_or_class_outgrows_its_bounds():
    """At most 50 code lines a function, 250 lines a class, 7 constructor arguments."""
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.ClassDef):
            assert (node.end_lineno or 0) - node.lineno < 250, node.name
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno <= 50, node.name
            if node.name == "__init__":
                arguments = [*node.args.args, *node.args.kwonlyargs]
                assert len(arguments) <= 1 + 7, f"__init__ at line {node.lineno}"
