"""The suite on a backend that is not ours: as docs/testing.md says, outside this checkout's configuration."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from urllib.parse import quote
from xml.etree import ElementTree

import pytest
from psycopg.conninfo import conninfo_to_dict

import persistence.testing
import persistence.testing.durable
from tests.docs.pages import DOCS, blocks
from tests.support import clean_environment
from tests.warm import Warm

HERE = Path(__file__).parent


def run_suite(
    folder: Path, warm: Warm, *options: str, name: str = "test_filed.py", **environ: str
) -> Counter[tuple[str, str]]:
    """Run a module of the page in a process of its own; the outcomes by the test's name."""
    (module,) = (block for block in blocks(DOCS / "testing.md") if block.file_name == name)
    (folder / name).write_text(module.text)
    shutil.copy(HERE / "filed.py", folder)
    # The programs that the suite starts need not import LangGraph anew.
    (folder / "conftest.py").write_text(f"import sys\nsys.executable = {str(warm.python)!r}\n")
    command = [sys.executable, "-m", "pytest", name, "-q", "--junitxml=result.xml", *options]
    # Another project's settings may be as strict as this; plugins are what it has installed itself.
    command += ["--strict-markers", "-W", "error", "-p", "no:asyncio", "-p", "no:cacheprovider"]
    environment = clean_environment() | environ
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    (folder / "output").write_text(result.stdout + result.stderr)
    assert result.returncode in (0, 1), result.stdout + result.stderr
    outcomes: Counter[tuple[str, str]] = Counter()
    for case in ElementTree.parse(folder / "result.xml").getroot().iter("testcase"):  # noqa: S314 - our own
        outcome = next((child.tag for child in case if child.tag != "properties"), "passed")
        outcomes[case.attrib["name"].split("[")[0], outcome] += 1
    return outcomes


@pytest.mark.timeout(600)
def test_every_test_of_the_suite_passes_in_both_colours(tmp_path: Path, warm: Warm) -> None:
    # The model is asked fewer questions here: what it finds in our own savers, tests/contract looks for.
    outcomes = run_suite(tmp_path, warm, FUZZ_STEPS="10")
    assert {key for key in outcomes if key[1] != "passed"} == set(), (tmp_path / "output").read_text()
    exported = {**vars(persistence.testing), **vars(persistence.testing.durable)}
    assert {name for name, _ in outcomes} == {name for name in exported if name.startswith("test_")}
    assert all(count >= 2 for count in outcomes.values())


def test_what_breaks_a_clause_is_caught(tmp_path: Path, warm: Warm) -> None:
    """Each test meets a backend that breaks one clause; the test above has shown that it passes otherwise."""
    broken = {
        "test_limit": "R4",
        "test_pending_writes_come_in_order": "R8",
        "test_delete_thread_deletes_all_of_it_and_nothing_else": "F1",
        "test_no_value_is_stored_in_plaintext": "S1",
    }
    pairs = " ".join(f"{name}={clause}" for name, clause in broken.items())
    outcomes = run_suite(tmp_path, warm, "-k", " or ".join(broken), FILED_BREAKS=pairs)
    assert outcomes == {(name, "failure"): 2 for name in broken}


def test_suite_runs_on_a_postgres_of_ones_own(postgres_dsn: str, tmp_path: Path, warm: Warm) -> None:
    """The module for others' CI; its users write the server's URL without options."""
    parts = conninfo_to_dict(persistence.Dsn.parse(postgres_dsn).conninfo)
    login = ":".join(quote(str(parts[key]), safe="") for key in ("user", "password") if key in parts)
    url = f"postgresql://{login}@{quote(str(parts['host']), safe='')}:{parts['port']}/{parts['dbname']}"
    name = "test_limit"
    outcomes = run_suite(tmp_path, warm, "-k", name, name="test_matrix.py", MATRIX_POSTGRES=url)
    assert outcomes == {(name, "passed"): 6}


def test_package_does_not_need_the_tools_of_the_suite(tmp_path: Path) -> None:
    """Only ``persistence.testing`` imports pytest, and says what to install where it is missing."""
    code = "import sys; sys.modules['hypothesis'] = None; import persistence; import persistence.testing"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert "pip install 'langgraph-persistence[testing]'" in result.stderr
