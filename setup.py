"""Builds the extension: everything about the native build is in CMakeLists.txt, which this calls with Ninja."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        # What CMake found belongs to the environment that it ran in (the path of its ninja, for one), and an isolated
        # build's is gone afterwards: another one begins afresh.
        environment = build / "environment"
        here = "\n".join([sys.prefix, *(os.path.realpath(shutil.which(tool) or "") for tool in ("cmake", "ninja"))])
        if not environment.exists() or environment.read_text() != here:
            shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True, exist_ok=True)
        environment.write_text(here)
        configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}"]
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "--build", str(build), "--target", "_C", "--parallel", jobs], check=True)
        install = ["cmake", "--install", str(build), "--prefix", str(target.parent)]
        subprocess.run(install, check=True)


setup(ext_modules=[Extension("axiscap._C", [])], cmdclass={"build_ext": CMakeBuild})
