"""What CI does before the tests: a browser for those that look at pages, and never an error where there is none."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / ".ci" / "install-chromium"
TOOLS = ("bash", "grep", "mktemp", "tail", "rm")
UBUNTU = Path("/etc/os-release").exists() and "\nID=ubuntu" in "\n" + Path("/etc/os-release").read_text()
SKIPPED = "no Chromium, so the tests of pages are skipped: "

pytestmark = pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason="no bash with its usual tools")


def install(folder: Path, **programs: str) -> str:
    """Run the script where there are these programs alone, scripts by name; return what it printed."""
    for name in TOOLS:
        (folder / name).symlink_to(str(shutil.which(name)))
    for name, lines in programs.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!{folder / 'bash'}\n{lines}\n")
        path.chmod(0o755)
    command = [str(folder / "bash"), str(SCRIPT)]
    done = subprocess.run(command, env={"PATH": str(folder)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_where_there_is_a_browser_nothing_is_done_or_said(tmp_path: Path) -> None:
    assert install(tmp_path, chromium="exit 1", id="echo 0", apt_get="echo called; exit 1") == ""


def test_only_root_installs(tmp_path: Path) -> None:
    assert install(tmp_path, id="echo 1000", apt_get="exit 0") == f"{SKIPPED}only root can install it\n"


@pytest.mark.skipif(UBUNTU, reason="Ubuntu's package of Chromium is not installed by apt-get alone")
def test_what_the_package_manager_says_is_the_reason(tmp_path: Path) -> None:
    failed = install(tmp_path, id="echo 0", apt_get="echo E: Unable to locate package >&2; exit 100")
    assert failed.endswith(f"{SKIPPED}its installation failed: E: Unable to locate package\n")


@pytest.mark.skipif(UBUNTU, reason="Ubuntu's package of Chromium is not installed by apt-get alone")
@pytest.mark.parametrize("manager", ["apt_get", "dnf", "apk"])
def test_chromium_is_installed_by_the_systems_package_manager(manager: str, tmp_path: Path) -> None:
    log = tmp_path / "calls"
    printed = install(tmp_path, id="echo 0", **{manager: f'echo "$@" >> {log}'})
    assert printed == "installing Chromium for the tests of pages\n"
    assert "chromium" in log.read_text().splitlines()[-1]


@pytest.mark.skipif(UBUNTU, reason="Ubuntu's package of Chromium is not installed by apt-get alone")
def test_an_unknown_system_is_told(tmp_path: Path) -> None:
    assert install(tmp_path, id="echo 0").startswith(f"{SKIPPED}none of the package managers")
