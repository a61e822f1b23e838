"""The compiled kernels, which are optional; everything else is in pyproject.toml."""

import sysconfig

from setuptools import Extension, setup

KERNELS = Extension(
    "sparsedelta.codecs.kernels._native",
    ["sparsedelta/codecs/kernels/_native.c"],
    depends=[f"sparsedelta/codecs/kernels/_{name}.h" for name in ("blake3", "small", "header")],
    extra_compile_args=["-O3", "-g0"],
    py_limited_api=True,
    optional=True,  # without a C compiler the package is installed all the same, and uses numpy
)

# Python without the GIL has no stable ABI, which the kernels are compiled for.
HAS_STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    ext_modules=[KERNELS] if HAS_STABLE_ABI else [],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if HAS_STABLE_ABI else {},
)
