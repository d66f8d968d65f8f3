"""Calls CMake for the native core; everything else about the package is in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Builds avatar_rt._native and libavatar_rt with CMake, beside the package's Python files."""

    def build_extension(self, ext: Extension) -> None:
        import cmake
        import ninja
        import pybind11

        program = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        configure = [
            program, "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_INSTALL_PREFIX={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        install = [program, "--install", str(build)]
        # setuptools itself copies an editable build's extension into the source tree, but knows nothing of the library.
        library_dir = ROOT / "avatar_rt" if self.editable_mode else target
        library = [*install, "--component", "c", "--prefix", str(library_dir)]
        for command in (configure, [program, "--build", str(build)], [*install, "--component", "python"], library):
            subprocess.run(command, check=True)


setup(
    packages=find_packages(include=["avatar_rt", "avatar_rt.*"]),
    ext_modules=[Extension("avatar_rt._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)
