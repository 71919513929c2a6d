"""Puts the examples and the demo data into the wheel, as `longfactory/share`, and the address of
the repository that it is built from into its metadata; the rest is in pyproject.toml.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithExamples(build_py):
    def run(self):
        super().run()
        if self.editable_mode:  # `longfactory.resources` finds them in the clone
            return
        for name in ("examples", "data"):
            target = Path(self.build_lib) / "longfactory" / "share" / name
            shutil.copytree(
                ROOT / name,
                target,
                ignore=shutil.ignore_patterns("__pycache__"),
                dirs_exist_ok=True,
            )


def project_urls():
    """The pages of the project: of LONGFACTORY_URL where it is set, else of the clone's origin. A
    folder, or an archive without a repository, has none.
    """
    address = os.environ.get("LONGFACTORY_URL", "")
    if not address and (ROOT / ".git").exists():
        origin = ["git", "-C", str(ROOT), "config", "--get", "remote.origin.url"]
        try:
            found = subprocess.run(origin, capture_output=True, text=True, check=False)
        except OSError:  # no git
            return {}
        address = found.stdout.strip()
    address = re.sub(r"^(ssh://)?git@([^:/]+)[:/]", r"https://\2/", address)
    match = re.fullmatch(r"https?://(?:[^@/]*@)?([^@]+?)(?:\.git)?/?", address)
    if match is None:
        return {}
    page = f"https://{match[1]}"
    return {
        "Homepage": page,
        "Source": page,
        "Issues": f"{page}/issues",
        "Changelog": f"{page}/blob/main/CHANGELOG.md",
    }


setup(cmdclass={"build_py": BuildWithExamples}, project_urls=project_urls())
