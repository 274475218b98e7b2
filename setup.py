"""Builds the extension: runs CMake (CMakeLists.txt describes the native build) with Ninja."""

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
        # CMake's cache has paths of its environment, such as that of ninja. The environment of an isolated build is
        # deleted afterwards, so a build in another environment starts from an empty folder.
        record = build / "environment"
        tools = [os.path.realpath(shutil.which(tool) or "") for tool in ("cmake", "ninja")]
        environment = "\n".join([sys.prefix, *tools])
        if not record.exists() or record.read_text() != environment:
            shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True, exist_ok=True)
        record.write_text(environment)
        configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}"]
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "--build", str(build), "--target", "_C", "--parallel", jobs], check=True)
        install = ["cmake", "--install", str(build), "--prefix", str(target.parent)]
        subprocess.run(install, check=True)


setup(ext_modules=[Extension("axiscap._C", [])], cmdclass={"build_ext": CMakeBuild})
