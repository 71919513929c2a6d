"""Puts the examples and the demo data into the wheel, as `longfactory/share`; the rest is in
pyproject.toml.
"""

import shutil
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


setup(cmdclass={"build_py": BuildWithExamples})
