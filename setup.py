"""The compiled kernels, which the package does without where there is no C compiler; all else is in pyproject.toml."""

from setuptools import Extension, setup

KERNELS = Extension(
    "sparsedelta.codecs.kernels._native",
    ["sparsedelta/codecs/kernels/_native.c"],
    extra_compile_args=["-O3", "-g0"],
    py_limited_api=True,
    optional=True,  # numpy does the same work
)

setup(ext_modules=[KERNELS], options={"bdist_wheel": {"py_limited_api": "cp311"}})
